package pci_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"vmm/internal/sys"
	"vmm/memory"
	"vmm/pci"
	"vmm/pci/pcitest"
)

const (
	windowStart memory.GPA = 0xc0000000

	windowSize = 0x100000
)

// ram is a handler that remembers what was written, and one that tells who
// was asked.
type ram struct{ b []byte }

func (r *ram) Read(off uint64, p []byte)  { copy(p, r.b[off:]) }
func (r *ram) Write(off uint64, p []byte) { copy(r.b[off:], p) }

// bench is a bus with two functions: slot 1 has a 64-bit register 0 of 16 KiB
// with two doorbells and MSI-X in register 2; slot 2 a 32-bit register 0 of
// 4 KiB.
type bench struct {
	*pci.Host
	kernel   pcitest.Kernel
	one, two *ram
	msix     *pci.MSIX
	bell     [2]*sys.EventFD
	warned   []error
	resets   int
	f1, f2   *pci.Function
}

const vectors = 3

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{one: &ram{make([]byte, 16<<10)}, two: &ram{make([]byte, 4<<10)}}
	b.Host = pci.NewHost(pci.HostConfig{
		Window: windowStart, WindowSize: windowSize,
		Interrupts: &b.kernel, IOEvents: &b.kernel,
		Warn: func(err error) { b.warned = append(b.warned, err) },
	})
	b.f1 = pci.NewFunction(pci.ID{Vendor: 0x1af4, Device: 0x1048, Revision: 1, Class: 0x010000, SubsystemVendor: 0x1af4, Subsystem: 0x40})
	b.f1.AddBAR(0, 16<<10, true, b.one)
	var err error
	for i := range b.bell {
		if b.bell[i], err = sys.NewEventFD(); err != nil {
			t.Fatal(err)
		}
		b.f1.AddDoorbell(0, uint64(0x3000+4*i), b.bell[i])
		t.Cleanup(func() { b.bell[i].Close() })
	}
	if b.msix, err = b.f1.AddMSIX(2, vectors); err != nil {
		t.Fatal(err)
	}
	b.f1.OnReset(func() { b.resets++ })
	b.f2 = pci.NewFunction(pci.ID{Vendor: 0x1af4, Device: 0x1044, Class: 0xff0000})
	b.f2.AddBAR(0, 4<<10, false, b.two)
	for slot, f := range []*pci.Function{1: b.f1, 2: b.f2} {
		if f == nil {
			continue
		}
		if err := b.Add(slot, f); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if n := b.kernel.Connected() + len(b.kernel.Doorbells()); n != 0 {
			t.Errorf("%d things stay in the kernel after Close", n)
		}
	})
	return b
}

// le reads or, with a value, writes n bytes at off.
func le(h pci.Handler, off uint64, n int, write ...uint64) uint64 {
	var b [8]byte
	if len(write) > 0 {
		binary.LittleEndian.PutUint64(b[:], write[0])
		h.Write(off, b[:n])
		return 0
	}
	h.Read(off, b[:n])
	return binary.LittleEndian.Uint64(b[:])
}

// config accesses a register of a slot through ECAM.
func (b *bench) config(slot, reg, n int, write ...uint64) uint64 {
	return le(b.ECAM(), uint64(slot)<<15|uint64(reg), n, write...)
}

// ports accesses a register of a slot through the ports.
func (b *bench) ports(slot, reg, n int, write ...uint64) uint64 {
	le(b.ConfigAddress(), 0, 4, uint64(1<<31|slot<<11|reg&^3))
	return le(b.ConfigData(), uint64(reg&3), n, write...)
}

func (b *bench) bar(slot, i int) memory.GPA {
	return memory.GPA(b.config(slot, 0x10+4*i, 4) &^ 0xf)
}

func (b *bench) mem(gpa memory.GPA, n int, write ...uint64) uint64 {
	return le(b.Window(), uint64(gpa-windowStart), n, write...)
}

