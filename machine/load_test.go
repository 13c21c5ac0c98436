package machine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"

	"vmm/boot"
	"vmm/kvm"
	"vmm/memory"
	"vmm/pci/pcitest"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/scsitest"
	"vmm/virtio/virtiotest"
)

// run runs m until the test ends or stop is called, which answers Run's result.
func run(t testing.TB, m *Machine) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	var result error
	ended := false
	stop = func() error {
		if !ended {
			cancel()
			result, ended = <-done, true
		}
		return result
	}
	t.Cleanup(func() { stop() })
	return stop
}

func pause(t testing.TB, m *Machine) {
	t.Helper()
	if err := m.Pause(context.Background()); err != nil {
		t.Fatalf("Pause() = %v", err)
	}
}

func saved(t testing.TB, m *Machine) *vmmv1.MachineState {
	t.Helper()
	s, err := m.Save(context.Background())
	if err != nil {
		t.Fatalf("Save() = %v", err)
	}
	return s
}

// travelled is what a peer makes of a message.
func travelled[M proto.Message](t testing.TB, m M) M {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	got := m.ProtoReflect().New().Interface()
	if err := proto.Unmarshal(b, got); err != nil {
		t.Fatal(err)
	}
	return got.(M)
}

// image is a copy of the kernel of m's guest.
func image(t testing.TB, m *Machine) *Image {
	t.Helper()
	kernel, initrd, err := m.Images()
	if err != nil || initrd != nil {
		t.Fatalf("Images() = %v, %v, %v; want a kernel", kernel, initrd, err)
	}
	b := make([]byte, kernel.Size)
	if _, err := kernel.Data.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	kernel.Data = bytes.NewReader(b)
	return kernel
}

