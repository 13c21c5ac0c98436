// Package controltest has a machine without a guest, for tests of those who
// control one.
package controltest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"vmm/machine"
	"vmm/scsi"
	"vmm/scsi/pr"
	"vmm/virtio"
)

// Machine implements control.Machine. It runs from the beginning. Its fields
// are the test's to set before anybody asks.
type Machine struct {
	Name string
	// Button is what the guest does about the power button; nil: nothing.
	Button func()
	// Ask answers for the disks; nil: SomeReservation for all.
	Ask func(id string) (machine.Reservation, error)
	// Feed is what Events gives out.
	Feed chan machine.Event
	// Type takes what is typed at the console; nil: it is printed there.
	Type func(context.Context, []byte) (int, error)

	console *machine.Console
	mu      sync.Mutex
	state   machine.State
	ended   chan struct{}
	luns    []machine.LUNInfo
}

// New makes a machine called name.
func New(name string) *Machine {
	return &Machine{
		Name: name, state: machine.StateRunning, Feed: make(chan machine.Event, 8), ended: make(chan struct{}),
		console: machine.NewConsole(nil, nil),
		luns: []machine.LUNInfo{
			{LUNConfig: machine.LUNConfig{ID: "data", Path: "/dev/sg2", Target: 1}, Passthrough: true, Identity: "naa.6001405"},
			{LUNConfig: machine.LUNConfig{ID: "root", Path: "root.img", ReadOnly: true}, Identity: "uuid.1"},
		},
	}
}

// Info has at first two logical units, data and root.
func (m *Machine) Info() machine.Info {
	state := m.State()
	m.mu.Lock()
	defer m.mu.Unlock()
	return machine.Info{
		Name: m.Name, State: state, CPUs: 2, Memory: 1 << 30, CPU: machine.CPUHost, Started: time.Now().Add(-time.Minute),
		LUNs: slices.Clone(m.luns),
	}
}

// Metrics has something of everything.
func (m *Machine) Metrics() machine.Metrics {
	x := machine.Metrics{Exits: []map[string]uint64{{"io": 3, "mmio": 2}, {"io": 1}}}
	for _, l := range m.Info().LUNs {
		q := virtio.QueueStats{Reads: 5, Writes: 4, Others: 1, ReadBytes: 5 * 4096, WriteBytes: 4 * 512, Conflicts: 1, LatencySum: 3 * time.Millisecond}
		q.Senses[scsi.UnitAttention] = 2
		q.Outcomes[scsi.Completed], q.Outcomes[scsi.Aborted] = 9, 1
		q.Latency[0], q.Latency[2], q.Latency[virtio.LatencyBuckets] = 2, 1, 1
		x.LUNs = append(x.LUNs, machine.LUNMetrics{
			ID: l.ID, Queues: []virtio.QueueStats{q, {}},
			Reservations: map[machine.ReservationCommand]uint64{{Action: "register", Result: "good"}: 1},
			Takeovers:    map[string]uint64{"moved": 1},
		})
	}
	return x
}

// Attach makes a software disk of whatever it is given.
func (m *Machine) Attach(_ context.Context, c machine.LUNConfig) (machine.LUNInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.Target < 0 {
		c.Target = 2
	}
	if c.ID == "" {
		c.ID = fmt.Sprintf("lun%d", c.Target)
	}
	for _, l := range m.luns {
		if l.ID == c.ID || l.Target == c.Target {
			return machine.LUNInfo{}, machine.ErrLUNTaken
		}
	}
	info := machine.LUNInfo{LUNConfig: c, Identity: "uuid.2"}
	m.luns = append(m.luns, info)
	return info, nil
}

// Detach takes a logical unit away. On data the guest is registered.
func (m *Machine) Detach(_ context.Context, id string, _ time.Duration, force bool) (left []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := slices.IndexFunc(m.luns, func(l machine.LUNInfo) bool { return l.ID == id })
	if at < 0 {
		return nil, fmt.Errorf("LUN %q: %w", id, machine.ErrNoLUN)
	}
	if id == "data" {
		left = []string{"the guest is registered with key 0x00000000000000aa"}
		if !force {
			return nil, fmt.Errorf("LUN %s: %s: %w", id, left[0], machine.ErrLUNInUse)
		}
	}
	m.luns = slices.Delete(m.luns, at, at+1)
	return left, nil
}

// State is the machine's state.
func (m *Machine) State() machine.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

func (m *Machine) enter(s machine.State) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == machine.StateEnded {
		return machine.ErrEnded
	}
	if m.state = s; s == machine.StateEnded {
		close(m.ended)
		close(m.Feed)
		m.console.Close()
	}
	return nil
}

// Pause, Resume and Stop change the state.
func (m *Machine) Pause(context.Context) error { return m.enter(machine.StatePaused) }
func (m *Machine) Resume() error               { return m.enter(machine.StateRunning) }
func (m *Machine) Stop() error                 { return m.enter(machine.StateEnded) }

// PowerButton does what Button says.
func (m *Machine) PowerButton() {
	if m.Button != nil {
		m.Button()
	}
}

// Ended is closed by Stop.
func (m *Machine) Ended() <-chan struct{} { return m.ended }

// Events gives out what is sent to Feed.
func (m *Machine) Events() (<-chan machine.Event, func()) { return m.Feed, func() {} }

// Console is empty at first.
func (m *Machine) Console() *machine.Console { return m.console }

// ConsoleInput does what Type says.
func (m *Machine) ConsoleInput(ctx context.Context, p []byte) (int, error) {
	if m.Type != nil {
		return m.Type(ctx, p)
	}
	return m.console.Write(p)
}

// Reservation asks Ask.
func (m *Machine) Reservation(_ context.Context, id string) (machine.Reservation, error) {
	if m.Ask == nil {
		return SomeReservation(), nil
	}
	return m.Ask(id)
}

// SomeReservation is one of two registrants, the guest and another; the guest
// holds.
func SomeReservation() machine.Reservation {
	const typ = pr.WriteExclusiveRegistrantsOnly
	return machine.Reservation{
		View: pr.View{
			Generation: 7, FullStatus: true, Supported: true, Capabilities: pr.Capabilities{PersistActive: true},
			Held: pr.Reservation{Type: typ, Key: 0xaa},
			Registrations: []pr.Registration{
				{Key: 0xbb, Nexus: pr.Nexus{Initiator: pr.SAS(1), TargetPort: 1}},
				{Key: 0xaa, Holder: true, Type: typ, Nexus: pr.Nexus{Initiator: pr.SAS(2), TargetPort: 2}},
			},
		},
		Own: 1, Guest: pr.Tracked{Key: 0xaa, Type: typ},
	}
}

// ErrBroken is a disk that does not answer.
var ErrBroken = errors.New("the disk does not answer")

// Depart refuses: there is no guest.
func (m *Machine) Depart(context.Context) (*machine.Departure, error) {
	return nil, errors.New("a machine without a guest cannot migrate")
}
