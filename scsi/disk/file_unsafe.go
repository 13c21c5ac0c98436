package disk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// file is what the disk needs of its image; tests put faults in between.
// Offsets and lengths are in bytes. Its methods may be called concurrently.
type file interface {
	// preadv and pwritev move as much as they can; a read answers 0 at the end
	// of the file. A read that is told to be quick reads no more than it finds
	// in the page cache, and answers EAGAIN where that is nothing.
	preadv(iov []unix.Iovec, off int64, quick bool) (int, error)
	pwritev(iov []unix.Iovec, off int64) (int, error)
	sync() error   // fdatasync
	forget() error // drops what is in the page cache and on the medium
	fallocate(mode uint32, off, n int64) error
	seek(off int64, whence int) (int64, error) // SEEK_DATA, SEEK_HOLE
	size() (int64, error)
	close() error
}

// osFile is a file descriptor. x/sys's Preadv is of no use here: it makes an
// iovec array on the heap for each call.
type osFile int

func (f osFile) preadv(iov []unix.Iovec, off int64, quick bool) (int, error) {
	var flags uintptr
	if quick {
		flags = unix.RWF_NOWAIT
	}
	return f.vector(unix.SYS_PREADV2, iov, off, flags)
}

func (f osFile) pwritev(iov []unix.Iovec, off int64) (int, error) {
	return f.vector(unix.SYS_PWRITEV2, iov, off, 0)
}

// vector is preadv2(2) or pwritev2(2).
func (f osFile) vector(call uintptr, iov []unix.Iovec, off int64, flags uintptr) (int, error) {
	if len(iov) == 0 {
		return 0, nil
	}
	for {
		// The array and what it points to are live and stay in place until the
		// call returns: iov refers to them, and the array is on the heap or in
		// a frame that a system call does not move. Its length is len(iov),
		// and each entry's base and length were taken from one slice. Others
		// may change guest memory meanwhile; the kernel copies it only once.
		n, _, errno := unix.Syscall6(call, uintptr(f), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)),
			uintptr(off), 0, flags) // the offset's upper half is for 32-bit machines
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func (f osFile) sync() error {
	return retry(func() error { return unix.Fdatasync(int(f)) })
}

func (f osFile) forget() error {
	return retry(func() error { return unix.Fadvise(int(f), 0, 0, unix.FADV_DONTNEED) })
}

func (f osFile) fallocate(mode uint32, off, n int64) error {
	return retry(func() error { return unix.Fallocate(int(f), mode, off, n) })
}

func (f osFile) seek(off int64, whence int) (int64, error) {
	return unix.Seek(int(f), off, whence)
}

func (f osFile) size() (int64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f), &st)
	return st.Size, err
}

func (f osFile) close() error { return unix.Close(int(f)) }

// retry calls f until a signal does not interrupt it.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
