package machine

import (
	"context"
	"errors"
	"io"
	"sync"
)

// ConsoleKept is how much of what the guest has printed is kept, in bytes:
// some 3,000 lines of a kernel's messages.
const ConsoleKept = 256 << 10

// Console is what the guest prints on its first serial port: the latest
// ConsoleKept bytes, across resets, for any number of readers.
//
// A reader is a place in the text and nothing else. The guest never waits for
// one, nor does one wait for another: who is overtaken has missed what is not
// kept any more, and is told how much that was.
type Console struct {
	mu   sync.Mutex
	ring []byte        // byte number i of the text is at i modulo its length
	end  uint64        // bytes printed so far
	over bool          // there will be no more
	more chan struct{} // closed at the next byte, or the end; nil while nobody waits

	copy io.Writer // everything goes there too, and is waited for; Write's alone
	warn func(error)
}

// NewConsole makes a console. All that is printed goes to out too, if that is
// not nil, and out is waited for; once out has failed, which warn is told, it is
// left alone.
func NewConsole(out io.Writer, warn func(error)) *Console {
	return &Console{ring: make([]byte, ConsoleKept), copy: out, warn: warn}
}

// Write prints p. It does not fail. One goroutine calls it at a time.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	for rest := p; len(rest) > 0; {
		n := copy(c.ring[c.end%uint64(len(c.ring)):], rest)
		c.end += uint64(n)
		rest = rest[n:]
	}
	c.wake()
	c.mu.Unlock()
	if c.copy != nil {
		if _, err := c.copy.Write(p); err != nil {
			c.copy = nil
			c.warn(err)
		}
	}
	return len(p), nil
}

// Close says that there will be no more. A second Close does nothing.
func (c *Console) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	c.wake()
}

// wake lets the waiting readers look again. The caller has mu.
func (c *Console) wake() {
	if c.more != nil {
		close(c.more)
		c.more = nil
	}
}

// oldest is the number of the first byte that is kept. The caller has mu.
func (c *Console) oldest() uint64 { return c.end - min(c.end, uint64(len(c.ring))) }

// Attach makes a reader that begins scrollback bytes before what comes next.
func (c *Console) Attach(scrollback uint64) *ConsoleReader {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &ConsoleReader{console: c, at: c.end - min(c.end, scrollback), live: c.end}
}

// ConsoleReader is a place in a console's text. One goroutine uses it.
type ConsoleReader struct {
	console *Console
	at      uint64 // number of the next byte
	live    uint64 // number of the first byte that came after Attach
}

// ConsoleText is a piece of a console's text.
type ConsoleText struct {
	Text       []byte
	Missed     uint64 // bytes before Text that this reader missed
	Scrollback bool   // the guest printed Text before the reader was there
}

// Live says that what the guest had printed before Attach has been read.
func (r *ConsoleReader) Live() bool { return r.at >= r.live }

// Next waits for text and reads some of it into buf. The error is io.EOF when
// there will be no more, or ctx's.
func (r *ConsoleReader) Next(ctx context.Context, buf []byte) (ConsoleText, error) {
	c := r.console
	c.mu.Lock()
	defer c.mu.Unlock()
	for r.at == c.end {
		if c.over {
			return ConsoleText{}, io.EOF
		}
		if c.more == nil {
			c.more = make(chan struct{})
		}
		more := c.more
		c.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
		}
		c.mu.Lock()
		if r.at == c.end && ctx.Err() != nil {
			return ConsoleText{}, context.Cause(ctx)
		}
	}
	var t ConsoleText
	if oldest := c.oldest(); r.at < oldest {
		t.Missed = oldest - r.at
		r.at = oldest
	}
	limit := c.end
	if t.Scrollback = r.at < r.live; t.Scrollback {
		limit = r.live
	}
	buf = buf[:min(uint64(len(buf)), limit-r.at)]
	t.Text = buf
	for len(buf) > 0 {
		n := copy(buf, c.ring[r.at%uint64(len(c.ring)):])
		buf = buf[n:]
		r.at += uint64(n)
	}
	return t, nil
}

// Console is what the guest prints on its first serial port. It is closed when
// the machine has ended.
func (m *Machine) Console() *Console { return m.console }

// ConsoleInput types p at the guest's first serial port. While the guest has
// 64 KiB to read it waits. It returns how much of p was typed; the error is
// ctx's, or ErrEnded.
func (m *Machine) ConsoleInput(ctx context.Context, p []byte) (int, error) {
	n, err := m.uarts[0].Input(ctx, p)
	if errors.Is(err, io.ErrClosedPipe) {
		err = ErrEnded
	}
	return n, err
}
