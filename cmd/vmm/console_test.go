package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
)

func TestParseKey(t *testing.T) {
	for s, want := range map[string]byte{
		"ctrl-]": 0x1d, "^]": 0x1d, "Ctrl-a": 1, "ctrl-A": 1, "^z": 0x1a, `ctrl-\`: 0x1c, "ctrl-_": 0x1f,
		"": 0, "]": 0, "ctrl-": 0, "ctrl-[": 0, "ctrl-@": 0, "ctrl-ab": 0, "^1": 0, "ctrl-`": 0,
	} {
		got, err := parseKey(s)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("parseKey(%q) = %#x, %v; want %#x", s, got, err, want)
		}
	}
}

// What a guest once asked the terminal is not asked again, in whatever pieces
// it comes; everything else is shown.
func TestQuestions(t *testing.T) {
	for _, test := range []struct{ old, live, want string }{
		{"boot\r\n# ", "", "boot\r\n# "},
		{"# \x1b[6nls", "", "# ls"},
		{"\x1b[c\x1b[>0c\x1b[?6n\x1b[=c\x1bZ\x1b[5n", "", ""},
		{"\x1b[1;31mred\x1b[0m\x1b[2J", "", "\x1b[1;31mred\x1b[0m\x1b[2J"},
		{"# \x1b[6", "n", "# \x1b[6n"}, // half of it is asked now
		{"# ", "\x1b[6n", "# \x1b[6n"},
		{"\x1b[" + strings.Repeat("1;", 100), "m", "\x1b[" + strings.Repeat("1;", 100) + "m"},
		{"\x1b", "", "\x1b"},
	} {
		for cut := range len(test.old) + 1 {
			var q questions
			got := string(q.drop([]byte(test.old[:cut]), true))
			got += string(q.drop([]byte(test.old[cut:]), true))
			got += string(q.drop(nil, false))
			got += string(q.drop([]byte(test.live), false))
			if got != test.want {
				t.Errorf("%q, then %q live, cut at %d: %q; want %q", test.old, test.live, cut, got, test.want)
			}
		}
	}
}

// A terminal is both ends of a pseudo-terminal: the person's, which is read
// all the time, and the program's.
type terminal struct {
	t      *testing.T
	person *os.File
	tty    *os.File
	before unix.Termios
	screen
}

