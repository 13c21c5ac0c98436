package sg

import (
	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// Host statuses, the kernel's DID_ numbers (include/scsi/scsi_status.h).
const (
	hostOK                 = 0x00
	hostNoConnect          = 0x01
	hostBusBusy            = 0x02
	hostTimeOut            = 0x03
	hostBadTarget          = 0x04
	hostAbort              = 0x05
	hostReset              = 0x08
	hostRequeue            = 0x0d
	hostTransportDisrupted = 0x0e
	hostTransportFailFast  = 0x0f
	hostTransportMarginal  = 0x14
)

// outcome is how a command ended for which the kernel answered h. The
// device's word wins: with a status of its own, whatever the host adapter's
// driver adds (DID_NEXUS_FAILURE beside RESERVATION CONFLICT) is commentary.
func outcome(h *ioHdr) (scsi.Outcome, scsi.Status) {
	if h.status != 0 {
		return scsi.Completed, scsi.Status(h.status)
	}
	switch h.hostStatus {
	case hostOK:
	case hostNoConnect, hostBadTarget:
		return scsi.BadTarget, 0
	case hostReset:
		return scsi.ResetOccurred, 0
	case hostAbort, hostTimeOut:
		return scsi.Aborted, 0
	case hostBusBusy, hostRequeue:
		return scsi.Busy, 0
	case hostTransportDisrupted, hostTransportFailFast, hostTransportMarginal:
		return scsi.TransportFailure, 0
	default:
		return scsi.Failure, 0
	}
	switch h.driverStatus & 0x0f {
	case 0:
		return scsi.Completed, scsi.Good
	case driverStatusSense:
		if h.senseLen > 0 {
			return scsi.Completed, scsi.CheckCondition
		}
		return scsi.Completed, scsi.Good
	case driverStatusTime:
		return scsi.Aborted, 0
	}
	return scsi.Failure, 0
}

// failed is the outcome of a command that the kernel refused with e, or whose
// answer could not be fetched.
func failed(e unix.Errno) scsi.Outcome {
	switch e {
	case unix.EDOM, unix.EAGAIN, unix.ENOMEM: // no room, for longer than the command may take
		return scsi.Busy
	case unix.ENODEV, unix.ENXIO: // removed, or taken offline
		return scsi.BadTarget
	}
	return scsi.Failure
}

// refused reports whether e says that the kernel had no room for the command
// and did not take it.
func refused(e unix.Errno) bool {
	return e == unix.EDOM || e == unix.EAGAIN || e == unix.ENOMEM
}

// cdbLen is the length of the CDB that begins b; b may be longer, filled up
// with zeros, since virtio-scsi's field has one length for all. Zero means
// that b holds no CDB that can be sent.
//
// A length that the host adapter cannot carry makes its driver fail the
// command, so what follows the CDB is cut off.
func cdbLen(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	// Where only the device knows: every transport's command frame has room for
	// 16 bytes, filled up with zeros.
	n := min(16, max(len(b), 6))
	switch b[0] >> 5 { // GROUP CODE, SPC-5 4.2.5.1
	case 0:
		n = 6
	case 1, 2:
		n = 10
	case 5:
		n = 12
	case 4:
		n = 16
	case 3:
		if b[0] == scsi.OpVariableLength {
			if len(b) < 8 {
				return 0
			}
			n = 8 + int(b[7])
		} // else reserved: let the device refuse it
	}
	if n > len(b) || n > maxCDB {
		return 0
	}
	return n
}
