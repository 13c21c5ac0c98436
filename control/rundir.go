package control

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// A running machine has two files in the run directory:
//
//	NAME.pid    locked with flock(2) as long as its process lives, holding the
//	            process's id
//	NAME.sock   where it serves its control API
//
// A process that waits for the guest called NAME has NAME.incoming.pid and
// NAME.incoming.sock instead. It takes NAME beside them when a guest begins to
// arrive, and gives them up when it runs; until then NAME is its promise alone.
//
// A guest that moves to another process of this host under its name takes the
// name along: the lock is an open file's, so its process hands that over and
// from then on both have it (Share, Inherit). When the guest runs in the new
// process that one puts its own id and socket in the place of the old ones
// (Take), and the old process leaves them where they are. Nobody else can have
// the name at any moment of it.
//
// Whoever makes, judges or removes either has the directory's own lock, for
// no longer than that takes. So a name that is locked belongs to a live
// process, and nobody takes a machine that just begins for a dead one.

// RunDir is a run directory: that of the locks and sockets of this user's
// machines.
type RunDir string

// DefaultRunDir is $VMM_RUN_DIR, else /run/vmm for root, else
// $XDG_RUNTIME_DIR/vmm. The directory is made if it is not there.
func DefaultRunDir() (RunDir, error) {
	dir := os.Getenv("VMM_RUN_DIR")
	switch base := os.Getenv("XDG_RUNTIME_DIR"); {
	case dir != "":
	case os.Geteuid() == 0:
		dir = "/run/vmm"
	case base != "":
		dir = filepath.Join(base, "vmm")
	default:
		return "", errors.New("XDG_RUNTIME_DIR is not set: log in as this user, or set it to a directory that only this user can write to")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("directory for locks and sockets: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", fmt.Errorf("directory for locks and sockets: %s: %w", dir, err)
	}
	// Whoever else can write there can put a socket of his own in a
	// machine's place.
	if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return "", fmt.Errorf("directory for locks and sockets: %s belongs to user %d, mode %04o: it must be this user's, and writable for nobody else (chmod 700 %[1]s)", dir, st.Uid, st.Mode&0o7777)
	}
	return RunDir(dir), nil
}

// ValidName says why name cannot be a machine's; nil if it can. Names are fit
// for file names and command lines.
func ValidName(name string) error {
	ok := name != "" && len(name) <= 64 && !strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	}) && name[0] != '.' && name[0] != '-'
	if !ok {
		return fmt.Errorf("guest name %q: give 1 to 64 letters, digits, '-', '_' or '.', not starting with '-' or '.'", name)
	}
	if strings.HasSuffix(name, incoming) {
		return fmt.Errorf("guest name %q: names that end in %s are those of guests on their way here", name, incoming)
	}
	return nil
}

// incoming ends the name under which a machine is reached that waits for its
// guest to arrive.
const incoming = ".incoming"

func (d RunDir) pidFile(name string) string { return filepath.Join(string(d), name+".pid") }

// Socket is where the machine called name is reached.
func (d RunDir) Socket(name string) string { return filepath.Join(string(d), name+".sock") }

// nextSocket becomes Socket when the guest's next process takes the name. Its
// path is not the longer one.
func (d RunDir) nextSocket(name string) string { return filepath.Join(string(d), name+".next") }

// Log is where the machine called name, in the background, tells what its user
// should know. It stays when the machine has ended.
func (d RunDir) Log(name string) string { return filepath.Join(string(d), name+".log") }

