package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"vmm/scsi"
	"vmm/scsi/disk"
	"vmm/scsi/pr"
	"vmm/scsi/scsitest"
)

// targetLUN is one nexus's way to a reference target, as a LUN.
type targetLUN struct {
	scsitest.Null
	mu     *sync.Mutex
	target *pr.Target
	nexus  pr.Nexus
	cdbs   [][]byte // that arrived
}

func (l *targetLUN) Submit(c *scsi.Command) {
	l.mu.Lock()
	l.cdbs = append(l.cdbs, c.CDB)
	list := make([]byte, c.DataLen())
	data, a := l.target.Execute(l.nexus, c.CDB, list[:c.Gather(list)])
	l.mu.Unlock()
	switch a.Status {
	case scsi.Good:
		n := c.Scatter(data)
		if len(c.DataOut) > 0 {
			n = c.DataLen()
		}
		c.Finish(n)
	case scsi.ReservationConflict:
		c.Conflict()
	default:
		c.Check(a.Sense)
	}
}

func (l *targetLUN) Reset() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.target.LoseNexus(l.nexus)
	return nil
}

var (
	ourNexus   = pr.Nexus{Initiator: pr.SAS(1), TargetPort: 1}
	otherNexus = pr.Nexus{Initiator: pr.SAS(2), TargetPort: 2}
)

const ourKey, otherKey pr.Key = 0xaa, 0xbb

func newTargetLUN(q pr.Quirks) *targetLUN {
	l := &targetLUN{mu: new(sync.Mutex), target: pr.NewTarget(q), nexus: ourNexus}
	l.target.Key(ourNexus) // known to the target from here on
	l.target.Key(otherNexus)
	return l
}

// do is the other node's PERSISTENT RESERVE OUT.
func (l *targetLUN) do(t *testing.T, n pr.Nexus, o pr.Out) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if a := l.target.Do(n, &o); !a.OK() {
		t.Fatalf("%v of %v: %v", o.Action, n, a)
	}
}

// guestOut is the guest's PERSISTENT RESERVE OUT, in pieces as a guest may
// have it.
func guestOut(t *testing.T, l scsi.LUN, o pr.Out) error {
	t.Helper()
	cdb, list := o.Encode()
	c := &scsi.Command{CDB: cdb, DataOut: [][]byte{list[:3], list[3:20], list[20:]}}
	if err := scsi.Exec(t.Context(), l, c); err != nil {
		t.Fatal(err)
	}
	return c.Err()
}

