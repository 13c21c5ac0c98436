package sys

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Mapping is memory outside Go's heap: the garbage collector neither moves
// nor scans it, so its address may be handed to the kernel and kept there.
type Mapping struct {
	mu  sync.Mutex
	mem []byte
}

// MapAnonymous maps size bytes (rounded up to pages) of zeroed private memory.
func MapAnonymous(size int) (*Mapping, error) {
	return mmap(-1, 0, size, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

// MapShared maps size bytes of fd from offset (both multiples of the page
// size), shared and writable. The mapping does not keep or need fd afterwards.
func MapShared(fd int, offset int64, size int) (*Mapping, error) {
	return mmap(fd, offset, size, unix.MAP_SHARED|unix.MAP_NORESERVE)
}

func mmap(fd int, offset int64, size, flags int) (*Mapping, error) {
	mem, err := unix.Mmap(fd, offset, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, fmt.Errorf("mmap %d bytes at offset %#x of fd %d: %w", size, offset, fd, err)
	}
	return &Mapping{mem: mem}, nil
}

// Bytes is the mapped memory; nil after Close. Nobody may use a slice of it
// after Close: such an access ends the process with SIGSEGV.
func (m *Mapping) Bytes() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mem
}

// Close unmaps the memory.
func (m *Mapping) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mem == nil {
		return nil
	}
	mem := m.mem
	m.mem = nil
	return unix.Munmap(mem)
}

// MemFD makes a memfd of size bytes that can be sealed, named for
// /proc/PID/maps. It has no pages yet.
func MemFD(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd_create %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("memfd %s of %d bytes: %w", name, size, err)
	}
	return f, nil
}

// Duplicate is another descriptor of the same open file: with its offset and
// its locks, and to be closed by itself.
func Duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate descriptor %d (%s): %w", int(f.Fd()), f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