// incoming builds a machine for m's guest, memory included, that writes to the
// console.
func incoming(t testing.TB, m *Machine, out *console) *Machine {
	t.Helper()
	cfg := m.cfg
	cfg.Kernel, cfg.Console = "", out
	n, err := NewIncoming(cfg, Incoming{Requirements: travelled(t, m.Requirements()), Kernel: image(t, m)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	for i, r := range m.ram.Regions() {
		copy(n.ram.Regions()[i].Bytes, r.Bytes)
	}
	return n
}

// enableAPIC switches the local APIC on: the spurious vector register.
func (a asm) enableAPIC() asm {
	return a.raw(0xc7, 0x05).u32(int(boot.LocalAPIC) + 0xf0).u32(0x1ff) // mov dword [SVR], 1ffh
}

// idle is a guest that says hello and halts for good.
func idle() asm { return asm{}.enableAPIC().print("idle").raw(0xf4, 0xeb, 0xfd) } // hlt; jmp back

// firstVector is the interrupt vector of a device's first MSI-X vector in
// these tests; slots are 16 apart.
const firstVector = 0x40

// drive starts both virtio devices of a paused machine as their drivers would,
// with every vector unmasked.
func drive(t testing.TB, m *Machine) []*virtiotest.Device {
	t.Helper()
	bus := &virtiotest.Bus{Host: m.pci, Kernel: new(pcitest.Kernel)}
	mem := &virtiotest.Memory{RAM: m.ram}
	mem.Alloc(8<<20, 1) // the guest's own
	var devices []*virtiotest.Device
	for slot := 1; slot <= 2; slot++ {
		d, err := virtiotest.Probe(bus, slot)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Start(mem, virtiotest.Version1|virtiotest.EventIdx|virtiotest.IndirectDesc); err != nil {
			t.Fatal(err)
		}
		for v := range d.Vectors {
			bus.Write(d.Table+memory.GPA(16*v)+8, 4, uint64(firstVector+16*slot+v))
		}
		devices = append(devices, d)
	}
	return devices
}

// entropy has the entropy device fill a buffer.
func entropy(d *virtiotest.Device) {
	d.Rings[0].Add(virtiotest.Buffer{GPA: 15 << 20, Len: 64, Write: true})
	d.Rings[0].Kick()
	for {
		if _, ok := d.Rings[0].Reap(); ok {
			return
		}
		time.Sleep(time.Millisecond) // as a driver without interrupts would
	}
}

// still takes what goes on with time out of a state, and checks that it did not
// go back since before.
func still(t *testing.T, before, now *vmmv1.MachineState) *vmmv1.MachineState {
	t.Helper()
	now = proto.CloneOf(now)
	forward := func(what string, b, n uint64) {
		t.Helper()
		if n < b {
			t.Errorf("%s went back from %d to %d", what, b, n)
		}
	}
	for id, v := range now.Vcpus {
		at := msrIndex(v.Msrs, msrTSC)
		forward("the time-stamp counter", before.Vcpus[id].Msrs[at].Value, v.Msrs[at].Value)
		v.Msrs[at].Value, v.TscOffset = 0, nil
	}
	forward("the clock", before.Clock.ClockNs, now.Clock.ClockNs)
	forward("the PM timer", before.Pm.Timer, now.Pm.Timer)
	now.Clock, now.Pm.Timer = nil, 0
	return now
}

func TestSaveLoadSaveIsTheIdentity(t *testing.T) {
	m, out := newMachine(t, idle(), func(c *Config) { c.CPUs = 2 })
	stop := run(t, m)
	out.waitFor("idle")
	pause(t, m)
	devices := drive(t, m)
	rng := devices[1]
	rng.Bus.Write(rng.Table+16+12, 4, 1) // mask the queue's vector: its interrupt stays pending
	entropy(rng)
	if n, err := m.ConsoleInput(t.Context(), []byte("typed")); n != 5 || err != nil {
		t.Fatalf("ConsoleInput() = %d, %v; want all of it", n, err)
	}
	m.PowerButton()
	m.ports.write(boot.PortRTC, []byte{0x40})
	m.ports.write(boot.PortRTC+1, []byte{0x99})
	m.ports.write(boot.PortReset, []byte{2})
	m.ports.write(boot.PortPCIAddress, []byte{0x10, 0x08, 0, 0x80})
	first := saved(t, m)
	if v := first.Pci.Functions[2].Vectors[1]; !v.Masked || !v.Pending {
		t.Errorf("the masked vector is %v; want it masked and pending", v)
	}
	if q := first.Virtio[1].Queues[0]; q.UsedIndex != 1 || q.LastAvail != 1 || !q.Enabled {
		t.Errorf("the entropy queue is %v after one request", q)
	}
	n := incoming(t, m, newConsole())
	if err := n.Load(travelled(t, first)); err != nil {
		t.Fatalf("Load() = %v", err)
	}
	second, err := n.save()
	if err != nil {
		t.Fatalf("Save() after Load = %v", err)
	}
	if diff := cmp.Diff(still(t, first, first), still(t, first, second), protocmp.Transform()); diff != "" {
		t.Errorf("state before and after:\n%s", diff)
	}
	if d := time.Duration(second.Clock.ClockNs - first.Clock.ClockNs); d > time.Minute {
		t.Errorf("the clock went on by %v", d)
	}
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Errorf("Run() = %v", err)
	}

	// The guest that goes on gets an interrupt of every vector that is enabled,
	// and none of the masked one.
	run(t, n)
	pause(t, n)
	third := saved(t, n)
	irr := func(vector int) bool {
		return third.Vcpus[0].Lapic[0x200+0x10*(vector/32)+vector%32/8]>>(vector%8)&1 == 1
	}
	for i, d := range devices {
		for v := range d.Vectors {
			masked := i == 1 && v == 1
			if got := irr(firstVector + 16*(i+1) + v); got == masked {
				t.Errorf("vector %d of the device in slot %d requested: %v; want %v", v, i+1, got, !masked)
			}
		}
	}
	if v := third.Pci.Functions[2].Vectors[1]; !v.Pending {
		t.Error("the masked vector is no more pending")
	}
}

// A guest that does port I/O all the time moves from machine to machine at
// random moments: every instruction is executed once.
func TestGuestMovesAtRandomMoments(t *testing.T) {
	a := asm{}.raw(0xb9).u32(3000).raw(0xb3, 0).raw(0x66, 0xba).u16(boot.PortCOM1) // mov ecx, 3000; mov bl, 0; mov dx, COM1
	loop := len(a)
	a = a.raw(0x88, 0xd8, 0xee, 0xfe, 0xc3, 0x49) // mov al, bl; out dx, al; inc bl; dec ecx
	a = a.raw(0x75, byte(loop-len(a)-2))          // jnz loop
	m, out := newMachine(t, a.poweroff(), func(c *Config) { c.CPUs = 2 })
	moves := 0
	for {
		done := make(chan error, 1)
		go func() { done <- m.Run(context.Background()) }()
		time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond) // a random moment is what this test is about
		err := m.Pause(t.Context())
		if errors.Is(err, ErrEnded) || moves == 8 {
			m.Resume()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			break
		}
		s := saved(t, m)
		n := incoming(t, m, out)
		if err := n.Load(travelled(t, s)); err != nil {
			t.Fatal(err)
		}
		if err := m.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		m = n
		moves++
	}
	got := []byte(out.String())
	if len(got) != 3000 || moves == 0 {
		t.Errorf("the guest wrote %d bytes in %d moves; want 3000, and some", len(got), moves)
	}
	for i, b := range got {
		if b != byte(i) {
			t.Fatalf("byte %d is %#x; want %#x", i, b, byte(i))
		}
	}
}

