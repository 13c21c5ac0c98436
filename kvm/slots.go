package kvm

import (
	"fmt"

	hype "github.com/c35s/hype/kvm"
	"golang.org/x/sys/unix"

	"vmm/memory"
)

// Slot numbers a VM's pieces of memory, from 0 to Check(CapNrMemslots)-1.
type Slot uint32

// PageSize is the size of a page in KVM's dirty log, in bytes.
const PageSize = 4096

// MemoryFlags qualify a memory slot.
type MemoryFlags uint32

const (
	LogDirtyPages MemoryFlags = memLogDirtyPages // keep a dirty log
	ReadOnly      MemoryFlags = memReadonly      // a guest's write is an MMIO exit
)

// SetMemory makes mem the guest's memory at gpa, or changes the flags of a slot
// that is there already (KVM api 4.35). The address and the length are
// multiples of the page size, and so is the address of mem, which must be a
// mapping outside Go's heap and stay mapped until the slot is deleted or the
// VM is gone: the kernel and the guest use it behind the garbage
// collector's back.
func (vm *VM) SetMemory(slot Slot, gpa memory.GPA, mem []byte, flags MemoryFlags) error {
	if len(mem) == 0 {
		return fmt.Errorf("kvm: memory slot %d at gpa %v has no memory", slot, gpa) // size 0 would delete it
	}
	return vm.setMemory(slot, &memoryRegion{
		Slot:          uint32(slot),
		Flags:         uint32(flags),
		GuestPhysAddr: uint64(gpa),
		MemorySize:    uint64(len(mem)),
		UserspaceAddr: addressOf(mem),
	})
}

// DeleteMemory takes a slot out of the guest.
func (vm *VM) DeleteMemory(slot Slot) error {
	return vm.setMemory(slot, &memoryRegion{Slot: uint32(slot)})
}

func (vm *VM) setMemory(slot Slot, r *memoryRegion) error {
	vm.slotsMu.Lock()
	defer vm.slotsMu.Unlock()
	err := vm.do("KVM_SET_USER_MEMORY_REGION", func() error { return hype.SetUserMemoryRegion(vm.vm, r) })
	if err != nil {
		return with(err, "slot %d gpa %v+%#x", slot, memory.GPA(r.GuestPhysAddr), r.MemorySize)
	}
	if r.MemorySize == 0 {
		delete(vm.slots, slot)
	} else {
		vm.slots[slot] = int(r.MemorySize / PageSize)
	}
	return nil
}

// EnableManualDirtyLog puts the clearing of dirty logs into our hands: DirtyLog only
// reads, ClearDirtyLog clears and write-protects. With initiallySet a log that is
// switched on starts with every page dirty, so the first pass over the memory
// need not write-protect it all at once (KVM api 7.11).
//
// It answers false if the host knows the first but not the second (before Linux 5.7):
// a log then starts clean and the first pass must not rely on it.
func (vm *VM) EnableManualDirtyLog() (initiallySet bool, err error) {
	flags, err := vm.Check(CapManualDirtyLogProtect2)
	if err != nil {
		return false, err
	}
	flags &= dirtyLogManualProtectEnable | dirtyLogInitiallySet
	return flags&dirtyLogInitiallySet != 0, vm.EnableCap(CapManualDirtyLogProtect2, uint64(flags))
}

// DirtyLog reads a slot's dirty log into bitmap: page i of the slot is bit i%64
// of word i/64 (KVM api 4.8). bitmap holds a bit for every page of the slot. A slot
// without a log is an error (ENOENT).
func (vm *VM) DirtyLog(slot Slot, bitmap []uint64) error {
	const r = reqGetDirtyLog
	vm.slotsMu.Lock() // the slot keeps its size until the kernel has written
	defer vm.slotsMu.Unlock()
	pages, ok := vm.slots[slot]
	switch {
	case !ok:
		return with(failure(r.String(), unix.ENOENT), "slot %d", slot)
	case len(bitmap)*64 < pages:
		return fmt.Errorf("kvm: %v slot %d: the bitmap has %d bits, the slot %d pages", r, slot, len(bitmap)*64, pages)
	}
	_, err := pass(&vm.handle, r, &dirtyLog{Slot: slot, Bitmap: &bitmap[0]})
	return with(err, "slot %d of %d pages", slot, pages)
}

// ClearDirtyLog marks pages clean and write-protects them, so that the next write
// marks them again: page first+i for each set bit i of bitmap (KVM api 4.117). first
// is a multiple of 64, and so is pages unless they end with the slot. Clear
// first, then copy the page: the other order loses a write in between.
func (vm *VM) ClearDirtyLog(slot Slot, first, pages int, bitmap []uint64) error {
	const r = reqClearDirtyLog
	if pages == 0 {
		return nil
	}
	if first < 0 || pages < 0 || int64(pages) > 1<<32-1 || len(bitmap)*64 < pages {
		return fmt.Errorf("kvm: %v slot %d: pages %d+%d with a bitmap of %d bits", r, slot, first, pages, len(bitmap)*64)
	}
	_, err := pass(&vm.handle, r, &clearDirtyLog{Slot: slot, FirstPage: uint64(first), NumPages: uint32(pages), Bitmap: &bitmap[0]})
	return with(err, "slot %d pages %d+%d", slot, first, pages)
}
