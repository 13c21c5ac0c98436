package sg

import (
	"golang.org/x/sys/unix"
)

// route is a way for one command at a time to the device and back; every
// worker has its own.
type route interface {
	// do sends the command that h describes, waits for its end and fills in
	// the rest of h. The command has been sent once or not at all. EDOM,
	// EAGAIN and ENOMEM mean not at all, for want of room in the kernel; after
	// any other error nothing is known.
	do(h *ioHdr) unix.Errno

	// close is called once, with no command on its way.
	close()
}

// blockRoute is the blocking SG_IO on the block node: no copy where buffers
// are aligned as the host adapter wants it, and no second try after a signal.
// The file is shared and not its own.
type blockRoute struct{ fd int }

func (p blockRoute) do(h *ioHdr) unix.Errno { return sgIO(p.fd, h) }
func (p blockRoute) close()                 {}

// sgRoute is a /dev/sgN opened for this worker alone. An unprivileged process
// may send anything by it, but its SG_IO must not be used: that sleeps
// interruptibly *after* it has sent the command, and a signal with SA_RESTART,
// as all of Go's are, makes the kernel start it from the beginning. A write
// sends and does not wait; the read that follows sends nothing and may be
// interrupted as often as it likes.
type sgRoute struct{ fd int }

func (p sgRoute) do(h *ioHdr) unix.Errno {
	// The kernel sleeps here only for a free request of the host adapter, and
	// uninterruptibly.
	if e := writeHdr(p.fd, h); e != 0 {
		return e
	}
	for {
		wait(p.fd, -1)
		// One command per file: what becomes readable is its answer.
		switch e := readHdr(p.fd, h); e {
		case unix.EAGAIN, unix.EINTR, unix.ENOMEM: // nothing was taken out of the queue
		case unix.EDOM:
			return unix.EIO // do's EDOM has a meaning
		default:
			return e
		}
	}
}

func (p sgRoute) close() { unix.Close(p.fd) }