func TestConfigSpaceBothWays(t *testing.T) {
	b := newBench(t)
	for _, test := range []struct {
		slot, reg, n int
		want         uint64
	}{
		{0, 0x00, 4, 0x00081b36}, // the bridge
		{0, 0x0a, 2, 0x0600},
		{0, 0x10, 4, 0},
		{1, 0x00, 4, 0x10481af4},
		{1, 0x02, 2, 0x1048},
		{1, 0x03, 1, 0x10},
		{1, 0x04, 4, 0x00100002}, // memory decoding, a capability list
		{1, 0x08, 4, 0x01000001},
		{1, 0x0e, 1, 0}, // type 0, one function
		{1, 0x2c, 4, 0x00401af4},
		{1, 0x34, 1, 0x40},
		{1, 0x3d, 1, 0}, // no pin
		{2, 0x34, 1, 0}, // no list
		{2, 0x04, 4, 2},
		{3, 0x00, 4, 0xffffffff}, // nobody
		{31, 0x00, 2, 0xffff},
	} {
		if got := b.config(test.slot, test.reg, test.n); got != test.want {
			t.Errorf("ECAM slot %d register %#x, %d bytes = %#x; want %#x", test.slot, test.reg, test.n, got, test.want)
		}
		if got := b.ports(test.slot, test.reg, test.n); got != test.want {
			t.Errorf("ports slot %d register %#x, %d bytes = %#x; want %#x", test.slot, test.reg, test.n, got, test.want)
		}
	}
}

func TestOddConfigAccesses(t *testing.T) {
	b := newBench(t)
	le := func(h pci.Handler, off uint64, n int) uint64 { return le(h, off, n) }
	for _, test := range []struct {
		name      string
		got, want uint64
	}{
		{"extended space", b.config(1, 0x100, 4), 0},
		{"across the end of 256 bytes", b.config(1, 0xfe, 4), 0},
		{"across the end of a function", b.config(1, 0xffe, 4), 0xffff0000},
		{"function 1", le(b.ECAM(), 1<<15|1<<12, 4), 0xffffffff},
		{"bus 1", le(b.ECAM(), 1<<20, 4), 0xffffffff},
		{"far away", le(b.ECAM(), 1<<63, 4), 0xffffffff},
		{"unaligned", b.config(1, 0x01, 4), 0x0210481a},
		{"8 bytes", b.config(1, 0x00, 8), 0x00100002_10481af4},
	} {
		if test.got != test.want {
			t.Errorf("%s = %#x; want %#x", test.name, test.got, test.want)
		}
	}
	data := b.ConfigData()
	set := func(address uint64) {
		b.ConfigAddress().Write(0, binary.LittleEndian.AppendUint32(nil, uint32(address)))
	}
	for _, test := range []struct {
		name    string
		address uint64
		off     uint64
		n       int
		want    uint64
	}{
		{"disabled", 1 << 11, 0, 4, 0xffffffff},
		{"slot 1", 1<<31 | 1<<11, 0, 4, 0x10481af4},
		{"bus 1", 1<<31 | 1<<16 | 1<<11, 0, 4, 0xffffffff},
		{"function 3", 1<<31 | 1<<11 | 3<<8, 0, 4, 0xffffffff},
		{"across the last port", 1<<31 | 1<<11, 2, 4, 0xffff1048},
		{"beyond the last port", 1<<31 | 1<<11, 4, 4, 0xffffffff},
		{"low bits of the address", 1<<31 | 1<<11 | 3, 0, 2, 0x1af4},
		{"last register", 1<<31 | 1<<11 | 0xfc, 3, 1, 0},
	} {
		set(test.address)
		if got := le(data, test.off, test.n); got != test.want {
			t.Errorf("ports, %s = %#x; want %#x", test.name, got, test.want)
		}
	}
	// Only a whole dword is the address register.
	set(1<<31 | 1<<11)
	b.ConfigAddress().Write(0, []byte{0})
	b.ConfigAddress().Write(0, []byte{0, 0})
	b.ConfigAddress().Write(1, []byte{0, 0, 0, 0})
	if got := le(b.ConfigAddress(), 0, 4); got != 1<<31|1<<11 {
		t.Errorf("address register = %#x after narrow writes; want it unchanged", got)
	}
	if got := le(b.ConfigAddress(), 0, 2); got != 0xffff {
		t.Errorf("narrow read of the address register = %#x; want ones", got)
	}
}

