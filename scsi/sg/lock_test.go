package sg

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// unit is a logical unit without a block node, whose hold is its lock alone.
var (
	unit     = &device{address: Address{2, 0, 0, 0}}
	unitName = &scsi.Identity{Designators: []scsi.Designator{{Type: scsi.DesignatorNAA, ID: []byte{0x60, 1, 2, 3}}}}
)

// elsewhere says whether somebody else gets the lock, who gives it back: a lock
// is an open file's, so one that is opened anew stands for any other process.
func elsewhere(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = flock(f)
	if err != nil && err != unix.EWOULDBLOCK {
		t.Fatal(err)
	}
	return err == nil
}

// A lock that is handed over is held until the last of those who have it
// closes it, whichever that is, and says whose it is.
func TestLockIsHandedOver(t *testing.T) {
	for _, oldFirst := range []bool{true, false} {
		run := t.TempDir()
		path := filepath.Join(run, lockName(unitName, unit.address))
		old, err := host("/").take(unit, unitName, run, "web1")
		if err != nil {
			t.Fatal(err)
		}
		next, err := host("/").share(unit, unitName, run, []*os.File{old.lock})
		if err != nil {
			t.Fatal(err)
		}
		if elsewhere(t, path) {
			t.Error("with two that hold it a third gets the lock")
		}
		first, last := old, next
		if !oldFirst {
			first, last = next, old
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		if elsewhere(t, path) {
			t.Errorf("with one left (the older closes first: %v) a third gets the lock", oldFirst)
		}
		l := &LUN{hold: last}
		if l.Shared() != oldFirst {
			t.Errorf("Shared() = %v; want %v", l.Shared(), oldFirst)
		}
		for _, vm := range []string{"a-name-that-is-longer-than-the-first", "db7"} {
			if err := l.Possess(vm); err != nil || l.Shared() {
				t.Errorf("Possess() = %v, then Shared() = %v", err, l.Shared())
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != fmt.Sprintf("%d %s\n", os.Getpid(), vm) {
				t.Errorf("the lock says %q, %v; want this process and %s", b, err, vm)
			}
		}
		if err := last.Close(); err != nil {
			t.Error(err)
		}
		if !elsewhere(t, path) {
			t.Error("closed by both it is still locked")
		}
	}
}

// What comes from another process is used only if it is the very lock, locked
// by that very file; and it stays whose it is.
func TestHandedLockIsNotTrusted(t *testing.T) {
	run := t.TempDir()
	old, err := host("/").take(unit, unitName, run, "web1")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	open := func(path string) *os.File {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	closed := open(filepath.Join(t.TempDir(), "closed"))
	closed.Close()
	for _, tt := range []struct {
		name  string
		files []*os.File
		want  string
	}{
		{"another file", []*os.File{open(filepath.Join(t.TempDir(), "other.lock"))}, "something else than its lock"},
		{"a file of that name elsewhere", []*os.File{open(filepath.Join(t.TempDir(), filepath.Base(old.lock.Name())))}, "something else than its lock"},
		{"the lock, not locked by it", []*os.File{open(old.lock.Name())}, "in use by this VM, web1"},
		{"no file", []*os.File{closed}, "something else than its lock"},
		{"too many", []*os.File{old.lock, open("/dev/null")}, "hands over 2 files where 1 keep others off"},
	} {
		if h, err := host("/").share(unit, unitName, run, tt.files); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: share() = %v, %v; want %q", tt.name, h, err, tt.want)
		}
	}
	other := &device{address: Address{3, 0, 0, 0}}
	if h, err := host("/").share(other, unitName, run, []*os.File{old.lock}); err == nil {
		t.Errorf("share() of another nexus = %v; want an error", h)
	}
	if _, err := old.lock.Stat(); err != nil {
		t.Errorf("a refusal has closed the file: %v", err)
	}
	null := open("/dev/null")
	for _, n := range []*node{{path: "/dev/sda", dev: devno{8, 0}}, {path: "/dev/null", dev: devno{1, 3}}} {
		if f, err := inheritNode(null, n); err == nil || !strings.Contains(err.Error(), "something else than "+n.path) {
			t.Errorf("inheritNode(/dev/null) for %s = %v, %v", n.path, f, err)
		}
	}
}
