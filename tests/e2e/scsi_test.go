package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"vmm/tests/lab/lio"
)

// needLIO makes a LUN of the kernel's target with some nexuses.
func needLIO(t *testing.T, name string, size int64, nexuses int) *lio.LUN {
	t.Helper()
	l, err := lio.Create(t.Context(), lio.Config{Name: name, Size: size, Nexuses: nexuses})
	if err != nil {
		if os.Getenv("VMM_TEST_REQUIRE_LIO") == "" && os.Geteuid() != 0 {
			t.Skipf("the kernel's SCSI target needs root: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("LIO: %v", err)
		}
	})
	return l
}

// needDebug loads scsi_debug.
func needDebug(t *testing.T, params ...string) *lio.Debug {
	t.Helper()
	d, err := lio.LoadDebug(t.Context(), params...)
	if err != nil {
		if os.Getenv("VMM_TEST_REQUIRE_LIO") == "" && os.Geteuid() != 0 {
			t.Skipf("scsi_debug needs root: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("scsi_debug: %v", err)
		}
	})
	return d
}

func tempDisk(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// sgOf finds the guest's sg node of a target; the controller is its only SCSI
// host.
func (v *vm) sgOf(target int) string {
	v.t.Helper()
	return "/dev/" + v.sh(fmt.Sprintf("basename /sys/class/scsi_device/*:0:%d:0/device/scsi_generic/sg*", target))
}

func (v *vm) diskOf(target int) string {
	v.t.Helper()
	return "/dev/" + v.sh(fmt.Sprintf("basename /sys/class/scsi_device/*:0:%d:0/device/block/sd*", target))
}

// The commands whose answers the guest and the host must agree on.
var inspections = []string{
	"sg_inq %s",
	"sg_vpd -p di %s",
	"sg_vpd -p sn %s",
	"sg_vpd -p bl %s",
	"sg_readcap -l %s",
	"sg_persist -i -k %s",
	"sg_persist -i -r %s",
	"sg_persist -i -c %s",
	"sg_opcodes %s",
}

// comparable drops what may differ: the device's name, page B0's transfer
// lengths, which are lowered to what one SG_IO here can carry, and what
// cannot migrate.
func comparable(command, output, device string) string {
	output = strings.ReplaceAll(output, device, "SG")
	var kept []string
	for _, line := range strings.Split(output, "\n") {
		lower := strings.ToLower(line)
		if strings.Contains(command, "-p bl") && (strings.Contains(lower, "maximum transfer length") || strings.Contains(lower, "optimal transfer length:")) {
			continue
		}
		// Two capabilities could not follow the guest to another host, and are
		// hidden from it.
		if strings.Contains(command, "-i -c") && (strings.Contains(line, "(SIP_C)") || strings.Contains(line, "(ATP_C)")) {
			continue
		}
		kept = append(kept, strings.TrimRight(line, " "))
	}
	return strings.Join(kept, "\n")
}

// Several LUNs of both kinds at once: addresses, identical answers of the
// passed-through ones on both sides, data both ways.
func TestLUNs(t *testing.T) {
	const size = 64 << 20
	a, b := needLIO(t, "luns-a", size, 2), needLIO(t, "luns-b", size, 1)
	image := tempDisk(t, size)
	passed := map[int]lio.Device{0: a.Nexuses[0].Device, 2: b.Nexuses[0].Device}
	// What the host sees of a LUN, it asks over the nexus that the guest will
	// have (a target port tells its name), and before the guest is there.
	type answer struct {
		output string
		ok     bool
	}
	outside := map[string]answer{}
	for target, device := range passed {
		for _, command := range inspections {
			out, err := tryLocal(t, fmt.Sprintf(command+" 2>&1", device.SG))
			outside[fmt.Sprint(target, command)] = answer{comparable(command, out, device.SG), err == nil}
		}
	}
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2",
		"--lun", "id=a,path="+passed[0].SG,
		"--lun", "id=image,path="+image+",target=5",
		"--lun", "id=b,path="+passed[2].Block+",target=2",
		"--lun", "id=ro,path="+tempDisk(t, size)+",target=3,readonly")
	v.connect()

	want := "0 2 3 5"
	if got := v.sh("ls -d /sys/class/scsi_device/* | sed 's/.*:0:\\([0-9]*\\):0$/\\1/' | sort -n | xargs"); got != want {
		t.Fatalf("the guest's targets are %s; want %s", got, want)
	}
	for target := range passed {
		sg := v.sgOf(target)
		for _, command := range inspections {
			// What the target does not support fails alike on both sides.
			out, status := v.try(fmt.Sprintf(command+" 2>&1", sg))
			inside, host := answer{comparable(command, out, sg), status == 0}, outside[fmt.Sprint(target, command)]
			if inside != host {
				t.Errorf("target %d, %s\nin the guest (ok %v):\n%s\non the host (ok %v):\n%s",
					target, command, inside.ok, inside.output, host.ok, host.output)
			}
		}
	}

	t.Run("page B0 says what one SG_IO carries", func(t *testing.T) {
		disk := filepath.Base(a.Nexuses[0].Block)
		segments, _ := strconv.Atoi(local(t, "cat /sys/block/"+disk+"/queue/max_segments"))
		kb, _ := strconv.Atoi(local(t, "cat /sys/block/"+disk+"/queue/max_hw_sectors_kb"))
		blocks := min(segments*4, kb) * 2
		out := v.sh("sg_vpd -p bl " + v.sgOf(0))
		if want := fmt.Sprintf("Maximum transfer length: %d blocks", blocks); !strings.Contains(out, want) {
			t.Errorf("page B0 in the guest:\n%s\nwant %q", out, want)
		}
	})

	t.Run("data", func(t *testing.T) {
		for target, path := range map[int]string{0: a.Nexuses[1].Block, 2: b.Nexuses[0].Block, 5: image} {
			sum := v.sh(fmt.Sprintf("dd if=/dev/urandom of=/tmp/r bs=1M count=6 2>/dev/null; dd if=/tmp/r of=%s bs=1M oflag=direct 2>/dev/null; sync; sha256sum </tmp/r", v.diskOf(target)))
			host := local(t, "blockdev --flushbufs "+path+" 2>/dev/null; dd if="+path+" bs=1M count=6 2>/dev/null | sha256sum")
			if sum != host {
				t.Errorf("target %d: the guest wrote %s, the host reads %s", target, sum, host)
			}
			if back := v.sh(fmt.Sprintf("echo 3 >/proc/sys/vm/drop_caches; dd if=%s bs=1M count=6 2>/dev/null | sha256sum", v.diskOf(target))); back != sum {
				t.Errorf("target %d: the guest reads back %s; want %s", target, back, sum)
			}
		}
	})

	t.Run("read only", func(t *testing.T) {
		if got := v.sh("cat /sys/block/" + filepath.Base(v.diskOf(3)) + "/ro"); got != "1" {
			t.Errorf("the read-only LUN's ro = %s; want 1", got)
		}
		out, _ := v.try("sg_dd if=/dev/zero of=" + v.sgOf(3) + " bs=512 count=1 2>&1; sg_raw -s 512 -i /dev/zero " + v.sgOf(3) + " 2a 00 00 00 00 00 00 00 01 00 2>&1")
		if !strings.Contains(out, "Data Protect") && !strings.Contains(out, "Write protected") {
			t.Errorf("a write to the read-only LUN:\n%s\nwant DATA PROTECT", out)
		}
	})

	// What the guest registers is on the device, under the host's nexus.
	t.Run("reservation", func(t *testing.T) {
		v.sh("sg_persist -o -G -S 0xabc123 " + v.sgOf(0) + " && sg_persist -o -R -K 0xabc123 -T 5 " + v.sgOf(0))
		if out := local(t, "sg_persist -i -r "+a.Nexuses[1].SG); !strings.Contains(out, "Key=0xabc123") || !strings.Contains(out, "registrants only") {
			t.Errorf("the other nexus reads:\n%s\nwant the guest's reservation", out)
		}
		if out, err := tryLocal(t, "sg_raw -s 512 -i /dev/zero "+a.Nexuses[1].SG+" 2a 00 00 00 00 00 00 00 01 00"); err == nil {
			t.Errorf("another nexus could write:\n%s", out)
		}
		// And a conflict the other way is a conflict in the guest.
		local(t, "sg_persist -o -G -S 0xdef "+a.Nexuses[1].SG+" && sg_persist -o -P -K 0xdef -S 0xabc123 -T 5 "+a.Nexuses[1].SG)
		v.try("sg_turs " + v.sgOf(0)) // takes the unit attention
		out, status := v.try("sg_raw -s 512 -i /dev/zero " + v.sgOf(0) + " 2a 00 00 00 00 00 00 00 01 00 2>&1")
		if status != 24 || !strings.Contains(out, "Reservation Conflict") { // sg3_utils(8)
			t.Errorf("the preempted guest's write: status %d\n%s\nwant RESERVATION CONFLICT", status, out)
		}
	})
	quietLog(t, v)
	v.poweroff()
}

