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
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"vmm/control"
	"vmm/machine"
)

// A detached process is the program started again, in a session of its own,
// with the write end of a pipe as its descriptor 3. Until it is ready it has its
// parent's standard streams, so that its errors, and whatever it asks, are where
// the command was typed. Then it exchanges them for its log and /dev/null, and
// writes a line to the pipe, which its parent prints. A process that ends before
// that closes the pipe: then the parent ends with its status. A parent that ends
// before that makes the line fail: then the process ends too, for nobody was
// told of it.

const (
	detachedEnv  = "VMM_DETACHED" // set for the process, which removes it
	readyFD      = 3
	maxLog       = 1 << 20  // bytes; then the older half goes
	lastWords    = 16 << 10 // bytes of the console that a failure takes to the log
	logTimestamp = "2006-01-02T15:04:05.000Z07:00"
)

// detach runs this very command in the background, and returns when it is
// ready or has ended. Signals in between end it.
func detach(c *cobra.Command) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("--detach: %w", err)
	}
	defer r.Close()
	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Args[0] = os.Args[0]
	child.Env = append(os.Environ(), detachedEnv+"=1")
	child.ExtraFiles = []*os.File{w}
	if f, ok := c.InOrStdin().(*os.File); ok {
		child.Stdin = f
	}
	child.Stdout, child.Stderr = c.OutOrStdout(), c.ErrOrStderr()
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	signals := catchStop()
	defer signals.release()
	err = child.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("--detach: start %s again: %w", os.Args[0], err)
	}
	ready, exited := make(chan string, 1), make(chan error, 1)
	go func() {
		line, _ := io.ReadAll(io.LimitReader(r, 4096))
		ready <- string(line)
	}()
	given := false // up: its end is what is waited for
	for {
		select {
		case <-signals:
			// The first asks, the second forces, as in the foreground. The error
			// is that it has ended.
			_ = child.Process.Signal(syscall.SIGTERM)
			given = true
		case line := <-ready:
			if line != "" && !given && len(signals) == 0 {
				_, err := io.WriteString(c.OutOrStdout(), line)
				return err
			}
			go func() { exited <- child.Wait() }()
		case err := <-exited:
			var status *exec.ExitError
			switch {
			case errors.As(err, &status) && status.Exited():
				return exitError(status.ExitCode()) // it has said why
			case err != nil:
				return fmt.Errorf("the process in the background: %w", err)
			case given:
				return errors.New("ended before it was in the background")
			}
			return nil
		}
	}
}

// background is a process that was, or is being, detached. The methods of a nil
// one do what a process in the foreground does.
type background struct {
	parent *os.File // the pipe to it
	stderr io.Writer

	mu      sync.Mutex
	log     *os.File // nil until openLog
	left    bool     // the parent has been told, or will not be any more
	console *machine.Console
}

// detached is this process in the background; nil if it is none.
func detached(c *cobra.Command) *background {
	if os.Getenv(detachedEnv) == "" {
		return nil
	}
	os.Unsetenv(detachedEnv)
	var st unix.Stat_t
	if err := unix.Fstat(readyFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil // somebody else has set the variable
	}
	unix.CloseOnExec(readyFD)
	// By its name a person finds it (ps, pkill); that of /proc/self/exe is exe.
	_ = os.WriteFile("/proc/self/comm", []byte("vmm"), 0)
	return &background{parent: os.NewFile(readyFD, "ready"), stderr: c.ErrOrStderr()}
}

// openLog opens the log of the guest called name, which is this process's own
// by now. A second one does nothing.
func (b *background) openLog(dir control.RunDir, name string) error {
	if b == nil || b.log != nil {
		return nil
	}
	path := dir.Log(name)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err == nil {
		err = f.Chmod(0o600)
	}
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log = f
	return b.write(fmt.Sprintf("vmm %s, pid %d: guest %s", version, os.Getpid(), name))
}

// write adds a line to the log. The caller has mu.
func (b *background) write(line string) error {
	line = fmt.Sprintf("%s %s\n", time.Now().Format(logTimestamp), line)
	if err := trimLog(b.log, maxLog-len(line)); err != nil {
		return err
	}
	_, err := b.log.WriteString(line)
	return err
}

// trimLog makes a log of more than limit bytes one of its last whole lines, half
// of limit at most. It is open for appending.
func trimLog(f *os.File, limit int) error {
	info, err := f.Stat()
	if err != nil || info.Size() <= int64(limit) {
		return err
	}
	keep := make([]byte, limit/2)
	if _, err := f.ReadAt(keep, info.Size()-int64(len(keep))); err != nil {
		return err
	}
	_, keep, _ = bytes.Cut(keep, []byte("\n"))
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.Write(keep)
	return err
}

// warn tells the user something: where the command was typed until the parent
// has left, and in the log.
func (b *background) warn(line string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.left {
		fmt.Fprintf(b.stderr, "vmm: %s\n", line)
	}
	if b.log != nil {
		_ = b.write("vmm: " + line) // there is nobody else to tell
	}
}

// ready leaves the parent, who prints the line. An error says that it cannot
// be left; then this process is to end.
func (b *background) ready(format string, args ...any) error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left {
		return nil
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("--detach: %w", err)
	}
	defer null.Close()
	for fd, f := range []*os.File{null, b.log, b.log} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("--detach: exchange descriptor %d for %s: %w", fd, f.Name(), err)
		}
	}
	b.left = true
	_, err = fmt.Fprintf(b.parent, format+"\n", args...)
	if err = errors.Join(err, b.parent.Close()); err != nil {
		return fmt.Errorf("--detach: the command that waits for this process has gone: %w", err)
	}
	return nil
}

// readyWhenRunning is ready once the guest runs; if that fails it ends the
// guest.
func (b *background) readyWhenRunning(m *machine.Machine, name string) {
	if b == nil {
		return
	}
	b.mu.Lock()
	b.console = m.Console()
	b.mu.Unlock()
	events, cancel := m.Events()
	go func() {
		defer cancel()
		for e := range events {
			if e.Kind == machine.EventState && e.State == machine.StateRunning {
				if err := b.ready("%s runs in the background (pid %d)", name, os.Getpid()); err != nil {
					b.warn(err.Error())
					_ = m.Stop() // else it has ended
				}
				return
			}
		}
	}()
}

// finish is how this process ends: with err where the command was typed, if
// the parent is still there, else with it in the log, and with what the guest
// printed last.
func (b *background) finish(err error) error {
	if b == nil {
		return err
	}
	b.mu.Lock()
	parent := !b.left
	b.left = true // readyWhenRunning is too late
	b.mu.Unlock()
	if parent {
		return err
	}
	if err == nil {
		b.warn("ended")
		return nil
	}
	b.warn(oneLine(err))
	if b.console != nil {
		text := b.console.Attach(lastWords)
		t, err := text.Next(context.Background(), make([]byte, lastWords))
		if err == nil {
			b.warn("the last that it printed:\n" + plain(t.Text))
		}
	}
	return errSilent
}

// plain is a guest's text without what a terminal would obey.
func plain(text []byte) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return r
		case r == '\r':
			return -1
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == '\uFFFD':
			return '.'
		}
		return r
	}, string(text))
}