// locked calls f with the directory's lock.
func (d RunDir) locked(f func() error) error {
	lock, err := os.OpenFile(filepath.Join(string(d), "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	defer lock.Close()
	if err := flock(lock, unix.LOCK_EX); err != nil {
		return fmt.Errorf("run directory: flock %s: %w", lock.Name(), err)
	}
	return f()
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

// holder opens name's pid file and says who has it locked: 0 if nobody has,
// and then the lock is the caller's until it closes the file.
func (d RunDir) holder(name string) (f *os.File, pid int, err error) {
	f, err = os.OpenFile(d.pidFile(name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("run directory: %w", err)
	}
	err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, 0, nil
	}
	defer f.Close()
	if err != unix.EWOULDBLOCK {
		return nil, 0, fmt.Errorf("run directory: flock %s: %w", f.Name(), err)
	}
	b, _ := io.ReadAll(io.LimitReader(f, 32))
	pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid < 1 {
		pid = -1 // locked, by someone who did not write it
	}
	return nil, pid, nil
}

// ErrRunning is in the chain of Claim's error where the name is taken.
var ErrRunning = errors.New("runs already")

// Claim is a machine's name in its run directory, with the socket that it is
// reached at.
type Claim struct {
	dir      RunDir
	name     string
	listener *net.UnixListener

	mu     sync.Mutex
	pid    *os.File // nil once it is closed
	fresh  bool     // inherited and not taken: its files are the other process's
	shared bool     // so they may be from now on
}

// Claim takes name for this process and listens on its socket. What a dead
// process has left of that name is removed. A name under which another process
// waits for a guest is taken too.
func (d RunDir) Claim(name string) (*Claim, error) { return d.claim(name, name, name+incoming) }

// Await takes, for this process, the name under which it is reached while it
// waits for the guest called name. beside says that the guest may be one that
// runs here under that name: as long as it does, name reaches its process.
func (d RunDir) Await(name string, beside bool) (*Claim, error) {
	other := name
	if beside {
		other = ""
	}
	return d.claim(name, name+incoming, other)
}

// Inherit shares name with the process of this host where the guest of that
// name runs, whose Share has handed lock over. Nobody notices before Take. lock
// is not trusted, and stays whose it is.
func (d RunDir) Inherit(name string, lock *os.File) (*Claim, error) {
	if err := ValidName(name); err != nil {
		return nil, err
	}
	c := &Claim{dir: d, name: name, fresh: true}
	err := d.locked(func() error {
		if pid, err := d.judge(name + incoming); err != nil {
			return err
		} else if pid != 0 && pid != os.Getpid() {
			return taken(name, ErrAwaited, pid)
		}
		want, err := os.Stat(d.pidFile(name))
		if err != nil {
			return fmt.Errorf("run directory: %w", err)
		}
		if got, err := lock.Stat(); err != nil || !os.SameFile(got, want) {
			return fmt.Errorf("guest %s: what its process hands over is not its lock %s: use one VMM_RUN_DIR for both", name, d.pidFile(name))
		}
		// Nothing happens to a lock that this open file has already.
		if err := flock(lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return fmt.Errorf("guest %s: the process that hands its name over does not have it: flock %s: %w", name, d.pidFile(name), err)
		}
		if c.pid, err = sys.Duplicate(lock); err != nil {
			return err
		}
		return c.listen(d.nextSocket(name))
	})
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// taken says who has a guest's name, or waits for the guest.
func taken(guest string, how error, pid int) error {
	who := fmt.Sprintf("pid %d", pid)
	if pid < 0 {
		who = "another process"
	}
	return fmt.Errorf("guest %s %w (%s): give this one another name, or stop that one (vmm stop %[1]s)", guest, how, who)
}

// claim takes the name own, unless another process has that or other: the two
// names of one guest, running and waited for.
func (d RunDir) claim(guest, own, other string) (*Claim, error) {
	if err := ValidName(guest); err != nil {
		return nil, err
	}
	c := &Claim{dir: d, name: own}
	how := func(name string) error {
		if name != guest {
			return ErrAwaited
		}
		return ErrRunning
	}
	err := d.locked(func() error {
		if other != "" {
			if pid, err := d.judge(other); err != nil {
				return err
			} else if pid != 0 && pid != os.Getpid() {
				return taken(guest, how(other), pid)
			}
		}
		f, pid, err := d.holder(own)
		switch {
		case err != nil:
			return err
		case pid != 0:
			return taken(guest, how(own), pid)
		}
		c.pid = f
		if err := c.sign(); err != nil {
			return err
		}
		return c.listen(d.Socket(own))
	})
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// sign writes this process's id into the locked file. The caller has the
// directory's lock. The file's offset may be another process's, too.
func (c *Claim) sign() error {
	err := c.pid.Truncate(0)
	if err == nil {
		_, err = c.pid.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	return nil
}

// listen makes the socket at path. The caller has the directory's lock.
func (c *Claim) listen(path string) (err error) {
	if len(path) > maxSocketPath {
		return fmt.Errorf("control socket %s: its path has %d bytes, a unix socket's at most %d: give the guest a shorter name, or set VMM_RUN_DIR to a shorter directory", path, len(path), maxSocketPath)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("control socket: %w", err)
	}
	c.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	c.listener.SetUnlinkOnClose(false) // Close does, with the lock
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// Share is the lock on the name, for another process of this host that is to
// run the guest under it (Inherit). From then on Close leaves the files to that
// process, until Keep.
func (c *Claim) Share() *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shared = true
	return c.pid
}

// Keep says that no other process has the name after all.
func (c *Claim) Keep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shared = false
}

// Take makes a name that was inherited this process's alone: from here on this
// one is reached by it. Of any other claim it changes nothing.
func (c *Claim) Take() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.fresh || c.pid == nil {
		return nil
	}
	return c.dir.locked(func() error {
		if err := c.sign(); err != nil {
			return err
		}
		c.fresh = false
		// In one step: at every moment somebody answers.
		if err := os.Rename(c.dir.nextSocket(c.name), c.dir.Socket(c.name)); err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		return nil
	})
}

// Name is what was claimed.
func (c *Claim) Name() string { return c.name }

// Dir is where it was claimed.
func (c *Claim) Dir() RunDir { return c.dir }

// maxSocketPath is the longest path of a unix socket, in bytes (unix(7)).
const maxSocketPath = 107

// Close gives the name and the socket up. A second Close does nothing.
func (c *Claim) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pid == nil {
		return nil
	}
	if c.listener != nil {
		c.listener.Close() // closed already, if it was served
	}
	err := c.dir.locked(func() error {
		switch {
		case c.fresh:
			// The guest may have ended meanwhile, and its files be gone, or those
			// of another one.
			mine, err := c.pid.Stat()
			if err != nil {
				return err
			}
			if now, err := os.Stat(c.dir.pidFile(c.name)); err != nil || !os.SameFile(mine, now) {
				return nil
			}
			return os.Remove(c.dir.nextSocket(c.name))
		case c.shared:
			return nil // whoever else has the name removes them, or finds them dead
		}
		return c.dir.remove(c.name)
	})
	err = errors.Join(err, c.pid.Close())
	c.pid = nil
	return err
}

// remove removes a machine's files. The caller has both locks.
func (d RunDir) remove(name string) error {
	var errs []error
	for _, path := range []string{d.Socket(name), d.nextSocket(name), d.pidFile(name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Running is a machine that runs, or is waited for.
type Running struct {
	Name    string
	Pid     int  // -1 if it cannot be told
	Awaited bool // it has not come yet: the process waits for it
}

// List is every machine that runs or is waited for, by name. What dead ones
// have left is removed.
func (d RunDir) List() ([]Running, error) {
	var list []Running
	err := d.locked(func() error {
		entries, err := os.ReadDir(string(d))
		if err != nil {
			return fmt.Errorf("run directory: %w", err)
		}
		for _, e := range entries {
			name, ok := strings.CutSuffix(e.Name(), ".pid")
			if !ok {
				continue
			}
			pid, err := d.judge(name)
			if err != nil {
				return err
			}
			if pid != 0 {
				name, awaited := strings.CutSuffix(name, incoming)
				list = append(list, Running{name, pid, awaited})
			}
		}
		return nil
	})
	slices.SortFunc(list, func(a, b Running) int {
		if a.Awaited != b.Awaited && a.Name == b.Name { // of one process, which waits
			return map[bool]int{true: -1, false: 1}[a.Awaited]
		}
		return strings.Compare(a.Name, b.Name)
	})
	return slices.CompactFunc(list, func(a, b Running) bool { return a.Name == b.Name && a.Pid == b.Pid }), err
}

// judge is the pid of the live process that has name, else 0, with what it
// left removed. The caller has the directory's lock.
func (d RunDir) judge(name string) (int, error) {
	f, pid, err := d.holder(name)
	if err != nil || pid != 0 {
		return pid, err
	}
	defer f.Close()
	return 0, d.remove(name)
}

// find is the pid of the process that has name; 0 if none has.
func (d RunDir) find(name string) (pid int, err error) {
	err = d.locked(func() (err error) {
		pid, err = d.judge(name)
		return err
	})
	return pid, err
}

// reach is the name under which the guest called name is reached, or the
// process that waits for it, and that process; pid is 0 if there is none. Where
// one runs the guest and another waits to be its next, it is the one that runs
// it: the other has nothing to say yet.
func (d RunDir) reach(name string) (reached string, pid int, err error) {
	err = d.locked(func() error {
		awaits, err := d.judge(name + incoming)
		if err != nil {
			return err
		}
		if pid, err = d.judge(name); err != nil {
			return err
		}
		reached = name
		if awaits != 0 && (pid == 0 || pid == awaits) {
			reached, pid = name+incoming, awaits
		}
		return nil
	})
	return reached, pid, err
}
