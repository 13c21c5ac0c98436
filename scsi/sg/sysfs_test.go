package sg

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// tree makes a file system below a temporary directory: PATH to content, or
// to "-> TARGET" for a symbolic link.
func tree(t *testing.T, files map[string]string) host {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(to, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return host(root)
}

// disk is sysfs around one SCSI disk with a partition, as Debian's 6.1 lays it
// out.
func disk() map[string]string {
	const unit = "sys/devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:3"
	return map[string]string{
		"sys/dev/char/21:2":  "-> ../../devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:3/scsi_generic/sg2",
		"sys/dev/block/8:16": "-> ../../devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:3/block/sdb",
		"sys/dev/block/8:17": "-> ../../devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:3/block/sdb/sdb1",

		unit + "/subsystem":                                  "-> ../../../../../../bus/scsi",
		unit + "/scsi_generic/sg2/dev":                       "21:2\n",
		unit + "/scsi_generic/sg2/device":                    "-> ../../../2:0:1:3",
		unit + "/scsi_generic/sg2/subsystem":                 "-> ../../../../../../../../class/scsi_generic",
		unit + "/block/sdb/dev":                              "8:16\n",
		unit + "/block/sdb/device":                           "-> ../../../2:0:1:3",
		unit + "/block/sdb/subsystem":                        "-> ../../../../../../../../class/block",
		unit + "/block/sdb/size":                             "2097152\n",
		unit + "/block/sdb/queue/max_hw_sectors_kb":          "32767\n",
		unit + "/block/sdb/queue/max_segments":               "256\n",
		unit + "/block/sdb/queue/logical_block_size":         "4096\n",
		unit + "/block/sdb/sdb1/partition":                   "1\n",
		unit + "/block/sdb/sdb1/dev":                         "8:17\n",
		unit + "/block/sdb/sdb1/subsystem":                   "-> ../../../../../../../../../class/block",
		"sys/dev/block/254:0":                                "-> ../../devices/pci0000:00/virtio0/block/vda",
		"sys/devices/pci0000:00/virtio0/subsystem":           "-> ../../../bus/virtio",
		"sys/devices/pci0000:00/virtio0/block/vda/device":    "-> ../../../virtio0",
		"sys/devices/pci0000:00/virtio0/block/vda/subsystem": "-> ../../../../../class/block",
		"sys/dev/block/253:0":                                "-> ../../devices/virtual/block/dm-0",
		"sys/devices/virtual/block/dm-0/dm/name":             "mpatha\n",
		"sys/devices/virtual/block/dm-0/dm/uuid":             "mpath-36001405\n",
		"sys/devices/virtual/block/dm-0/subsystem":           "-> ../../../../class/block",
		"sys/dev/block/7:0":                                  "-> ../../devices/virtual/block/loop0",
		"sys/devices/virtual/block/loop0/subsystem":          "-> ../../../../class/block",
		"sys/dev/char/1:3":                                   "-> ../../devices/virtual/mem/null",
		"sys/devices/virtual/mem/null/subsystem":             "-> ../../../../class/mem",
		"sys/class/block/dm-0":                               "-> ../../devices/virtual/block/dm-0",
		"sys/class/block/md0":                                "-> ../../devices/virtual/block/md0",
		"sys/devices/virtual/block/md0/dev":                  "9:0\n",
		"proc/self/mountinfo":                                "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n",
		"proc/swaps":                                         "Filename\tType\tSize\tUsed\tPriority\n",
		"proc/sys/kernel/random/boot_id":                     "2c9a3f5e-0000-4000-8000-000000000001\n",
	}
}

func TestFind(t *testing.T) {
	h := tree(t, disk())
	for _, c := range []struct {
		what  string
		block bool
		dev   devno
	}{
		{"by /dev/sg2", false, devno{21, 2}},
		{"by /dev/sdb", true, devno{8, 16}},
	} {
		dv, err := h.find(c.block, c.dev)
		if err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		if want := (Address{2, 0, 1, 3}); dv.address != want {
			t.Errorf("%s: address %v; want %v", c.what, dv.address, want)
		}
		if want := (node{"sdb", "/dev/sdb", devno{8, 16}}); dv.block == nil || *dv.block != want {
			t.Errorf("%s: block node %+v; want %+v", c.what, dv.block, want)
		}
		if want := (node{"sg2", "/dev/sg2", devno{21, 2}}); dv.sg == nil || *dv.sg != want {
			t.Errorf("%s: sg node %+v; want %+v", c.what, dv.sg, want)
		}
	}
}

func TestList(t *testing.T) {
	const unit = "sys/devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:3"
	files := disk()
	for name, at := range map[string]string{"sg10": "2:0:1:10", "sg2": "2:0:1:3", "sg3": "2:0:1:4", "sg4": "2:0:1:5"} {
		files["sys/class/scsi_generic/"+name] = "-> ../../devices/pseudo_0/adapter0/host2/target2:0:1/" + at + "/scsi_generic/" + name
		files["sys/devices/pseudo_0/adapter0/host2/target2:0:1/"+at+"/scsi_generic/"+name+"/device"] = "-> ../../../" + at
	}
	naa := "\x00\x83\x00\x14\x01\x03\x00\x10\x60\x01\x40\x50\x00\x00\x00\x00\x12\x34\x56\x78\x90\xab\xcd\xef"
	files[unit+"/type"] = "0\n"
	files[unit+"/vendor"] = "LIO-ORG \n"
	files[unit+"/model"] = "disk0           \n"
	files[unit+"/vpd_pg83"] = naa
	files["sys/devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:4/type"] = "13\n"
	files["sys/devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:5/vpd_pg83"] = "\x00\x83\x00\xff"
	files["sys/devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:10/vpd_pg83"] = naa
	files["sys/class/scsi_generic/sg9"] = "-> ../../devices/gone"
	h := tree(t, files)
	got, err := h.list()
	if err != nil {
		t.Fatal(err)
	}
	const boot, name = "2c9a3f5e-0000-4000-8000-000000000001", "naa.60014050000000001234567890abcdef"
	nexus := func(lun uint64) Nexus { return Nexus{boot, Address{2, 0, 1, lun}} }
	want := []Unit{
		{"/dev/sg2", "0", "LIO-ORG", "disk0", name, nexus(3)},
		{"/dev/sg3", "13", "", "", "", nexus(4)},
		{"/dev/sg4", "", "", "", "", nexus(5)},
		{"/dev/sg10", "", "", "", name, nexus(10)},
	}
	if !slices.Equal(got, want) {
		t.Errorf("list() = %+v; want %+v", got, want)
	}
	for name, want := range map[string][]string{name: {"/dev/sg2", "/dev/sg10"}, "naa.6001": nil, "": nil} {
		if got, err := h.findNamed(name, nil); err != nil || !slices.Equal(got, want) {
			t.Errorf("findNamed(%q) = %v, %v; want %v", name, got, err, want)
		}
	}
	// Of several that lead to one unit, the nexus that is handed over comes first.
	held := []*os.File{os.Stdin}
	for _, c := range []struct {
		first Handed
		want  []string
	}{
		{Handed{boot, "2:0:1:10", held}, []string{"/dev/sg10", "/dev/sg2"}},
		{Handed{boot, "2:0:1:10", nil}, []string{"/dev/sg2", "/dev/sg10"}},
		{Handed{"another", "2:0:1:10", held}, []string{"/dev/sg2", "/dev/sg10"}},
		{Handed{boot, "2:0:1:4", held}, []string{"/dev/sg2", "/dev/sg10"}},
	} {
		if got, err := h.findNamed(name, &c.first); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("findNamed(%q, %+v) = %v, %v; want %v", name, c.first, got, err, c.want)
		}
	}
	if got, err := tree(t, nil).list(); got != nil || err != nil {
		t.Errorf("list() without SCSI = %v, %v; want none", got, err)
	}
}

