package guest

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"
)

// Output gathers what a program, such as a guest's monitor, writes and lets a
// test wait for it.
type Output struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	first   time.Time
	last    time.Time
	changed chan struct{} // closed and replaced by each write
}

// NewOutput returns an empty output.
func NewOutput() *Output { return &Output{changed: make(chan struct{})} }

// Write implements io.Writer. It does not fail.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	o.last = time.Now()
	if o.buf.Len() == 0 {
		o.first = o.last
	}
	return o.buf.Write(p)
}

// Span is when the first and the last of the output came.
func (o *Output) Span() (first, last time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.first, o.last
}

// String is all that was written so far.
func (o *Output) String() string {
	text, _ := o.state()
	return text
}

func (o *Output) state() (text string, changed <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String(), o.changed
}

// Wait returns when f is true of the output. It fails when ended is closed,
// after which nothing more is written, or ctx is done before.
func (o *Output) Wait(ctx context.Context, ended <-chan struct{}, f func(text string) bool) error {
	for {
		text, changed := o.state()
		if f(text) {
			return nil
		}
		select {
		case <-changed:
		case <-ended:
			if f(o.String()) {
				return nil
			}
			return errors.New("it ended first")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