// A guest that lives from one timer interrupt to the next, each armed by the one
// before, moves at random moments: one that is lost is the last.
func TestTimerMovesAlong(t *testing.T) {
	const (
		idt, idtr, handler, stack = 0x200000, 0x201000, 0x202000, 0x280000

		vector = 0x50
		lvt    = int(boot.LocalAPIC) + 0x320
		divide = int(boot.LocalAPIC) + 0x3e0
		count  = int(boot.LocalAPIC) + 0x380
		eoi    = int(boot.LocalAPIC) + 0xb0
		period = 200_000 // KVM's timer runs at 1 GHz
	)
	store := func(a asm, at, v int) asm { return a.raw(0xc7, 0x05).u32(at).u32(v) } // mov dword [at], v
	a := asm{}.raw(0xbc).u32(stack).raw(0x0f, 0x01, 0x1d).u32(idtr).enableAPIC()    // mov esp, stack; lidt [idtr]
	a = store(store(store(a, divide, 0xb), lvt, vector), count, period)
	a = a.raw(0xfb, 0xf4, 0xeb, 0xfd) // sti; hlt; jmp back
	// The handler does not return, which a KVM that interprets guests may not
	// know how to: it begins anew.
	h := asm{}.raw(0xbc).u32(stack).print(".")
	h = store(store(h, eoi, 0), count, period).raw(0xfb, 0xf4, 0xeb, 0xfd)

	m, out := newMachine(t, a, nil)
	mem := m.ram.Regions()[0].Bytes
	binary.LittleEndian.PutUint64(mem[idt+8*vector:], handler&0xffff|0x08<<16|0x8e00<<32|handler>>16<<48)
	binary.LittleEndian.PutUint16(mem[idtr:], 0x7ff)
	binary.LittleEndian.PutUint32(mem[idtr+2:], idt)
	copy(mem[handler:], h)
	for range 10 {
		done := make(chan error, 1)
		go func() { done <- m.Run(context.Background()) }()
		dots := strings.Count(out.String(), ".")
		out.waitFor(strings.Repeat(".", dots+5))
		time.Sleep(time.Duration(rand.IntN(500)) * time.Microsecond) // a random moment is what this test is about
		pause(t, m)
		s := saved(t, m)
		n := incoming(t, m, out)
		if err := n.Load(travelled(t, s)); err != nil {
			t.Fatal(err)
		}
		if err := m.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		m = n
	}
}

