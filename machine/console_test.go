package machine

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

func TestConsoleText(t *testing.T) {
	c := NewConsole(nil, nil)
	c.Write([]byte("before "))
	r := c.Attach(4)
	c.Write([]byte("after"))
	all := c.Attach(1 << 40)
	c.Close()
	c.Close()
	buf := make([]byte, 64)
	for i, want := range []ConsoleText{{Text: []byte("ore "), Scrollback: true}, {Text: []byte("after")}} {
		if live := r.Live(); live != !want.Scrollback {
			t.Errorf("Live() before text %d = %v; want %v", i, live, !want.Scrollback)
		}
		got, err := r.Next(t.Context(), buf)
		if err != nil || string(got.Text) != string(want.Text) || got.Scrollback != want.Scrollback || got.Missed != 0 {
			t.Errorf("Next() = %q, %+v, %v; want %q, scrollback %v", got.Text, got, err, want.Text, want.Scrollback)
		}
	}
	if _, err := r.Next(t.Context(), buf); err != io.EOF {
		t.Errorf("Next() at the end = %v; want io.EOF", err)
	}
	if got, err := all.Next(t.Context(), buf); err != nil || string(got.Text) != "before after" {
		t.Errorf("Next() with all scrollback = %q, %v; want everything", got.Text, err)
	}
}

// What each reader gets is the guest's text, in its order; what is not in it
// was told as missed, and was not kept any more.
func TestConsoleReaders(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := NewConsole(nil, nil)
		c.ring = make([]byte, rapid.IntRange(1, 40).Draw(t, "kept"))
		var all []byte
		next := byte(0)
		type reader struct {
			*ConsoleReader
			at int
		}
		var readers []*reader
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				p := make([]byte, rapid.IntRange(0, 100).Draw(t, "bytes"))
				for i := range p {
					p[i] = next
					next++
				}
				all = append(all, p...)
				if n, err := c.Write(p); n != len(p) || err != nil {
					t.Fatalf("Write() = %d, %v; want %d", n, err, len(p))
				}
			},
			"attach": func(t *rapid.T) {
				back := rapid.IntRange(0, 120).Draw(t, "scrollback")
				readers = append(readers, &reader{c.Attach(uint64(back)), max(0, len(all)-back)})
			},
			"read": func(t *rapid.T) {
				if len(readers) == 0 {
					return
				}
				r := rapid.SampledFrom(readers).Draw(t, "reader")
				if r.at == len(all) {
					return
				}
				buf := make([]byte, rapid.IntRange(1, 50).Draw(t, "buffer"))
				got, err := r.Next(context.Background(), buf)
				if err != nil || len(got.Text) == 0 {
					t.Fatalf("Next() = %q, %v; want some text", got.Text, err)
				}
				if want := max(0, len(all)-len(c.ring)-r.at); int(got.Missed) != want {
					t.Errorf("Next() missed %d bytes; want %d", got.Missed, want)
				}
				r.at += int(got.Missed)
				if want := all[r.at : r.at+len(got.Text)]; !bytes.Equal(got.Text, want) {
					t.Errorf("Next() at %d = %x; want %x", r.at, got.Text, want)
				}
				r.at += len(got.Text)
			},
		})
	})
}

// Readers that wait, readers that leave and a writer that waits for none.
func TestConsoleIsFollowed(t *testing.T) {
	c := NewConsole(nil, nil)
	const total = 4 << 20
	var done sync.WaitGroup
	for range 4 {
		r := c.Attach(0)
		done.Go(func() {
			buf := make([]byte, 999)
			var got uint64
			for {
				text, err := r.Next(t.Context(), buf)
				if err == io.EOF {
					break
				} else if err != nil {
					t.Error(err)
					return
				}
				got += uint64(len(text.Text)) + text.Missed
			}
			if got != total {
				t.Errorf("a reader got or missed %d bytes; want %d", got, total)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	leaver := c.Attach(0)
	done.Go(func() {
		cancel()
		for {
			if _, err := leaver.Next(ctx, make([]byte, 1<<20)); errors.Is(err, context.Canceled) || err == io.EOF {
				return
			}
		}
	})
	line := bytes.Repeat([]byte("x"), 1024)
	for range total / len(line) {
		c.Write(line)
	}
	c.Close()
	done.Wait()
	if _, err := c.Attach(0).Next(ctx, line); err != io.EOF {
		t.Errorf("Next() after the end = %v; want io.EOF", err)
	}
	if _, err := NewConsole(nil, nil).Attach(0).Next(ctx, line); !errors.Is(err, context.Canceled) {
		t.Errorf("Next() with a context that is done = %v; want its error", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// The copy is waited for, but readers are not; when it has failed it is told
// once, and the text goes on.
func TestConsoleCopy(t *testing.T) {
	broken := errors.New("disk full")
	entered, leave := make(chan struct{}), make(chan error)
	var warned []error
	c := NewConsole(writerFunc(func(p []byte) (int, error) {
		entered <- struct{}{}
		return len(p), <-leave
	}), func(err error) { warned = append(warned, err) })
	r := c.Attach(0)
	buf := make([]byte, 8)
	for _, result := range []error{nil, broken} {
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			c.Write([]byte("one"))
		}()
		<-entered
		if got, err := r.Next(t.Context(), buf); err != nil || string(got.Text) != "one" {
			t.Errorf("Next() beside a slow copy = %q, %v; want one", got.Text, err)
		}
		leave <- result
		<-wrote
	}
	c.Write([]byte("two"))
	if got, err := r.Next(t.Context(), buf); err != nil || string(got.Text) != "two" {
		t.Errorf("Next() after the copy has failed = %q, %v; want two", got.Text, err)
	}
	if len(warned) != 1 || warned[0] != broken {
		t.Errorf("warned of %v; want %v once", warned, broken)
	}
}

// A guest's words outlive it, as long as its machine.
func TestConsoleOfAGuest(t *testing.T) {
	m, _ := newMachine(t, asm{}.print("hello").poweroff(), nil)
	if err := m.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := m.Console().Attach(ConsoleKept)
	if got, err := r.Next(t.Context(), make([]byte, 64)); err != nil || string(got.Text) != "hello" {
		t.Errorf("Next() = %q, %v; want hello", got.Text, err)
	}
	if _, err := r.Next(t.Context(), make([]byte, 64)); err != io.EOF {
		t.Errorf("Next() = %v; want io.EOF", err)
	}
	if n, err := m.ConsoleInput(t.Context(), []byte("hello")); n != 0 || !errors.Is(err, ErrEnded) {
		t.Errorf("ConsoleInput() after the end = %d, %v; want ErrEnded", n, err)
	}
}
