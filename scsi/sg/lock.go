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

	"vmm/scsi"
)

// ErrBusy is in the chain of Open's error where the logical unit is in use.
var ErrBusy = errors.New("in use")

// hold is what keeps everybody else on this host off a logical unit: a locked
// file, by which VMs tell each other who they are, and the block node opened
// exclusively, which file systems, md, dm and swap respect. (A reservation
// cannot do it: to the target, all that comes by one nexus is one.)
type hold struct {
	lock  *os.File
	claim int // -1 where there is no block node
}

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
	return &hold{lock, claim}, nil
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
	if err = f.Truncate(0); err == nil {
		_, err = fmt.Fprintf(f, "%d %s\n", os.Getpid(), vm)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
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
	b, _ := io.ReadAll(io.LimitReader(f, 512))
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

// claim opens dv's block node for us alone; -1 if there is none. Read access
// is enough to claim it, and a node that was never open for writing does not
// make udev read the disk when it is closed.
func (h host) claim(dv *device) (int, error) {
	if dv.block == nil {
		return -1, nil
	}
	fd, err := dv.block.open(unix.O_RDONLY | unix.O_EXCL)
	if errors.Is(err, unix.EBUSY) {
		by := h.uses(dv)
		if by == "" {
			by = fmt.Sprintf("another program has %s or a partition of it open exclusively (fuser -v %[1]s may name it)", dv.block.path)
		}
		return -1, fmt.Errorf("%w: %s", ErrBusy, by)
	}
	return fd, err
}

// Close gives the logical unit free. It is called once.
func (h *hold) Close() error {
	var err error
	if h.claim >= 0 {
		err = unix.Close(h.claim)
	}
	return errors.Join(err, h.lock.Close())
}
