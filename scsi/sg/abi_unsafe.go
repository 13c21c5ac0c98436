package sg

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// What <scsi/sg.h> calls these numbers is beside them; the test asks the C
// compiler.
const (
	ioctlSGIO         = 0x2285 // SG_IO
	ioctlReset        = 0x2284 // SG_SCSI_RESET
	ioctlTableSize    = 0x227f // SG_GET_SG_TABLESIZE: segments, into an int
	ioctlSectGet      = 0x1267 // BLKSECTGET: on an sg node bytes, into an int
	resetDevice       = 1      // SG_SCSI_RESET_DEVICE
	resetNoEscalate   = 0x100  // SG_SCSI_RESET_NO_ESCALATE: never the target, bus or host instead
	interfaceV3       = 'S'
	dxferNone         = -1   // SG_DXFER_NONE
	dxferToDev        = -2   // SG_DXFER_TO_DEV
	dxferFromDev      = -3   // SG_DXFER_FROM_DEV
	flagQueueAtTail   = 0x10 // SG_FLAG_Q_AT_TAIL: without it an sg node queues last in, first out
	flagQueueAtHead   = 0x20 // SG_FLAG_Q_AT_HEAD
	maxIovecs         = 1024 // UIO_MAXIOV: the kernel takes no more in one call
	maxCDB            = 32   // what the kernel's scsi_cmnd holds; the longest CDB of SBC-4
	mxSense           = 252  // scsi.MaxSense; the kernel keeps 96 bytes of it
	pageShift         = 12
	segmentBytes      = 1 << pageShift
	driverStatusSense = 0x08 // DRIVER_SENSE, kernels before 5.14
	driverStatusTime  = 0x06 // DRIVER_TIMEOUT, the same
)

// ioHdr is struct sg_io_hdr. Addresses are numbers: the struct lives in
// memory that the garbage collector does not look into.
type ioHdr struct {
	interfaceID  int32
	direction    int32
	cmdLen       uint8
	mxSenseLen   uint8
	iovecCount   uint16
	dxferLen     uint32
	dxferp       uintptr // data, or iovecCount iovecs
	cmdp         uintptr
	sbp          uintptr
	timeout      uint32 // ms
	flags        uint32
	packID       int32
	_            [4]byte
	usrPtr       uintptr
	status       uint8 // from here on the kernel's answer
	maskedStatus uint8
	msgStatus    uint8
	senseLen     uint8 // sb_len_wr
	hostStatus   uint16
	driverStatus uint16
	resid        int32
	duration     uint32 // ms
	info         uint32
	_            [4]byte
}

// iovec is struct sg_iovec.
type iovec struct {
	base uintptr
	len  uintptr
}

// slotMem is everything about one command that the kernel reads and writes
// apart from the data.
type slotMem struct {
	hdr   ioHdr
	cdb   [maxCDB]byte
	sense [mxSense]byte
	_     [4]byte
	iov   [maxIovecs]iovec
}

// slots is memory for n commands in flight. The kernel holds addresses of it
// while they are, so it is closed after them. Pages come into being when a
// slot is used for the first time.
type slots struct{ m *sys.Mapping }

func newSlots(n int) (slots, error) {
	m, err := sys.MapAnonymous(n * int(unsafe.Sizeof(slotMem{})))
	return slots{m}, err
}

// at is slot i; it has one user at a time.
func (s slots) at(i int) *slotMem {
	const size = unsafe.Sizeof(slotMem{})
	b := s.m.Bytes()[uintptr(i)*size:][:size]
	// The slice above is size bytes inside the mapping, which is page-aligned
	// and outlives every worker; size is a multiple of 8, the alignment of
	// slotMem.
	return (*slotMem)(unsafe.Pointer(unsafe.SliceData(b)))
}

// prepare points the header at the slot's own CDB and sense buffer, once.
func (m *slotMem) prepare() {
	m.hdr = ioHdr{
		interfaceID: interfaceV3,
		cmdp:        uintptr(unsafe.Pointer(&m.cdb)), // the slot never moves
		sbp:         uintptr(unsafe.Pointer(&m.sense)),
		flags:       flagQueueAtTail,
	}
}

// addr is where b begins. Its user hands it to the kernel while b's owner is
// still reachable from the slot's worker: guest memory and heap objects do
// not move, and a buffer in a Command is never on a stack.
func addr(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// setData names bufs as the command's data. It returns false, having set
// nothing, if they are more than maxIovecs pieces or touch more than maxPages
// pages.
func (m *slotMem) setData(bufs [][]byte, maxPages int) bool {
	n, pages := 0, 0
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		if n == maxIovecs {
			return false
		}
		a := addr(b)
		pages += int((a+uintptr(len(b))-1)>>pageShift-a>>pageShift) + 1
		if pages > maxPages {
			return false
		}
		m.iov[n] = iovec{a, uintptr(len(b))}
		n++
	}
	switch n {
	case 0:
		m.hdr.iovecCount, m.hdr.dxferp = 0, 0
	case 1: // spares the kernel reading the list
		m.hdr.iovecCount, m.hdr.dxferp = 0, m.iov[0].base
	default:
		m.hdr.iovecCount, m.hdr.dxferp = uint16(n), uintptr(unsafe.Pointer(&m.iov))
	}
	return true
}

// setOne names b alone as the command's data.
func (m *slotMem) setOne(b []byte) { m.hdr.iovecCount, m.hdr.dxferp = 0, addr(b) }

// sgIO is the blocking SG_IO. On a block node it sleeps uninterruptibly: a
// signal neither ends nor repeats it.
func sgIO(fd int, h *ioHdr) unix.Errno {
	// h and all it names are slot memory or kept by the slot's command.
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlSGIO, uintptr(unsafe.Pointer(h)))
	return e
}

// writeHdr queues the command on an sg node.
func writeHdr(fd int, h *ioHdr) unix.Errno {
	// As sgIO; the kernel copies the header before it returns.
	_, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(h)), unsafe.Sizeof(*h))
	return e
}

// readHdr fetches a finished command's header, data and sense.
func readHdr(fd int, h *ioHdr) unix.Errno {
	_, _, e := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(h)), unsafe.Sizeof(*h))
	return e
}

// wait blocks until fd is readable or timeout (ms, -1: none) is over. A
// signal may end it early.
func wait(fd int, timeout int) unix.Errno {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	// p is on the stack, which does not move during the call.
	_, _, e := unix.Syscall(unix.SYS_POLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(timeout))
	return e
}

// mayPassAnything reports whether this process may send every command through
// the block node fd, as the kernel judges it, user namespaces and all. It asks
// for a PERSISTENT RESERVE IN, which the unprivileged may not send there, with
// a data address that nothing is at: permission is looked at first, so nothing
// is ever sent.
func mayPassAnything(fd int, m *slotMem) bool {
	m.cdb = [maxCDB]byte{0: 0x5e, 8: 8}
	m.hdr.direction, m.hdr.dxferLen = dxferFromDev, 8
	m.hdr.iovecCount, m.hdr.dxferp = 1, 0
	m.hdr.cmdLen = 10
	m.hdr.timeout = 1000
	return sgIO(fd, &m.hdr) == unix.EFAULT
}

// resetUnit is SG_SCSI_RESET of the logical unit and nothing beyond it.
func resetUnit(fd int) unix.Errno {
	op := int32(resetDevice | resetNoEscalate)
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlReset, uintptr(unsafe.Pointer(&op)))
	return e
}

// ioctlInt is an ioctl that answers an int.
func ioctlInt(fd int, req uintptr) (int, unix.Errno) {
	var v int32
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(&v)))
	return int(v), e
}
