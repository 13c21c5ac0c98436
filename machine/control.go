package machine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"vmm/scsi/sg"
)

// State is what a machine does at the moment.
type State int32

const (
	StateStarting State = iota // Run has not entered the guest yet
	StateRunning
	StatePaused // the vCPUs stand still, each at the end of an instruction
	StateEnded  // Run has returned, or is about to
)

func (s State) String() string {
	names := [...]string{"starting", "running", "paused", "ended"}
	if s >= 0 && int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("state %d", int32(s))
}

// ErrEnded says that the machine's guest runs no more.
var ErrEnded = errors.New("the guest has ended")

// State is what the machine does at the moment. It may have changed by the
// time it is looked at.
func (m *Machine) State() State { return State(m.state.Load()) }

// enterState makes s the state, and tells who wants to know.
func (m *Machine) enterState(s State, why string) {
	m.state.Store(int32(s))
	m.feed.publish(Event{Kind: EventState, State: s, Text: why})
}

// Info is what a machine is: what it was made of, and since when it runs.
type Info struct {
	Name    string
	State   State
	CPUs    int
	Memory  uint64 // bytes
	CPU     CPUModel
	Started time.Time // when the guest first ran; zero before
	LUNs    []LUNInfo
}

// LUNInfo is what one logical unit of a machine is.
type LUNInfo struct {
	LUNConfig
	Passthrough bool   // a device of the host, else a software disk
	Identity    string // the best name that it gives itself
}

// Info is what the machine is at the moment. No disk is asked.
func (m *Machine) Info() Info {
	i := Info{Name: m.cfg.Name, State: m.State(), CPUs: m.cfg.CPUs, Memory: m.cfg.Memory, CPU: m.cfg.CPU}
	if t := m.started.Load(); t != nil {
		i.Started = *t
	}
	for _, l := range m.units() {
		i.LUNs = append(i.LUNs, l.info())
	}
	return i
}

func (l *lun) info() LUNInfo {
	_, passthrough := l.backend.(*sg.LUN)
	c := l.cfg
	if abs, err := filepath.Abs(c.Path); err == nil {
		c.Path = abs // who asks is in another directory
	}
	return LUNInfo{c, passthrough, l.identity.String()}
}

// Reservation asks the logical unit called id for its reservations, through
// the machine's own nexus. A unit attention that the question meets is kept
// for the guest. An error for which pr.Unsupported holds says that the unit
// has no persistent reservations.
func (m *Machine) Reservation(ctx context.Context, id string) (Reservation, error) {
	l, err := m.unit(id)
	if err != nil {
		return Reservation{}, err
	}
	return l.reservation(ctx)
}

// ErrNoLUN says that a machine has no logical unit of a name.
var ErrNoLUN = errors.New("there is no such LUN")

// unit is the logical unit called id.
func (m *Machine) unit(id string) (*lun, error) {
	for _, l := range m.units() {
		if l.cfg.ID == id {
			return l, nil
		}
	}
	return nil, fmt.Errorf("guest %s has no LUN %q; vmm lun list %[1]s shows those it has: %[3]w", m.cfg.Name, id, ErrNoLUN)
}

// Ended is closed when the guest runs no more.
func (m *Machine) Ended() <-chan struct{} { return m.ended }

// A request asks Run for something. Run alone moves the gate: a reset of the
// guest and a pause then follow each other in some order, and none opens the
// gate behind the other's back.
type request struct {
	kind requestKind
	do   func()        // for requestDo
	done chan struct{} // closed when it is done
}

type requestKind int

const (
	requestPause requestKind = iota
	requestResume
	requestStop
	requestDo  // do something while the machine is paused, if it is
	requestNap // do something that keeps the vCPUs from running meanwhile
)

// Pause stops the guest's vCPUs and returns when all stand still. Before Run
// has entered the guest it waits for that. Devices finish what they have in
// flight. A machine that is paused already stays so.
//
// An error is ctx's, or ErrEnded: then the guest had powered off, failed, or
// been stopped before it stood.
func (m *Machine) Pause(ctx context.Context) error { return m.ask(ctx, requestPause, nil) }