func TestFindWithoutACounterpart(t *testing.T) {
	files := disk()
	for path := range files {
		if strings.Contains(path, "/block/sdb") || path == "sys/dev/block/8:16" || path == "sys/dev/block/8:17" {
			delete(files, path)
		}
	}
	dv, err := tree(t, files).find(false, devno{21, 2})
	if err != nil || dv.block != nil || dv.sg == nil {
		t.Errorf("without a disk driver: %+v, %v", dv, err)
	}
	files = disk()
	for path := range files {
		if strings.Contains(path, "scsi_generic") {
			delete(files, path)
		}
	}
	dv, err = tree(t, files).find(true, devno{8, 16})
	if err != nil || dv.sg != nil || dv.block == nil {
		t.Errorf("without module sg: %+v, %v", dv, err)
	}
}

func TestFindRefuses(t *testing.T) {
	h := tree(t, disk())
	for _, c := range []struct {
		block bool
		dev   devno
		want  string
	}{
		{true, devno{8, 17}, "it is a partition: give the whole disk, /dev/sdb"},
		{true, devno{253, 0}, "it is the device-mapper device mpatha: reservations belong to a path"},
		{true, devno{254, 0}, "not a SCSI device: vda has another driver"},
		{true, devno{7, 0}, "not a SCSI device: loop0 has another driver"},
		{false, devno{1, 3}, "not a SCSI device: give a /dev/sgN"},
		{true, devno{99, 99}, "block device 99:99 is not in sysfs"},
	} {
		dv, err := h.find(c.block, c.dev)
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("find(%v, %v) = %+v, %v; want %q", c.block, c.dev, dv, err, c.want)
		}
	}
}

