package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A signal before the process in the background is ready ends both.
func TestDetachIsInterrupted(t *testing.T) {
	dir := fakeGuests(t)
	// The configuration is a pipe in which nothing comes.
	config := filepath.Join(t.TempDir(), "config")
	if err := unix.Mkfifo(config, 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("vmm", "run", "web1", "--config", config, "--detach")
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// This returns when it is read, by the process in the background.
	f, err := os.OpenFile(config, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := c.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if got := exitStatus(c); got != 1 || !strings.HasPrefix(errs.String(), "vmm: the process in the background: signal: terminated") {
		t.Errorf("exit status = %d, %s; want 1, and to hear of the signal", got, &errs)
	}
	if _, err := f.Write([]byte("x")); err == nil {
		t.Error("the process in the background still reads its configuration")
	}
	if running, err := dir.List(); err != nil || len(running) != 0 {
		t.Errorf("List() = %v, %v; want nobody", running, err)
	}
}

// A process whose parent has gone before it was ready ends: nobody was told of
// it.
func TestReadyWithoutAParent(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	c := exec.Command("vmm", "receive", "web1", "--detach", "--listen", "unix://"+filepath.Join(string(fakeGuests(t)), "in"))
	c.Env = append(os.Environ(), detachedEnv+"=1", "VMM_STATE_DIR="+t.TempDir())
	c.ExtraFiles = []*os.File{w}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if got := exitStatus(c); got != 1 {
		t.Errorf("exit status = %d; want 1", got)
	}
	log, err := os.ReadFile(filepath.Join(os.Getenv("VMM_RUN_DIR"), "web1.log"))
	if err != nil || !strings.Contains(string(log), "the command that waits for this process has gone") {
		t.Errorf("log %q, %v; want the reason", log, err)
	}
}

// A variable of that name makes nobody a process in the background.
func TestDetachedEnvironmentAlone(t *testing.T) {
	fakeGuests(t)
	c := exec.Command("vmm", "run", "web1", "--kernel", "nothere", "--detach")
	c.Env = append(os.Environ(), detachedEnv+"=1")
	out, _ := c.CombinedOutput()
	if c.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "kernel nothere") {
		t.Errorf("%v: %s; want an error about the kernel", c.ProcessState, out)
	}
}

// The log keeps its newest lines, and no more than its size.
func TestLogIsBounded(t *testing.T) {
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "log"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := &background{log: f, left: true}
	const lines = 20000
	line := strings.Repeat("x", 80)
	most := int64(0)
	for i := range lines {
		b.warn(fmt.Sprint(line, i))
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, info.Size())
	}
	if most > maxLog || most < maxLog*9/10 {
		t.Errorf("the log grew to %d bytes; want at most, and nearly, %d", most, maxLog)
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxLog))
	if err != nil {
		t.Fatal(err)
	}
	kept := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	for i, l := range kept {
		if want := fmt.Sprint("vmm: ", line, lines-len(kept)+i); !strings.HasSuffix(l, want) {
			t.Fatalf("line %d of %d is %q; want it to end in %q", i, len(kept), l, want)
		}
	}
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"a\r\nb\tc":         "a\nb\tc",
		"\x1b[31mred\x07":   ".[31mred.",
		"\x7f\u009b1mü\xff": "..1mü.",
	} {
		if got := plain([]byte(in)); got != want {
			t.Errorf("plain(%q) = %q; want %q", in, got, want)
		}
	}
}
