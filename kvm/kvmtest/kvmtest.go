// Package kvmtest helps tests that run tiny guests: programs of some bytes in 64-bit
// mode, without a kernel. They work on every KVM, also on one that interprets
// guest code.
package kvmtest

import (
	"errors"
	"os"
	"testing"
	"time"

	"vmm/internal/sys"
	"vmm/kvm"
	"vmm/memory"
)

// RequireKVM is the environment variable that makes a test fail where it would be
// skipped for want of KVM: with it set to 1, a run without failures has run
// everything.
const RequireKVM = "VMM_TEST_REQUIRE_KVM"

func skip(t testing.TB, why error) {
	t.Helper()
	if os.Getenv(RequireKVM) == "1" {
		t.Fatalf("%s=1 forbids to skip: %v", RequireKVM, why)
	}
	t.Skip(why)
}

// NeedKVM opens /dev/kvm for the test. It skips the test if there is none or it is
// forbidden; a KVM that is there and does not work is a failure.
func NeedKVM(t testing.TB) *kvm.System {
	t.Helper()
	s, err := kvm.Open(kvm.DefaultPath)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		skip(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// NeedCap skips the test if the host's KVM lacks a capability.
func NeedCap(t testing.TB, s *kvm.System, c kvm.Cap) {
	t.Helper()
	_, err := s.Check(c)
	if errors.Is(err, kvm.ErrNotSupported) {
		skip(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The guest-physical layout of a Guest.
const (
	RAMSize            = 2 << 20    // memory from address 0, slot 0
	GDT     memory.GPA = 0x1000     // null, null, code 0x10, data 0x18, accessed bits set
	IDT     memory.GPA = 0x2000     // 256 gates of 16 bytes, all absent
	Tables  memory.GPA = 0x3000     // page tables: 1 GiB mapped one to one
	Stack   memory.GPA = 0x8000     // top of the stack
	Code    memory.GPA = 0x8000     // where the program starts
	Data    memory.GPA = 0x10000    // the rest of the memory is the test's
	Device  memory.GPA = 0x20000000 // here and up to 1 GiB is no memory: MMIO
)

// Guest is a VM of one vCPU that is about to run a program in 64-bit mode. It is
// gone when the test ends.
type Guest struct {
	VM  *kvm.VM
	CPU *kvm.VCPU
	RAM []byte // guest memory from address 0

	t testing.TB
}

// Config is what a Guest may have beyond the default.
type Config struct {
	IRQChip     bool            // PICs, IOAPIC, local APIC
	MemoryFlags kvm.MemoryFlags // of slot 0
}

// NewGuest builds a guest and loads the program. The vCPU is bound to the calling
// goroutine's thread until the test ends.
func NewGuest(t testing.TB, s *kvm.System, cfg Config, program []byte) *Guest {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	vm, err := s.CreateVM()
	must(err)
	ram, err := sys.MapAnonymous(RAMSize)
	must(err)
	t.Cleanup(func() { vm.Close(); ram.Close() }) // after the vCPU's, below
	must(vm.SetMemory(0, 0, ram.Bytes(), cfg.MemoryFlags))
	if cfg.IRQChip {
		must(vm.CreateIRQChip())
	}
	cpu, err := vm.CreateVCPU(0)
	must(err)
	t.Cleanup(func() { cpu.Close() })
	unbind, err := cpu.Bind()
	must(err)
	t.Cleanup(unbind)

	g := &Guest{VM: vm, CPU: cpu, RAM: ram.Bytes(), t: t}
	copy(g.RAM[GDT:], []byte{
		16: 0xff, 0xff, 0, 0, 0, 0x9b, 0xaf, 0, // code
		24: 0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0, // data
	})
	kvm.PageTables(g.RAM[Tables:], Tables)
	sregs, err := cpu.Sregs()
	must(err)
	sregs.LongMode(Tables)
	sregs.GDT = kvm.Dtable{Base: uint64(GDT), Limit: 31}
	sregs.IDT = kvm.Dtable{Base: uint64(IDT), Limit: 256*16 - 1}
	must(cpu.SetSregs(&sregs))
	g.Load(program)
	return g
}

// Load puts a program at Code and points the vCPU at it.
func (g *Guest) Load(program []byte) {
	g.t.Helper()
	copy(g.RAM[Code:], program)
	if err := g.CPU.SetRegs(&kvm.Regs{RIP: uint64(Code), RSP: uint64(Stack), RFlags: 2}); err != nil {
		g.t.Fatal(err)
	}
}

// Gate makes the handler at an address serve a vector.
func (g *Guest) Gate(vector int, handler memory.GPA) {
	h := uint64(handler)
	copy(g.RAM[int(IDT)+16*vector:], []byte{
		byte(h), byte(h >> 8), 0x10, 0, 0, 0x8e, byte(h >> 16), byte(h >> 24),
		byte(h >> 32), byte(h >> 40), byte(h >> 48), byte(h >> 56),
	})
}

// Deadline is how long Run waits for an exit before it fails the test. A guest's work
// takes milliseconds; this is for a machine under heavy load.
const Deadline = 2 * time.Minute

// Run runs the guest to its next exit, which must have the reason given. Signals that
// interrupt it are passed over.
func (g *Guest) Run(want kvm.ExitReason) {
	g.t.Helper()
	late := make(chan struct{})
	timer := time.AfterFunc(Deadline, func() { close(late); g.CPU.Kick() })
	defer timer.Stop()
	for {
		got, err := g.CPU.Run()
		if err != nil {
			g.t.Fatal(err)
		}
		if got == kvm.ExitIntr {
			select {
			case <-late:
				g.t.Fatalf("no exit within %v; want %v%s", Deadline, want, g.rip())
			default:
				continue
			}
		}
		if got != want {
			g.t.Fatalf("Run() = %v; want %v: %v", got, want, g.CPU.Explain(got, g.Read))
		}
		return
	}
}

func (g *Guest) rip() string {
	regs, err := g.CPU.Regs()
	if err != nil {
		return ""
	}
	return " (rip " + memory.GPA(regs.RIP).String() + ")"
}

// Read copies guest memory, for VCPU.Explain.
func (g *Guest) Read(gpa memory.GPA, p []byte) error {
	if uint64(gpa) > RAMSize || len(p) > RAMSize-int(gpa) {
		return os.ErrInvalid
	}
	copy(p, g.RAM[gpa:])
	return nil
}
