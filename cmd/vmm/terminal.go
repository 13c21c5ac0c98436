package main

import (
	"io"
	"os"

	"golang.org/x/term"
)

// escapeKey is Ctrl-], the key that talks to vmm and not to the guest.
const escapeKey = 0x1d

// escapes takes vmm's own keys out of what a person types: Ctrl-] q quits,
// Ctrl-] Ctrl-] is one Ctrl-] for the guest, Ctrl-] and anything else is passed
// on as typed.
type escapes struct {
	pending bool // the last byte was an escapeKey not yet decided on
	buf     []byte
}

// filter returns what of p is the guest's, valid until the next call, and
// whether the person quits.
func (e *escapes) filter(p []byte) (guest []byte, quit bool) {
	e.buf = e.buf[:0]
	for _, b := range p {
		switch {
		case !e.pending && b == escapeKey:
			e.pending = true
			continue
		case e.pending && b == 'q':
			return e.buf, true
		case e.pending && b != escapeKey:
			e.buf = append(e.buf, escapeKey)
		}
		e.pending = false
		e.buf = append(e.buf, b)
	}
	return e.buf, false
}

// isTerminal says whether a person types, or reads, here.
func isTerminal(stream any) (*os.File, bool) {
	f, ok := stream.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd()))
}

// attachConsole sends what comes from stdin to the guest until quit or end of
// file, which is no reason to stop the guest. On a terminal it sets raw mode;
// restore undoes that and may be called more than once.
func attachConsole(stdin io.Reader, guest func([]byte), quit func()) (restore func(), err error) {
	restore = func() {}
	var keys *escapes
	if f, ok := isTerminal(stdin); ok {
		before, err := term.MakeRaw(int(f.Fd()))
		if err != nil {
			return restore, err
		}
		restore = func() { term.Restore(int(f.Fd()), before) }
		keys = &escapes{}
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := stdin.Read(buf)
			input, leave := buf[:n], false
			if keys != nil {
				input, leave = keys.filter(input)
			}
			if len(input) > 0 {
				guest(input)
			}
			if leave {
				quit()
			}
			if leave || err != nil {
				return
			}
		}
	}()
	return restore, nil
}
