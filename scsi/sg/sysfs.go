package sg

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// Address is a SCSI address of Linux: host adapter, channel, target, logical
// unit. The first three are the I_T nexus.
type Address struct {
	Host, Channel, Target int
	LUN                   uint64
}

func (a Address) String() string {
	return fmt.Sprintf("%d:%d:%d:%d", a.Host, a.Channel, a.Target, a.LUN)
}

// Nexus is the way to a logical unit: this host, and an address on it.
// Two Nexus values that are equal are one I_T_L nexus.
type Nexus struct {
	BootID string // of the running kernel, from /proc/sys/kernel/random/boot_id
	Address
}

// host is where the kernel describes itself: "/" outside tests.
type host string

func (h host) file(path string) string { return filepath.Join(string(h), path) }

// text is the content of a small file on one line; "" if it cannot be read.
func text(elem ...string) string {
	b, _ := os.ReadFile(filepath.Join(elem...))
	return strings.TrimSpace(string(b))
}

// devno is a device number.
type devno struct{ major, minor uint32 }

func (d devno) String() string { return fmt.Sprintf("%d:%d", d.major, d.minor) }

// node is a device node as sysfs describes it.
type node struct {
	name string // "sdb", "sg2"
	path string // "/dev/sdb"
	dev  devno
}

// device is what sysfs says about one logical unit.
type device struct {
	address Address
	dir     string // .../H:C:T:L below host
	block   *node  // nil where no disk driver is bound
	sg      *node  // nil where module sg is not loaded
}

// find looks up the SCSI device behind a device node.
func (h host) find(block bool, d devno) (*device, error) {
	kind := "char"
	if block {
		kind = "block"
	}
	entry, err := filepath.EvalSymlinks(h.file("sys/dev/" + kind + "/" + d.String()))
	if err != nil {
		return nil, fmt.Errorf("%s device %s is not in sysfs: give a /dev/sgN or a SCSI disk", kind, d)
	}
	name := filepath.Base(entry)
	has := func(file string) bool {
		_, err := os.Stat(filepath.Join(entry, file))
		return err == nil
	}
	switch {
	case block && has("partition"):
		return nil, fmt.Errorf("it is a partition: give the whole disk, /dev/%s", filepath.Base(filepath.Dir(entry)))
	case block && has("dm"):
		return nil, fmt.Errorf("it is the device-mapper device %s: reservations belong to a path, so give the /dev/sgN of one path that is not part of a map (multipath -f releases them)", text(entry, "dm/name"))
	case !block && base(filepath.Join(entry, "subsystem")) != "scsi_generic":
		return nil, fmt.Errorf("not a SCSI device: give a /dev/sgN or a SCSI disk (lsscsi -g lists them)")
	}
	dir, err := filepath.EvalSymlinks(filepath.Join(entry, "device"))
	if err != nil || base(filepath.Join(dir, "subsystem")) != "scsi" {
		return nil, fmt.Errorf("not a SCSI device: %s has another driver; give a /dev/sgN or a SCSI disk (lsscsi -g lists them)", name)
	}
	dv := &device{dir: dir}
	if dv.address, err = parseAddress(filepath.Base(dir)); err != nil {
		return nil, err
	}
	dv.block = child(dir, "block")
	dv.sg = child(dir, "scsi_generic")
	return dv, nil
}

// base is the last element of what a symbolic link points to.
func base(link string) string {
	to, err := os.Readlink(link)
	if err != nil {
		return ""
	}
	return filepath.Base(to)
}

func parseAddress(s string) (a Address, err error) {
	if n, serr := fmt.Sscanf(s, "%d:%d:%d:%d", &a.Host, &a.Channel, &a.Target, &a.LUN); serr != nil || n != 4 || a.String() != s {
		return a, fmt.Errorf("not a SCSI device: sysfs calls it %q, not HOST:CHANNEL:TARGET:LUN", s)
	}
	return a, nil
}

// child is the one device of a class below a SCSI device's directory.
func child(dir, class string) *node {
	names, _ := os.ReadDir(filepath.Join(dir, class))
	for _, e := range names {
		n := &node{name: e.Name(), path: "/dev/" + e.Name()}
		if _, err := fmt.Sscanf(text(dir, class, n.name, "dev"), "%d:%d", &n.dev.major, &n.dev.minor); err == nil {
			return n
		}
	}
	return nil
}

