package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/disk"
	"vmm/scsi/pr"
	"vmm/scsi/sg"
)

// unit is what path names, so that two paths of one logical unit compare
// equal: /dev/sg2 and /dev/sdb, or two links to one image.
func unit(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	kind := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		kind = "char"
	case unix.S_IFBLK:
		kind = "block"
	case unix.S_IFREG:
		return fmt.Sprintf("file %d:%d", st.Dev, st.Ino), nil
	default:
		return "", fmt.Errorf("%s: neither a device nor a regular file: give a /dev/sgN, a SCSI block device or a disk image", path)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if dir, err := filepath.EvalSymlinks(filepath.Join("/sys/dev", kind, number, "device")); err == nil {
		return dir, nil // of the logical unit, the same for all its nodes
	}
	return kind + " " + number, nil
}

// User finds the running machine that has the logical unit at path, and what
// it calls it; nil if none has. The client is the caller's to close.
func (d RunDir) User(ctx context.Context, path string) (c *Client, id string, err error) {
	want, err := unit(path)
	if err != nil {
		return nil, "", err
	}
	running, err := d.List()
	if err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, userTime)
	defer cancel()
	ids := make([]string, len(running))
	var asked sync.WaitGroup
	for i, r := range running {
		asked.Go(func() {
			c := d.client(r.Name)
			defer c.Close()
			s, err := c.Status(ctx, connect.NewRequest(&vmmv1.StatusRequest{}))
			if err != nil {
				return // if it has the unit nevertheless, the unit is found locked
			}
			for _, l := range s.Msg.Luns {
				if u, err := unit(l.Path); err == nil && u == want {
					ids[i] = l.Id
				}
			}
		})
	}
	asked.Wait()
	for i, r := range running {
		if ids[i] != "" {
			c, err := d.Dial(r.Name)
			return c, ids[i], err
		}
	}
	return nil, "", nil
}

// userTime is the time that the machines have to say which disks are theirs.
const userTime = 2 * time.Second

// Disk is a logical unit that no machine has, opened by a command.
type Disk struct {
	lun  scsi.LUN
	port pr.Port
	Name string // the best name that it gives itself
}

// OpenDisk takes possession of the logical unit at path, as a machine does,
// for the command called who. initiator names the nexus of a disk image; a
// device's is this host's. It fails while a machine or the host uses the
// unit.
func (d RunDir) OpenDisk(ctx context.Context, path, initiator, who string) (*Disk, error) {
	u, err := unit(path)
	if err != nil {
		return nil, err
	}
	x := &Disk{}
	if strings.HasPrefix(u, "file ") {
		var l *disk.LUN
		if l, err = disk.Open(path, disk.Options{Initiator: initiator}); err == nil {
			x.lun = l
		}
	} else {
		var l *sg.LUN
		if l, err = sg.Open(path, sg.Options{VM: who, RunDir: string(d)}); err == nil {
			x.lun = l
		}
	}
	if err != nil {
		return nil, err
	}
	id, err := scsi.ReadIdentity(ctx, x.lun)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), x.lun.Close())
	}
	x.Name = id.String()
	x.port = pr.Port{Sender: &pr.LUN{LUN: x.lun}}
	return x, nil
}

// Close gives the logical unit free.
func (x *Disk) Close() error { return x.lun.Close() }

// Port is what reservation commands go through.
func (x *Disk) Port() *pr.Port { return &x.port }

