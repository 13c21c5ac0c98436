package e2e

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// until waits in the guest for a condition of its shell, which its kernel
// brings about in its own time.
func (v *vm) until(condition string) {
	v.t.Helper()
	v.sh(fmt.Sprintf("for i in $(seq 150); do %s && exit 0; sleep 1; done; echo 'it never came: %s'; exit 1", condition, strings.ReplaceAll(condition, "'", "")))
}

// busy starts I/O on a disk of the guest, until stopBusy; it notes each round
// in /tmp/NAME.rounds and each failure in /tmp/NAME.failed.
func (v *vm) busy(name, disk string) {
	v.t.Helper()
	v.sh(fmt.Sprintf(`rm -f /tmp/%[1]s.*; (while [ ! -e /tmp/%[1]s.stop ]; do
		if dd if=%[2]s of=/dev/null bs=64k count=16 iflag=direct; then echo x >>/tmp/%[1]s.rounds; else echo x >>/tmp/%[1]s.failed; [ -b %[2]s ] || break; fi
	done; touch /tmp/%[1]s.ended) >/dev/null 2>&1 </dev/null &`, name, disk))
	v.until(fmt.Sprintf("[ -s /tmp/%s.rounds ]", name))
}

// rounds is what busy I/O has done so far.
func (v *vm) rounds(name string) int {
	v.t.Helper()
	n, err := strconv.Atoi(v.sh(fmt.Sprintf("wc -l </tmp/%s.rounds", name)))
	if err != nil {
		v.t.Fatal(err)
	}
	return n
}

// A disk comes and goes while the guest runs, and I/O on another goes on.
func TestHotplug(t *testing.T) {
	const size = 64 << 20
	steady, hot := needLIO(t, "steady", size, 1), needLIO(t, "hot", size, 2)
	v := boot(t, cloud, "guest.work=agent", "--lun", "id=steady,path="+steady.Nexuses[0].SG)
	v.connect()
	v.busy("steady", v.diskOf(0))
	goesOn := func(what string) {
		t.Helper()
		v.until(fmt.Sprintf("[ $(wc -l </tmp/steady.rounds) -gt %d ]", v.rounds("steady")))
		if out, status := v.try("test -e /tmp/steady.failed"); status == 0 {
			t.Errorf("%s: I/O on the other disk failed %s", what, out)
		}
	}
	const here = "[ -e /sys/class/scsi_device/*:0:1:0/device/block/sd* ]"

	vmmSays(t, "lun attach test id=hot,target=1,path="+hot.Nexuses[0].SG, `^LUN hot is attached: target 1, naa\.`)
	v.until(here)
	goesOn("attached")
	disk := v.diskOf(1)
	sum := v.sh(fmt.Sprintf("dd if=/dev/urandom of=/tmp/r bs=1M count=4 2>/dev/null; dd if=/tmp/r of=%s bs=1M oflag=direct 2>/dev/null; sha256sum </tmp/r", disk))
	if back := v.sh(fmt.Sprintf("dd if=%s bs=1M count=4 iflag=direct 2>/dev/null | sha256sum", disk)); back != sum {
		t.Errorf("the guest reads back %s; want %s", back, sum)
	}
	if host := local(t, "dd if="+hot.Nexuses[1].Block+" bs=1M count=4 iflag=direct 2>/dev/null | sha256sum"); host != sum {
		t.Errorf("another nexus reads %s; the guest wrote %s", host, sum)
	}

	// A guest that is registered keeps its disk.
	v.reserve(disk, 5)
	vmmSays(t, "lun list test", `^hot +1 +passthrough .*Write Exclusive, Registrants Only, held by the guest$`)
	if out, err := tryLocal(t, filepath.Join(stage, "vmm")+" lun detach test hot"); err == nil || !strings.Contains(out, "the guest holds the Write Exclusive, Registrants Only reservation with key 0x1122334455667788") {
		t.Errorf("vmm lun detach of a disk that the guest has reserved: %v\n%s", err, out)
	}
	v.sh(fmt.Sprintf("sg_persist -n -o -C -K %s %s", guestKey, disk))
	v.sh("dd if=" + disk + " of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null")

	// It goes while the guest reads it: those reads end with errors.
	v.busy("hot", disk)
	vmmSays(t, "lun detach test hot", `^LUN hot is detached$`)
	v.until("! " + here)
	v.until("[ -e /tmp/hot.ended ]")
	goesOn("detached")
	if out := vmmSays(t, "lun list test", "^steady "); strings.Contains(out, "hot") {
		t.Errorf("after the detach vmm lun list says\n%s", out)
	}
	// The host has it again.
	local(t, "sg_turs "+hot.Nexuses[0].SG+" || sg_turs "+hot.Nexuses[0].SG)
	vmmSays(t, "pr show "+hot.Nexuses[0].SG, `registrants +none`)

	// And back, as a software disk and as itself, each on a target of its own.
	vmmSays(t, "lun attach test id=image,path="+tempDisk(t, size), `^LUN image is attached: target 2, `)
	vmmSays(t, "lun attach test id=hot,target=1,path="+hot.Nexuses[0].Block, `^LUN hot is attached: target 1, `)
	v.until(here)
	v.until("[ -e /sys/class/scsi_device/*:0:2:0/device/block/sd* ]")
	if back := v.sh(fmt.Sprintf("dd if=%s bs=1M count=4 iflag=direct 2>/dev/null | sha256sum", v.diskOf(1))); back != sum {
		t.Errorf("attached again it reads %s; want %s", back, sum)
	}
	goesOn("attached again")
	v.sh("touch /tmp/steady.stop")
	v.until("[ -e /tmp/steady.ended ]")
	quietLog(t, v)
	v.poweroff()
}
