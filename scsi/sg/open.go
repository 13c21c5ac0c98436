package sg

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// Options are what Open needs beside the path.
type Options struct {
	VM     string // the VM's name, for the next one that wants the LUN
	RunDir string // where the lock files are; one for all VMs

	// Timeout is how long the kernel waits for each command before it aborts
	// it and begins error recovery; 0 is DefaultTimeout. It is rounded up to
	// milliseconds, and the kernel takes less than 7 s on a block node for 7.
	Timeout time.Duration

	// Handed, if not nil, is from a process that has the unit for the same
	// guest. It is used if path leads to that process's own nexus.
	Handed *Handed
}

// DefaultTimeout is that of Linux's disk driver.
const DefaultTimeout = 30 * time.Second

// Open takes possession of the logical unit behind path: a /dev/sgN or a whole
// SCSI disk, or a symbolic link to one. Its error is one line that names path,
// what is wrong and what to do; ErrBusy is in the chain where somebody else
// has the LUN.
//
// It sends INQUIRY only: nothing that another host's reservation stops, and
// nothing that takes a unit attention away from the guest.
func Open(path string, o Options) (*LUN, error) {
	l, err := host("/").open(path, o)
	if err != nil {
		return nil, fmt.Errorf("LUN %s: %w", path, err)
	}
	return l, nil
}

func (h host) open(path string, o Options) (*LUN, error) {
	timeout := o.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	if timeout < 0 || timeout > math.MaxInt32*time.Millisecond {
		return nil, fmt.Errorf("timeout of %v: give more than 0 and less than 24 days", timeout)
	}
	dv, err := h.lookup(path)
	if err != nil {
		return nil, err
	}
	l := &LUN{
		node:    path,
		timeout: uint32((timeout + time.Millisecond - 1) / time.Millisecond),
		nexus:   Nexus{Address: dv.address},
		fd:      -1,
	}
	if err := l.open(h, dv); err != nil {
		l.release()
		return nil, err
	}
	// From here on there are workers, which Close ends.
	if err := l.own(h, dv, o); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// lookup finds the SCSI device that path names.
func (h host) lookup(path string) (*device, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		if err == unix.ENOENT && strings.HasPrefix(filepath.Base(path), "sg") {
			if _, err := os.Stat(h.file("sys/class/scsi_generic")); err != nil {
				return nil, fmt.Errorf("%w: load the kernel module sg (modprobe sg)", unix.ENOENT)
			}
		}
		return nil, fmt.Errorf("%w: lsscsi -g lists this host's", err)
	}
	d := devno{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		return h.find(false, d)
	case unix.S_IFBLK:
		return h.find(true, d)
	}
	return nil, errors.New("not a device: give a /dev/sgN or a SCSI disk")
}

// open chooses the way that commands take, learns its limits and starts the
// first worker.
func (l *LUN) open(h host, dv *device) error {
	var err error
	if l.nexus.BootID, err = h.bootID(); err != nil {
		return err
	}
	if l.slots, err = newSlots(maxWorkers); err != nil {
		return err
	}
	var hwBytes, segments, blockSize uint64
	if dv.block != nil {
		if hwBytes, segments, blockSize, err = dv.queue(); err != nil {
			return err
		}
		if l.fd, err = dv.block.open(unix.O_RDONLY); err != nil {
			return err
		}
		slot := l.slots.at(0)
		slot.prepare()
		if mayPassAnything(l.fd, slot) {
			l.via, l.maxPages = dv.block.path, int(min(segments, math.MaxInt32))
			l.newRoute = func() (route, error) { return blockRoute{l.fd}, nil }
		} else {
			unix.Close(l.fd)
			l.fd = -1
		}
	}
	if l.fd < 0 {
		if dv.sg == nil {
			return fmt.Errorf("without CAP_SYS_RAWIO and a disk driver commands go through a /dev/sgN, and %s has none: load the kernel module sg (modprobe sg)", dv.address)
		}
		// O_NONBLOCK: an open that waits would wait for error recovery, and in
		// sgRoute it is we who wait.
		const flags = unix.O_RDWR | unix.O_NONBLOCK
		if l.fd, err = dv.sg.open(flags); err != nil {
			if errors.Is(err, unix.EBUSY) {
				err = fmt.Errorf("%w: another program has %s open exclusively", ErrBusy, dv.sg.path)
			}
			return err
		}
		l.via, l.maxPages = dv.sg.path, math.MaxInt32
		l.newRoute = func() (route, error) {
			fd, err := dv.sg.open(flags)
			return sgRoute{fd}, err
		}
		if dv.block == nil {
			b, e1 := ioctlInt(l.fd, ioctlSectGet)
			n, e2 := ioctlInt(l.fd, ioctlTableSize)
			if e := max(e1, e2); e != 0 {
				return fmt.Errorf("%s: BLKSECTGET or SG_GET_SG_TABLESIZE: %w", dv.sg.path, e)
			}
			hwBytes, segments = uint64(b), uint64(n)
		}
	}
	if l.limits, err = limits(hwBytes, segments); err != nil {
		return err
	}
	l.blockSize.Store(unknownBlockSize)
	l.learnBlockSize(uint32(blockSize))
	return l.start()
}

// own asks the logical unit who it is and takes it.
func (l *LUN) own(h host, dv *device, o Options) error {
	var err error
	// No deadline but the kernel's: a command that it does not give back keeps
	// us from closing anyway.
	if l.identity, err = scsi.ReadIdentity(context.Background(), l); err != nil {
		return err
	}
	switch l.identity.DeviceType {
	case 0x00, 0x07, 0x0e, 0x14: // what Linux's disk driver takes
	default:
		return fmt.Errorf("%s %s is not a disk (peripheral device type %02Xh): vmm passes disks through", l.identity.Vendor, l.identity.Product, l.identity.DeviceType)
	}
	if o.Handed.at(l.nexus) {
		l.hold, err = h.share(dv, l.identity, o.RunDir, o.Handed.Files)
	} else {
		l.hold, err = h.take(dv, l.identity, o.RunDir, o.VM)
	}
	return err
}
