package machine

import (
	"fmt"

	"vmm/kvm"
	vmmv1 "vmm/proto/vmm/v1"
)

// This file and state_device.go turn what the parts of a machine say of
// themselves into the messages of proto/vmm/v1/state.proto and back. Messages
// that come in are not trusted: what does not fit is an error. Whether values
// make sense is for KVM and the devices to judge.

// reader turns messages into state and keeps the first thing that does not
// fit.
type reader struct{ err error }

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

// need notes a message that is missing: its fields would all read as zero.
func need[M any](r *reader, what string, m *M) *M {
	if m == nil {
		r.fail("%s: missing", what)
	}
	return m
}

// fit narrows a value.
func fit[T uint8 | uint16](r *reader, what string, v uint32) T {
	if uint32(T(v)) != v {
		r.fail("%s: %#x is too large", what, v)
	}
	return T(v)
}

// flag is a boolean as the kernel has it.
func flag(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// fill copies bytes of a fixed length.
func (r *reader) fill(what string, to, from []byte) {
	if len(from) != len(to) {
		r.fail("%s: %d bytes; want %d", what, len(from), len(to))
	}
	copy(to, from)
}

func vcpuMessage(id int, s *vcpuState, tscOffset *uint64) *vmmv1.VcpuState {
	x := &s.Regs
	m := &vmmv1.VcpuState{
		Id:      uint32(id),
		MpState: uint32(s.MPState),
		Regs: &vmmv1.GeneralRegisters{
			Rax: x.RAX, Rbx: x.RBX, Rcx: x.RCX, Rdx: x.RDX, Rsi: x.RSI, Rdi: x.RDI, Rsp: x.RSP, Rbp: x.RBP,
			R8: x.R8, R9: x.R9, R10: x.R10, R11: x.R11, R12: x.R12, R13: x.R13, R14: x.R14, R15: x.R15,
			Rip: x.RIP, Rflags: x.RFlags,
		},
		Sregs:     sregsMessage(&s.Sregs),
		Xsave:     s.XSave,
		Debug:     &vmmv1.DebugRegisters{Db: s.Debug.DB[:], Dr6: s.Debug.DR6, Dr7: s.Debug.DR7},
		Lapic:     s.LAPIC.Regs[:],
		Events:    eventsMessage(&s.Events),
		TscOffset: tscOffset,
	}
	for _, c := range s.XCRs.List[:s.XCRs.N] {
		m.Xcrs = append(m.Xcrs, &vmmv1.ExtendedControlRegister{Index: c.Index, Value: c.Value})
	}
	for _, e := range s.MSRs {
		m.Msrs = append(m.Msrs, &vmmv1.Msr{Index: e.Index, Value: e.Data})
	}
	return m
}

// vcpu reads the state of vCPU id, whose model-specific registers these are.
func (r *reader) vcpu(m *vmmv1.VcpuState, id int, msrs []uint32) *vcpuState {
	if m.GetId() != uint32(id) {
		r.fail("id %d", m.GetId())
	}
	s := &vcpuState{MPState: kvm.MPState(m.GetMpState())}
	if s.MPState > kvm.MPSIPIReceived { // the others are of other architectures
		r.fail("%v", s.MPState)
	}
	x := need(r, "general registers", m.GetRegs())
	s.Regs = kvm.Regs{
		RAX: x.GetRax(), RBX: x.GetRbx(), RCX: x.GetRcx(), RDX: x.GetRdx(),
		RSI: x.GetRsi(), RDI: x.GetRdi(), RSP: x.GetRsp(), RBP: x.GetRbp(),
		R8: x.GetR8(), R9: x.GetR9(), R10: x.GetR10(), R11: x.GetR11(),
		R12: x.GetR12(), R13: x.GetR13(), R14: x.GetR14(), R15: x.GetR15(),
		RIP: x.GetRip(), RFlags: x.GetRflags(),
	}
	s.Sregs = r.sregs(need(r, "special registers", m.GetSregs()))
	s.XSave = m.GetXsave()
	if len(s.XSave) < minXSave || len(s.XSave) > maxXSave {
		r.fail("XSAVE area of %d bytes: it has %d to %d", len(s.XSave), minXSave, maxXSave)
	}
	if len(m.GetXcrs()) > len(s.XCRs.List) {
		r.fail("%d extended control registers: KVM takes %d", len(m.GetXcrs()), len(s.XCRs.List))
	} else {
		s.XCRs.N = uint32(len(m.GetXcrs()))
		for i, c := range m.GetXcrs() {
			s.XCRs.List[i] = kvm.XCR{Index: c.GetIndex(), Value: c.GetValue()}
		}
	}
	d := need(r, "debug registers", m.GetDebug())
	if copy(s.Debug.DB[:], d.GetDb()); len(d.GetDb()) != len(s.Debug.DB) {
		r.fail("%d debug address registers; want %d", len(d.GetDb()), len(s.Debug.DB))
	}
	s.Debug.DR6, s.Debug.DR7 = d.GetDr6(), d.GetDr7()
	r.fill("local APIC", s.LAPIC.Regs[:], m.GetLapic())
	if len(m.GetMsrs()) != len(msrs) {
		r.fail("%d model-specific registers; this machine has %d", len(m.GetMsrs()), len(msrs))
	} else {
		s.MSRs = make([]kvm.MSREntry, len(msrs))
		for i, e := range m.GetMsrs() {
			if e.GetIndex() != msrs[i] {
				r.fail("model-specific register %#x at place %d; want %#x", e.GetIndex(), i, msrs[i])
			}
			s.MSRs[i] = kvm.MSREntry{Index: msrs[i], Data: e.GetValue()}
		}
	}
	s.Events = r.events(need(r, "events", m.GetEvents()))
	return s
}

const (
	minXSave = 512 + 64 // bytes: the legacy area and the header
	maxXSave = 64 << 10 // more than any processor has
)

func sregsMessage(s *kvm.Sregs2) *vmmv1.SpecialRegisters {
	segment := func(s *kvm.Segment) *vmmv1.Segment {
		return &vmmv1.Segment{
			Base: s.Base, Limit: s.Limit, Selector: uint32(s.Selector), Type: uint32(s.Type), Present: uint32(s.Present), Dpl: uint32(s.DPL),
			Db: uint32(s.DB), S: uint32(s.S), L: uint32(s.L), G: uint32(s.G), Avl: uint32(s.Avl), Unusable: uint32(s.Unusable),
		}
	}
	table := func(d *kvm.Dtable) *vmmv1.DescriptorTable {
		return &vmmv1.DescriptorTable{Base: d.Base, Limit: uint32(d.Limit)}
	}
	m := &vmmv1.SpecialRegisters{
		Cs: segment(&s.CS), Ds: segment(&s.DS), Es: segment(&s.ES), Fs: segment(&s.FS), Gs: segment(&s.GS), Ss: segment(&s.SS),
		Tr: segment(&s.TR), Ldt: segment(&s.LDT), Gdt: table(&s.GDT), Idt: table(&s.IDT),
		Cr0: s.CR0, Cr2: s.CR2, Cr3: s.CR3, Cr4: s.CR4, Cr8: s.CR8, Efer: s.EFER, ApicBase: s.APICBase,
	}
	if s.Flags&kvm.Sregs2PDPTRsValid != 0 {
		m.Pdptrs = s.PDPTRs[:]
	}
	return m
}

func (r *reader) sregs(m *vmmv1.SpecialRegisters) kvm.Sregs2 {
	segment := func(name string, s *vmmv1.Segment) kvm.Segment {
		need(r, "segment "+name, s)
		small := func(v uint32) uint8 { return fit[uint8](r, "segment "+name, v) }
		return kvm.Segment{
			Base: s.GetBase(), Limit: s.GetLimit(), Selector: fit[uint16](r, "segment "+name, s.GetSelector()),
			Type: small(s.GetType()), Present: small(s.GetPresent()), DPL: small(s.GetDpl()), DB: small(s.GetDb()), S: small(s.GetS()),
			L: small(s.GetL()), G: small(s.GetG()), Avl: small(s.GetAvl()), Unusable: small(s.GetUnusable()),
		}
	}
	table := func(name string, d *vmmv1.DescriptorTable) kvm.Dtable {
		need(r, name, d)
		return kvm.Dtable{Base: d.GetBase(), Limit: fit[uint16](r, name, d.GetLimit())}
	}
	s := kvm.Sregs2{
		CS: segment("CS", m.GetCs()), DS: segment("DS", m.GetDs()), ES: segment("ES", m.GetEs()),
		FS: segment("FS", m.GetFs()), GS: segment("GS", m.GetGs()), SS: segment("SS", m.GetSs()),
		TR: segment("TR", m.GetTr()), LDT: segment("LDT", m.GetLdt()), GDT: table("GDT", m.GetGdt()), IDT: table("IDT", m.GetIdt()),
		CR0: m.GetCr0(), CR2: m.GetCr2(), CR3: m.GetCr3(), CR4: m.GetCr4(), CR8: m.GetCr8(), EFER: m.GetEfer(), APICBase: m.GetApicBase(),
	}
	switch n := len(m.GetPdptrs()); n {
	case 0:
	case len(s.PDPTRs):
		copy(s.PDPTRs[:], m.GetPdptrs())
		s.Flags = kvm.Sregs2PDPTRsValid
	default:
		r.fail("%d page-directory pointers; want none or %d", n, len(s.PDPTRs))
	}
	return s
}

func eventsMessage(e *kvm.VCPUEvents) *vmmv1.VcpuEvents {
	return &vmmv1.VcpuEvents{
		Flags: e.Flags,
		Exception: &vmmv1.ExceptionEvent{
			Injected: e.Exception.Injected != 0, Pending: e.Exception.Pending != 0, Vector: uint32(e.Exception.Nr),
			HasErrorCode: e.Exception.HasErrorCode != 0, ErrorCode: e.Exception.ErrorCode,
			HasPayload: e.ExceptionHasPayload != 0, Payload: e.ExceptionPayload,
		},
		Interrupt: &vmmv1.InterruptEvent{
			Injected: e.Interrupt.Injected != 0, Vector: uint32(e.Interrupt.Nr), Soft: e.Interrupt.Soft != 0, Shadow: uint32(e.Interrupt.Shadow),
		},
		Nmi: &vmmv1.NmiEvent{Injected: e.NMI.Injected != 0, Pending: uint32(e.NMI.Pending), Masked: e.NMI.Masked != 0},
		Smi: &vmmv1.SmiEvent{
			Smm: e.SMI.SMM != 0, Pending: e.SMI.Pending != 0, InsideNmi: e.SMI.SMMInsideNMI != 0, LatchedInit: e.SMI.LatchedInit != 0,
		},
		SipiVector: e.SIPIVector, TripleFault: e.TripleFaultPending != 0,
	}
}

func (r *reader) events(m *vmmv1.VcpuEvents) kvm.VCPUEvents {
	e := kvm.VCPUEvents{Flags: m.GetFlags(), SIPIVector: m.GetSipiVector(), TripleFaultPending: flag(m.GetTripleFault())}
	x := m.GetException()
	e.Exception.Injected, e.Exception.Pending = flag(x.GetInjected()), flag(x.GetPending())
	e.Exception.Nr = fit[uint8](r, "exception", x.GetVector())
	e.Exception.HasErrorCode, e.Exception.ErrorCode = flag(x.GetHasErrorCode()), x.GetErrorCode()
	e.ExceptionHasPayload, e.ExceptionPayload = flag(x.GetHasPayload()), x.GetPayload()
	i := m.GetInterrupt()
	e.Interrupt.Injected, e.Interrupt.Soft = flag(i.GetInjected()), flag(i.GetSoft())
	e.Interrupt.Nr, e.Interrupt.Shadow = fit[uint8](r, "interrupt", i.GetVector()), fit[uint8](r, "interrupt shadow", i.GetShadow())
	n := m.GetNmi()
	e.NMI.Injected, e.NMI.Masked = flag(n.GetInjected()), flag(n.GetMasked())
	e.NMI.Pending = fit[uint8](r, "pending NMIs", n.GetPending())
	s := m.GetSmi()
	e.SMI.SMM, e.SMI.Pending = flag(s.GetSmm()), flag(s.GetPending())
	e.SMI.SMMInsideNMI, e.SMI.LatchedInit = flag(s.GetInsideNmi()), flag(s.GetLatchedInit())
	return e
}
