package machine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vmm/migration"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// counts is a guest that prints ever new numbers, one digit at a time, and
// keeps the last in memory: dec [counter] and print, for ever.
func counts() asm {
	const counter = 0x300000
	return asm{}.
		raw(0x30, 0xc0).                       // again: xor al, al
		raw(0xa2).u32(counter).                // next: mov [counter], al
		raw(0x04, '0').                        // add al, '0'
		raw(0x66, 0xba).u16(0x3f8).raw(0xee).  // mov dx, 3f8h; out dx, al
		raw(0xa0).u32(counter).                // mov al, [counter]
		raw(0xfe, 0xc0, 0x3c, 10, 0x74, 0xe7). // inc al; cmp al, 10; je again
		raw(0xeb, 0xe7)                        // jmp next
}

// receiving waits for a guest at a Unix socket and answers the dialler to it.
func receiving(t *testing.T, r migration.Host, state string) (dial func(context.Context) (net.Conn, error), arrived func() *Arrival) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	type result struct {
		a   *migration.Arrival
		err error
	}
	done := make(chan result, 1)
	go func() {
		a, err := migration.Receive(ctx, ln, r, migration.ReceiveOptions{StateDir: state, Warn: func(err error) { t.Logf("receive: %v", err) }})
		done <- result{a, err}
	}()
	t.Cleanup(cancel)
	return func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}, func() *Arrival {
			t.Helper()
			got := <-done
			if got.err != nil {
				t.Fatalf("Receive() = %v", got.err)
			}
			if w, ok := got.a.Machine.(watchedArrival); ok {
				got.a.Machine = w.Destination
			}
			a := got.a.Machine.(*Arrival)
			t.Cleanup(func() {
				if err := a.Machine().Stop(); err != nil && !errors.Is(err, ErrEnded) {
					t.Error(err)
				}
				a.Wait()
				a.Close()
				got.a.Leave()
			})
			return a
		}
}

