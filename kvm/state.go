package kvm

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	hype "github.com/c35s/hype/kvm"
)

// MPState is what a vCPU does as multiprocessing sees it (KVM api 4.38).
type MPState uint32

func (s MPState) String() string {
	switch s {
	case MPRunnable:
		return "runnable"
	case MPUninitialized:
		return "uninitialized"
	case MPInitReceived:
		return "INIT received"
	case MPHalted:
		return "halted"
	case MPSIPIReceived:
		return "SIPI received"
	}
	return fmt.Sprintf("MP state %d", uint32(s))
}

// read makes a request that fills a structure.
func read[T any](c *VCPU, r request) (T, error) {
	var s T
	_, err := pass(&c.handle, r, &s)
	if err != nil {
		return s, with(err, "vcpu %d", c.id)
	}
	return s, nil
}

// write makes a request that reads one.
func write[T any](c *VCPU, r request, s *T) error {
	_, err := pass(&c.handle, r, s)
	if err != nil {
		return with(err, "vcpu %d", c.id)
	}
	return nil
}

// Regs reads the general registers, RIP and RFLAGS (KVM api 4.11).
func (c *VCPU) Regs() (regs Regs, err error) {
	err = c.do("KVM_GET_REGS", func() error { return hype.GetRegs(c.cpu, &regs) })
	return regs, with(err, "vcpu %d", c.id)
}

// SetRegs writes them (KVM api 4.12).
func (c *VCPU) SetRegs(regs *Regs) error {
	err := c.do("KVM_SET_REGS", func() error { return hype.SetRegs(c.cpu, regs) })
	return with(err, "vcpu %d", c.id)
}

// Sregs reads the special registers (KVM api 4.132). On a host without
// KVM_GET_SREGS2 (before Linux 5.14) it uses KVM_GET_SREGS, which lacks the PDPTRs.
func (c *VCPU) Sregs() (Sregs2, error) {
	if _, err := c.vm.Check(CapSRegs2); err == nil {
		return read[Sregs2](c, reqGetSregs2)
	} else if !errors.Is(err, ErrNotSupported) {
		return Sregs2{}, err
	}
	return c.oldSregs()
}

// SetSregs writes them (KVM api 4.133), with the same fallback.
func (c *VCPU) SetSregs(s *Sregs2) error {
	if _, err := c.vm.Check(CapSRegs2); err == nil {
		return write(c, reqSetSregs2, s)
	} else if !errors.Is(err, ErrNotSupported) {
		return err
	}
	return c.setOldSregs(s)
}

func (c *VCPU) oldSregs() (s Sregs2, err error) {
	var old sregs
	err = c.do("KVM_GET_SREGS", func() error { return hype.GetSregs(c.cpu, &old) })
	s.CS, s.DS, s.ES, s.FS, s.GS, s.SS = old.CS, old.DS, old.ES, old.FS, old.GS, old.SS
	s.TR, s.LDT, s.GDT, s.IDT = old.TR, old.LDT, old.GDT, old.IDT
	s.CR0, s.CR2, s.CR3, s.CR4, s.CR8 = old.CR0, old.CR2, old.CR3, old.CR4, old.CR8
	s.EFER, s.APICBase = old.EFER, old.APICBase
	return s, with(err, "vcpu %d", c.id)
}

// setOldSregs leaves the interrupt bitmap empty: an interrupt on its way is
// part of VCPUEvents.
func (c *VCPU) setOldSregs(s *Sregs2) error {
	if s.Flags&Sregs2PDPTRsValid != 0 {
		return fmt.Errorf("kvm: vcpu %d: the guest's PDPTRs need KVM_SET_SREGS2: %w", c.id, &UnsupportedError{[]Cap{CapSRegs2}})
	}
	old := sregs{
		CS: s.CS, DS: s.DS, ES: s.ES, FS: s.FS, GS: s.GS, SS: s.SS,
		TR: s.TR, LDT: s.LDT, GDT: s.GDT, IDT: s.IDT,
		CR0: s.CR0, CR2: s.CR2, CR3: s.CR3, CR4: s.CR4, CR8: s.CR8,
		EFER: s.EFER, APICBase: s.APICBase,
	}
	err := c.do("KVM_SET_SREGS", func() error { return hype.SetSregs(c.cpu, &old) })
	return with(err, "vcpu %d", c.id)
}

