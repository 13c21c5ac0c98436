package boot

import (
	"encoding/binary"
	"fmt"

	"vmm/device"
)

// The ACPI tables (ACPI 6.5, chapter 5; MCFG: PCI Firmware Specification 3.3,
// 4.1.2). The machine is not "hardware-reduced": it has the fixed registers of
// device.PM. There is no SMI command port, so it is in ACPI mode always.

// acpiTables returns all tables for cpus vCPUs, to be put at addrACPI. The
// RSDP is the first byte.
func acpiTables(cpus int) []byte {
	const rsdpSize = 36
	area := make([]byte, rsdpSize, 4096)
	place := func(table []byte, align int) uint64 {
		for len(area)%align != 0 {
			area = append(area, 0)
		}
		at := uint64(addrACPI) + uint64(len(area))
		area = append(area, table...)
		return at
	}
	facs := place(facs(), 64) // the one that has to be aligned
	dsdt := place(dsdt(cpus), 16)
	xsdt := place(xsdt(
		place(fadt(facs, dsdt), 16),
		place(madt(cpus), 16),
		place(mcfg(), 16),
	), 16)
	copy(area, rsdp(xsdt))
	return area
}

const oemID = "VMM   "

// sdt puts the header that tables have in common in front of body.
func sdt(signature string, revision byte, body []byte) []byte {
	le := binary.LittleEndian
	t := append([]byte(nil), signature...)
	t = le.AppendUint32(t, uint32(36+len(body)))
	t = append(t, revision, 0) // the checksum is at offset 9
	t = append(t, oemID+"VMM-PC  "...)
	t = le.AppendUint32(t, 1)
	t = append(t, "VMM "...)
	t = le.AppendUint32(t, 1)
	t = append(t, body...)
	t[9] = checksum(t)
	return t
}

// checksum makes the sum of all bytes zero.
func checksum(b []byte) (sum byte) {
	for _, v := range b {
		sum -= v
	}
	return sum
}

func rsdp(xsdt uint64) []byte {
	le := binary.LittleEndian
	t := append([]byte("RSD PTR \x00"), oemID...)
	t = append(t, 2)           // revision: there is an XSDT
	t = le.AppendUint32(t, 0)  // no RSDT
	t[8] = checksum(t)         // of ACPI 1.0's 20 bytes
	t = le.AppendUint32(t, 36) // length
	t = le.AppendUint64(t, xsdt)
	t = append(t, 0, 0, 0, 0) // checksum, reserved
	t[32] = checksum(t)
	return t
}

func xsdt(tables ...uint64) []byte {
	var body []byte
	for _, at := range tables {
		body = binary.LittleEndian.AppendUint64(body, at)
	}
	return sdt("XSDT", 1, body)
}

// facs has room for a global lock that nobody else takes and a waking vector
// that is never used: the machine knows no sleep but S5.
func facs() []byte {
	t := make([]byte, 64)
	copy(t, "FACS")
	t[4] = 64
	t[32] = 2 // version
	return t
}

// fadt is the Fixed ACPI Description Table, revision 6. Offsets are those of
// ACPI 6.5, table 5.9.
func fadt(facs, dsdt uint64) []byte {
	const (
		header = 36
		size   = 276

		// IA-PC boot architecture: with none of these bits the OS looks for
		// things that are not there.
		legacyDevices = 1 << 0 // there are UARTs
		noVGA         = 1 << 2
		// Bit 1 clear: no keyboard controller. Bit 3 clear: MSIs work. Bit 5
		// clear: there is an RTC.

		wbinvd     = 1 << 0
		procC1     = 1 << 2
		noSleepBtn = 1 << 5 // bit 4 clear: the power button is a fixed feature
		noRTCWake  = 1 << 6
		timer32    = 1 << 8
		resetReg   = 1 << 10
	)
	t := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint32(t[36:], uint32(facs))
	le.PutUint32(t[40:], uint32(dsdt))
	le.PutUint16(t[46:], IRQSCI)
	le.PutUint32(t[56:], PortPM+device.PMEvent)
	le.PutUint32(t[64:], PortPM+device.PMControl)
	le.PutUint32(t[76:], PortPM+device.PMTimer)
	t[88], t[89], t[91] = device.PMEventSize, device.PMControlSize, device.PMTimerSize
	le.PutUint16(t[96:], 0xfff) // C2 and C3 take longer than
	le.PutUint16(t[98:], 0xfff) // allowed: there are none
	t[108] = device.RTCCentury
	le.PutUint16(t[109:], legacyDevices|noVGA)
	le.PutUint32(t[112:], wbinvd|procC1|noSleepBtn|noRTCWake|timer32|resetReg)
	ioRegister(t[116:], PortReset, 1)
	t[128] = device.ResetValue
	t[131] = 5 // minor revision: 6.5
	le.PutUint64(t[140:], dsdt)
	ioRegister(t[148:], PortPM+device.PMEvent, device.PMEventSize)
	ioRegister(t[172:], PortPM+device.PMControl, device.PMControlSize)
	ioRegister(t[208:], PortPM+device.PMTimer, device.PMTimerSize)
	return sdt("FACP", 6, t[header:])
}

// ioRegister writes a generic address structure for size bytes at port.
func ioRegister(t []byte, port uint16, size byte) {
	const systemIO = 1
	access := size/2 + 1 // 1: byte, 2: word, 3: doubleword
	if size == device.PMEventSize {
		access = 2 // status and enable are registers of 16 bits each
	}
	t[0], t[1], t[2], t[3] = systemIO, 8*size, 0, access
	binary.LittleEndian.PutUint64(t[4:], uint64(port))
}

