package kvm_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/kvm"
	"vmm/kvm/kvmtest"
	"vmm/memory"
)

func eventFD(t *testing.T) *sys.EventFD {
	t.Helper()
	e, err := sys.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// waiting is a program that waits for interrupts. The handler of vector v, at
// handler(v), tells of it on port v.
var waiting = []byte{
	0xfb,       // sti
	0xf4,       // 1: hlt
	0xeb, 0xfd, // jmp 1b
}

const vector = 0x40

func handler(v int) memory.GPA { return kvmtest.Code + 0x100 + 0x10*memory.GPA(v) }

// newWaiting makes a guest whose local APIC is switched on, with handlers for vector
// and the one above it.
func newWaiting(t *testing.T) *kvmtest.Guest {
	t.Helper()
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{IRQChip: true}, waiting)
	for v := vector; v < vector+2; v++ {
		copy(g.RAM[handler(v):], []byte{
			0xe6, byte(v), // out v, al
			0x48, 0xcf, // iretq
		})
		g.Gate(v, handler(v))
	}
	lapic, err := g.CPU.LAPIC()
	if err != nil {
		t.Fatal(err)
	}
	lapic.Regs[0xf1] |= 1 // spurious-interrupt vector register, bit 8: APIC enabled
	if err := g.CPU.SetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
	return g
}

func wantInterrupt(t *testing.T, g *kvmtest.Guest, v int) {
	t.Helper()
	g.Run(kvm.ExitIO)
	io, err := g.CPU.IO()
	if err != nil {
		t.Fatal(err)
	}
	if int(io.Port) != v {
		t.Fatalf("the guest took vector %#x; want %#x", io.Port, v)
	}
}

func msi(v int) kvm.MSI { return kvm.MSI{Addr: 0xfee00000, Data: uint32(v)} }

// An eventfd becomes the MSI that its GSI leads to; a new table leads it elsewhere.
func TestIRQFDWithMSIRoute(t *testing.T) {
	g := newWaiting(t)
	gsi := kvm.FirstMSI + 3
	route := func(v int) {
		t.Helper()
		if err := g.VM.SetGSIRouting(append(kvm.ChipRoutes(), kvm.MSIRoute(gsi, msi(v)))); err != nil {
			t.Fatal(err)
		}
	}
	e := eventFD(t)
	route(vector)
	if err := g.VM.AssignIRQFD(e.FD(), gsi); err != nil {
		t.Fatal(err)
	}
	e.Signal()
	wantInterrupt(t, g, vector)
	endOfInterrupt(t, g)
	route(vector + 1)
	done := make(chan error, 1)
	go func() { done <- e.Signal() }() // at any moment: the vCPU may be asleep by then
	wantInterrupt(t, g, vector+1)
	if err := <-done; err != nil {
		t.Fatal(err)
	}

	if err := g.VM.DeassignIRQFD(e.FD(), gsi); err != nil {
		t.Fatal(err)
	}
	e.Signal()
	if !e.Pending() {
		t.Error("a deassigned irqfd still takes its eventfd's signals")
	}
}

// endOfInterrupt does what a guest's write to the EOI register does, from outside: nothing
// is in service any more.
func endOfInterrupt(t *testing.T, g *kvmtest.Guest) {
	t.Helper()
	lapic, err := g.CPU.LAPIC()
	if err != nil {
		t.Fatal(err)
	}
	clear(lapic.Regs[0x100:0x180]) // ISR
	if err := g.CPU.SetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
}

func TestSignalMSI(t *testing.T) {
	g := newWaiting(t)
	delivered, err := g.VM.SignalMSI(msi(vector))
	if err != nil || !delivered {
		t.Fatalf("SignalMSI() = %v, %v; want true", delivered, err)
	}
	wantInterrupt(t, g, vector)
	nobody := kvm.MSI{Addr: 0xfee05000, Data: vector} // APIC id 5
	if delivered, err := g.VM.SignalMSI(nobody); err != nil || delivered {
		t.Errorf("SignalMSI(%v) = %v, %v; want false", nobody, delivered, err)
	}
}

// Nobody has set the chips up, so no interrupt results; their state tells that
// the line has arrived.
func TestIRQLineReachesTheChips(t *testing.T) {
	g := newWaiting(t)
	if err := g.VM.SetGSIRouting(kvm.ChipRoutes()); err != nil {
		t.Fatal(err)
	}
	irr := func(id kvm.ChipID) byte {
		t.Helper()
		chip, err := g.VM.IRQChip(id)
		if err != nil {
			t.Fatal(err)
		}
		return chip.State[1] // kvm_pic_state.irr
	}
	if err := g.VM.IRQLine(4, true); err != nil {
		t.Fatal(err)
	}
	if got := irr(kvm.ChipPICMaster); got != 1<<4 {
		t.Errorf("master PIC's IRR with line 4 high = %#x; want 0x10", got)
	}
	if err := g.VM.IRQLine(10, true); err != nil {
		t.Fatal(err)
	}
	if got := irr(kvm.ChipPICSlave); got != 1<<2 {
		t.Errorf("slave PIC's IRR with line 10 high = %#x; want 4", got)
	}
}

