package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// Bits of byte 1 of a CDB.
const (
	fuaField    = 0x08 // READ, WRITE, COMPARE AND WRITE
	bytchkField = 0x06 // VERIFY
	unmapField  = 0x08 // WRITE SAME
	ndobField   = 0x01 // WRITE SAME (16)
)

func (l *LUN) offset(lba uint64) int64 { return int64(lba << l.blockShift) }
func (l *LUN) bytes(n uint32) int      { return int(n) << l.blockShift }
func (l *LUN) lba(off int64) uint64    { return uint64(off) >> l.blockShift }

// size is the length of segs in bytes.
func size(segs [][]byte) int {
	n := 0
	for _, s := range segs {
		n += len(s)
	}
	return n
}

// lock waits until w may use e; l.ranges.unlock(w) gives it back.
func (l *LUN) lock(w *worker, e extent, exclusive bool) (ok bool) {
	off := uint64(l.offset(e.lba))
	return l.ranges.lock(w, off, off+uint64(l.bytes(e.n)), exclusive)
}

// failed turns an error of the file into sense; bad is what an I/O error is
// called in this direction.
func failed(err error, bad scsi.Sense) result {
	var errno unix.Errno
	if errors.As(err, &errno) {
		switch errno {
		case unix.EIO:
			return check(bad)
		case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
			return check(noSpace)
		case unix.EROFS, unix.EPERM:
			return check(scsi.WriteProtected)
		}
		return check(scsi.InternalTargetFailed)
	}
	return check(bad)
}

// failedAt is failed with the byte of the disk at which it happened.
func (l *LUN) failedAt(err error, bad scsi.Sense, off int64) result {
	r := failed(err, bad)
	if r.sense.Key == scsi.MediumError {
		r.info, r.hasInfo = l.lba(off), true
	}
	return r
}

// transfer moves n bytes between segs, from byte skip of them on, and the file
// at off, in as few system calls as the kernel lets it, and returns how many
// were moved. The caller knows that segs have that many. A file that has
// become shorter than the disk reads as io.ErrUnexpectedEOF.
func (l *LUN) transfer(w *worker, segs [][]byte, skip, n int, off int64, write bool) (done int, err error) {
	for done < n {
		iov := w.gather(segs, skip+done, n-done)
		var moved int
		if write {
			moved, err = l.file.pwritev(iov, off+int64(done))
		} else {
			moved, err = l.file.preadv(iov, off+int64(done), w.quick)
		}
		// The array is on the heap and must not keep addresses that may one
		// day be unmapped, then belong to the heap: the garbage collector
		// stops the program at such a pointer.
		clear(iov)
		if err == nil && moved == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return done, err
		}
		done += moved
	}
	return done, nil
}

// gather fills the worker's iovec array with up to n bytes of segs from byte
// skip on.
func (w *worker) gather(segs [][]byte, skip, n int) []unix.Iovec {
	used := 0
	for _, s := range segs {
		if skip >= len(s) {
			skip -= len(s)
			continue
		}
		s = s[skip:]
		skip = 0
		if len(s) > n {
			s = s[:n]
		}
		w.iov[used].Base = &s[0]
		w.iov[used].SetLen(len(s))
		used++
		n -= len(s)
		if n == 0 || used == len(w.iov) {
			break
		}
	}
	return w.iov[:used]
}

// put writes n bytes of segs from byte skip on to the file at off, and brings
// them to the medium if that is asked for or the cache is off.
func (l *LUN) put(w *worker, segs [][]byte, skip, n int, off int64, durable bool) result {
	failures := l.flusher.failures()
	done, err := l.transfer(w, segs, skip, n, off, true)
	if err != nil {
		return l.failedAt(err, writeError, off+int64(done))
	}
	return l.settle(result{moved: skip + n}, failures, durable)
}

// settle ends a command that has changed the medium with r: if durable is set
// or the cache is off, what it wrote is on the medium before it ends. failures
// was taken before the change.
func (l *LUN) settle(r result, failures uint64, durable bool) result {
	if !r.good() || !durable && l.wce.Load() {
		return r
	}
	if err := l.flusher.flush(failures); err != nil {
		return failed(err, writeError)
	}
	return r
}

