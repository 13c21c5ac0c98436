package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// openReservations opens what is kept beside the image at path for the nexus
// called initiator; empty is the host's name. Its answer is nil where nothing
// can be kept there by this user and nothing is: then the disk knows no
// reservations, and shares the image with nobody who does.
func openReservations(path, initiator string) (*pr.File, error) {
	if initiator == "" {
		var err error
		if initiator, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("this host has no name: %w; give the disk an initiator name", err)
		}
	}
	nexus, err := pr.NamedNexus(initiator)
	if err != nil {
		return nil, err
	}
	f, err := pr.Open(path, nexus)
	var held *pr.HeldError
	switch {
	case err == nil:
		return f, nil
	case errors.As(err, &held):
		return nil, fmt.Errorf("%w by %s as initiator %s; stop it first, or, if the guests are a cluster that shares the disk, give each another initiator name",
			ErrInUse, held.Holder(), initiator)
	case errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS):
		if _, none := os.Lstat(path + ".pr"); errors.Is(none, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("%w; the image has reservations, so let this user write %s.pr and %s.pr.lock, and in their directory", err, path, path)
	}
	return nil, err
}

// Nexus is this disk's I_T nexus; the zero value if it has no reservations.
func (l *LUN) Nexus() pr.Nexus {
	if l.reservations == nil {
		return pr.Nexus{}
	}
	return l.reservations.Nexus()
}

// Nonce shows that whoever knows it had this file open together with l, and no
// copy of it; nil if nothing can be kept beside the image.
func (l *LUN) Nonce() []byte {
	if l.reservations == nil {
		return nil
	}
	return l.reservations.Nonce()
}

// Met says whether a disk whose Nonce this is had the file open when l was
// opened.
func (l *LUN) Met(nonce []byte) bool { return l.reservations != nil && l.reservations.Met(nonce) }

// Bytes of the image that are locked as a sign to others (F_OFD_SETLK,
// fcntl(2)), shared by those who get along with each other.
const (
	lockReserving = iota // disks that go by the reservations
	lockPlain            // disks without any: one writer, or any number of readers
)

// lockImage keeps disks that know no reservations apart from those that do,
// and from each other where one of them writes. Each takes its own lock before
// it looks for the other's, so at most both are refused.
func lockImage(fd int, reserving, readOnly bool) error {
	typ, own, other := int16(unix.F_RDLCK), int64(lockReserving), int64(lockPlain)
	if !reserving {
		own, other = other, own
		if !readOnly {
			typ = unix.F_WRLCK
		}
	}
	lk := unix.Flock_t{Type: typ, Start: own, Len: 1}
	err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
	if err == nil {
		lk = unix.Flock_t{Type: unix.F_WRLCK, Start: other, Len: 1}
		err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk)
		if err == nil && lk.Type != unix.F_UNLCK {
			err = unix.EAGAIN
		}
	}
	switch {
	case err == unix.EAGAIN && reserving:
		return fmt.Errorf("%w by a disk without reservations, of a user who may write nothing beside the image; stop it first", ErrInUse)
	case err == unix.EAGAIN:
		return fmt.Errorf("%w, and this user may not write beside the image, where its reservations are kept; stop the other, or permit this user to", ErrInUse)
	case err != nil:
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

// enter asks the reservations whether c may run; pass is to be given back when
// it is over. Without a worker of its own, or one that is to be quick, it does
// not wait.
func (l *LUN) enter(w *worker, cdb []byte, alone bool) (pass pr.Pass, r result) {
	pass, a, ok := l.reservations.TryEnter(cdb, alone)
	if ok {
		return pass, answered(a, nil)
	}
	if w == nil || w.quick {
		return pass, result{again: true}
	}
	pass, a, err := l.reservations.Enter(cdb, alone)
	return pass, answered(a, err)
}

// answered is how a command ends that the reservations have answered.
func answered(a pr.Answer, err error) result {
	switch {
	case err != nil: // they cannot be read or kept: nothing may be taken for allowed
		return check(scsi.InternalTargetFailed)
	case a.Status == scsi.ReservationConflict:
		return result{conflict: true}
	case a.Status == scsi.CheckCondition:
		return check(a.Sense)
	}
	return result{}
}

// reservedAttention takes a unit attention that another nexus caused; the zero
// value is none. If r is not GOOD, or to be tried again, it could not be told.
func (l *LUN) reservedAttention(w *worker) (s scsi.Sense, r result) {
	switch {
	case l.reservations == nil || l.reservations.Quiet():
		return s, r
	case w == nil || w.quick:
		return s, result{again: true}
	}
	s, err := l.reservations.TakeAttention()
	return s, answered(pr.Answer{}, err)
}

// Registered says whether the nexus of that initiator name is registered with
// the disk. That is no command, and takes no unit attention away.
func (l *LUN) Registered(initiator string) (bool, error) {
	nexus, err := pr.NamedNexus(initiator)
	if err != nil || l.reservations == nil {
		return false, err
	}
	t, err := l.reservations.Target()
	if err != nil {
		return false, fmt.Errorf("disk: %s: %w", l.path, err)
	}
	return t.Key(nexus) != 0, nil
}

// Seated says whether a disk has the image open under that initiator name.
func (l *LUN) Seated(initiator string) (bool, error) {
	nexus, err := pr.NamedNexus(initiator)
	if err != nil || l.reservations == nil {
		return false, err
	}
	seated, err := l.reservations.Seated(nexus)
	if err != nil {
		return false, fmt.Errorf("disk: %s: %w", l.path, err)
	}
	return seated, nil
}

// persistentIn is PERSISTENT RESERVE IN (SPC-5 6.15).
func (l *LUN) persistentIn(_ *worker, c *scsi.Command, _ extent) result {
	data, a, err := l.reservations.Execute(c.CDB, nil)
	if r := answered(a, err); !r.good() {
		return r
	}
	return reply(c, data, uint32(binary.BigEndian.Uint16(c.CDB[7:])))
}

// persistentOut is PERSISTENT RESERVE OUT (SPC-5 6.16). When it is answered,
// every command that another nexus ran before it is over, which is what
// PREEMPT AND ABORT needs.
func (l *LUN) persistentOut(w *worker, c *scsi.Command, _ extent) result {
	length := binary.BigEndian.Uint32(c.CDB[5:])
	list := w.buffer()
	list = list[:min(uint64(length), uint64(len(list)))]
	list = list[:c.Gather(list)]
	_, a, err := l.reservations.Execute(c.CDB, list)
	r := answered(a, err)
	if r.good() {
		r.moved = len(list)
	}
	return r
}

// reserveUnit is RESERVE and RELEASE, 6 and 10 (SPC-2 7.21 to 7.24), of the
// whole unit.
func (l *LUN) reserveUnit(_ *worker, c *scsi.Command, _ extent) result {
	_, a, err := l.reservations.Execute(c.CDB, nil)
	return answered(a, err)
}