func TestReadOnlyBitsStay(t *testing.T) {
	b := newBench(t)
	before := [3][]byte{}
	for slot := range before {
		before[slot] = make([]byte, 256)
		b.ECAM().Read(uint64(slot)<<15, before[slot])
	}
	writable := map[int]map[int]byte{ // what differs after ones were written
		0: {4: 0x46, 5: 0x05, 0x0c: 0xff, 0x0d: 0xff, 0x3c: 0xff},
		2: {4: 0x46, 5: 0x05, 0x0c: 0xff, 0x0d: 0xff, 0x3c: 0xff, 0x10: 0, 0x11: 0xf0, 0x12: 0xff, 0x13: 0xff},
	}
	writable[1] = maps.Clone(writable[0])
	maps.Copy(writable[1], map[int]byte{
		0x10: 0x04, 0x11: 0xc0, 0x12: 0xff, 0x13: 0xff, 0x14: 0xff, 0x15: 0xff, 0x16: 0xff, 0x17: 0xff, // 64 bits
		0x18: 0x00, 0x19: 0xf0, 0x1a: 0xff, 0x1b: 0xff, // MSI-X
		0x43: 0xc0, // MSI-X control
	})
	for slot := range before {
		for reg := range 256 {
			b.config(slot, reg, 1, 0xff)
		}
		for reg := range 256 {
			want := before[slot][reg]
			if w, ok := writable[slot][reg]; ok {
				want = w
			}
			if got := byte(b.config(slot, reg, 1)); got != want {
				t.Errorf("slot %d register %#x = %#x after ones; want %#x", slot, reg, got, want)
			}
		}
	}
}

func TestBARSizingAndMoving(t *testing.T) {
	b := newBench(t)
	first := b.bar(1, 0)
	if first < windowStart || first%(16<<10) != 0 {
		t.Fatalf("register assigned %v; want it in the window, naturally aligned", first)
	}
	b.mem(first+0x10, 4, 0x12345678)
	if got := b.mem(first+0x10, 4); got != 0x12345678 || b.one.b[0x10] != 0x78 {
		t.Errorf("read back %#x through the window; want 0x12345678", got)
	}

	// What a kernel does: decoding off, ones, read the size, restore.
	b.config(1, 4, 2, 0)
	if got := b.mem(first+0x10, 4); got != 0xffffffff {
		t.Errorf("read %#x with decoding off; want ones", got)
	}
	b.config(1, 0x10, 4, 0xffffffff)
	b.config(1, 0x14, 4, 0xffffffff)
	if lo, hi := b.config(1, 0x10, 4), b.config(1, 0x14, 4); lo != 0xffffc004 || hi != 0xffffffff {
		t.Errorf("size reads %#x %#x; want 16 KiB, 64 bits", lo, hi)
	}
	if len(b.kernel.Doorbells()) != 0 {
		t.Errorf("doorbells %v with decoding off", b.kernel.Doorbells())
	}
	moved := windowStart + 0x80000
	b.config(1, 0x10, 4, uint64(moved))
	b.config(1, 0x14, 4, 0)
	b.config(1, 4, 2, 2)
	if got := b.mem(moved+0x10, 4); got != 0x12345678 {
		t.Errorf("read %#x at the new place; want 0x12345678", got)
	}
	if got := b.mem(first+0x10, 4); got != 0xffffffff {
		t.Errorf("read %#x at the old place; want ones", got)
	}
	want := map[memory.GPA]*sys.EventFD{moved + 0x3000: b.bell[0], moved + 0x3004: b.bell[1]}
	if got := b.kernel.Doorbells(); !maps.Equal(got, want) {
		t.Errorf("doorbells %v; want %v", got, want)
	}
	// 64 bits: an upper half makes it another address.
	b.config(1, 0x14, 4, 1)
	if got := b.mem(moved+0x10, 4); got != 0xffffffff || len(b.kernel.Doorbells()) != 0 {
		t.Errorf("read %#x at %v while the register is 4 GiB above; want ones", got, moved)
	}
	// Bytes and halves of the register work too.
	b.config(1, 0x14, 1, 0)
	b.config(1, 0x12, 2, uint64(windowStart>>16)+4)
	if got := b.mem(windowStart+0x40010, 4); got != 0x12345678 {
		t.Errorf("read %#x after a 16-bit move; want 0x12345678", got)
	}
	if len(b.warned) != 0 {
		t.Errorf("warnings: %v", b.warned)
	}
}

func TestBARsNeverDecodeWhereTheyMustNot(t *testing.T) {
	b := newBench(t)
	two := b.bar(2, 0)
	for _, gpa := range []memory.GPA{0, 0x1000, 0xb0000000, windowStart - 16<<10, windowStart + windowSize, 0xfee00000, 0xfec00000, 0xffffc000} {
		b.config(1, 0x10, 4, uint64(gpa))
		if n := len(b.kernel.Doorbells()); n != 0 {
			t.Errorf("register at %v has %d doorbells; want none", gpa, n)
		}
	}
	if got := b.mem(windowStart+windowSize, 4); got != 0xffffffff {
		t.Errorf("behind the window: %#x; want ones", got)
	}
	// Over another function's: the lower slot wins, and the other comes back.
	b.mem(two+8, 4, 0x22222222)
	b.mem(two+8, 4)
	b.config(1, 0x10, 4, uint64(two)&^0x3fff)
	off := uint64(two) & 0x3fff
	b.one.b[off+8] = 0x11
	if got := b.mem(two+8, 1); got != 0x11 {
		t.Errorf("two registers at %v: read %#x; want the lower slot's 0x11", two, got)
	}
	b.config(1, 0x10, 4, uint64(windowStart)+0x80000)
	if got := b.mem(two+8, 1); got != 0x22 {
		t.Errorf("after the first moved away: read %#x; want 0x22", got)
	}
}