func TestResampleIRQFD(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	kvmtest.NeedCap(t, s, kvm.CapIRQFDResample)
	g := kvmtest.NewGuest(t, s, kvmtest.Config{IRQChip: true}, waiting)
	e, resample := eventFD(t), eventFD(t)
	if err := g.VM.AssignResampleIRQFD(e.FD(), 10, resample.FD()); err != nil {
		t.Fatal(err)
	}
	err := g.VM.AssignResampleIRQFD(e.FD(), 10, resample.FD())
	if !errors.Is(err, unix.EBUSY) {
		t.Errorf("the second assignment = %v; want EBUSY", err)
	}
	if err := g.VM.DeassignIRQFD(e.FD(), 10); err != nil {
		t.Error(err)
	}
	if err := g.VM.AssignIRQFD(e.FD(), 10); err != nil {
		t.Errorf("assignment after deassignment = %v", err)
	}
}

// Writes that match an IOEvent signal its eventfd and do not leave KVM_RUN.
func TestIOEventFD(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, nil)
	for _, c := range []struct {
		event   kvm.IOEvent
		program []byte // one write
		signals bool
	}{
		{kvm.IOEvent{Addr: kvmtest.Device}, []byte{0x66, 0x89, 0x03}, true},                                 // mov [rbx], ax; any length
		{kvm.IOEvent{Addr: kvmtest.Device}, []byte{0x89, 0x03}, true},                                       // mov [rbx], eax; any length
		{kvm.IOEvent{Addr: kvmtest.Device + 4}, []byte{0x66, 0x89, 0x03}, false},                            // another address
		{kvm.IOEvent{Addr: kvmtest.Device, Len: 2}, []byte{0x66, 0x89, 0x03}, true},                         // its length
		{kvm.IOEvent{Addr: kvmtest.Device, Len: 4}, []byte{0x66, 0x89, 0x03}, false},                        // another length
		{kvm.IOEvent{Addr: kvmtest.Device, Len: 4, Match: true, Data: 7}, []byte{0x89, 0x03}, true},         // its value
		{kvm.IOEvent{Addr: kvmtest.Device, Len: 4, Match: true, Data: 8}, []byte{0x89, 0x03}, false},        // another value
		{kvm.IOEvent{PIO: true, Addr: 0x60, Len: 1}, []byte{0xe6, 0x60}, true},                              // out 0x60, al
		{kvm.IOEvent{PIO: true, Addr: 0x60, Len: 1, Match: true, Data: 7}, []byte{0xe6, 0x60}, true},        // its value
		{kvm.IOEvent{PIO: true, Addr: 0x61, Len: 1}, []byte{0xe6, 0x60}, false},                             // another port
		{kvm.IOEvent{PIO: true, Addr: memory.GPA(kvmtest.Device), Len: 1}, []byte{0x66, 0x89, 0x03}, false}, // port space is not memory
	} {
		e := eventFD(t)
		c.event.FD = e.FD()
		program := append([]byte{
			0xb8, 7, 0, 0, 0, // mov eax, 7
			0xbb, 0x00, 0x00, 0x00, 0x20, // mov ebx, Device
		}, c.program...)
		g.Load(append(program, 0xf4)) // hlt
		if err := g.VM.AssignIOEvent(c.event); err != nil {
			t.Errorf("AssignIOEvent(%v) = %v", c.event, err)
			continue
		}
		exit := kvm.ExitMMIO
		if c.program[0] == 0xe6 {
			exit = kvm.ExitIO
		}
		if !c.signals {
			g.Run(exit)
		}
		g.Run(kvm.ExitHLT)
		if got := e.Pending(); got != c.signals {
			t.Errorf("%v: signalled %v; want %v", c.event, got, c.signals)
		}
		if err := g.VM.DeassignIOEvent(c.event); err != nil {
			t.Errorf("DeassignIOEvent(%v) = %v", c.event, err)
		}
		g.Load(nil)
		g.Run(exit) // without it the same write is an exit
		g.Run(kvm.ExitHLT)
	}
}

// The table repeats the routes that the kernel needs for a PC's pins.
func TestChipRoutes(t *testing.T) {
	pins := make(map[[2]uint32]kvm.GSI)
	for _, r := range kvm.ChipRoutes() {
		pin := [2]uint32{r.U[0], r.U[1]}
		if other, ok := pins[pin]; ok {
			t.Errorf("pin %d of %v belongs to GSI %d and %d", pin[1], kvm.ChipID(pin[0]), other, r.GSI)
		}
		pins[pin] = r.GSI
		if r.GSI >= kvm.FirstMSI {
			t.Errorf("GSI %d of a pin is among the MSIs'", r.GSI)
		}
	}
	for _, c := range []struct {
		chip kvm.ChipID
		pin  uint32
		want kvm.GSI
	}{{kvm.ChipPICMaster, 0, 0}, {kvm.ChipPICSlave, 7, 15}, {kvm.ChipIOAPIC, 2, 0}, {kvm.ChipIOAPIC, 4, 4}, {kvm.ChipIOAPIC, 23, 23}} {
		if got, ok := pins[[2]uint32{uint32(c.chip), c.pin}]; !ok || got != c.want {
			t.Errorf("pin %d of %v has GSI %d, %v; want %d", c.pin, c.chip, got, ok, c.want)
		}
	}
}
