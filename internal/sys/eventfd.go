package sys

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// EventFD is an eventfd(2): a 64-bit counter that one side adds to and the
// other waits for. It is the doorbell of a virtqueue (KVM_IOEVENTFD adds to
// it) and of an interrupt (KVM_IRQFD waits for it).
//
// The descriptor stays in blocking mode and outside Go's poller: a reader is
// an OS thread that blocks in read(2), because the poller's wake-up can take
// milliseconds while every P is inside KVM_RUN.
type EventFD struct {
	mu sync.RWMutex // held for reading around each use of fd except Wait's read
	fd int          // -1 after Close
}

// NewEventFD makes an eventfd with a count of zero.
func NewEventFD() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &EventFD{fd: fd}, nil
}

// FD returns the descriptor, for an ioctl that hands it to the kernel. It
// stays owned by e; it is -1 after Close.
func (e *EventFD) FD() int {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.fd
}

// Signal adds one to the count and wakes a waiter. It never blocks for a
// reader: the count would have to reach 2^64-1 first. It does not allocate.
func (e *EventFD) Signal() error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.fd < 0 {
		return os.ErrClosed
	}
	one := [8]byte{1} // the counter is in host byte order; the product is amd64 only
	for {
		_, err := unix.Write(e.fd, one[:])
		if err != unix.EINTR {
			return err
		}
	}
}

// Wait blocks the calling thread until the count is not zero, then takes it:
// it returns the count and leaves zero. Close does not wake a waiter; the
// owner signals it, waits for it to leave, then closes.
func (e *EventFD) Wait() (uint64, error) {
	fd := e.FD()
	if fd < 0 {
		return 0, os.ErrClosed
	}
	var count [8]byte
	for {
		_, err := unix.Read(fd, count[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		return binary.LittleEndian.Uint64(count[:]), nil
	}
}

// Pending reports whether the count is not zero, without taking it.
func (e *EventFD) Pending() bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.fd < 0 {
		return false
	}
	p := [1]unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p[:], 0)
		if err != unix.EINTR {
			return n == 1 && p[0].Revents&unix.POLLIN != 0
		}
	}
}

// Drain takes the count if it is not zero. It does not block as long as the
// caller is the only reader.
func (e *EventFD) Drain() uint64 {
	if !e.Pending() {
		return 0
	}
	n, _ := e.Wait()
	return n
}

// Close closes the descriptor. No thread may be inside Wait.
func (e *EventFD) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fd < 0 {
		return nil
	}
	fd := e.fd
	e.fd = -1
	return unix.Close(fd)
}