func outgoing(t *testing.T, m *Machine, dial func(context.Context) (net.Conn, error), state string) (migration.Summary, error) {
	t.Helper()
	d, err := m.Depart(t.Context())
	if err != nil {
		t.Fatalf("Depart() = %v", err)
	}
	journal, err := pr.OpenJournal(state)
	if err != nil {
		t.Fatal(err)
	}
	o, err := migration.NewOutgoing(d, migration.Options{Dial: dial, Journal: journal, Channels: 2, Downtime: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return o.Run(t.Context())
}

// A guest with a software disk moves, its reservation with it, and goes on
// where it was.
func TestGuestMigrates(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	state, run1 := t.TempDir(), t.TempDir()
	m, out := newMachine(t, counts(), func(c *Config) {
		c.Name, c.RunDir = "web1", run1
		c.LUNs = []LUNConfig{{ID: "data", Path: image, Target: 0, Initiator: "host1"}}
	})
	const key = 0x1122334455667788
	reserve(t, m, key)
	stop := run(t, m)
	out.waitFor("0123456789")

	console := newConsole()
	r := &Reception{
		Config:   Config{Console: console, RunDir: t.TempDir(), LUNs: []LUNConfig{{ID: "data", Path: image, Initiator: "host2"}}, Warn: func(s string) { t.Logf("destination: %s", s) }},
		StateDir: state,
	}
	dial, arrived := receiving(t, r, r.StateDir)
	summary, err := outgoing(t, m, dial, state)
	if err != nil {
		t.Fatalf("migration = %v", err)
	}
	a := arrived()
	console.waitFor("0123456789")
	t.Logf("%+v", summary)

	if got := m.State(); got != StatePaused {
		t.Errorf("the source is %v; want paused", got)
	}
	if len(summary.LUNs) != 1 || !strings.Contains(summary.LUNs[0].Sentence, "are on this host") {
		t.Errorf("outcomes %v; want the reservation on the destination", summary.LUNs)
	}
	// What the guest wrote last here and first there follow each other.
	was, is := out.String(), console.String()
	if last, first := was[len(was)-1], is[0]; (last-'0'+1)%10 != first-'0' {
		t.Errorf("the guest wrote %q last at the source and %q first at the destination", last, first)
	}
	now, err := a.Machine().Reservation(t.Context(), "data")
	if err != nil {
		t.Fatal(err)
	}
	if len(now.Registrations) != 1 || now.Own != 0 || now.Held.Type != pr.WriteExclusive || now.Held.Key != key || now.Guest.Key != key || now.Guest.Type != pr.WriteExclusive {
		t.Errorf("after the migration the LUN has %+v; want key %x and Write Exclusive on the destination's nexus alone", now, key)
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Errorf("the source's Run() = %v; want nil", err)
	}
}

// A file that goes with the guest is the destination's own if it is the same.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	content := bytes.Repeat([]byte("0123456789abcdef"), 600_000) // three pieces
	want := migration.Attachment{Name: "kernel", Size: int64(len(content)), SHA256: sha256.Sum256(content)}
	other := bytes.Clone(content)
	other[len(other)-1]++
	for name, data := range map[string][]byte{"same": content, "other": other, "longer": append(other, 0), "shorter": content[1:]} {
		if err := os.WriteFile(path(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("same", path("link")), unix.Mkfifo(path("fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for name, has := range map[string]bool{
		path("same"): true, path("link"): true,
		path("other"): false, path("longer"): false, path("shorter"): false,
		path("missing"): false, path("fifo"): false, dir: false, "same": false, "": false,
	} {
		f := find(t.Context(), name, want)
		if (f != nil) != has {
			t.Errorf("find(%q) = %v; want it found: %v", name, f, has)
		}
		if f == nil {
			continue
		}
		if data, err := io.ReadAll(f); err != nil || !bytes.Equal(data, content) {
			t.Errorf("find(%q) has %d bytes, %v", name, len(data), err)
		}
		f.Close()
	}
	// A source on this host shows that it reads the file: nobody else has to.
	shown := want
	shown.SHA256 = sha256.Sum256(nil)
	for _, tt := range []struct {
		name  string
		flags int
		has   bool
	}{
		{"same", os.O_RDONLY, true}, {"same", os.O_RDWR, true},
		{"same", os.O_WRONLY, false}, {"same", unix.O_PATH, false}, {"other", os.O_RDONLY, false},
	} {
		their, err := os.OpenFile(path(tt.name), tt.flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		shown.Data = their
		f := find(t.Context(), path("same"), shown)
		if (f != nil) != tt.has {
			t.Errorf("find(same) with %s shown, opened with %#x = %v; want it found: %v", tt.name, tt.flags, f, tt.has)
		}
		if f != nil {
			f.Close()
		}
		their.Close()
		if f := find(t.Context(), path("same"), shown); f != nil {
			t.Errorf("find(same) with a closed file shown = %v", f)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if f := find(ended, path("same"), want); f != nil {
		t.Errorf("find() = %v after the end of its context", f)
	}
}

// reserve registers a key for the guest on its first LUN and reserves it, as
// the guest's own driver would.
func reserve(t *testing.T, m *Machine, key pr.Key) {
	t.Helper()
	for _, o := range []pr.Out{
		{Action: pr.Register, ServiceKey: key},
		{Action: pr.Reserve, Type: pr.WriteExclusive, Key: key},
	} {
		cdb, list := o.Encode()
		for { // a driver repeats what a unit attention answers
			c := &scsi.Command{CDB: cdb, DataOut: [][]byte{list}}
			if err := scsi.Exec(t.Context(), m.units()[0], c); err != nil {
				t.Fatal(err)
			}
			if s, ok := scsi.ParseSense(c.Sense[:c.SenseLen]); ok && s.Key == scsi.UnitAttention {
				continue
			}
			if err := c.Err(); err != nil {
				t.Fatalf("%v: %v", o.Action, err)
			}
			break
		}
	}
}

// What the destination cannot do is refused while the guest runs.
func TestMigrationRefused(t *testing.T) {
	m, out := newMachine(t, counts(), func(c *Config) { c.Name = "web1" })
	run(t, m)
	out.waitFor("012")
	dial, _ := receiving(t, &Reception{
		Config:   Config{RunDir: t.TempDir(), LUNs: []LUNConfig{{ID: "data", Path: "/dev/null"}}},
		StateDir: t.TempDir(),
	}, t.TempDir())
	_, err := outgoing(t, m, dial, t.TempDir())
	if !errors.Is(err, migration.ErrRefused) || !strings.Contains(err.Error(), "no LUN of that id") {
		t.Errorf("migration = %v; want it refused for --lun id=data", err)
	}
	if got := m.State(); got != StateRunning {
		t.Errorf("the source is %v; want running", got)
	}
}

// A copy of the disk image, with the same identity, is not the guest's disk:
// neither under another name nor, what is beside it being the guest's, in the
// place of the image.
func TestMigrationToACopy(t *testing.T) {
	image := func() string {
		path := filepath.Join(t.TempDir(), "disk.img")
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	there, twin := image(), image()
	m, out := newMachine(t, counts(), func(c *Config) {
		c.Name, c.LUNs = "web1", []LUNConfig{{ID: "data", Path: there, Initiator: "host1"}}
	})
	run(t, m)
	out.waitFor("012")
	id := make([]byte, 64)
	n, err := unix.Getxattr(there, "user.vmm.uuid", id)
	switch err {
	case nil:
		err = unix.Setxattr(twin, "user.vmm.uuid", id[:n], 0)
	case unix.ENOTSUP: // then it lies beside the image
		err = os.CopyFS(twin+".vmm", os.DirFS(there+".vmm"))
	}
	if err != nil {
		t.Fatal(err)
	}
	refused := func(path string) {
		t.Helper()
		dial, _ := receiving(t, &Reception{
			Config:   Config{RunDir: t.TempDir(), LUNs: []LUNConfig{{ID: "data", Path: path, Initiator: "host2"}}},
			StateDir: t.TempDir(),
		}, t.TempDir())
		_, err = outgoing(t, m, dial, t.TempDir())
		if !errors.Is(err, migration.ErrRefused) || !strings.Contains(err.Error(), "a copy of it") {
			t.Errorf("migration to %s = %v; want it refused for the copy", path, err)
		}
	}
	refused(twin)
	if err := os.Rename(twin, there); err != nil {
		t.Fatal(err)
	}
	refused(there)
	if got := m.State(); got != StateRunning {
		t.Errorf("the source is %v; want running", got)
	}
}
