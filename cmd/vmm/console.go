package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"regexp"
	"sync"
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"vmm/control"
	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
)

type consoleFlags struct {
	detachKey  string
	scrollback string
	readOnly   bool
	noFollow   bool
}

func newConsoleCommand() *cobra.Command {
	var f consoleFlags
	c := &cobra.Command{
		Use:   "console NAME",
		Short: "Attach to a guest's console",
		Long: `Shows what the guest has printed on its first serial port (ttyS0), of which the last
256 KiB are kept, and what it prints from then on; what is typed goes to the guest.
Ctrl-] detaches, or another --detach-key, and the guest runs on; all other keys are
the guest's, Ctrl-C included. Without a terminal everything on standard input is the
guest's, its end detaches nobody, and SIGINT and SIGTERM detach.

Any number of people may attach, 16 at a time, to a guest in the background and to
one in the foreground of another terminal. All of them may type: the guest sees one
keyboard. Nobody waits for anybody: a terminal that does not keep up misses text, and
is told how much. The text of a guest that has migrated here begins with its arrival.`,
		Example: `  vmm console web1
  vmm console web1 --detach-key ctrl-a
  vmm console web1 --read-only --scrollback 4K
  vmm console web1 --no-follow | tail`,
		Args:              oneGuest,
		ValidArgsFunction: completeGuest,
		RunE:              func(c *cobra.Command, args []string) error { return f.run(c, args[0]) },
	}
	fs := c.Flags()
	fs.StringVar(&f.detachKey, "detach-key", "ctrl-]", "key that detaches: ctrl- and a letter or one of ] \\ ^ _")
	fs.StringVar(&f.scrollback, "scrollback", "256K", "how much to show of what the guest has printed before")
	fs.BoolVar(&f.readOnly, "read-only", false, "send nothing to the guest")
	fs.BoolVar(&f.noFollow, "no-follow", false, "end when everything printed so far has been shown")
	return c
}

// parseKey reads ctrl-X or ^X, X being what control characters are made of.
func parseKey(s string) (byte, error) {
	x, ok := cutAnyPrefix(s, "ctrl-", "Ctrl-", "^")
	if ok && len(x) == 1 {
		b := x[0]
		if b >= 'a' && b <= 'z' {
			b -= 'a' - 'A'
		}
		if b > '@' && b <= '_' && b != '[' { // Ctrl-[ begins what other keys send
			return b - '@', nil
		}
	}
	return 0, fmt.Errorf("key %q: give ctrl- and a letter or one of ] \\ ^ _, as in ctrl-]", s)
}

func cutAnyPrefix(s string, prefixes ...string) (string, bool) {
	for _, p := range prefixes {
		if len(s) > len(p) && s[:len(p)] == p {
			return s[len(p):], true
		}
	}
	return s, false
}

