package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"vmm/tests/lab/lio"
)

// A migration between two processes of one host: the guest's LUN has a nexus
// for each, and one for a third node.

// receive waits for a guest called name.
func receive(t *testing.T, name string, flags ...string) (v *vm, address string) {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	address = "unix://" + filepath.Join(dir, "m")
	v = start(t, append([]string{"receive", name, "--listen", address, "--serial", socket}, flags...)...)
	v.serial = socket
	if err := v.stderr.wait(v.exited, func(s string) bool { return strings.Contains(s, "waiting for a guest") }); err != nil {
		t.Fatalf("vmm receive: %v", err)
	}
	return v, address
}

// migrate moves a guest, which must succeed.
func migrate(t *testing.T, name, address string, flags ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), filepath.Join(stage, "vmm"), append([]string{"migrate", name, address}, flags...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("vmm migrate: %v\n%s", err, out)
	}
	t.Logf("%s", out)
	return string(out)
}

// registrants is what READ FULL STATUS says by one nexus, a line each: key,
// holder, initiator.
func registrants(t *testing.T, n *lio.Nexus) string {
	t.Helper()
	return local(t, "sg_persist -n -i -s "+n.SG)
}

// intruder writes by a nexus that may not, until it is stopped: a write that
// succeeds is an error.
func intruder(t *testing.T, n *lio.Nexus) (stop func() (refused int)) {
	t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	refused := 0
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			// WRITE(10) of one block at LBA 0: RESERVATION CONFLICT is status 18h.
			out, err := exec.Command("sg_raw", "-s", "512", "-i", "/dev/zero", n.SG, "2a", "00", "00", "00", "00", "00", "00", "00", "01", "00").CombinedOutput()
			switch {
			case err == nil:
				t.Errorf("a third node's write succeeded: %s", out)
				return
			case strings.Contains(strings.ToLower(string(out)), "reservation conflict"):
				refused++
			}
		}
	})
	return func() int {
		close(done)
		wg.Wait()
		return refused
	}
}

const guestKey = "0x1122334455667788"

func TestMigrate(t *testing.T) {
	for _, typ := range []int{1, 3, 5, 6, 7, 8} {
		t.Run(fmt.Sprintf("type %d", typ), func(t *testing.T) {
			lun := needLIO(t, fmt.Sprintf("migrate-%d", typ), 64<<20, 3)
			source, third := lun.Nexuses[0], lun.Nexuses[2]
			v := boot(t, cloud, "guest.work=agent", "--cpus", "2", "--lun", "id=data,path="+source.SG)
			v.connect()
			disk := v.diskOf(0)
			v.sh("sg_persist -n -o -G -S " + guestKey + " " + disk)
			v.sh(fmt.Sprintf("sg_persist -n -o -R -K %s -T %d %s", guestKey, typ, disk))
			boot := v.sh("cat /proc/sys/kernel/random/boot_id")
			sum := v.sh("fill -offset 1048576 -size 16777216 " + disk)
			v.sh("(while :; do rdtest -depth 4 -time 2s " + disk + " >>/tmp/io || echo FAILED >>/tmp/io; done) >/dev/null 2>&1 & echo $!")

			local(t, "sg_turs "+third.SG+" || sg_turs "+third.SG) // takes its unit attentions away
			stop := intruder(t, third)
			w, address := receive(t, "arrived")
			out := migrate(t, "test", address)
			refused := stop()
			if refused == 0 {
				t.Error("the third node was never refused: it did not run")
			}
			t.Logf("a third node's writes were refused %d times", refused)
			if status := v.wait(); status != 0 {
				t.Errorf("the source's vmm run ended with %d; want 0", status)
			}
			if !strings.Contains(out, "are on this host") {
				t.Errorf("the summary does not say that the reservation moved:\n%s", out)
			}

			// What the target says, by a nexus that has no part in it.
			status := registrants(t, third)
			if strings.Count(status, "Key=") != 1 || !strings.Contains(status, "Key="+guestKey) {
				t.Errorf("READ FULL STATUS shows\n%s\nwant one registration, with key %s", status, guestKey)
			}
			if held := local(t, "sg_persist -n -i -r "+third.SG); typ < 7 && !strings.Contains(held, guestKey) {
				t.Errorf("READ RESERVATION shows\n%s\nwant type %d, key %s", held, typ, guestKey)
			}
			// Only the holder's nexus may change its own registration.
			if out, err := tryLocal(t, "sg_persist -n -o -G -K "+guestKey+" -S "+guestKey+" "+source.SG); err == nil {
				t.Errorf("the source's nexus is still registered: %s", out)
			}

			w.dial()
			if got := w.sh("cat /proc/sys/kernel/random/boot_id"); got != boot {
				t.Errorf("boot id %s at the destination; want the guest's, %s", got, boot)
			}
			if got := w.sh("sum -offset 1048576 -size 16777216 " + disk); got != sum {
				t.Errorf("checksum %s at the destination; want %s", got, sum)
			}
			w.sh("fill -seed 7 -offset 1048576 -size 1048576 " + disk)
			if io := w.sh("cat /tmp/io"); strings.Contains(io, "FAILED") {
				t.Errorf("I/O failed in the guest:\n%s", io)
			}
			if log := w.sh("dmesg | grep -E 'BUG|Oops|WARNING|Call Trace|I/O error|reservation conflict' || true"); log != "" {
				t.Errorf("the guest's kernel says:\n%s", log)
			}
			w.poweroff()
		})
	}
}