// testUnitReady gives the controller a TEST UNIT READY for a target.
func testUnitReady(m *Machine, d *virtiotest.Device, target byte) {
	const header, response = 14 << 20, 14<<20 + 4096
	b, _ := m.ram.Slice(header, 51)
	clear(b)
	copy(b, []byte{1, target, 0x40})
	d.Rings[2].Add(virtiotest.Buffer{GPA: header, Len: 51}, virtiotest.Buffer{GPA: response, Len: 108, Write: true})
	d.Rings[2].Kick()
}

// A command that does not come back in time makes the save fail, and the guest
// runs on; when it has come back the save succeeds; after it the guest runs on
// too.
func TestSaveWithCommandInFlight(t *testing.T) {
	a := asm{}.enableAPIC().print("up")
	loop := len(a)
	a = a.print(".").raw(0xe9)
	a = a.u32(loop - len(a) - 4)
	m, out := newMachine(t, a, nil)
	held := scsitest.NewHeld(2)
	if err := m.scsi.Attach(3, held); err != nil {
		t.Fatal(err)
	}
	run(t, m)
	out.waitFor("up")
	if _, err := m.Save(t.Context()); !errors.Is(err, ErrNotPaused) {
		t.Errorf("Save() of a running machine = %v; want ErrNotPaused", err)
	}
	pause(t, m)
	scsi := drive(t, m)[0]
	testUnitReady(m, scsi, 3)
	command := <-held.Commands
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for range 3 {
		// Quiesce's own ctx may be found done before it is asked.
		err := m.whilePaused(t.Context(), func() error { return m.rest(over) })
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "target 3, operation code 0x00") {
			t.Errorf("Quiesce() = %v; want one that names the command", err)
		}
		if _, err := m.Save(over); !errors.Is(err, context.Canceled) {
			t.Errorf("Save() = %v; want its context's error", err)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		dots := strings.Count(out.String(), ".")
		out.waitFor(strings.Repeat(".", dots+3))
		pause(t, m)
	}
	command.Finish(0)
	for range 2 {
		if err := m.Quiesce(t.Context()); err != nil {
			t.Fatal(err)
		}
		s := saved(t, m)
		if q := s.Virtio[0].Queues[2]; q.LastAvail != q.UsedIndex || q.LastAvail == 0 {
			t.Errorf("the queue has taken %d requests and answered %d", q.LastAvail, q.UsedIndex)
		}
		testUnitReady(m, scsi, 3)
		if len(held.Commands) != 0 {
			t.Error("a machine that was saved starts a command")
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		(<-held.Commands).Finish(0)
		dots := strings.Count(out.String(), ".")
		out.waitFor(strings.Repeat(".", dots+3))
		pause(t, m)
	}
}

func TestResetAfterTheMove(t *testing.T) {
	// countBoots, but for the guest waiting in its first boot until it has moved:
	// until the byte at 0x300001 is set, which the test does.
	const moved = 0x300001
	wait := asm{}.print("w")
	loop := len(wait)
	wait = wait.raw(0x80, 0x3d).u32(moved).raw(0) // cmp byte [moved], 0
	wait = wait.raw(0x74, byte(loop-len(wait)-2)) // je loop
	code := append(wait, countBoots()...)
	for _, test := range []struct {
		name   string
		change func(*Incoming)
		want   string
		err    string
	}{
		{"with the kernel", func(*Incoming) {}, ".w.w.", ""},
		{"without", func(in *Incoming) { in.Kernel = nil }, ".", "without its kernel's image"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, out := newMachine(t, code, nil)
			stop := run(t, m)
			out.waitFor("w")
			pause(t, m)
			s := saved(t, m)
			in := Incoming{Requirements: m.Requirements(), Kernel: image(t, m)}
			test.change(&in)
			cfg := m.cfg
			there := newConsole()
			cfg.Kernel, cfg.Console = "", there
			n, err := NewIncoming(cfg, in)
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			copy(n.ram.Regions()[0].Bytes, m.ram.Regions()[0].Bytes)
			n.ram.Regions()[0].Bytes[moved] = 1
			if err := n.Load(s); err != nil {
				t.Fatal(err)
			}
			stop()
			err = n.Run(t.Context())
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("Run() = %v; want %q", err, test.err)
			}
			if got := there.String(); got != test.want {
				t.Errorf("console = %q; want %q", got, test.want)
			}
		})
	}
}

