package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// heard says whether somebody has dialled.
func heard(t *testing.T, l *net.UnixListener) (yes bool) {
	t.Helper()
	conn, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	failed := conn.Control(func(fd uintptr) {
		var n int
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		yes = n > 0
	})
	if err := errors.Join(err, failed); err != nil {
		t.Fatal(err)
	}
	return yes
}

// Of 20 guests, 3 were killed and could clean nothing up: the list is right,
// nobody asks a dead one, and what they left is gone.
func TestLsAmongTheDead(t *testing.T) {
	dir := fakeGuests(t)
	const guests = 20
	dead := map[string]bool{"vm03": true, "vm11": true, "vm19": true}
	var started sync.WaitGroup
	for i := range guests {
		started.Go(func() {
			if out, err := exec.Command("fakeguest", fmt.Sprintf("vm%02d", i)).CombinedOutput(); err != nil {
				t.Errorf("fakeguest vm%02d: %v\n%s", i, err, out)
			}
		})
	}
	started.Wait()
	running, err := dir.List()
	if err != nil || len(running) != guests {
		t.Fatalf("List() = %d guests, %v; want %d", len(running), err, guests)
	}
	for _, r := range running {
		if dead[r.Name] {
			if err := kill(r.Pid); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Whoever asks a dead one all the same is heard.
	var ears []*net.UnixListener
	for name := range dead {
		path := dir.Socket(name)
		if err := os.Remove(path); err != nil {
			t.Fatalf("a guest that was killed left no socket: this test tests nothing: %v", err)
		}
		ear, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		ear.SetUnlinkOnClose(false)
		defer ear.Close()
		ears = append(ears, ear)
	}
	// The ears work.
	call, err := net.Dial("unix", ears[0].Addr().String())
	if err != nil || !heard(t, ears[0]) {
		t.Fatalf("a call was not heard: %v", err)
	}
	call.Close()
	if taken, err := ears[0].Accept(); err != nil {
		t.Fatal(err)
	} else {
		taken.Close()
	}
	var out, errs bytes.Buffer
	begin := time.Now()
	status := run(t.Context(), []string{"ls"}, strings.NewReader(""), &out, &errs)
	t.Logf("vmm ls of %d guests, %d of them dead: %v", guests, len(dead), time.Since(begin))
	if status != 0 || errs.Len() > 0 {
		t.Errorf("vmm ls: status %d, %s", status, &errs)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")[1:]
	if len(lines) != guests-len(dead) {
		t.Errorf("vmm ls has %d guests; want %d:\n%s", len(lines), guests-len(dead), &out)
	}
	for _, line := range lines {
		if f := strings.Fields(line); dead[f[0]] || f[1] != "running" {
			t.Errorf("vmm ls has %q; want those that run, running", line)
		}
	}
	for _, ear := range ears {
		if heard(t, ear) {
			t.Errorf("vmm ls asked a dead guest, at %v", ear.Addr())
		}
	}
	for name := range dead {
		if left, _ := filepath.Glob(filepath.Join(string(dir), name+".*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}
