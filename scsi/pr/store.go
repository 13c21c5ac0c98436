package pr

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/scsi"
)

// File keeps the reservations of a disk image beside it, shared by every
// process that opens the image: each is one I_T nexus of one logical unit,
// told apart by its name. IMAGE.pr has the state, IMAGE.pr.lock is what the
// processes lock, and memory that they share.
//
// # Changes
//
// A change is written to a new file, synced, renamed over the old one, and
// the directory synced, all before the command is answered. So a crash at any
// point leaves the state before the command or after it. The content carries
// its checksum: a file that does not fit it is an error, not an empty state.
//
// The logical unit never loses power: what APTPL zero would lose is kept.
//
// # Commands by the locks
//
// A command holds the state lock shared while it runs; one that may change the
// state holds it alone. So a write that the old reservation allowed is over
// before the PREEMPT (AND ABORT) that ends it is answered, in whatever process
// it runs, and none starts before the new state is in force. Commands of one
// process share one lock, counted; a second lock, the gate, is passed by
// everybody on the way in, and held by who wants the state alone, so that a
// stream of commands cannot keep a PERSISTENT RESERVE OUT waiting.
//
// # Commands by the quick way
//
// Where the processes share memory (lockFile.mappable), a command needs no lock
// while nobody changes anything, whether or not there are reservations. It
// goes by a ruling: what the state with one sequence number means for this
// nexus. Going in, it
//
//  1. counts itself in its process's seat (busy),
//  2. loads the sequence number, and that the ruling is still the one it has.
//
// If the number is the ruling's the command runs; when it is over it counts
// itself out. Whoever changes the state, having the state lock alone,
//
//  1. makes the sequence number odd, which is no ruling's,
//  2. waits until busy is zero in every seat,
//  3. changes the state, and makes the number even: the old one if nothing
//     changed, one that never was before otherwise.
//
// Each side writes, then reads what the other writes, all sequentially
// consistent: so either the command sees the odd number and goes by the locks
// instead, or the other sees it counted and waits. No command can slip through
// between, and one that goes in after step 3 has a ruling on the new state.
//
// To wait in step 2 without polling, for a process that may be killed: while a
// process has a ruling in force it holds the lease, a lock of its seat. Who
// counts its last command out and then finds the number odd gives the lease
// up, and waiting for a busy seat is waiting for its lease, which the death of
// the process ends, too. This misses nobody: a command counted in step 2 is
// counted out after the number was made odd. A process that gave its lease up
// has no ruling from then on, and gets both back with its next command, by the
// locks. Idle processes take no part in any of this.
//
// All methods may be called concurrently, except that Close comes last.
type File struct {
	path  string // of the state
	self  Nexus
	locks *lockFile
	seat  int

	nonce  nonce
	others []nonce // of those who sat when f sat down

	// The locks are this open file's, not a goroutine's: door is held by who
	// has the gate, and mu by who has the state lock. A command that runs
	// needs only mu to end, and nobody waits with mu held for one that does:
	// not for its own process's (idle gives mu up), and not for others' while
	// its own run (that waiting is at the gate, without mu). Commands that went
	// the quick way do not even need mu.
	door    sync.Mutex
	mu      sync.Mutex
	idle    sync.Cond // running is 0
	running int       // commands that went by the locks and are not over

	known  bool   // target is the state that had the number seq
	seq    uint64 // see above
	target *Target
	opened uint64 // the sequence number that begin found

	number *atomic.Uint64 // the sequence number; nil where there is no quick way
	busy   *atomic.Uint32 // commands that went the quick way and are not over
	ruling atomic.Pointer[ruling]
	lease  struct {
		mu     sync.Mutex // held for no wait
		ceded  sync.Cond  // busy may be zero
		leased bool
	}
}

// ruling is what the state means for this nexus.
type ruling struct {
	seq       uint64
	allowed   [classes]bool
	attention bool // a unit attention is pending
	alone     bool // nobody else has the image open
}

