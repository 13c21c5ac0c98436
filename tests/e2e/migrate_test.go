package e2e

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/tests/guest"
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
	if err := v.stderr.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, "waiting for a guest") }); err != nil {
		t.Fatalf("vmm receive: %v", err)
	}
	return v, address
}

// migrate moves a guest, which must succeed, and returns the summary.
func migrate(t *testing.T, name, address string, flags ...string) *vmmv1.MigrationSummary {
	t.Helper()
	m := start(t, append([]string{"migrate", name, address, "-o", "json"}, flags...)...)
	if status := m.wait(); status != 0 {
		t.Fatalf("vmm migrate ended with %d\n%s", status, m.stderr)
	}
	var r vmmv1.MigrateResponse
	last := tail(m.console.String(), 1)
	if err := protojson.Unmarshal([]byte(last), &r); err != nil || r.GetSummary() == nil {
		t.Fatalf("vmm migrate ends with %q; want a summary (%v)", last, err)
	}
	return r.GetSummary()
}

// registrants is what READ FULL STATUS says by one nexus, PRgeneration apart,
// which a probe of ours advances.
func registrants(t *testing.T, n *lio.Nexus) string {
	t.Helper()
	return local(t, "sg_persist -n -i -s "+n.SG+" | grep -v generation")
}

