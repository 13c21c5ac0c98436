// Package disk is the software disk: a regular file as a SCSI direct-access
// block device.
//
// The files: commands.go has the one table that dispatches, checks and reports
// every command; inquiry.go, mode.go and media.go carry them out; queue.go
// runs them on worker goroutines; ranges.go keeps COMPARE AND WRITE atomic;
// flush.go empties the cache; file_unsafe.go is the door to the file;
// identity.go gives the disk a name; reservations.go has the reservations.
//
// Caching: data goes through the host's page cache, which is the disk's
// volatile write cache. SYNCHRONIZE CACHE, FUA and WCE=0 reach the medium.
//
// Identity: a disk keeps its serial number and its NAA designator wherever its
// file goes. See identity.
//
// Sharing: an image is one logical unit, and every LUN that has it open is an
// I_T nexus of it, in whatever process, kept apart by persistent reservations
// (package pr) and nothing else. They share data, capacity and reservations;
// COMPARE AND WRITE is atomic among all of them. The caching mode page and
// START STOP UNIT are each nexus's own.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// ErrInUse says that another process, or another LUN of this one, has the
// image open, and in a way that leaves no room for this one.
var ErrInUse = errors.New("image is in use")

// Options are how to open an image.
type Options struct {
	ReadOnly  bool   // refuse every command that changes the medium
	BlockSize uint32 // bytes in a logical block, 512 or 4096; 0 is 512

	// Initiator names the I_T nexus: the same name is the same nexus, to which
	// a registration belongs, also after the disk is closed and opened again.
	// It may be an iSCSI name. The default is the host's name.
	Initiator string
}

// LUN is an open image. It implements scsi.LUN.
type LUN struct {
	path     string
	file     file
	uuid     uuid
	readOnly bool
	thin     bool // the file system can deallocate blocks
	// reservations of the image; nil if it cannot have any.
	reservations *pr.File
	blockSize    uint32 // bytes
	blockShift   uint8  // blockSize == 1 << blockShift

	blocks    atomic.Uint64 // capacity in logical blocks
	wce       atomic.Bool   // WRITE CACHE ENABLE of the caching mode page
	stopped   atomic.Bool   // by START STOP UNIT
	attention atomic.Uint32 // pending unit attentions, a bit each
	flusher   flusher
	ranges    ranges
	tasks     queue
}

var _ scsi.LUN = (*LUN)(nil)

// Open opens the image at path, a regular file whose size is a multiple of the
// block size. Several may open it, each with another initiator name, in files
// that this user can write beside the image (see pr.File). Where these cannot
// be written and are not there, the disk has no reservations, and the image is
// locked: against everybody, or for a read-only disk against everybody but
// others of its kind. All locks end with Close or the process.
func Open(path string, o Options) (*LUN, error) {
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	if o.BlockSize != 512 && o.BlockSize != 4096 {
		return nil, fmt.Errorf("disk: %s: block size %d: it is 512 or 4096", path, o.BlockSize)
	}
	// Symbolic links are followed once, here, so that what is kept beside the
	// image is found by whatever name it is opened.
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, openError(path, err)
	}
	// The type is looked at before the open, which may itself do something to
	// a device, and wait for ever on a pipe.
	if fi, err := os.Stat(real); err != nil {
		return nil, openError(path, err)
	} else if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("disk: %s is a %s, not a regular file; give the image file of a disk", path, kind(fi.Mode()))
	}
	mode := unix.O_RDWR
	if o.ReadOnly {
		mode = unix.O_RDONLY
	}
	fd, err := unix.Open(real, mode|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, openError(path, err)
	}
	l, err := open(path, real, fd, o)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return l, nil
}

