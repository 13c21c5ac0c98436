package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A guest gets a new process three times: of its name, on the one path that its
// host has to the LUN, while it writes. Nothing happens to its reservation, not
// even what would leave it as it is: PRgeneration stays. A fourth process that
// dies first changes nothing.
func TestUpgrade(t *testing.T) {
	lun := needLIO(t, "upgrade", 64<<20, 1)
	nexus := lun.Nexuses[0]
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2", "--lun", "id=data,path="+nexus.SG)
	v.connect()
	disk := v.diskOf(0)
	bootID := v.sh("cat /proc/sys/kernel/random/boot_id")
	v.reserve(disk, 5)
	v.churn("-rest 100ms -offset 1048576 " + disk)
	status := func() string { // PRgeneration included
		return local(t, "sg_persist -n -i -s "+nexus.SG)
	}
	vmm := filepath.Join(stage, "vmm")
	want := status()
	if !strings.Contains(want, guestKey) {
		t.Fatalf("READ FULL STATUS shows\n%s\nwant key %s", want, guestKey)
	}
	unchanged := func(when string) {
		t.Helper()
		if got := status(); got != want {
			t.Errorf("%s: READ FULL STATUS shows\n%s\nwant what it was:\n%s", when, got, want)
		}
	}
	for i := range 3 {
		before := v.churned()
		w, address := receive(t, "test")
		s := migrate(t, "test", address, "--local")
		if !strings.Contains(s.Luns[0].Sentence, "data: the guest keeps its key "+guestKey) {
			t.Errorf("upgrade %d: the summary says %q; want that the key stays", i, s.Luns[0].Sentence)
		}
		t.Logf("upgrade %d: %.1f s, downtime %v", i, float64(s.TotalUs)/1e6, time.Duration(s.Downtime.TotalUs)*time.Microsecond)
		if status := v.wait(); status != 0 {
			t.Errorf("upgrade %d: the old process ended with %d; want 0", i, status)
		}
		unchanged(fmt.Sprintf("upgrade %d", i))
		w.dial()
		if got := w.sh("cat /proc/sys/kernel/random/boot_id"); got != bootID {
			t.Errorf("upgrade %d: boot id %s; want the guest's, %s", i, got, bootID)
		}
		w.churnsOn(before)
		pid := w.cmd.Process.Pid
		if got := local(t, vmm+" status test"); !strings.Contains(got, "running") || !strings.Contains(got, fmt.Sprint(pid)) {
			t.Errorf("upgrade %d: vmm status says\n%s\nwant running, pid %d", i, got, pid)
		}
		if got := local(t, vmm+" pr show test"); !strings.Contains(got, guestKey) || !strings.Contains(got, "Write Exclusive") {
			t.Errorf("upgrade %d: vmm pr show says\n%s\nwant key %s and Write Exclusive", i, got, guestKey)
		}
		other := fmt.Sprintf("%s run other --kernel %s --memory 256M --lun path=%s", vmm, filepath.Join(stage, cloud.flavour, cloud.format), nexus.SG)
		if got, err := tryLocal(t, other); err == nil || !strings.Contains(got, fmt.Sprintf("in use by VM test (pid %d)", pid)) {
			t.Errorf("upgrade %d: another guest with the LUN: %v\n%s\nwant it in use by VM test (pid %d)", i, err, got, pid)
		}
		v = w
	}

	// It does not get as far as to answer.
	w, address := receive(t, "test")
	if err := w.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	m := start(t, "migrate", "test", address, "--local")
	local(t, "until "+vmm+" status test | grep -q 'migrating to'; do :; done")
	if err := w.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), "runs on here") {
		t.Errorf("vmm migrate to a process that is killed ended with %d, %q; want 1, and to hear that the guest runs on", status, m.stderr)
	}
	unchanged("after a new process was killed")
	if got := local(t, vmm+" status test"); !strings.Contains(got, "running") || !strings.Contains(got, fmt.Sprint(v.cmd.Process.Pid)) {
		t.Errorf("vmm status says\n%s\nwant running, pid %d", got, v.cmd.Process.Pid)
	}

	v.churnsOn(v.churned())
	v.stopChurn()
	if log := v.sh("dmesg | grep -E 'BUG|Oops|WARNING|Call Trace|I/O error|eservation conflict' || true"); log != "" {
		t.Errorf("the guest's kernel says:\n%s", log)
	}
	v.poweroff()
}
