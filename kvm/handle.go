package kvm

import (
	"os"
	"sync"
)

// handle is a file descriptor that several goroutines use at once and any of
// them may close. os.File's own Close would pull the number from under an ioctl
// that has read it but not yet entered the kernel; here the last user closes.
type handle struct {
	mu     sync.Mutex
	file   *os.File
	uses   int // calls in progress
	closed bool
	last   func() // run before the file is closed; may be nil
}

// acquire takes the right to use the descriptor until release.
func (h *handle) acquire() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return os.ErrClosed
	}
	h.uses++
	return nil
}

func (h *handle) release() {
	h.mu.Lock()
	h.uses--
	end := h.closed && h.uses == 0
	h.mu.Unlock()
	if end {
		h.end()
	}
}

// Close gives the descriptor back once no call uses it any more. It does not
// wait for such a call. A second Close does nothing.
func (h *handle) Close() error {
	h.mu.Lock()
	end := !h.closed && h.uses == 0
	h.closed = true
	h.mu.Unlock()
	if end {
		return h.end()
	}
	return nil
}

func (h *handle) end() error {
	if h.last != nil {
		h.last()
	}
	return h.file.Close()
}

// do makes a call of hype/kvm, which uses h.file, under the name of its request.
func (h *handle) do(op string, call func() error) error {
	err := h.acquire()
	if err == nil {
		err = call()
		h.release()
	}
	return failure(op, err)
}

// request is an ioctl number; its String is the kernel's name.
type request uintptr

// call makes an ioctl whose argument is a number; it returns the kernel's result.
func (h *handle) call(r request, arg uintptr) (int, error) {
	if err := h.acquire(); err != nil {
		return 0, failure(r.String(), err)
	}
	defer h.release()
	n, err := ioctl(h.file.Fd(), r, arg)
	return n, failure(r.String(), err)
}

// pass makes an ioctl whose argument is a structure that it reads or fills.
func pass[T any](h *handle, r request, arg *T) (int, error) {
	if err := h.acquire(); err != nil {
		return 0, failure(r.String(), err)
	}
	defer h.release()
	n, err := ioctlPointer(h.file.Fd(), r, arg)
	return n, failure(r.String(), err)
}
