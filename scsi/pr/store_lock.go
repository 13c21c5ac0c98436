package pr

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// lockFile is IMAGE.pr.lock: what the processes lock, and the memory that they
// share.
//
// It has a sequence number of the state, and a seat for every process that
// has the image open (every File, to be exact). Its byte locks belong to the
// open file (F_OFD_SETLK, fcntl(2)), so they end with the last descriptor and
// mapping of it, which in a killed process is after the last system call of
// its threads has returned: once a dead process's locks are gone, so are its
// commands.
type lockFile struct {
	file *os.File
	mem  *sys.Mapping // nil: not shared, see mappable
}

// The layout: the sequence number, eight bytes, then at seatLen times i+1 the
// seat i. Numbers are little-endian.
const (
	seatLen  = 512
	maxSeats = 127
	lockLen  = seatLen * (maxSeats + 1)

	seatBusy = 0   // 4 bytes: commands that went the quick way and are not over
	seatPID  = 4   // 4 bytes; 0: never used
	seatID   = 8   // length in 2 bytes, then the TransportID
	seatHost = 256 // length in 2 bytes, then the host's name

	seatNonce = seatLen - len(nonce{})
)

// nonce is made for each seat that is taken: who knows it has seen this file,
// and no copy, while somebody sat there. Eight bytes are random, the others the
// image's inode number, which is the same on all hosts.
type nonce [16]byte

const nonceInode = 8

// The bytes that are locked, beside each other for no other reason than that
// they have to be somewhere.
const (
	gateLock  = iota // see File
	stateLock        // see File
	seatLocks        // two for each seat
)

func lifeLock(seat int) int64  { return seatLocks + 2*int64(seat) }     // held as long as the seat is taken
func leaseLock(seat int) int64 { return seatLocks + 2*int64(seat) + 1 } // held while its commands may go the quick way

func openLockFile(path string) (*lockFile, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	l := &lockFile{file: file}
	if err := l.fcntl(unix.F_OFD_SETLKW, gateLock, unix.F_WRLCK); err != nil {
		file.Close()
		return nil, err
	}
	defer l.unlock(gateLock)
	if err := l.grow(); err != nil {
		file.Close()
		return nil, err
	}
	if l.mappable() {
		if l.mem, err = sys.MapShared(int(file.Fd()), 0, lockLen); err != nil {
			file.Close()
			return nil, err
		}
	}
	return l, nil
}

// grow writes what the file lacks, so that it has its blocks before they are
// touched through the mapping, where a full disk would be a SIGBUS.
func (l *lockFile) grow() error {
	fi, err := l.file.Stat()
	if err != nil || fi.Size() >= lockLen {
		return err
	}
	_, err = l.file.WriteAt(make([]byte, lockLen-fi.Size()), fi.Size())
	return err
}

// mappable says that all processes that can open the file map the same memory,
// and that writing to it needs no new blocks. Of a network file system each
// host has its own copy; one that copies on write (btrfs) may be full. There
// every command goes by the locks.
func (l *lockFile) mappable() bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(l.file.Fd()), &st); err != nil {
		return false
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.TMPFS_MAGIC: // the first is also ext2's and ext3's
		return true
	}
	return false
}

func (l *lockFile) close() error {
	var err error
	if l.mem != nil {
		err = l.mem.Close()
	}
	return errors.Join(err, l.file.Close())
}

func (l *lockFile) fcntl(cmd int, at int64, typ int16) error {
	lk := unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: at, Len: 1}
	for {
		err := unix.FcntlFlock(l.file.Fd(), cmd, &lk)
		if err != unix.EINTR {
			if err != nil {
				err = fmt.Errorf("lock byte %d of %s: %w", at, l.file.Name(), err)
			}
			return err
		}
	}
}

// share and own wait for the lock on byte at.
func (l *lockFile) share(at int64) error { return l.fcntl(unix.F_OFD_SETLKW, at, unix.F_RDLCK) }
func (l *lockFile) own(at int64) error   { return l.fcntl(unix.F_OFD_SETLKW, at, unix.F_WRLCK) }