// sample has a command of each class.
var sample = [classes][]byte{
	classWrite:    {scsi.OpWrite6, 0, 0, 0, 0, 0},
	classRead:     {scsi.OpRead6, 0, 0, 0, 0, 0},
	classCapacity: {scsi.OpReadCapacity10, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	classState:    {scsi.OpTestUnitReady, 0, 0, 0, 0, 0},
	classFree:     {scsi.OpInquiry, 0, 0, 0, 0, 0},
}

const classes = int(classFree) + 1

// maxState bounds the state file, bytes.
const maxState = 1 << 20

// nexusPrefix makes an iSCSI name of any other name (RFC 7143, 4.2.7.4).
const nexusPrefix = "iqn.2026-01.invalid.vmm:"

// NamedNexus is the I_T nexus of who goes by name, a few words or an iSCSI
// name of its own. The same name is the same nexus.
func NamedNexus(name string) (Nexus, error) {
	iscsi := name
	if !strings.HasPrefix(name, "iqn.") && !strings.HasPrefix(name, "eui.") && !strings.HasPrefix(name, "naa.") {
		iscsi = nexusPrefix + name
	}
	id, err := ISCSI(iscsi, "")
	if name == "" || err != nil {
		return Nexus{}, fmt.Errorf("initiator name %q: want 1 to %d bytes without a zero byte", name, maxISCSIName-len(nexusPrefix))
	}
	return Nexus{Initiator: id, TargetPort: 1}, nil
}

// Open opens the reservations of the disk image at path for nexus self. It
// fails with *HeldError if somebody else has them open for self.
func Open(image string, self Nexus) (f *File, err error) {
	f = &File{path: image + ".pr", self: self, seat: -1}
	f.idle.L, f.lease.ceded.L = &f.mu, &f.lease.mu
	defer func() {
		if err != nil {
			err = fmt.Errorf("reservations of %s: %w", image, err)
		}
	}()
	if f.locks, err = openLockFile(f.path + ".lock"); err != nil {
		return nil, err
	}
	if err = f.sitDown(); err != nil {
		f.locks.close()
		return nil, err
	}
	return f, nil
}

// sitDown takes a seat, and makes the nexus known.
func (f *File) sitDown() error {
	if err := f.begin(); err != nil {
		return err
	}
	seats, err := f.seated()
	if err != nil {
		return errors.Join(err, f.end(false))
	}
	free := -1
	for i := range seats {
		switch {
		case seats[i].pid == 0 && free < 0:
			free = i
		case seats[i].pid != 0 && seats[i].id == f.self.Initiator:
			return errors.Join(&HeldError{f.self.Initiator, int(seats[i].pid), seats[i].host}, f.end(false))
		}
	}
	if free < 0 {
		return errors.Join(fmt.Errorf("%d processes have the image open, which is all that can", maxSeats), f.end(false))
	}
	host, _ := os.Hostname() // empty if unknown
	rand.Read(f.nonce[:nonceInode])
	var st unix.Stat_t
	if err := unix.Stat(strings.TrimSuffix(f.path, ".pr"), &st); err == nil { // else there is no image yet
		binary.LittleEndian.PutUint64(f.nonce[nonceInode:], st.Ino)
	}
	if err := f.locks.take(free, seat{uint32(os.Getpid()), f.self.Initiator, host, f.nonce}); err != nil {
		return errors.Join(err, f.end(false))
	}
	f.seat = free
	for _, s := range seats {
		if s.pid != 0 {
			f.others = append(f.others, s.nonce)
		}
	}
	if f.busy = f.locks.busy(free); f.busy != nil {
		f.number = word64(f.locks.mem.Bytes(), 0)
	}
	err = f.apply(func(t *Target) error {
		t.forget(func(n Nexus) bool {
			return slices.ContainsFunc(seats[:], func(s seat) bool { return s.pid != 0 && s.id == n.Initiator })
		})
		if i := t.port(f.self); i >= maxPorts {
			return fmt.Errorf("%d nexuses are registered, which is all that can", maxPorts)
		}
		t.LoseNexus(f.self)
		return nil
	})
	// The number goes up in any case: nobody else is alone any more.
	return errors.Join(err, f.end(true))
}

// seated is who sits where; the seats of the dead are empty. The caller has
// the state lock.
func (f *File) seated() (seats [maxSeats]seat, err error) {
	if err := f.locks.readSeats(&seats); err != nil {
		return seats, err
	}
	for i := range seats {
		if seats[i].pid != 0 && i != f.seat && !f.locks.taken(lifeLock(i)) {
			seats[i] = seat{}
		}
	}
	return seats, nil
}

// gone says that nobody has the image open for n. The caller has the state
// lock.
func (f *File) gone(n Nexus) (bool, error) {
	seats, err := f.seated()
	return !slices.ContainsFunc(seats[:], func(s seat) bool { return s.pid != 0 && s.id == n.Initiator }), err
}

// Seated says whether somebody has the image open for n.
func (f *File) Seated(n Nexus) (bool, error) {
	if err := f.begin(); err != nil {
		return false, err
	}
	gone, err := f.gone(n)
	return !gone, errors.Join(err, f.end(false))
}

// forget drops the nexuses about which there is nothing to know, other than
// those to keep: the names of those who once had the image open would fill the
// state.
func (t *Target) forget(keep func(Nexus) bool) {
	ports, holder, spc2 := t.ports, t.holder, t.spc2
	t.ports = nil
	for i, p := range ports {
		if p.key == 0 && i != holder && i != spc2 && !keep(p.Nexus) {
			continue
		}
		if i == holder {
			t.holder = len(t.ports)
		}
		if i == spc2 {
			t.spc2 = len(t.ports)
		}
		t.ports = append(t.ports, p)
	}
}

// Close ends this process's part. Its registration stays, as the loss of a
// nexus leaves it; an SPC-2 reservation ends.
func (f *File) Close() error { return f.locks.close() }

// Nexus is the nexus that the file was opened for.
func (f *File) Nexus() Nexus { return f.self }

// Nonce is what only those know who have had this very file open, and no copy
// of it, while f was: see Met.
func (f *File) Nonce() []byte { return f.nonce[:] }

// Met says whether somebody whose Nonce this is had the file open when f was
// opened.
func (f *File) Met(n []byte) bool {
	// Another file may have been put in the image's place since then.
	if len(n) != len(nonce{}) || !bytes.Equal(n[nonceInode:], f.nonce[nonceInode:]) {
		return false
	}
	return slices.ContainsFunc(f.others, func(o nonce) bool { return bytes.Equal(o[:], n) })
}

// Pass is how a command came in.
type Pass uint8

const (
	passNone  Pass = iota // it did not
	passQuick             // counted in its seat
	passLocks             // by the locks
	passAlone             // having the state lock alone
)

// TryEnter is Enter for who must not wait: ok says that pass and a are what
// Enter would answer. It takes no lock, and does not allocate.
func (f *File) TryEnter(cdb []byte, alone bool) (pass Pass, a Answer, ok bool) {
	r := f.ruling.Load()
	if r == nil || f.number.Load() != r.seq {
		return passNone, a, false
	}
	f.busy.Add(1)
	if f.number.Load() != r.seq || f.ruling.Load() != r {
		f.countOut()
		return passNone, a, false
	}
	c := classify(cdb)
	switch {
	case r.attention && c != classFree, alone && !r.alone:
		f.countOut()
		return passNone, a, false
	case !r.allowed[c]:
		f.countOut()
		return passNone, conflict, true
	}
	return passQuick, good, true
}

// countOut ends a command that has counted itself in its seat.
func (f *File) countOut() {
	if f.busy.Add(^uint32(0)) == 0 && f.number.Load()&1 != 0 {
		f.cede()
	}
}

// cede gives up the lease for who waits for it.
func (f *File) cede() {
	f.lease.mu.Lock()
	defer f.lease.mu.Unlock()
	// From here on nobody gets in with the ruling: who has, is seen in busy,
	// and counts itself out later than this.
	f.ruling.Store(nil)
	if f.busy.Load() != 0 {
		return
	}
	if f.lease.leased {
		f.lease.leased = false
		f.locks.unlock(leaseLock(f.seat))
	}
	f.lease.ceded.Broadcast()
}

// rule makes the ruling on the state as it is. The caller has mu and the state
// lock; the sequence number is seq and even.
func (f *File) rule(seats *[maxSeats]seat) {
	i := f.target.port(f.self)
	if f.target.spc2 >= 0 && f.target.spc2 != i {
		return // by the locks, where its holder's death is noticed
	}
	r := &ruling{seq: f.seq, attention: f.target.ports[i].pending[0] != scsi.Sense{}, alone: true}
	for c := range r.allowed {
		r.allowed[c] = !f.target.conflicts(i, sample[c])
	}
	for j := range seats {
		r.alone = r.alone && (seats[j].pid == 0 || j == f.seat)
	}
	f.lease.mu.Lock()
	defer f.lease.mu.Unlock()
	// It is free: who waits for it has the state lock alone.
	if !f.lease.leased && !f.locks.tryOwn(leaseLock(f.seat)) {
		return
	}
	f.lease.leased = true
	f.ruling.Store(r)
}

// Enter asks whether a command may run: GOOD means that it may, and that Exit
// must follow when it is over; any other answer is the command's own. It does
// for every command but PERSISTENT RESERVE IN and OUT, RESERVE and RELEASE,
// which go to Execute. With alone, no command of another nexus runs before
// Exit. Enter waits while the state is being changed, and a command without
// alone does not allocate unless it has changed.
func (f *File) Enter(cdb []byte, alone bool) (Pass, Answer, error) {
	if pass, a, ok := f.TryEnter(cdb, alone); ok {
		return pass, a, nil
	}
	if alone {
		return f.enterAlone(cdb)
	}
	// Through the gate: whoever waits for the state alone goes first.
	f.door.Lock()
	err := f.locks.share(gateLock)
	if err == nil {
		f.locks.unlock(gateLock)
	}
	f.door.Unlock()
	if err != nil {
		return passNone, Answer{}, err
	}
	f.mu.Lock()
	if err := f.share(); err != nil {
		f.unshare()
		f.mu.Unlock()
		return passNone, Answer{}, err
	}
	a, attention, dead := f.judge(cdb)
	if dead || attention || !a.OK() {
		f.unshare()
	}
	f.mu.Unlock()
	switch {
	case dead: // any change lets go of it
		if err := f.change(func(*Target) error { return nil }); err != nil {
			return passNone, Answer{}, err
		}
		return f.Enter(cdb, alone)
	case attention: // answering it changes the state
		return f.attention(cdb, alone)
	case !a.OK():
		return passNone, a, nil
	}
	return passLocks, a, nil
}

// judge is what the state says about a command: a unit attention is pending,
// or the answer, or that it conflicts with an SPC-2 reservation whose holder
// is gone. The caller has mu and the state lock.
func (f *File) judge(cdb []byte) (a Answer, attention, dead bool) {
	t := f.target
	i := t.port(f.self)
	if t.ports[i].pending[0] != (scsi.Sense{}) && classify(cdb) != classFree {
		return a, true, false
	}
	if !t.conflicts(i, cdb) {
		return good, false, false
	}
	if t.spc2 >= 0 {
		gone, err := f.gone(t.ports[t.spc2].Nexus)
		dead = gone && err == nil
	}
	return conflict, false, dead
}

func (f *File) enterAlone(cdb []byte) (Pass, Answer, error) {
	if err := f.begin(); err != nil {
		return passNone, Answer{}, err
	}
	if err := f.apply(func(*Target) error { return nil }); err != nil {
		return passNone, Answer{}, errors.Join(err, f.end(false))
	}
	a, attention, _ := f.judge(cdb)
	if !attention && a.OK() {
		return passAlone, a, nil
	}
	if err := f.end(false); err != nil {
		return passNone, Answer{}, err
	}
	if attention {
		return f.attention(cdb, true)
	}
	return passNone, a, nil
}

// attention answers a command with the oldest unit attention, if there still
// is one.
func (f *File) attention(cdb []byte, alone bool) (Pass, Answer, error) {
	s, err := f.TakeAttention()
	switch {
	case err != nil:
		return passNone, Answer{}, err
	case s == scsi.Sense{}:
		return f.Enter(cdb, alone)
	}
	return passNone, check(s), nil
}

// Exit ends a command that Enter or TryEnter has let in.
func (f *File) Exit(p Pass) error {
	switch p {
	case passQuick:
		f.countOut()
	case passLocks:
		f.mu.Lock()
		f.unshare()
		f.mu.Unlock()
	case passAlone:
		return f.end(false)
	}
	return nil
}

// Quiet says, without waiting, that no unit attention is pending for this
// nexus; false may also mean that TakeAttention has to find out.
func (f *File) Quiet() bool {
	r := f.ruling.Load()
	return r != nil && !r.attention && f.number.Load() == r.seq
}

// TakeAttention ends and returns the oldest unit attention pending for this
// nexus; the zero value is none.
func (f *File) TakeAttention() (s scsi.Sense, err error) {
	err = f.change(func(t *Target) error {
		s, _ = t.ports[t.port(f.self)].take()
		return nil
	})
	return s, err
}

// share counts a command, and for the first one locks the state shared, reads
// it if it has changed, and sees to it that there is a ruling. The caller has
// mu.
func (f *File) share() error {
	f.running++
	if f.running > 1 {
		return nil
	}
	if err := f.locks.share(stateLock); err != nil {
		return err
	}
	seq, err := f.locks.seq()
	if err != nil {
		return err
	}
	if err := f.refresh(seq); err != nil {
		return err
	}
	// An odd number is what a process has left that died with the state lock:
	// the next change makes it even.
	if r := f.ruling.Load(); f.busy != nil && seq&1 == 0 && (r == nil || r.seq != seq) {
		seats, err := f.seated()
		if err != nil {
			return err
		}
		f.rule(&seats)
	}
	return nil
}

func (f *File) unshare() {
	if f.running--; f.running == 0 {
		f.locks.unlock(stateLock)
		f.idle.Broadcast()
	}
}

// Execute carries out PERSISTENT RESERVE IN or OUT, RESERVE or RELEASE; data
// is what a PERSISTENT RESERVE IN transfers. When it answers, every command
// that any process ran under the state before is over.
func (f *File) Execute(cdb, list []byte) (data []byte, a Answer, err error) {
	err = f.change(func(t *Target) error {
		data, a = t.Execute(f.self, cdb, list)
		return nil
	})
	return data, a, err
}

// Attention makes a unit attention pending for every other nexus (a changed
// capacity, for one) or, with self, for this one.
func (f *File) Attention(s scsi.Sense, self bool) error {
	return f.change(func(t *Target) error {
		for i := range t.ports {
			if (t.ports[i].Nexus == f.self) == self {
				t.ports[i].attention(s)
			}
		}
		return nil
	})
}

// DeviceReset is BUS DEVICE RESET FUNCTION OCCURRED, the unit attention of a
// LOGICAL UNIT RESET.
var DeviceReset = scsi.Sense{Key: scsi.UnitAttention, ASC: 0x29, ASCQ: 0x03}

// Reset is a LOGICAL UNIT RESET (SAM-5 6.3.3) through this nexus: SPC-2
// reservations end (SPC-2 5.5.1), registrations and persistent reservations
// stay, and every other nexus is told. This one's caller tells it. When Reset
// answers, every command that any process ran is over.
func (f *File) Reset() error {
	return f.change(func(t *Target) error {
		t.spc2 = -1
		for i := range t.ports {
			if t.ports[i].Nexus != f.self {
				t.ports[i].attention(DeviceReset)
			}
		}
		return nil
	})
}

// Target is a copy of the state as it is now.
func (f *File) Target() (t *Target, err error) {
	err = f.change(func(now *Target) error {
		t = now.Clone()
		return nil
	})
	return t, err
}

// change runs fn with the state to itself, and makes lasting what fn changed.
func (f *File) change(fn func(*Target) error) error {
	if err := f.begin(); err != nil {
		return err
	}
	err := f.apply(fn)
	return errors.Join(err, f.end(false))
}

// begin waits for every command to end and lets none in, in any process, until
// end. If it fails, end must not follow.
func (f *File) begin() (err error) {
	f.door.Lock()
	if err := f.locks.own(gateLock); err != nil {
		f.door.Unlock()
		return err
	}
	f.mu.Lock()
	for f.running > 0 { // our own, which share our lock
		f.idle.Wait()
	}
	defer func() {
		if err != nil {
			f.leave()
		}
	}()
	if err := f.locks.own(stateLock); err != nil {
		return err
	}
	if f.opened, err = f.locks.seq(); err != nil {
		return err
	}
	// Odd, and other than what a process may have left that died here: the
	// state may be another than when somebody last saw that number.
	odd := f.opened + 1 + f.opened&1
	if err := f.locks.setSeq(odd); err != nil {
		return err
	}
	if f.locks.mem == nil {
		return nil
	}
	for i := range maxSeats {
		busy := f.locks.busy(i)
		switch {
		case busy.Load() == 0:
		case i == f.seat:
			f.lease.mu.Lock()
			for busy.Load() != 0 {
				f.lease.ceded.Wait()
			}
			f.lease.mu.Unlock()
		default:
			if err := f.locks.share(leaseLock(i)); err != nil {
				return err
			}
			f.locks.unlock(leaseLock(i))
			if !f.locks.taken(lifeLock(i)) {
				busy.Store(0) // who sat there was killed, and its commands are over
			}
		}
	}
	return nil
}

// apply runs fn on the state and writes it if that changed it. It stands
// between begin and end.
func (f *File) apply(fn func(*Target) error) error {
	if err := f.refresh(f.opened); err != nil {
		return err
	}
	before := f.target.Clone()
	if s := f.target.spc2; s >= 0 && f.target.ports[s].Nexus != f.self {
		gone, err := f.gone(f.target.ports[s].Nexus)
		if err != nil {
			return err
		}
		if gone {
			f.target.LoseNexus(f.target.ports[s].Nexus)
		}
	}
	if err := fn(f.target); err != nil {
		f.target = before
		return err
	}
	if before.equal(f.target) {
		return nil
	}
	// Whoever is next reads, unless all went well.
	f.known = false
	if err := sys.ReplaceFile(f.path, f.target.encode(), 0o666); err != nil {
		f.target = before // whether the rename lasts is not known
		return fmt.Errorf("reservations %s: %w", f.path, err)
	}
	f.known, f.seq = true, f.opened|1 // end gives it its number
	return nil
}

// end lets commands in again. The sequence number is the old one if the state
// is, unless it has to go up.
func (f *File) end(up bool) error {
	seq := f.opened
	if up || seq&1 != 0 || !f.known || f.seq != seq {
		seq += 2 + seq&1 // above what begin made of it
	}
	err := f.locks.setSeq(seq)
	if err != nil {
		f.known = false
	}
	f.seq = seq
	if f.known && f.busy != nil {
		if r := f.ruling.Load(); r == nil || r.seq != seq {
			if seats, err := f.seated(); err == nil {
				f.rule(&seats)
			}
		}
	}
	f.leave()
	return err
}

// leave gives back what begin has.
func (f *File) leave() {
	f.locks.unlock(stateLock)
	f.mu.Unlock()
	f.locks.unlock(gateLock)
	f.door.Unlock()
}

func (t *Target) equal(o *Target) bool {
	if t.gen != o.gen || t.typ != o.typ || t.holder != o.holder || t.persist != o.persist || t.spc2 != o.spc2 || len(t.ports) != len(o.ports) {
		return false
	}
	for i := range t.ports {
		if t.ports[i] != o.ports[i] {
			return false
		}
	}
	return true
}

// refresh reads the state unless what is known of it has the number seq.
func (f *File) refresh(seq uint64) error {
	if f.known && f.seq == seq {
		return nil
	}
	f.known = false
	t, err := ReadState(f.path)
	if err != nil {
		return err
	}
	f.target, f.seq, f.known = t, seq, true
	return nil
}
