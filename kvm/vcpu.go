package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	hype "github.com/c35s/hype/kvm"
	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
)

// VCPU is a virtual processor. It belongs to one goroutine at a time; see the
// package comment for what others may do.
type VCPU struct {
	handle
	id  int
	vm  *VM
	cpu *hype.VCPU // handle.file, for hype/kvm

	run           []byte         // struct kvm_run, shared with the kernel; see immediateExit
	immediateExit *atomic.Uint32 // in run

	kickMu sync.Mutex   // held while something is done to tid, and to unbind it
	tid    atomic.Int32 // the bound OS thread, 0 if none

	lowered bool // under kickMu: tid has another nice value than
	nice    int
}

// ID is the vCPU's number, which is its APIC id.
func (c *VCPU) ID() int { return c.id }

// ExitReason says why Run returned. Its String is the kernel's name.
type ExitReason = hype.Exit

// The exit reasons of this kind of VM; any other one is a defect here or there.
const (
	ExitUnknown       = hype.ExitUnknown       // UnknownReason; the processor refused for a reason KVM does not know
	ExitIO            = hype.ExitIO            // IO
	ExitMMIO          = hype.ExitMMIO          // MMIO
	ExitHLT           = hype.ExitHLT           // HLT in a VM without an in-kernel APIC
	ExitIntr          = hype.ExitIntr          // a Kick, a signal, or a started AP: look for requests, run again
	ExitShutdown      = hype.ExitShutdown      // triple fault
	ExitFailEntry     = hype.ExitFailEntry     // FailEntry
	ExitInternalError = hype.ExitInternalError // InternalError
	ExitSystemEvent   = hype.ExitSystemEvent   // SystemEvent
	ExitHypercall     = hype.ExitHypercall     // Hypercall
	ExitDebug         = hype.ExitDebug
)

// kickSignal interrupts KVM_RUN in the thread it is directed to.
//
// It must have a handler (a signal without one either kills the process or, if
// ignored, does not interrupt), the handler must do nothing, and nobody else may
// use it. Go's runtime installs a handler for every real-time signal from 35 up
// when the process starts, and that handler drops a signal which nobody asked for
// with signal.Notify: no goroutine is woken, nothing is allocated. The lower
// ones belong to C libraries, whose threads use them for themselves; SIGURG is
// how the runtime preempts goroutines and SIGPROF how it profiles them. A
// program that asks signal.Notify for all signals without naming them sees kicks
// too; one that ignores this signal (signal.Ignore) breaks Kick.
//
// A real-time signal is queued, not merged, and the queue is limited; Kick sends
// none while an earlier one is pending.
const kickSignal = unix.Signal(0x2a)

// errNotBound keeps a vCPU out of KVM_RUN that no Kick could get out of it.
var errNotBound = errors.New("the vCPU is bound to no thread")

// Bind locks the calling goroutine to its OS thread and makes the thread the one
// that Kick interrupts. Run is called between Bind and the call of unbind, from
// the same goroutine.
func (c *VCPU) Bind() (unbind func(), err error) {
	runtime.LockOSThread()
	if !c.tid.CompareAndSwap(0, int32(unix.Gettid())) {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("kvm: vcpu %d is bound to thread %d already", c.id, c.tid.Load())
	}
	// A process may be started with signals blocked, and Go's threads inherit that.
	var set, old unix.Sigset_t
	set.Val[(kickSignal-1)/64] |= 1 << ((kickSignal - 1) % 64)
	err = unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, &old)
	unbind = func() {
		c.kickMu.Lock()     // a Kick that has seen the thread has sent its signal when this is ours
		_ = c.raiseLocked() // for whatever the thread does next
		c.tid.Store(0)
		c.kickMu.Unlock()
		unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
		runtime.UnlockOSThread()
	}
	if err != nil {
		unbind()
		return nil, fmt.Errorf("kvm: unblock signal %d: %w", kickSignal, err)
	}
	return unbind, nil
}

// Run enters the guest until something needs attention and says what. It
// allocates nothing.
//
// KVM_RUN's EINTR and EAGAIN are results here: ExitIntr. The first means a Kick or
// some other signal, the second that a vCPU which waited for its start-up
// interrupt has received it. After either the caller looks for requests
// and runs again.
func (c *VCPU) Run() (ExitReason, error) {
	if err := c.acquire(); err != nil {
		return 0, failure("KVM_RUN", err)
	}
	defer c.release()
	if c.tid.Load() == 0 {
		return 0, with(failure("KVM_RUN", errNotBound), "vcpu %d", c.id)
	}
	err := hype.Run(c.cpu)
	if err == nil {
		return ExitReason(binary.LittleEndian.Uint32(c.run[runExitReason:])), nil
	}
	if err == unix.EINTR || err == unix.EAGAIN {
		// The kick is taken. One that comes between KVM_RUN's return and this
		// store is taken with it: its request was made before it, and the caller
		// looks for requests after this.
		c.immediateExit.Store(0)
		return ExitIntr, nil
	}
	return 0, with(failure("KVM_RUN", err), "vcpu %d", c.id)
}