func TestAccessAcrossTheEndOfABAR(t *testing.T) {
	b := newBench(t)
	end := b.bar(2, 0) + 4<<10
	b.mem(end-2, 4, 0) // must not reach the handler, which would index beyond its end
	if got := b.mem(end-2, 4); got != 0xffffffff {
		t.Errorf("read %#x across the end; want ones", got)
	}
	if got := b.mem(end-4, 4); got != 0 {
		t.Errorf("read %#x at the end; want 0", got)
	}
}

func TestAddRefuses(t *testing.T) {
	b := newBench(t)
	small := pci.NewFunction(pci.ID{})
	large := pci.NewFunction(pci.ID{})
	large.AddBAR(0, 2*windowSize, false, b.one)
	for _, test := range []struct {
		slot int
		f    *pci.Function
		want string
	}{
		{-1, small, "there are 32"}, {32, small, "there are 32"}, {1, small, "taken"}, {4, large, "no room for 2097152 bytes"},
	} {
		if err := b.Add(test.slot, test.f); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("Add(%d) = %v; want %q", test.slot, err, test.want)
		}
	}
}

// table accesses an MSI-X table entry.
func (b *bench) table(v, off, n int, write ...uint64) uint64 {
	return b.mem(b.bar(1, 2)+memory.GPA(16*v+off), n, write...)
}

func (b *bench) pending() uint64 { return b.mem(b.bar(1, 2)+0x800, 8) }

func message(v int) pci.Message {
	return pci.Message{Address: 0xfee01000, Data: uint32(0x40 + v)}
}

// program writes vector v's message and leaves it masked.
func (b *bench) program(v int) {
	b.table(v, 0, 4, uint64(message(v).Address))
	b.table(v, 4, 4, 0)
	b.table(v, 8, 4, uint64(message(v).Data))
}

const msixControl = 0x42

func TestMSIX(t *testing.T) {
	b := newBench(t)
	if got := b.config(1, 0x40, 4); got != 0x00020011 {
		t.Errorf("MSI-X capability %#x; want 3 vectors, off", got)
	}
	if table, pba := b.config(1, 0x44, 4), b.config(1, 0x48, 4); table != 2 || pba != 0x802 {
		t.Errorf("table at %#x, pending bits at %#x; want 0x2, 0x802", table, pba)
	}
	for v := range vectors {
		if got := b.table(v, 12, 4); got != 1 {
			t.Errorf("vector %d control %#x; want masked", v, got)
		}
		b.program(v)
	}
	b.table(0, 12, 4, 0) // not masked, but MSI-X is off
	b.msix.Signal(1)     // no message
	if b.kernel.Connected() != 0 || b.msix.Enabled() || b.msix.Unmasked(0) {
		t.Fatal("connected while MSI-X is off")
	}

	b.config(1, msixControl, 2, 0xc000) // on, all masked
	if b.kernel.Connected() != 0 || !b.msix.Enabled() || b.msix.Unmasked(0) {
		t.Error("connected while the function is masked")
	}
	if got := b.pending(); got != 0 {
		t.Errorf("pending %#x from before MSI-X was on; want none", got)
	}
	b.msix.Signal(0)
	b.msix.Signal(2)
	if got := b.pending(); got != 0b101 {
		t.Errorf("pending %#b; want vectors 0 and 2", got)
	}

	b.config(1, msixControl, 2, 0x8000)
	e := b.kernel.Interrupt(message(0))
	if e == nil || b.kernel.Connected() != 1 || !b.msix.Unmasked(0) || b.msix.Unmasked(1) || b.msix.Unmasked(9) {
		t.Fatal("vector 0 is not connected, or others are")
	}
	if got := b.pending(); got != 0b100 {
		t.Errorf("pending %#b; want vector 2, as 0 is being delivered", got)
	}
	if n := e.Drain(); n != 1 {
		t.Errorf("the interrupt that was pending is gone: %d; want 1", n)
	}

	b.table(2, 12, 4, 0)
	if e := b.kernel.Interrupt(message(2)); e == nil || e.Drain() != 1 {
		t.Error("unmasking vector 2 lost its pending interrupt")
	}
	b.table(2, 8, 4, 0x99) // a new message while connected
	if b.kernel.Interrupt(pci.Message{Address: 0xfee01000, Data: 0x99}) == nil || b.kernel.Connected() != 2 {
		t.Error("vector 2 kept its old message")
	}
	b.table(2, 12, 4, 0xffffffff)
	if got := b.table(2, 12, 4); got != 1 || b.kernel.Connected() != 1 {
		t.Errorf("control %#x, %d connected; want 1, 1", got, b.kernel.Connected())
	}
	b.msix.Signal(1)
	b.mem(b.bar(1, 2)+0x800, 8, 0) // read-only
	if got := b.pending(); got != 0b10 {
		t.Errorf("pending %#b after a write to it; want vector 1", got)
	}
	b.config(1, msixControl, 2, 0)
	if b.kernel.Connected() != 0 || b.msix.Enabled() {
		t.Error("connected after MSI-X is off")
	}
	b.msix.Signal(vectors) // there is none
	b.msix.Signal(0xffff)
}