// intruder writes by a nexus that may not, until it is stopped, or the test
// has failed: a write that succeeds is an error.
func intruder(t *testing.T, n *lio.Nexus) (stop func() (refused int)) {
	t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	refused := 0
	end := sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
	t.Cleanup(end) // before the LUN, and its reservation, go
	wg.Go(func() {
		pace := time.NewTicker(100 * time.Millisecond) // the guest has the same processor
		defer pace.Stop()
		for {
			select {
			case <-done:
				return
			case <-pace.C:
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
		end()
		return refused
	}
}

const guestKey = "0x1122334455667788"

// reserve makes the guest's disk the guest's, with a reservation of a type.
func (v *vm) reserve(disk string, typ int) {
	v.t.Helper()
	v.sh(fmt.Sprintf("sg_persist -n -o -G -S %s %s && sg_persist -n -o -R -K %[1]s -T %[3]d %[2]s", guestKey, disk, typ))
}

// One guest moves to and fro, each time with a reservation of another type,
// while it writes and checks its disk and its memory, and a third node tries to
// write.
func TestMigrate(t *testing.T) {
	moves, rest := 5, "100ms"
	if os.Getenv("VMM_TEST_MODE") == "soak" {
		moves, rest = 50, "20ms"
	}
	lun := needLIO(t, "migrate", 64<<20, 3)
	third := lun.Nexuses[2]
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2", "--lun", "id=data,path="+lun.Nexuses[0].SG)
	v.connect()
	disk := v.diskOf(0)
	bootID := v.sh("cat /proc/sys/kernel/random/boot_id")
	local(t, "sg_turs "+third.SG+" || sg_turs "+third.SG) // takes its unit attentions away
	name := "test"
	types := []int{5, 1, 3, 6, 7, 8}
	v.churn("-rest " + rest + " -offset 1048576 " + disk)
	ahead := v.ahead()
	var downtime, total time.Duration
	for i := range moves {
		typ := types[i%len(types)]
		from := lun.Nexuses[i%2]
		v.reserve(disk, typ)
		before := v.churned()

		stop := intruder(t, third)
		next := fmt.Sprintf("moved%d", i)
		w, address := receive(t, next)
		s := migrate(t, name, address)
		refused := stop()
		if refused == 0 {
			t.Error("the third node was never refused: it did not run")
		}
		if status := v.wait(); status != 0 {
			t.Errorf("the source's process ended with %d; want 0", status)
		}
		if !strings.Contains(s.Luns[0].Sentence, "are on this host") {
			t.Errorf("the summary says %q; want that the reservation moved", s.Luns[0].Sentence)
		}
		took := time.Duration(s.Downtime.TotalUs) * time.Microsecond
		total += took
		downtime = max(downtime, took)
		t.Logf("move %d, type %d: %d rounds, %.1f MiB in %.1f s, downtime %v, of it takeover %v; a third node's writes were refused %d times", i+1, typ, s.Rounds,
			float64(s.SentBytes)/(1<<20), float64(s.TotalUs)/1e6, took, time.Duration(s.Downtime.TakeoverUs)*time.Microsecond, refused)

		// What the target says, by a nexus that has no part in it.
		status := registrants(t, third)
		if strings.Count(status, "Key=") != 1 || !strings.Contains(status, "Key="+guestKey) {
			t.Errorf("READ FULL STATUS shows\n%s\nwant one registration, with key %s", status, guestKey)
		}
		if held := local(t, "sg_persist -n -i -r "+third.SG); typ < 7 && !strings.Contains(held, guestKey) || !strings.Contains(held, reservationTypes[typ]) {
			t.Errorf("READ RESERVATION shows\n%s\nwant %s, key %s", held, reservationTypes[typ], guestKey)
		}
		// REGISTER with the registered key is refused where it is not registered.
		if out, err := tryLocal(t, "sg_persist -n -o -G -K "+guestKey+" -S "+guestKey+" "+from.SG); err == nil {
			t.Errorf("the source's nexus %s is still registered: %s", from.SG, out)
		}

		w.dial()
		if got := w.sh("cat /proc/sys/kernel/random/boot_id"); got != bootID {
			t.Errorf("boot id %s at the destination; want the guest's, %s", got, bootID)
		}
		w.churnsOn(before)
		w.sh("sg_persist -n -o -G -K " + guestKey + " -S 0 " + disk)
		v, name = w, next
	}
	t.Logf("%d moves: downtime %v at most, %v on average", moves, downtime, total/time.Duration(moves))
	// Real time goes on while the guest stands still.
	if now := v.ahead(); now.least-ahead.most > 100*time.Millisecond || ahead.least-now.most > 100*time.Millisecond {
		t.Errorf("the guest's clock was ahead of its host's by %v, and is by %v; want a difference below 100ms", ahead, now)
	} else {
		t.Logf("the guest's clock was ahead of its host's by %v, and is by %v", ahead, now)
	}
	v.stopChurn()
	if log := v.sh("dmesg | grep -E 'BUG|Oops|WARNING|Call Trace|I/O error|eservation conflict|clocksource: timekeeping' || true"); log != "" {
		t.Errorf("the guest's kernel says:\n%s", log)
	}
	v.poweroff()
}

// churn has the guest work (package guest) until stopChurn.
func (v *vm) churn(args string) {
	v.t.Helper()
	v.works(v.agent.Churn(v.context(), args))
}

// churned is how often it has written its disk and its memory, all of which
// was as it must be.
func (v *vm) churned() guest.Churned {
	v.t.Helper()
	n, err := v.agent.Churned(v.context())
	v.works(err)
	return n
}

// churnsOn waits until it has written both again since.
func (v *vm) churnsOn(since guest.Churned) {
	v.t.Helper()
	v.works(v.agent.ChurnsOn(v.context(), since))
}

func (v *vm) stopChurn() {
	v.t.Helper()
	v.works(v.agent.StopChurn(v.context()))
	v.churned()
}

// works ends the test if the guest does not.
func (v *vm) works(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatalf("in the guest: %v", err)
	}
}

// span is what a measurement cannot tell apart.
type span struct{ least, most time.Duration }

func (s span) String() string { return fmt.Sprintf("%v to %v", s.least, s.most) }

// ahead is by how much the guest's clock is ahead of this host's: each question
// is answered at some time between its start and its end.
func (v *vm) ahead() span {
	v.t.Helper()
	s := span{math.MinInt64, math.MaxInt64}
	for range 10 {
		begin := time.Now()
		var ns int64
		if _, err := fmt.Sscan(v.sh("now"), &ns); err != nil {
			v.t.Fatal(err)
		}
		end, guest := time.Now(), time.Unix(0, ns)
		s.least, s.most = max(s.least, guest.Sub(end)), min(s.most, guest.Sub(begin))
	}
	return s
}

var reservationTypes = map[int]string{
	1: "Write Exclusive", 3: "Exclusive Access", 5: "Write Exclusive, registrants only", 6: "Exclusive Access, registrants only",
	7: "Write Exclusive, all registrants", 8: "Exclusive Access, all registrants",
}

// uptime is the guest's CLOCK_MONOTONIC, as good as, in seconds.
func uptime(v *vm) float64 {
	v.t.Helper()
	var s float64
	if _, err := fmt.Sscan(v.sh("cat /proc/uptime"), &s); err != nil {
		v.t.Fatal(err)
	}
	return s
}

// migrating begins a migration that takes its time, and returns when memory is
// being copied.
func migrating(t *testing.T, name, address string) *vm {
	t.Helper()
	m := start(t, "migrate", name, address, "--max-bandwidth", "8M", "-o", "json")
	if err := m.console.Wait(m.t.Context(), m.exited, func(s string) bool { return strings.Contains(s, `"round":1`) }); err != nil {
		t.Fatalf("vmm migrate: %v\n%s", err, m.stderr)
	}
	return m
}

// A third node preempts the guest's key while the guest is moving: it stays
// fenced wherever it runs.
func TestMigrateFenced(t *testing.T) {
	lun := needLIO(t, "fenced", 64<<20, 3)
	third := lun.Nexuses[2]
	v := boot(t, cloud, "guest.work=agent", "--lun", "id=data,path="+lun.Nexuses[0].SG)
	v.connect()
	disk := v.diskOf(0)
	v.reserve(disk, 5)
	w, address := receive(t, "arrived")
	m := migrating(t, "test", address)
	const other = "0xabc"
	local(t, "sg_turs "+third.SG+" || sg_turs "+third.SG)
	local(t, fmt.Sprintf("sg_persist -n -o -G -S %s %s && sg_persist -n -o -P -K %[1]s -S %[3]s -T 5 %[2]s", other, third.SG, guestKey))
	if status := m.wait(); status != 0 {
		t.Fatalf("vmm migrate ended with %d; want 0: a fenced guest may move\n%s", status, m.stderr)
	}
	if !strings.Contains(m.console.String(), "another node fenced the guest") {
		t.Errorf("the summary does not say that the guest was fenced:\n%s", tail(m.console.String(), 1))
	}
	v.wait()
	if status := registrants(t, third); strings.Count(status, "Key=") != 1 || !strings.Contains(status, "Key="+other) {
		t.Errorf("READ FULL STATUS shows\n%s\nwant the third node's registration alone", status)
	}
	w.dial()
	if out, status := w.try("dd if=/dev/zero of=" + disk + " bs=4096 count=1 oflag=direct 2>&1"); status == 0 {
		t.Errorf("the fenced guest writes: %s", out)
	}
	if out, status := w.try("sg_persist -n -o -G -K " + guestKey + " -S " + guestKey + " " + disk); status == 0 {
		t.Errorf("the fenced guest is still registered: %s", out)
	}
	w.poweroff()
}

// Whatever ends a migration before the guest is handed over, it runs on where
// it was, with what it had.
func TestMigrateGivenUp(t *testing.T) {
	lun := needLIO(t, "givenup", 64<<20, 3)
	third := lun.Nexuses[2]
	v := boot(t, cloud, "guest.work=agent", "--lun", "id=data,path="+lun.Nexuses[0].SG)
	v.connect()
	disk := v.diskOf(0)
	v.reserve(disk, 5)
	want := registrants(t, third)
	for _, test := range []struct {
		name string
		end  func(m, w *vm)
		says string
	}{
		{"canceled by a signal", func(m, _ *vm) { m.cmd.Process.Signal(syscall.SIGINT) }, "canceled"},
		{"canceled from elsewhere", func(*vm, *vm) { local(t, filepath.Join(stage, "vmm")+" migrate test --cancel") }, "canceled"},
		{"the destination is killed", func(_, w *vm) { w.cmd.Process.Kill() }, "runs on here"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w, address := receive(t, "arrived")
			m := migrating(t, "test", address)
			test.end(m, w)
			if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), test.says) {
				t.Errorf("vmm migrate ended with %d, %q; want 1, and to hear %q", status, m.stderr, test.says)
			}
			v.sh("fill -offset 1048576 -size 1048576 " + disk)
			if got := registrants(t, third); got != want {
				t.Errorf("READ FULL STATUS shows\n%s\nwant what it was:\n%s", got, want)
			}
		})
	}
	v.poweroff()
}