// Kick makes Run return ExitIntr: the one in progress, or else the next one. No kick
// is lost, several may become one, and any goroutine may kick at any time. The
// order is: make the request where the vCPU's goroutine looks for it, then kick.
//
// Kick does not wait. A Run that is about to return for another reason returns that
// first; the next one then returns ExitIntr after completing its I/O.
func (c *VCPU) Kick() error {
	if err := c.acquire(); err != nil { // keeps the mapping
		return failure("kick", err)
	}
	defer c.release()
	// KVM_RUN looks at immediate_exit after it has made signals interrupt it: a
	// vCPU that has not looked yet will see this, one that has looked is
	// interrupted by the signal below.
	if c.immediateExit.Swap(immediateExitSet) != 0 {
		return nil // an earlier kick is on its way, or has arrived and Run not yet returned
	}
	c.kickMu.Lock()
	defer c.kickMu.Unlock()
	tid := int(c.tid.Load())
	if tid == 0 {
		return nil
	}
	err := unix.Tgkill(os.Getpid(), tid, kickSignal)
	if err != nil {
		return with(failure("tgkill", err), "vcpu %d thread %d signal %d", c.id, tid, kickSignal)
	}
	return nil
}

// Lower adds by to the nice value of the bound thread (setpriority(2)), until Raise
// or the end of the binding. It fails, and changes nothing, with EPERM where that could
// not be undone. A vCPU that is bound to no thread, or lowered already, stays as it is.
func (c *VCPU) Lower(by int) error {
	c.kickMu.Lock()
	defer c.kickMu.Unlock()
	tid := int(c.tid.Load())
	if tid == 0 || c.lowered {
		return nil
	}
	nice, err := sys.Lower(tid, by)
	if err != nil {
		return with(failure("setpriority", err), "vcpu %d thread %d nice %+d", c.id, tid, by)
	}
	c.lowered, c.nice = true, nice
	return nil
}

// Raise undoes Lower.
func (c *VCPU) Raise() error {
	c.kickMu.Lock()
	defer c.kickMu.Unlock()
	return c.raiseLocked()
}

func (c *VCPU) raiseLocked() error {
	if !c.lowered {
		return nil
	}
	c.lowered = false
	tid := int(c.tid.Load())
	if err := sys.SetNice(tid, c.nice); err != nil {
		return with(failure("setpriority", err), "vcpu %d thread %d nice %d", c.id, tid, c.nice)
	}
	return nil
}

// Complete finishes the instruction at whose I/O exit the vCPU stands, without
// running the next one: the vCPU's state is whole, and may be saved, once Complete
// has returned ExitIntr. Any other reason is an exit like those of Run (an
// access may need several); handle it and call Complete again.
func (c *VCPU) Complete() (ExitReason, error) {
	if err := c.acquire(); err != nil {
		return 0, failure("KVM_RUN", err)
	}
	c.immediateExit.Store(immediateExitSet)
	c.release()
	return c.Run()
}

// NMI queues a non-maskable interrupt (KVM api 4.64). Like all of a vCPU's requests it
// waits while Run is in progress.
func (c *VCPU) NMI() error {
	_, err := c.call(reqNMI, 0)
	return with(err, "vcpu %d", c.id)
}

// Translate looks a virtual address up in the vCPU's page tables (KVM api 4.10). ok
// is false if nothing is mapped there.
func (c *VCPU) Translate(virtual uint64) (physical memory.GPA, ok bool, err error) {
	t := translation{Linear: virtual}
	_, err = pass(&c.handle, reqTranslate, &t)
	return memory.GPA(t.Physical), t.Valid != 0, with(err, "vcpu %d address %#x", c.id, virtual)
}

// KVMClockCtrl tells the guest that it was stopped, so that its watchdogs do not
// bark (KVM api 4.69). A guest without kvm-clock has nobody to tell; that is
// no error.
func (c *VCPU) KVMClockCtrl() error {
	_, err := c.call(reqKVMClockCtrl, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return with(err, "vcpu %d", c.id)
}
