package pr

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"vmm/scsi"
)

// File keeps the reservations of a disk image beside it, shared by every
// process that opens the image: each is one I_T nexus of one logical unit,
// told apart by its name. IMAGE.pr has the state, IMAGE.pr.lock and
// IMAGE.pr.gate are what the processes lock.
//
// A change is written to a new file, synced, renamed over the old one, and
// the directory synced, all before the command is answered. So a crash at any
// point leaves the state before the command or after it. The content carries
// its checksum: a file that does not fit it is an error, not an empty state.
//
// The locks. A command that moves data holds the state shared while it runs,
// one that may change the state holds it alone: so a write that the old
// reservation allowed is over before a PREEMPT is answered. Data commands of
// one process share one flock, counted; a second flock, the gate, is passed by
// everybody on the way in, and held by who wants the state alone, so that a
// stream of data commands cannot keep a PERSISTENT RESERVE OUT waiting.
//
// The logical unit never loses power: what APTPL zero would lose is kept.
//
// All methods may be called concurrently, except that Close comes last.
type File struct {
	path string // of the state
	self Nexus

	// A flock belongs to an open file, not to a goroutine: door is held by
	// who uses gate, and mu by who uses lock. A command that runs needs only
	// mu to end, and nobody waits with mu held for a command to end: not for
	// its own process's (idle gives mu up), and not for others' while its own
	// run (that waiting is at the gate, without mu).
	door sync.Mutex
	gate *os.File
	mu   sync.Mutex
	idle sync.Cond // running is 0
	lock *os.File

	running int // data commands between Enter and Exit

	seq    uint64 // the lock file's sequence number that target was read at
	target *Target
}

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

