package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns a client whose agent runs in this process.
func pair(t *testing.T, opt Options) *Client {
	t.Helper()
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(theirs, opt) }()
	c := NewClient(ours)
	t.Cleanup(func() {
		c.Close()
		if err := <-served; err != io.EOF {
			t.Errorf("Serve = %v; want EOF", err)
		}
	})
	return c
}

func TestCommand(t *testing.T) {
	c := pair(t, Options{})
	for _, test := range []struct {
		name   string
		cmd    *Cmd
		stdout string
		err    string // "" means nil
	}{
		{"output", c.Command(t.Context(), "sh", "-c", "echo hello"), "hello\n", ""},
		{"status", c.Command(t.Context(), "sh", "-c", "echo why >&2; exit 7"), "", "sh -c echo why >&2; exit 7: exit status 7: why"},
		{"signal", c.Command(t.Context(), "sh", "-c", "kill -TERM $$"), "", "sh -c kill -TERM $$: signal: terminated"},
		{"no such program", c.Command(t.Context(), "no-such-program"), "", `agent: start no-such-program: exec: "no-such-program": executable file not found in $PATH`},
		{"environment", &Cmd{Args: []string{"sh", "-c", "echo $A"}, Env: []string{"PATH=" + os.Getenv("PATH"), "A=b c"}, client: c, ctx: t.Context()}, "b c\n", ""},
		{"directory", &Cmd{Args: []string{"pwd"}, Dir: "/", client: c, ctx: t.Context()}, "/\n", ""},
		{"standard input", &Cmd{Args: []string{"wc", "-c"}, Stdin: bytes.NewReader(make([]byte, 1_000_000)), client: c, ctx: t.Context()}, "1000000\n", ""},
		{"no standard input", c.Command(t.Context(), "cat"), "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, err := test.cmd.Output()
			text := ""
			if err != nil {
				text = err.Error()
			}
			if string(out) != test.stdout || text != test.err {
				t.Errorf("Output() = %q, %q; want %q, %q", out, text, test.stdout, test.err)
			}
		})
	}
}

func TestExitError(t *testing.T) {
	c := pair(t, Options{})
	e, ok := errors.AsType[*ExitError](c.Command(t.Context(), "sh", "-c", "exit 9").Run())
	if !ok || e.ExitCode() != 9 {
		t.Errorf("exit 9: %v; want an ExitError with code 9", e)
	}
	e, ok = errors.AsType[*ExitError](c.Command(t.Context(), "sh", "-c", "kill -KILL $$").Run())
	if !ok || e.ExitCode() != -1 || e.Status.Signal() != unix.SIGKILL {
		t.Errorf("kill -KILL: %v; want an ExitError with that signal", e)
	}
}

// Both streams into one writer keep their order, byte for byte.
func TestCombinedOutput(t *testing.T) {
	c := pair(t, Options{})
	out, err := c.Command(t.Context(), "sh", "-c", "for i in 1 2 3; do echo o$i; echo e$i >&2; done").CombinedOutput()
	if want := "o1\ne1\no2\ne2\no3\ne3\n"; err != nil || string(out) != want {
		t.Errorf("CombinedOutput = %q, %v; want %q", out, err, want)
	}
}

// Much output, through a chunk size as of a serial line, arrives whole.
func TestMuchOutput(t *testing.T) {
	c := pair(t, Options{Chunk: 1000})
	const n = 5 * Window
	out, err := c.Command(t.Context(), "head", "-c", "1310720", "/dev/zero").Output()
	if err != nil || len(out) != n {
		t.Errorf("%d bytes of output: %d, %v", n, len(out), err)
	}
}

// A command whose output nobody takes waits; the others run on.
func TestBlockedWriterHoldsUpItsCommandOnly(t *testing.T) {
	c := pair(t, Options{})
	r, w := io.Pipe()
	slow := c.Command(t.Context(), "head", "-c", "1000000", "/dev/zero")
	slow.Stdout = w
	if err := slow.Start(); err != nil {
		t.Fatal(err)
	}
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			out, err := c.Command(t.Context(), "head", "-c", "600000", "/dev/zero").Output()
			if err != nil || len(out) != 600000 {
				t.Errorf("beside a blocked command: %d bytes, %v; want 600000", len(out), err)
			}
		})
	}
	others.Wait()
	got := make(chan int64)
	go func() { n, _ := io.Copy(io.Discard, r); got <- n }()
	err := slow.Wait()
	w.Close()
	if n := <-got; err != nil || n != 1000000 {
		t.Errorf("the blocked command, at last: %d bytes, %v; want 1000000", n, err)
	}
}

func TestContextKillsCommand(t *testing.T) {
	c := pair(t, Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	r, w := io.Pipe()
	cmd := c.Command(ctx, "sh", "-c", "sleep 1000 & echo $!; wait")
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 32)
	n, err := r.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, r)
	why := errors.New("enough of it")
	cancel(why)
	if err := cmd.Wait(); !errors.Is(err, why) {
		t.Errorf("Wait after cancel = %v; want %v", err, why)
	}
	// The child of the shell, too, ends.
	pid, err := strconv.Atoi(strings.TrimSpace(string(line[:n])))
	if err != nil {
		t.Fatal(err)
	}
	if !ends(t, pid) {
		t.Errorf("the command's child %d lives on", pid)
	}
	if err := c.Command(ctx, "true").Start(); !errors.Is(err, why) {
		t.Errorf("Start after cancel = %v; want %v", err, why)
	}
}

// ends waits for the end of a process that need not be our child.
func ends(t *testing.T, pid int) bool {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return true
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000)
		if err != unix.EINTR {
			return n == 1
		}
	}
}

