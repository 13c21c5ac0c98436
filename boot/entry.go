package boot

import (
	"encoding/binary"

	"vmm/kvm"
	"vmm/memory"
)

// Protocol is how a kernel is entered.
type Protocol int

const (
	Linux64 Protocol = iota + 1 // bzImage, 64-bit mode
	PVH                         // ELF with a PVH note, 32-bit mode
)

func (p Protocol) String() string {
	switch p {
	case Linux64:
		return "Linux 64-bit boot protocol"
	case PVH:
		return "PVH"
	}
	return "unknown boot protocol"
}

// Entry is the state in which the first vCPU enters the kernel.
type Entry struct {
	Protocol Protocol
	IP       memory.GPA // the first instruction
	Info     memory.GPA // what the kernel is told: boot_params, or hvm_start_info
}

// Selectors of the GDT. The boot protocol asks for code at 10 and data at 18.
const (
	selectorCode32 = 0x08
	selectorCode64 = 0x10
	selectorData   = 0x18
	selectorTSS    = 0x20
)

// gdtEntries have their accessed bits set and the TSS its busy bit: a
// processor, or KVM's emulation of one, that wanted to set them would write to
// the guest's memory.
var gdtEntries = [...]uint64{
	0,
	0x00cf9b000000ffff,    // 32-bit code, 0 to 4 GiB
	0x00af9b000000ffff,    // 64-bit code
	0x00cf93000000ffff,    // data, 0 to 4 GiB
	0x00008b0000000067, 0, // TSS at 0, never used; 16 bytes in 64-bit mode
}

func gdt() []byte {
	b := make([]byte, 0, 8*len(gdtEntries))
	for _, entry := range gdtEntries {
		b = binary.LittleEndian.AppendUint64(b, entry)
	}
	return b
}

// Set changes the registers of a vCPU after reset to those at the kernel's
// first instruction.
func (e Entry) Set(r *kvm.Regs, s *kvm.Sregs2) {
	*r = kvm.Regs{RIP: uint64(e.IP), RFlags: 1 << 1} // bit 1 is always set
	switch e.Protocol {
	case Linux64:
		r.RSI = uint64(e.Info)
		s.LongMode(addrPageTables)
		s.CS.Selector = selectorCode64
	case PVH:
		const cr0PE, cr0ET = 1 << 0, 1 << 4
		r.RBX = uint64(e.Info)
		s.CR0, s.CR3, s.CR4, s.EFER = cr0PE|cr0ET, 0, 0, 0
		s.CS = kvm.Segment{Selector: selectorCode32, Limit: 0xffffffff, Type: 11, Present: 1, S: 1, DB: 1, G: 1}
		data := kvm.Segment{Selector: selectorData, Limit: 0xffffffff, Type: 3, Present: 1, S: 1, DB: 1, G: 1}
		s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	}
	s.TR = kvm.Segment{Selector: selectorTSS, Limit: 0x67, Type: 11, Present: 1}
	s.LDT = kvm.Segment{Unusable: 1}
	s.GDT = kvm.Dtable{Base: uint64(addrGDT), Limit: uint16(8*len(gdtEntries) - 1)}
	s.IDT = kvm.Dtable{} // no interrupt is taken before the kernel has set its own
}
