package kvm

import (
	"errors"
	"fmt"
	"strings"

	hype "github.com/c35s/hype/kvm"
)

// ErrNotSupported is what errors.Is finds in every error that means "this host's
// KVM cannot do that", as opposed to "it did not work this time".
var ErrNotSupported = errors.New("not supported by this host's KVM")

// Error is a request to KVM that failed.
type Error struct {
	Op       string // the kernel's name of the request, such as KVM_SET_USER_MEMORY_REGION
	Operands string // what it was asked, such as "slot 3 gpa 0x100000000+0x40000000"; may be empty
	Err      error  // the kernel's answer
}

func (e *Error) Error() string {
	if e.Operands == "" {
		return fmt.Sprintf("kvm: %s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("kvm: %s %s: %v", e.Op, e.Operands, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// failure makes an *Error of err, and nil of nil.
func failure(op string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Err: err}
}

// with adds the operands to an *Error. It formats only if there is one.
func with(err error, format string, args ...any) error {
	if e, ok := err.(*Error); ok {
		e.Operands = fmt.Sprintf(format, args...)
	}
	return err
}

// UnsupportedError names the capabilities that the host's KVM lacks.
type UnsupportedError struct{ Missing []Cap }

func (e *UnsupportedError) Error() string {
	names := make([]string, len(e.Missing))
	for i, c := range e.Missing {
		names[i] = c.String()
		if n, ok := notes[c]; ok {
			names[i] += " (" + n + ")"
		}
	}
	return "kvm: this host's KVM lacks " + strings.Join(names, ", ")
}

// Is makes errors.Is(e, ErrNotSupported) true.
func (e *UnsupportedError) Is(target error) bool { return target == ErrNotSupported }

// notes tell what a capability is for and, where an older kernel may be the
// cause, which one brought it.
var notes = map[Cap]string{
	hype.CapUserMemory:             "guest memory",
	hype.CapIRQChip:                "in-kernel interrupt controller",
	hype.CapImmediateExit:          "stopping a vCPU; Linux 4.11",
	hype.CapIOEventFDAnyLength:     "ioeventfd of any length; Linux 4.4",
	hype.CapManualDirtyLogProtect2: "dirty log that is cleared by hand; Linux 5.2",
	hype.CapSignalMSI:              "message-signalled interrupts",
	hype.CapSRegs2:                 "KVM_GET_SREGS2; Linux 5.14",
	hype.CapXSave2:                 "KVM_GET_XSAVE2; Linux 5.17",
}

// MSRError says which register stopped KVM_GET_MSRS or KVM_SET_MSRS. The ones
// before it in the request were read or written.
type MSRError struct {
	Op    string // KVM_GET_MSRS or KVM_SET_MSRS
	Entry MSREntry
}

func (e *MSRError) Error() string {
	if e.Op == reqSetMSRs.String() {
		return fmt.Sprintf("kvm: %s: this host refuses the value %#x for MSR %#x", e.Op, e.Entry.Data, e.Entry.Index)
	}
	return fmt.Sprintf("kvm: %s: this host cannot read MSR %#x", e.Op, e.Entry.Index)
}