// idleState is a machine with an idle guest that was saved, and its state.
func idleState(t testing.TB) (*Machine, *vmmv1.MachineState) {
	t.Helper()
	m, out := newMachine(t, idle(), func(c *Config) { c.CPUs = 2 })
	run(t, m)
	out.waitFor("idle")
	pause(t, m)
	drive(t, m)
	return m, saved(t, m)
}

func TestLoadRefuses(t *testing.T) {
	m, good := idleState(t)
	n := incoming(t, m, newConsole())
	for name, test := range map[string]struct {
		change func(*vmmv1.MachineState)
		want   string
	}{
		"nothing":             {func(s *vmmv1.MachineState) { proto.Reset(s) }, "0 vCPUs"},
		"one vCPU":            {func(s *vmmv1.MachineState) { s.Vcpus = s.Vcpus[:1] }, "1 vCPUs; this machine has 2"},
		"vCPU order":          {func(s *vmmv1.MachineState) { s.Vcpus[1].Id = 0 }, "vCPU 1: id 0"},
		"MP state":            {func(s *vmmv1.MachineState) { s.Vcpus[0].MpState = 9 }, "MP state 9"},
		"no registers":        {func(s *vmmv1.MachineState) { s.Vcpus[0].Regs = nil }, "general registers: missing"},
		"no segment":          {func(s *vmmv1.MachineState) { s.Vcpus[0].Sregs.Cs = nil }, "segment CS: missing"},
		"segment":             {func(s *vmmv1.MachineState) { s.Vcpus[0].Sregs.Cs.Type = 1 << 8 }, "0x100 is too large"},
		"PDPTRs":              {func(s *vmmv1.MachineState) { s.Vcpus[0].Sregs.Pdptrs = make([]uint64, 3) }, "3 page-directory pointers"},
		"control registers":   {func(s *vmmv1.MachineState) { s.Vcpus[0].Sregs.Cr0 = 1 << 31 }, "KVM_SET_SREGS"},
		"XSAVE":               {func(s *vmmv1.MachineState) { s.Vcpus[0].Xsave = make([]byte, 1<<20) }, "XSAVE area of 1048576 bytes"},
		"XSAVE header":        {func(s *vmmv1.MachineState) { copy(s.Vcpus[0].Xsave[512:], bytes.Repeat([]byte{0xff}, 64)) }, "KVM_SET_XSAVE"},
		"XCRs":                {func(s *vmmv1.MachineState) { s.Vcpus[0].Xcrs = make([]*vmmv1.ExtendedControlRegister, 99) }, "99 extended control registers"},
		"debug registers":     {func(s *vmmv1.MachineState) { s.Vcpus[0].Debug.Db = nil }, "0 debug address registers"},
		"APIC":                {func(s *vmmv1.MachineState) { s.Vcpus[1].Lapic = s.Vcpus[1].Lapic[:1000] }, "vCPU 1: local APIC: 1000 bytes; want 1024"},
		"MSR missing":         {func(s *vmmv1.MachineState) { s.Vcpus[0].Msrs = s.Vcpus[0].Msrs[1:] }, "model-specific registers; this machine has"},
		"MSR unknown":         {func(s *vmmv1.MachineState) { s.Vcpus[0].Msrs[0].Index = 0xdead }, "model-specific register 0xdead at place 0"},
		"MSR value":           {func(s *vmmv1.MachineState) { s.Vcpus[0].Msrs[msrIndex(s.Vcpus[0].Msrs, 0x2ff)].Value = 0xffff }, "0x2ff"},
		"events":              {func(s *vmmv1.MachineState) { s.Vcpus[0].Events.Flags = 1 << 31 }, "KVM_SET_VCPU_EVENTS"},
		"IOAPIC":              {func(s *vmmv1.MachineState) { s.Irqchip.Ioapic = nil }, "IOAPIC: 0 bytes; want 216"},
		"PIT channels":        {func(s *vmmv1.MachineState) { s.Pit.Channels = s.Pit.Channels[:2] }, "PIT: 2 channels"},
		"PIT count":           {func(s *vmmv1.MachineState) { s.Pit.Channels[0].Count = 1 << 17 }, "PIT: count 131072"},
		"no clock":            {func(s *vmmv1.MachineState) { s.Clock = nil }, "clock: missing"},
		"clock":               {func(s *vmmv1.MachineState) { s.Clock.ClockNs = 1 << 63 }, "clock: 9223372036854775808 ns"},
		"function missing":    {func(s *vmmv1.MachineState) { s.Pci.Functions = s.Pci.Functions[:2] }, "functions in slots [0 1]"},
		"function's identity": {func(s *vmmv1.MachineState) { s.Pci.Functions[1].Config[0] ^= 1 }, "a different device"},
		"vectors":             {func(s *vmmv1.MachineState) { s.Pci.Functions[1].Vectors = nil }, "0 MSI-X vectors"},
		"devices swapped":     {func(s *vmmv1.MachineState) { s.Virtio[0], s.Virtio[1] = s.Virtio[1], s.Virtio[0] }, "SCSI controller: missing"},
		"queue in flight":     {func(s *vmmv1.MachineState) { s.Virtio[0].Queues[0].LastAvail++ }, "requests in flight"},
		"queue elsewhere":     {func(s *vmmv1.MachineState) { s.Virtio[0].Queues[0].Desc = 1 << 40 }, "not all RAM"},
		"queue size":          {func(s *vmmv1.MachineState) { s.Virtio[0].Queues[0].Size = 3 }, "power of two"},
		"queues":              {func(s *vmmv1.MachineState) { s.Virtio[0].Queues = s.Virtio[0].Queues[:1] }, "1 queues"},
		"UART":                {func(s *vmmv1.MachineState) { s.Uarts[0].Queue = make([]byte, 1<<20) }, "1048576 waiting"},
		"UART missing":        {func(s *vmmv1.MachineState) { s.Uarts = s.Uarts[:1] }, "1 UARTs"},
		"PM missing":          {func(s *vmmv1.MachineState) { s.Pm = nil }, "ACPI PM: missing"},
		"RTC":                 {func(s *vmmv1.MachineState) { s.Rtc.Ram = nil }, "RTC memory: 0 bytes"},
		"reset control":       {func(s *vmmv1.MachineState) { s.ResetControl.Value = 256 }, "reset control: 0x100"},
		"no image":            {func(s *vmmv1.MachineState) { s.Boot = nil }, "no kernel is named"},
		"another kernel":      {func(s *vmmv1.MachineState) { s.Boot.Kernel.Sha256[0] ^= 1 }, "is not the guest's"},
		"initrd missing":      {func(s *vmmv1.MachineState) { s.Boot.Initrd = &vmmv1.Image{Name: "i.img"} }, "initrd i.img is missing here"},
	} {
		s := proto.CloneOf(good)
		test.change(s)
		if n.guest != guestExpected { // something of the last one was loaded
			n = incoming(t, m, newConsole())
		}
		if err := n.Load(s); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Fatalf("%s: Load() = %v; want an error with %q", name, err, test.want)
		}
		if n.guest == guestSpoiled && n.Load(good) == nil {
			t.Errorf("%s: a Load succeeds after one that has failed half-way", name)
		}
	}
	for _, test := range []struct {
		guest guest
		want  string
	}{{guestExpected, "has not arrived"}, {guestSpoiled, "could not be loaded"}} {
		n := incoming(t, m, newConsole())
		n.guest = test.guest
		if err := n.Run(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("Run() = %v; want an error with %q", err, test.want)
		}
	}
	n = incoming(t, m, newConsole())
	if err := n.Load(good); err != nil {
		t.Errorf("Load() of what was not changed = %v", err)
	}
	if err := n.Load(good); err == nil {
		t.Error("a second Load succeeds")
	}
}

