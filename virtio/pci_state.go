package virtio

import (
	"context"
	"errors"
	"fmt"
)

// Quiesce makes the device rest: it takes no request and touches no guest
// memory until Resume. Requests in flight and a reset that is going on are
// waited for, as long as ctx allows; after an error the device works on. The
// vCPUs stand still.
func (t *PCI) Quiesce(ctx context.Context) error {
	if !t.lockWithin(ctx) {
		return fmt.Errorf("%s: its reset waits for requests in flight: %w", t.cfg.Name, context.Cause(ctx))
	}
	defer t.mu.Unlock()
	if t.life != lifeRunning {
		return nil
	}
	var err error
	t.call(func() {
		if err = t.dev.Quiesce(ctx); err != nil {
			t.dev.Resume()
		}
	})
	if err == nil {
		t.life = lifeQuiesced
	}
	return err
}

// Resume ends Quiesce. After SetState it starts the device, kicks every queue
// and raises every vector once: what was on its way when the state was saved
// may be lost, and a spurious one is harmless.
func (t *PCI) Resume() {
	t.lock()
	defer t.mu.Unlock()
	switch t.life {
	case lifeQuiesced:
		t.life = lifeRunning
		t.call(t.dev.Resume)
	case lifeLoaded:
		t.startDevice()
		vectors := map[uint16]bool{t.configVector: true}
		for i := range t.queues {
			if t.queues[i].live != nil {
				t.queues[i].live.Kick()
				vectors[uint16(t.queues[i].vector.Load())] = true
			}
		}
		for v := range vectors {
			if t.msix.Unmasked(v) {
				t.msix.Signal(v)
			}
		}
	}
}

// PCIState is a transport as plain values for migration. What is in the
// function's configuration space and its MSI-X table is in the bus's state.
type PCIState struct {
	Status            uint8
	ISR               uint8
	Generation        uint8
	ConfigVector      uint16 // 0xffff: none
	QueueSelect       uint16
	OfferedSelect     uint32
	AcceptedSelect    uint32
	Accepted          uint64 // features
	AcceptedUndefined bool
	Queues            []PCIQueueState
}

// PCIQueueState is a queue with what the transport knows of it.
type PCIQueueState struct {
	Enabled bool
	Vector  uint16 // 0xffff: none
	Queue   QueueState
}

// State reads the transport. The device rests: see Quiesce.
func (t *PCI) State() (PCIState, error) {
	t.lock()
	defer t.mu.Unlock()
	if t.life == lifeRunning {
		return PCIState{}, fmt.Errorf("%s: state of a running device: it must be quiesced", t.cfg.Name)
	}
	s := PCIState{
		Status: t.status, ISR: uint8(t.isr.Load()), Generation: t.generation,
		ConfigVector: t.configVector, QueueSelect: t.queueSelect,
		OfferedSelect: t.offeredSelect, AcceptedSelect: t.acceptedSelect,
		Accepted: t.accepted, AcceptedUndefined: t.acceptedUndefined,
		Queues: make([]PCIQueueState, len(t.queues)),
	}
	for i := range t.queues {
		q := &t.queues[i]
		s.Queues[i] = PCIQueueState{Enabled: q.enabled, Vector: uint16(q.vector.Load()), Queue: q.regs}
		if q.live != nil {
			s.Queues[i].Queue = q.live.State()
		}
	}
	return s, nil
}

// SetState makes a transport whose device is not started what s says. s is
// not trusted; on an error nothing has changed. The device is started by
// Resume, not before: until then no guest memory is touched.
func (t *PCI) SetState(s PCIState) error {
	t.lock()
	defer t.mu.Unlock()
	if t.life != lifeIdle {
		return fmt.Errorf("%s: state for a device that is in use", t.cfg.Name)
	}
	queues, err := t.check(s)
	if err != nil {
		return fmt.Errorf("%s: state: %w", t.cfg.Name, err)
	}
	t.status, t.generation, t.configVector = s.Status, s.Generation, s.ConfigVector
	t.queueSelect, t.offeredSelect, t.acceptedSelect = s.QueueSelect, s.OfferedSelect, s.AcceptedSelect
	t.accepted, t.acceptedUndefined = s.Accepted, s.AcceptedUndefined
	t.isr.Store(uint32(s.ISR))
	for i, qs := range s.Queues {
		q := &t.queues[i]
		q.enabled, q.regs, q.live = qs.Enabled, qs.Queue, queues[i]
		q.vector.Store(uint32(qs.Vector))
	}
	switch {
	case s.Status&statusNeedsReset != 0:
		t.life = lifeBroken
	case s.Status&statusDriverOK != 0:
		t.life = lifeLoaded
	}
	return nil
}

// check answers the live queues of a state, or what is wrong with it.
func (t *PCI) check(s PCIState) ([]*Queue, error) {
	queues := make([]*Queue, len(t.queues))
	switch unknown := s.Accepted &^ t.offered; {
	case len(s.Queues) != len(t.queues):
		return nil, fmt.Errorf("%d queues; this device has %d", len(s.Queues), len(t.queues))
	case s.Status&^(statusDrivers|statusNeedsReset) != 0:
		return nil, fmt.Errorf("device status %#x has unknown bits", s.Status)
	case s.ISR&^(isrQueue|isrConfig) != 0:
		return nil, fmt.Errorf("interrupt status %#x has unknown bits", s.ISR)
	case s.Status&statusDriverOK != 0 && s.Status&statusFeaturesOK == 0:
		return nil, fmt.Errorf("device status %#x: DRIVER_OK without FEATURES_OK", s.Status)
	case s.Status&statusNeedsReset != 0 && s.Status&statusDriverOK == 0:
		return nil, fmt.Errorf("device status %#x: NEEDS_RESET without DRIVER_OK", s.Status)
	case s.Status&statusFeaturesOK != 0 && (unknown != 0 || s.AcceptedUndefined):
		return nil, fmt.Errorf("the guest uses features %#x, which this device does not offer", unknown)
	case s.Status&statusFeaturesOK != 0 && s.Accepted&FeatureVersion1 == 0:
		return nil, errors.New("features were accepted without VERSION_1")
	}
	vectors := []uint16{s.ConfigVector}
	for _, q := range s.Queues {
		vectors = append(vectors, q.Vector)
	}
	for _, v := range vectors {
		if v != t.vector(uint64(v)) {
			return nil, fmt.Errorf("interrupt vector %d; this device has %d", v, t.msix.Vectors())
		}
	}
	if s.Status&statusDriverOK == 0 || s.Status&statusNeedsReset != 0 {
		return queues, nil // the queues do not live
	}
	return t.build(s.Accepted,
		func(i int) bool { return s.Queues[i].Enabled },
		func(i int) QueueState { return s.Queues[i].Queue })
}