// A medium error is a medium error in the guest, with its sense data.
func TestMediumError(t *testing.T) {
	d := needDebug(t, "dev_size_mb=16")
	v := boot(t, cloud, "guest.work=agent", "--lun", "path="+d.Devices[0].SG)
	v.connect()
	if err := d.Inject(lio.OptMediumError, 0); err != nil {
		t.Fatal(err)
	}
	const at = 0x1234
	sg := v.sgOf(0)
	script := fmt.Sprintf("sg_raw -r 512 %%s 28 00 00 00 %02x %02x 00 00 01 00 2>&1", at>>8, at&0xff)
	inside, _ := v.try(fmt.Sprintf(script, sg))
	outside, _ := tryLocal(t, fmt.Sprintf(script, d.Devices[0].SG))
	if !strings.Contains(inside, "Medium Error") || !strings.Contains(inside, "Unrecovered read error") {
		t.Errorf("in the guest:\n%s\nwant MEDIUM ERROR, unrecovered read error", inside)
	}
	if inside != outside {
		t.Errorf("in the guest:\n%s\non the host:\n%s", inside, outside)
	}
	out, status := v.try(fmt.Sprintf("dd if=%s of=/dev/null bs=512 skip=%d count=1 iflag=direct 2>&1", v.diskOf(0), at))
	if status == 0 || !strings.Contains(out, "No data available") { // ENODATA is Linux's word for a critical medium error
		t.Errorf("dd over the bad block: status %d\n%s", status, out)
	}
	if err := d.Inject(0, 0); err != nil {
		t.Fatal(err)
	}
	v.sh(fmt.Sprintf("dd if=%s of=/dev/null bs=512 skip=%d count=1 iflag=direct", v.diskOf(0), at))
	v.poweroff()
}

