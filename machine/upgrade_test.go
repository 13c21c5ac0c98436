package machine

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"vmm/migration"
	"vmm/scsi"
	"vmm/scsi/disk"
	"vmm/scsi/pr"
	"vmm/scsi/sg"
)

// A guest moves to five machines of its own name, one after the other, with the
// image that it has: each finds the nexus of the one before in use, and the
// reservation moves.
func TestGuestMovesToItsSuccessors(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	state, runDir := t.TempDir(), t.TempDir()
	m, out := newMachine(t, counts(), func(c *Config) {
		c.Name, c.RunDir = "web1", runDir
		c.LUNs = []LUNConfig{{ID: "data", Path: image, Target: 0}}
	})
	const key = 0x1122334455667788
	reserve(t, m, key)
	ended := run(t, m)
	journal, err := pr.OpenJournal(state)
	if err != nil {
		t.Fatal(err)
	}
	var nexuses []pr.Nexus
	for i := range 5 {
		out.waitFor("0123456789")
		console := newConsole()
		r := &Reception{Config: Config{Console: console, RunDir: runDir, Warn: func(s string) { t.Logf("successor %d: %s", i, s) }}, StateDir: state}
		dial, arrived := receiving(t, r, state)
		d, err := m.Depart(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		o, err := migration.NewOutgoing(d, migration.Options{Dial: dial, Local: true, Journal: journal})
		if err != nil {
			t.Fatal(err)
		}
		s, err := o.Run(t.Context())
		if err != nil {
			t.Fatalf("migration %d = %v", i, err)
		}
		if len(s.LUNs) != 1 || !strings.Contains(s.LUNs[0].Sentence, "are on this host") {
			t.Errorf("migration %d: outcomes %v; want the reservation on the other nexus", i, s.LUNs)
		}
		a := arrived()
		if err := m.Stop(); err != nil {
			t.Error(err)
		}
		if err := ended(); err != nil {
			t.Errorf("machine %d: Run() = %v; want nil", i, err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		was := out.String()
		m, out, ended = a.Machine(), console, a.Wait
		out.waitFor("0123456789")
		if is := out.String(); (was[len(was)-1]-'0'+1)%10 != is[0]-'0' {
			t.Errorf("migration %d: the guest wrote %q last before it and %q first after it", i, was[len(was)-1], is[0])
		}
		now, err := m.Reservation(t.Context(), "data")
		if err != nil {
			t.Fatal(err)
		}
		if len(now.Registrations) != 1 || now.Own != 0 || now.Held.Type != pr.WriteExclusive || now.Held.Key != key || now.Guest.Key != key || now.Guest.Type != pr.WriteExclusive {
			t.Fatalf("migration %d: the LUN has %+v; want key %x and Write Exclusive on the machine's nexus alone", i, now, key)
		}
		nexuses = append(nexuses, now.Registrations[0].Nexus)
		// A second guest of the name, from another run directory, gets the image
		// by neither nexus.
		other, err := New(Config{Name: "web1", RunDir: t.TempDir(), Memory: 16 << 20, CPUs: 1, CPU: CPUHost, Kernel: kernelFile(t, counts()), Console: newConsole(), Warn: func(string) {}, LUNs: []LUNConfig{{ID: "data", Path: image, Target: 0}}})
		if !errors.Is(err, disk.ErrInUse) {
			t.Errorf("migration %d: another guest of the name gets the image: %v, %v", i, other, err)
		}
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	first, _ := pr.NamedNexus(host + ":web1")
	second, _ := pr.NamedNexus(host + ":web1#2")
	if want := []pr.Nexus{second, first, second, first, second}; !slices.Equal(nexuses, want) {
		t.Errorf("the nexuses were %v; want %v", nexuses, want)
	}
	// Started anew, it finds what it has left on its second nexus.
	if err := errors.Join(m.Stop(), ended(), m.Close()); err != nil {
		t.Error(err)
	}
	again, _ := newMachine(t, counts(), func(c *Config) {
		c.Name, c.RunDir = "web1", runDir
		c.LUNs = []LUNConfig{{ID: "data", Path: image, Target: 0}}
	})
	now, err := again.Reservation(t.Context(), "data")
	if err != nil || len(now.Registrations) != 1 || now.Own != 0 || now.Guest.Key != key || now.Guest.Type != pr.WriteExclusive {
		t.Errorf("started anew: the LUN has %+v, %v; want key %x on the machine's nexus", now, err, key)
	}
}

// passedLUN is a passed-through LUN that may be another process's, too.
type passedLUN struct {
	*targetLUN
	shared bool
	owner  string
}

func (p *passedLUN) Identity() *scsi.Identity { return &scsi.Identity{} }
func (p *passedLUN) Nexus() sg.Nexus {
	return sg.Nexus{BootID: "boot", Address: sg.Address{Host: 2}}
}
func (p *passedLUN) Held() []*os.File { return nil }
func (p *passedLUN) Shared() bool     { return p.shared }
func (p *passedLUN) Possess(vm string) error {
	p.shared, p.owner = false, vm
	return nil
}

// On a nexus where the guest runs elsewhere nothing is sent: what there is to
// know comes with the guest, and from the disk when it has stopped there.
func TestNothingIsSentOnTheGuestsNexus(t *testing.T) {
	backend := newTargetLUN(pr.Quirks{})
	backend.do(t, ourNexus, pr.Out{ServiceKey: ourKey})
	backend.do(t, otherNexus, pr.Out{ServiceKey: otherKey})
	p := &passedLUN{targetLUN: backend, shared: true}
	offered := &migration.OfferedLUN{Nexus: ourNexus, Preflight: &pr.Preflight{FullStatus: true, Move: true}}
	l := newLUN(p, LUNConfig{ID: "data", Offered: offered})
	m := empty(Config{Name: "web1", Warn: func(s string) { t.Errorf("warning: %s", s) }})
	if err := m.meet(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	x, err := l.scout(t.Context(), func(*migration.LUN, pr.Key) pr.Ledger {
		t.Error("the destination looks for its nexus")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(backend.cdbs) > 0 {
		t.Errorf("% x was sent", backend.cdbs)
	}
	if x.Nexus != ourNexus || x.BootID != "boot" || x.Address != "2:0:0:0" || x.Preflight == nil || !x.Preflight.FullStatus || !x.Preflight.Move {
		t.Errorf("the destination knows %+v", x)
	}

	for _, tt := range []struct {
		o    pr.Outcome
		want pr.Tracked
	}{
		{pr.Outcome{Kind: pr.Kept, Key: ourKey, Reason: pr.DiskFailed}, pr.Tracked{Key: ourKey, Doubt: true}},
		{pr.Outcome{Kind: pr.FencedMeanwhile}, pr.Tracked{}},
		{pr.Outcome{Kind: pr.Kept, Key: ourKey, Type: pr.WriteExclusive, Persist: true}, pr.Tracked{Key: ourKey, Type: pr.WriteExclusive, Persist: true}},
	} {
		l.settled(tt.o, nil)
		if got := l.tracked.state(); got != tt.want {
			t.Errorf("after %+v the tracker has %+v; want %+v", tt.o, got, tt.want)
		}
	}
	m.luns.Store(&[]*lun{l})
	m.possess()
	if p.shared || p.owner != "web1" {
		t.Errorf("shared %v, its lock says %q; want web1's alone", p.shared, p.owner)
	}
	// From here on it is a LUN like any other: the next move asks the disk, and a
	// failed one leaves what is known.
	if x, err = l.scout(t.Context(), nil); err != nil || x.Nexus != ourNexus || len(backend.cdbs) == 0 {
		t.Errorf("the next move: nexus %v, %v, %d commands; want %v", x.Nexus, err, len(backend.cdbs), ourNexus)
	}
	before := l.tracked.state()
	if l.settled(pr.Outcome{Kind: pr.Kept, Key: ourKey}, nil); l.tracked.state() != before {
		t.Errorf("after a failed move the tracker has %+v; want %+v", l.tracked.state(), before)
	}
}
