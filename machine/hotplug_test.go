package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"vmm/scsi"
	"vmm/scsi/pr"
	"vmm/scsi/scsitest"
)

func diskImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return path
}

func plugged(path string) LUNConfig {
	return LUNConfig{Path: path, Target: -1, Timeout: DefaultTimeout, Initiator: "host1:test"}
}

// names is the list of a machine's LUNs, as id@target.
func names(m *Machine) string {
	var list []string
	for _, l := range m.Info().LUNs {
		list = append(list, fmt.Sprintf("%s@%d", l.ID, l.Target))
	}
	return strings.Join(list, " ")
}

// one is a command of the guest to one of its LUNs.
func one(t *testing.T, l scsi.LUN, cdb ...byte) error {
	t.Helper()
	c := &scsi.Command{CDB: append(cdb, make([]byte, 6-len(cdb))...)}
	if err := scsi.Exec(t.Context(), l, c); err != nil {
		t.Fatal(err)
	}
	return c.Err()
}

func detach(t *testing.T, m *Machine, id string) {
	t.Helper()
	if left, err := m.Detach(t.Context(), id, DetachTimeout, false); err != nil || left != nil {
		t.Fatalf("Detach(%s) = %v, %v", id, left, err)
	}
}

func TestAttachAndDetach(t *testing.T) {
	first, second := diskImage(t), diskImage(t)
	m, out := newMachine(t, asm{}.print("hello").forever(), func(c *Config) {
		c.LUNs = []LUNConfig{{ID: "root", Path: first, Target: -1, Initiator: "host1:test"}}
	})
	if _, err := m.Attach(t.Context(), plugged(second)); err == nil || !strings.Contains(err.Error(), "starting") {
		t.Errorf("Attach before Run = %v; want that the guest is starting", err)
	}
	stop := run(t, m)
	out.waitFor("hello")
	events, cancel := m.Events()
	defer cancel()
	<-events // the state

	// What cannot be attached changes nothing.
	for _, test := range []struct {
		name   string
		change func(*LUNConfig)
		want   string
	}{
		{"no such file", func(c *LUNConfig) { c.Path = "/nowhere" }, "no such file"},
		{"not a disk", func(c *LUNConfig) { c.Path = "/dev/null" }, "/dev/null"},
		{"a directory", func(c *LUNConfig) { c.Path = "/" }, "neither a device nor a regular file"},
		{"in use", func(c *LUNConfig) { c.Path = first }, "use"},
		{"its target is taken", func(c *LUNConfig) { c.Target = 0 }, "target 0 is LUN root's"},
		{"its name is taken", func(c *LUNConfig) { c.ID = "root" }, "the guest has a LUN root"},
		{"a target that does not exist", func(c *LUNConfig) { c.Target = 256 }, "from 0 to 255"},
		{"no time", func(c *LUNConfig) { c.Timeout = 0 }, "from 1s to 24h"},
		{"no path", func(c *LUNConfig) { c.Path = "" }, "path=PATH is missing"},
		{"another disk", func(c *LUNConfig) { c.Identity = "naa.1" }, "the guest's is naa.1"},
	} {
		c := plugged(second)
		test.change(&c)
		if _, err := m.Attach(t.Context(), c); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: Attach() = %v; want an error with %q", test.name, err, test.want)
		}
		if got := names(m); got != "root@0" {
			t.Errorf("%s: the guest has %s", test.name, got)
		}
	}

	got, err := m.Attach(t.Context(), plugged(second))
	if err != nil || got.ID != "lun1" || got.Target != 1 || got.Path != second || got.Passthrough || got.Identity == "" {
		t.Fatalf("Attach() = %+v, %v", got, err)
	}
	if e := <-events; e.Kind != EventLUN || e.Text != "LUN lun1 attached as target 1: "+second {
		t.Errorf("event %+v", e)
	}
	l := m.units()[1]
	for i, want := range []string{"6/29/00", ""} {
		if err := one(t, l); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("the guest's command %d = %v; want %q", i, err, want)
		}
	}
	if r, err := m.Reservation(t.Context(), "lun1"); err != nil || r.Own != -1 {
		t.Errorf("Reservation(lun1) = %+v, %v", r, err)
	}

	detach(t, m, "lun1")
	if e := <-events; e.Kind != EventLUN || !strings.HasPrefix(e.Text, "LUN lun1 detached") {
		t.Errorf("event %+v", e)
	}
	if got := names(m); got != "root@0" {
		t.Errorf("after Detach the guest has %s", got)
	}
	for name, err := range map[string]error{
		"Reservation": func() error { _, err := m.Reservation(t.Context(), "lun1"); return err }(),
		"Detach":      func() error { _, err := m.Detach(t.Context(), "lun1", DetachTimeout, true); return err }(),
	} {
		if !errors.Is(err, ErrNoLUN) {
			t.Errorf("%s of a LUN that is gone = %v; want ErrNoLUN", name, err)
		}
	}
	if _, err := l.reservation(t.Context()); !errors.Is(err, ErrNoLUN) {
		t.Errorf("a question that had found it before = %v; want ErrNoLUN", err)
	}

	// Its target is not the next one's, unless somebody says so; a paused
	// machine can be given LUNs too.
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"root@0 lun2@2", "root@0 lun2@2 data@1"} {
		c := plugged(second)
		if strings.Contains(want, "data") {
			c.ID, c.Target, c.Path = "data", 1, diskImage(t)
		}
		if _, err := m.Attach(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if got := names(m); got != want {
			t.Errorf("the guest has %s; want %s", got, want)
		}
	}
	detach(t, m, "lun2")
	detach(t, m, "root")
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := m.Attach(t.Context(), plugged(second)); !errors.Is(err, ErrEnded) {
		t.Errorf("Attach() after the end = %v; want ErrEnded", err)
	}
	if _, err := m.Detach(t.Context(), "data", DetachTimeout, false); !errors.Is(err, ErrEnded) {
		t.Errorf("Detach() after the end = %v; want ErrEnded", err)
	}
}

