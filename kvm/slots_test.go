package kvm_test

import (
	"testing"

	"vmm/internal/sys"
	"vmm/kvm"
	"vmm/kvm/kvmtest"
	"vmm/memory"
)

// store is a program that writes one byte to the next page, once per exit.
var store = []byte{
	0xbb, 0x00, 0x00, 0x01, 0x00, // mov ebx, Data
	0x88, 0x03, // 1: mov [rbx], al
	0xe6, 0x80, // out 0x80, al
	0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, // add ebx, 0x1000
	0xeb, 0xf4, // jmp 1b
}

// pages is a bitmap with these bits set.
func pages(set ...int) []uint64 {
	bitmap := make([]uint64, kvmtest.RAMSize/kvm.PageSize/64)
	for _, p := range set {
		bitmap[p/64] |= 1 << (p % 64)
	}
	return bitmap
}

func wantDirty(t *testing.T, vm *kvm.VM, want []uint64) {
	t.Helper()
	got := pages()
	if err := vm.DirtyLog(0, got); err != nil {
		t.Fatal(err)
	}
	for i := range want {
		if i == 0 {
			got[i] |= program
			want[i] |= program
		}
		if got[i] != want[i] {
			t.Fatalf("dirty log word %d = %#x; want %#x", i, got[i], want[i])
		}
	}
}

const dataPage = int(kvmtest.Data / kvm.PageSize)

// program are the pages below Data, which do not count: the kernel may call a page
// dirty when it maps it for a read, and processors write to page tables.
const program = 1<<dataPage - 1

func TestDirtyLogClearsItself(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{MemoryFlags: kvm.LogDirtyPages}, store)
	wantDirty(t, g.VM, pages())
	g.Run(kvm.ExitIO)
	g.Run(kvm.ExitIO)
	wantDirty(t, g.VM, pages(dataPage, dataPage+1))
	wantDirty(t, g.VM, pages())
	g.Run(kvm.ExitIO)
	wantDirty(t, g.VM, pages(dataPage+2))
}

func TestManualDirtyLog(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, store)
	initiallySet, err := g.VM.EnableManualDirtyLog()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.VM.SetMemory(0, 0, g.RAM, kvm.LogDirtyPages); err != nil {
		t.Fatal(err)
	}
	all := pages()
	if initiallySet {
		for i := range all {
			all[i] = ^uint64(0)
		}
	}
	wantDirty(t, g.VM, all)
	clear := func(first, n int, bitmap []uint64) {
		t.Helper()
		if err := g.VM.ClearDirtyLog(0, first, n, bitmap); err != nil {
			t.Fatal(err)
		}
	}
	clear(0, len(all)*64, all)
	wantDirty(t, g.VM, pages())

	g.Run(kvm.ExitIO)
	g.Run(kvm.ExitIO)
	both := pages(dataPage, dataPage+1)
	wantDirty(t, g.VM, both)
	wantDirty(t, g.VM, both) // reading does not clear

	clear(0, 64, pages(dataPage)) // one of the two
	wantDirty(t, g.VM, pages(dataPage+1))
	clear(64, 64, pages(dataPage+1)) // pages 64 and up: none of ours
	wantDirty(t, g.VM, pages(dataPage+1))
	clear(0, 64, both)
	wantDirty(t, g.VM, pages())

	g.Run(kvm.ExitIO)
	wantDirty(t, g.VM, pages(dataPage+2))
	g.Load(store)
	g.Run(kvm.ExitIO) // a cleared page is protected again
	wantDirty(t, g.VM, pages(dataPage, dataPage+2))
}

// The kernel writes a bitmap of its own size through the pointer it is given.
func TestDirtyLogBitmapBounds(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{MemoryFlags: kvm.LogDirtyPages}, store)
	if err := g.VM.DirtyLog(0, pages()[1:]); err == nil {
		t.Error("DirtyLog with a bitmap that is too short succeeds")
	}
	for _, c := range []struct{ first, pages, words int }{{0, 65, 1}, {-64, 64, 1}, {0, -1, 1}, {0, 1 << 40, 1}} {
		if err := g.VM.ClearDirtyLog(0, c.first, c.pages, make([]uint64, c.words)); err == nil {
			t.Errorf("ClearDirtyLog(%d, %d) with %d words succeeds", c.first, c.pages, c.words)
		}
	}
	if err := g.VM.ClearDirtyLog(0, 0, 0, nil); err != nil {
		t.Errorf("ClearDirtyLog of no pages = %v", err)
	}
}

// A slot above 4 GiB, a read-only one, and one that is deleted.
func TestMemorySlots(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	kvmtest.NeedCap(t, s, kvm.CapReadonlyMem)
	g := kvmtest.NewGuest(t, s, kvmtest.Config{}, []byte{
		0xbb, 0x00, 0x00, 0x00, 0x20, // mov ebx, Device
		0x8a, 0x03, // 1: mov al, [rbx]
		0x88, 0x43, 0x01, // mov [rbx+1], al
		0xeb, 0xf9, // jmp 1b
	})
	rom, err := sys.MapAnonymous(kvm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.VM.Close(); rom.Close() })
	rom.Bytes()[0] = 0x42
	if err := g.VM.SetMemory(1, kvmtest.Device, rom.Bytes(), kvm.ReadOnly); err != nil {
		t.Fatal(err)
	}
	g.Run(kvm.ExitMMIO) // the read has hit memory, the write does not
	m := g.CPU.MMIO()
	if !m.Write || m.Addr != kvmtest.Device+1 || len(m.Data) != 1 || m.Data[0] != 0x42 {
		t.Errorf("MMIO() = %+v; want the write of what was read, 0x42", m)
	}
	if err := g.VM.DeleteMemory(1); err != nil {
		t.Fatal(err)
	}
	g.Run(kvm.ExitMMIO)
	if m := g.CPU.MMIO(); m.Write || m.Addr != kvmtest.Device {
		t.Errorf("MMIO() = %+v; want the read that finds no memory", m)
	}
	if err := g.VM.SetMemory(2, 5<<30, rom.Bytes(), 0); err != nil {
		t.Errorf("SetMemory above 4 GiB = %v", err)
	}
	if err := g.VM.SetMemory(3, memory.GPA(6<<30), nil, 0); err == nil {
		t.Error("SetMemory without memory succeeds")
	}
}
