package kvm_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"vmm/kvm"
	"vmm/kvm/kvmtest"
)

// guests that are in the guest, in the kernel, and on their way between them.
var loops = map[string][]byte{
	"in guest code":   {0xeb, 0xfe},                                                         // 1: jmp 1b
	"in port I/O":     {0xe6, 0x80, 0xeb, 0xfc},                                             // 1: out 0x80, al; jmp 1b
	"in short bursts": {0xb9, 100, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xe6, 0x80, 0xeb, 0xf3}, // 1: mov ecx, 100; 2: dec ecx; jnz 2b; out 0x80, al; jmp 1b
}

// A thousand requests at random moments, each followed by one kick and awaited: one
// lost kick, and the test never ends.
func TestKickIsNeverLost(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	for name, program := range loops {
		t.Run(name, func(t *testing.T) {
			g := kvmtest.NewGuest(t, s, kvmtest.Config{}, program)
			const kicks = 1000
			var request atomic.Int64
			answer := make(chan int64, 1)
			kickErr := make(chan error, 1)
			go func() {
				for i := int64(1); i <= kicks; i++ {
					for range rand.IntN(20_000) { // up to some 10 us
						runtime.KeepAlive(i)
					}
					request.Store(i)
					if err := g.CPU.Kick(); err != nil {
						kickErr <- err
						return
					}
					select {
					case n := <-answer:
						if n != i {
							kickErr <- errors.New("an answer without a request")
							return
						}
					case <-time.After(kvmtest.Deadline):
						kickErr <- errors.New("lost kick")
						request.Store(-1)
						g.CPU.Kick()
						return
					}
				}
				kickErr <- nil
			}()
			var answered int64
			for answered < kicks {
				reason, err := g.CPU.Run()
				if err != nil {
					t.Fatal(err)
				}
				switch reason {
				case kvm.ExitIO:
				case kvm.ExitIntr:
					if n := request.Load(); n < 0 {
						answered = kicks
					} else if n != answered {
						answered = n
						answer <- n
					}
				default:
					t.Fatalf("Run() = %v; want ExitIO or ExitIntr", reason)
				}
			}
			if err := <-kickErr; err != nil {
				t.Error(err)
			}
		})
	}
}

// Many kickers at once make at least one ExitIntr each time, and never an error:
// the signal queue does not fill up.
func TestKickStorm(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, loops["in guest code"])
	const kickers, kicks = 4, 20_000
	var left atomic.Int64
	left.Store(kickers)
	errs := make(chan error, kickers)
	for range kickers {
		go func() {
			for range kicks {
				if err := g.CPU.Kick(); err != nil {
					errs <- err
					break
				}
			}
			left.Add(-1)
			errs <- g.CPU.Kick()
		}()
	}
	for left.Load() > 0 {
		if reason, err := g.CPU.Run(); err != nil || reason != kvm.ExitIntr {
			t.Fatalf("Run() = %v, %v; want ExitIntr", reason, err)
		}
	}
	for range kickers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestKickBeforeRunCountsOnce(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, loops["in port I/O"])
	for range 3 {
		if err := g.CPU.Kick(); err != nil {
			t.Fatal(err)
		}
	}
	if reason, err := g.CPU.Run(); reason != kvm.ExitIntr || err != nil {
		t.Fatalf("Run() after three kicks = %v, %v; want ExitIntr", reason, err)
	}
	regs, err := g.CPU.Regs()
	if err != nil {
		t.Fatal(err)
	}
	if regs.RIP != uint64(kvmtest.Code) {
		t.Errorf("the guest ran to rip %#x in spite of the kick", regs.RIP)
	}
	g.Run(kvm.ExitIO)
}

// A kick of a thread that has ended must not hit its successor, nor fail.
func TestKickUnbound(t *testing.T) {
	s := kvmtest.NeedKVM(t)
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
	unbind, err := cpu.Bind()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cpu.Bind(); err == nil {
		t.Error("a second Bind() succeeds")
	}
	unbind()
	if err := cpu.Kick(); err != nil {
		t.Errorf("Kick() of an unbound vCPU = %v", err)
	}
	if unbind, err = cpu.Bind(); err != nil {
		t.Fatalf("Bind() after unbind = %v", err)
	}
	unbind()
}