func TestWhatTheKernelRefuses(t *testing.T) {
	b := newBench(t)
	b.program(0)
	b.table(0, 12, 4, 0)
	b.kernel.FailWith(errors.New("no route"))
	b.config(1, msixControl, 2, 0x8000)
	for range 3 { // a guest that tries again and again does not fill the log
		b.table(0, 12, 4, 1)
		b.table(0, 12, 4, 0)
	}
	if len(b.warned) != 1 || !strings.Contains(b.warned[0].Error(), "vector 0 as 0xfee01000=0x40: no route") {
		t.Errorf("warned %v; want one that names the vector and the cause", b.warned)
	}
	b.msix.Signal(0)
	if got := b.pending(); got != 1 {
		t.Errorf("pending %#b; want vector 0, which has no way out", got)
	}
	b.kernel.FailWith(nil)
	b.table(0, 12, 4, 1)
	b.table(0, 12, 4, 0) // the guest's next attempt works
	if e := b.kernel.Interrupt(message(0)); e == nil || e.Drain() != 1 {
		t.Error("vector 0 is not connected, or has lost its interrupt")
	}

	// A doorbell that the kernel does not take is answered by the handler.
	b.warned = nil
	b.config(1, 4, 2, 0)
	b.kernel.FailWith(errors.New("no space"))
	for range 3 {
		b.config(1, 4, 2, 2)
		b.config(1, 4, 2, 0)
	}
	b.config(1, 4, 2, 2)
	if len(b.warned) != 2 || !strings.Contains(b.warned[1].Error(), "doorbell at 0xc0003004 works, but slowly: no space") {
		t.Errorf("warned %v; want each doorbell once", b.warned)
	}
	b.mem(b.bar(1, 0)+0x3000, 2, 0x1234)
	if got := b.one.b[0x3000]; got != 0x34 {
		t.Errorf("the handler got %#x; want 0x34", got)
	}
	b.kernel.FailWith(nil)
	b.config(1, 4, 2, 0)
	b.config(1, 4, 2, 2)
	if len(b.kernel.Doorbells()) != 2 || len(b.warned) != 2 {
		t.Errorf("doorbells %v, warned %v; want both back", b.kernel.Doorbells(), b.warned)
	}
}

func TestReset(t *testing.T) {
	b := newBench(t)
	before := make([]byte, 256)
	b.ECAM().Read(1<<15, before)
	place := b.bar(1, 0)
	b.program(0)
	b.table(0, 12, 4, 0)
	b.config(1, msixControl, 2, 0x8000)
	b.config(1, 0x10, 4, uint64(windowStart)+0x80000)
	b.config(2, 4, 2, 0)
	b.Reset()
	after := make([]byte, 256)
	b.ECAM().Read(1<<15, after)
	if !bytes.Equal(before, after) {
		t.Errorf("configuration space after reset\n% x; want\n% x", after, before)
	}
	if b.kernel.Connected() != 0 || b.kernel.Doorbell(place+0x3000) != b.bell[0] || len(b.kernel.Doorbells()) != 2 {
		t.Errorf("%d connected, doorbells %v; want none and the first place", b.kernel.Connected(), b.kernel.Doorbells())
	}
	if got := b.table(0, 0, 8); got != 0 {
		t.Errorf("MSI-X table entry %#x after reset; want 0", got)
	}
	if got := b.mem(b.bar(2, 0), 4); got != 0 {
		t.Errorf("slot 2 does not decode after reset: %#x", got)
	}
	if b.resets != 1 {
		t.Errorf("OnReset ran %d times; want once", b.resets)
	}
}

