package machine

import (
	"errors"
	"fmt"
	"os"

	"vmm/boot"
	"vmm/kvm"
	"vmm/pci"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/virtio"
)

// guest says what Run begins with.
type guest int

const (
	guestBoots    guest = iota // from its kernel
	guestExpected              // after Load only
	guestLoaded                // from the state that was loaded
	guestSpoiled               // not at all: a Load has failed half-way
)

// Incoming is what a machine needs, beside its configuration, for a guest that
// arrives from elsewhere.
type Incoming struct {
	Requirements *vmmv1.Requirements
	// Kernel and Initrd are what a reset of the guest loads. NewIncoming takes
	// them over, an error or not: their Data is closed, where it can be, with
	// the machine. Without a kernel the guest
	// runs all the same, and ends where it asks for a reset.
	Kernel, Initrd *Image
	// Memory, if not nil, is the guest's memory itself. NewIncoming takes it
	// over, an error or not.
	Memory *os.File
}

// NewIncoming builds a machine for a guest that arrives: Load makes it that
// guest, then Run lets it go on. The configuration's Kernel, Initrd and CPU are
// not used. What this host cannot offer the guest is refused here, by name. A
// time-stamp counter whose rate KVM does not provide is a warning; Load refuses
// the guest if it has no other clock.
func NewIncoming(cfg Config, in Incoming) (*Machine, error) {
	return build(cfg, &in)
}

// accept checks what the guest needs.
func (m *Machine) accept(in *Incoming) error {
	need := in.Requirements
	if err := CheckCompatible(need); err != nil {
		return err
	}
	if len(need.Vcpus) != m.cfg.CPUs {
		return fmt.Errorf("the guest has %d vCPUs; its configuration says %d", len(need.Vcpus), m.cfg.CPUs)
	}
	m.given = given{msrs: need.Msrs, tscKHz: int(need.TscKhz), xsave: int(need.XsaveBytes)}
	for _, v := range need.Vcpus {
		m.given.cpuid = append(m.given.cpuid, cpuidOf(v))
	}
	return nil
}

// parsed is a state whose form has been checked.
type parsed struct {
	vcpus     []*vcpuState
	chips     chipState
	bus       pci.State
	transport []virtio.PCIState
}

// parse checks the form of s, which is not trusted.
func (m *Machine) parse(s *vmmv1.MachineState) (p parsed, err error) {
	part := func(name string, do func(r *reader)) {
		if err == nil {
			var r reader
			do(&r)
			if r.err != nil {
				err = fmt.Errorf("%s: %w", name, r.err)
			}
		}
	}
	count := func(what string, got, want int) {
		part("state", func(r *reader) {
			if got != want {
				r.fail("%d %s; this machine has %d", got, what, want)
			}
		})
	}
	count("vCPUs", len(s.GetVcpus()), len(m.vcpus))
	count("virtio devices", len(s.GetVirtio()), len(m.virtio))
	count("UARTs", len(s.GetUarts()), len(m.uarts))
	if err != nil {
		return p, err
	}
	for id, v := range s.Vcpus {
		part(fmt.Sprintf("vCPU %d", id), func(r *reader) { p.vcpus = append(p.vcpus, r.vcpu(v, id, m.given.msrs)) })
	}
	part("interrupt controllers", func(r *reader) { p.chips = r.chips(s.GetIrqchip(), s.GetPit()) })
	part("PCI bus", func(r *reader) { p.bus = r.pci(s.GetPci()) })
	for i, v := range s.Virtio {
		part(fmt.Sprintf("virtio device %d", i), func(r *reader) {
			p.transport = append(p.transport, r.virtio(v))
			switch m.virtio[i].Device().(type) {
			case *virtio.SCSI:
				need(r, "SCSI controller", v.GetScsi())
			case *virtio.RNG:
				need(r, "entropy device", v.GetRng())
			}
		})
	}
	part("clock", func(r *reader) { r.err = checkClock(s.GetClock()) })
	part("images", func(r *reader) { r.err = m.loadBoot(s.GetBoot()) })
	return p, err
}

// Load makes a machine that has not run the guest whose state this is; its
// memory is there already. The state is not trusted. No byte of guest memory
// is written and no vCPU runs before Run. After an error the machine can only be
// closed.
func (m *Machine) Load(s *vmmv1.MachineState) error {
	if m.State() != StateStarting || m.guest != guestBoots && m.guest != guestExpected {
		return errors.New("load: the machine has a guest already")
	}
	p, err := m.parse(s)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	m.guest = guestSpoiled
	if m.given.tscRefused != nil && !usesKVMClock(s.Vcpus[0]) {
		return fmt.Errorf("load: the guest does not use kvm-clock, and %w", m.given.tscRefused)
	}
	for _, step := range []func() error{
		func() error { return m.loadProcessors(&p) },
		func() error { return m.loadTime(s, &p) },
		func() error { return m.loadBus(s, &p) },
		func() error { return m.loadLegacy(s) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("load: %w", err)
		}
	}
	m.guest, m.rests = guestLoaded, true
	return nil
}