// Guest memory is as it was until the guest runs.
func TestLoadWritesNoGuestMemory(t *testing.T) {
	m, s := idleState(t)
	// A guest that has asked for the wall clock: KVM answers into its memory.
	const clock = 12 << 20
	at := msrIndex(s.Vcpus[0].Msrs, msrWallClock)
	if at < 0 {
		t.Fatal("KVM has no wall clock")
	}
	s.Vcpus[0].Msrs[at].Value = clock
	n := incoming(t, m, newConsole())
	before := bytes.Clone(n.ram.Regions()[0].Bytes)
	if err := n.Load(s); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(n.ram.Regions()[0].Bytes, before) {
		t.Error("Load has written guest memory")
	}
	run(t, n)
	pause(t, n)
	if bytes.Equal(n.ram.Regions()[0].Bytes[clock:clock+12], make([]byte, 12)) {
		t.Error("the wall clock was not restored")
	}
	if got := saved(t, n).Vcpus[0].Msrs[at].Value; got != clock {
		t.Errorf("the wall clock's register = %#x; want %#x", got, clock)
	}
}

// places are the things in a message that a peer can spoil, each as a function
// that does so with a value.
func places(m protoreflect.Message) (list []func(v uint64)) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !m.Has(f) && f.Kind() == protoreflect.MessageKind {
			continue
		}
		switch {
		case f.IsList():
			l := m.Mutable(f).List()
			list = append(list, func(v uint64) { l.Truncate(int(v % uint64(l.Len()+1))) })
			for at := range l.Len() {
				if f.Kind() == protoreflect.MessageKind {
					list = append(list, places(l.Get(at).Message())...)
				} else {
					list = append(list, func(v uint64) {
						if at < l.Len() {
							l.Set(at, scalar(f, l.Get(at), v))
						}
					})
				}
			}
		case f.Kind() == protoreflect.MessageKind:
			list = append(list, func(uint64) { m.Clear(f) })
			list = append(list, places(m.Mutable(f).Message())...)
		default:
			list = append(list, func(v uint64) { m.Set(f, scalar(f, m.Get(f), v)) })
		}
	}
	return list
}

