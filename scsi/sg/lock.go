package sg

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/scsi"
)

// ErrBusy is in the chain of Open's error where the logical unit is in use.
var ErrBusy = errors.New("in use")

// hold is what keeps everybody else on this host off a logical unit: a locked
// file, by which VMs tell each other who they are, and the block node opened
// exclusively, which file systems, md, dm and swap respect. (A reservation
// cannot do it: to the target, all that comes by one nexus is one.)
//
// Both the lock and the claim belong to the open file description (flock(2),
// open(2)), which a process can hand to another one through a unix socket. Then
// both hold the unit, and it is free when the last of them has closed it: so a
// guest can change its process without a moment at which anybody else gets it.
type hold struct {
	lock   *os.File
	claim  *os.File // nil where there is no block node
	shared bool     // with the process that has handed it over
}

// Handed is how a process lets another one of its host hold a logical unit
// beside it.
type Handed struct {
	// BootID and Address, as its String has it, are of the nexus by which that
	// process has the unit: at any other the files are of no use.
	BootID, Address string
	Files           []*os.File // those of its LUN.Held; they stay whose they are
}

// at says that n is the nexus by which the other process has the unit.
func (h *Handed) at(n Nexus) bool {
	return h != nil && len(h.Files) > 0 && h.BootID == n.BootID && h.Address == n.Address.String()
}

// MaxHeld is the most files that LUN.Held returns.
const MaxHeld = 2

// take holds dv, which is id, for the VM called vm. The lock comes first: its
// failure can name the VM that has the unit, the block node's cannot.
func (h host) take(dv *device, id *scsi.Identity, runDir, vm string) (*hold, error) {
	lock, err := acquire(runDir, lockName(id, dv.address), vm)
	if err != nil {
		return nil, err
	}
	claim, err := h.claim(dv)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &hold{lock: lock, claim: claim}, nil
}

// share holds dv, which is id, beside the process that has handed its files
// over. That process is not trusted: the lock must be the one that take would
// have taken, and locked by that very file or by nobody; and its claim counts
// only where the block node is claimed, so that there is none of our own to be
// had.
func (h host) share(dv *device, id *scsi.Identity, runDir string, files []*os.File) (*hold, error) {
	most := 1
	if dv.block != nil {
		most = MaxHeld
	}
	if len(files) > most {
		return nil, fmt.Errorf("the process that has it hands over %d files where %d keep others off", len(files), most)
	}
	lock, err := inherit(runDir, lockName(id, dv.address), files[0])
	if err != nil {
		return nil, err
	}
	claim, err := h.claim(dv)
	if errors.Is(err, ErrBusy) && len(files) == most {
		claim, err = inheritNode(files[1], dv.block)
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &hold{lock, claim, true}, nil
}

// inherit is a file of ours for the lock of that name in dir, which another
// process has handed over locked.
func inherit(dir, name string, handed *os.File) (*os.File, error) {
	path := filepath.Join(dir, name)
	want, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if got, err := handed.Stat(); err != nil || !os.SameFile(got, want) {
		return nil, fmt.Errorf("the process that has it hands over something else than its lock %s: use one VMM_RUN_DIR for both", path)
	}
	// Nothing happens to a lock that this open file has already. One that
	// another has is not ours to share.
	if err := flock(handed); err == unix.EWOULDBLOCK {
		return nil, fmt.Errorf("%w by %s, which is not the process that hands it over", ErrBusy, holder(handed))
	} else if err != nil {
		return nil, fmt.Errorf("flock %s: %w", path, err)
	}
	return sys.Duplicate(handed)
}

// inheritNode is a file of ours for a block node that another process has
// claimed.
func inheritNode(handed *os.File, n *node) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(handed.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", n.path, err)
	}
	if got := (devno{unix.Major(st.Rdev), unix.Minor(st.Rdev)}); st.Mode&unix.S_IFMT != unix.S_IFBLK || got != n.dev {
		return nil, fmt.Errorf("the process that has it hands over something else than %s, device %s", n.path, n.dev)
	}
	return sys.Duplicate(handed)
}

