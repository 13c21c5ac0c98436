package kvm

import (
	"errors"
	"fmt"

	hype "github.com/c35s/hype/kvm"
	"golang.org/x/sys/unix"

	"vmm/memory"
)

// GSI numbers an interrupt line of the VM. 0 to 23 are the pins of the PICs and
// the IOAPIC, the rest is free for MSIs.
type GSI uint32

// FirstMSI is the first GSI that is no pin.
const FirstMSI GSI = ioapicPins

// ChipID names a chip of the interrupt controller.
type ChipID uint32

func (id ChipID) String() string {
	switch id {
	case ChipPICMaster:
		return "master PIC"
	case ChipPICSlave:
		return "slave PIC"
	case ChipIOAPIC:
		return "IOAPIC"
	}
	return fmt.Sprintf("chip %d", uint32(id))
}

// MSI is a message-signalled interrupt: a write of Data to Addr, which a local
// APIC understands.
type MSI struct {
	Addr memory.GPA
	Data uint32
}

func (m MSI) String() string { return fmt.Sprintf("msi %v=%#x", m.Addr, m.Data) }

// CreateIRQChip makes the in-kernel PICs and IOAPIC, and a local APIC in each vCPU
// that is created later (KVM api 4.24).
func (vm *VM) CreateIRQChip() error {
	return vm.do("KVM_CREATE_IRQCHIP", func() error { return hype.CreateIRQChip(vm.vm) })
}

// IRQChip reads a chip's state (KVM api 4.26).
func (vm *VM) IRQChip(id ChipID) (IRQChip, error) {
	chip := IRQChip{ID: id}
	_, err := pass(&vm.handle, reqGetIRQChip, &chip)
	return chip, with(err, "%v", id)
}

// SetIRQChip writes a chip's state (KVM api 4.27).
func (vm *VM) SetIRQChip(chip *IRQChip) error {
	_, err := pass(&vm.handle, reqSetIRQChip, chip)
	return with(err, "%v", chip.ID)
}

// CreatePIT2 makes the in-kernel i8254 timer (KVM api 4.71). Flags is 0 or
// PITSpeakerDummy.
func (vm *VM) CreatePIT2(flags uint32) error {
	err := vm.do("KVM_CREATE_PIT2", func() error { return hype.CreatePIT2(vm.vm, &PITConfig{Flags: flags}) })
	return with(err, "flags %#x", flags)
}

// PIT2 reads the timer's state (KVM api 4.73).
func (vm *VM) PIT2() (PIT2, error) {
	var s PIT2
	_, err := pass(&vm.handle, reqGetPIT2, &s)
	return s, err
}

// SetPIT2 writes the timer's state (KVM api 4.74).
func (vm *VM) SetPIT2(s *PIT2) error {
	_, err := pass(&vm.handle, reqSetPIT2, s)
	return err
}

// ChipRoute leads a GSI to a pin of a chip: 0-7 of a PIC, 0-23 of the IOAPIC.
func ChipRoute(gsi GSI, chip ChipID, pin uint32) RoutingEntry {
	return RoutingEntry{GSI: gsi, Type: routingIRQChip, U: [8]uint32{uint32(chip), pin}}
}

// MSIRoute leads a GSI to an MSI.
func MSIRoute(gsi GSI, m MSI) RoutingEntry {
	return RoutingEntry{GSI: gsi, Type: routingMSI, U: [8]uint32{uint32(m.Addr), uint32(m.Addr >> 32), m.Data}}
}

// ChipRoutes are the routes of a PC's pins, which every routing table must repeat:
// GSI 0-15 lead to the PICs, 0-23 to the IOAPIC. The timer's GSI 0 arrives at IOAPIC
// pin 2, where PCs have it and where the ACPI tables must say it is (an
// interrupt source override from 0 to 2); the PICs' cascade, GSI 2, goes to
// no IOAPIC pin.
func ChipRoutes() []RoutingEntry {
	var routes []RoutingEntry
	for gsi := range GSI(ioapicPins) {
		switch {
		case gsi < 8:
			routes = append(routes, ChipRoute(gsi, ChipPICMaster, uint32(gsi)))
		case gsi < 16:
			routes = append(routes, ChipRoute(gsi, ChipPICSlave, uint32(gsi-8)))
		}
		switch gsi {
		case 0:
			routes = append(routes, ChipRoute(gsi, ChipIOAPIC, 2))
		case 2:
		default:
			routes = append(routes, ChipRoute(gsi, ChipIOAPIC, uint32(gsi)))
		}
	}
	return routes
}