// unlock cannot fail: the descriptor is valid and the range is.
func (l *lockFile) unlock(at int64) { l.fcntl(unix.F_OFD_SETLK, at, unix.F_UNLCK) }

// tryOwn does not wait.
func (l *lockFile) tryOwn(at int64) bool {
	return l.fcntl(unix.F_OFD_SETLK, at, unix.F_WRLCK) == nil
}

// taken says that another open file has a lock on byte at.
func (l *lockFile) taken(at int64) bool {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
	err := unix.FcntlFlock(l.file.Fd(), unix.F_OFD_GETLK, &lk)
	return err != nil || lk.Type != unix.F_UNLCK // in doubt, yes
}

// seq is the sequence number, 0 in a new file.
func (l *lockFile) seq() (uint64, error) {
	if l.mem != nil {
		return word64(l.mem.Bytes(), 0).Load(), nil
	}
	var b [8]byte
	_, err := l.file.ReadAt(b[:], 0)
	return binary.LittleEndian.Uint64(b[:]), err
}

func (l *lockFile) setSeq(n uint64) error {
	if l.mem != nil {
		word64(l.mem.Bytes(), 0).Store(n)
		return nil
	}
	_, err := l.file.WriteAt(binary.LittleEndian.AppendUint64(nil, n), 0)
	return err
}

// busy is the counter of a seat, nil where memory is not shared.
func (l *lockFile) busy(seat int) *atomic.Uint32 {
	if l.mem == nil {
		return nil
	}
	return word32(l.mem.Bytes(), seatLen*(seat+1)+seatBusy)
}

// seat is who sits, or sat, somewhere.
type seat struct {
	pid   uint32
	id    TransportID
	host  string
	nonce nonce
}

func (l *lockFile) readSeats(seats *[maxSeats]seat) error {
	all := make([]byte, lockLen)
	if _, err := l.file.ReadAt(all, 0); err != nil {
		return err
	}
	for i := range seats {
		b := all[seatLen*(i+1):][:seatLen]
		text := func(at, most int) string {
			n := int(binary.LittleEndian.Uint16(b[at:]))
			return string(b[at+2:][:min(n, most)])
		}
		seats[i] = seat{
			pid:   binary.LittleEndian.Uint32(b[seatPID:]),
			id:    TransportID(text(seatID, seatHost-seatID-2)),
			host:  text(seatHost, seatNonce-seatHost-2),
			nonce: nonce(b[seatNonce:]),
		}
	}
	return nil
}

// take sits down on seat i, which nobody has.
func (l *lockFile) take(i int, s seat) error {
	if len(s.id) > seatHost-seatID-2 {
		return fmt.Errorf("TransportID of %d bytes: the seat has room for %d", len(s.id), seatHost-seatID-2)
	}
	var b [seatLen]byte
	binary.LittleEndian.PutUint32(b[seatPID:], s.pid)
	binary.LittleEndian.PutUint16(b[seatID:], uint16(copy(b[seatID+2:seatHost], s.id)))
	binary.LittleEndian.PutUint16(b[seatHost:], uint16(copy(b[seatHost+2:seatNonce], s.host)))
	copy(b[seatNonce:], s.nonce[:])
	if _, err := l.file.WriteAt(b[:], seatLen*int64(i+1)); err != nil {
		return err
	}
	return l.own(lifeLock(i))
}

// HeldError says that another process has the image open under the same
// initiator name. Two guests on one nexus could not be told apart.
type HeldError struct {
	Initiator TransportID
	PID       int
	Host      string
}

// Holder names the process.
func (e *HeldError) Holder() string {
	here, _ := os.Hostname()
	switch {
	case e.Host != here:
		return fmt.Sprintf("process %d on host %s", e.PID, e.Host)
	case e.PID == os.Getpid():
		return "this process"
	}
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", e.PID)); err == nil && len(cmdline) > 0 {
		return fmt.Sprintf("process %d (%.80q)", e.PID, strings.ReplaceAll(strings.TrimRight(string(cmdline), "\x00"), "\x00", " "))
	}
	return fmt.Sprintf("process %d", e.PID)
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("nexus %v is in use by %s", e.Initiator, e.Holder())
}