func TestSignal(t *testing.T) {
	c := pair(t, Options{})
	r, w := io.Pipe()
	cmd := c.Command(t.Context(), "sh", "-c", "trap 'echo got it; exit 3' USR1; echo ready; while :; do sleep 0.1; done")
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make([]byte, 64)
	if _, err := io.ReadFull(r, lines[:6]); err != nil {
		t.Fatal(err)
	}
	cmd.Signal(unix.SIGUSR1)
	go io.Copy(io.Discard, r)
	if e, ok := errors.AsType[*ExitError](cmd.Wait()); !ok || e.ExitCode() != 3 {
		t.Errorf("after SIGUSR1: %v; want exit status 3", e)
	}
}

// A daemon that keeps the output open does not keep the command from ending.
func TestOutputHeldOpen(t *testing.T) {
	c := pair(t, Options{})
	out, err := c.Command(t.Context(), "sh", "-c", "(sleep 20)& echo started").Output()
	if err != nil || string(out) != "started\n" {
		t.Errorf("Output = %q, %v; want \"started\\n\"", out, err)
	}
}

func TestTerminal(t *testing.T) {
	if _, err := os.Stat("/dev/ptmx"); err != nil {
		t.Skip("no pseudo-terminals here")
	}
	c := pair(t, Options{})
	var out bytes.Buffer
	in, typed := io.Pipe()
	cmd := c.Command(t.Context(), "sh", "-c", "stty -echo; tty >/dev/null && stty size; read line; echo \"[$line]\"; stty size; cat; echo end")
	cmd.PTY, cmd.Stdin = &Size{Rows: 33, Cols: 101}, in
	seen := make(chan string, 100)
	cmd.Stdout = writerFunc(func(p []byte) (int, error) {
		out.Write(p)
		seen <- out.String()
		return len(p), nil
	})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until := func(text string) {
		t.Helper()
		for s := range seen {
			if strings.Contains(s, text) {
				return
			}
		}
	}
	until("33 101\r\n")
	if err := cmd.Resize(Size{Rows: 20, Cols: 40}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(typed, "hello\n")
	until("[hello]\r\n20 40\r\n")
	typed.Close() // end of file ends cat
	go func() {
		for range seen {
		}
	}()
	if err := cmd.Wait(); err != nil || !strings.HasSuffix(out.String(), "end\r\n") {
		t.Errorf("terminal session = %q, %v; want one that ends with \"end\"", out.String(), err)
	}
	close(seen)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestConn(t *testing.T) {
	c := pair(t, Options{})
	conn, err := c.Command(t.Context(), "cat").Conn()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"one", "two"} {
		io.WriteString(conn, want)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
			t.Fatalf("echo = %q, %v; want %q", got, err, want)
		}
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("Read after Close succeeded")
	}
}

func TestPing(t *testing.T) {
	c := pair(t, Options{})
	if err := c.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	// An end that does not read, does not answer.
	ours, theirs := net.Pipe()
	defer theirs.Close()
	mute := NewClient(ours)
	defer mute.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := mute.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ping of a mute end = %v; want the deadline", err)
	}
}

// A client that joins late finds its agent behind the rest of an old frame,
// and an agent finds its client behind the same.
func TestJoinInTheMiddle(t *testing.T) {
	ours, theirs := net.Pipe()
	go func() {
		io.WriteString(theirs, "garbage of an old answer")
		Serve(theirs, Options{})
	}()
	garbage := make([]byte, 8)
	io.ReadFull(ours, garbage)
	go io.WriteString(ours, "\x00\x07half a") // before the client's own
	c := NewClient(ours)
	defer c.Close()
	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c.Dropped() == 0 {
		t.Error("Dropped() = 0; want the garbage counted")
	}
}

func TestConnectionLost(t *testing.T) {
	ours, theirs := net.Pipe()
	go Serve(theirs, Options{})
	c := NewClient(ours)
	cmd := c.Command(t.Context(), "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "connection lost") {
		t.Errorf("Wait after the connection was lost = %v; want an error that says so", err)
	}
	if err := c.Command(t.Context(), "true").Run(); err == nil {
		t.Error("a command on a lost connection succeeded")
	}
	c.Close()
	if err := c.Close(); err != nil {
		t.Errorf("Close, twice = %v", err)
	}
}

// Output that was lost on the way is an error, not silence.
func TestLostOutput(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	go func() {
		r, w := newFrameReader(theirs), &frameWriter{w: theirs}
		for {
			b, err := r.read()
			if err != nil {
				return
			}
			if m, err := parseMessage(b); err == nil && m.kind == kindStart {
				w.send(kindStdout, m.id, []byte("abc"))
				w.sendNumbers(kindExit, m.id, 0, 5)
			}
		}
	}()
	c := NewClient(ours)
	defer c.Close()
	out, err := c.Command(t.Context(), "x").Output()
	if string(out) != "abc" || err == nil || !strings.Contains(err.Error(), "output lost on the way: got 3 bytes of 5") {
		t.Errorf("Output = %q, %v; want \"abc\" and an error", out, err)
	}
}

func TestPowerOff(t *testing.T) {
	off := make(chan bool, 1)
	c := pair(t, Options{PowerOff: func() { off <- true }})
	if err := c.PowerOff(); err != nil {
		t.Fatal(err)
	}
	<-off
}

func TestTail(t *testing.T) {
	tail := &Tail{Max: 5}
	for _, s := range []string{"abc", "defghijklm", "", "n", "o"} {
		tail.Write([]byte(s))
	}
	if got := string(tail.Bytes()); got != "klmno" {
		t.Errorf("Tail of 5 = %q; want klmno", got)
	}
}