// A guest that is registered keeps its LUN, unless it is forced: then the
// registration stays on the disk, and that is said.
func TestDetachOfRegisteredGuest(t *testing.T) {
	const key = 0x1122334455667788
	image := diskImage(t)
	m, out := newMachine(t, asm{}.print("hello").forever(), nil)
	run(t, m)
	out.waitFor("hello")
	attach := func() {
		t.Helper()
		c := plugged(image)
		c.ID = "data"
		if _, err := m.Attach(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	attach()
	reserve(t, m, key)
	_, err := m.Detach(t.Context(), "data", DetachTimeout, false)
	if want := "LUN data: the guest holds the Write Exclusive reservation with key 0x1122334455667788: take it away all the same with --force"; !errors.Is(err, ErrLUNInUse) || err.Error() != want {
		t.Errorf("Detach() = %v; want %s", err, want)
	}
	if err := one(t, m.units()[0]); err != nil {
		t.Errorf("after a Detach that was refused a command = %v", err)
	}
	left, err := m.Detach(t.Context(), "data", DetachTimeout, true)
	if err != nil || len(left) != 1 || left[0] != "the guest holds the Write Exclusive reservation with key 0x1122334455667788" {
		t.Errorf("Detach(force) = %q, %v", left, err)
	}
	// Whoever has the nexus next has the registration, and can be seen to.
	attach()
	if r, err := m.Reservation(t.Context(), "data"); err != nil || r.Own != 0 || r.Guest.Key != key {
		t.Errorf("attached again: %+v, %v; want the registration", r, err)
	}
	release, list := pr.Out{Action: pr.Clear, Key: key}.Encode()
	for range 2 { // the first meets the unit attention
		c := &scsi.Command{CDB: release, DataOut: [][]byte{list}}
		if err := scsi.Exec(t.Context(), m.units()[0], c); err != nil {
			t.Fatal(err)
		}
	}
	if err := one(t, m.units()[0], scsi.OpReserve6); err == nil {
		if _, err := m.Detach(t.Context(), "data", DetachTimeout, false); !errors.Is(err, ErrLUNInUse) || !strings.Contains(err.Error(), "RESERVE") {
			t.Errorf("Detach() of a guest with an SPC-2 reservation = %v", err)
		}
		if err := one(t, m.units()[0], scsi.OpRelease6); err != nil {
			t.Fatal(err)
		}
	}
	detach(t, m, "data")
}

// A driver that had no buffer for the event takes another disk of that target
// for the first: it gets none.
func TestTargetIsNotReusedUnheard(t *testing.T) {
	image := diskImage(t)
	m, out := newMachine(t, asm{}.print("hello").forever(), nil)
	run(t, m)
	out.waitFor("hello")
	c := plugged(image)
	c.Target = 3
	if _, err := m.Attach(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	was := m.units()[0].identity.String()
	detach(t, m, "lun3") // no driver: it will scan
	m.past.note(3, former{was, false})
	if _, err := m.Attach(t.Context(), c); err != nil {
		t.Errorf("Attach() of the same disk = %v", err)
	}
	detach(t, m, "lun3")
	m.past.note(3, former{"naa.1", false})
	if _, err := m.Attach(t.Context(), c); err == nil || !strings.Contains(err.Error(), "the guest has not heard that target 3 is not naa.1 any more") {
		t.Errorf("Attach() of another disk = %v", err)
	}
	// The image is free again: a failed Attach has closed it.
	c.Target = -1
	if got, err := m.Attach(t.Context(), c); err != nil || got.Target != 0 {
		t.Errorf("Attach() without a target = %+v, %v; want target 0", got, err)
	}
	m.past.forget()
	detach(t, m, "lun0")
	c.Target = 3
	if _, err := m.Attach(t.Context(), c); err != nil {
		t.Errorf("Attach() after the guest's reset = %v", err)
	}
}

// A command that does not come back keeps its LUN, or, by force, the disk.
func TestDetachWithCommandsInFlight(t *testing.T) {
	held := scsitest.NewHeld(8)
	l := newLUN(held, LUNConfig{ID: "data"})
	l.identity = &scsi.Identity{}
	// The target's door is tried in package virtio; here it is the question
	// that the disk does not answer.
	ctx, cancel := context.WithCancel(t.Context())
	var asked sync.WaitGroup
	var said string
	asked.Go(func() { said = l.leaves(ctx) })
	c := <-held.Commands
	cancel()
	asked.Wait()
	if !strings.HasPrefix(said, "its reservations could not be read") {
		t.Errorf("leaves() of a silent disk = %q", said)
	}
	c.Fail(scsi.Failure)
	if err := l.retire(); err != nil {
		t.Error(err)
	}
}

// LUNs come and go while a migration begins: it takes those along that it
// began with, or is given up; and once the guest stands none comes or goes.
func TestAttachAndMigration(t *testing.T) {
	m, out := newMachine(t, counts(), nil)
	run(t, m)
	out.waitFor("012")
	d, err := m.Depart(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := plugged(diskImage(t))
	if _, err := m.Attach(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Pause(t.Context()); err == nil || !strings.Contains(err.Error(), "since the migration began") {
		t.Errorf("Pause() of a departure with other LUNs = %v", err)
	}
	if got := m.State(); got != StateRunning {
		t.Errorf("the guest is %v; want running", got)
	}
	if d, err = m.Depart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if luns := d.Config().Luns; len(luns) != 1 || luns[0].Path != c.Path || luns[0].Id != "lun0" || luns[0].Initiator != c.Initiator {
		t.Errorf("the configuration that travels has %v", luns)
	}
	if _, err := d.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Attach(t.Context(), plugged(diskImage(t))); !errors.Is(err, ErrMoving) {
		t.Errorf("Attach() to a guest that moves = %v; want ErrMoving", err)
	}
	if _, err := m.Detach(t.Context(), "lun0", time.Second, true); !errors.Is(err, ErrMoving) {
		t.Errorf("Detach() from a guest that moves = %v; want ErrMoving", err)
	}
	if err := d.Resume(); err != nil {
		t.Fatal(err)
	}
	detach(t, m, "lun0")
}

// Whoever asks while LUNs come and go gets an answer or is told that it is
// gone.
func TestPlugUnderQuestions(t *testing.T) {
	m, out := newMachine(t, asm{}.print("hello").forever(), nil)
	run(t, m)
	out.waitFor("hello")
	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for range 2 {
		asking.Go(func() {
			for ctx.Err() == nil {
				for _, l := range m.Info().LUNs {
					if _, err := m.Reservation(ctx, l.ID); err != nil && !errors.Is(err, ErrNoLUN) && ctx.Err() == nil {
						t.Error(err)
					}
				}
			}
		})
	}
	image := diskImage(t)
	for range 20 {
		got, err := m.Attach(t.Context(), plugged(image))
		if err != nil {
			t.Fatal(err)
		}
		detach(t, m, got.ID)
	}
	stop()
	asking.Wait()
}
