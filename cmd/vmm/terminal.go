package main

import (
	"io"
	"os"
	"strings"
	"unicode/utf8"

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

// cellsOf is how many cells a line has on the terminal that out writes to; 0:
// it writes to none.
func cellsOf(out any) int {
	f, ok := isTerminal(out)
	if !ok {
		return 0
	}
	if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
		return width
	}
	return 80 // a terminal that does not say
}

// folded is text broken at blanks for lines of width cells, of which the first
// indent are taken, by blanks from the second line on. Text for something other
// than a terminal (width 0) is one line, as is text for a very narrow one.
func folded(text string, width, indent int) string {
	room := width - indent
	if room < 20 {
		return text
	}
	var b strings.Builder
	used := 0
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case used+1+n > room:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			used = 0
		default:
			b.WriteByte(' ')
			used++
		}
		b.WriteString(word)
		used += n
	}
	return b.String()
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
