package machine

import (
	"fmt"
	"sync/atomic"

	"vmm/kvm"
	"vmm/memory"
)

// vcpu runs one virtual processor on a goroutine, and so an OS thread, of its
// own. It never does a disk's work: queue notifications leave KVM through
// ioeventfds, and what remains here is registers.
type vcpu struct {
	m   *Machine
	cpu *kvm.VCPU

	exits [exitKinds]atomic.Uint64 // written by its thread alone
}

// Kinds of returns from KVM_RUN.
const (
	exitIO = iota
	exitMMIO
	exitIntr  // a signal: somebody stops the vCPU, or the runtime wants its thread
	exitOther // one that ends the machine
	exitKinds
)

// run is the goroutine. It returns when the gate says so.
func (v *vcpu) run() {
	unbind, err := v.cpu.Bind()
	if err != nil {
		v.m.fail(err)
	} else {
		defer unbind()
	}
	for {
		if !v.m.gate.open() {
			v.complete()
			if !v.m.gate.stand() {
				return
			}
			continue
		}
		reason, err := v.cpu.Run()
		if err != nil {
			v.m.fail(err)
			continue
		}
		v.exit(reason)
	}
}

// complete finishes the instruction whose I/O exit the vCPU stands at: until
// then its registers are those of neither before nor after.
func (v *vcpu) complete() {
	for {
		reason, err := v.cpu.Complete()
		if err != nil {
			v.m.fail(err)
			return
		}
		if reason == kvm.ExitIntr || !v.exit(reason) {
			return
		}
	}
}

// exit handles a return from KVM_RUN; false means that the vCPU cannot go on.
func (v *vcpu) exit(reason kvm.ExitReason) bool {
	switch reason {
	case kvm.ExitIntr:
		v.exits[exitIntr].Add(1)
	case kvm.ExitIO:
		v.exits[exitIO].Add(1)
		io, err := v.cpu.IO()
		if err != nil {
			v.m.fail(err)
			return false
		}
		for i := range io.Count {
			p := io.Data[i*io.Size : (i+1)*io.Size]
			if io.Out {
				v.m.ports.write(uint64(io.Port), p)
			} else {
				v.m.ports.read(uint64(io.Port), p)
			}
		}
	case kvm.ExitMMIO:
		v.exits[exitMMIO].Add(1)
		access := v.cpu.MMIO()
		if access.Write {
			v.m.mmio.write(uint64(access.Addr), access.Data)
		} else {
			v.m.mmio.read(uint64(access.Addr), access.Data)
		}
	default:
		v.exits[exitOther].Add(1)
		v.m.fail(v.cpu.Explain(reason, v.m.readGuest))
		return false
	}
	return true
}

// readGuest copies guest memory for an error message.
func (m *Machine) readGuest(gpa memory.GPA, p []byte) error {
	b, err := m.ram.Slice(gpa, uint64(len(p)))
	copy(p, b)
	return err
}

// vcpuState is everything that a vCPU is, beside its CPUID.
type vcpuState struct {
	MPState kvm.MPState
	Regs    kvm.Regs
	Sregs   kvm.Sregs2
	XSave   []byte
	XCRs    kvm.XCRs
	Debug   kvm.DebugRegs
	LAPIC   kvm.LAPIC
	MSRs    []kvm.MSREntry
	Events  kvm.VCPUEvents
}

// saveVCPU reads the state of a vCPU that stands. Events come last: reading
// the others may move a pending exception into them.
func saveVCPU(c *kvm.VCPU, msrs []uint32) (s vcpuState, err error) {
	step := func(read func() error) {
		if err == nil {
			err = read()
		}
	}
	step(func() (err error) { s.MPState, err = c.MPState(); return })
	step(func() (err error) { s.Regs, err = c.Regs(); return })
	step(func() (err error) { s.Sregs, err = c.Sregs(); return })
	step(func() (err error) { s.XSave, err = c.XSave(); return })
	step(func() (err error) { s.XCRs, err = c.XCRs(); return })
	step(func() (err error) { s.Debug, err = c.DebugRegs(); return })
	step(func() (err error) { s.LAPIC, err = c.LAPIC(); return })
	step(func() (err error) { s.MSRs, err = c.MSRs(msrs); return })
	step(func() (err error) { s.Events, err = c.Events(); return })
	return s, err
}