// expose makes the medium have what the cache has, for a command that is to
// look at the medium.
func (l *LUN) expose() error {
	if l.readOnly {
		return nil
	}
	return l.flusher.flush(l.flusher.failures())
}

// read is READ (SBC-4 5.15 to 5.18). A buffer that is shorter than the blocks
// gets as much as fits.
func (l *LUN) read(w *worker, c *scsi.Command, e extent) result {
	if c.CDB[0] != scsi.OpRead6 && c.CDB[1]&fuaField != 0 {
		if w.quick {
			return result{again: true}
		}
		if err := l.expose(); err != nil {
			return failed(err, writeError)
		}
	}
	n := min(l.bytes(e.n), size(c.DataIn))
	if !l.lock(w, e, false) {
		return result{again: true}
	}
	defer l.ranges.unlock(w)
	off := l.offset(e.lba)
	done, err := l.transfer(w, c.DataIn, 0, n, off, false)
	if err != nil && w.quick { // not in the cache, or worse: a worker will see
		return result{again: true}
	}
	if err != nil {
		r := l.failedAt(err, readError, off+int64(done))
		r.moved = done
		return r
	}
	return result{moved: n}
}

// write is WRITE (SBC-4 5.40 to 5.43).
func (l *LUN) write(w *worker, c *scsi.Command, e extent) result {
	n := l.bytes(e.n)
	if size(c.DataOut) < n {
		return check(invalidFieldInIU)
	}
	l.lock(w, e, false)
	defer l.ranges.unlock(w)
	fua := c.CDB[0] != scsi.OpWrite6 && c.CDB[1]&fuaField != 0
	return l.put(w, c.DataOut, 0, n, l.offset(e.lba), fua)
}

// verify is VERIFY (SBC-4 5.36, 5.37): the blocks can be read, and with BYTCHK
// 01b are equal to the data-out buffer.
func (l *LUN) verify(w *worker, c *scsi.Command, e extent) result {
	compare := c.CDB[1]&bytchkField != 0
	n := l.bytes(e.n)
	if compare && size(c.DataOut) < n {
		return check(invalidFieldInIU)
	}
	if err := l.expose(); err != nil {
		return failed(err, writeError)
	}
	l.lock(w, e, false)
	defer l.ranges.unlock(w)
	buf := w.buffer()
	for done := 0; done < n; {
		part := buf[:min(len(buf), n-done)]
		if r := l.fetch(w, part, l.offset(e.lba)+int64(done)); !r.good() {
			return r
		}
		if compare {
			if i := differ(c.DataOut, done, part); i < len(part) {
				return checkAt(miscompare, uint64(done+i))
			}
			done += len(part)
			continue
		}
		done += len(part)
	}
	if !compare {
		n = 0
	}
	return result{moved: n}
}

// fetch reads the file at off into buf.
func (l *LUN) fetch(w *worker, buf []byte, off int64) result {
	w.segs[0] = buf
	done, err := l.transfer(w, w.segs[:1], 0, len(buf), off, false)
	if err != nil {
		return l.failedAt(err, readError, off+int64(done))
	}
	return result{}
}

// differ compares p with the bytes of segs from byte skip on, which are as
// many, and returns the index of the first that differs, or len(p).
func differ(segs [][]byte, skip int, p []byte) int {
	at := 0
	for _, s := range segs {
		if skip >= len(s) {
			skip -= len(s)
			continue
		}
		s = s[skip:]
		skip = 0
		if len(s) > len(p)-at {
			s = s[:len(p)-at]
		}
		if !bytes.Equal(s, p[at:at+len(s)]) {
			for i := range s {
				if s[i] != p[at+i] {
					return at + i
				}
			}
			// Guest memory changed between the two looks; it did differ.
			return at
		}
		if at += len(s); at == len(p) {
			break
		}
	}
	return at
}