// open opens n and makes sure that it is the device that sysfs means. Its
// error says what the user can do.
func (n *node) open(flags int) (int, error) {
	fd, err := unix.Open(n.path, flags|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(n.path, flags|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w%s", n.path, err, remedy(n, err))
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("stat %s: %w", n.path, err)
	}
	if got := (devno{unix.Major(st.Rdev), unix.Minor(st.Rdev)}); got != n.dev {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is device %s, but the kernel's %s is %s: /dev is not of this host", n.path, got, n.name, n.dev)
	}
	return fd, nil
}

// remedy is what to do about an error of open(2), as the rest of the line.
func remedy(n *node, err error) string {
	switch err {
	case unix.EACCES:
		var st unix.Stat_t
		if unix.Stat(n.path, &st) == nil {
			group := strconv.Itoa(int(st.Gid))
			if g, err := user.LookupGroupId(group); err == nil {
				group = g.Name
			}
			how := ""
			if st.Mode&0o040 == 0 {
				how = ", once a udev rule gives that access (contrib/systemd/60-vmm.rules)"
			}
			return fmt.Sprintf(": run as root, or as a member of group %s (mode %04o)%s", group, st.Mode&0o7777, how)
		}
		return ": run as root"
	case unix.EPERM:
		return fmt.Sprintf(": device %s is not allowed in this container", n.dev)
	case unix.ENOENT:
		return fmt.Sprintf(": /dev lacks the node of device %s", n.dev)
	case unix.ENXIO, unix.ENODEV:
		return ": the device is offline or was removed"
	}
	return ""
}

// maxTransferCap keeps residuals within sg_io_hdr's int.
const maxTransferCap = 1 << 30

// limits is what one command may carry. The queue's bytes alone are no
// answer: LIO claims 32 MiB and has 256 segments, and a segment may be as
// short as a page.
func limits(maxHWBytes, maxSegments uint64) (scsi.Limits, error) {
	bytes := min(maxHWBytes, min(maxSegments, maxTransferCap)*segmentBytes, maxTransferCap) &^ 511
	if bytes == 0 {
		return scsi.Limits{}, fmt.Errorf("the kernel says that one command carries %d bytes in %d segments", maxHWBytes, maxSegments)
	}
	return scsi.Limits{MaxTransfer: uint32(bytes), MaxSegments: uint32(min(maxSegments, maxIovecs))}, nil
}

// queue reads the limits of dv's block node, and its block size: 0 if the
// kernel does not know it.
func (dv *device) queue() (maxHWBytes, maxSegments, blockSize uint64, err error) {
	dir := filepath.Join(dv.dir, "block", dv.block.name)
	number := func(name string) (n uint64) {
		if err == nil {
			var b []byte
			if b, err = os.ReadFile(filepath.Join(dir, name)); err == nil {
				n, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
			}
		}
		return n
	}
	maxHWBytes, maxSegments = number("queue/max_hw_sectors_kb")<<10, number("queue/max_segments")
	// Where READ CAPACITY failed, as it does under another's Exclusive Access
	// reservation, the size is zero and the block size a default.
	if text(dir, "size") != "0" {
		blockSize = number("queue/logical_block_size")
	}
	return maxHWBytes, maxSegments, blockSize, err
}

// bootID identifies the running kernel among all.
func (h host) bootID() (string, error) {
	b, err := os.ReadFile(h.file("proc/sys/kernel/random/boot_id"))
	return strings.TrimSpace(string(b)), err
}

// uses says who has dv's disk or one of its partitions, as far as the kernel
// tells; "" if it does not.
func (h host) uses(dv *device) string {
	disk := filepath.Join(dv.dir, "block", dv.block.name)
	dirs := []string{disk}
	parts, _ := filepath.Glob(filepath.Join(disk, dv.block.name+"*", "partition"))
	for _, p := range parts {
		dirs = append(dirs, filepath.Dir(p))
	}
	for _, dir := range dirs {
		path := "/dev/" + filepath.Base(dir)
		holders, _ := os.ReadDir(filepath.Join(dir, "holders"))
		for _, e := range holders {
			dm := h.file("sys/class/block/" + e.Name() + "/dm")
			name := text(dm, "name")
			switch {
			case name == "":
				return fmt.Sprintf("%s is part of %s", path, e.Name())
			case strings.HasPrefix(text(dm, "uuid"), "mpath-"):
				return fmt.Sprintf("%s is a path of the multipath device %s; its other paths would undo our reservations (multipath -f %[2]s releases it)", path, name)
			}
			return fmt.Sprintf("%s is part of the device-mapper device %s", path, name)
		}
		if on := h.mountPoint(text(dir, "dev"), path); on != "" {
			return fmt.Sprintf("%s is mounted on %s", path, on)
		}
		for line := range strings.Lines(text(h.file("proc/swaps"))) {
			if f := strings.Fields(line); len(f) > 0 && f[0] == path {
				return fmt.Sprintf("%s is swap space", path)
			}
		}
	}
	return ""
}

// mountPoint is where a block device is mounted; "" if it is not. Some file
// systems have device numbers of their own, so the source's name counts too.
func (h host) mountPoint(dev, path string) string {
	for line := range strings.Lines(text(h.file("proc/self/mountinfo"))) {
		// 36 35 98:0 / /mnt rw - ext3 /dev/root rw: proc(5)
		f := strings.Fields(line)
		for i := 6; i+2 < len(f); i++ {
			if f[i] == "-" {
				if f[2] == dev || f[i+2] == path {
					return f[4]
				}
				break
			}
		}
	}
	return ""
}
