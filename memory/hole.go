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
	reg, err := r.region(gpa, n)
	if err != nil {
		return err
	}
	fd := int(r.file.Fd())
	start := reg.Offset + int64(gpa-reg.GPA)
	for at, end := start, start+int64(n); at < end; {
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
		hole = min(hole, end)
		if err := fn(gpa+GPA(data-start), uint64(hole-data)); err != nil {
			return err
		}
		at = hole
	}
	return nil
}

// Discard makes n bytes at gpa, whole pages, a hole: they read as zero and
// occupy nothing. It fails with a *RangeError unless all of them are RAM of
// one region.
func (r *RAM) Discard(gpa GPA, n uint64) error {
	reg, err := r.region(gpa, n)
	if err != nil || n == 0 {
		return err
	}
	off := reg.Offset + int64(gpa-reg.GPA)
	if err := unix.Fallocate(int(r.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(n)); err != nil {
		return fmt.Errorf("punch a hole of %d bytes at offset %#x of guest memory: %w", n, off, err)
	}
	return nil
}