// Open opens the reservations of the disk image at path for nexus self. An
// SPC-2 reservation that self had is over, as after the loss of any nexus; so
// that of a process that died lasts until its name is opened again, or a Reset.
func Open(image string, self Nexus) (*File, error) {
	f := &File{path: image + ".pr", self: self, target: NewTarget(Quirks{})}
	f.idle.L = &f.mu
	var err error
	if f.gate, err = os.OpenFile(f.path+".gate", os.O_RDWR|os.O_CREATE, 0o666); err != nil {
		return nil, fmt.Errorf("reservations of %s: %w", image, err)
	}
	if f.lock, err = os.OpenFile(f.path+".lock", os.O_RDWR|os.O_CREATE, 0o666); err != nil {
		f.gate.Close()
		return nil, fmt.Errorf("reservations of %s: %w", image, err)
	}
	err = f.change(func(t *Target) error {
		t.port(self)
		t.LoseNexus(self)
		return nil
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Close ends this process's part. Its registration stays, as the loss of a
// nexus leaves it.
func (f *File) Close() error {
	return errors.Join(f.lock.Close(), f.gate.Close())
}

// Nexus is the nexus that the file was opened for.
func (f *File) Nexus() Nexus { return f.self }

func flock(file *os.File, how int) error {
	for {
		err := syscall.Flock(int(file.Fd()), how)
		if err != syscall.EINTR {
			if err != nil {
				err = fmt.Errorf("flock %s: %w", file.Name(), err)
			}
			return err
		}
	}
}

// Enter asks whether a command may run: GOOD means that it may, and that Exit
// must follow when it is over; any other answer is the command's own. It does
// for every command but PERSISTENT RESERVE IN and OUT, RESERVE and RELEASE,
// which go to Execute. It does not allocate.
func (f *File) Enter(cdb []byte) (Answer, error) {
	// Through the gate: whoever waits for the state alone goes first.
	f.door.Lock()
	err := flock(f.gate, syscall.LOCK_SH)
	if err == nil {
		err = flock(f.gate, syscall.LOCK_UN)
	}
	f.door.Unlock()
	if err != nil {
		return Answer{}, err
	}
	f.mu.Lock()
	if err := f.share(); err != nil {
		f.unshare()
		f.mu.Unlock()
		return Answer{}, err
	}
	a := good
	i := f.target.port(f.self)
	attention := f.target.ports[i].pending[0] != scsi.Sense{} && classify(cdb) != classFree
	if !attention && f.target.conflicts(i, cdb) {
		a = conflict
	}
	if attention || !a.OK() {
		f.unshare()
	}
	f.mu.Unlock()
	if attention { // answering it changes the state
		return f.attention(cdb)
	}
	return a, nil
}

// attention answers a command with the oldest unit attention, if there still
// is one.
func (f *File) attention(cdb []byte) (Answer, error) {
	var s scsi.Sense
	err := f.change(func(t *Target) error {
		s, _ = t.ports[t.port(f.self)].take()
		return nil
	})
	if err != nil {
		return Answer{}, err
	}
	if s == (scsi.Sense{}) {
		return f.Enter(cdb)
	}
	return check(s), nil
}

// Exit ends a command that Enter has let in.
func (f *File) Exit() {
	f.mu.Lock()
	f.unshare()
	f.mu.Unlock()
}

// share counts a data command, and for the first one locks the state shared
// and reads it if it has changed. The caller holds mu.
func (f *File) share() error {
	f.running++
	if f.running > 1 {
		return nil
	}
	if err := flock(f.lock, syscall.LOCK_SH); err != nil {
		return err
	}
	return f.refresh()
}

func (f *File) unshare() {
	if f.running--; f.running == 0 {
		flock(f.lock, syscall.LOCK_UN) // what can fail here is an invalid descriptor
		f.idle.Broadcast()
	}
}

// Execute carries out PERSISTENT RESERVE IN or OUT, RESERVE or RELEASE; data
// is what a PERSISTENT RESERVE IN transfers.
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

// Reset is a LOGICAL UNIT RESET: SPC-2 reservations end, and every nexus is
// told.
func (f *File) Reset() error {
	return f.change(func(t *Target) error {
		t.spc2 = -1
		for i := range t.ports {
			t.ports[i].attention(scsi.PowerOnOccurred)
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
func (f *File) change(fn func(*Target) error) (err error) {
	f.door.Lock()
	defer f.door.Unlock()
	if err := flock(f.gate, syscall.LOCK_EX); err != nil {
		return err
	}
	defer flock(f.gate, syscall.LOCK_UN)
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.running > 0 { // our own, which share our lock
		f.idle.Wait()
	}
	if err := flock(f.lock, syscall.LOCK_EX); err != nil {
		return err
	}
	defer flock(f.lock, syscall.LOCK_UN)
	if err := f.refresh(); err != nil {
		return err
	}
	before := f.target.Clone()
	if err := fn(f.target); err != nil {
		return err
	}
	if before.equal(f.target) {
		return nil
	}
	if err := f.write(); err != nil {
		f.target = before
		// Whether the rename lasts is not known: whoever is next reads.
		f.seq = ^uint64(0)
		return fmt.Errorf("reservations %s: %w", f.path, err)
	}
	return nil
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

// refresh reads the state if another process has written it since. The lock
// file's eight bytes are a sequence number that goes up before each change,
// so a stale number means "read again", never "believe".
func (f *File) refresh() error {
	var b [8]byte
	if _, err := f.lock.ReadAt(b[:], 0); err != nil && err != io.EOF {
		return fmt.Errorf("reservations: %w", err)
	}
	seq := binary.LittleEndian.Uint64(b[:]) + 1 // 0 is "nothing was read yet"
	if seq == f.seq {
		return nil
	}
	t, err := ReadState(f.path)
	if err != nil {
		return err
	}
	f.target, f.seq = t, seq
	return nil
}

// write makes f.target the state, with both locks held exclusively.
func (f *File) write() error {
	var b [8]byte
	if _, err := f.lock.ReadAt(b[:], 0); err != nil && err != io.EOF {
		return err
	}
	seq := binary.LittleEndian.Uint64(b[:]) + 1
	binary.LittleEndian.PutUint64(b[:], seq)
	if _, err := f.lock.WriteAt(b[:], 0); err != nil {
		return err
	}
	if err := replace(f.path, f.target.encode()); err != nil {
		return err
	}
	f.seq = seq + 1
	return nil
}

// replace puts content in the place of the file at path, at once and
// lastingly. The name of the new file is always the same: who writes holds a
// lock, and what a crash left behind is overwritten.
func replace(path string, content []byte) error {
	temp := path + ".new"
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err == nil {
		err = file.Sync()
	}
	if e := file.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if e := d.Close(); err == nil {
		err = e
	}
	return err
}

// The state file is a line "vmm reservations 1 SHA256-OF-THE-REST", then JSON.
const stateMagic = "vmm reservations 1 "

// savedTarget is the state as it is stored.
type savedTarget struct {
	Generation uint32
	Type       Type
	Holder     int // index into Nexuses; -1
	Persist    bool
	SPC2       int // index into Nexuses; -1
	Nexuses    []savedPort
}

type savedPort struct {
	Name           string `json:",omitempty"` // for who reads the file; not read back
	TransportID    string // hexadecimal
	TargetPort     uint16
	Key            Key          `json:",omitempty"`
	AllTargetPorts bool         `json:",omitempty"`
	Pending        []scsi.Sense `json:",omitempty"`
}

// sealed puts the line with the checksum before body.
func sealed(magic string, body []byte) []byte {
	sum := sha256.Sum256(body)
	return append([]byte(magic+hex.EncodeToString(sum[:])+"\n"), body...)
}

// unseal checks and takes off that line.
func unseal(magic string, b []byte) ([]byte, error) {
	line, body, ok := bytes.Cut(b, []byte("\n"))
	sum := sha256.Sum256(body)
	switch {
	case !ok || !bytes.HasPrefix(line, []byte(magic)):
		return nil, fmt.Errorf("it does not begin with %q", magic)
	case string(line[len(magic):]) != hex.EncodeToString(sum[:]):
		return nil, errors.New("its checksum is wrong")
	}
	return body, nil
}

func (t *Target) encode() []byte {
	s := savedTarget{Generation: t.gen, Type: t.typ, Holder: t.holder, Persist: t.persist, SPC2: t.spc2}
	for _, p := range t.ports {
		q := savedPort{
			Name: p.Initiator.String(), TransportID: hex.EncodeToString([]byte(p.Initiator)), TargetPort: p.TargetPort,
			Key: p.key, AllTargetPorts: p.allPorts,
		}
		for _, a := range p.pending {
			if a != (scsi.Sense{}) {
				q.Pending = append(q.Pending, a)
			}
		}
		s.Nexuses = append(s.Nexuses, q)
	}
	body, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		panic(err) // integers and strings only
	}
	return sealed(stateMagic, append(body, '\n'))
}

// ReadState reads a state file. One that does not exist is a logical unit
// that nobody has registered with; one that is damaged is an error.
func ReadState(path string) (*Target, error) {
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return NewTarget(Quirks{}), nil
	}
	if err != nil {
		return nil, fmt.Errorf("reservations: %w", err)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxState+1))
	if err != nil {
		return nil, fmt.Errorf("reservations: %w", err)
	}
	t, err := decodeState(b)
	if err != nil {
		return nil, fmt.Errorf("reservations %s are damaged: %w; with every user of the image stopped, remove the file: "+
			"then nobody is registered, so let the cluster software register again before anything writes", path, err)
	}
	return t, nil
}

// decodeState reads what encode has written, and nothing else.
func decodeState(b []byte) (*Target, error) {
	if len(b) > maxState {
		return nil, fmt.Errorf("it is larger than %d bytes", maxState)
	}
	body, err := unseal(stateMagic, b)
	if err != nil {
		return nil, err
	}
	var s savedTarget
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return nil, err
	}
	t := &Target{gen: s.Generation, typ: s.Type, holder: s.Holder, persist: s.Persist, spc2: s.SPC2}
	if len(s.Nexuses) > maxPorts || s.SPC2 < -1 || s.SPC2 >= len(s.Nexuses) || s.Holder < -1 || s.Holder >= len(s.Nexuses) {
		return nil, errors.New("it names a nexus that it does not have")
	}
	for _, q := range s.Nexuses {
		raw, err := hex.DecodeString(q.TransportID)
		if err != nil {
			return nil, err
		}
		id, rest, err := ParseTransportID(raw)
		if err != nil || len(rest) != 0 {
			return nil, fmt.Errorf("TransportID %s: %w", q.TransportID, err)
		}
		p := port{Nexus: Nexus{id, q.TargetPort}, key: q.Key, allPorts: q.AllTargetPorts}
		if len(q.Pending) > len(p.pending) {
			return nil, errors.New("too many unit attentions")
		}
		copy(p.pending[:], q.Pending)
		t.ports = append(t.ports, p)
	}
	if t.typ != None && (!t.typ.Valid() || t.holder < 0 || t.ports[t.holder].key == 0) || t.typ == None && t.holder >= 0 {
		return nil, errors.New("its reservation has no registered holder")
	}
	return t, nil
}