func TestStateMoves(t *testing.T) {
	a, b := newBench(t), newBench(t)
	for v := range vectors {
		a.program(v)
	}
	a.table(0, 12, 4, 0)
	a.table(1, 12, 4, 0)
	a.config(1, msixControl, 2, 0x8000)
	a.config(1, 0x10, 4, uint64(windowStart)+0x80000)
	a.ports(2, 0x3c, 1, 0x5a)
	a.msix.Signal(2) // masked: pending

	if _, err := a.State(); err == nil {
		t.Error("State() with interrupts connected succeeded")
	}
	a.DisconnectInterrupts()
	if a.kernel.Connected() != 0 {
		t.Fatal("interrupts are connected after DisconnectInterrupts")
	}
	a.msix.Signal(1) // not masked, but held back: pending too
	s, err := a.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.SetState(s); err != nil {
		t.Fatal(err)
	}
	if b.kernel.Connected() != 0 {
		t.Error("SetState connected interrupts")
	}
	s2, err := b.State()
	if err != nil || !reflect.DeepEqual(s, s2) {
		t.Errorf("state after the move %+v, %v; want %+v", s2, err, s)
	}
	if got := b.kernel.Doorbell(windowStart + 0x80000 + 0x3004); got != b.bell[1] {
		t.Error("the doorbells did not move")
	}
	for _, side := range []*bench{a, b} { // the destination runs; or the source again
		side.ConnectInterrupts()
		if side.kernel.Connected() != 2 {
			t.Errorf("%d interrupts connected; want 2", side.kernel.Connected())
		}
		for v, want := range []uint64{0, 1} {
			if got := side.kernel.Interrupt(message(v)).Drain(); got != want {
				t.Errorf("vector %d: %d interrupts wait; want %d", v, got, want)
			}
		}
		if got := side.pending(); got != 0b100 {
			t.Errorf("pending %#b; want vector 2", got)
		}
		if got := le(side.ConfigData(), 0, 1); got != 0x5a {
			t.Errorf("through the address register as saved: %#x; want 0x5a", got)
		}
	}
}

func TestSetStateRefusesAnotherMachine(t *testing.T) {
	a, b := newBench(t), newBench(t)
	a.DisconnectInterrupts()
	b.DisconnectInterrupts()
	b.config(1, msixControl, 2, 0x8000)
	before, _ := b.State()
	for _, test := range []struct {
		name   string
		change func(*pci.State)
		want   string
	}{
		{"no functions", func(s *pci.State) { s.Functions = nil }, "slots []"},
		{"a function missing", func(s *pci.State) { s.Functions = s.Functions[:2] }, "slots [0 1]; this machine has [0 1 2]"},
		{"another slot", func(s *pci.State) { s.Functions[2].Slot = 77 }, "slots [0 1 77]"},
		{"negative slot", func(s *pci.State) { s.Functions[0].Slot = -1 }, "slots [-1 1 2]"},
		{"order", func(s *pci.State) { slices.Reverse(s.Functions) }, "slots [2 1 0]"},
		{"short", func(s *pci.State) { s.Functions[1].Config = s.Functions[1].Config[:255] }, "slot 1: 255 bytes"},
		{"long", func(s *pci.State) { s.Functions[1].Config = append(s.Functions[1].Config, 0) }, "slot 1: 257 bytes"},
		{"another device", func(s *pci.State) { s.Functions[2].Config[2] = 0x48 }, "slot 2: byte 0x2 of configuration space is 0x48, here 0x44"},
		{"another capability", func(s *pci.State) { s.Functions[1].Config[0x40] = 5 }, "byte 0x40"},
		{"I/O decoding", func(s *pci.State) { s.Functions[1].Config[4] |= 1 }, "byte 0x4"},
		{"register of another size", func(s *pci.State) { s.Functions[1].Config[0x11] |= 0x10 }, "byte 0x11"},
		{"vectors", func(s *pci.State) { s.Functions[1].Vectors = s.Functions[1].Vectors[:2] }, "2 MSI-X vectors; this device has 3"},
		{"vectors where there are none", func(s *pci.State) { s.Functions[2].Vectors = make([]pci.VectorState, 1) }, "1 MSI-X vectors; this device has 0"},
	} {
		s, err := a.State()
		if err != nil {
			t.Fatal(err)
		}
		test.change(&s)
		if err := b.SetState(s); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: SetState = %v; want %q", test.name, err, test.want)
		}
		if after, _ := b.State(); !reflect.DeepEqual(before, after) {
			t.Errorf("%s: a refused state changed something", test.name)
		}
	}
}