// LOGICAL UNIT RESET goes through and the disk is usable afterwards.
func TestDeviceReset(t *testing.T) {
	d := needDebug(t, "dev_size_mb=16", "ndelay=200000000") // 0.2 s a command
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2", "--lun", "path="+d.Devices[0].Block)
	v.connect()
	sg, disk := v.sgOf(0), v.diskOf(0)
	if out, status := v.try("dd if=" + disk + " of=/dev/null bs=4k count=20 iflag=direct 2>/dev/null & sg_reset -d " + sg + " 2>&1; r=$?; wait; exit $r"); status != 0 {
		t.Errorf("sg_reset -d: status %d\n%s", status, out)
	}
	v.sh("dd if=/dev/urandom of=" + disk + " bs=4k count=4 oflag=direct 2>/dev/null && dd if=" + disk + " of=/dev/null bs=4k count=4 iflag=direct 2>/dev/null")
	v.poweroff()
}

// No command is sent twice while signals rain on the process: the LUN counts.
func TestNoCommandTwice(t *testing.T) {
	l := needLIO(t, "twice", 16<<20, 1)
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2", "--lun", "path="+l.Nexuses[0].SG)
	v.connect()
	sg := v.sgOf(0)
	count := func() int {
		n, err := strconv.ParseInt(strings.TrimPrefix(local(t, "cat "+l.Nexuses[0].Sys()+"/iorequest_cnt"), "0x"), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return int(n)
	}
	stop := make(chan struct{})
	var rain sync.WaitGroup
	rain.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				v.cmd.Process.Signal(syscall.SIGURG) // what Go sends itself to preempt
				v.cmd.Process.Signal(syscall.SIGWINCH)
			}
		}
	})
	before := count()
	const commands = 200
	// sg_raw in a loop is slow; sg_dd sends many commands from one process.
	v.sh(fmt.Sprintf("sg_dd if=%s of=/dev/null bs=512 bpt=1 count=%d 2>/dev/null", sg, commands))
	after := count()
	close(stop)
	rain.Wait()
	// sg_dd begins with READ CAPACITY.
	if got := after - before; got < commands || got > commands+2 {
		t.Errorf("the LUN got %d commands for %d reads and a READ CAPACITY", got, commands)
	}
	v.poweroff()
}