// xsaveMin is the size of struct kvm_xsave: what every host takes and gives.
const xsaveMin = 4096

// xsaveSize is the size of this VM's XSAVE state now. It grows when the guest's
// CPUID admits a large component such as AMX.
func (c *VCPU) xsaveSize() (size int, request request, err error) {
	size, err = c.vm.Check(CapXSave2)
	if errors.Is(err, ErrNotSupported) {
		return xsaveMin, reqGetXSave, nil
	}
	return max(size, xsaveMin), reqGetXSave2, err
}

// XSave reads the floating-point and vector state in the processor's XSAVE format
// (KVM api 4.134; 4.42 on a host before Linux 5.17).
func (c *VCPU) XSave() ([]byte, error) {
	size, r, err := c.xsaveSize()
	if err != nil {
		return nil, err
	}
	buf := make([]byte, size)
	_, err = pass(&c.handle, r, &buf[0])
	return buf, with(err, "vcpu %d", c.id)
}

// SetXSave writes it (KVM api 4.43). A state longer than this host's is accepted
// if the rest is empty.
func (c *VCPU) SetXSave(state []byte) error {
	size, _, err := c.xsaveSize()
	if err != nil {
		return err
	}
	if len(state) > size && len(bytes.TrimLeft(state[size:], "\x00")) > 0 {
		return fmt.Errorf("kvm: KVM_SET_XSAVE vcpu %d: the state has %d bytes, this host's processor keeps only %d", c.id, len(state), size)
	}
	buf := make([]byte, size)
	copy(buf, state)
	_, err = pass(&c.handle, reqSetXSave, &buf[0])
	return with(err, "vcpu %d", c.id)
}

// XCRs reads the extended control registers (KVM api 4.44): none on a host without
// XSAVE.
func (c *VCPU) XCRs() (XCRs, error) { return read[XCRs](c, reqGetXCRs) }

// SetXCRs writes them (KVM api 4.45). A host without XSAVE refuses even none, so none is
// nothing to do.
func (c *VCPU) SetXCRs(x *XCRs) error {
	if x.N == 0 {
		return nil
	}
	return write(c, reqSetXCRs, x)
}

// Events reads what is on its way into the vCPU (KVM api 4.31).
func (c *VCPU) Events() (VCPUEvents, error) { return read[VCPUEvents](c, reqGetVCPUEvents) }

// SetEvents writes it (KVM api 4.32).
func (c *VCPU) SetEvents(e *VCPUEvents) error { return write(c, reqSetVCPUEvents, e) }

// DebugRegs reads the debug registers (KVM api 4.33).
func (c *VCPU) DebugRegs() (DebugRegs, error) { return read[DebugRegs](c, reqGetDebugRegs) }

// SetDebugRegs writes them (KVM api 4.34).
func (c *VCPU) SetDebugRegs(d *DebugRegs) error { return write(c, reqSetDebugRegs, d) }

// LAPIC reads the local APIC (KVM api 4.57). The VM has an in-kernel irqchip.
func (c *VCPU) LAPIC() (LAPIC, error) { return read[LAPIC](c, reqGetLAPIC) }

// SetLAPIC writes it (KVM api 4.58).
func (c *VCPU) SetLAPIC(l *LAPIC) error { return write(c, reqSetLAPIC, l) }

// MPState reads what the vCPU does (KVM api 4.38).
func (c *VCPU) MPState() (MPState, error) {
	s, err := read[mpState](c, reqGetMPState)
	return s.State, err
}

// SetMPState writes it (KVM api 4.39).
func (c *VCPU) SetMPState(s MPState) error {
	return with(write(c, reqSetMPState, &mpState{State: s}), "vcpu %d %v", c.id, s)
}

// maxMSRs is how many registers the kernel takes at a time: fewer than its MAX_IO_MSRS.
const maxMSRs = 255