// Whatever is written into configuration space: what decodes is disjoint, in
// the window, at the addresses that the registers name, and the doorbells are
// exactly those of what decodes.
func TestAnyConfigWritesKeepTheMapSound(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		b := newBench(t)
		for range rapid.IntRange(1, 12).Draw(rt, "writes") {
			slot := rapid.IntRange(0, 3).Draw(rt, "slot")
			n := rapid.SampledFrom([]int{1, 2, 4, 8}).Draw(rt, "width")
			reg := rapid.OneOf(rapid.SampledFrom([]int{0x04, 0x10, 0x14, 0x18, 0x42}), rapid.IntRange(0, 0x110)).Draw(rt, "register")
			value := rapid.OneOf(
				rapid.Map(rapid.IntRange(-1, windowSize>>12), func(i int) uint64 { return uint64(int64(windowStart) + int64(i)<<12) }),
				rapid.SampledFrom([]uint64{0, 2, 6, 1<<64 - 1}), rapid.Uint64()).Draw(rt, "value")
			if rapid.Bool().Draw(rt, "ports") {
				b.ports(slot, reg&0xff, n, value)
			} else {
				b.config(slot, reg, n, value)
			}
		}
		// The model: each register that decodes, in order of slot and number.
		type place struct {
			start, end memory.GPA
			tag        byte // what its handler answers
		}
		var places []place
		want := map[memory.GPA]*sys.EventFD{}
		for _, r := range []struct {
			slot, reg int
			size      memory.GPA
			wide      bool
			tag       byte
		}{{1, 0x10, 16 << 10, true, 1}, {1, 0x18, 4 << 10, false, 0}, {2, 0x10, 4 << 10, false, 2}} {
			start := memory.GPA(b.config(r.slot, r.reg, 4) &^ 0xf)
			if r.wide {
				start |= memory.GPA(b.config(r.slot, r.reg+4, 4)) << 32
			}
			if b.config(r.slot, 4, 2)&2 == 0 || start < windowStart || start+r.size > windowStart+windowSize || start+r.size < start {
				continue
			}
			if slices.ContainsFunc(places, func(p place) bool { return start < p.end && p.start < start+r.size }) {
				continue
			}
			places = append(places, place{start, start + r.size, r.tag})
			if r.tag == 1 {
				want[start+0x3000], want[start+0x3004] = b.bell[0], b.bell[1]
			}
		}
		if got := b.kernel.Doorbells(); !maps.Equal(got, want) {
			rt.Fatalf("doorbells %v; want %v", got, want)
		}
		for i := range b.one.b {
			b.one.b[i] = 1
		}
		for i := range b.two.b {
			b.two.b[i] = 2
		}
		for gpa := windowStart; gpa < windowStart+windowSize; gpa += 0x1000 {
			wantTag := uint64(0xff)
			for _, p := range places {
				if gpa >= p.start && gpa < p.end {
					wantTag = uint64(p.tag)
				}
			}
			if got := b.mem(gpa+4, 1); got != wantTag {
				rt.Fatalf("read %#x at %v; want %#x", got, gpa, wantTag)
			}
		}
		if len(b.warned) != 0 {
			rt.Fatalf("warnings %v", b.warned)
		}
		b.Close()
	})
}

// vCPUs that rewrite everything while others access it.
func TestConcurrentAccess(t *testing.T) {
	b := newBench(t)
	b.program(0)
	b.config(1, msixControl, 2, 0x8000)
	var wg sync.WaitGroup
	const rounds = 300
	wg.Go(func() {
		for i := range rounds {
			b.config(1, 0x10, 4, uint64(windowStart)+uint64(i%8)*0x4000)
		}
	})
	wg.Go(func() {
		for i := range rounds {
			b.table(0, 12, 4, uint64(i&1))
			b.pending()
		}
	})
	wg.Go(func() {
		for range rounds {
			b.msix.Signal(0)
		}
	})
	wg.Go(func() {
		for i := range rounds {
			b.mem(windowStart+memory.GPA(i%16)*0x1000, 4)
			b.config(2, 4, 2, uint64(i&2))
		}
	})
	wg.Go(func() {
		for range rounds / 10 {
			b.DisconnectInterrupts()
			b.ConnectInterrupts()
		}
	})
	wg.Wait()
	if len(b.warned) != 0 {
		t.Errorf("warnings: %v", b.warned)
	}
	b.config(1, msixControl, 2, 0)
	if n := b.kernel.Connected(); n != 0 {
		t.Errorf("%d interrupts connected with MSI-X off", n)
	}
}

