package disk

import (
	"slices"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// memFile is a file in memory that a test can make misbehave.
type memFile struct {
	mu     sync.Mutex
	data   []byte
	beyond bool // somebody reached beyond the end of data

	most    int                   // bytes that one call moves; 0 is any
	onRead  func(off int64) error // called before a read or write of byte off
	onWrite func(off int64) error
	onSync  func() error // called without the lock held
	noHoles bool         // fallocate is not supported
	cold    bool         // nothing is in the page cache
	syncs   int

	forgotten int
}

func (f *memFile) move(iov []unix.Iovec, off int64, on func(int64) error, write bool) (moved int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range iov {
		p := unsafe.Slice(v.Base, v.Len) // the caller keeps it alive and as long
		for len(p) > 0 {
			at := off + int64(moved)
			n := min(len(p), 512-int(at%512))
			switch {
			case f.most > 0:
				n = min(n, f.most-moved)
			case at < 0 || at+int64(n) > int64(len(f.data)):
				f.beyond = true
			}
			if on != nil {
				err = on(at)
			}
			if err != nil && moved > 0 {
				return moved, nil // as the kernel does: the error comes with the next call
			}
			if err != nil || n == 0 || at >= int64(len(f.data)) {
				return moved, err
			}
			if write {
				n = copy(f.data[at:], p[:n])
			} else {
				n = copy(p[:n], f.data[at:])
			}
			moved += n
			p = p[n:]
		}
	}
	return moved, nil
}

func (f *memFile) preadv(iov []unix.Iovec, off int64, quick bool) (int, error) {
	if quick && f.cold {
		return 0, unix.EAGAIN
	}
	return f.move(iov, off, f.onRead, false)
}

func (f *memFile) pwritev(iov []unix.Iovec, off int64) (int, error) {
	return f.move(iov, off, f.onWrite, true)
}

func (f *memFile) forget() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgotten++
	return nil
}

func (f *memFile) sync() error {
	f.mu.Lock()
	f.syncs++
	f.mu.Unlock()
	if f.onSync != nil {
		return f.onSync()
	}
	return nil
}

func (f *memFile) fallocate(mode uint32, off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.noHoles:
		return unix.EOPNOTSUPP
	case off == int64(len(f.data)): // the probe of newLUN
		return nil
	case off < 0 || n <= 0 || off+n < 0 || off+n > int64(len(f.data)):
		f.beyond = true
		return unix.EINVAL
	}
	if f.onWrite != nil {
		if err := f.onWrite(off); err != nil {
			return err
		}
	}
	clear(f.data[off : off+n])
	return nil
}

// seek says that data is where bytes are not zero, in units of 4096.
func (f *memFile) seek(off int64, whence int) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ; off < int64(len(f.data)); off = off&^4095 + 4096 {
		page := f.data[off&^4095 : min(off&^4095+4096, int64(len(f.data)))]
		data := slices.ContainsFunc(page, func(b byte) bool { return b != 0 })
		if data == (whence == unix.SEEK_DATA) {
			return off, nil
		}
	}
	if whence == unix.SEEK_DATA {
		return 0, unix.ENXIO
	}
	return int64(len(f.data)), nil
}

func (f *memFile) size() (int64, error) { return int64(len(f.data)), nil }
func (f *memFile) close() error         { return nil }

// newMem is a disk in memory whose power-on unit attention is gone.
func newMem(t testing.TB, f *memFile, o Options) *LUN {
	t.Helper()
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	l := newLUN("memory", f, uint64(len(f.data)), uuid{15: 1}, nil, o)
	t.Cleanup(func() { l.Close() })
	do(t, l, []byte{scsi.OpRequestSense, 0, 0, 0, 0, 0}, nil, 0)
	return l
}