// loadProcessors restores vCPUs and interrupt controllers. The order matters:
//   - XCR0 decides what the XSAVE area may hold;
//   - the special registers decide whether there is a local APIC to set;
//   - writing the IOAPIC injects what it has pending, which the local APICs'
//     own state, written later, has already;
//   - the local APIC decides what IA32_TSC_DEADLINE means, and that register
//     is compared with the time-stamp counter: loadTime writes both;
//   - other registers may drop an event that is on its way, so events come
//     last, and a vCPU is whole before its MP state says that it may run.
func (m *Machine) loadProcessors(p *parsed) error {
	all := func(write func(c *kvm.VCPU, s *vcpuState) error) error {
		for id, v := range m.vcpus {
			if err := write(v.cpu, p.vcpus[id]); err != nil {
				return err
			}
		}
		return nil
	}
	for _, step := range []func() error{
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetSregs(&s.Sregs) }) },
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetRegs(&s.Regs) }) },
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetXCRs(&s.XCRs) }) },
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetXSave(s.XSave) }) },
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetDebugRegs(&s.Debug) }) },
		func() error { return restoreChips(m.vm, &p.chips) },
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetLAPIC(&s.LAPIC) }) },
		func() error { return all(m.loadMSRs) },
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetMPState(s.MPState) }) },
		func() error { return all(func(c *kvm.VCPU, s *vcpuState) error { return c.SetEvents(&s.Events) }) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// loadMSRs writes a vCPU's model-specific registers, but for those that
// loadTime and begin write.
func (m *Machine) loadMSRs(c *kvm.VCPU, s *vcpuState) error {
	now := make([]kvm.MSREntry, 0, len(s.MSRs))
	for _, e := range s.MSRs {
		switch e.Index {
		case msrTSC, msrTSCDeadline:
		case msrWallClock, msrWallClockOld:
			// The VM has one of it, and KVM writes the time into guest memory
			// when the register is written: not before the guest runs here.
			if c.ID() == 0 && e.Data != 0 {
				m.wallClock = append(m.wallClock, e)
			}
		default:
			now = append(now, e)
		}
	}
	return c.SetMSRs(now)
}

// loadTime sets the clock, then the timers that are compared with it.
func (m *Machine) loadTime(s *vmmv1.MachineState, p *parsed) error {
	if err := m.setClock(s.Clock, s.Vcpus); err != nil {
		return err
	}
	for id, v := range m.vcpus {
		for _, e := range p.vcpus[id].MSRs {
			if e.Index == msrTSCDeadline {
				if err := v.cpu.SetMSRs([]kvm.MSREntry{e}); err != nil {
					return err
				}
			}
		}
		if err := v.cpu.KVMClockCtrl(); err != nil {
			return err
		}
	}
	return nil
}

// loadBus restores the bus and the devices on it, which rest until begin.
func (m *Machine) loadBus(s *vmmv1.MachineState, p *parsed) error {
	if err := m.pci.SetState(p.bus); err != nil {
		return err
	}
	for i, t := range m.virtio {
		if d, ok := t.Device().(*virtio.SCSI); ok {
			c := s.Virtio[i].GetScsi()
			state := virtio.SCSIState{SenseSize: c.GetSenseSize(), CDBSize: c.GetCdbSize(), EventsMissed: c.GetEventsMissed(), LUNsChanged: c.GetLunsChanged()}
			if err := d.Restore(state); err != nil {
				return err
			}
		}
		if err := t.SetState(p.transport[i]); err != nil {
			return err
		}
	}
	return nil
}

// loadLegacy restores the devices on ports. Each drives its interrupt line to
// where it belongs; the lines are lowered first, so that one which is high
// makes an edge: an interrupt that was on its way is raised once more.
func (m *Machine) loadLegacy(s *vmmv1.MachineState) error {
	for _, gsi := range []kvm.GSI{boot.IRQCOM1, boot.IRQCOM2, boot.IRQRTC, boot.IRQSCI} {
		if err := m.vm.IRQLine(gsi, false); err != nil {
			return err
		}
	}
	var r reader
	for i, u := range m.uarts {
		if err := u.SetState(r.uart(need(&r, "UART", s.Uarts[i]))); err != nil {
			return err
		}
	}
	pm, rtc := r.pm(s.GetPm()), r.rtc(s.GetRtc())
	m.cf9.SetState(fit[uint8](&r, "reset control", s.GetResetControl().GetValue()))
	if r.err != nil {
		return r.err
	}
	if err := m.pm.SetState(pm); err != nil {
		return err
	}
	return m.rtc.SetState(rtc)
}

// begin puts the guest where Run's first instruction is.
func (m *Machine) begin() error {
	switch m.guest {
	case guestBoots:
		return m.enter()
	case guestExpected:
		return errors.New("the machine waits for a guest that has not arrived")
	case guestSpoiled:
		return errors.New("the guest that the machine waited for could not be loaded")
	}
	if err := m.vcpus[0].cpu.SetMSRs(m.wallClock); err != nil {
		return err
	}
	m.wake()
	return nil
}