// scalar is a spoilt value of a field that was old.
func scalar(f protoreflect.FieldDescriptor, old protoreflect.Value, v uint64) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(!old.Bool())
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("")
	case protoreflect.BytesKind: // one byte, or the length
		b := bytes.Clone(old.Bytes())
		if at := int(v >> 8 & 0xffffff); at < len(b) {
			b[at] = byte(v)
		} else {
			b = make([]byte, at>>4)
		}
		return protoreflect.ValueOfBytes(b)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(v))
	case protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(int64(v))
	}
	return protoreflect.ValueOfUint64(v)
}

// A hostile state is refused or loaded; it does no harm to the monitor. An
// input spoils places of a good state: two bytes of the place, eight of the
// value, again and again.
func FuzzLoad(f *testing.F) {
	m, good := idleState(f)
	const step = 10
	spoil := func(place uint16, v uint64) []byte {
		return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16(nil, place), v)
	}
	f.Add([]byte{})
	for place := range places(proto.CloneOf(good).ProtoReflect()) {
		if place%97 == 0 { // the fuzzer finds the others
			f.Add(spoil(uint16(place), 0))
			f.Add(spoil(uint16(place), ^uint64(0)))
		}
	}
	kernel := image(f, m)
	var n *Machine
	f.Cleanup(func() {
		if n != nil {
			n.Close()
		}
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		s := proto.CloneOf(good)
		for range min(len(b)/step, 8) {
			list := places(s.ProtoReflect())
			list[int(binary.LittleEndian.Uint16(b))%len(list)](binary.LittleEndian.Uint64(b[2:]))
			b = b[step:]
		}
		if n == nil || n.guest != guestExpected {
			if n != nil {
				n.Close()
			}
			cfg := m.cfg
			cfg.Kernel, cfg.Console, cfg.Warn = "", newConsole(), func(string) {} // a broken device says so
			var err error
			if n, err = NewIncoming(cfg, Incoming{Requirements: m.Requirements(), Kernel: kernel}); err != nil {
				t.Fatal(err)
			}
		}
		if n.Load(s) != nil {
			return
		}
		// What was loaded can be saved, and its devices can work.
		if _, err := n.save(); err != nil {
			t.Errorf("save() = %v after a Load that succeeded", err)
		}
		n.wake()
		if err := n.rest(t.Context()); err != nil {
			t.Errorf("rest() = %v", err)
		}
	})
}