// openTerminal makes a pseudo-terminal. Nobody looks at it until watch.
func openTerminal(t *testing.T) *terminal {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	fd := int(person.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	x := &terminal{t: t, person: person, tty: tty}
	x.more.L = &x.mu
	x.before = x.modes()
	return x
}

func (x *terminal) watch() { go io.Copy(&x.screen, x.person) }

func (x *terminal) modes() unix.Termios {
	x.t.Helper()
	m, err := unix.IoctlGetTermios(int(x.tty.Fd()), unix.TCGETS)
	if err != nil {
		x.t.Fatal(err)
	}
	return *m
}

// wantRestored fails unless the terminal is as it was.
func (x *terminal) wantRestored() {
	x.t.Helper()
	if got := x.modes(); got != x.before {
		x.t.Errorf("the terminal's modes are %+v; want %+v as before", got, x.before)
	}
}

// start runs a program on the terminal.
func (x *terminal) start(name string, args ...string) *exec.Cmd {
	x.t.Helper()
	c := exec.Command(name, args...)
	c.Stdin, c.Stdout, c.Stderr = x.tty, x.tty, x.tty
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.Start(); err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	return c
}

func (x *terminal) typeText(s string) {
	x.t.Helper()
	if _, err := io.WriteString(x.person, s); err != nil {
		x.t.Fatal(err)
	}
}

func exitStatus(c *exec.Cmd) int {
	c.Wait()
	return c.ProcessState.ExitCode()
}

// fakeGuests starts guests without a guest in a run directory of their own.
func fakeGuests(t *testing.T, names ...string) control.RunDir {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("VMM_RUN_DIR", dir)
	t.Cleanup(func() {
		running, err := control.RunDir(dir).List()
		for _, r := range running {
			err = errors.Join(err, kill(r.Pid))
		}
		if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	for _, name := range names {
		if out, err := exec.Command("fakeguest", name).CombinedOutput(); err != nil {
			t.Fatalf("fakeguest %s: %v\n%s", name, err, out)
		}
	}
	return control.RunDir(dir)
}

// However an attachment ends, the terminal is as it was before.
func TestConsoleOnATerminal(t *testing.T) {
	for _, test := range []struct {
		name   string
		end    func(t *testing.T, x *terminal, c *exec.Cmd, dir control.RunDir)
		status int
		says   string
	}{
		{"detach", func(t *testing.T, x *terminal, c *exec.Cmd, _ control.RunDir) { x.typeText("lost\x1d") }, 0, "detached from web1, which runs on"},
		{"SIGTERM", func(t *testing.T, x *terminal, c *exec.Cmd, _ control.RunDir) { c.Process.Signal(syscall.SIGTERM) }, 0, "detached from web1"},
		{"SIGHUP", func(t *testing.T, x *terminal, c *exec.Cmd, _ control.RunDir) { c.Process.Signal(syscall.SIGHUP) }, 0, "detached from web1"},
		{"the guest's end", func(t *testing.T, x *terminal, c *exec.Cmd, dir control.RunDir) {
			client, err := dir.Dial("web1")
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if err := stopByForce(t.Context(), client); err != nil {
				t.Error(err)
			}
		}, 0, "web1 has ended"},
		{"kill -9 of the guest", func(t *testing.T, x *terminal, c *exec.Cmd, dir control.RunDir) {
			running, err := dir.List()
			if err != nil || len(running) != 1 {
				t.Fatalf("List() = %v, %v", running, err)
			}
			if err := kill(running[0].Pid); err != nil {
				t.Fatal(err)
			}
		}, 1, "vmm: guest web1: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := fakeGuests(t, "web1")
			x := openTerminal(t)
			x.watch()
			c := x.start("vmm", "console", "web1")
			x.waitFor("ctrl-] detaches")
			x.waitFor("booted")
			x.typeText("\x03ls\r") // Ctrl-C is the guest's
			x.waitFor("\x03ls\r")
			if m := x.modes(); m == x.before {
				t.Error("the terminal is not raw while attached")
			}
			test.end(t, x, c, dir)
			if got := exitStatus(c); got != test.status {
				t.Errorf("exit status = %d; want %d", got, test.status)
			}
			x.waitFor(test.says)
			x.wantRestored()
		})
	}
}

// panicky is the program of a console whose sender panics.
func panicky() {
	a := &attachment{
		text: new(silence), in: os.Stdin, out: os.Stdout, notes: os.Stderr, key: escapeKey,
		send: func(context.Context, []byte) error { panic("nobody expects this") },
	}
	a.stay(context.Background(), "web1", "ctrl-]")
}

// silence is the text of a guest that never says anything.
type silence struct{ attached bool }

func (s *silence) Receive() bool {
	if s.attached {
		select {}
	}
	s.attached = true
	return true
}
func (*silence) Msg() *vmmv1.ConsoleResponse { return &vmmv1.ConsoleResponse{} }
func (*silence) Err() error                  { return nil }

func TestPanicRestoresTheTerminal(t *testing.T) {
	x := openTerminal(t)
	x.watch()
	c := x.start("panicky")
	x.waitFor("ctrl-] detaches")
	x.typeText("x")
	if got := exitStatus(c); got != 2 {
		t.Errorf("exit status = %d; want 2 of a panic", got)
	}
	x.waitFor("nobody expects this")
	x.wantRestored()
}

// A terminal at which nobody looks holds up nobody else's, and is told what it
// missed when somebody does.
func TestStoppedTerminalHoldsNobodyUp(t *testing.T) {
	fakeGuests(t, "web1")
	stopped, other := openTerminal(t), openTerminal(t)
	first := stopped.start("vmm", "console", "web1", "--detach-key", "^a")
	other.watch()
	second := other.start("vmm", "console", "web1")
	other.waitFor("booted")
	// 1 MiB of text: what is typed is printed.
	line := strings.Repeat("x", 1022) + "\r\n"
	feeder := exec.Command("vmm", "console", "web1", "--scrollback", "0")
	in, err := feeder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := feeder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := feeder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { feeder.Process.Kill(); feeder.Wait() })
	var fed sync.WaitGroup
	fed.Go(func() {
		for range 1 << 10 {
			io.WriteString(in, line)
		}
		io.WriteString(in, "login: ")
	})
	go io.Copy(io.Discard, out)
	fed.Wait()
	other.waitFor("login: ")
	stopped.watch()
	stopped.waitFor("login: ")
	stopped.waitFor("bytes of the guest's text are missing here")
	for x, c := range map[*terminal]*exec.Cmd{stopped: first, other: second} {
		key := "\x1d"
		if x == stopped {
			key = "\x1d\x01" // the first is the guest's
		}
		x.typeText(key)
		if got := exitStatus(c); got != 0 {
			t.Errorf("exit status = %d; want 0", got)
		}
		x.wantRestored()
	}
	feeder.Process.Signal(syscall.SIGTERM)
	if got := exitStatus(feeder); got != 0 {
		t.Errorf("exit status without a terminal = %d; want 0", got)
	}
}

// What a person types while the guest does not read is dropped, and said: the
// next key may be the one that detaches.
func TestTypingAtAStoppedGuest(t *testing.T) {
	typed := make(chan []byte, 2)
	var notes bytes.Buffer
	ctx, cancel := context.WithCancelCause(t.Context())
	in, keyboard := io.Pipe()
	a := &attachment{in: in, notes: &notes, key: escapeKey, restore: func() {}}
	go func() {
		for _, s := range []string{"a", "b", "cd", "\x1d"} {
			io.WriteString(keyboard, s)
		}
	}()
	a.read(ctx, true, typed, cancel)
	if len(typed) != 2 || !strings.Contains(notes.String(), "2 bytes that were typed are lost") {
		t.Errorf("%d pieces wait, notes %q; want 2, and 2 bytes lost", len(typed), &notes)
	}
	if err := context.Cause(ctx); err != errDetached {
		t.Errorf("cause = %v; want errDetached", err)
	}
}

// Who only looks sends nothing, and detaches with the same key.
func TestReadOnlyConsole(t *testing.T) {
	typed := make(chan []byte, 1)
	ctx, cancel := context.WithCancelCause(t.Context())
	a := &attachment{in: strings.NewReader("reboot\r\x1d"), key: escapeKey, readOnly: true}
	a.read(ctx, true, typed, cancel)
	if len(typed) != 0 || context.Cause(ctx) != errDetached {
		t.Errorf("%d pieces sent, cause %v; want none, and errDetached", len(typed), context.Cause(ctx))
	}
}
