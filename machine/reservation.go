package machine

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// lun is one logical unit of the guest. The guest's commands pass, in this
// order, the guard, which refuses what its owner has not allowed, the tracker
// of its reservation, and the door that hands it the unit attentions which
// answered commands of ours. Ours go to shared.Ours.
type lun struct {
	scsi.LUN // the guest's door
	cfg      LUNConfig
	backend  scsi.LUN
	identity *scsi.Identity
	shared   *scsi.Shared
	tracked  *tracked

	turn chan struct{} // holds one token: who has it sends commands of ours
	gone bool          // the guest has it no more; whoever has the token looks
	port pr.Port
	self pr.Nexus // this host's nexus; zero while nobody knows
	// persist is PTPL_A as a migration found it.
	persist bool
}

// newLUN puts the parts together. Nothing is sent.
func newLUN(backend scsi.LUN, c LUNConfig) *lun {
	shared := scsi.Share(backend)
	tracked := &tracked{LUN: shared}
	l := &lun{
		LUN:     &scsi.Guard{LUN: tracked, ReadOnly: c.ReadOnly, AllowUnsafe: c.Unsafe},
		cfg:     c,
		backend: backend,
		shared:  shared,
		tracked: tracked,
		turn:    make(chan struct{}, 1),
		port:    pr.Port{Sender: &pr.LUN{LUN: shared.Ours()}},
	}
	l.turn <- struct{}{}
	return l
}

// identify asks the logical unit who it is, which nothing stops and which
// takes no unit attention away.
func (l *lun) identify(ctx context.Context) (err error) {
	if known, ok := l.backend.(interface{ Identity() *scsi.Identity }); ok {
		l.identity = known.Identity()
		return nil
	}
	l.identity, err = scsi.ReadIdentity(ctx, l.backend)
	return err
}

// learnTimeout bounds what newLUN's caller waits for a disk that does not
// answer. The guest may run without: its reservation is then in doubt.
const learnTimeout = 10 * time.Second

// learn makes the tracker begin with what is on the disk: a guest that is
// started again may have left a registration, and need not register again to
// use it. It is called before the guest has the LUN. The error is a warning.
func (l *lun) learn(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, learnTimeout)
	defer cancel()
	v, err := l.port.View(ctx)
	if pr.Unsupported(err) {
		return nil // nothing to track, and commands that say so to the guest
	}
	var key pr.Key
	if err == nil {
		key, err = l.port.OwnKey(ctx, v)
	}
	if err != nil {
		l.tracked.learn(pr.Tracked{Doubt: true})
		return fmt.Errorf("its reservations could not be read, so they are in doubt until they can: %w", err)
	}
	begin := pr.Tracked{Key: key}
	if key != 0 {
		begin.Persist = v.Capabilities.PersistActive
		at := v.With(pr.Nexus{}, key)
		if at >= 0 {
			l.self = v.Registrations[at].Nexus
		}
		switch t := v.Held.Type; {
		case t.AllRegistrants(), t.Single() && v.Held.Key == key && at >= 0:
			begin.Type = t
		case t.Single() && v.Held.Key == key:
			begin.Doubt = true // another nexus has the key too: which of them holds?
		}
	}
	l.tracked.learn(begin)
	return nil
}

// Reservation is a LUN's reservations as its machine sees them now.
type Reservation struct {
	pr.View
	// Own is the index in Registrations of this machine's, -1 if it has none
	// or nobody can tell.
	Own int
	// OwnUnknown says that one of them may be this machine's although Own is
	// -1: several have the guest's key, or the tracker is in doubt.
	OwnUnknown bool
	// Guest is what the tracker believes of the guest.
	Guest pr.Tracked
}

// reservation reads what is on the disk. A unit attention that this meets is
// kept for the guest.
func (l *lun) reservation(ctx context.Context) (Reservation, error) {
	select {
	case <-l.turn:
	case <-ctx.Done():
		return Reservation{}, context.Cause(ctx)
	}
	defer func() {
		l.port.Seen = l.port.Seen[:0] // the guest has them
		l.turn <- struct{}{}
	}()
	if l.gone {
		return Reservation{}, ErrNoLUN
	}
	before := l.tracked.changes()
	v, err := l.port.View(ctx)
	guest := l.tracked.state()
	if err != nil {
		return Reservation{View: v, Own: -1, Guest: guest}, err
	}
	own := v.With(l.self, guest.Key)
	switch {
	case !v.FullStatus:
	case own >= 0 && !guest.Doubt:
		l.self = v.Registrations[own].Nexus
	case l.self.Initiator != "":
		// The disk says what the tracker could not tell.
		truth := pr.Tracked{Persist: guest.Persist, SPC2: guest.SPC2}
		if own >= 0 {
			truth.Key = v.Registrations[own].Key
			if v.Registrations[own].Holder {
				truth.Type = v.Held.Type
			}
		}
		guest = l.tracked.settle(before, truth)
	}
	unknown := own < 0 && (l.self.Initiator == "" || !v.FullStatus) &&
		slices.ContainsFunc(v.Registrations, func(r pr.Registration) bool { return guest.Doubt || r.Key == guest.Key })
	return Reservation{v, own, unknown, guest}, nil
}