// tscMoves says whether KVM can give a guest another time-stamp counter than the
// host's: a software KVM may not.
func tscMoves(t *testing.T, m *Machine) bool {
	t.Helper()
	const far = 1 << 62
	cpu := incoming(t, m, newConsole()).vcpus[0].cpu
	if err := cpu.SetMSRs([]kvm.MSREntry{{Index: msrTSC, Data: far}}); err != nil {
		t.Fatal(err)
	}
	e, err := cpu.MSRs([]uint32{msrTSC})
	if err != nil {
		t.Fatal(err)
	}
	return e[0].Data >= far
}

// The time that a machine does not run counts.
func TestClockGoesOn(t *testing.T) {
	m, s := idleState(t)
	hour := uint64(time.Hour)
	movable := tscMoves(t, m)
	t.Logf("KVM moves a guest's time-stamp counter: %v", movable)
	late := proto.CloneOf(s)
	late.Clock.RealtimeNs -= hour // as if saved an hour ago
	early := proto.CloneOf(s)
	early.Clock.RealtimeNs += hour // the source's clock is an hour ahead
	for _, test := range []struct {
		name     string
		state    *vmmv1.MachineState
		min, max uint64
	}{
		{"saved an hour ago", late, hour, hour + uint64(10*time.Minute)},
		{"saved in an hour", early, 0, uint64(10 * time.Minute)},
	} {
		n := incoming(t, m, newConsole())
		if err := n.Load(test.state); err != nil {
			t.Fatal(err)
		}
		got, err := n.save()
		if err != nil {
			t.Fatal(err)
		}
		clock := got.Clock.ClockNs - s.Clock.ClockNs
		if clock < test.min || clock > test.max {
			t.Errorf("%s: the clock went on by %v", test.name, time.Duration(clock))
		}
		at := msrIndex(got.Vcpus[1].Msrs, msrTSC)
		for id, v := range got.Vcpus {
			if !movable {
				break
			}
			khz := uint64(n.given.tscKHz)
			if tsc := (v.Msrs[at].Value - s.Vcpus[id].Msrs[at].Value) / khz * uint64(time.Millisecond); tsc+uint64(time.Second) < test.min || tsc > test.max {
				t.Errorf("%s: the time-stamp counter of vCPU %d went on by %v", test.name, id, time.Duration(tsc))
			}
		}
	}
}
