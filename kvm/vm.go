package kvm

import (
	"fmt"
	"sync"

	hype "github.com/c35s/hype/kvm"
	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
)

// VM is a virtual machine.
type VM struct {
	handle
	vm      *hype.VM // handle.file, for hype/kvm
	runSize int

	slotsMu sync.Mutex
	slots   map[Slot]int // pages of each memory slot: the kernel's bitmaps have their size
}

// EnableCap switches a capability on (KVM api 4.37).
func (vm *VM) EnableCap(c Cap, args ...uint64) error {
	arg := enableCap{Cap: uint32(c)}
	if copy(arg.Args[:], args) < len(args) {
		return with(failure(reqEnableCap.String(), unix.E2BIG), "%v with %d arguments", c, len(args))
	}
	_, err := pass(&vm.handle, reqEnableCap, &arg)
	return with(err, "%v %#x", c, args)
}

// SetTSSAddr gives KVM three pages of guest-physical addresses below 4 GiB, which
// must hold no memory: Intel processors need them to run real mode (KVM api 4.36).
func (vm *VM) SetTSSAddr(addr memory.GPA) error {
	err := vm.do("KVM_SET_TSS_ADDR", func() error { return hype.SetTSSAddr(vm.vm, uint64(addr)) })
	return with(err, "gpa %v", addr)
}

// SetIdentityMapAddr gives KVM one more such page (KVM api 4.41). It must come
// before the first CreateVCPU.
func (vm *VM) SetIdentityMapAddr(addr memory.GPA) error {
	err := vm.do("KVM_SET_IDENTITY_MAP_ADDR", func() error { return hype.SetIdentityMapAddr(vm.vm, uint64(addr)) })
	return with(err, "gpa %v", addr)
}

// Clock reads kvmclock (KVM api 4.29).
func (vm *VM) Clock() (ClockData, error) {
	var c ClockData
	_, err := pass(&vm.handle, reqGetClock, &c)
	return c, err
}

// SetClock sets kvmclock (KVM api 4.30). With ClockRealtime in Flags the kernel
// adds the real time that has passed since c was read. ClockTSCStable and ClockHostTSC,
// which Clock may have set, are its findings, not ours to ask for: they are left out.
func (vm *VM) SetClock(c ClockData) error {
	c.Flags &= ClockRealtime
	_, err := pass(&vm.handle, reqSetClock, &c)
	return with(err, "clock %d ns flags %#x", c.Clock, c.Flags)
}

// CreateVCPU adds a vCPU, whose id is its APIC id. The VM's interrupt controller
// must be there first.
//
// Interrupts find a vCPU through a table that the kernel makes anew when a local APIC
// is written, and does not when a vCPU is created: without a SetLAPIC for one of
// them the newest vCPU gets none, INIT and start-up included.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	var cpu *hype.VCPU
	err := vm.do("KVM_CREATE_VCPU", func() (err error) {
		cpu, err = hype.CreateVCPU(vm.vm, id)
		return err
	})
	if err != nil {
		return nil, with(err, "id %d", id)
	}
	run, err := sys.MapShared(int(cpu.Fd()), 0, vm.runSize)
	if err != nil {
		cpu.Close()
		return nil, fmt.Errorf("kvm: map kvm_run of vCPU %d: %w", id, err)
	}
	c := &VCPU{handle: handle{file: cpu.File}, id: id, vm: vm, cpu: cpu, run: run.Bytes()}
	c.immediateExit = immediateExit(c.run)
	c.last = func() { run.Close() }
	return c, nil
}
