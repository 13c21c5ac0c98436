package kvm

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// Every method after Close says so, and a second Close says nothing.
func TestClosed(t *testing.T) {
	s := openKVM(t)
	vm, err := s.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	cpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	ram, err := sys.MapAnonymous(PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(vm.SetMemory(0, 0, ram.Bytes(), LogDirtyPages))

	// The kernel keeps the VM while the vCPU is open.
	for range 2 {
		must(s.Close())
		must(vm.Close())
	}
	if _, err := cpu.Regs(); err != nil {
		t.Errorf("Regs() of a vCPU whose VM is closed = %v", err)
	}
	for range 2 {
		must(cpu.Close())
	}

	one := make([]uint64, 1)
	for name, err := range map[string]error{
		"System.CreateVM":         second(s.CreateVM()),
		"System.Check":            second(s.Check(CapIRQChip)),
		"System.Require":          s.Require(CapIRQChip),
		"System.MSRIndices":       second(s.MSRIndices()),
		"System.MSRFeatures":      second(s.MSRFeatures([]uint32{1})),
		"System.SupportedCPUID":   second(s.SupportedCPUID()),
		"System.ProbeExecution":   second(s.ProbeExecution()),
		"VM.Check":                second(vm.Check(CapIRQChip)),
		"VM.EnableCap":            vm.EnableCap(CapManualDirtyLogProtect2, 1),
		"VM.SetMemory":            vm.SetMemory(1, PageSize, ram.Bytes(), 0),
		"VM.DeleteMemory":         vm.DeleteMemory(0),
		"VM.EnableManualDirtyLog": second(vm.EnableManualDirtyLog()),
		"VM.DirtyLog":             vm.DirtyLog(0, one),
		"VM.ClearDirtyLog":        vm.ClearDirtyLog(0, 0, 1, one),
		"VM.SetTSSAddr":           vm.SetTSSAddr(0xfffbd000),
		"VM.SetIdentityMapAddr":   vm.SetIdentityMapAddr(0xfffbc000),
		"VM.CreateIRQChip":        vm.CreateIRQChip(),
		"VM.IRQChip":              second(vm.IRQChip(ChipIOAPIC)),
		"VM.SetIRQChip":           vm.SetIRQChip(&IRQChip{}),
		"VM.CreatePIT2":           vm.CreatePIT2(0),
		"VM.PIT2":                 second(vm.PIT2()),
		"VM.SetPIT2":              vm.SetPIT2(&PIT2{}),
		"VM.SetGSIRouting":        vm.SetGSIRouting(ChipRoutes()),
		"VM.IRQLine":              vm.IRQLine(1, true),
		"VM.SignalMSI":            second(vm.SignalMSI(MSI{})),
		"VM.AssignIRQFD":          vm.AssignIRQFD(0, 24),
		"VM.DeassignIRQFD":        vm.DeassignIRQFD(0, 24),
		"VM.AssignIOEvent":        vm.AssignIOEvent(IOEvent{}),
		"VM.DeassignIOEvent":      vm.DeassignIOEvent(IOEvent{}),
		"VM.Clock":                second(vm.Clock()),
		"VM.SetClock":             vm.SetClock(ClockData{}),
		"VM.CreateVCPU":           second(vm.CreateVCPU(1)),
		"VCPU.Run":                second(cpu.Run()),
		"VCPU.Complete":           second(cpu.Complete()),
		"VCPU.Kick":               cpu.Kick(),
		"VCPU.NMI":                cpu.NMI(),
		"VCPU.Translate":          third(cpu.Translate(0)),
		"VCPU.KVMClockCtrl":       cpu.KVMClockCtrl(),
		"VCPU.Regs":               second(cpu.Regs()),
		"VCPU.SetRegs":            cpu.SetRegs(&Regs{}),
		"VCPU.oldSregs":           second(cpu.oldSregs()),
		"VCPU.setOldSregs":        cpu.setOldSregs(&Sregs2{}),
		"VCPU.Sregs":              second(cpu.Sregs()),
		"VCPU.SetSregs":           cpu.SetSregs(&Sregs2{}),
		"VCPU.XSave":              second(cpu.XSave()),
		"VCPU.SetXSave":           cpu.SetXSave(make([]byte, xsaveMin)),
		"VCPU.XCRs":               second(cpu.XCRs()),
		"VCPU.SetXCRs":            cpu.SetXCRs(&XCRs{N: 1}),
		"VCPU.Events":             second(cpu.Events()),
		"VCPU.SetEvents":          cpu.SetEvents(&VCPUEvents{}),
		"VCPU.DebugRegs":          second(cpu.DebugRegs()),
		"VCPU.SetDebugRegs":       cpu.SetDebugRegs(&DebugRegs{}),
		"VCPU.LAPIC":              second(cpu.LAPIC()),
		"VCPU.SetLAPIC":           cpu.SetLAPIC(&LAPIC{}),
		"VCPU.MPState":            second(cpu.MPState()),
		"VCPU.SetMPState":         cpu.SetMPState(MPRunnable),
		"VCPU.MSRs":               second(cpu.MSRs([]uint32{0x10})),
		"VCPU.SetMSRs":            cpu.SetMSRs([]MSREntry{{Index: 0x10}}),
		"VCPU.CPUID":              second(cpu.CPUID()),
		"VCPU.SetCPUID":           cpu.SetCPUID(nil),
		"VCPU.TSCKHz":             second(cpu.TSCKHz()),
		"VCPU.SetTSCKHz":          cpu.SetTSCKHz(1000),
		"VCPU.TSCOffset":          second(cpu.TSCOffset()),
		"VCPU.SetTSCOffset":       cpu.SetTSCOffset(0),
	} {
		if !errors.Is(err, os.ErrClosed) || err == os.ErrClosed {
			t.Errorf("%s after Close = %v; want os.ErrClosed with its operation", name, err)
		}
	}
}

func third[A, B any](_ A, _ B, err error) error { return err }

func TestDescriptorsAreCloseOnExec(t *testing.T) {
	s := openKVM(t)
	vm, err := s.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	cpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	defer cpu.Close()
	for name, f := range map[string]*os.File{"System": s.file, "VM": vm.file, "VCPU": cpu.file} {
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s: descriptor flags %#x, %v; want FD_CLOEXEC", name, flags, err)
		}
	}
}