// tracked is a LUN whose guest's reservation is followed. A command that has
// nothing to do with reservations costs it one comparison.
type tracked struct {
	scsi.LUN

	mu      sync.Mutex
	tracker pr.Tracker
	flying  int  // commands that may change the reservation, sent and not back
	overlap bool // there were two of them at one time since flying was 0
	count   uint // of those sent and of those back
	outs    map[ReservationCommand]uint64
	moves   map[string]uint64 // takeovers, by how they ended
}

func (t *tracked) state() pr.Tracked {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tracker.State()
}

func (t *tracked) learn(s pr.Tracked) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tracker.Learn(s)
}

// changes is a number that is the same later if nothing that may change the
// reservation was under way in between.
func (t *tracked) changes() uint {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// settle ends the tracker's doubt with what was read from the disk since
// changes was asked, unless the guest has changed something meanwhile.
func (t *tracked) settle(since uint, truth pr.Tracked) pr.Tracked {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.tracker.State().Doubt && t.flying == 0 && t.count == since {
		t.tracker.Learn(truth)
	}
	return t.tracker.State()
}

// Submit is the guest's door.
func (t *tracked) Submit(c *scsi.Command) {
	if len(c.CDB) == 0 || !pr.Concerns(c.CDB[0]) {
		t.LUN.Submit(c)
		return
	}
	if c.CDB[0] == scsi.OpPersistentReserveIn {
		t.mask(c)
	} else {
		t.follow(c)
	}
}

// mask hides from the guest what could not follow it to another host.
func (t *tracked) mask(c *scsi.Command) {
	done := c.Done
	c.Done = func(c *scsi.Command) {
		c.Done = done
		if c.Outcome == scsi.Completed && c.Status == scsi.Good {
			var head [8]byte // of REPORT CAPABILITIES: all of it (SPC-5 6.15.4)
			n := 0
			for _, b := range c.DataIn {
				n += copy(head[n:], b)
			}
			n = min(n, c.DataLen()-int(c.Residual))
			pr.MaskIn(c.CDB, head[:], n)
			c.Scatter(head[:max(n, 0)])
		}
		done(c)
	}
	t.LUN.Submit(c)
}

// maxList is the longest parameter list of PERSISTENT RESERVE OUT that is
// passed on, in bytes: more than one with the longest iSCSI names needs.
const maxList = 4096

// follow sends a command that may change the guest's reservation, and notes
// what became of it.
func (t *tracked) follow(c *scsi.Command) {
	// The parameter list is in guest memory and may change while it is
	// looked at: what is judged, sent and noted is one copy.
	n := c.DataLen()
	if n > maxList {
		c.Check(scsi.ParameterListLength)
		return
	}
	var list []byte
	if len(c.DataOut) > 0 {
		list = make([]byte, n)
		c.Gather(list)
	}
	t.mu.Lock()
	refusal := t.tracker.Before(c.CDB, list)
	if refusal == nil {
		t.flying++
		t.count++
		t.overlap = t.overlap || t.flying > 1
	}
	t.mu.Unlock()
	if refusal != nil {
		c.Check(refusal.Sense)
		return
	}
	sent := &scsi.Command{CDB: c.CDB, Attr: c.Attr, DataIn: c.DataIn}
	if list != nil {
		sent.DataOut = [][]byte{list}
	}
	sent.Done = func(*scsi.Command) {
		t.note(sent, list)
		c.Outcome, c.Status, c.Residual = sent.Outcome, sent.Status, sent.Residual
		c.Sense, c.SenseLen = sent.Sense, sent.SenseLen
		c.Done(c)
	}
	t.LUN.Submit(sent)
}

// note takes a command's answer down, before the guest learns of it.
func (t *tracked) note(c *scsi.Command, list []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counted(c)
	// A command that a unit attention answers was not carried out (SAM-5
	// 5.14): a guest's first one often is. It says nothing, and leaves no doubt.
	attention := false
	if c.Outcome == scsi.Completed && c.Status == scsi.CheckCondition {
		sense, ok := scsi.ParseSense(c.Sense[:c.SenseLen])
		attention = ok && sense.Key == scsi.UnitAttention
	}
	if !attention {
		t.tracker.After(c.CDB, list, c.Outcome == scsi.Completed, c.Status)
	}
	if t.overlap && !attention {
		// The target carried them out in an order that nobody has seen.
		s := t.tracker.State()
		s.Doubt = true
		t.tracker.Learn(s)
	}
	t.count++
	if t.flying--; t.flying == 0 {
		t.overlap = false
	}
}

// Reset is a LOGICAL UNIT RESET, which ends an SPC-2 reservation.
func (t *tracked) Reset() error {
	err := t.LUN.Reset()
	if err == nil {
		t.mu.Lock()
		t.tracker.LoseNexus()
		t.mu.Unlock()
	}
	return err
}