// ErrMoving says that a machine is paused because its guest is on its way to
// another host, or has arrived there: only who moves it may let it run here.
var ErrMoving = errors.New("the guest is moving to another host: it cannot be resumed here unless that fails")

// Resume lets the vCPUs of a paused machine run on. A machine that runs is
// left alone. The error is ErrEnded or ErrMoving.
func (m *Machine) Resume() error {
	err := m.ask(context.Background(), requestResume, nil)
	if err == nil && m.moving.Load() {
		return ErrMoving
	}
	return err
}

// Stop ends the guest at once, as if its power cord had been pulled; Run
// returns nil. The error is ErrEnded.
func (m *Machine) Stop() error { return m.ask(context.Background(), requestStop, nil) }

// ErrNotPaused says that a machine runs that would have to be paused.
var ErrNotPaused = errors.New("the guest is not paused")

// whilePaused calls do if the machine is paused, and it stays so meanwhile.
func (m *Machine) whilePaused(ctx context.Context, do func() error) error {
	err := ErrNotPaused
	if refused := m.ask(ctx, requestDo, func() { err = do() }); refused != nil {
		return refused
	}
	return err
}

func (m *Machine) ask(ctx context.Context, kind requestKind, do func()) error {
	r := request{kind, do, make(chan struct{})}
	select {
	case m.requests <- r:
	case <-m.ended:
		return ErrEnded
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// Run answers every request that it has taken, or ends.
	select {
	case <-r.done:
		return nil
	case <-m.ended:
	}
	select {
	case <-r.done: // it was this request that ended the machine
		return nil
	default:
		return ErrEnded
	}
}

// serve is Run's loop: what happens to the guest while it is there. It returns
// when the guest has ended, with Run's result.
func (m *Machine) serve(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-m.events:
			m.gate.hold()
			if over, err := m.settle(&e); over {
				return err
			}
			m.gate.release()
		case r := <-m.requests:
			switch r.kind {
			case requestStop:
				close(r.done)
				return nil
			case requestPause:
				if over, err := m.pause(ctx, r); over {
					return err
				}
			case requestNap:
				m.gate.hold()
				if over, err := m.settle(nil); over {
					return err
				}
				r.do()
				m.gate.release()
				close(r.done)
			case requestResume:
				if !m.moving.Load() { // its interrupts are held back if Departure.Pause has failed
					m.pci.ConnectInterrupts()
				}
				close(r.done)
			case requestDo:
				close(r.done)
			}
		}
	}
}

// pause holds the vCPUs until somebody resumes or stops the machine; over says
// that the guest has ended, with err as Run's result.
func (m *Machine) pause(ctx context.Context, r request) (over bool, err error) {
	m.gate.hold()
	// A vCPU may have had something to say before it stood. From here on none
	// says anything: events come from vCPUs alone.
	if over, err := m.settle(nil); over {
		return true, err
	}
	m.enterState(StatePaused, "")
	close(r.done)
	for {
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case r := <-m.requests:
			switch r.kind {
			case requestStop:
				close(r.done)
				return true, nil
			case requestResume:
				if m.moving.Load() { // a second guest would run on the same disks
					close(r.done)
					continue
				}
				m.wake()
				m.enterState(StateRunning, "")
				m.gate.release()
				close(r.done)
				return false, nil
			case requestDo:
				r.do()
				close(r.done)
			case requestPause, requestNap: // they stand
				close(r.done)
			}
		}
	}
}

// settle acts on the event e, if any, and on one that another vCPU posted
// before it stood; all vCPUs stand. A failure outweighs what came before it.
// over says that the guest has ended, with err as Run's result.
func (m *Machine) settle(e *event) (over bool, err error) {
	select {
	case last := <-m.events:
		if e == nil || last.kind == eventFailed {
			e = &last
		}
	default:
	}
	switch {
	case e == nil:
		return false, nil
	case e.kind == eventPowerOff, e.kind == eventReset && m.cfg.NoReboot:
		return true, nil
	case e.kind == eventFailed:
		return true, e.err
	}
	if err := m.reset(); err != nil {
		return true, fmt.Errorf("reset the guest: %w", err)
	}
	m.feed.publish(Event{Kind: EventReset, Text: "the guest reset itself"})
	return false, nil
}
