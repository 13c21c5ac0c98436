// Package lio makes SCSI LUNs with the Linux kernel's own target (LIO) and
// initiators on the same machine (tcm_loop), and simulated disks (scsi_debug).
// It works on this machine's /sys/kernel/config, so it needs root, and is for
// test hosts.
//
// A LUN has any number of I_T nexuses: each is a SCSI host of its own, with
// its own /dev/sgN and /dev/sdX, on one backing file. To the target they are
// different initiators, with different registrations and reservations.
package lio

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	configfs = "/sys/kernel/config/target"
	core     = configfs + "/core/fileio_0"
	loopback = configfs + "/loopback"
)

// Config describes a LUN.
type Config struct {
	Name   string // unique among the machine's LUNs; letters, digits, - and _
	Size   int64  // bytes; a multiple of 512
	Serial string // unit serial number (VPD page 0x80, part of 0x83); random if empty
	// Nexuses is how many I_T nexuses to make; AddNexus makes more.
	Nexuses int
	// File is the backing file. If it is empty, one is made in the directory
	// for temporary files, and removed by Close.
	File string
	// Attributes are written to the backstore's attrib directory before it is
	// exported: block_size, emulate_tpu, max_write_same_len ...
	Attributes map[string]string
}

// LUN is an exported logical unit.
type LUN struct {
	Name    string
	Serial  string
	File    string
	Nexuses []*Nexus

	ownFile bool
}

// Nexus is an initiator's view of a LUN.
type Nexus struct {
	WWN string // naa.…: of the target port, which is also the initiator's name
	Device
}

// Device is a SCSI device of this machine.
type Device struct {
	HCTL  string // host:channel:target:lun
	SG    string // /dev/sgN
	Block string // /dev/sdX
}

// Sys returns the device's directory in sysfs.
func (d Device) Sys() string { return "/sys/class/scsi_device/" + d.HCTL + "/device" }

// Load loads the target's modules and makes the directory in which the target
// keeps reservations that survive a power loss. Create calls it.
func Load() error {
	// The target opens its files in the root directory of kernel threads.
	if here, there, err := roots(); err == nil && here != there {
		return errors.New("lio: this process is in a chroot; the kernel's target would keep its state elsewhere")
	}
	if err := modprobe("target_core_mod"); err != nil {
		return err
	}
	if _, err := os.Stat(configfs); err != nil {
		if err := unix.Mount("configfs", "/sys/kernel/config", "configfs", 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("lio: mount configfs: %w", err)
		}
	}
	// Without it REGISTER answers NOT READY, although it has registered.
	root, err := readLine(configfs + "/dbroot")
	if err != nil {
		return fmt.Errorf("lio: %w", err)
	}
	for _, dir := range []string{"pr", "alua"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return fmt.Errorf("lio: the target's database: %w", err)
		}
	}
	for _, module := range []string{"target_core_file", "tcm_loop", "sd_mod", "sg"} {
		if err := modprobe(module); err != nil {
			return err
		}
	}
	return nil
}

func roots() (here, there uint64, err error) {
	var a, b unix.Stat_t
	if err := unix.Stat("/", &a); err != nil {
		return 0, 0, err
	}
	if err := unix.Stat("/proc/1/root", &b); err != nil {
		return 0, 0, err
	}
	return a.Dev<<32 ^ a.Ino, b.Dev<<32 ^ b.Ino, nil
}

