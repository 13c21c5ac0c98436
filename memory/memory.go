// Package memory is the guest's RAM: one memfd, mapped shared, and the only
// door through which devices reach it.
//
// A guest-physical address comes from the guest and is never trusted: Slice
// checks it against the regions and answers an error. The bytes behind a view
// are shared with running vCPUs, which may change them at any instant, so a
// reader copies a value once, checks the copy, and uses the copy.
//
// KVM's dirty log does not see what devices write. Whoever writes into guest
// memory calls MarkDirty when the write is complete and before the guest is
// told of it; forgetting this corrupts a migrated guest silently.
package memory

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// GPA is a guest-physical address in bytes.
type GPA uint64

func (a GPA) String() string { return fmt.Sprintf("%#x", uint64(a)) }

const (
	// PageSize is the unit of the dirty bitmap and of migration, in bytes.
	PageSize = 4096
	// HoleStart and HoleEnd bound the addresses below 4 GiB where a PC has
	// devices instead of RAM. RAM beyond HoleStart bytes continues at HoleEnd.
	HoleStart GPA = 3 << 30
	HoleEnd   GPA = 4 << 30
)

// Region is a contiguous run of RAM.
type Region struct {
	GPA    GPA
	Offset int64  // of the region's first byte in the memfd
	Bytes  []byte // the mapping; its length is the region's size
}

// End is the address of the first byte behind r.
func (r Region) End() GPA { return r.GPA + GPA(len(r.Bytes)) }

// RAM is the guest's memory. Its methods may be called concurrently, Close
// excepted: nobody may hold a view then.
type RAM struct {
	file    *os.File
	mapping *sys.Mapping
	regions []Region
	dirty   Bitmap
}

// New makes size bytes of zeroed guest RAM. No page is allocated before it is
// touched. It refuses a size that is zero, no multiple of PageSize, or larger
// than the memory of this host.
func New(size uint64) (*RAM, error) {
	switch {
	case size == 0:
		return nil, fmt.Errorf("guest memory of 0 bytes: give at least %d", PageSize)
	case size%PageSize != 0:
		return nil, fmt.Errorf("guest memory of %d bytes is no multiple of the page size %d", size, PageSize)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, fmt.Errorf("sysinfo: %w", err)
	}
	if host := uint64(info.Totalram) * uint64(info.Unit); size > host {
		return nil, fmt.Errorf("guest memory of %d MiB: this host has %d MiB", size>>20, host>>20)
	}
	file, err := sys.MemFD("vmm-ram", int64(size))
	if err != nil {
		return nil, err
	}
	// Who gets the file maps it without fear of SIGBUS, and may not bar others
	// from mapping it.
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals|unix.F_SEAL_SEAL); err != nil {
		file.Close()
		return nil, fmt.Errorf("guest memory: seal its size: %w", err)
	}
	return mapped(file, size)
}

// seals keep the memory's size what it is (fcntl(2), File Sealing).
const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// Adopt makes RAM of the memfd of another process's RAM: from here on both
// have the same bytes. It takes the file over, an error or not, and refuses one
// that is not of this size, or that could become shorter.
func Adopt(file *os.File, size uint64) (*RAM, error) {
	fail := func(format string, args ...any) (*RAM, error) {
		file.Close()
		return nil, fmt.Errorf("guest memory that was handed over: "+format, args...)
	}
	if size == 0 || size%PageSize != 0 {
		return fail("%d bytes are no multiple of the page size %d", size, PageSize)
	}
	have, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return fail("its seals: %w", err)
	}
	if have&seals != seals {
		return fail("its size is not sealed (seals %#x)", have)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return fail("fstat: %w", err)
	}
	if st.Size < 0 || uint64(st.Size) != size {
		return fail("it has %d bytes, and the guest %d", st.Size, size)
	}
	return mapped(file, size)
}

// mapped is RAM over a memfd.
func mapped(file *os.File, size uint64) (*RAM, error) {
	mapping, err := sys.MapShared(int(file.Fd()), 0, int(size))
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	r := &RAM{file: file, mapping: mapping, dirty: NewBitmap(size / PageSize)}
	mem := mapping.Bytes()
	low := min(size, uint64(HoleStart))
	r.regions = []Region{{GPA: 0, Offset: 0, Bytes: mem[:low:low]}}
	if size > low {
		r.regions = append(r.regions, Region{GPA: HoleEnd, Offset: int64(low), Bytes: mem[low:]})
	}
	return r, nil
}

// Size is the amount of RAM in bytes.
func (r *RAM) Size() uint64 { return uint64(r.dirty.pages) * PageSize }

// Regions lists the RAM in ascending order of address. The caller does not
// change it.
func (r *RAM) Regions() []Region { return r.regions }

// File is the memfd. It stays owned by r.
func (r *RAM) File() *os.File { return r.file }

// region finds the region that holds all of [gpa, gpa+n).
func (r *RAM) region(gpa GPA, n uint64) (*Region, error) {
	for i := range r.regions {
		reg := &r.regions[i]
		if gpa < reg.GPA {
			break
		}
		// Subtractions only: gpa+n may wrap around.
		if off := uint64(gpa - reg.GPA); off <= uint64(len(reg.Bytes)) && n <= uint64(len(reg.Bytes))-off {
			return reg, nil
		}
	}
	return nil, &RangeError{GPA: gpa, Len: n}
}

// RangeError says that a range of guest-physical addresses is not all RAM.
type RangeError struct {
	GPA GPA
	Len uint64
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("%d bytes at guest address %#x are not all RAM", e.Len, uint64(e.GPA))
}

// Slice is a view of n bytes at gpa. It fails with a *RangeError unless all
// of them are RAM of one region. An empty view is allowed wherever a region
// begins, continues or ends.
func (r *RAM) Slice(gpa GPA, n uint64) ([]byte, error) {
	reg, err := r.region(gpa, n)
	if err != nil {
		return nil, err
	}
	off := uint64(gpa - reg.GPA)
	return reg.Bytes[off : off+n : off+n], nil
}

// Offset is where in the memfd the n bytes at gpa begin. It fails as Slice does.
func (r *RAM) Offset(gpa GPA, n uint64) (int64, error) {
	reg, err := r.region(gpa, n)
	if err != nil {
		return 0, err
	}
	return reg.Offset + int64(gpa-reg.GPA), nil
}

// MarkDirty notes that a device has written n bytes at gpa. Addresses that
// are no RAM are ignored: nothing was written there. It does not allocate.
func (r *RAM) MarkDirty(gpa GPA, n uint64) {
	if n == 0 {
		return
	}
	at, err := r.Offset(gpa, n)
	if err != nil {
		return
	}
	first := uint64(at)
	r.dirty.Set(first/PageSize, (first+n-1)/PageSize+1)
}

// Dirty is the bitmap of pages that devices wrote, one bit a page, numbered
// by their place in the memfd.
func (r *RAM) Dirty() *Bitmap { return &r.dirty }

// Close unmaps and frees the memory.
func (r *RAM) Close() error {
	err := r.mapping.Close()
	if cerr := r.file.Close(); err == nil && cerr != nil && !isClosed(cerr) {
		err = cerr
	}
	return err
}