// SetGSIRouting replaces the whole routing table (KVM api 4.52).
func (vm *VM) SetGSIRouting(routes []RoutingEntry) error {
	table, entries := flexible[irqRouting, RoutingEntry](len(routes))
	table.N = uint32(copy(entries, routes))
	_, err := pass(&vm.handle, reqSetGSIRouting, table)
	return with(err, "with %d entries", len(routes))
}

// IRQLine sets the level of a pin (KVM api 4.25).
func (vm *VM) IRQLine(gsi GSI, high bool) error {
	arg := irqLevel{GSI: gsi}
	if high {
		arg.Level = 1
	}
	_, err := pass(&vm.handle, reqIRQLine, &arg)
	if err != nil {
		return with(err, "gsi %d level %d", gsi, arg.Level)
	}
	return nil
}

// SignalMSI delivers an interrupt without a route (KVM api 4.70). It says whether
// a vCPU took it; false means that the guest blocks it or that it addresses no
// vCPU, as a guest may have it do.
func (vm *VM) SignalMSI(m MSI) (delivered bool, err error) {
	arg := msiMessage{AddressLo: uint32(m.Addr), AddressHi: uint32(m.Addr >> 32), Data: m.Data}
	n, err := pass(&vm.handle, reqSignalMSI, &arg)
	if errors.Is(err, unix.EPERM) { // the kernel's bare -1, when it has searched all vCPUs in vain
		return false, nil
	}
	if err != nil {
		return false, with(err, "%v", m)
	}
	return n > 0, nil
}

// AssignIRQFD makes each signal of the eventfd fd an edge on gsi (KVM api 4.75). The
// kernel keeps its own reference to the eventfd.
func (vm *VM) AssignIRQFD(fd int, gsi GSI) error {
	return vm.irqfd(&irqfdConfig{Fd: uint32(fd), GSI: uint32(gsi)})
}

// AssignResampleIRQFD is AssignIRQFD for a level-triggered pin: a signal of fd
// raises it, the guest's end of interrupt lowers it and signals the eventfd
// resample, so that a device which still wants attention can signal fd again.
func (vm *VM) AssignResampleIRQFD(fd int, gsi GSI, resample int) error {
	return vm.irqfd(&irqfdConfig{Fd: uint32(fd), GSI: uint32(gsi), Flags: irqfdResample, ResampleFD: uint32(resample)})
}

// DeassignIRQFD undoes either. When it returns, no interrupt from fd is on its way
// in the kernel any more.
func (vm *VM) DeassignIRQFD(fd int, gsi GSI) error {
	return vm.irqfd(&irqfdConfig{Fd: uint32(fd), GSI: uint32(gsi), Flags: irqfdDeassign})
}

func (vm *VM) irqfd(arg *irqfdConfig) error {
	err := vm.do("KVM_IRQFD", func() error { return hype.IRQFD(vm.vm, arg) })
	return with(err, "fd %d gsi %d flags %#x", int32(arg.Fd), arg.GSI, arg.Flags)
}

// IOEvent is a guest's write that signals an eventfd instead of ending KVM_RUN
// (KVM api 4.59).
type IOEvent struct {
	FD   int
	PIO  bool       // Addr is an I/O port, not an address
	Addr memory.GPA // of the write
	Len  uint32     // 1, 2, 4 or 8 bytes; 0 matches a write of any length
	// With Match only a write of Data counts; Len must not be 0 then.
	Match bool
	Data  uint64
}

func (e IOEvent) String() string {
	space, match := "mmio", ""
	if e.PIO {
		space = "port"
	}
	if e.Match {
		match = fmt.Sprintf("=%#x", e.Data)
	}
	return fmt.Sprintf("fd %d %s %v len %d%s", e.FD, space, e.Addr, e.Len, match)
}

// AssignIOEvent starts it.
func (vm *VM) AssignIOEvent(e IOEvent) error { return vm.ioevent(e, 0) }

// DeassignIOEvent ends it; e is what was assigned.
func (vm *VM) DeassignIOEvent(e IOEvent) error { return vm.ioevent(e, ioeventfdDeassign) }

func (vm *VM) ioevent(e IOEvent, flags uint32) error {
	arg := ioeventfd{Addr: uint64(e.Addr), Len: e.Len, FD: int32(e.FD), Flags: flags}
	if e.PIO {
		arg.Flags |= ioeventfdPIO
	}
	if e.Match {
		arg.Flags |= ioeventfdDatamatch
		arg.Datamatch = e.Data
	}
	_, err := pass(&vm.handle, reqIOEventFD, &arg)
	return with(err, "%v flags %#x", e, arg.Flags)
}