// MSRs reads model-specific registers (KVM api 4.18). The first that cannot be
// read is an *MSRError.
func (c *VCPU) MSRs(indices []uint32) ([]MSREntry, error) { return getMSRs(&c.handle, indices) }

func getMSRs(h *handle, indices []uint32) ([]MSREntry, error) {
	entries := make([]MSREntry, len(indices))
	for i, index := range indices {
		entries[i].Index = index
	}
	return entries, eachMSR(h, reqGetMSRs, entries)
}

// SetMSRs writes them in order (KVM api 4.19). The first that is refused is an
// *MSRError; the later ones were not tried.
func (c *VCPU) SetMSRs(entries []MSREntry) error { return eachMSR(&c.handle, reqSetMSRs, entries) }

// eachMSR passes the entries on in portions and copies the answers back. The kernel
// stops at the first register it cannot handle and returns how many it did.
func eachMSR(h *handle, r request, entries []MSREntry) error {
	for len(entries) > 0 {
		list, portion := flexible[msrs, MSREntry](min(len(entries), maxMSRs))
		list.N = uint32(copy(portion, entries))
		n, err := pass(h, r, list)
		if err != nil {
			return with(err, "%d registers from %#x", len(portion), entries[0].Index)
		}
		if n < len(portion) {
			return &MSRError{Op: r.String(), Entry: entries[max(n, 0)]}
		}
		copy(entries, portion)
		entries = entries[len(portion):]
	}
	return nil
}

// CPUID reads the leaves that the guest sees (KVM api 4.21).
func (c *VCPU) CPUID() ([]CPUIDEntry2, error) {
	leaves, err := getCPUID(&c.handle, reqGetCPUID2)
	return leaves, with(err, "vcpu %d", c.id)
}

// SetCPUID sets them (KVM api 4.20), before the vCPU's first Run.
func (c *VCPU) SetCPUID(leaves []CPUIDEntry2) error {
	list, entries := flexible[cpuid2, CPUIDEntry2](len(leaves))
	list.N = uint32(copy(entries, leaves))
	_, err := pass(&c.handle, reqSetCPUID2, list)
	return with(err, "vcpu %d with %d leaves", c.id, len(leaves))
}

// TSCKHz reads the rate of the guest's time-stamp counter in kHz (KVM api 4.56).
func (c *VCPU) TSCKHz() (int, error) {
	khz, err := c.call(reqGetTSCKHz, 0)
	return khz, with(err, "vcpu %d", c.id)
}

// SetTSCKHz sets it (KVM api 4.55). Without CapTSCControl only rates within the host's
// tolerance work.
func (c *VCPU) SetTSCKHz(khz int) error {
	_, err := c.call(reqSetTSCKHz, uintptr(khz))
	return with(err, "vcpu %d rate %d kHz", c.id, khz)
}

// TSCOffset reads what KVM adds to the host's time-stamp counter to get the
// guest's (KVM devices/vcpu 4.1). Hosts before Linux 5.16 cannot tell: ErrNotSupported.
func (c *VCPU) TSCOffset() (uint64, error) {
	offset := new(uint64)
	err := c.tscOffset(reqGetDeviceAttr, offset)
	return *offset, with(err, "vcpu %d TSC offset", c.id)
}

// SetTSCOffset sets it.
func (c *VCPU) SetTSCOffset(offset uint64) error {
	return with(c.tscOffset(reqSetDeviceAttr, &offset), "vcpu %d TSC offset %#x", c.id, offset)
}

func (c *VCPU) tscOffset(r request, offset *uint64) error {
	attr := deviceAttr{Group: vcpuTSCCtrl, Attr: vcpuTSCOffset, Addr: offset}
	if _, err := pass(&c.handle, reqHasDeviceAttr, &attr); err != nil {
		if !errors.Is(err, os.ErrClosed) {
			err = failure(reqHasDeviceAttr.String(), fmt.Errorf("%w: it came with Linux 5.16 (%w)", ErrNotSupported, errors.Unwrap(err)))
		}
		return err
	}
	_, err := pass(&c.handle, r, &attr)
	return err
}
