package machine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// plug is held by whoever changes the guest's list of logical units, and by
// those for whom it must not change.
type plug chan struct{}

func (p plug) take(ctx context.Context) error {
	select {
	case p <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (p plug) give() { <-p }

// past is what targets of this guest have been since its kernel was entered.
type past struct {
	mu      sync.Mutex
	targets map[int]former
}

// former is a logical unit that a target was.
type former struct {
	identity string
	// told is false if the driver may believe that it still is: it had no
	// buffer for the event, and a scan would find the next one in its place.
	told bool
}

func (p *past) of(target int) (former, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f, ok := p.targets[target]
	return f, ok
}

func (p *past) note(target int, f former) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.targets == nil {
		p.targets = map[int]former{}
	}
	p.targets[target] = f
}

// forget is for a guest that boots anew, and so scans.
func (p *past) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.targets = nil
}

// Errors of Attach and Detach.
var (
	// ErrLUNTaken says that a name or a target is another LUN's.
	ErrLUNTaken = errors.New("it is taken")
	// ErrLUNInUse says that the guest would leave something behind: what it
	// is, the error's text says. Force does it nevertheless.
	ErrLUNInUse = errors.New("take it away all the same with --force")
)

// pluggable says whether LUNs can be attached and detached now. The plug is
// held.
func (m *Machine) pluggable() error {
	switch s := m.State(); {
	case s == StateEnded:
		return ErrEnded
	case s == StateStarting:
		return errors.New("the guest is starting: try again when it runs")
	case m.moving.Load():
		return ErrMoving
	}
	return nil
}

// Attach opens a logical unit, as New does, and gives it to the guest, whose
// driver is told. After an error everything is as it was. The guest's first
// command meets the unit attention of a device that was just switched on.
func (m *Machine) Attach(ctx context.Context, c LUNConfig) (_ LUNInfo, err error) {
	if err := c.Check(); err != nil {
		return LUNInfo{}, fmt.Errorf("LUN %s: %w", c.Path, err)
	}
	if err := m.plug.take(ctx); err != nil {
		return LUNInfo{}, err
	}
	defer m.plug.give()
	if err := m.pluggable(); err != nil {
		return LUNInfo{}, err
	}
	if err := m.place(&c); err != nil {
		return LUNInfo{}, err
	}
	l, err := m.openLUN(c)
	if err != nil {
		return LUNInfo{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.backend.Close())
		}
	}()
	if err := m.meet(ctx, l); err != nil {
		return LUNInfo{}, err
	}
	if was, ok := m.past.of(c.Target); ok && !was.told && was.identity != l.identity.String() {
		return LUNInfo{}, fmt.Errorf("LUN %s: the guest has not heard that target %d is not %s any more and would take one disk for the other: leave target= out, or name one that it has never had",
			c.Path, c.Target, was.identity)
	}
	l.shared.Raise(scsi.PowerOnOccurred)
	if err := m.scsi.Attach(uint8(c.Target), l); err != nil {
		return LUNInfo{}, err
	}
	units := append(slices.Clone(m.units()), l)
	m.luns.Store(&units)
	m.feed.publish(Event{Kind: EventLUN, Text: fmt.Sprintf("LUN %s attached as target %d: %s", c.ID, c.Target, c.Path)})
	return l.info(), nil
}

// place gives a LUN the target and the name that it has not been given, and
// refuses those that are taken.
func (m *Machine) place(c *LUNConfig) error {
	targets, ids := map[int]string{}, map[string]bool{}
	for _, l := range m.units() {
		targets[l.cfg.Target], ids[l.cfg.ID] = l.cfg.ID, true
	}
	if c.Target < 0 {
		// One that the guest has never had: a driver that is slow to hear
		// cannot take it for another.
		free := func(fresh bool) bool {
			for n := range MaxTargets {
				_, had := m.past.of(n)
				if _, has := targets[n]; !has && !(fresh && had) {
					c.Target = n
					return true
				}
			}
			return false
		}
		if !free(true) && !free(false) {
			return fmt.Errorf("LUN %s: the controller has %d targets, and all are taken", c.Path, MaxTargets)
		}
	}
	if c.ID == "" {
		c.ID = fmt.Sprintf("lun%d", c.Target)
	}
	if other, taken := targets[c.Target]; taken {
		return fmt.Errorf("LUN %s: target %d is LUN %s's; give another target=: %w", c.Path, c.Target, other, ErrLUNTaken)
	}
	if ids[c.ID] {
		return fmt.Errorf("LUN %s: the guest has a LUN %s; give another id=: %w", c.Path, c.ID, ErrLUNTaken)
	}
	return nil
}

