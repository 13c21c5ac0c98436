package kvm

import (
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
)

// Execution tells how a guest's kernel code is executed.
type Execution struct {
	Native bool
	Guest  float64 // instructions per second of a loop in a guest's kernel mode
	Host   float64 // loop iterations per second, times two, of a like loop on the host
}

func (e Execution) String() string {
	how := "natively"
	if !e.Native {
		how = "by interpreting it, which no stock kernel survives"
	}
	return fmt.Sprintf("KVM executes guest kernel code %s (%.3g million instructions/s, the host %.3g)", how, e.Guest/1e6, e.Host/1e6)
}

// Some KVMs, of clouds that offer no nested virtualization, run a guest's kernel
// mode in KVM's instruction emulator: hundreds to thousands of host instructions
// for each of the guest's. All the ioctls are there, and nothing but
// time tells the difference.
//
// The guest's speed alone does not, as the host may itself be slow (an emulated machine
// with a real, nested KVM). The ratio does. A two-instruction loop runs in a guest
// at the host's speed, give or take what the two compilers make of it and what a noisy
// neighbour takes; interpreted, it runs at a thousandth of it or less.
// nativeRatio lies in the middle between the two, as ratios go.
//
// What is compared is the time that more iterations take, not the time that a
// loop takes: entering a guest for the first time costs page faults, and tens of
// milliseconds on an emulated machine.
const nativeRatio = 0.02

const (
	probeSample = 10 * time.Millisecond  // a difference that tells enough
	probeLeast  = time.Millisecond       // the least that tells anything
	probeTime   = 400 * time.Millisecond // processor time for all the guest's loops
	probeWait   = 10 * time.Second       // for the processor, on a machine that is busy
	probeKick   = 50 * time.Millisecond  // how often a loop is interrupted to look at the clock
	probeFirst  = 1000                   // iterations of the first loop: about a millisecond if interpreted
)

// ProbeExecution measures whether KVM executes guest kernel code on the processor or
// interprets it, by a tiny guest that counts down in 64-bit kernel mode. It
// takes 50 to 300 ms on an idle machine, half a second of processor time at worst.
func (s *System) ProbeExecution() (Execution, error) {
	guest, err := s.guestSpeed()
	if err != nil {
		return Execution{}, fmt.Errorf("measure how KVM executes guest code: %w", err)
	}
	host := hostSpeed()
	return Execution{Native: guest >= nativeRatio*host, Guest: guest, Host: host}, nil
}

// threadTime is the processor time of this thread, that in guests included: it does
// not count what other processes take.
func threadTime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// grow is the number of iterations to try next when n took too short: enough for
// two samples, but no more than 16 times as many.
func grow(n uint64, took time.Duration) uint64 {
	return min(n*16, n*uint64(2*probeSample)/uint64(max(took, 1))+1)
}

// spin counts down from n. It stays a loop of two or three instructions as long as
// the compiler cannot foresee the result.
//
//go:noinline
func spin(n uint64) (x uint64) {
	for ; n != 0; n-- {
		x ^= n
	}
	return x
}

func hostSpeed() float64 {
	runtime.LockOSThread() // whose time is measured
	defer runtime.UnlockOSThread()
	for n := uint64(probeFirst); ; {
		before := threadTime()
		runtime.KeepAlive(spin(n))
		took := threadTime() - before
		if took >= probeSample {
			return 2 * float64(n) / took.Seconds()
		}
		n = grow(n, took)
	}
}

// guestSpeed runs the loop in a guest.
func (s *System) guestSpeed() (speed float64, err error) {
	const (
		tables memory.GPA = 0
		code   memory.GPA = PageTablesSize
	)
	ram, err := sys.MapAnonymous(PageTablesSize + PageSize)
	if err != nil {
		return 0, err
	}
	defer ram.Close() // after the VM, whose memory it is
	vm, err := s.CreateVM()
	if err != nil {
		return 0, err
	}
	defer vm.Close()
	PageTables(ram.Bytes(), tables)
	copy(ram.Bytes()[code:], []byte{
		0x48, 0xff, 0xc9, // 1: dec rcx
		0x75, 0xfb, //       jnz 1b
		0xe6, 0x00, //       out 0, al
	})
	err = vm.SetMemory(0, 0, ram.Bytes(), 0)
	if err != nil {
		return 0, err
	}
	cpu, err := vm.CreateVCPU(0)
	if err != nil {
		return 0, err
	}
	defer cpu.Close()
	sregs, err := cpu.Sregs()
	if err != nil {
		return 0, err
	}
	sregs.LongMode(tables)
	if err := cpu.SetSregs(&sregs); err != nil {
		return 0, err
	}
	unbind, err := cpu.Bind()
	if err != nil {
		return 0, err
	}
	defer unbind()

	done := make(chan struct{})
	defer close(done)
	go func() {
		tick := time.NewTicker(probeKick)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				cpu.Kick()
			case <-done:
				return
			}
		}
	}()
	began, start := time.Now(), threadTime()
	late := func() bool { return threadTime()-start > probeTime || time.Since(began) > probeWait }

	// The first pass takes the page faults, the second what any pass costs.
	var fixed time.Duration
	for range 2 {
		if _, fixed, err = countDown(cpu, code, 1, late); err != nil {
			return 0, err
		}
	}
	for n := uint64(probeFirst); ; {
		left, took, err := countDown(cpu, code, n, late)
		if err != nil {
			return 0, err
		}
		took -= fixed
		if took >= probeSample || took >= probeLeast && late() {
			return 2 * float64(n-left) / took.Seconds(), nil
		}
		if late() {
			return 0, fmt.Errorf("the guest had %v of processor time within %v, which is too little to tell", threadTime()-start, time.Since(began))
		}
		n = grow(n, took)
	}
}

// countDown runs the loop from n until it ends or it is late. left is what remained,
// took the processor time.
func countDown(cpu *VCPU, code memory.GPA, n uint64, late func() bool) (left uint64, took time.Duration, err error) {
	if err := cpu.SetRegs(&Regs{RIP: uint64(code), RCX: n, RFlags: 2}); err != nil {
		return 0, 0, err
	}
	before := threadTime()
	for {
		reason, err := cpu.Run()
		switch {
		case err != nil:
			return 0, 0, err
		case reason == ExitIO:
		case reason == ExitIntr && !late():
			continue
		case reason == ExitIntr:
		default:
			return 0, 0, cpu.Explain(reason, nil)
		}
		took = threadTime() - before
		regs, err := cpu.Regs()
		return regs.RCX, took, err
	}
}
