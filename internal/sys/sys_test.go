package sys

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestEventFDCountsAndWakes(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	if e.Pending() {
		t.Error("new eventfd is pending")
	}
	for range 3 {
		if err := e.Signal(); err != nil {
			t.Fatal(err)
		}
	}
	if !e.Pending() {
		t.Error("signalled eventfd is not pending")
	}
	if n, err := e.Wait(); n != 3 || err != nil {
		t.Errorf("Wait() = %d, %v; want 3, nil", n, err)
	}
	if n := e.Drain(); n != 0 {
		t.Errorf("Drain() of an empty eventfd = %d; want 0", n)
	}

	woken := make(chan uint64)
	go func() {
		n, _ := e.Wait()
		woken <- n
	}()
	e.Signal()
	if n := <-woken; n != 1 {
		t.Errorf("waiter took %d; want 1", n)
	}

	for range 2 {
		if err := e.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	if err := e.Signal(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Signal after Close = %v; want os.ErrClosed", err)
	}
	if _, err := e.Wait(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait after Close = %v; want os.ErrClosed", err)
	}
}

func TestEventFDSignalDoesNotAllocate(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector's hooks allocate; the run without it counts")
	}
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if n := testing.AllocsPerRun(100, func() { e.Signal(); e.Wait() }); n != 0 {
		t.Errorf("Signal and Wait allocate %v times; want 0", n)
	}
}

func TestMappingSharesAMemFD(t *testing.T) {
	f, err := MemFD("test", 8192)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var maps [2]*Mapping
	for i := range maps {
		if maps[i], err = MapShared(int(f.Fd()), 4096, 4096); err != nil {
			t.Fatal(err)
		}
	}
	maps[0].Bytes()[17] = 0xa5
	if got := maps[1].Bytes()[17]; got != 0xa5 {
		t.Errorf("second mapping reads %#x; want 0xa5", got)
	}
	for _, m := range maps {
		for range 2 {
			if err := m.Close(); err != nil {
				t.Errorf("Close() = %v", err)
			}
		}
		if m.Bytes() != nil {
			t.Error("Bytes() after Close is not nil")
		}
	}
}

func TestReplaceFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	// What a crash has left of a longer one is in nobody's way.
	if err := os.WriteFile(path+".new", []byte("half of something long"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"first", "second", ""} {
		if err := ReplaceFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); string(b) != content || err != nil {
			t.Errorf("the file has %q, %v; want %q", b, err, content)
		}
	}
	if left, err := os.ReadDir(dir); len(left) != 1 || err != nil {
		t.Errorf("left beside it: %v, %v", left, err)
	}
	if err := os.Mkdir(path+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := ReplaceFile(path, []byte("third"), 0o600); err == nil {
		t.Error("a file was written where a directory is")
	}
	if b, err := os.ReadFile(path); len(b) != 0 || err != nil {
		t.Errorf("after an error the file has %q, %v; want what it had", b, err)
	}
}

// A directory that somebody else keeps locked is an error after a while, not a
// wait without end; one that cannot be read is not locked.
func TestListenUnixWhereTheDirectoryIsLocked(t *testing.T) {
	defer func(d time.Duration) { lockTime = d }(lockTime)
	lockTime = 20 * time.Millisecond
	path := t.TempDir()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if ln, err := ListenUnix(filepath.Join(path, "s")); err == nil || !strings.Contains(err.Error(), "locked by another process") {
		t.Errorf("ListenUnix() = %v, %v; want an error that names the directory", ln, err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	lockTime = time.Minute
	ln, err := ListenUnix(filepath.Join(path, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
}

// Bytes go from a socket to their place in a file, and an end is an end.
func TestPipe(t *testing.T) {
	const size = 1 << 20
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	in, out := fds[0], fds[1]
	defer unix.Close(in)
	file, err := MemFD("pipe-test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	p, err := NewPipe(size)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Size() < 4096 || p.Size() > size {
		t.Errorf("a pipe of %d bytes; %d were asked for", p.Size(), size)
	}
	if _, err := p.From(in, size); err != unix.EAGAIN {
		t.Errorf("From a silent socket: %v; want EAGAIN", err)
	}
	if _, err := unix.Write(out, []byte("one, two")); err != nil {
		t.Fatal(err)
	}
	if n, err := p.From(in, 5); n != 5 || err != nil {
		t.Errorf("From = %d, %v; want the 5 that were asked for", n, err)
	}
	if n, err := p.From(in, size); n != 3 || err != nil {
		t.Errorf("From = %d, %v; want the 3 that were left", n, err)
	}
	if err := p.To(int(file.Fd()), 5000, 4); err != nil {
		t.Error(err)
	}
	if b := make([]byte, 2); p.Into(b) != nil || string(b) != " t" {
		t.Errorf("Into gives %q; want the next two", b)
	}
	if err := p.To(int(file.Fd()), 3, 2); err != nil {
		t.Error(err)
	}
	for at, want := range map[int64]string{5000: "one,", 3: "wo", 5004: "\x00\x00", 5: "\x00"} {
		got := make([]byte, len(want))
		if _, err := file.ReadAt(got, at); err != nil || string(got) != want {
			t.Errorf("at %d there is %q, %v; want %q", at, got, err, want)
		}
	}
	unix.Close(out)
	if n, err := p.From(in, size); err != io.EOF {
		t.Errorf("From a closed socket = %d, %v; want EOF", n, err)
	}
	for range 2 {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.From(in, size); err != os.ErrClosed {
		t.Errorf("From after Close: %v", err)
	}
	if err := p.To(int(file.Fd()), 0, 1); err != os.ErrClosed {
		t.Errorf("To after Close: %v", err)
	}
	if err := p.Into(make([]byte, 1)); err != os.ErrClosed {
		t.Errorf("Into after Close: %v", err)
	}
}
