// Package scsi is what the virtio-scsi controller and every kind of logical
// unit share: commands, status, sense data, and the LUN interface.
//
// Terms are those of SAM-5, SPC-5 and SBC-4. Multi-byte fields of CDBs and
// parameter data are big-endian.
package scsi

import "fmt"

// LUN is a logical unit, the one seam between the controller and a backend.
// Its methods may be called concurrently; Close comes last.
type LUN interface {
	// Submit starts c and returns without waiting for it. The backend fills
	// in the results and calls c.Done exactly once, from any goroutine and
	// perhaps before Submit returns; from then on it does not touch c or the
	// memory that c names. A slow command delays no other.
	Submit(c *Command)

	// Reset is a LOGICAL UNIT RESET. It returns when the logical unit has
	// been reset; commands in flight come back through Done as the backend
	// learns of their fate, before or after. ErrRejected says that this
	// backend cannot reset one logical unit without reaching beyond it.
	Reset() error

	// Limits is what one command may carry. It does not change.
	Limits() Limits

	// Close waits for every command in flight, then releases the backend.
	// A second Close does nothing.
	Close() error
}

// ErrRejected is Reset's answer where the function is not supported.
var ErrRejected = fmt.Errorf("scsi: task management function not supported by this logical unit")

// Limits bounds the data of one command.
type Limits struct {
	MaxTransfer uint32 // bytes, a multiple of 512
	MaxSegments uint32 // separate pieces of guest memory
}

// Command is one SCSI command on its way through a LUN. The controller owns
// and reuses it; the fields of the first group are set before Submit and stay
// unchanged until Done, those of the second are the LUN's to fill in.
type Command struct {
	CDB     []byte   // as the guest sent it, copied out of guest memory
	Attr    TaskAttr // SAM-5 8.9
	DataOut [][]byte // to the device, in order; guest memory, may change at any time
	DataIn  [][]byte // from the device, in order; at most one of the two is not empty
	Done    func(*Command)

	Outcome  Outcome // whether Status means anything
	Status   Status
	Residual uint32 // bytes of DataOut or DataIn that were not transferred
	SenseLen int    // bytes of Sense that are valid
	Sense    [MaxSense]byte
}

// MaxSense is the largest sense data there is, in bytes (SPC-5 4.4.2).
const MaxSense = 252

// TaskAttr is a task attribute, in virtio-scsi's numbers (virtio 1.3,
// 5.6.6.1).
type TaskAttr uint8

const (
	Simple TaskAttr = iota
	Ordered
	HeadOfQueue
	ACA
)

// Outcome says how a command came back from the service delivery subsystem.
type Outcome uint8

const (
	// Completed: the device server answered; Status and sense are its own.
	Completed Outcome = iota
	BadTarget
	ResetOccurred
	Aborted
	Busy
	TransportFailure
	Failure
)

func (o Outcome) String() string {
	names := [...]string{"completed", "bad target", "reset", "aborted", "busy", "transport failure", "failure"}
	if int(o) < len(names) {
		return names[o]
	}
	return fmt.Sprintf("outcome %d", uint8(o))
}

// Status is a SAM-5 status code (SAM-5 5.3.1).
type Status uint8

const (
	Good                Status = 0x00
	CheckCondition      Status = 0x02
	ConditionMet        Status = 0x04
	BusyStatus          Status = 0x08
	ReservationConflict Status = 0x18
	TaskSetFull         Status = 0x28
	ACAActive           Status = 0x30
	TaskAborted         Status = 0x40
)

func (s Status) String() string {
	switch s {
	case Good:
		return "GOOD"
	case CheckCondition:
		return "CHECK CONDITION"
	case ConditionMet:
		return "CONDITION MET"
	case BusyStatus:
		return "BUSY"
	case ReservationConflict:
		return "RESERVATION CONFLICT"
	case TaskSetFull:
		return "TASK SET FULL"
	case ACAActive:
		return "ACA ACTIVE"
	case TaskAborted:
		return "TASK ABORTED"
	}
	return fmt.Sprintf("status %#02x", uint8(s))
}

// DataLen is the length of c's buffers in bytes.
func (c *Command) DataLen() int {
	n := 0
	for _, b := range c.DataOut {
		n += len(b)
	}
	for _, b := range c.DataIn {
		n += len(b)
	}
	return n
}

// Finish completes c with status GOOD and the residual left by n transferred
// bytes. It calls Done.
func (c *Command) Finish(n int) {
	c.Outcome, c.Status, c.SenseLen = Completed, Good, 0
	c.Residual = uint32(c.DataLen() - n)
	c.Done(c)
}

// Conflict completes c with RESERVATION CONFLICT, which carries no sense data
// and moves no data. It calls Done.
func (c *Command) Conflict() {
	c.Outcome, c.Status, c.SenseLen = Completed, ReservationConflict, 0
	c.Residual = uint32(c.DataLen())
	c.Done(c)
}

// Busy completes c with status BUSY: the logical unit cannot take it now, and
// it may be sent again (SAM-5 5.3.1). It calls Done.
func (c *Command) Busy() {
	c.Outcome, c.Status, c.SenseLen = Completed, BusyStatus, 0
	c.Residual = uint32(c.DataLen())
	c.Done(c)
}

// Check completes c with CHECK CONDITION and fixed-format sense data s, no
// data transferred. It calls Done.
func (c *Command) Check(s Sense) {
	c.Outcome, c.Status = Completed, CheckCondition
	c.Residual = uint32(c.DataLen())
	c.SenseLen = s.put(&c.Sense)
	c.Done(c)
}

// Fail completes c with an outcome other than Completed. It calls Done.
func (c *Command) Fail(o Outcome) {
	c.Outcome, c.Status, c.SenseLen = o, Good, 0
	c.Residual = uint32(c.DataLen())
	c.Done(c)
}

// Scatter copies p into DataIn, as much as fits, and returns how much did.
func (c *Command) Scatter(p []byte) int {
	n := 0
	for _, b := range c.DataIn {
		if len(p) == n {
			break
		}
		n += copy(b, p[n:])
	}
	return n
}

// Gather copies DataOut into p, as much as there is or fits, and returns how
// much did.
func (c *Command) Gather(p []byte) int {
	n := 0
	for _, b := range c.DataOut {
		if len(p) == n {
			break
		}
		n += copy(p[n:], b)
	}
	return n
}