func (f *consoleFlags) run(c *cobra.Command, name string) error {
	key, err := parseKey(f.detachKey)
	if err != nil {
		return usageError{fmt.Errorf("--detach-key: %w", err)}
	}
	scrollback, err := machine.ParseSize(f.scrollback)
	if err != nil {
		return usageError{fmt.Errorf("--scrollback: %w", err)}
	}
	client, err := dial(name)
	if err != nil {
		return err
	}
	defer client.Close()
	// SIGPIPE too: whoever reads us may leave before the terminal is restored.
	ctx, cancel := signal.NotifyContext(c.Context(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	defer cancel()
	request := connect.NewRequest(&vmmv1.ConsoleRequest{NoFollow: f.noFollow})
	if c.Flags().Changed("scrollback") {
		request.Msg.ScrollbackBytes = &scrollback
	} // else all, so that a guest that has printed more says so
	text, err := client.Console(ctx, request)
	if err != nil {
		return client.Explain(err)
	}
	a := &attachment{text: text, in: c.InOrStdin(), out: c.OutOrStdout(), notes: c.ErrOrStderr(), key: key, readOnly: f.readOnly}
	a.send = func(ctx context.Context, p []byte) error {
		_, err := client.ConsoleInput(ctx, connect.NewRequest(&vmmv1.ConsoleInputRequest{Text: p}))
		return err
	}
	if f.noFollow {
		err = a.show()
	} else {
		err = a.stay(ctx, name, f.detachKey)
	}
	return explainEnd(client, err)
}

// explainEnd is the error of an attachment for the user.
func explainEnd(client *control.Client, err error) error {
	var e *connect.Error
	if errors.As(err, &e) {
		return client.Explain(err)
	}
	return err
}

// texts is what a console's text comes from: a stream of the API.
type texts interface {
	Receive() bool
	Msg() *vmmv1.ConsoleResponse
	Err() error
}

// attachment is one terminal, or one pair of files, at a guest's console.
type attachment struct {
	text     texts
	send     func(context.Context, []byte) error // to the guest, after what was sent before
	in       io.Reader
	out      io.Writer // the guest's text
	notes    io.Writer // ours
	key      byte
	readOnly bool

	restore  func()        // undoes what stay has done to the terminal
	newline  string        // in front of and after a note of ours
	attached chan struct{} // closed at the first text: from then on none is missed
}

// errDetached is how the detach key ends an attachment.
var errDetached = errors.New("detached")

// maxTyped is how many pieces of input wait until the guest has taken those
// before. What a person types while they are that many is lost, for the next
// key may be the one that detaches.
const maxTyped = 64

// stay shows the guest's text and sends what is typed, until a key, a signal or
// the guest's end detaches.
func (a *attachment) stay(signalled context.Context, name, keyName string) error {
	ctx, cancel := context.WithCancelCause(signalled)
	defer cancel(nil)
	keyboard, interactive := isTerminal(a.in)
	a.restore = func() {}
	if interactive {
		before, err := term.MakeRaw(int(keyboard.Fd()))
		if err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		a.restore = sync.OnceFunc(func() { term.Restore(int(keyboard.Fd()), before) })
		a.newline = "\r\n"
		a.note("console of %s; %s detaches", name, keyName)
	}
	defer a.restore()

	a.attached = make(chan struct{})
	ended := make(chan error, 1)
	typed := make(chan []byte, maxTyped)
	a.spawn(func() { ended <- a.show() })
	a.spawn(func() { a.read(ctx, interactive, typed, cancel) })
	a.spawn(func() { a.pass(ctx, typed, cancel) })
	// Nobody waits for these three: each may be in a read or a write of a
	// terminal that never comes back, and the process ends.
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
	}
	switch { // whatever that did to the stream
	case signalled.Err() != nil:
		err = errDetached
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	a.restore()
	switch {
	case err == nil:
		err = a.say(interactive, "%s has ended", name)
	case errors.Is(err, errDetached):
		err = a.say(interactive, "detached from %s, which runs on", name)
	}
	return err
}

// say tells a person how it ended, on a terminal that is restored; a program
// has its exit status.
func (a *attachment) say(interactive bool, format string, args ...any) error {
	if !interactive {
		return nil
	}
	_, err := fmt.Fprintf(a.notes, "\nvmm: "+format+"\n", args...)
	return err
}

// note says something amid the guest's text.
func (a *attachment) note(format string, args ...any) {
	fmt.Fprintf(a.notes, "%svmm: %s%s", a.newline, fmt.Sprintf(format, args...), cmp.Or(a.newline, "\n"))
}

// spawn runs f in a goroutine whose panic leaves the terminal restored.
func (a *attachment) spawn(f func()) {
	go func() {
		defer func() {
			if v := recover(); v != nil {
				a.restore()
				panic(v)
			}
		}()
		f()
	}()
}

// show writes the guest's text until it ends; the error says why it did.
func (a *attachment) show() error {
	_, screen := isTerminal(a.out)
	var q questions
	first := true
	for a.text.Receive() {
		if first && a.attached != nil {
			close(a.attached)
		}
		m := a.text.Msg()
		text := m.Text
		if screen {
			text = q.drop(text, m.Scrollback)
		}
		if n := m.MissedBytes; n > 0 && first {
			a.note("%d bytes that the guest has printed before are not kept any more", n)
		} else if n > 0 {
			a.note("%d bytes of the guest's text are missing here: they came faster than they could be shown", n)
		}
		first = false
		if _, err := a.out.Write(text); err != nil {
			return err
		}
	}
	return a.text.Err()
}

// read takes what is typed until the key detaches.
func (a *attachment) read(ctx context.Context, interactive bool, typed chan<- []byte, end context.CancelCauseFunc) {
	buf := make([]byte, 4096)
	for {
		n, err := a.in.Read(buf)
		p, detach := buf[:n], false
		if interactive {
			if i := bytes.IndexByte(p, a.key); i >= 0 {
				p, detach = p[:i], true
			}
		}
		if len(p) > 0 && !a.readOnly {
			p = bytes.Clone(p)
			select {
			case typed <- p:
			default:
				if interactive {
					a.note("the guest does not read: %d bytes that were typed are lost", len(p))
					break
				}
				select {
				case typed <- p:
				case <-ctx.Done():
				}
			}
		}
		if detach {
			end(errDetached)
		}
		if detach || err != nil {
			return // the end of a file is no reason to leave
		}
	}
}

// pass sends what was typed, piece after piece.
func (a *attachment) pass(ctx context.Context, typed <-chan []byte, end context.CancelCauseFunc) {
	// What the guest answers is to be seen.
	select {
	case <-a.attached:
	case <-ctx.Done():
	}
	for {
		select {
		case p := <-typed:
			if err := a.send(ctx, p); err != nil {
				// A guest that has just ended says so itself.
				if connect.CodeOf(err) != connect.CodeFailedPrecondition {
					end(err)
				}
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// questions takes out of text that is shown again what a guest once asked the
// terminal: where the cursor is (as busybox's shell does before each prompt),
// what terminal it is (ECMA-48, 8.3.24 and 8.3.35; DEC's Secondary DA and DECID).
// The answers would be typed at a guest that does not wait for them any more.
type questions struct {
	rest []byte // the beginning of what may be a question
}

var (
	question     = regexp.MustCompile(`\x1b(\[[<-?]?[0-9;]*[cn]|Z)`)
	questionHalf = regexp.MustCompile(`\x1b(\[[<-?]?[0-9;]*)?$`)
)

// maxHalf bounds what is held back as the beginning of a question, in bytes.
const maxHalf = 32

// drop returns what of the text is to be shown; it may keep the last bytes back
// until it is called again.
func (q *questions) drop(text []byte, scrollback bool) []byte {
	if len(q.rest) > 0 {
		text = append(q.rest, text...)
		q.rest = nil
	}
	if !scrollback {
		return text
	}
	text = question.ReplaceAll(text, nil)
	if at := questionHalf.FindIndex(text); at != nil && at[1]-at[0] <= maxHalf {
		q.rest = bytes.Clone(text[at[0]:])
		text = text[:at[0]]
	}
	return text
}