// Complete finishes an IN without running what follows it.
func TestComplete(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, []byte{
		0xe4, 0x10, // in al, 0x10
		0xb0, 0x77, // mov al, 0x77
		0xf4, // hlt
	})
	g.Run(kvm.ExitIO)
	io, err := g.CPU.IO()
	if err != nil {
		t.Fatal(err)
	}
	io.Data[0] = 0x5a
	if reason, err := g.CPU.Complete(); reason != kvm.ExitIntr || err != nil {
		t.Fatalf("Complete() = %v, %v; want ExitIntr", reason, err)
	}
	regs, err := g.CPU.Regs()
	if err != nil {
		t.Fatal(err)
	}
	if regs.RAX != 0x5a || regs.RIP != uint64(kvmtest.Code)+2 {
		t.Errorf("after Complete rax %#x rip %#x; want 0x5a and %#x", regs.RAX, regs.RIP, kvmtest.Code+2)
	}
	g.Run(kvm.ExitHLT)
}

func TestRunDoesNotAllocate(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, loops["in port I/O"])
	n := testing.AllocsPerRun(1000, func() {
		reason, err := g.CPU.Run()
		if err != nil {
			t.Fatal(err)
		}
		if reason == kvm.ExitIO {
			if _, err := g.CPU.IO(); err != nil {
				t.Fatal(err)
			}
		}
	})
	if n != 0 {
		t.Errorf("Run and IO allocate %v times; want 0", n)
	}
	n = testing.AllocsPerRun(1000, func() { g.CPU.Kick(); g.CPU.Run() })
	if n != 0 {
		t.Errorf("Kick and Run allocate %v times; want 0", n)
	}
}

// Close from elsewhere leaves a Run in progress its descriptor and its mapping.
func TestCloseDuringRun(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, loops["in port I/O"])
	go g.CPU.Close()
	deadline := time.Now().Add(kvmtest.Deadline)
	for {
		_, err := g.CPU.Run()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatal("Run() goes on after Close")
		}
	}
}

// A second vCPU waits in Run for its INIT and start-up interrupts; that they have come
// is an ExitIntr too (KVM_RUN's EAGAIN), and the next Run is real mode at the
// start-up vector's page.
func TestStartSecondVCPU(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{IRQChip: true}, waiting)
	if err := g.VM.SetTSSAddr(0xfffbd000); err != nil { // Intel's processors need it for real mode
		t.Fatal(err)
	}
	copy(g.RAM[0x9000:], []byte{0xe6, 0x99, 0xf4}) // out 0x99, al; hlt
	cpu, err := g.VM.CreateVCPU(1)
	if err != nil {
		t.Fatal(err)
	}
	defer cpu.Close()
	if state, err := cpu.MPState(); state != kvm.MPUninitialized || err != nil {
		t.Fatalf("MPState() of a new second vCPU = %v, %v; want uninitialized", state, err)
	}
	lapic, err := cpu.LAPIC()
	if err != nil {
		t.Fatal(err)
	}
	if err := cpu.SetLAPIC(&lapic); err != nil { // see CreateVCPU
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() {
		unbind, err := cpu.Bind()
		if err != nil {
			result <- err
			return
		}
		defer unbind()
		for {
			reason, err := cpu.Run()
			switch {
			case err != nil:
				result <- err
				return
			case reason == kvm.ExitIntr:
				continue
			case reason != kvm.ExitIO:
				result <- cpu.Explain(reason, g.Read)
				return
			}
			io, err := cpu.IO()
			if err == nil && io.Port != 0x99 {
				err = fmt.Errorf("it wrote to port %#x; want 0x99", io.Port)
			}
			result <- err
			return
		}
	}()
	for _, data := range []uint32{0x500, 0x600 | 0x09} { // INIT; start up at page 9
		if delivered, err := g.VM.SignalMSI(kvm.MSI{Addr: 0xfee01000, Data: data}); err != nil || !delivered {
			t.Fatalf("SignalMSI(%#x) = %v, %v; want true", data, delivered, err)
		}
	}
	select {
	case err := <-result:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(kvmtest.Deadline):
		t.Fatal("the second vCPU does not start")
	}
}
