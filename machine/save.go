package machine

import (
	"context"
	"errors"

	"vmm/kvm"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/virtio"
)

// Quiesce makes the devices of a paused machine rest: every SCSI command has
// come back, and nobody writes to guest memory any more. Resume ends that. When
// ctx is done first the error names what is still in flight, and the machine is
// as it was.
func (m *Machine) Quiesce(ctx context.Context) error {
	return m.whilePaused(ctx, func() error { return m.rest(ctx) })
}

// Save returns the state of a paused machine, whose devices it quiesces first;
// ctx bounds that alone. Memory is not part of it. The machine can be resumed
// afterwards as if nothing had been.
func (m *Machine) Save(ctx context.Context) (state *vmmv1.MachineState, err error) {
	err = m.whilePaused(ctx, func() error {
		if err := m.rest(ctx); err != nil {
			return err
		}
		state, err = m.save()
		return err
	})
	return state, err
}

// rest is Quiesce. The vCPUs stand still.
func (m *Machine) rest(ctx context.Context) error {
	if m.rests {
		return nil
	}
	for i, t := range m.virtio {
		if err := t.Quiesce(ctx); err != nil {
			for _, t := range m.virtio[:i] {
				t.Resume()
			}
			return err
		}
	}
	m.rests = true
	return nil
}

// wake undoes rest and save.
func (m *Machine) wake() {
	m.pci.ConnectInterrupts()
	if !m.rests {
		return
	}
	m.rests = false
	for _, t := range m.virtio {
		t.Resume()
	}
}

// save reads the state of a machine whose vCPUs stand, each at the end of an
// instruction, and whose devices rest. Processors come first: what an input
// line or the real-time clock raises meanwhile is in their devices' state, and
// raises the line again where that is loaded.
func (m *Machine) save() (*vmmv1.MachineState, error) {
	// Deassigning an irqfd waits for its injections that are still queued in
	// the kernel, so from here on the local APICs are final; what a device
	// has signalled stays in the vector's eventfd, which is its pending bit.
	m.pci.DisconnectInterrupts()
	s := &vmmv1.MachineState{ResetControl: &vmmv1.ResetControlState{Value: uint32(m.cf9.State())}, Pvpanic: &vmmv1.PvpanicState{}}
	if err := m.saveVCPUs(s); err != nil {
		return nil, err
	}
	chips, err := saveChips(m.vm)
	if err != nil {
		return nil, err
	}
	s.Irqchip, s.Pit = chipsMessage(&chips)
	bus, err := m.pci.State()
	if err != nil {
		return nil, err
	}
	s.Pci = pciMessage(&bus)
	for _, t := range m.virtio {
		transport, err := t.State()
		if err != nil {
			return nil, err
		}
		v := virtioMessage(&transport)
		switch d := t.Device().(type) {
		case *virtio.SCSI:
			c := d.State()
			v.Device = &vmmv1.VirtioPciState_Scsi{Scsi: &vmmv1.VirtioScsiState{
				SenseSize: c.SenseSize, CdbSize: c.CDBSize, EventsMissed: c.EventsMissed, LunsChanged: c.LUNsChanged,
			}}
		case *virtio.RNG:
			v.Device = &vmmv1.VirtioPciState_Rng{Rng: &vmmv1.VirtioRngState{}}
		}
		s.Virtio = append(s.Virtio, v)
	}
	for _, u := range m.uarts {
		s.Uarts = append(s.Uarts, uartMessage(u.State()))
	}
	s.Pm = pmMessage(m.pm.State())
	s.Rtc = rtcMessage(m.rtc.State())
	s.Boot, err = m.boot()
	return s, err
}

// saveVCPUs reads the vCPUs and, at one instant as far as that can be, the
// clock and their time-stamp counters.
func (m *Machine) saveVCPUs(s *vmmv1.MachineState) error {
	for id, v := range m.vcpus {
		state, err := saveVCPU(v.cpu, m.given.msrs)
		if err != nil {
			return err
		}
		var offset *uint64
		if o, err := v.cpu.TSCOffset(); err == nil {
			offset = &o
		} else if !errors.Is(err, kvm.ErrNotSupported) {
			return err
		}
		s.Vcpus = append(s.Vcpus, vcpuMessage(id, &state, offset))
	}
	clock, err := m.readClock()
	if err != nil {
		return err
	}
	s.Clock = clock
	return m.readTSCs(s.Vcpus)
}