// compareAndWrite is COMPARE AND WRITE (SBC-4 5.3): the first half of the data
// is compared, and if it is equal the second half is written, with no other
// command on these blocks in between.
func (l *LUN) compareAndWrite(w *worker, c *scsi.Command, e extent) result {
	if e.n > l.maxCompareBlocks() {
		return invalidCDB(13, 7)
	}
	n := l.bytes(e.n)
	if size(c.DataOut) < 2*n {
		return check(invalidFieldInIU)
	}
	if n == 0 {
		return result{}
	}
	l.lock(w, e, true)
	defer l.ranges.unlock(w)
	off := l.offset(e.lba)
	buf := w.buffer()[:n]
	if r := l.fetch(w, buf, off); !r.good() {
		return r
	}
	if i := differ(c.DataOut, 0, buf); i < n {
		return checkAt(miscompare, uint64(i))
	}
	return l.put(w, c.DataOut, n, n, off, c.CDB[1]&fuaField != 0)
}

// writeSame is WRITE SAME (SBC-4 5.50, 5.51).
func (l *LUN) writeSame(w *worker, c *scsi.Command, e extent) result {
	if e.n == 0 || e.n > maxWriteSame>>l.blockShift { // WSNZ
		return invalidCDB(countField(c.CDB), 7)
	}
	zero, moved := true, 0
	block := w.buffer()[:l.blockSize]
	if c.CDB[1]&ndobField == 0 {
		if moved = c.Gather(block); moved < len(block) {
			return check(invalidFieldInIU)
		}
		zero = bytes.Count(block, []byte{0}) == len(block)
	}
	l.lock(w, e, false)
	defer l.ranges.unlock(w)
	failures := l.flusher.failures()
	var r result
	if zero {
		// Unmapped blocks read as zeros (LBPRZ), so this is what UNMAP may do.
		r = l.zero(w, e, c.CDB[1]&unmapField != 0)
	} else {
		r = l.fill(w, e, block)
	}
	r.moved = moved
	return l.settle(r, failures, false)
}

// zero makes e read as zeros, without blocks behind it if deallocate is set,
// otherwise with blocks, so that a later write finds room.
func (l *LUN) zero(w *worker, e extent, deallocate bool) result {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE)
	if deallocate {
		mode = unix.FALLOC_FL_PUNCH_HOLE
	}
	err := l.fallocate(mode, e)
	if errors.Is(err, unix.EOPNOTSUPP) {
		block := w.buffer()[:l.blockSize]
		clear(block)
		return l.fill(w, e, block)
	}
	if err != nil {
		return failed(err, writeError)
	}
	return result{}
}

func (l *LUN) fallocate(mode uint32, e extent) error {
	return l.file.fallocate(mode|unix.FALLOC_FL_KEEP_SIZE, l.offset(e.lba), int64(l.bytes(e.n)))
}

// fill writes block, which is at the start of w's buffer, to every block of e.
func (l *LUN) fill(w *worker, e extent, block []byte) result {
	buf := w.buffer()
	for n := len(block); n < len(buf); n *= 2 {
		copy(buf[n:], buf[:n])
	}
	for i := range w.segs {
		w.segs[i] = buf
	}
	off, n := l.offset(e.lba), l.bytes(e.n)
	for done := 0; done < n; {
		moved, err := l.transfer(w, w.segs[:], 0, min(n-done, len(w.segs)*len(buf)), off+int64(done), true)
		if done += moved; err != nil {
			return l.failedAt(err, writeError, off+int64(done))
		}
	}
	return result{}
}