// Show reads the reservations of a logical unit that no machine has, and
// which registration is this host's.
func (d RunDir) Show(ctx context.Context, path string) (*vmmv1.Lun, error) {
	u, err := unit(path)
	if err != nil {
		return nil, err
	}
	l := &vmmv1.Lun{Path: path, Kind: "passthrough"}
	if strings.HasPrefix(u, "file ") {
		l.Kind = "disk"
		l.Reservations, err = showImage(path)
		return l, err
	}
	x, err := d.OpenDisk(ctx, path, "", "pr show")
	if err != nil {
		return nil, err
	}
	defer x.Close()
	l.Identity = x.Name
	v, err := x.port.View(ctx)
	if pr.Unsupported(err) {
		l.Reservations = &vmmv1.Reservations{}
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	own, unknown := -1, false
	if len(v.Registrations) > 0 {
		registered, err := x.port.Registered(ctx, v)
		switch {
		case err == nil && registered && len(v.Registrations) == 1:
			own = 0
		case err != nil || registered:
			unknown = true
		}
	}
	l.Reservations = ReservationsMessage(v, own, unknown)
	return l, nil
}

// showImage reads what is kept beside a disk image. No nexus is needed, and
// the image may be in use.
func showImage(path string) (*vmmv1.Reservations, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	t, err := pr.ReadState(real + ".pr")
	if err != nil {
		return nil, err
	}
	m := ReservationsMessage(t.View(), -1, false)
	if host, err := os.Hostname(); err == nil {
		for _, r := range m.Registrants {
			// The nexus of a machine of this host, by its default name, or the
			// host's own.
			_, name, _ := strings.Cut(r.Initiator, ".vmm:")
			r.Own = name == host || strings.HasPrefix(name, host+":")
		}
	}
	return m, nil
}

// Settled is what became of one entry of the journal.
type Settled struct {
	LUN     string // its identity
	Path    string
	Done    bool   // the entry is gone
	InUse   bool   // a guest has the unit: it may be its migration that the entry is of
	Outcome string // a sentence for the operator
}

// Recover settles what a crash has left in the journal of directory state:
// registrations of guests that run elsewhere now. An entry whose logical unit
// is not found, is in use or does not answer stays, and says why.
func (d RunDir) Recover(ctx context.Context, state string) ([]Settled, error) {
	if _, err := os.Stat(state); errors.Is(err, os.ErrNotExist) {
		return nil, nil // no guest has ever begun to move from or to this host
	}
	journal, err := pr.OpenJournal(state)
	if err != nil {
		return nil, err
	}
	entries, err := journal.Entries()
	var settled []Settled
	for _, e := range entries { // one by one: looking for one unit opens others
		settled = append(settled, d.settle(ctx, journal, e))
	}
	return settled, err
}

func (d RunDir) settle(ctx context.Context, journal *pr.Journal, e pr.Entry) Settled {
	s := Settled{LUN: e.LUN, Path: e.Path}
	x, path, err := d.locate(ctx, e)
	if err != nil {
		s.Outcome = fmt.Sprintf("%s: not settled: %v", e.LUN, err)
		s.InUse = errors.Is(err, sg.ErrBusy) || errors.Is(err, disk.ErrInUse)
		return s
	}
	defer x.Close()
	s.Path = path
	r := pr.NewRecovery(&e.Pair, e.Key, e.Handed)
	x.port.Run(ctx, &r, journal.For(e), nil)
	o := r.Outcome()
	s.Done = o.Kind == pr.NothingHeld
	s.Outcome = recovered(o, e, path)
	return s
}

// recovered says how the recovery of e ended, and what the operator can do.
func recovered(o pr.Outcome, e pr.Entry, path string) string {
	switch {
	case o.Kind == pr.NothingHeld:
		return fmt.Sprintf("%s: this host is not registered with key %v any more", e.LUN, e.Key)
	case o.Reason != pr.NoReason:
		return fmt.Sprintf("%s: not settled: %v", e.LUN, o.Reason)
	case e.Handed:
		return fmt.Sprintf("%s: key %v stays registered on this host, for it may be the only registration that the guest has; "+
			"where the guest runs on another host and is registered there (vmm pr show %s), vmm pr unregister %[3]s --key %[2]v removes it", e.LUN, e.Key, path)
	case o.Type != pr.None:
		return fmt.Sprintf("%s: key %v stays registered on this host, for the disk's %v reservation rests on it; "+
			"let the guest's cluster software reserve again, or end it with vmm pr unregister %s --key %[2]v --release", e.LUN, e.Key, o.Type, path)
	}
	return fmt.Sprintf("%s: key %v stays registered on this host", e.LUN, e.Key)
}

// locate opens the logical unit that e is about: by its path, if that is
// still it, else by its identity among all of this host's.
func (d RunDir) locate(ctx context.Context, e pr.Entry) (*Disk, string, error) {
	paths := []string{e.Path}
	all, _ := filepath.Glob("/dev/sg[0-9]*")
	var errs []error
	for _, path := range append(paths, all...) {
		x, err := d.OpenDisk(ctx, path, initiatorOf(e), "pr recover")
		if err != nil {
			if path == e.Path {
				errs = append(errs, err)
			}
			continue
		}
		if x.Name == e.LUN {
			return x, path, nil
		}
		x.Close()
		if path == e.Path {
			errs = append(errs, fmt.Errorf("%s is %s now", path, x.Name))
		}
	}
	return nil, "", errors.Join(errs...)
}

// initiatorOf is the name of this host's nexus in e, for a disk image.
func initiatorOf(e pr.Entry) string {
	name, _ := strings.CutPrefix(e.Pair.Old.Initiator.String(), "iscsi ")
	if e.Pair.Old.Initiator == "" {
		return ""
	}
	return name
}

// StateDir is $VMM_STATE_DIR, else /var/lib/vmm for root, else vmm in the
// user's XDG state directory: where the journal is.
func StateDir() (string, error) {
	if dir := os.Getenv("VMM_STATE_DIR"); dir != "" {
		return dir, nil
	}
	if os.Geteuid() == 0 {
		return "/var/lib/vmm", nil
	}
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "vmm"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("directory for the journal: %w; set VMM_STATE_DIR", err)
	}
	return filepath.Join(home, ".local/state/vmm"), nil
}