// DetachTimeout is the time that Detach gives a guest's commands to come back
// and its disk to answer, if nobody gives another.
const DetachTimeout = 10 * time.Second

// Detach takes the logical unit called id away from the guest.
//
// Commands in flight come back first; further ones are put off meanwhile. Then
// the disk is asked whether the guest is registered with it or has reserved
// it. If so Detach refuses: the registration would stay behind on this host's
// nexus, where it keeps others out with nobody to release it, and whoever gets
// the disk on this nexus next inherits it. To remove it would be worse: it is
// the cluster's, and who is fenced is the cluster's to say. All this takes at
// most timeout; a Detach that is refused or too late changes nothing.
//
// force takes the unit away nevertheless; left says what stays behind. A
// command that has not come back then keeps the disk in use on this host.
func (m *Machine) Detach(ctx context.Context, id string, timeout time.Duration, force bool) (left []string, err error) {
	if err := m.plug.take(ctx); err != nil {
		return nil, err
	}
	defer m.plug.give()
	if err := m.pluggable(); err != nil {
		return nil, err
	}
	l, err := m.unit(id)
	if err != nil {
		return nil, err
	}
	inTime, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	target := uint8(l.cfg.Target)
	drained := make(chan struct{})
	back := (<-chan struct{})(drained)
	told, err := m.scsi.Detach(inTime, target, func() error {
		close(drained)
		stays := l.leaves(inTime)
		if stays != "" && !force {
			return fmt.Errorf("LUN %s: %s: %w", id, stays, ErrLUNInUse)
		}
		if stays != "" {
			left = append(left, stays)
		}
		return nil
	})
	if err != nil && force && ctx.Err() == nil && inTime.Err() != nil {
		left = append(left, fmt.Sprintf("not all of its commands came back within %v", timeout))
		if key := l.tracked.state().Key; key != 0 {
			left = append(left, fmt.Sprintf("the guest was registered with key %v", key))
		}
		told, back, err = m.scsi.Remove(target)
	}
	if err != nil {
		return nil, err
	}
	m.luns.Store(new(slices.DeleteFunc(slices.Clone(m.units()), func(x *lun) bool { return x == l })))
	m.past.note(l.cfg.Target, former{l.identity.String(), told})
	m.feed.publish(Event{Kind: EventLUN, Text: fmt.Sprintf("LUN %s detached, which was target %d: %s", id, target, l.cfg.Path)})

	closed := make(chan struct{})
	m.retiring.Go(func() {
		defer close(closed)
		<-back
		if err := l.retire(); err != nil {
			m.cfg.Warn(fmt.Sprintf("LUN %s: %v", l.cfg.Path, err))
		}
	})
	select {
	case <-closed:
	case <-inTime.Done():
		left = append(left, fmt.Sprintf("%s stays in use until its last command has come back", l.cfg.Path))
	}
	return left, nil
}

// leaves says what a guest that loses the LUN now leaves behind on it; empty
// if it is certain that it leaves nothing.
func (l *lun) leaves(ctx context.Context) string {
	r, err := l.reservation(ctx)
	switch {
	case r.Guest.SPC2:
		return "the guest has reserved it with RESERVE"
	case pr.Unsupported(err):
		return ""
	case err != nil:
		return fmt.Sprintf("its reservations could not be read: %v", err)
	case r.OwnUnknown:
		return "one of the registrations on it may be the guest's"
	case r.Own < 0:
		return ""
	}
	own := r.Registrations[r.Own]
	if own.Holder || r.Held.Type.Single() && r.Held.Key == own.Key && !r.FullStatus || r.Held.Type.AllRegistrants() {
		return fmt.Sprintf("the guest holds the %v reservation with key %v", r.Held.Type, own.Key)
	}
	return fmt.Sprintf("the guest is registered with key %v", own.Key)
}

// retire closes a LUN that the guest has no more, when nobody asks it any
// more.
func (l *lun) retire() error {
	<-l.turn
	l.gone = true
	l.turn <- struct{}{}
	return l.backend.Close()
}

// closeLUNs frees the LUNs of a machine that has ended.
func (m *Machine) closeLUNs() error {
	_ = m.plug.take(context.Background()) // an Attach that began before the end; the context is never done
	defer m.plug.give()
	var errs []error
	for _, l := range m.units() {
		errs = append(errs, l.backend.Close())
	}
	m.retiring.Wait()
	return errors.Join(errs...)
}
