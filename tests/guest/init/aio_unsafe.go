package main

import (
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Linux AIO (io_submit(2)): with O_DIRECT it keeps any number of requests
// under way from one thread, which costs a slow guest far less than a thread
// for each.

// iocb is struct iocb of linux/aio_abi.h, little endian.
type iocb struct {
	data   uint64    // comes back in the event
	_      [2]uint32 // key, rw_flags
	opcode uint16
	_      int16 // request priority
	fd     uint32
	buf    uint64
	nbytes uint64
	offset int64
	_      uint64
	_      [2]uint32 // flags, eventfd
}

// ioEvent is struct io_event.
type ioEvent struct {
	data uint64
	obj  uint64
	res  int64
	res2 int64
}

const (
	iocbCmdPread  = 0
	iocbCmdPwrite = 1
)

// atDepth keeps len(buf)/blockSize requests under way until the time is up,
// waits for the last, and returns how many there were.
func atDepth(f *os.File, buf []byte, offset func() int64, write bool, until time.Time) (ops int, err error) {
	depth := len(buf) / blockSize
	var ring uintptr // aio_context_t
	// The kernel writes the context id to ring during the call only.
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, uintptr(depth), uintptr(unsafe.Pointer(&ring)), 0); errno != 0 {
		return 0, fmt.Errorf("io_setup(%d): %w", depth, errno)
	}
	defer unix.Syscall(unix.SYS_IO_DESTROY, ring, 0, 0)

	opcode := uint16(iocbCmdPread)
	if write {
		opcode = iocbCmdPwrite
	}
	submit := func(slot int) error {
		cb := iocb{
			data: uint64(slot), opcode: opcode, fd: uint32(f.Fd()),
			// buf is mapped memory: its address holds for as long as the
			// mapping, which nobody removes. Each slot has its own block.
			buf: uint64(uintptr(unsafe.Pointer(&buf[slot*blockSize]))), nbytes: blockSize, offset: offset(),
		}
		list := [1]*iocb{&cb}
		// The kernel copies both the list and the iocb before it returns.
		n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ring, 1, uintptr(unsafe.Pointer(&list)))
		if errno != 0 {
			return fmt.Errorf("io_submit: %w", errno)
		}
		if n != 1 {
			return fmt.Errorf("io_submit: %d requests taken of 1", n)
		}
		return nil
	}
	under := 0
	for slot := range depth {
		if err := submit(slot); err != nil {
			return 0, err
		}
		under++
	}
	events := make([]ioEvent, depth)
	for under > 0 {
		// The kernel writes at most depth events during the call.
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ring, 1, uintptr(depth), uintptr(unsafe.Pointer(&events[0])), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return ops, fmt.Errorf("io_getevents: %w", errno)
		}
		more := time.Now().Before(until)
		for _, e := range events[:n] {
			under--
			if e.res != blockSize {
				err := unix.Errno(-e.res)
				if e.res >= 0 {
					err = unix.EIO
				}
				return ops, fmt.Errorf("request %d: result %d: %w", e.data, e.res, err)
			}
			ops++
			if more {
				if err := submit(int(e.data)); err != nil {
					return ops, err
				}
				under++
			}
		}
	}
	return ops, nil
}
