package boot

import "vmm/memory"

// Every guest-physical address, I/O port and interrupt line of the machine is
// here; the tables below say what they are for, and a test that no two
// overlap.

// Guest-physical addresses.
const (
	// Below 1 MiB: what the loader leaves for the kernel. A kernel copies what
	// it needs before it uses this memory for itself.
	addrGDT        memory.GPA = 0x1000
	addrStartInfo  memory.GPA = 0x6000
	addrModules    memory.GPA = 0x6100
	addrMemmap     memory.GPA = 0x6200
	addrBootParams memory.GPA = 0x7000
	addrPageTables memory.GPA = 0x9000
	addrCmdline    memory.GPA = 0x20000

	// A PC's EBDA and BIOS. Linux takes no RAM from here, whatever the memory
	// map says, and older kernels look for the RSDP nowhere else.
	addrBIOS memory.GPA = 0x9fc00
	addrACPI memory.GPA = 0xe0000

	// addrHigh is where kernels may begin.
	addrHigh memory.GPA = 0x100000

	// The PCI host bridge hands out MMIO addresses from this window.
	PCIWindow     = memory.HoleStart
	PCIWindowSize = 512 << 20

	// ECAM is the configuration space of PCI bus 0: 32 devices of 8 functions
	// of 4 KiB.
	ECAM     memory.GPA = 0xe0000000
	ECAMSize            = 1 << 20
	lastBus             = ECAMSize>>20 - 1

	// Where KVM's interrupt controllers are.
	IOAPIC    memory.GPA = 0xfec00000
	LocalAPIC memory.GPA = 0xfee00000

	// What KVM wants for itself on Intel hosts that cannot run real mode: a
	// page for an identity map, three for a TSS (KVM_SET_IDENTITY_MAP_ADDR,
	// KVM_SET_TSS_ADDR: KVM api 4.40, 4.36).
	IdentityMap memory.GPA = 0xfffbc000
	TSS         memory.GPA = 0xfffbd000
)

// span is a range of addresses or ports.
type span struct {
	name  string
	start uint64
	size  uint64 // bytes, or ports
	why   string
}

var addresses = []span{
	{"GDT", uint64(addrGDT), 0x1000, "segments that the kernel starts with"},
	{"start info", uint64(addrStartInfo), 0x100, "PVH: what the kernel is told"},
	{"modules", uint64(addrModules), 0x100, "PVH: where the initrd is"},
	{"memory map", uint64(addrMemmap), 0xe00, "PVH: 149 entries of 24 bytes at most"},
	{"boot params", uint64(addrBootParams), 0x1000, "bzImage: the zero page, one page"},
	{"page tables", uint64(addrPageTables), 6 * 0x1000, "bzImage: 4 GiB mapped one to one, in pages of 2 MiB"},
	{"command line", uint64(addrCmdline), 0x10000, "64 KiB, its final NUL included"},
	{"BIOS", uint64(addrBIOS), uint64(addrACPI - addrBIOS), "EBDA, video memory, option ROMs: reserved"},
	{"ACPI tables", uint64(addrACPI), uint64(addrHigh - addrACPI), "RSDP first; reserved"},
	{"kernel and initrd", uint64(addrHigh), uint64(memory.HoleStart - addrHigh), "kernel where its file says, initrd as high as it may be"},
	{"PCI window", uint64(PCIWindow), PCIWindowSize, "BARs"},
	{"ECAM", uint64(ECAM), ECAMSize, "PCI configuration space of bus 0; reserved"},
	{"IOAPIC", uint64(IOAPIC), 0x1000, "in the kernel"},
	{"local APIC", uint64(LocalAPIC), 0x1000, "in the kernel; MSIs are writes to 1 MiB from here"},
	{"identity map", uint64(IdentityMap), 0x1000, "KVM's; reserved"},
	{"TSS", uint64(TSS), 0x3000, "KVM's; reserved"},
	{"high RAM", uint64(memory.HoleEnd), 1<<52 - uint64(memory.HoleEnd), "RAM beyond 3 GiB"},
}

// I/O ports.
const (
	PortKeyboard   = 0x64 // device.KeyboardReset
	PortRTC        = 0x70 // device.RTC
	PortCOM2       = 0x2f8
	PortCOM1       = 0x3f8
	PortPVPanic    = 0x505
	PortPM         = 0x600 // device.PM
	PortPCIAddress = 0xcf8 // PCI configuration: an access of 4 bytes here, of 1, 2 or 4 at the data ports
	PortReset      = 0xcf9 // device.ResetControl: an access of 1 byte here
	PortPCIData    = 0xcfc
)

var ports = []span{
	{"PIC, master", 0x20, 2, "in the kernel"},
	{"PIT", 0x40, 4, "in the kernel"},
	{"speaker", 0x61, 1, "in the kernel: the PIT's third channel"},
	{"keyboard controller", PortKeyboard, 1, "reset only"},
	{"RTC", PortRTC, 2, "clock, alarm, memory"},
	{"PIC, slave", 0xa0, 2, "in the kernel"},
	{"COM2", PortCOM2, 8, "second UART"},
	{"COM1", PortCOM1, 8, "console"},
	{"ELCR", 0x4d0, 2, "in the kernel: edge or level of each PIC line"},
	{"pvpanic", PortPVPanic, 1, "the guest reports its panic"},
	{"ACPI PM", PortPM, 12, "PM1 event 600, PM1 control 604, PM timer 608"},
	{"PCI address", PortPCIAddress, 1, "one register of 4 bytes: found by its first port"},
	{"reset control", PortReset, 1, "between the ports of PCI address, told apart by the access's first port"},
	{"PCI data", PortPCIData, 4, "window into configuration space"},
}

// Interrupt lines: GSIs below the MSIs'. KVM's timer interrupt, GSI 0, arrives
// at IOAPIC pin 2, as on a PC.
const (
	IRQTimer = 0
	IRQCOM2  = 3
	IRQCOM1  = 4
	IRQRTC   = 8
	IRQSCI   = 9 // level-triggered, active high
	timerPin = 2

	ioapicID = 0 // what KVM's IOAPIC says after a reset
)

var irqs = []span{
	{"timer", IRQTimer, 1, "PIT, in the kernel"},
	{"cascade", 2, 1, "PIC, slave to master; IOAPIC pin 2 is the timer's"},
	{"COM2", IRQCOM2, 1, ""},
	{"COM1", IRQCOM1, 1, ""},
	{"RTC", IRQRTC, 1, "alarm, update"},
	{"SCI", IRQSCI, 1, "ACPI events"},
}
