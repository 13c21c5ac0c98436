package machine

import (
	"context"
	"errors"
	"fmt"
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

// Ended is closed when the guest runs no more.
func (m *Machine) Ended() <-chan struct{} { return m.ended }

// A request asks Run for something. Run alone moves the gate: a reset of the
// guest and a pause then follow each other in some order, and none opens the
// gate behind the other's back.
type request struct {
	kind requestKind
	done chan struct{} // closed when it is done
}

type requestKind int

const (
	requestPause requestKind = iota
	requestResume
	requestStop
)

// Pause stops the guest's vCPUs and returns when all stand still. Before Run
// has entered the guest it waits for that. Devices finish what they have in
// flight. A machine that is paused already stays so.
//
// An error is ctx's, or ErrEnded: then the guest had powered off, failed, or
// been stopped before it stood.
func (m *Machine) Pause(ctx context.Context) error { return m.ask(ctx, requestPause) }

// Resume lets the vCPUs of a paused machine run on. A machine that runs is
// left alone. The error is ErrEnded.
func (m *Machine) Resume() error { return m.ask(context.Background(), requestResume) }

// Stop ends the guest at once, as if its power cord had been pulled; Run
// returns nil. The error is ErrEnded.
func (m *Machine) Stop() error { return m.ask(context.Background(), requestStop) }

func (m *Machine) ask(ctx context.Context, kind requestKind) error {
	r := request{kind, make(chan struct{})}
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
			case requestResume:
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
	m.state.Store(int32(StatePaused))
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
				m.state.Store(int32(StateRunning))
				m.gate.release()
				close(r.done)
				return false, nil
			case requestPause:
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
	return false, nil
}