// open does the part of Open that needs fd closed when it fails.
func open(path, real string, fd int, o Options) (l *LUN, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("disk: fstat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("disk: %s is not a regular file", path)
	}
	if st.Size == 0 {
		return nil, fmt.Errorf(`disk: %s is empty; give it a size with "truncate -s 8G %s"`, path, path)
	}
	if st.Size%int64(o.BlockSize) != 0 {
		return nil, fmt.Errorf(`disk: %s: %d bytes are no multiple of the block size %d; round up with "truncate -s %%%d %s"`,
			path, st.Size, o.BlockSize, o.BlockSize, path)
	}
	reservations, err := openReservations(real, o.Initiator)
	if err != nil {
		return nil, fmt.Errorf("disk: %s: %w", path, err)
	}
	defer func() {
		if err != nil && reservations != nil {
			reservations.Close()
		}
	}()
	if err := lockImage(fd, reservations != nil, o.ReadOnly); err != nil {
		return nil, fmt.Errorf("disk: %s: %w", path, err)
	}
	id, err := identity(fd, real, &st, o.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("disk: %s: %w", path, err)
	}
	return newLUN(path, osFile(fd), uint64(st.Size), id, reservations, o), nil
}

// newLUN makes a disk of size bytes, a multiple of o.BlockSize, on f.
func newLUN(path string, f file, size uint64, id uuid, reservations *pr.File, o Options) *LUN {
	l := &LUN{path: path, file: f, uuid: id, reservations: reservations, readOnly: o.ReadOnly, blockSize: o.BlockSize, blockShift: 9}
	if o.BlockSize == 4096 {
		l.blockShift = 12
	}
	// A hole punched behind the end changes nothing and tells whether holes
	// can be punched at all.
	l.thin = !o.ReadOnly && f.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(size), int64(o.BlockSize)) == nil
	l.blocks.Store(size >> l.blockShift)
	l.wce.Store(true)
	l.attention.Store(attentionPowerOn)
	l.flusher.init(f.sync)
	l.ranges.init()
	l.tasks.init(l.execute)
	return l
}

// kind is what a user calls a file that is not regular.
func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&fs.ModeCharDevice != 0:
		return "character device"
	case m&fs.ModeDevice != 0:
		return "block device"
	case m&fs.ModeNamedPipe != 0:
		return "named pipe"
	case m&fs.ModeSocket != 0:
		return "socket"
	}
	return "special file"
}

func openError(path string, err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("disk: open %s: %w", path, err)
	}
	switch errno {
	case unix.ENOENT:
		return fmt.Errorf(`disk: open %s: %w; make an image with "truncate -s 8G %s"`, path, errno, path)
	case unix.EACCES, unix.EPERM, unix.EROFS:
		return fmt.Errorf("disk: open %s: %w; let this user read and write it, or open it read-only", path, errno)
	}
	return fmt.Errorf("disk: open %s: %w", path, errno)
}

// Serial is the disk's unit serial number as VPD page 80h shows it.
func (l *LUN) Serial() string { return l.uuid.hex() }

// Limits is what one command may carry.
func (l *LUN) Limits() scsi.Limits {
	return scsi.Limits{MaxTransfer: maxTransfer, MaxSegments: maxIovecs}
}

// Submit starts c. A command that needs no file, and a short READ of what is
// in the page cache, are done before it returns: waking a worker takes longer.
// It does not wait, not for the reservations either.
func (l *LUN) Submit(c *scsi.Command) {
	if len(c.CDB) > 0 && (c.Attr == scsi.Simple || c.Attr == scsi.HeadOfQueue) {
		cmd := l.lookup(c.CDB)
		if cmd == nil || cmd.flags&immediate != 0 {
			if r := l.perform(nil, c); !r.again {
				l.answer(c, r)
				return
			}
		} else if cmd.flags&quick != 0 && c.DataLen() <= maxQuick {
			if w := l.tasks.claim(); w != nil {
				w.quick = true
				r := l.perform(w, c)
				w.quick = false
				if r.again {
					w.wake <- c
				} else {
					l.answer(c, r)
					l.tasks.release(w)
				}
				return
			}
		}
	}
	l.tasks.submit(c)
}