func TestParseAddress(t *testing.T) {
	a, err := parseAddress("10:0:3:18446744073709551615")
	if want := (Address{10, 0, 3, 1<<64 - 1}); err != nil || a != want {
		t.Errorf("parseAddress = %v, %v; want %v", a, err, want)
	}
	for _, s := range []string{"", "virtio0", "1:2:3", "1:2:3:4:5", "1:2:3:4 ", "-1:0:0:0x"} {
		if a, err := parseAddress(s); err == nil {
			t.Errorf("parseAddress(%q) = %v; want an error", s, a)
		}
	}
}

func TestQueue(t *testing.T) {
	h := tree(t, disk())
	dv, err := h.find(true, devno{8, 16})
	if err != nil {
		t.Fatal(err)
	}
	hw, segments, block, err := dv.queue()
	if hw != 32767<<10 || segments != 256 || block != 4096 || err != nil {
		t.Errorf("queue() = %d, %d, %d, %v; want 33553408, 256, 4096, nil", hw, segments, block, err)
	}
	// Under another host's Exclusive Access the disk driver knows no capacity.
	if err := os.WriteFile(filepath.Join(dv.dir, "block/sdb/size"), []byte("0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, block, err := dv.queue(); block != 0 || err != nil {
		t.Errorf("block size of an unreadable disk = %d, %v; want 0, nil", block, err)
	}
	for _, bad := range []string{"", "-1", "many", "99999999999"} {
		if err := os.WriteFile(filepath.Join(dv.dir, "block/sdb/queue/max_segments"), []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, n, _, err := dv.queue(); err == nil {
			t.Errorf("max_segments %q read as %d; want an error", bad, n)
		}
	}
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		hwBytes, segments uint64
		want              scsi.Limits
	}{
		{32767 << 10, 256, scsi.Limits{MaxTransfer: 1 << 20, MaxSegments: 256}},   // LIO through tcm_loop
		{512 << 10, 2048, scsi.Limits{MaxTransfer: 512 << 10, MaxSegments: 1024}}, // no more iovecs than that
		{4 << 20, 1 << 16, scsi.Limits{MaxTransfer: 4 << 20, MaxSegments: 1024}},
		{1 << 42, 1 << 32, scsi.Limits{MaxTransfer: 1 << 30, MaxSegments: 1024}},
		{1<<16 + 100, 64, scsi.Limits{MaxTransfer: 1 << 16, MaxSegments: 64}},
	} {
		if got, err := limits(c.hwBytes, c.segments); got != c.want || err != nil {
			t.Errorf("limits(%d, %d) = %+v, %v; want %+v", c.hwBytes, c.segments, got, err, c.want)
		}
	}
	for _, c := range [][2]uint64{{0, 256}, {1 << 20, 0}, {511, 1}} {
		if got, err := limits(c[0], c[1]); err == nil {
			t.Errorf("limits(%d, %d) = %+v; want an error", c[0], c[1], got)
		}
	}
}

func TestUses(t *testing.T) {
	const unit = "sys/devices/pseudo_0/adapter0/host2/target2:0:1/2:0:1:3/block/"
	for _, c := range []struct {
		path, content string
		want          string
	}{
		{unit + "sdb/holders/dm-0", "", "/dev/sdb is a path of the multipath device mpatha"},
		{unit + "sdb/sdb1/holders/md0", "", "/dev/sdb1 is part of md0"},
		{"sys/devices/virtual/block/dm-0/dm/uuid", "LVM-x", ""}, // nobody's holder
		{"proc/self/mountinfo", "30 22 8:17 / /data rw shared:2 master:1 - xfs /dev/sdb1 rw\n", "/dev/sdb1 is mounted on /data"},
		{"proc/self/mountinfo", "30 22 0:44 / /btr rw - btrfs /dev/sdb rw\n", "/dev/sdb is mounted on /btr"},
		{"proc/self/mountinfo", "30 22 8:1 / /other rw - xfs /dev/sda1 rw\nbroken line\n", ""},
		{"proc/swaps", "Filename\tType\n/dev/sdb1 partition 1 0 -2\n", "/dev/sdb1 is swap space"},
	} {
		files := disk()
		files[c.path] = c.content
		h := tree(t, files)
		dv, err := h.find(true, devno{8, 16})
		if err != nil {
			t.Fatal(err)
		}
		if got := h.uses(dv); got != c.want && (c.want == "" || !strings.HasPrefix(got, c.want)) {
			t.Errorf("%s with %q: uses = %q; want %q", c.path, c.content, got, c.want)
		}
	}
	files := disk()
	files[unit+"sdb/holders/dm-0"] = ""
	files["sys/devices/virtual/block/dm-0/dm/name"] = "vg-root\n"
	files["sys/devices/virtual/block/dm-0/dm/uuid"] = "LVM-abc\n"
	h := tree(t, files)
	dv, err := h.find(true, devno{8, 16})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := h.uses(dv), "/dev/sdb is part of the device-mapper device vg-root"; got != want {
		t.Errorf("uses = %q; want %q", got, want)
	}
}

func TestLockName(t *testing.T) {
	named := &scsi.Identity{Designators: []scsi.Designator{{Type: scsi.DesignatorNAA, ID: []byte{0x60, 1, 2, 3}}}}
	other := &scsi.Identity{Designators: []scsi.Designator{{Type: scsi.DesignatorNAA, ID: []byte{0x60, 1, 2, 4}}}}
	nameless := &scsi.Identity{Vendor: "V"}
	a, b, c := Address{2, 0, 0, 0}, Address{2, 0, 0, 1}, Address{3, 0, 0, 0}
	if x, y := lockName(named, a), lockName(named, b); x != y {
		t.Errorf("one unit under two numbers of one target has two locks, %s and %s", x, y)
	}
	all := map[string]bool{}
	for _, n := range []string{lockName(named, a), lockName(named, c), lockName(other, a), lockName(nameless, a), lockName(nameless, b)} {
		if all[n] || strings.ContainsAny(n, "/ ") || len(n) > 200 {
			t.Errorf("lock name %q is used twice or no file name", n)
		}
		all[n] = true
	}
	hostile := func(tail string) string {
		return lockName(&scsi.Identity{Designators: []scsi.Designator{{Type: scsi.DesignatorName, ID: []byte("../" + strings.Repeat("x/", 200) + tail)}}}, a)
	}
	if x, y := hostile("1"), hostile("2"); x == y || strings.Contains(x, "/") || len(x) > 200 {
		t.Errorf("names of long designators: %s and %s", x, y)
	}
}

func TestLockNamesItsHolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	first, err := acquire(dir, "lun-x.lock", "web1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = acquire(dir, "lun-x.lock", "web2")
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "this VM, web1, already: the same LUN is given twice") {
		t.Errorf("second acquire in one process = %v", err)
	}
	// The same from another process's pid.
	if err := os.WriteFile(first.Name(), []byte("1 db7\n"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err = acquire(dir, "lun-x.lock", "web2"); !errors.Is(err, ErrBusy) || err.Error() != "in use by VM db7 (pid 1)" {
		t.Errorf("second acquire = %v", err)
	}
	if err := os.Truncate(first.Name(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err = acquire(dir, "lun-x.lock", "web2"); !errors.Is(err, ErrBusy) || err.Error() != "in use by another VM that is just starting" {
		t.Errorf("second acquire of an unnamed lock = %v", err)
	}
	if other, err := acquire(dir, "lun-y.lock", "web2"); err != nil {
		t.Errorf("acquire of another lock = %v", err)
	} else {
		other.Close()
	}
	first.Close()
	again, err := acquire(dir, "lun-x.lock", "a-longer-name-than-before")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	b, _ := os.ReadFile(again.Name())
	if want := fmt.Sprintf("%d a-longer-name-than-before\n", os.Getpid()); string(b) != want {
		t.Errorf("lock file says %q; want %q", b, want)
	}
}

func TestOpenRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(file, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		o    Options
		want string
	}{
		{"/dev/null", Options{}, "LUN /dev/null: not a SCSI device: give a /dev/sgN or a SCSI disk"},
		{file, Options{}, "LUN " + file + ": not a device: give a /dev/sgN or a SCSI disk"},
		{"/no/such", Options{}, "LUN /no/such: no such file or directory: lsscsi -g lists this host's"},
		{"/dev/null", Options{Timeout: -1}, "LUN /dev/null: timeout of -1ns: give more than 0"},
		{"/dev/null", Options{Timeout: 1 << 62}, "LUN /dev/null: timeout of"},
	} {
		l, err := Open(c.path, c.o)
		if err == nil || !strings.HasPrefix(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Open(%s) = %v, %v; want %q", c.path, l, err, c.want)
		}
	}
	// A host without module sg.
	_, err := tree(t, nil).open("/dev/sg99999", Options{})
	if want := "no such file or directory: load the kernel module sg (modprobe sg)"; err == nil || err.Error() != want || !errors.Is(err, unix.ENOENT) {
		t.Errorf("open(/dev/sg99999) = %v; want %q", err, want)
	}
}

func TestNodeOpenNamesTheRemedy(t *testing.T) {
	missing := &node{"sg9", "/dev/no-such-sg9", devno{21, 9}}
	if _, err := missing.open(unix.O_RDWR); err == nil || err.Error() != "open /dev/no-such-sg9: no such file or directory: /dev lacks the node of device 21:9" {
		t.Errorf("open of a missing node = %v", err)
	}
	swapped := &node{"sg9", "/dev/null", devno{21, 9}}
	if _, err := swapped.open(unix.O_RDWR); err == nil || !strings.Contains(err.Error(), "/dev/null is device 1:3, but the kernel's sg9 is 21:9") {
		t.Errorf("open of another device's node = %v", err)
	}
	null := &node{"null", "/dev/null", devno{1, 3}}
	fd, err := null.open(unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if got := remedy(null, unix.EACCES); !strings.HasPrefix(got, ": run as root, or as a member of group ") || !strings.HasSuffix(got, "(mode 0666)") {
		t.Errorf("remedy of EACCES = %q", got)
	}
	closed := filepath.Join(t.TempDir(), "sg9")
	if err := os.WriteFile(closed, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := remedy(&node{"sg9", closed, devno{21, 9}}, unix.EACCES); !strings.HasSuffix(got, "(mode 0600), once a udev rule gives that access (contrib/systemd/60-vmm.rules)") {
		t.Errorf("remedy of EACCES where the group has no access = %q", got)
	}
}
