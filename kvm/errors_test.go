package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// openKVM is kvmtest.NeedKVM for tests inside the package, which kvmtest imports.
func openKVM(t *testing.T) *System {
	t.Helper()
	s, err := Open(DefaultPath)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		if os.Getenv("VMM_TEST_REQUIRE_KVM") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// What users read when something common fails.
func TestErrorTexts(t *testing.T) {
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
	ram, err := sys.MapAnonymous(2 * PageSize)
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
	must(vm.SetMemory(1, 0x100000, ram.Bytes(), 0))

	for _, c := range []struct {
		name  string
		err   error
		want  string
		errno error
	}{
		{"unaligned memory", vm.SetMemory(3, 0x10000_0800, ram.Bytes(), 0),
			"kvm: KVM_SET_USER_MEMORY_REGION slot 3 gpa 0x100000800+0x2000: invalid argument", unix.EINVAL},
		{"overlapping memory", vm.SetMemory(2, 0x101000, ram.Bytes(), 0),
			"kvm: KVM_SET_USER_MEMORY_REGION slot 2 gpa 0x101000+0x2000: file exists", unix.EEXIST},
		{"dirty log of no slot", vm.DirtyLog(7, make([]uint64, 1)),
			"kvm: KVM_GET_DIRTY_LOG slot 7: no such file or directory", unix.ENOENT},
		{"dirty log not kept", vm.DirtyLog(1, make([]uint64, 1)),
			"kvm: KVM_GET_DIRTY_LOG slot 1 of 2 pages: no such file or directory", unix.ENOENT},
		{"the same vCPU twice", second(vm.CreateVCPU(0)),
			"kvm: KVM_CREATE_VCPU id 0: file exists", unix.EEXIST},
		{"no such chip", second(vm.IRQChip(ChipIOAPIC)),
			"kvm: KVM_GET_IRQCHIP IOAPIC: no such device or address", unix.ENXIO},
		{"irqfd without an irqchip", vm.AssignIRQFD(-1, 24),
			"kvm: KVM_IRQFD fd -1 gsi 24 flags 0x0: invalid argument", unix.EINVAL},
		{"ioeventfd of an odd length", vm.AssignIOEvent(IOEvent{FD: 99, Addr: 0xd0000000, Len: 3}),
			"kvm: KVM_IOEVENTFD fd 99 mmio 0xd0000000 len 3 flags 0x0: invalid argument", unix.EINVAL},
		{"unknown MSR", second(cpu.MSRs([]uint32{0xdead0000})),
			"kvm: KVM_GET_MSRS: this host cannot read MSR 0xdead0000", nil},
		{"refused MSR", cpu.SetMSRs([]MSREntry{{Index: 0xdead0000, Data: 0x17}}),
			"kvm: KVM_SET_MSRS: this host refuses the value 0x17 for MSR 0xdead0000", nil},
		{"LAPIC without an irqchip", second(cpu.LAPIC()),
			"kvm: KVM_GET_LAPIC vcpu 0: invalid argument", unix.EINVAL},
		{"run outside Bind", second(cpu.Run()),
			"kvm: KVM_RUN vcpu 0: the vCPU is bound to no thread", nil},
		{"too many arguments", vm.EnableCap(CapManualDirtyLogProtect2, 1, 2, 3, 4, 5),
			"kvm: KVM_ENABLE_CAP KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with 5 arguments: argument list too long", unix.E2BIG},
		{"missing capabilities", &UnsupportedError{[]Cap{CapManualDirtyLogProtect2, CapPIT2}},
			"kvm: this host's KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (dirty log that is cleared by hand; Linux 5.2), KVM_CAP_PIT2", ErrNotSupported},
	} {
		if c.err == nil {
			t.Errorf("%s: no error", c.name)
			continue
		}
		if c.err.Error() != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, c.err, c.want)
		}
		if c.errno != nil && (!errors.Is(c.err, c.errno) || c.err == c.errno) {
			t.Errorf("%s: errors.Is(err, %v) = %v and err == it is %v; want true and false", c.name, c.errno, errors.Is(c.err, c.errno), c.err == c.errno)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	shared := filepath.Join(dir, "shared")
	if err := os.WriteFile(shared, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(shared, 0o660); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		err  error
		is   error
		want []string // parts of the text
	}{
		{"absent", second(Open(filepath.Join(dir, "kvm"))), fs.ErrNotExist,
			[]string{"this host has no KVM", filepath.Join(dir, "kvm"), "modprobe kvm_amd", "kvm_intel", "firmware"}},
		{"a file", second(Open(file)), unix.ENOTTY,
			[]string{"kvm: " + file + " is not KVM's device node", "KVM_GET_API_VERSION"}},
		{"the null device", second(Open("/dev/null")), unix.ENOTTY,
			[]string{"/dev/null is not KVM's device node"}},
		// As root nothing is forbidden, so these are made by hand.
		{"no driver behind the node", explainOpen("/dev/kvm", &fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.ENODEV}), unix.ENODEV,
			[]string{"this host has no KVM", "modprobe"}},
		{"forbidden, for root", explainOpen(file, &fs.PathError{Op: "open", Path: file, Err: unix.EACCES}), fs.ErrPermission,
			[]string{"KVM is forbidden to this user (open " + file + ": permission denied)", "chgrp kvm " + file, "join group kvm"}},
		{"forbidden, for a group", explainOpen(shared, &fs.PathError{Op: "open", Path: shared, Err: unix.EACCES}), fs.ErrPermission,
			[]string{"KVM is forbidden to this user", "usermod -aG", "log in again"}},
		{"something else", explainOpen(file, &fs.PathError{Op: "open", Path: file, Err: unix.EMFILE}), unix.EMFILE,
			[]string{"cannot open KVM: open " + file + ": too many open files"}},
		{"version", wrongVersion("/dev/kvm", 11), nil,
			[]string{"kvm: /dev/kvm speaks version 11 of the KVM interface, not 12"}},
	} {
		if c.err == nil {
			t.Errorf("%s: no error", c.name)
			continue
		}
		if c.is != nil && !errors.Is(c.err, c.is) {
			t.Errorf("%s: errors.Is(%v, %v) = false", c.name, c.err, c.is)
		}
		for _, part := range c.want {
			if !strings.Contains(c.err.Error(), part) {
				t.Errorf("%s: %q lacks %q", c.name, c.err, part)
			}
		}
	}
}