// A guest that dirties its memory faster than the link carries it: without a
// limit on the time it is slowed until what is left fits the downtime; with one
// it runs on where it was, at full speed again.
func TestMigrateBusy(t *testing.T) {
	lun := needLIO(t, "busy", 64<<20, 2)
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2", "--lun", "id=data,path="+lun.Nexuses[0].SG)
	v.connect()
	v.churn("-memory 33554432 -rest 0 -offset 1048576 " + v.diskOf(0))

	w, address := receive(t, "arrived")
	m := start(t, "migrate", "test", address, "--max-bandwidth", "4M", "--timeout", "30s", "-o", "json")
	if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), "the guest runs on here") {
		t.Errorf("vmm migrate ended with %d, %q; want 1, and to hear that the guest runs on here", status, m.stderr)
	}
	t.Logf("%s", m.stderr)
	v.churnsOn(v.churned())
	m = start(t, "migrate", "test", address, "--max-bandwidth", "4M", "-o", "json")
	if status := m.wait(); status != 0 {
		t.Fatalf("vmm migrate ended with %d\n%s", status, m.stderr)
	}
	throttle := 0
	var last *vmmv1.MigrateResponse
	for line := range strings.Lines(m.console.String()) {
		last = new(vmmv1.MigrateResponse)
		if err := protojson.Unmarshal([]byte(line), last); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		throttle = max(throttle, int(last.GetProgress().GetThrottle()))
	}
	s := last.GetSummary()
	t.Logf("slowed by %d%% at most; %d rounds, %.1f MiB in %.1f s, downtime %v", throttle, s.GetRounds(), float64(s.GetSentBytes())/(1<<20),
		float64(s.GetTotalUs())/1e6, time.Duration(s.GetDowntime().GetTotalUs())*time.Microsecond)
	if throttle == 0 {
		t.Errorf("the guest was never slowed: %s", m.console)
	}
	v.wait()
	w.dial()
	w.churnsOn(w.churned())
	w.stopChurn()
	w.poweroff()
}