// restoreVCPU makes a vCPU that stands what s says. The order matters: XCR0
// decides what XSAVE may hold, the APIC base in the special registers whether
// there is a LAPIC to set, the LAPIC's timer mode what IA32_TSC_DEADLINE
// means; a runnable AP must be whole before its MP state says so.
func restoreVCPU(c *kvm.VCPU, s *vcpuState) error {
	for _, write := range []func() error{
		func() error { return c.SetSregs(&s.Sregs) },
		func() error { return c.SetRegs(&s.Regs) },
		func() error { return c.SetXCRs(&s.XCRs) },
		func() error { return c.SetXSave(s.XSave) },
		func() error { return c.SetDebugRegs(&s.Debug) },
		func() error { return c.SetLAPIC(&s.LAPIC) },
		func() error { return c.SetMSRs(s.MSRs) },
		func() error { return c.SetMPState(s.MPState) },
		func() error { return c.SetEvents(&s.Events) },
	} {
		if err := write(); err != nil {
			return err
		}
	}
	return nil
}

// chipState is the interrupt controllers and the timer of the VM.
type chipState struct {
	chips [3]kvm.IRQChip
	pit   kvm.PIT2
}

var chipIDs = [3]kvm.ChipID{kvm.ChipPICMaster, kvm.ChipPICSlave, kvm.ChipIOAPIC}

func saveChips(vm *kvm.VM) (s chipState, err error) {
	for i, id := range chipIDs {
		if s.chips[i], err = vm.IRQChip(id); err != nil {
			return s, err
		}
	}
	s.pit, err = vm.PIT2()
	return s, err
}

func restoreChips(vm *kvm.VM, s *chipState) error {
	for i := range s.chips {
		if err := vm.SetIRQChip(&s.chips[i]); err != nil {
			return err
		}
	}
	return vm.SetPIT2(&s.pit)
}

// guestMSRs finds the model-specific registers that are this vCPU's state:
// those that KVM lists, gives and takes back. It lists some that this vCPU,
// with its CPUID, does not have; they are refused even at reset.
func guestMSRs(system *kvm.System, c *kvm.VCPU) ([]uint32, error) {
	listed, err := system.MSRIndices()
	if err != nil {
		return nil, err
	}
	// The memory type range registers are state too, but not in KVM's list.
	listed = append(listed, mtrrs()...)
	var state []uint32
	for _, index := range listed {
		if hyperV(index) {
			continue
		}
		entries, err := c.MSRs([]uint32{index})
		if err == nil {
			err = c.SetMSRs(entries)
		}
		if err == nil {
			state = append(state, index)
		}
	}
	if len(state) == 0 {
		return nil, fmt.Errorf("KVM lists %d model-specific registers but gives none", len(listed))
	}
	return state, nil
}

// hyperV says whether a register is one of Hyper-V's synthetic ones (TLFS,
// appendix F). The guest is not told that it has them; some count time whether
// or not it runs.
func hyperV(index uint32) bool { return index >= 0x40000000 && index < 0x40000200 }

// mtrrs are the memory type range registers (SDM 4, 2.1): the default type,
// the fixed ranges and eight variable ones.
func mtrrs() []uint32 {
	const physBase0, defType = 0x200, 0x2ff
	list := []uint32{defType, 0x250, 0x258, 0x259}
	for i := uint32(0); i < 8; i++ {
		list = append(list, physBase0+2*i, physBase0+2*i+1, 0x268+i)
	}
	return list
}

// firmware does to a new vCPU's registers what a PC's firmware does before it
// starts a kernel.
func firmware(msrs []kvm.MSREntry) {
	const (
		miscEnable    = 0x1a0
		fastStrings   = 1 << 0 // Linux takes REP MOVS for slow without it
		mtrrDefType   = 0x2ff
		mtrrEnable    = 1 << 11 // Linux gives up PAT while the MTRRs are off
		mtrrWriteBack = 6
	)
	for i := range msrs {
		switch e := &msrs[i]; e.Index {
		case miscEnable:
			e.Data |= fastStrings
		case mtrrDefType:
			e.Data = mtrrEnable | mtrrWriteBack
		}
	}
}
