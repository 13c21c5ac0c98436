package kvm

import (
	"structs"

	hype "github.com/c35s/hype/kvm"
)

// Every structure in this file is read or written by the kernel. Its size, the
// offset of each field and the absence of hidden padding are tested against the
// C compiler's answer (abi_test.go; a structure without a row there fails).

// The structures that hype/kvm lays out as the kernel does. Its ClockData is not
// among them: it hides the real time and the TSC in its padding.
type (
	Regs        = hype.Regs        // general registers (KVM api 4.11)
	Segment     = hype.Segment     // a segment register and its hidden part
	Dtable      = hype.Dtable      // GDTR or IDTR
	MSREntry    = hype.MSREntry    // one model-specific register
	CPUIDEntry2 = hype.CPUIDEntry2 // one CPUID leaf (KVM api 4.20)
	PITConfig   = hype.PITConfig   // KVM_CREATE_PIT2 (KVM api 4.71)

	sregs        = hype.Sregs                 // special registers before Linux 5.14
	memoryRegion = hype.UserspaceMemoryRegion // KVM_SET_USER_MEMORY_REGION (KVM api 4.35)
	irqfdConfig  = hype.IRQFDConfig           // KVM_IRQFD (KVM api 4.75)
)

// Sregs2 are the special registers (KVM api 4.132). Flags says whether PDPTRs, the
// four page-directory pointers of PAE paging, are valid (Sregs2PDPTRsValid).
type Sregs2 struct {
	_                       structs.HostLayout
	CS, DS, ES, FS, GS, SS  Segment
	TR, LDT                 Segment
	GDT, IDT                Dtable
	CR0, CR2, CR3, CR4, CR8 uint64
	EFER                    uint64
	APICBase                uint64
	Flags                   uint64
	PDPTRs                  [4]uint64
}

// VCPUEvents are the exceptions, interrupts and NMIs on their way into a vCPU
// (KVM api 4.31). Flags says which parts count (EventsValid...).
type VCPUEvents struct {
	_         structs.HostLayout
	Exception struct {
		Injected, Nr, HasErrorCode, Pending uint8
		ErrorCode                           uint32
	}
	Interrupt           struct{ Injected, Nr, Soft, Shadow uint8 }
	NMI                 struct{ Injected, Pending, Masked, Pad uint8 }
	SIPIVector          uint32
	Flags               uint32
	SMI                 struct{ SMM, Pending, SMMInsideNMI, LatchedInit uint8 }
	TripleFaultPending  uint8
	_                   [26]uint8
	ExceptionHasPayload uint8
	ExceptionPayload    uint64
}

// DebugRegs are DR0-DR3, DR6 and DR7 (KVM api 4.33). Flags must be zero.
type DebugRegs struct {
	_     structs.HostLayout
	DB    [4]uint64
	DR6   uint64
	DR7   uint64
	Flags uint64
	_     [9]uint64
}

// XCR is one extended control register; XCR 0 enables parts of the XSAVE state.
type XCR struct {
	_     structs.HostLayout
	Index uint32
	_     uint32
	Value uint64
}

// XCRs are the N extended control registers at the start of List (KVM api 4.44).
type XCRs struct {
	_     structs.HostLayout
	N     uint32
	Flags uint32
	List  [16]XCR
	_     [16]uint64
}

// LAPIC is the page of local APIC registers (KVM api 4.57): a register at offset
// r of the APIC page is the little-endian word at Regs[r].
type LAPIC struct {
	_    structs.HostLayout
	Regs [1024]uint8
}

type mpState struct {
	_     structs.HostLayout
	State MPState
}

// IRQChip is the state of one chip of the interrupt controller (KVM api 4.26). Its
// State is the kernel's kvm_pic_state or kvm_ioapic_state, kept as bytes: it
// is only ever given back to a kernel.
type IRQChip struct {
	_     structs.HostLayout
	ID    ChipID
	_     uint32
	State [512]uint8
}

// PITChannel is one of the timer's three counters. CountLoadTime is a reading of
// the host's monotonic clock in nanoseconds.
type PITChannel struct {
	_             structs.HostLayout
	Count         uint32 // up to 65536
	LatchedCount  uint16
	CountLatched  uint8
	StatusLatched uint8
	Status        uint8
	ReadState     uint8
	WriteState    uint8
	WriteLatch    uint8
	RWMode        uint8
	Mode          uint8
	BCD           uint8
	Gate          uint8
	CountLoadTime int64
}

// PIT2 is the state of the in-kernel i8254 (KVM api 4.73).
type PIT2 struct {
	_        structs.HostLayout
	Channels [3]PITChannel
	Flags    uint32
	_        [9]uint32
}

// ClockData is kvmclock's reading (KVM api 4.29). Flags says which of Realtime and
// HostTSC the kernel could tell (ClockRealtime, ClockHostTSC).
type ClockData struct {
	_        structs.HostLayout
	Clock    uint64 // nanoseconds
	Flags    uint32
	_        uint32
	Realtime uint64 // CLOCK_REALTIME at that instant, nanoseconds since 1970
	HostTSC  uint64 // the host's TSC at that instant
	_        [4]uint32
}

// RoutingEntry says where a GSI leads: to a pin of a chip or to an MSI (KVM api
// 4.52). ChipRoute and MSIRoute make them.
type RoutingEntry struct {
	_     structs.HostLayout
	GSI   GSI
	Type  uint32
	Flags uint32
	_     uint32
	U     [8]uint32 // a union: {chip, pin} or {address low, address high, data, device}
}

type irqRouting struct {
	_     structs.HostLayout
	N     uint32
	Flags uint32
}

type irqLevel struct {
	_     structs.HostLayout
	GSI   GSI
	Level uint32
}

type msiMessage struct {
	_         structs.HostLayout
	AddressLo uint32
	AddressHi uint32
	Data      uint32
	Flags     uint32
	DeviceID  uint32
	_         [12]uint8
}

type ioeventfd struct {
	_         structs.HostLayout
	Datamatch uint64
	Addr      uint64
	Len       uint32
	FD        int32
	Flags     uint32
	_         [36]uint8
}

type dirtyLog struct {
	_      structs.HostLayout
	Slot   Slot
	_      uint32
	Bitmap *uint64
}

type clearDirtyLog struct {
	_         structs.HostLayout
	Slot      Slot
	NumPages  uint32
	FirstPage uint64
	Bitmap    *uint64
}

type enableCap struct {
	_     structs.HostLayout
	Cap   uint32
	Flags uint32
	Args  [4]uint64
	_     [64]uint8
}

type deviceAttr struct {
	_     structs.HostLayout
	Flags uint32
	Group uint32
	Attr  uint64
	Addr  *uint64
}

type translation struct {
	_         structs.HostLayout
	Linear    uint64
	Physical  uint64
	Valid     uint8
	Writeable uint8
	Usermode  uint8
	_         [5]uint8
}

// The heads of lists whose entries follow in memory (see flexible).
type (
	msrList struct { // entries: uint32
		_ structs.HostLayout
		N uint32
	}
	msrs struct { // entries: MSREntry
		_ structs.HostLayout
		N uint32
		_ uint32
	}
	cpuid2 struct { // entries: CPUIDEntry2
		_ structs.HostLayout
		N uint32
		_ uint32
	}
)