func TestCloseTwice(t *testing.T) {
	b := newBench(t)
	for range 2 {
		if err := b.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	if got := b.config(1, 0, 4); got != 0xffffffff {
		t.Errorf("slot 1 answers %#x after Close", got)
	}
}

func BenchmarkWindow(b *testing.B) {
	for _, functions := range []int{1, 30} {
		b.Run(fmt.Sprintf("functions=%d", functions), func(b *testing.B) {
			var kernel pcitest.Kernel
			h := pci.NewHost(pci.HostConfig{Window: windowStart, WindowSize: windowSize, Interrupts: &kernel, IOEvents: &kernel})
			for slot := range functions {
				f := pci.NewFunction(pci.ID{})
				f.AddBAR(0, 16<<10, true, &ram{make([]byte, 16<<10)})
				if err := h.Add(slot+1, f); err != nil {
					b.Fatal(err)
				}
			}
			w := h.Window()
			p := make([]byte, 4)
			b.ReportAllocs()
			for b.Loop() {
				w.Read(0x14, p)
			}
		})
	}
}

// slowKernel is a kernel that takes its time to disconnect interrupts.
type slowKernel struct {
	pcitest.Kernel
	meanwhile func(events []*sys.EventFD)
}

func (k *slowKernel) Disconnect(events ...*sys.EventFD) error {
	k.meanwhile(events)
	return k.Kernel.Disconnect(events...)
}

// The vectors of all functions are disconnected in one call, and until it has
// returned a guest that runs sees none of them as it was or will be.
func TestDisconnectInterruptsOfAll(t *testing.T) {
	var kernel slowKernel
	h := pci.NewHost(pci.HostConfig{Window: windowStart, WindowSize: windowSize, Interrupts: &kernel, IOEvents: &kernel})
	b := &bench{Host: h}
	var reached []*pci.MSIX
	for slot := 1; slot <= 2; slot++ {
		f := pci.NewFunction(pci.ID{Vendor: 0x1af4, Device: 0x1048})
		m, err := f.AddMSIX(0, vectors)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Add(slot, f); err != nil {
			t.Fatal(err)
		}
		reached = append(reached, m)
		for v := range vectors {
			at, message := uint64(16*v), message(16*slot+v)
			le(m, at, 8, uint64(message.Address))
			le(m, at+8, 8, uint64(message.Data)) // and not masked
		}
		b.config(slot, msixControl, 2, 0x8000)
	}
	if n := kernel.Connected(); n != 2*vectors {
		t.Fatalf("%d interrupts connected; want all %d", n, 2*vectors)
	}
	var guest sync.WaitGroup
	var seen atomic.Int32
	calls := 0
	kernel.meanwhile = func(events []*sys.EventFD) {
		calls++
		if len(events) != 2*vectors {
			t.Errorf("%d interrupts are disconnected at a time; want all %d", len(events), 2*vectors)
		}
		var begun sync.WaitGroup
		for _, m := range reached {
			begun.Add(1)
			guest.Go(func() {
				begun.Done()
				le(m, 0, 4)
				seen.Add(1)
			})
		}
		begun.Wait()
		for range 1000 {
			runtime.Gosched()
		}
		if n := seen.Load(); n != 0 {
			t.Errorf("%d functions answer while they are disconnected", n)
		}
	}
	h.DisconnectInterrupts()
	guest.Wait()
	if n := kernel.Connected(); calls != 1 || n != 0 {
		t.Errorf("%d calls, then %d interrupts connected; want one call, none", calls, n)
	}
	kernel.meanwhile = func([]*sys.EventFD) {}
	// A signal that waits is not lost to a driver that switches MSI-X off and on.
	reached[0].Signal(0)
	b.config(1, msixControl, 2, 0)
	b.config(1, msixControl, 2, 0x8000)
	h.ConnectInterrupts()
	if got := kernel.Interrupt(message(16)); got == nil || got.Drain() != 1 {
		t.Error("the signal of an interrupt that was held back is lost")
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}