func TestGuestReservationIsTracked(t *testing.T) {
	for _, q := range pr.Targets {
		backend := newTargetLUN(q)
		l := newLUN(backend, LUNConfig{})
		if err := l.learn(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, step := range []struct {
			out  pr.Out
			want pr.Tracked
		}{
			{pr.Out{Action: pr.Register, ServiceKey: ourKey}, pr.Tracked{Key: ourKey}},
			{pr.Out{Action: pr.Register, ServiceKey: otherKey}, pr.Tracked{Key: ourKey}}, // a conflict: registered already
			{pr.Out{Action: pr.Reserve, Key: ourKey, Type: pr.WriteExclusive}, pr.Tracked{Key: ourKey, Type: pr.WriteExclusive}},
			{pr.Out{Action: pr.Register, Key: ourKey}, pr.Tracked{}},
		} {
			_ = guestOut(t, l, step.out) // what it says, the table does
			if got := l.tracked.state(); got != step.want {
				t.Errorf("%s: after %v: tracker has %+v; want %+v", q.Name, step.out.Action, got, step.want)
			}
		}
	}
}

// A guest that is started again begins with what it left on the disk.
func TestTrackerBeginsWithTheDisk(t *testing.T) {
	for _, q := range pr.Targets {
		for _, test := range []struct {
			name  string
			left  func(b *targetLUN)
			want  pr.Tracked
			doubt bool
		}{
			{"nothing", func(b *targetLUN) {}, pr.Tracked{}, false},
			{"another node's", func(b *targetLUN) {
				b.do(t, otherNexus, pr.Out{Action: pr.Register, ServiceKey: otherKey})
				b.do(t, otherNexus, pr.Out{Action: pr.Reserve, Key: otherKey, Type: pr.ExclusiveAccess})
			}, pr.Tracked{}, false},
			{"a reservation", func(b *targetLUN) {
				b.do(t, otherNexus, pr.Out{Action: pr.Register, ServiceKey: otherKey})
				b.do(t, ourNexus, pr.Out{Action: pr.Register, ServiceKey: ourKey})
				b.do(t, ourNexus, pr.Out{Action: pr.Reserve, Key: ourKey, Type: pr.WriteExclusiveRegistrantsOnly})
			}, pr.Tracked{Key: ourKey, Type: pr.WriteExclusiveRegistrantsOnly}, false},
			{"one of all registrants", func(b *targetLUN) {
				b.do(t, otherNexus, pr.Out{Action: pr.Register, ServiceKey: otherKey})
				b.do(t, ourNexus, pr.Out{Action: pr.Register, ServiceKey: ourKey})
				b.do(t, otherNexus, pr.Out{Action: pr.Reserve, Key: otherKey, Type: pr.WriteExclusiveAllRegistrants})
			}, pr.Tracked{Key: ourKey, Type: pr.WriteExclusiveAllRegistrants}, false},
			{"a shared key that holds", func(b *targetLUN) {
				b.do(t, otherNexus, pr.Out{Action: pr.Register, ServiceKey: ourKey})
				b.do(t, ourNexus, pr.Out{Action: pr.Register, ServiceKey: ourKey})
				b.do(t, otherNexus, pr.Out{Action: pr.Reserve, Key: ourKey, Type: pr.WriteExclusive})
			}, pr.Tracked{Key: ourKey}, true},
		} {
			backend := newTargetLUN(q)
			test.left(backend)
			l := newLUN(backend, LUNConfig{})
			if err := l.learn(t.Context()); err != nil {
				t.Fatal(err)
			}
			test.want.Doubt = test.doubt
			if got := l.tracked.state(); got != test.want {
				t.Errorf("%s, %s: tracker has %+v; want %+v", q.Name, test.name, got, test.want)
			}
			if k := backend.target.Key(ourNexus); k != test.want.Key {
				t.Errorf("%s, %s: learning left key %v registered", q.Name, test.name, k)
			}
		}
	}
}

func TestDiskThatDoesNotAnswerIsInDoubt(t *testing.T) {
	l := newLUN(scsitest.NewHeld(8), LUNConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.learn(ctx); !errors.Is(err, context.Canceled) || !l.tracked.state().Doubt {
		t.Errorf("learn() = %v, tracker has %+v; want an error and doubt", err, l.tracked.state())
	}
	l = newLUN(scsitest.NewDisk(8), LUNConfig{})
	if err := l.learn(t.Context()); err != nil || l.tracked.state() != (pr.Tracked{}) {
		t.Errorf("a disk without reservations: learn() = %v, tracker has %+v", err, l.tracked.state())
	}
}

// The guest sees neither of the two capabilities that could not follow it to
// another host, and is told what a target without them tells.
func TestCapabilitiesAreMasked(t *testing.T) {
	backend := newTargetLUN(pr.Quirks{})
	l := newLUN(backend, LUNConfig{})
	want := backend.target.Capabilities()
	if !want.SpecifyPorts || !want.AllTargetPorts {
		t.Fatal("the reference target has neither capability: this test tests nothing")
	}
	want.SpecifyPorts, want.AllTargetPorts = false, false
	for _, alloc := range []int{0, 1, 2, 3, 8, 100} {
		pieces := make([][]byte, alloc)
		for i := range pieces {
			pieces[i] = []byte{0xee}
		}
		c := &scsi.Command{CDB: pr.In{Action: pr.ReportCapabilities, Alloc: uint16(alloc)}.CDB(), DataIn: pieces}
		if err := scsi.Exec(t.Context(), l, c); err != nil || c.Err() != nil {
			t.Fatal(err, c.Err())
		}
		got := make([]byte, 0, alloc)
		for _, p := range pieces {
			got = append(got, p...)
		}
		full := want.Append(nil)
		for i, b := range got {
			expect := byte(0xee) // beyond what was transferred
			if i < len(full) {
				expect = full[i]
			}
			if b != expect {
				t.Errorf("allocation length %d: byte %d is %#02x; want %#02x", alloc, i, b, expect)
			}
		}
	}

	sent := len(backend.cdbs)
	for _, o := range []pr.Out{
		{Action: pr.Register, ServiceKey: ourKey, AllTargetPorts: true},
		{Action: pr.Register, ServiceKey: ourKey, SpecifyPorts: true, Ports: []pr.TransportID{pr.SAS(7)}},
	} {
		var e *scsi.CommandError
		if err := guestOut(t, l, o); !errors.As(err, &e) || e.Sense != scsi.InvalidFieldInList {
			t.Errorf("%+v: %v; want sense %v", o, err, scsi.InvalidFieldInList)
		}
	}
	cdb, _ := pr.Out{Action: pr.Register}.Encode()
	long := &scsi.Command{CDB: cdb, DataOut: [][]byte{make([]byte, maxList+1)}}
	if err := scsi.Exec(t.Context(), l, long); err != nil {
		t.Fatal(err)
	}
	if got, _ := scsi.ParseSense(long.Sense[:long.SenseLen]); got != scsi.ParameterListLength {
		t.Errorf("a list of %d bytes: %v; want sense %v", maxList+1, long.Err(), scsi.ParameterListLength)
	}
	if len(backend.cdbs) != sent {
		t.Error("a refused command was sent")
	}
}

// The guest changes its parameter list while the command is under way: what
// was judged is what is sent, and what is noted.
func TestParameterListIsCopiedOnce(t *testing.T) {
	backend := scsitest.NewHeld(8)
	l := newLUN(backend, LUNConfig{})
	cdb, list := pr.Out{Action: pr.Register, ServiceKey: ourKey}.Encode()
	done := make(chan struct{})
	c := &scsi.Command{CDB: cdb, DataOut: [][]byte{list}, Done: func(*scsi.Command) { close(done) }}
	l.Submit(c)
	list[20] = 0xc  // ALL_TG_PT and SPEC_I_PT, refused had they been there before
	list[15] = 0x77 // another key
	sent := <-backend.Commands
	got := make([]byte, 24)
	if sent.Gather(got); got[20] != 0 || got[15] != byte(ourKey) {
		t.Errorf("the target got % x", got)
	}
	sent.Finish(24)
	<-done
	if got := l.tracked.state(); got != (pr.Tracked{Key: ourKey}) || c.Err() != nil || c.Residual != 0 {
		t.Errorf("tracker has %+v; command %v, residual %d", got, c.Err(), c.Residual)
	}
}

// Of two commands under way at the same time nobody knows which came first.
func TestOverlappingCommandsAreInDoubt(t *testing.T) {
	backend := scsitest.NewHeld(8)
	l := newLUN(backend, LUNConfig{})
	var wait sync.WaitGroup
	for _, k := range []pr.Key{ourKey, otherKey} {
		cdb, list := pr.Out{Action: pr.RegisterAndIgnoreExistingKey, ServiceKey: k}.Encode()
		wait.Add(1)
		l.Submit(&scsi.Command{CDB: cdb, DataOut: [][]byte{list}, Done: func(*scsi.Command) { wait.Done() }})
	}
	first, second := <-backend.Commands, <-backend.Commands
	second.Finish(24)
	first.Finish(24)
	wait.Wait()
	if !l.tracked.state().Doubt {
		t.Errorf("tracker has %+v; want doubt", l.tracked.state())
	}
	l.tracked.learn(pr.Tracked{})
	cdb, list := pr.Out{Action: pr.Register, ServiceKey: ourKey}.Encode()
	l.Submit(&scsi.Command{CDB: cdb, DataOut: [][]byte{list}, Done: func(*scsi.Command) {}})
	(<-backend.Commands).Finish(24)
	if l.tracked.state().Doubt {
		t.Error("a command on its own is in doubt")
	}
}

// Asking for the reservation while the guest runs shows the truth, and takes
// no unit attention from the guest.
func TestReservationWhileTheGuestRuns(t *testing.T) {
	for _, q := range pr.Targets {
		backend := newTargetLUN(q)
		l := newLUN(backend, LUNConfig{})
		if err := guestOut(t, l, pr.Out{Action: pr.Register, ServiceKey: ourKey}); err != nil {
			t.Fatal(err)
		}
		backend.do(t, otherNexus, pr.Out{Action: pr.Register, ServiceKey: otherKey})
		r, err := l.reservation(t.Context())
		if err != nil || r.Own < 0 || r.Registrations[r.Own].Key != ourKey || len(r.Registrations) != 2 || r.Guest != (pr.Tracked{Key: ourKey}) {
			t.Fatalf("%s: reservation() = %+v, %v", q.Name, r, err)
		}

		// With two of the guest's key it takes the nexus to tell them apart.
		backend.do(t, otherNexus, pr.Out{Action: pr.Register, Key: otherKey, ServiceKey: ourKey})
		r, err = l.reservation(t.Context())
		if known := !q.NoFullStatus; err != nil || r.OwnUnknown == known || (r.Own >= 0) != known {
			t.Errorf("%s: a shared key: reservation() = %+v, %v", q.Name, r, err)
		}
		backend.do(t, otherNexus, pr.Out{Action: pr.Register, Key: ourKey, ServiceKey: otherKey})

		// A preemption by the guest leaves the tracker in doubt; the disk
		// settles it, where it tells nexuses apart.
		if err := guestOut(t, l, pr.Out{Action: pr.Reserve, Key: ourKey, Type: pr.WriteExclusive}); err != nil {
			t.Fatal(err)
		}
		if err := guestOut(t, l, pr.Out{Action: pr.Preempt, Key: ourKey, ServiceKey: ourKey, Type: pr.ExclusiveAccess}); err != nil {
			t.Fatal(err)
		}
		if r, err = l.reservation(t.Context()); err != nil || r.Guest.Doubt != q.NoFullStatus {
			t.Errorf("%s: after PREEMPT: %+v, %v", q.Name, r, err)
		}
		if want := (pr.Tracked{Key: ourKey, Type: pr.ExclusiveAccess}); !q.NoFullStatus && r.Guest != want {
			t.Errorf("%s: after PREEMPT: tracker has %+v; want %+v", q.Name, r.Guest, want)
		}

		backend.do(t, otherNexus, pr.Out{Action: pr.Preempt, Key: otherKey, ServiceKey: ourKey, Type: pr.WriteExclusive})
		if r, err = l.reservation(t.Context()); err != nil || r.Own != -1 || len(r.Registrations) != 1 {
			t.Errorf("%s: fenced: reservation() = %+v, %v", q.Name, r, err)
		}
		// Twice the same question: the attention is kept once.
		if _, err = l.reservation(t.Context()); err != nil {
			t.Error(err)
		}
		for i, want := range []bool{true, false} {
			c := &scsi.Command{CDB: make([]byte, 6)}
			if err := scsi.Exec(t.Context(), l, c); err != nil {
				t.Fatal(err)
			}
			sense, _ := scsi.ParseSense(c.Sense[:c.SenseLen])
			if got := c.Status == scsi.CheckCondition && sense.Key == scsi.UnitAttention && sense.ASC == 0x2a; got != want {
				t.Errorf("%s: the guest's command %d: %v", q.Name, i, c.Err())
			}
		}
	}
}

// On a software disk, through its bytes on the medium: a guest that is killed
// leaves its reservation, and the next one of that name finds it.
func TestSoftwareDiskReservationOutlivesTheMachine(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	openAs := func(name string) *lun {
		t.Helper()
		backend, err := disk.Open(image, disk.Options{Initiator: name})
		if err != nil {
			t.Fatal(err)
		}
		l := newLUN(backend, LUNConfig{})
		if err := errors.Join(l.identify(t.Context()), l.learn(t.Context())); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	first := openAs("host1:web1")
	held := pr.Tracked{Key: ourKey, Type: pr.WriteExclusiveRegistrantsOnly}
	for _, o := range []pr.Out{{Action: pr.Register, ServiceKey: ourKey}, {Action: pr.Reserve, Key: ourKey, Type: held.Type}} {
		var e *scsi.CommandError
		err := guestOut(t, first, o)
		if errors.As(err, &e) && e.Sense.Key == scsi.UnitAttention { // that of power on, kept from learning
			err = guestOut(t, first, o)
		}
		if err != nil {
			t.Fatalf("%v: %v", o.Action, err)
		}
	}
	if r, err := first.reservation(t.Context()); err != nil || r.Own != 0 || r.Guest != held {
		t.Errorf("reservation() = %+v, %v", r, err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if got := openAs("host1:web1").tracked.state(); got.Key != held.Key || got.Type != held.Type || got.Doubt {
		t.Errorf("started again: tracker has %+v; want %+v", got, held)
	}
	if got := openAs("host1:web2").tracked.state(); got != (pr.Tracked{}) {
		t.Errorf("another guest: tracker has %+v; want nothing", got)
	}
}

func TestResetEndsSPC2Reservation(t *testing.T) {
	l := newLUN(newTargetLUN(pr.Quirks{}), LUNConfig{})
	c := &scsi.Command{CDB: []byte{scsi.OpReserve6, 0, 0, 0, 0, 0}}
	if err := scsi.Exec(t.Context(), l, c); err != nil || c.Err() != nil {
		t.Fatal(err, c.Err())
	}
	if !l.tracked.state().SPC2 {
		t.Error("RESERVE was not tracked")
	}
	if err := l.Reset(); err != nil {
		t.Fatal(err)
	}
	if l.tracked.state().SPC2 {
		t.Error("the reservation outlives a LOGICAL UNIT RESET")
	}
}

func ioCommand(n int) *scsi.Command {
	return &scsi.Command{
		CDB:    []byte{scsi.OpRead10, 0, 0, 0, 0, 0, 0, 0, 8, 0},
		DataIn: [][]byte{make([]byte, n)},
		Done:   func(*scsi.Command) {},
	}
}

// Commands that have nothing to do with reservations pay next to nothing.
func TestStackAllocatesNothing(t *testing.T) {
	for _, c := range []LUNConfig{{}, {ReadOnly: true}, {Unsafe: true}} {
		l, cmd := newLUN(scsitest.Null{}, c), ioCommand(4096)
		if n := testing.AllocsPerRun(100, func() { l.Submit(cmd) }); n != 0 {
			t.Errorf("%+v: a READ through the stack allocates %v times; want 0", c, n)
		}
	}
}

func BenchmarkStack(b *testing.B) {
	for _, through := range []bool{false, true} {
		b.Run(fmt.Sprintf("stack=%v", through), func(b *testing.B) {
			var l scsi.LUN = scsitest.Null{}
			if through {
				l = newLUN(l, LUNConfig{})
			}
			c := ioCommand(4096)
			for b.Loop() {
				l.Submit(c)
			}
		})
	}
}