// Create makes a LUN and its nexuses.
func Create(ctx context.Context, cfg Config) (_ *LUN, err error) {
	if strings.Trim(cfg.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" || cfg.Name == "" {
		return nil, fmt.Errorf("lio: LUN name %q: want letters, digits, - and _", cfg.Name)
	}
	if cfg.Size < 512 || cfg.Size%512 != 0 {
		return nil, fmt.Errorf("lio: LUN %s: size %d is no multiple of 512", cfg.Name, cfg.Size)
	}
	if err := Load(); err != nil {
		return nil, err
	}
	l := &LUN{Name: cfg.Name, Serial: cfg.Serial, File: cfg.File}
	if l.Serial == "" {
		l.Serial = randomHex(8)
	}
	store := filepath.Join(core, l.Name)
	if _, err := os.Stat(store); err == nil {
		return nil, fmt.Errorf("lio: LUN %s exists already", l.Name)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("lio: LUN %s: %w", cfg.Name, err), l.Close())
		}
	}()
	if l.File == "" {
		f, err := os.CreateTemp("", "lio-"+l.Name+"-*.img")
		if err != nil {
			return nil, err
		}
		f.Close()
		l.File, l.ownFile = f.Name(), true
	}
	f, err := os.OpenFile(l.File, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = f.Truncate(cfg.Size)
	f.Close()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(store, 0o755); err != nil {
		return nil, err
	}
	if err := write(store+"/control", fmt.Sprintf("fd_dev_name=%s,fd_dev_size=%d,fd_buffered_io=1", l.File, cfg.Size)); err != nil {
		return nil, err
	}
	if err := write(store+"/enable", "1"); err != nil {
		return nil, err
	}
	if err := write(store+"/wwn/vpd_unit_serial", l.Serial); err != nil {
		return nil, err
	}
	for name, value := range cfg.Attributes {
		if err := write(store+"/attrib/"+name, value); err != nil {
			return nil, err
		}
	}
	for range cfg.Nexuses {
		if _, err := l.AddNexus(ctx); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// AddNexus makes one more I_T nexus on the LUN and waits for its devices.
func (l *LUN) AddNexus(ctx context.Context) (*Nexus, error) {
	n := &Nexus{WWN: "naa.5" + randomHex(8)[1:]} // NAA 5: IEEE registered
	l.Nexuses = append(l.Nexuses, n)             // so that Close removes what there is
	tpg := filepath.Join(loopback, n.WWN, "tpgt_1")
	if err := os.MkdirAll(filepath.Join(tpg, "lun/lun_0"), 0o755); err != nil {
		return nil, err
	}
	if err := write(tpg+"/nexus", n.WWN); err != nil {
		return nil, err
	}
	if err := os.Symlink(filepath.Join(core, l.Name), filepath.Join(tpg, "lun/lun_0", l.Name)); err != nil {
		return nil, err
	}
	address, err := readLine(tpg + "/address") // host:channel:target
	if err != nil {
		return nil, err
	}
	n.Device, err = WaitDevice(ctx, address+":0")
	return n, err
}

// RemoveNexus removes a nexus of the LUN: to the target, an initiator that
// logs out. Its devices must not be in use.
func (l *LUN) RemoveNexus(n *Nexus) error {
	if err := n.remove(l.Name); err != nil {
		return err
	}
	for i := range l.Nexuses {
		if l.Nexuses[i] == n {
			l.Nexuses = append(l.Nexuses[:i], l.Nexuses[i+1:]...)
			break
		}
	}
	return nil
}

func (n *Nexus) remove(lun string) error {
	wwn := filepath.Join(loopback, n.WWN)
	tpg := filepath.Join(wwn, "tpgt_1")
	// The link's removal removes the SCSI device; the nexus must have no LUN.
	for _, step := range []func() error{
		func() error { return os.Remove(filepath.Join(tpg, "lun/lun_0", lun)) },
		func() error { return os.Remove(filepath.Join(tpg, "lun/lun_0")) },
		func() error { return write(tpg+"/nexus", "NULL") },
		func() error { return os.Remove(tpg) },
		func() error { return os.Remove(wwn) },
	} {
		if err := step(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("lio: remove nexus %s: %w", n.WWN, err)
		}
	}
	return nil
}

// Close removes the nexuses, the LUN and, if Create made it, the backing file.
func (l *LUN) Close() error {
	var failed []error
	for _, n := range l.Nexuses {
		if err := n.remove(l.Name); err != nil {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return errors.Join(failed...)
	}
	l.Nexuses = nil
	if err := os.Remove(filepath.Join(core, l.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("lio: remove LUN %s: %w", l.Name, err)
	}
	os.Remove(core) // refused while other LUNs are in it
	if root, err := readLine(configfs + "/dbroot"); err == nil {
		os.Remove(filepath.Join(root, "pr", "aptpl_"+l.Serial)) // its saved reservations, if there are any
	}
	if l.ownFile {
		l.ownFile = false
		return os.Remove(l.File)
	}
	return nil
}

// WaitDevice waits until the SCSI device at host:channel:target:lun has its
// generic and its block node, and returns them.
func WaitDevice(ctx context.Context, hctl string) (Device, error) {
	d := Device{HCTL: hctl}
	err := waitUevent(ctx, func() (bool, error) {
		for class, node := range map[string]*string{"scsi_generic": &d.SG, "block": &d.Block} {
			names, err := os.ReadDir(filepath.Join(d.Sys(), class))
			if len(names) == 0 {
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return false, err
				}
				return false, nil
			}
			*node = "/dev/" + names[0].Name()
			if _, err := os.Stat(*node); err != nil {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return d, fmt.Errorf("lio: wait for SCSI device %s: %w", hctl, err)
	}
	return d, nil
}

// waitTime is how long a device may take to appear; a busy emulated host is
// slow.
const waitTime = time.Minute

// waitUevent waits until done reports true, asking again after each event that
// the kernel announces (kobject uevents, netlink(7)).
func waitUevent(ctx context.Context, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, waitTime, fmt.Errorf("not there after %v", waitTime))
	defer cancel()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return fmt.Errorf("uevent socket: %w", err)
	}
	events := os.NewFile(uintptr(fd), "uevents")
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 8<<10)
	for {
		ok, err := done() // after the socket is open: no event is missed
		if ok || err != nil {
			return err
		}
		switch _, err := events.Read(buf); {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, unix.ENOBUFS): // events were lost: ask
		case err != nil:
			return err
		}
	}
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// write writes an attribute, which must exist, in one write(2).
func write(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return fmt.Errorf("write %q: %w", value, err)
	}
	return nil
}

func readLine(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

func readInt(path string) (int64, error) {
	s, err := readLine(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(s, 0, 64)
}

func modprobe(args ...string) error {
	if out, err := exec.Command("modprobe", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("lio: modprobe %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// BreakDatabase makes the target unable to store what APTPL wants stored,
// until restore is called: it then carries REGISTER out and answers NOT READY.
func BreakDatabase() (restore func() error, err error) {
	root, err := readLine(configfs + "/dbroot")
	if err != nil {
		return nil, fmt.Errorf("lio: %w", err)
	}
	dir := filepath.Join(root, "pr")
	if err := os.Rename(dir, dir+".away"); err != nil {
		return nil, fmt.Errorf("lio: the target's database: %w", err)
	}
	return func() error { return os.Rename(dir+".away", dir) }, nil
}
