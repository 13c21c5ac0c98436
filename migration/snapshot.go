package migration

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// A snapshot is the stream of a migration in a file. Nobody answers, so its
// order is one:
//
//	preamble, with the role of a snapshot
//	Hello, with one channel
//	AttachmentChunk, as many as there are
//	State: round 1 is the last
//	Reservation, step STATE, of each LUN that has reservations, in Hello's order
//	data frames, the end of round 1
//	Commit, with the checksum of everything since the preamble
//
// Byte 9 of the preamble is the snapshot's mark. It alone is written in place,
// and its becoming 1 is the COMMIT: before that the guest is its machine's, and
// a crash leaves a file that says it is unfinished; after it the guest is the
// file's, and the machine never runs it again. It becomes 2 before a machine
// made from the file changes anything on a disk or runs a vCPU.
const (
	markAt         = 9
	markUnfinished = 0
	markComplete   = 1
	markUsed       = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// SaveOptions say how a snapshot is made.
type SaveOptions struct {
	// Force replaces a file that is there.
	Force     bool
	Deadlines Deadlines
	// Progress, if not nil, is called about once a second, from one goroutine:
	// bytes that were written, and how many there are at most.
	Progress func(written, total uint64)
}

// Saved is a snapshot that is complete.
type Saved struct {
	ID    ID
	Path  string
	Bytes uint64 // the file's size
	Total time.Duration
	LUNs  []LUNOutcome // what was saved of the reservations
}

// Save writes src's guest to a file. Without an error the guest is the file's:
// this machine is to be closed, and not one instruction of the guest may be
// executed here any more. An error wraps one of:
//
//   - ErrRefused, ErrKept: the guest runs on here; it was stopped, if at all,
//     for a while. There is no file, or the one that was there before.
//   - ErrBlocked: the guest is stopped and must stay so, for the file may have
//     it.
//
// The end of ctx gives it up, unless the file is complete.
func Save(ctx context.Context, src Source, path string, opts SaveOptions) (Saved, error) {
	opts.Deadlines = opts.Deadlines.withDefaults()
	s := &saving{src: src, path: path, opts: opts, id: NewID()}
	began := time.Now()
	if err := s.refuse(); err != nil {
		return Saved{}, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	defer s.file.Close()
	if err := s.save(ctx); err != nil {
		if !errors.Is(err, ErrBlocked) {
			err = s.rollBack(err)
		}
		return Saved{}, err
	}
	s.take.close()
	return Saved{ID: s.id, Path: path, Bytes: s.out.written, Total: time.Since(began), LUNs: s.outcomes()}, nil
}

// saving is one snapshot on its way into its file.
type saving struct {
	src  Source
	path string
	opts SaveOptions
	id   ID

	file   *os.File // beside path until it is renamed
	name   string   // what file is called now; empty: it has no name any more
	out    *snapshotWriter
	pages  *pump
	total  uint64
	take   *takeover
	came   map[int]*vmmv1.Reservation // STATE, by LUN
	paused bool
}

// refuse does what can be done, and fail, with the guest running.
func (s *saving) refuse() error {
	for _, l := range s.src.LUNs() {
		if l.Tracked == nil || l.Preflight == nil {
			continue
		}
		if why := l.Preflight.Refuse(&pr.Pair{Same: true}, l.Tracked()); why != pr.NoReason {
			return errors.New(pr.Outcome{Kind: pr.Refused, Reason: why}.Sentence(l.ID))
		}
	}
	if err := s.vacant(); err != nil {
		return err
	}
	var err error
	if s.file, err = os.CreateTemp(filepath.Dir(s.path), "."+filepath.Base(s.path)+".new-"); err != nil { // mode 0600
		return err
	}
	s.name = s.file.Name()
	if _, err := s.file.Write(preamble{role: roleSnapshot, channel: markUnfinished, id: s.id}.bytes()); err != nil {
		s.discard()
		return err
	}
	return nil
}

// vacant says whether path may be written.
func (s *saving) vacant() error {
	info, err := os.Lstat(s.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", s.path)
	case !s.opts.Force:
		return fmt.Errorf("%s is there already; --force replaces it", s.path)
	}
	return nil
}

// save writes the file. Whatever it returns before the file is complete leaves
// the guest this machine's.
func (s *saving) save(ctx context.Context) error {
	s.out = newSnapshotWriter(s.file)
	s.pages = &pump{ram: s.src.RAM(), channels: []*channel{{conn: s.out}}}
	stop, err := s.begin()
	if err != nil {
		return err
	}
	defer stop()
	if err := s.pause(ctx); err != nil {
		return err
	}
	if err := s.state(ctx); err != nil {
		return err
	}
	err = s.pages.round(ctx, 1, func(fn func(memory.GPA, uint64) error) error {
		for _, r := range s.src.RAM().Regions() {
			if err := s.src.RAM().Extents(r.GPA, uint64(len(r.Bytes)), fn); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write memory to %s: %w", s.path, err)
	}
	if err := s.message(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Commit{Commit: &vmmv1.Commit{Crc32C: s.out.sum}}}); err != nil {
		return err
	}
	if err := s.out.Flush(); err != nil {
		return err
	}
	if err := s.file.Sync(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return s.commit()
}

// begin writes what does not change while the guest runs, and starts telling
// of the progress.
func (s *saving) begin() (stop func(), err error) {
	hello := offerOf(s.src, 1)
	if err := s.message(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Hello{Hello: hello}}); err != nil {
		return nil, err
	}
	files := s.src.Attachments()
	sums := make([]hash.Hash, len(files))
	for i := range sums {
		sums[i] = sha256.New()
	}
	err = sendAttachments(files, nil, func(m *vmmv1.StreamMessage) error {
		c := m.GetAttachment()
		sums[c.Attachment].Write(c.Data)
		return s.message(m)
	})
	if err != nil {
		return nil, err
	}
	for i, a := range files { // better now than when the guest is wanted back
		if got := [sha256.Size]byte(sums[i].Sum(nil)); got != a.SHA256 {
			return nil, fmt.Errorf("%s has digest %x by now, and had %x: it has changed since the guest was given it", a.Name, got, a.SHA256)
		}
	}
	s.total = s.out.written
	for _, r := range s.src.RAM().Regions() {
		err := s.src.RAM().Extents(r.GPA, uint64(len(r.Bytes)), func(_ memory.GPA, n uint64) error {
			s.total += n
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if s.opts.Progress == nil {
		return func() {}, nil
	}
	before, over := s.out.written, make(chan struct{})
	var told sync.WaitGroup
	told.Go(func() {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				s.opts.Progress(before+s.pages.sent.Load(), s.total)
			case <-over:
				return
			}
		}
	})
	return func() { close(over); told.Wait() }, nil
}

func (s *saving) message(m *vmmv1.StreamMessage) error {
	m.Id = s.id[:]
	b, err := appendMessage(nil, m)
	if err != nil {
		return err
	}
	if _, err := s.out.Write(b); err != nil {
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	return nil
}

// pause stops the guest.
func (s *saving) pause(ctx context.Context) error {
	if err := s.src.Settle(ctx); err != nil {
		return err
	}
	ctx, done := context.WithTimeout(ctx, s.opts.Deadlines.Drain)
	defer done()
	if _, err := s.src.Pause(ctx); err != nil {
		return fmt.Errorf("stop the guest: %w", err)
	}
	s.paused = true
	return nil
}

// state writes the state of processors, devices and reservations: of these what
// the disks say, as a migration's source would.
func (s *saving) state(ctx context.Context) error {
	luns := s.src.LUNs()
	came := make(chan *vmmv1.Reservation, len(luns))
	s.take = newTakeover(len(luns))
	for i, l := range luns {
		if l.Preflight == nil {
			continue
		}
		var key pr.Key
		if l.Tracked != nil {
			key = l.Tracked().Key
		}
		m := pr.NewSource(&pr.Pair{Old: l.Nexus, FullStatus: l.Preflight.FullStatus && l.Nexus != (pr.Nexus{})}, key)
		s.take.add(i, l, &m, nil, func(pr.Key) pr.Ledger { return noLedger{} }, func(w *vmmv1.Reservation) error {
			came <- w // each machine has one STATE to tell
			return nil
		})
	}
	machine, err := s.src.Save()
	if err != nil {
		return fmt.Errorf("save the guest's state: %w", err)
	}
	late := time.NewTimer(s.opts.Deadlines.Ready)
	defer late.Stop()
	s.came = map[int]*vmmv1.Reservation{}
	for len(s.came) < len(s.take.luns) {
		select {
		case w := <-came:
			s.came[int(w.Lun)] = w
		case r := <-s.take.reports:
			s.take.take(r)
			return fmt.Errorf("LUN %s: the disk does not say what the guest has", r.lun.lun.ID)
		case <-late.C:
			return errors.New("the disks did not say in time what the guest has")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := s.message(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_State{State: &vmmv1.FinalState{Machine: machine, LastRound: 1}}}); err != nil {
		return err
	}
	for i := range luns {
		if w := s.came[i]; w != nil {
			if err := s.message(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Reservation{Reservation: w}}); err != nil {
				return err
			}
		}
	}
	return nil
}

// noLedger is for a source that will not be asked to give anything up.
type noLedger struct{}

func (noLedger) Note(bool) error { return errors.New("a snapshot notes nothing") }
func (noLedger) Erase() error    { return nil }

// commit makes the file the guest's.
func (s *saving) commit() error {
	how := uint(unix.RENAME_NOREPLACE)
	if s.opts.Force {
		how = 0
	}
	err := unix.Renameat2(unix.AT_FDCWD, s.name, unix.AT_FDCWD, s.path, how)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // a file system that cannot tell
		if err = s.vacant(); err == nil {
			err = os.Rename(s.name, s.path)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%s is there by now; --force replaces it", s.path)
	}
	if err != nil {
		return fmt.Errorf("rename: %w", err)
	}
	s.name = s.path
	if err := sys.SyncDir(filepath.Dir(s.path)); err != nil {
		return err
	}
	if err := setMark(s.file, markComplete); err != nil {
		// The mark may be on the medium all the same.
		if left := s.discard(); left != nil {
			return fmt.Errorf("%w: %s may have the guest (%w), and could not be removed (%w): remove it before the guest is started anew",
				ErrBlocked, s.path, err, left)
		}
		return fmt.Errorf("mark %s as complete: %w", s.path, err)
	}
	return nil
}

// discard removes the file.
func (s *saving) discard() error {
	if s.name == "" {
		return nil
	}
	err := os.Remove(s.name)
	if err == nil {
		err = sys.SyncDir(filepath.Dir(s.name))
	}
	if err == nil {
		s.name = ""
	}
	return err
}

// rollBack lets the guest run on; cause is why.
func (s *saving) rollBack(cause error) error {
	if err := s.discard(); err != nil {
		cause = fmt.Errorf("%w (%s stays, unfinished: %w)", cause, s.name, err)
	}
	if s.take != nil {
		s.take.change(func(x *lunTakeover) { x.task.Machine.(*pr.Source).Lost() })
		for !s.take.finished() {
			s.take.take(<-s.take.reports)
		}
		s.take.close()
		if s.take.blocked() {
			return fmt.Errorf("%w: %s (%w)", ErrBlocked, s.take.failure(), cause)
		}
		s.take.settled()
	}
	if s.paused {
		if err := s.src.Resume(); err != nil {
			return fmt.Errorf("%w: resume: %w (%w)", ErrBlocked, err, cause)
		}
	}
	return fmt.Errorf("%w: %w", ErrKept, cause)
}

// outcomes says what was saved of the reservations.
func (s *saving) outcomes() (list []LUNOutcome) {
	for i, l := range s.src.LUNs() {
		w := s.came[i]
		if w == nil {
			continue
		}
		o := LUNOutcome{ID: l.ID}
		switch {
		case w.Fenced:
			o.Sentence = l.ID + ": another node has fenced the guest; it will run without a registration."
		case w.Key == 0:
			o.Sentence = l.ID + ": the guest has no registration."
		case !l.Preflight.FullStatus:
			o.Sentence = fmt.Sprintf("%s: the guest's key %v stays registered for it; the target has no READ FULL STATUS, so on another host it counts as fenced.", l.ID, pr.Key(w.Key))
		default:
			o.Sentence = fmt.Sprintf("%s: the guest's key %v stays registered for it.", l.ID, pr.Key(w.Key))
		}
		list = append(list, o)
	}
	return list
}

// setMark writes a snapshot's mark, lastingly.
func setMark(f *os.File, mark byte) error {
	if _, err := f.WriteAt([]byte{mark}, markAt); err != nil {
		return err
	}
	return f.Sync()
}

// snapshotWriter is the sink of a snapshot: it gathers small pieces, and sums
// up everything.
type snapshotWriter struct {
	*bufio.Writer
	sum     uint32
	written uint64 // bytes, of the file
}

func newSnapshotWriter(f *os.File) *snapshotWriter {
	return &snapshotWriter{Writer: bufio.NewWriterSize(f, 256<<10), written: preambleLen}
}

func (w *snapshotWriter) Write(b []byte) (int, error) {
	n, err := w.Writer.Write(b)
	w.sum = crc32.Update(w.sum, castagnoli, b[:n])
	w.written += uint64(n)
	return n, err
}

// A file is not waited for.
func (w *snapshotWriter) SetWriteDeadline(time.Time) error { return nil }
func (w *snapshotWriter) Close() error                     { return nil }

// snapshotReader reads what a snapshotWriter wrote.
type snapshotReader struct {
	ctx context.Context
	r   *bufio.Reader
	sum uint32
}

func (r *snapshotReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.r.Read(b)
	r.sum = crc32.Update(r.sum, castagnoli, b[:n])
	return n, err
}

// openSnapshot opens a snapshot for one machine, and says how it is marked.
func openSnapshot(path string) (f *os.File, id ID, mark byte, err error) {
	fail := func(err error) (*os.File, ID, byte, error) {
		if f != nil {
			f.Close()
		}
		return nil, ID{}, 0, fmt.Errorf("snapshot %s: %w", path, err)
	}
	// It must not wait where path is no regular file.
	f, err = os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
			return fail(fmt.Errorf("%w: it must be writable, to be marked as used", bare(err)))
		}
		return fail(bare(err))
	}
	if info, err := f.Stat(); err != nil {
		return fail(err)
	} else if !info.Mode().IsRegular() {
		return fail(errors.New("it is no regular file"))
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fail(fmt.Errorf("another process is running it (flock: %w)", err))
	}
	var b [preambleLen]byte
	if n, err := io.ReadFull(f, b[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%d bytes are no snapshot", n)
		}
		return fail(err)
	}
	if string(b[:8]) != magic || role(b[8]) != roleSnapshot || slices.Max(b[10:16]) != 0 {
		return fail(errors.New("this is no snapshot, or one of another version"))
	}
	mark, id = b[markAt], ID(b[16:])
	switch {
	case mark == markUnfinished:
		return fail(errors.New("it is unfinished: vmm save was interrupted, and what became of the guest then has nothing to do with this file; remove it"))
	case mark > markUsed:
		return fail(fmt.Errorf("it has the mark %d, which this version does not know", mark))
	}
	return f, id, mark, nil
}

// bare is an error without the path that the caller names.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