// madt tells of the interrupt controllers, all of them KVM's.
func madt(cpus int) []byte {
	const pcAT = 1 // two 8259s, to be masked when the IOAPIC is used
	le := binary.LittleEndian
	t := le.AppendUint32(nil, uint32(LocalAPIC))
	t = le.AppendUint32(t, pcAT)
	for id := range cpus {
		const enabled = 1
		t = append(t, 0, 8, byte(id), byte(id)) // local APIC: processor UID, APIC ID
		t = le.AppendUint32(t, enabled)
	}
	t = append(t, 1, 12, ioapicID, 0)
	t = le.AppendUint32(t, uint32(IOAPIC))
	t = le.AppendUint32(t, 0) // first GSI
	for _, o := range []struct {
		irq   byte
		gsi   uint32
		flags uint16
	}{
		{IRQTimer, timerPin, 0}, // as the bus has it: edge, active high
		{IRQSCI, IRQSCI, 1<<0 | 3<<2},
	} {
		t = append(t, 2, 10, 0, o.irq) // source override, ISA bus
		t = le.AppendUint32(t, o.gsi)
		t = le.AppendUint16(t, o.flags)
	}
	const allCPUs, lint1 = 0xff, 1
	t = append(t, 4, 6, allCPUs, 0, 0, lint1) // NMI
	return sdt("APIC", 5, t)
}

// mcfg tells where PCI configuration space is mapped.
func mcfg() []byte {
	le := binary.LittleEndian
	t := make([]byte, 8) // reserved
	t = le.AppendUint64(t, uint64(ECAM))
	t = append(t, 0, 0, 0, lastBus) // segment, first and last bus
	t = le.AppendUint32(t, 0)
	return sdt("MCFG", 1, t)
}

// dsdt names the devices that no bus can enumerate, and how to power off.
func dsdt(cpus int) []byte {
	pci := acpiDevice("PCI0",
		define("_HID", amlEISA("PNP0A08")), // PCI Express, so that ECAM is used
		define("_CID", amlEISA("PNP0A03")),
		define("_UID", amlInteger(0)),
		define("_SEG", amlInteger(0)),
		define("_BBN", amlInteger(0)),
		define("_CRS", resources(
			window16(spaceBus, spaceBusFlags, 0, lastBus),
			portRange(PortPCIAddress, 8),
			window16(spaceIO, spaceIOFlags, 0, PortPCIAddress-1),
			window16(spaceIO, spaceIOFlags, PortPCIAddress+8, 0xffff),
			window32(spaceMemory, spaceMemoryFlags, uint32(PCIWindow), uint32(PCIWindow+PCIWindowSize-1)),
		)),
		osc(),
	)
	// What belongs to the machine itself, not to be given to a device.
	board := acpiDevice("MBRD",
		define("_HID", amlEISA("PNP0C02")),
		define("_UID", amlInteger(0)),
		define("_CRS", resources(fixedMemory(uint32(ECAM), ECAMSize), portRange(PortPM, device.PMPorts))),
	)
	rtc := acpiDevice("RTC",
		define("_HID", amlEISA("PNP0B00")),
		define("_CRS", resources(portRange(PortRTC, device.RTCPorts), isaIRQ(IRQRTC))),
	)
	uart := func(name string, n uint64, port uint16, irq int) aml {
		return acpiDevice(name,
			define("_HID", amlEISA("PNP0501")),
			define("_UID", amlInteger(n)),
			define("_CRS", resources(portRange(port, device.UARTPorts), isaIRQ(irq))),
		)
	}
	pvpanic := acpiDevice("PEVT",
		define("_HID", amlString("QEMU0001")),
		define("_CRS", resources(portRange(PortPVPanic, 1))),
		define("_STA", amlInteger(0xf)), // present, enabled, shown, working
	)
	devices := []aml{pci, board, rtc, uart("COM1", 1, PortCOM1, IRQCOM1), uart("COM2", 2, PortCOM2, IRQCOM2), pvpanic}
	for n := range cpus {
		devices = append(devices, acpiDevice(fmt.Sprintf("C%03X", n),
			define("_HID", amlString("ACPI0007")),
			define("_UID", amlInteger(uint64(n))),
		))
	}
	s5 := define("_S5", amlList(amlInteger(device.SleepTypeS5), amlInteger(0), amlInteger(0), amlInteger(0)))
	const revision = 2 // integers have 64 bits
	return sdt("DSDT", revision, join(s5, scope("_SB", devices...)))
}

// osc is how the OS asks for control of PCI Express features (PCI Firmware
// Specification 3.3, 4.5). Only the capability structures are there to be
// given: nothing on the bus can be hot-plugged, reports errors or power
// management events.
func osc() aml {
	const (
		unknownUUID     = 1 << 2
		unknownRevision = 1 << 3
		masked          = 1 << 4
		capabilities    = 1 << 4 // of the control field
	)
	status, control := amlName("CDW1"), amlName("CDW3")
	return method("_OSC", 4,
		dwordField(arg(3), 0, "CDW1"),
		when(equal(arg(0), uuid("33db4d5b-1ff7-401c-9657-7441c03dd766")),
			dwordField(arg(3), 8, "CDW3"),
			when(not(equal(arg(1), amlInteger(1))), or(status, amlInteger(unknownRevision), status)),
			and(control, amlInteger(capabilities), local(0)),
			when(not(equal(local(0), control)), or(status, amlInteger(masked), status)),
			store(local(0), control),
		),
		otherwise(or(status, amlInteger(unknownUUID), status)),
		giveBack(arg(3)),
	)
}