// lockName is the file name of a lock: readable as far as possible, and
// different for different locks. A lock is one logical unit on one I_T nexus.
// The LUN number is left out where the unit has a name: under two numbers of
// one target it is still one nexus to its reservations.
func lockName(id *scsi.Identity, a Address) string {
	key := a.String()
	if d, ok := id.Name(); ok {
		key = fmt.Sprintf("%s@%d:%d:%d", d, a.Host, a.Channel, a.Target)
	}
	safe := strings.Map(func(r rune) rune {
		switch {
		case r >= '0' && r <= '9', r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r == '.', r == '-', r == '@', r == ':':
			return r
		}
		return '_'
	}, key)
	sum := sha256.Sum256([]byte(key))
	return fmt.Sprintf("lun-%.100s-%x.lock", safe, sum[:4])
}

// acquire takes the lock in dir for the VM called vm. The file stays behind
// unlocked when the process ends: removing it would let two hold it.
func acquire(dir, name, vm string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := flock(f); err != nil {
		defer f.Close()
		if err != unix.EWOULDBLOCK {
			return nil, fmt.Errorf("flock %s: %w", f.Name(), err)
		}
		return nil, fmt.Errorf("%w by %s", ErrBusy, holder(f))
	}
	if err := sign(f, vm); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sign writes into a lock file whose it is. Whoever reads it meanwhile finds
// two words all the time. The offset of the file may be another process's, too.
func sign(f *os.File, vm string) error {
	text := fmt.Sprintf("%d %s\n", os.Getpid(), vm)
	_, err := f.WriteAt([]byte(text), 0)
	if err == nil {
		err = f.Truncate(int64(len(text)))
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EINTR {
			return err
		}
	}
}

// holder names who wrote into the lock file.
func holder(f *os.File) string {
	b, _ := io.ReadAll(io.NewSectionReader(f, 0, 512))
	var pid int
	var vm string
	if n, _ := fmt.Sscan(string(b), &pid, &vm); n < 2 {
		return "another VM that is just starting"
	}
	if pid == os.Getpid() {
		return fmt.Sprintf("this VM, %s, already: the same LUN is given twice", vm)
	}
	return fmt.Sprintf("VM %s (pid %d)", vm, pid)
}

// claim opens dv's block node for us alone; nil if there is none. Read access
// is enough to claim it, and a node that was never open for writing does not
// make udev read the disk when it is closed.
func (h host) claim(dv *device) (*os.File, error) {
	if dv.block == nil {
		return nil, nil
	}
	fd, err := dv.block.open(unix.O_RDONLY | unix.O_EXCL)
	if errors.Is(err, unix.EBUSY) {
		by := h.uses(dv)
		if by == "" {
			by = fmt.Sprintf("another program has %s or a partition of it open exclusively (fuser -v %[1]s may name it)", dv.block.path)
		}
		return nil, fmt.Errorf("%w: %s", ErrBusy, by)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), dv.block.path), nil
}

// Close gives the logical unit free, as far as it is this process's. It is
// called once.
func (h *hold) Close() error {
	var err error
	if h.claim != nil {
		err = h.claim.Close()
	}
	return errors.Join(err, h.lock.Close())
}

// Held are the files that keep everybody else off the logical unit, for
// another process that is to have it for the same guest, by this very nexus
// (Handed). They are l's; there are MaxHeld at most.
func (l *LUN) Held() []*os.File {
	held := []*os.File{l.hold.lock}
	if l.hold.claim != nil {
		held = append(held, l.hold.claim)
	}
	return held
}

// Shared says that the process which handed the logical unit over has it too,
// as far as is known. Until its guest has stopped, whoever sends more than
// INQUIRY by this nexus may take a unit attention away from the guest.
func (l *LUN) Shared() bool { return l.hold.shared }

// Possess makes a logical unit that was handed over the VM's that is called
// vm, for who finds it in use from now on.
func (l *LUN) Possess(vm string) error {
	l.hold.shared = false
	return sign(l.hold.lock, vm)
}