// Rescan looks at the file's size again and says whether the capacity changed;
// if so, the guest's next command learns it from a unit attention.
func (l *LUN) Rescan() (changed bool, err error) {
	size, err := l.file.size()
	if err != nil {
		return false, fmt.Errorf("disk: fstat %s: %w", l.path, err)
	}
	if size == 0 || size%int64(l.blockSize) != 0 {
		return false, fmt.Errorf("disk: %s: new size of %d bytes is no multiple of the block size %d; the disk keeps its %d blocks",
			l.path, size, l.blockSize, l.blocks.Load())
	}
	blocks := uint64(size) >> l.blockShift
	if l.blocks.Swap(blocks) == blocks {
		return false, nil
	}
	l.raise(attentionCapacity)
	return true, nil
}

// Leave brings all that was written to the medium, for a host that goes on with
// the disk and has another page cache. The error may be of a write long ago,
// which the guest has still to hear of.
func (l *LUN) Leave() error {
	if l.readOnly {
		return nil
	}
	flush := l.flusher.flushUntold
	if !l.wce.Load() { // each write has told, and nobody asks for a flush
		flush = func() error { return l.flusher.flush(l.flusher.failures()) }
	}
	if err := flush(); err != nil {
		return fmt.Errorf("disk: %s: write back: %w", l.path, err)
	}
	return nil
}

// Arrive is Leave's other end: what this host has cached of the image may be
// older than what the other one has written.
func (l *LUN) Arrive() error {
	if err := l.file.forget(); err != nil {
		return fmt.Errorf("disk: %s: drop the page cache: %w", l.path, err)
	}
	return nil
}

// Reset is a LOGICAL UNIT RESET (SAM-5 6.3.3): commands not yet started come
// back with scsi.ResetOccurred, and those that are running, which nothing can
// stop, are waited for, so that none changes the medium after the reset; other
// nexuses' too. Mode parameters return to their defaults, SPC-2 reservations
// end, and the next command of every nexus meets a unit attention.
func (l *LUN) Reset() error {
	err := l.tasks.drain(func() {
		l.wce.Store(true)
		l.stopped.Store(false)
		l.raise(attentionReset)
	})
	if err == nil && l.reservations != nil {
		if err = l.reservations.Reset(); err != nil {
			err = fmt.Errorf("disk: %s: %w", l.path, err)
		}
	}
	return err
}

// Close waits for every command in flight, brings the data to the medium and
// releases the image. A second Close does nothing.
func (l *LUN) Close() error {
	if !l.tasks.close() {
		return nil
	}
	var errs []error
	if !l.readOnly {
		if err := l.flusher.flushAll(); err != nil {
			errs = append(errs, fmt.Errorf("disk: fdatasync %s: %w; the image may lack the last writes", l.path, err))
		}
	}
	if err := l.file.close(); err != nil {
		errs = append(errs, fmt.Errorf("disk: close %s: %w", l.path, err))
	}
	if l.reservations != nil {
		if err := l.reservations.Close(); err != nil {
			errs = append(errs, fmt.Errorf("disk: close reservations of %s: %w", l.path, err))
		}
	}
	return errors.Join(errs...)
}

// Pending unit attentions. One is reported at a time, the lowest bit first;
// an earlier one of the two reset conditions covers a later one, as their
// additional sense codes say the same to a host (SAM-5 5.14).
const (
	attentionPowerOn = 1 << iota
	attentionReset
	attentionCapacity
)

func (l *LUN) raise(bit uint32) { l.attention.Or(bit) }

// takeAttention takes the most important pending unit attention. Of several
// commands that ask at once, one gets it.
func (l *LUN) takeAttention() (scsi.Sense, bool) {
	for {
		pending := l.attention.Load()
		rest, sense := pending, scsi.Sense{}
		switch {
		case pending == 0:
			return sense, false
		case pending&attentionPowerOn != 0:
			rest, sense = pending&^(attentionPowerOn|attentionReset), scsi.PowerOnOccurred
		case pending&attentionReset != 0:
			rest, sense = pending&^attentionReset, pr.DeviceReset
		default:
			rest, sense = pending&^attentionCapacity, scsi.CapacityChanged
		}
		if l.attention.CompareAndSwap(pending, rest) {
			return sense, true
		}
	}
}
