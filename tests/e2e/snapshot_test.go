package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// vmmDoes runs a command of vmm and returns what it says, and whether that went
// well.
func vmmDoes(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), filepath.Join(stage, "vmm"), args...).CombinedOutput()
	return string(out), err
}

// A guest that works goes into a file and comes back, on another nexus and then
// on the same one, with its memory, its clock and its reservation.
func TestSnapshot(t *testing.T) {
	lun := needLIO(t, "snapshot", 64<<20, 3)
	third := lun.Nexuses[2]
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2", "--lun", "id=data,path="+lun.Nexuses[0].SG)
	v.connect()
	disk := v.diskOf(0)
	bootID := v.sh("cat /proc/sys/kernel/random/boot_id")
	v.sh("dd if=/dev/urandom of=/tmp/a bs=1M count=8 2>/dev/null; sha256sum </tmp/a >/tmp/a.sum")
	local(t, "sg_turs "+third.SG+" || sg_turs "+third.SG) // takes its unit attentions away
	name := "test"
	passes := []struct {
		typ   int
		nexus int
		says  string
	}{
		{5, 1, "are on this host"},
		{8, 1, "keeps its key"},
		{1, 0, "are on this host"},
	}
	if os.Getenv("VMM_TEST_MODE") != "soak" {
		passes = passes[:2]
	}
	for i, pass := range passes {
		v.reserve(disk, pass.typ)
		sum := v.sh(fmt.Sprintf("fill -seed %d -offset 1048576 -size 4194304 %s", i, disk))
		before := uptime(v)
		file := filepath.Join(t.TempDir(), "guest.snap")
		out, err := vmmDoes(t, "save", name, file)
		if err != nil {
			t.Fatalf("vmm save: %v\n%s", err, out)
		}
		if status := v.wait(); status != 0 {
			t.Errorf("the saved guest's process ended with %d; want 0", status)
		}
		if info, err := os.Stat(file); err != nil || info.Size() > 512<<20 {
			t.Errorf("the snapshot is %v, %v", info, err)
		} else {
			t.Logf("%s  %d bytes", out, info.Size())
		}

		name = fmt.Sprintf("back%d", i)
		socket := filepath.Join(t.TempDir(), "s")
		flags := []string{"run", name, "--from", file, "--serial", socket, "--lun", "id=data,path=" + lun.Nexuses[pass.nexus].SG}
		v = start(t, flags...)
		v.serial = socket
		if err := v.stderr.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, "data: ") }); err != nil {
			t.Fatalf("vmm run --from: %v\n%s", err, v.stderr)
		}
		if !strings.Contains(v.stderr.String(), pass.says) {
			t.Errorf("vmm run --from says %q; want %q", v.stderr, pass.says)
		}
		v.dial()
		if got := v.sh("cat /proc/sys/kernel/random/boot_id"); got != bootID {
			t.Errorf("boot id %s; want the guest's, %s", got, bootID)
		}
		if now := uptime(v); now < before {
			t.Errorf("the guest's CLOCK_MONOTONIC went from %v back to %v", before, now)
		}
		v.sh("sha256sum </tmp/a | cmp - /tmp/a.sum")
		if got := v.sh("sum -offset 1048576 -size 4194304 " + disk); got != sum {
			t.Errorf("checksum %s; want %s", got, sum)
		}
		v.sh("fill -seed 99 -offset 1048576 -size 1048576 " + disk)

		status := registrants(t, third)
		if strings.Count(status, "Key=") != 1 || !strings.Contains(status, "Key="+guestKey) {
			t.Errorf("type %d: READ FULL STATUS shows\n%s\nwant one registration, with key %s", pass.typ, status, guestKey)
		}
		if held := local(t, "sg_persist -n -i -r "+third.SG); !strings.Contains(held, reservationTypes[pass.typ]) {
			t.Errorf("READ RESERVATION shows\n%s\nwant %s", held, reservationTypes[pass.typ])
		}
		if out, err := vmmDoes(t, "run", "twice", "--from", file); err == nil || !strings.Contains(out, "--again") {
			t.Errorf("vmm run of a used snapshot: %v, %s", err, out)
		}
		v.sh("sg_persist -n -o -G -K " + guestKey + " -S 0 " + disk)
	}
	if log := v.sh("dmesg | grep -E 'BUG|Oops|WARNING|Call Trace|I/O error|eservation conflict' || true"); log != "" {
		t.Errorf("the guest's kernel says:\n%s", log)
	}
	v.poweroff()
}