// count is the number of open descriptors and of kvm_run mappings of this process.
func count(t *testing.T) (fds, runs int) {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return len(dir), strings.Count(string(maps), "kvm-vcpu")
}

// What is closed and what fails to be built leaves no descriptor and no mapping.
func TestNothingLeaks(t *testing.T) {
	s := openKVM(t)
	vm, err := s.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	cpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	defer cpu.Close()
	fds, runs := count(t)
	if runs != 1 {
		t.Fatalf("%d mappings of kvm_run; want 1 (has its name in /proc/self/maps changed?)", runs)
	}
	for range 3 {
		vm, err := s.CreateVM()
		if err != nil {
			t.Fatal(err)
		}
		for id := range 2 {
			cpu, err := vm.CreateVCPU(id)
			if err != nil {
				t.Fatal(err)
			}
			defer cpu.Close() // the second time does nothing
			if _, err := vm.CreateVCPU(id); err == nil {
				t.Error("the same vCPU twice")
			}
			cpu.Close()
		}
		vm.runSize = 0 // the mapping fails after the vCPU is made
		if _, err := vm.CreateVCPU(5); err == nil {
			t.Error("CreateVCPU with an impossible mapping succeeds")
		}
		vm.Close()
		if _, err := Open("/dev/null"); err == nil {
			t.Error("/dev/null is KVM")
		}
	}
	if gotFDs, gotRuns := count(t); gotFDs != fds || gotRuns != runs {
		t.Errorf("%d descriptors and %d mappings are open; want %d and %d", gotFDs, gotRuns, fds, runs)
	}
}