// The three answers, and what becomes of them.
func TestCapabilityAnswers(t *testing.T) {
	s := openKVM(t)
	if n, err := s.Check(CapUserMemory); n < 1 || err != nil {
		t.Errorf("Check(%v) = %d, %v; want yes", CapUserMemory, n, err)
	}
	const none Cap = 0x7ffffff0
	n, err := s.Check(none)
	if n != 0 || !errors.Is(err, ErrNotSupported) || err == ErrNotSupported {
		t.Errorf("Check(%d) = %d, %v; want no", none, n, err)
	}
	if err := s.Require(CapUserMemory, CapIRQChip); err != nil {
		t.Errorf("Require of what is there = %v", err)
	}
	err = s.Require(CapUserMemory, none, CapIRQChip, none+1)
	var u *UnsupportedError
	if !errors.As(err, &u) || len(u.Missing) != 2 || u.Missing[0] != none || u.Missing[1] != none+1 {
		t.Errorf("Require with two missing = %v; want both named", err)
	}
	s.Close()
	if _, err := s.Check(CapUserMemory); err == nil || errors.Is(err, ErrNotSupported) {
		t.Errorf("Check after Close = %v; want could not tell", err)
	}
	if err := s.Require(CapUserMemory); !errors.Is(err, os.ErrClosed) || errors.Is(err, ErrNotSupported) ||
		!strings.Contains(fmt.Sprint(err), "cannot tell whether this host's KVM has KVM_CAP_USER_MEMORY") {
		t.Errorf("Require after Close = %v; want could not tell, naming the capability", err)
	}
}

// The older requests say the same as the newer ones.
func TestOldHosts(t *testing.T) {
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
	want, err := cpu.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	want.CR2 = 0xc2
	want.Flags, want.PDPTRs = 0, [4]uint64{}
	if err := cpu.setOldSregs(&want); err != nil {
		t.Fatal(err)
	}
	got, err := cpu.oldSregs()
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("KVM_GET_SREGS gives\n%+v; want\n%+v", got, want)
	}
	want.Flags = Sregs2PDPTRsValid
	if err := cpu.setOldSregs(&want); !errors.Is(err, ErrNotSupported) {
		t.Errorf("KVM_SET_SREGS with PDPTRs = %v; want ErrNotSupported", err)
	}
	// Long mode without PAE.
	const refused = "kvm: KVM_SET_SREGS vcpu 0: invalid argument"
	if err := cpu.setOldSregs(&Sregs2{EFER: 1<<8 | 1<<10, CR0: 1<<31 | 1}); err == nil || err.Error() != refused {
		t.Errorf("KVM_SET_SREGS of nonsense = %v; want %s", err, refused)
	}
}
