package reservations

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vmm/tests/lab/lio"
)

var hang = flag.Bool("hang", false, "run the test that leaves a logical unit behind which answers nothing any more")

// TestAbortNeverEnds shows why no test sends PREEMPT AND ABORT over tcm_loop.
// LIO carries the command out in the logical unit's submission work, and there
// waits until that very work is done (core_tmr_drain_state_list, since Linux
// 5.13): it never is, and no later command of that processor's queue is ever
// looked at. iSCSI's commands do not take that way.
func TestAbortNeverEnds(t *testing.T) {
	if !*hang {
		t.Skip("leaves the kernel with a logical unit that answers nothing: run it alone, with -hang, in a host to throw away")
	}
	needLIO(t)
	l, err := lio.Create(t.Context(), lio.Config{Name: "abort", Size: 1 << 20, Nexuses: 2}) // nothing can close it
	if err != nil {
		t.Fatal(err)
	}
	a, b := l.Nexuses[0].SG, l.Nexuses[1].SG
	for _, args := range []string{
		"--register --param-sark=0xa " + a,
		"--register --param-sark=0xb " + b,
		"--reserve --param-rk=0xa --prout-type=5 " + a,
	} {
		if out, err := exec.Command("sg_persist", append([]string{"--out"}, strings.Fields(args)...)...).CombinedOutput(); err != nil {
			t.Fatalf("sg_persist %s: %v: %s", args, err, out)
		}
	}
	abort := exec.Command("sg_persist", "--out", "--preempt-abort", "--param-rk=0xb", "--param-sark=0xa", "--prout-type=5", b)
	if err := abort.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- abort.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("PREEMPT AND ABORT over tcm_loop has ended (%v): this kernel can do it, so the comparison can have it", err)
	case <-time.After(20 * time.Second):
	}
	stacks, err := filepath.Glob("/proc/[0-9]*/stack")
	if err != nil {
		t.Fatal(err)
	}
	waits := false
	for _, path := range stacks {
		stack, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(stack), "target_") {
			continue // ended, or not of the target
		}
		t.Logf("%s:\n%s", path, stack)
		waits = waits || strings.Contains(string(stack), "flush_work") && strings.Contains(string(stack), "core_tmr_lun_reset")
	}
	if !waits {
		t.Error("no worker of the target waits for itself: the reason is another one")
	}
}
