// Package reservations holds scsi/pr against the Linux kernel's own SCSI
// target, LIO: the reference target command by command, and the takeover with
// everything that may happen to it, on one logical unit with several real I_T
// nexuses (tests/lab/lio). It runs where root may make such a unit, as in a
// host of tests/lab.
package reservations

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"vmm/scsi"
	"vmm/scsi/pr"
	"vmm/scsi/sg"
	"vmm/tests/lab/lio"
)

// patience bounds one command on a busy emulated host.
const patience = time.Minute

// unit is a logical unit of the kernel's target.
type unit struct {
	*lio.LUN
	nexus []*nexus
}

// nexus is one initiator's way to a unit.
type nexus struct {
	pr.Port
	lun    *sg.LUN
	device lio.Device
	id     pr.Nexus
	name   string
}

// needLIO skips where there is no kernel's target to be had.
func needLIO(t *testing.T) {
	t.Helper()
	err := errors.New("making SCSI devices needs root")
	if os.Getuid() == 0 {
		err = lio.Load()
	}
	if err != nil {
		if os.Getenv("VMM_TEST_REQUIRE_LIO") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// need makes a unit with a nexus for each letter of names.
func need(t *testing.T, names string) *unit {
	t.Helper()
	name := "pr-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-", " ", "-").Replace(t.Name()))
	needLIO(t)
	l, err := lio.Create(t.Context(), lio.Config{Name: name[:min(len(name), 40)], Size: 1 << 20, Nexuses: len(names)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	u := &unit{LUN: l}
	for i, n := range l.Nexuses {
		x := &nexus{device: n.Device, name: names[i : i+1]}
		if err := x.open(t); err != nil {
			t.Fatal(err)
		}
		address, err := strconv.ParseUint(strings.TrimPrefix(n.WWN, "naa."), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		if x.id, err = x.Identify(t.Context(), func(pr.Key) pr.Ledger { return noLedger{} }); err != nil {
			t.Fatal(err)
		}
		if x.id.Initiator != pr.SAS(address) {
			t.Fatalf("nexus %s finds itself as %v; want %v", x.name, x.id, pr.SAS(address))
		}
		u.nexus = append(u.nexus, x)
	}
	return u
}

// open opens the nexus's device as the product does.
func (x *nexus) open(t testing.TB) error {
	l, err := sg.Open(x.device.SG, sg.Options{VM: "reservations", RunDir: t.TempDir()})
	if err != nil {
		return err
	}
	x.lun = l
	t.Cleanup(func() {
		if err := l.Close(); err != nil { // once closed, nothing
			t.Error(err)
		}
	})
	x.Port = pr.Port{Sender: &pr.LUN{LUN: l}, Timeout: patience}
	return x.Drain(context.Background())
}

// close gives the device free, for another process.
func (x *nexus) close(t testing.TB) {
	t.Helper()
	if err := x.lun.Close(); err != nil {
		t.Fatal(err)
	}
}

// noLedger is for what needs no journal.
type noLedger struct{}

func (noLedger) Note(bool) error { return nil }
func (noLedger) Erase() error    { return nil }

// do sends a PERSISTENT RESERVE OUT past pending unit attentions.
func (x *nexus) do(t testing.TB, o pr.Out) pr.Answer {
	t.Helper()
	cdb, list := o.Encode()
	for {
		_, a, err := x.Sender.Send(context.Background(), cdb, list, nil)
		if err != nil {
			t.Fatalf("%s: %v: %v", x.name, o.Action, err)
		}
		if a.Sense.Key != scsi.UnitAttention {
			return a
		}
	}
}

// must is do for what has to work.
func (x *nexus) must(t testing.TB, o pr.Out) {
	t.Helper()
	if a := x.do(t, o); !a.OK() {
		t.Fatalf("%s: %+v: %v", x.name, o, a)
	}
}

// send sends any command once.
func (x *nexus) send(cdb, list, data []byte) (pr.Answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, a, err := x.Sender.Send(ctx, cdb, list, data)
	return a, err
}

// attentions drains a nexus and returns what was pending.
func (x *nexus) attentions(t testing.TB) []scsi.Sense {
	t.Helper()
	x.Seen = nil
	if err := x.Drain(context.Background()); err != nil {
		t.Fatalf("%s: %v", x.name, err)
	}
	seen := x.Seen
	x.Seen = nil
	return seen
}

// reset leaves the unit without registrations, reservations, APTPL and unit
// attentions.
func (u *unit) reset(t testing.TB) {
	t.Helper()
	for _, x := range u.nexus {
		for {
			a, err := x.send([]byte{scsi.OpRelease6, 0, 0, 0, 0, 0}, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if a.Sense.Key != scsi.UnitAttention {
				break // a conflict is registrations'
			}
		}
	}
	// APTPL is what the last REGISTER said.
	u.nexus[0].must(t, pr.Out{Action: pr.RegisterAndIgnoreExistingKey, ServiceKey: 1})
	u.nexus[0].must(t, pr.Out{Action: pr.Clear, Key: 1})
	for _, x := range u.nexus {
		x.attentions(t)
	}
	f := u.status(t)
	if len(f.Registrations) != 0 {
		t.Fatalf("after CLEAR: %+v", f)
	}
}

// status is READ FULL STATUS through the last nexus.
func (u *unit) status(t testing.TB) pr.FullStatus {
	t.Helper()
	f, err := u.nexus[len(u.nexus)-1].FullStatus(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// show is everything that can be read of the unit in a line: each
// registration, holders with a star, the type, and APTPL.
func (u *unit) show(t testing.TB) string {
	t.Helper()
	ctx := context.Background()
	last := u.nexus[len(u.nexus)-1]
	f := u.status(t)
	r, err1 := last.Reservation(ctx)
	c, err2 := last.Capabilities(ctx)
	k, err3 := last.Keys(ctx)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	if len(k.Keys) != len(f.Registrations) || f.Generation != k.Generation || f.Generation != r.Generation {
		t.Errorf("READ KEYS %+v, READ RESERVATION %+v, READ FULL STATUS %+v do not agree", k, r, f)
	}
	var b strings.Builder
	known := 0
	for _, x := range u.nexus {
		for _, reg := range f.Registrations {
			if reg.Nexus != x.id {
				continue
			}
			known++
			fmt.Fprintf(&b, "%s:%x", x.name, uint64(reg.Key))
			if reg.Holder {
				b.WriteByte('*')
			}
			b.WriteByte(' ')
		}
	}
	if known != len(f.Registrations) {
		t.Errorf("READ FULL STATUS shows a nexus that nobody has: %+v", f)
	}
	fmt.Fprintf(&b, "type %d", r.Type)
	if c.PersistActive {
		b.WriteString(" aptpl")
	}
	return b.String()
}
