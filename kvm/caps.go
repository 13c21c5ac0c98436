package kvm

import (
	"fmt"

	hype "github.com/c35s/hype/kvm"
)

// Cap is a capability (KVM_CAP_...). Its String is the kernel's name.
type Cap = hype.Cap

// The capabilities that have a use here.
const (
	CapUserMemory             = hype.CapUserMemory
	CapIRQChip                = hype.CapIRQChip
	CapIRQRouting             = hype.CapIRQRouting
	CapIRQFD                  = hype.CapIRQFD
	CapIRQFDResample          = hype.CapIRQFDResample
	CapIOEventFD              = hype.CapIOEventFD
	CapIOEventFDAnyLength     = hype.CapIOEventFDAnyLength
	CapSignalMSI              = hype.CapSignalMSI
	CapPIT2                   = hype.CapPIT2
	CapPITState2              = hype.CapPITState2
	CapSetTSSAddr             = hype.CapSetTSSAddr
	CapSetIdentityMapAddr     = hype.CapSetIdentityMapAddr
	CapExtCPUID               = hype.CapExtCPUID
	CapMPState                = hype.CapMPState
	CapVCPUEvents             = hype.CapVCPUEvents
	CapDebugRegs              = hype.CapDebugRegs
	CapXSave                  = hype.CapXSave
	CapXSave2                 = hype.CapXSave2
	CapXCRs                   = hype.CapXCRS
	CapSRegs2                 = hype.CapSRegs2
	CapAdjustClock            = hype.CapAdjustClock
	CapKVMClockCtrl           = hype.CapKVMClockCtrl
	CapGetTSCKHz              = hype.CapGetTSCKHz
	CapTSCControl             = hype.CapTSCControl
	CapTSCDeadlineTimer       = hype.CapTSCDeadlineTimer
	CapVCPUAttributes         = hype.CapVCPUAttributes
	CapImmediateExit          = hype.CapImmediateExit
	CapEnableCapVM            = hype.CapEnableCapVM
	CapCheckExtensionVM       = hype.CapCheckExtensionVM
	CapManualDirtyLogProtect2 = hype.CapManualDirtyLogProtect2
	CapReadonlyMem            = hype.CapReadonlyMem
	CapUserNMI                = hype.CapUserNMI
	CapGetMSRFeatures         = hype.CapGetMSRFeatures
	CapNrVCPUs                = hype.CapNrVCPUs
	CapMaxVCPUs               = hype.CapMaxVCPUs
	CapMaxVCPUID              = hype.CapMaxVCPUID
	CapNrMemslots             = hype.CapNrMemslots
	CapExceptionPayload       = hype.CapExceptionPayload
	CapX86TripleFaultEvent    = hype.CapX86TripleFaultEvent
	CapDirtyLogRing           = hype.CapDirtyLogRing
	CapDirtyLogRingAcqRel     = hype.CapDirtyLogRingAcqRel
)

// Required are the capabilities without which a guest cannot be booted and
// migrated. What is missing from newer ones has a fallback: SREGS2 and XSAVE2 their
// older forms, TSC_CONTROL and VCPU_ATTRIBUTES a kvm-clock guest. XCRS is not there on a
// processor without XSAVE, which has no extended control registers.
var Required = []Cap{
	CapUserMemory, CapIRQChip, CapIRQRouting, CapIRQFD, CapIOEventFD, CapIOEventFDAnyLength, CapSignalMSI,
	CapPIT2, CapPITState2, CapSetTSSAddr, CapSetIdentityMapAddr, CapExtCPUID,
	CapMPState, CapVCPUEvents, CapDebugRegs, CapXSave, CapAdjustClock, CapKVMClockCtrl, CapGetTSCKHz,
	CapImmediateExit, CapEnableCapVM, CapCheckExtensionVM, CapManualDirtyLogProtect2,
}

// Check asks the host's KVM about a capability (KVM api 4.4). The answer is one of
//
//   - yes: a value above zero, whose meaning depends on the capability, and no error;
//   - no: an *UnsupportedError, so errors.Is(err, ErrNotSupported);
//   - could not tell: any other error. Do not remember this one.
func (s *System) Check(c Cap) (int, error) { return s.check(s.file, c) }

// Check is System.Check for this VM, which may lack what the host has.
func (vm *VM) Check(c Cap) (int, error) { return vm.check(vm.file, c) }

func (h *handle) check(fd interface{ Fd() uintptr }, c Cap) (n int, err error) {
	err = h.do("KVM_CHECK_EXTENSION", func() error {
		n, err = hype.CheckExtension(fd, c)
		return err
	})
	if err != nil {
		return 0, with(err, "%v", c)
	}
	if n == 0 {
		return 0, &UnsupportedError{Missing: []Cap{c}}
	}
	return n, nil
}

// Require is nil if the host's KVM has every capability. Otherwise it is one
// *UnsupportedError with all that are missing, or the reason why that could
// not be told.
func (s *System) Require(caps ...Cap) error {
	var missing []Cap
	for _, c := range caps {
		_, err := s.Check(c)
		if u, ok := err.(*UnsupportedError); ok {
			missing = append(missing, u.Missing...)
		} else if err != nil {
			return fmt.Errorf("cannot tell whether this host's KVM has %v: %w", c, err)
		}
	}
	if missing != nil {
		return &UnsupportedError{Missing: missing}
	}
	return nil
}
