package memory

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Extents calls fn with each run of [gpa, gpa+n) that has memory behind it, in
// ascending order and in whole pages, and passes its error on. What lies
// between is a hole: zero, and to be left alone, because reading a hole of a
// shared memfd allocates it. It moves the file's offset, so there is one
// caller at a time.
func (r *RAM) Extents(gpa GPA, n uint64, fn func(gpa GPA, n uint64) error) error {
	return r.Finder().Extents(gpa, n, fn)
}

// Finder finds the memory of RAM piece by piece. The kernel looks at each page
// from a place to the next hole, however far that is; a Finder remembers how
// far, and looks at it once. Nobody may Discard what it has found.
type Finder struct {
	ram      *RAM
	from, to int64 // in the memfd: what was found last, up to a hole
}

// Finder is one that has found nothing yet.
func (r *RAM) Finder() *Finder { return &Finder{ram: r} }

// Extents is that of RAM.
func (f *Finder) Extents(gpa GPA, n uint64, fn func(gpa GPA, n uint64) error) error {
	start, err := f.ram.Offset(gpa, n)
	if err != nil {
		return err
	}
	fd := int(f.ram.file.Fd())
	for at, end := start, start+int64(n); at < end; {
		if at < f.from || at >= f.to {
			data, err := unix.Seek(fd, at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
				return nil // nothing but holes from here on
			}
			if err != nil {
				return fmt.Errorf("seek data at offset %#x of guest memory: %w", at, err)
			}
			hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
			if err != nil {
				return fmt.Errorf("seek a hole at offset %#x of guest memory: %w", data, err)
			}
			f.from, f.to, at = data, hole, data
		}
		last := min(f.to, end)
		if err := fn(gpa+GPA(at-start), uint64(last-at)); err != nil {
			return err
		}
		at = last
	}
	return nil
}

// Discard makes n bytes at gpa, whole pages, a hole: they read as zero and
// occupy nothing. It fails with a *RangeError unless all of them are RAM of
// one region.
func (r *RAM) Discard(gpa GPA, n uint64) error {
	off, err := r.Offset(gpa, n)
	if err != nil || n == 0 {
		return err
	}
	if err := unix.Fallocate(int(r.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(n)); err != nil {
		return fmt.Errorf("punch a hole of %d bytes at offset %#x of guest memory: %w", n, off, err)
	}
	return nil
}
