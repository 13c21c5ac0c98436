package kvm

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl is the only door to the kernel that hype/kvm does not open. It goes through
// the ordinary syscall path, which tells the scheduler that the thread may
// block; EINTR is returned like any other answer.
func ioctl(fd uintptr, r request, arg uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(r), arg)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// ioctlPointer hands the kernel a structure.
//
// Bounds: the request's number holds the size that the kernel copies, and
// the ABI test proves that T has it; for a list, flexible made the room that its
// head promises, and for XSAVE, whose first byte is passed, XSave and SetXSave
// made the room that the kernel has asked for. Lifetime: the conversion stands in the call's argument list, so
// the compiler keeps *arg, and what its pointer fields point to, alive and in
// place until the call returns.
func ioctlPointer[T any](fd uintptr, r request, arg *T) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(r), uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// flexible makes room for a C structure that ends in an array of unknown length: a
// head and n entries right behind it, all zero.
//
// Bounds: the backing array is rounded up to whole words and covers both. The
// size of H is a multiple of E's alignment for every pair in abi.go, as C
// requires too. Lifetime: both results point into one allocation, and either keeps
// it alive.
func flexible[H, E any](n int) (*H, []E) {
	var h H
	var e E
	size := unsafe.Sizeof(h) + uintptr(n)*unsafe.Sizeof(e)
	words := make([]uint64, (size+7)/8)
	head := unsafe.Pointer(&words[0])
	if n == 0 {
		return (*H)(head), nil
	}
	return (*H)(head), unsafe.Slice((*E)(unsafe.Add(head, unsafe.Sizeof(h))), n)
}

// addressOf is the address of guest memory for KVM_SET_USER_MEMORY_REGION. Lifetime:
// the caller promises (VM.SetMemory) that mem is a mapping outside Go's heap
// which outlives the slot, so the number stays true after the conversion.
func addressOf(mem []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
}

// immediateExit is the word of struct kvm_run that holds request_interrupt_window
// (byte 0, which we never use) and immediate_exit (byte 1); the other two are
// padding. All four are inputs: the kernel reads and never writes them.
//
// Bounds: newVCPU has checked that run has at least runSize bytes; it is
// page-aligned. Concurrent access: the kernel reads the byte with READ_ONCE,
// every access of ours is a 32-bit atomic, Go having none of 8 bits. Lifetime: the caller
// holds the handle that keeps the mapping.
func immediateExit(run []byte) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&run[0]))
}

// immediateExitSet is the word's value with immediate_exit set.
const immediateExitSet = 1 << (8 * runImmediateExit)