// unmap is UNMAP (SBC-4 5.35). The list is copied and checked as a whole
// before the first block is deallocated.
func (l *LUN) unmap(w *worker, c *scsi.Command, _ extent) result {
	const headerLen, descLen = 8, 16
	length := int(binary.BigEndian.Uint16(c.CDB[7:]))
	if length == 0 {
		return result{}
	}
	list := w.buffer()[:length]
	if length < headerLen || c.Gather(list) != length {
		return check(scsi.ParameterListLength)
	}
	n := int(binary.BigEndian.Uint16(list[2:])) / descLen // a last, shorter one does not count
	if n*descLen > length-headerLen {
		return check(scsi.ParameterListLength)
	}
	if n > maxUnmapDesc {
		return invalidList(2)
	}
	descriptor := func(i int) extent {
		d := list[headerLen+i*descLen:]
		return extent{binary.BigEndian.Uint64(d), binary.BigEndian.Uint32(d[8:])}
	}
	var total uint64
	for i := range n {
		e := descriptor(i)
		if !l.contains(e) {
			return outOfRange(e.lba)
		}
		if total += uint64(e.n); total > maxUnmap>>l.blockShift {
			return invalidList(headerLen + i*descLen + 8)
		}
	}
	failures := l.flusher.failures()
	for i := range n {
		e := descriptor(i)
		if e.n == 0 {
			continue
		}
		l.lock(w, e, false)
		err := l.fallocate(unix.FALLOC_FL_PUNCH_HOLE, e)
		l.ranges.unlock(w)
		if err != nil {
			return failed(err, writeError)
		}
	}
	return l.settle(result{moved: length}, failures, false)
}

// synchronizeCache is SYNCHRONIZE CACHE (SBC-4 5.33, 5.34). The whole cache is
// written, whatever part is asked for; with IMMED the status also comes after
// that.
func (l *LUN) synchronizeCache(*worker, *scsi.Command, extent) result {
	if l.readOnly {
		return result{}
	}
	if err := l.flusher.flushAll(); err != nil {
		return failed(err, writeError)
	}
	return result{}
}

// startStop is START STOP UNIT (SBC-4 5.31): a stopped disk refuses what needs
// its medium. With IMMED the status also comes when all is done.
func (l *LUN) startStop(_ *worker, c *scsi.Command, _ extent) result {
	const start, noFlush = 0x01, 0x04
	if c.CDB[4]&start != 0 {
		l.stopped.Store(false)
		return result{}
	}
	if c.CDB[4]&noFlush == 0 && !l.readOnly {
		if err := l.flusher.flushAll(); err != nil {
			return failed(err, writeError)
		}
	}
	l.stopped.Store(true)
	return result{}
}

// getLBAStatus is GET LBA STATUS (SBC-4 5.6): which blocks have something
// behind them, as far as the file system tells.
func (l *LUN) getLBAStatus(w *worker, c *scsi.Command, _ extent) result {
	const headerLen, descLen, maxLen = 8, 16, 4096
	lba := binary.BigEndian.Uint64(c.CDB[2:])
	allocation := binary.BigEndian.Uint32(c.CDB[10:])
	capacity := l.blocks.Load()
	if lba >= capacity {
		return outOfRange(lba)
	}
	// As many descriptors as the initiator has room for, but at least one.
	room := max(1, (min(int(allocation), size(c.DataIn), maxLen)-headerLen)/descLen)
	data := w.buffer()
	n := headerLen
	for ; room > 0 && lba < capacity; room-- {
		end, mapped, err := l.statusAt(lba, capacity)
		if err != nil {
			return l.failedAt(err, readError, l.offset(lba))
		}
		count := uint32(min(end-lba, 0xffffffff))
		d := data[n : n+descLen]
		clear(d)
		binary.BigEndian.PutUint64(d, lba)
		binary.BigEndian.PutUint32(d[8:], count)
		if !mapped {
			d[12] = 1 // PROVISIONING STATUS: deallocated
		}
		n += descLen
		lba += uint64(count)
	}
	clear(data[:headerLen])
	binary.BigEndian.PutUint32(data, uint32(n-4))
	return reply(c, data[:n], allocation)
}

// statusAt finds the end of the run of blocks from lba on that are alike. A
// block is mapped if any byte of it is.
func (l *LUN) statusAt(lba, capacity uint64) (end uint64, mapped bool, err error) {
	off := l.offset(lba)
	data, err := l.file.seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data up to the end of the file
		return capacity, false, nil
	case errors.Is(err, unix.EINVAL): // the file system cannot tell
		return capacity, true, nil
	case err != nil:
		return 0, false, err
	}
	if first := l.lba(data); first > lba {
		return min(first, capacity), false, nil
	}
	hole, err := l.file.seek(data, unix.SEEK_HOLE)
	if err != nil {
		return 0, false, err
	}
	return min(l.lba(hole+int64(l.blockSize)-1), capacity), true, nil
}
