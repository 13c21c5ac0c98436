package disk

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// The tests here have two processes on one image. The other one is this test
// binary, which runs the same test with this variable set to the image.
const otherEnv = "DISK_TEST_OTHER"

// other is another process that has an image open.
type other struct {
	t    *testing.T
	cmd  *exec.Cmd
	says *bufio.Scanner
}

func startOther(t *testing.T, image string) *other {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), otherEnv+"="+image)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	o := &other{t, cmd, bufio.NewScanner(stdout)}
	t.Cleanup(func() { o.kill() })
	return o
}

// next is the next line it says.
func (o *other) next() string {
	o.t.Helper()
	if !o.says.Scan() {
		o.t.Fatal("the other process said nothing more")
	}
	return o.says.Text()
}

// await skips lines until it says want.
func (o *other) await(want string) {
	o.t.Helper()
	for o.next() != want {
	}
}

// kill ends the process and returns how many lines it had still said.
func (o *other) kill() (lines int) {
	o.cmd.Process.Kill()
	for o.says.Scan() {
		lines++
	}
	o.cmd.Wait()
	return lines
}

// TestWriterInAnotherProcess has one that writes as fast as it can, and says
// what becomes of its writes whenever that changes. Under a reservation of this
// process none succeeds.
func TestWriterInAnotherProcess(t *testing.T) {
	const theirs, ours = 0x11, 0xee
	write := write10(0, 8, 8)
	if path := os.Getenv(otherEnv); path != "" {
		l := openDisk(t, path, Options{Initiator: "writer"})
		data, last := bytes.Repeat([]byte{theirs}, 4096), "none"
		for {
			c := &scsi.Command{CDB: write, DataOut: [][]byte{data}}
			run(l, c)
			if got := status(t, c); got != last {
				if _, err := fmt.Printf("write %q\n", got); err != nil {
					return
				}
				last = got
			}
		}
	}

	l := nexuses(t, fastDir(t), "parent")[0]
	must := func(o pr.Out) {
		t.Helper()
		if got := out(t, l, o); got != "" {
			t.Fatalf("%v: %s", o.Action, got)
		}
	}
	must(pr.Out{Action: pr.Register, ServiceKey: 1})
	// alone checks that nobody else writes.
	alone := func() {
		t.Helper()
		pattern := bytes.Repeat([]byte{ours}, 4096)
		expect(t, do(t, l, write, pattern, 0), "")
		for range 100 {
			if got := dataIn(do(t, l, read10(0, 8, 8), nil, 4096)); !bytes.Equal(got, pattern) {
				t.Fatal("another process has written although the disk is reserved")
			}
		}
	}
	for range 5 {
		o := startOther(t, l.path)
		o.await(`write "6/29/00"`)
		for i, typ := range []pr.Type{pr.WriteExclusive, pr.ExclusiveAccess, pr.WriteExclusiveAllRegistrants} {
			o.await(`write ""`)
			must(pr.Out{Action: pr.Reserve, Key: 1, Type: typ})
			alone()
			o.await(`write "conflict"`)
			if i < 2 {
				must(pr.Out{Action: pr.Release, Key: 1, Type: typ})
			}
		}
		// Killed in the middle of whatever it does, it holds up nobody.
		must(pr.Out{Action: pr.Release, Key: 1, Type: pr.WriteExclusiveAllRegistrants})
		o.await(`write ""`)
		o.kill()
		must(pr.Out{Action: pr.Reserve, Key: 1, Type: pr.WriteExclusive})
		alone()
		must(pr.Out{Action: pr.Release, Key: 1, Type: pr.WriteExclusive})
	}
}

// TestAttentionInAnotherProcess: a nexus learns there what was done to it
// here, once, and nobody else does.
func TestAttentionInAnotherProcess(t *testing.T) {
	if path := os.Getenv(otherEnv); path != "" {
		l := openDisk(t, path, Options{Initiator: "victim"})
		l.takeAttention()
		if got := out(t, l, pr.Out{Action: pr.Register, ServiceKey: 2}); got != "" {
			t.Fatal(got)
		}
		for last := "none"; ; {
			if got := status(t, do(t, l, testUnitReady, nil, 0)); got != last {
				if _, err := fmt.Printf("ready %q\n", got); err != nil {
					return
				}
				last = got
			}
		}
	}
	luns := nexuses(t, fastDir(t), "parent", "bystander")
	o := startOther(t, luns[0].path)
	o.await(`ready ""`)
	hears := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if got := o.next(); got != fmt.Sprintf("ready %q", w) {
				t.Fatalf("the victim says %s; want %q", got, w)
			}
		}
	}
	must := func(o pr.Out) {
		t.Helper()
		if got := out(t, luns[0], o); got != "" {
			t.Fatalf("%v: %s", o.Action, got)
		}
	}
	must(pr.Out{Action: pr.Register, ServiceKey: 1})
	must(pr.Out{Action: pr.Reserve, Key: 1, Type: pr.WriteExclusiveRegistrantsOnly})
	must(pr.Out{Action: pr.Release, Key: 1, Type: pr.WriteExclusiveRegistrantsOnly})
	hears("6/2a/04", "")
	must(pr.Out{Action: pr.Preempt, Key: 1, ServiceKey: 2})
	hears("6/2a/05", "")
	expect(t, do(t, luns[1], testUnitReady, nil, 0), "") // nothing of that was a bystander's
	if err := luns[0].Reset(); err != nil {
		t.Fatal(err)
	}
	hears("6/29/03", "")
	for _, l := range luns { // a reset is everybody's
		expect(t, do(t, l, testUnitReady, nil, 0), "6/29/03")
		expect(t, do(t, l, testUnitReady, nil, 0), "")
	}
}

// TestKilledWhileReserving kills a process in the middle of its reservation
// commands: the state is that before the command or that after it.
func TestKilledWhileReserving(t *testing.T) {
	script := []pr.Out{
		{Action: pr.RegisterAndIgnoreExistingKey, ServiceKey: 1, APTPL: true},
		{Action: pr.Reserve, Key: 1, Type: pr.WriteExclusiveRegistrantsOnly},
		{Action: pr.Register, Key: 1, ServiceKey: 2},
		{Action: pr.Preempt, Key: 2, ServiceKey: 2, Type: pr.ExclusiveAccess},
		{Action: pr.PreemptAndAbort, Key: 2, ServiceKey: 3, Type: pr.ExclusiveAccess},
		{Action: pr.Release, Key: 2, Type: pr.ExclusiveAccess},
		{Action: pr.Clear, Key: 2},
	}
	if path := os.Getenv(otherEnv); path != "" {
		l := openDisk(t, path, Options{Initiator: "victim"})
		l.takeAttention()
		for i := 0; ; i++ {
			out(t, l, script[i%len(script)])
			if _, err := os.Stdout.WriteString("answered\n"); err != nil {
				return
			}
		}
	}
	bystander, victim := named(t, "bystander"), named(t, "victim")
	full := pr.In{Action: pr.ReadFullStatus, Alloc: 4096}.CDB()
	for round := range 20 {
		// On a real disk, where a sync takes its time.
		l := nexuses(t, t.TempDir(), "bystander")[0]
		if got := out(t, l, pr.Out{Action: pr.Register, ServiceKey: 3}); got != "" {
			t.Fatal(got)
		}
		o := startOther(t, l.path)
		answered := 1 + round
		for range answered {
			o.await("answered")
		}
		answered += o.kill()

		// The script has left some unit attentions.
		for range 4 {
			do(t, l, testUnitReady, nil, 0)
		}
		c := do(t, l, full, nil, 4096)
		expect(t, c, "")
		got := dataIn(c)

		model := pr.NewTarget(pr.Quirks{})
		model.Do(bystander, &pr.Out{Action: pr.Register, ServiceKey: 3})
		var prefixes [2][]byte
		for i := range answered + 1 {
			cdb, list := script[i%len(script)].Encode()
			model.Execute(victim, cdb, list)
			if i >= answered-1 {
				prefixes[i-answered+1] = model.Status().Append(nil)
			}
		}
		if !bytes.Equal(got, prefixes[0]) && !bytes.Equal(got, prefixes[1]) {
			t.Fatalf("after %d answers: % x; want % x or % x", answered, got, prefixes[0], prefixes[1])
		}
	}
}

// gatedFile holds every write until it is let go.
type gatedFile struct {
	file
	entered, gate chan bool
	over          atomic.Bool
}

func (f *gatedFile) pwritev(iov []unix.Iovec, off int64) (int, error) {
	f.entered <- true
	<-f.gate
	n, err := f.file.pwritev(iov, off)
	f.over.Store(true)
	return n, err
}

// TestPreemptAndAbortWaits: it is not answered while a command of the nexus
// that it fences may still reach the medium; and one that comes meanwhile is
// refused.
func TestPreemptAndAbortWaits(t *testing.T) {
	luns := nexuses(t, fastDir(t), "a", "b", "c")
	a, b, c := luns[0], luns[1], luns[2]
	for i, l := range []*LUN{a, b} {
		if got := out(t, l, pr.Out{Action: pr.Register, ServiceKey: pr.Key(i + 1)}); got != "" {
			t.Fatal(got)
		}
	}
	if got := out(t, b, pr.Out{Action: pr.Reserve, Key: 2, Type: pr.WriteExclusiveRegistrantsOnly}); got != "" {
		t.Fatal(got)
	}
	slow := &gatedFile{file: b.file, entered: make(chan bool, 2), gate: make(chan bool)}
	b.file = slow
	for _, l := range luns { // the quick way is open
		expect(t, do(t, l, testUnitReady, nil, 0), "")
		if !l.reservations.Quiet() {
			t.Skip("the file system has no quick way")
		}
	}

	written := make(chan *scsi.Command, 1)
	b.Submit(&scsi.Command{CDB: write1, DataOut: [][]byte{make([]byte, 512)}, Done: func(c *scsi.Command) { written <- c }})
	<-slow.entered
	cdb, list := pr.Out{Action: pr.PreemptAndAbort, Key: 1, ServiceKey: 2, Type: pr.WriteExclusiveRegistrantsOnly}.Encode()
	preempted := make(chan *scsi.Command, 1)
	var overBefore bool
	a.Submit(&scsi.Command{CDB: cdb, DataOut: [][]byte{list}, Done: func(c *scsi.Command) {
		overBefore = slow.over.Load()
		preempted <- c
	}})
	// It is under way when nobody gets in any more without waiting.
	for {
		pass, _, ok := c.reservations.TryEnter(testUnitReady, false)
		if !ok {
			break
		}
		c.reservations.Exit(pass)
		runtime.Gosched()
	}
	late := make(chan *scsi.Command, 1)
	b.Submit(&scsi.Command{CDB: write1, DataOut: [][]byte{make([]byte, 512)}, Done: func(c *scsi.Command) { late <- c }})
	select {
	case <-preempted:
		t.Fatal("PREEMPT AND ABORT was answered while the write was running")
	default:
	}
	close(slow.gate)
	if got := status(t, <-preempted); got != "" || !overBefore {
		t.Errorf("PREEMPT AND ABORT: %q, the write was over: %v", got, overBefore)
	}
	if got := status(t, <-written); got != "" {
		t.Errorf("the write before it: %q", got)
	}
	if got := status(t, <-late); got != pr.RegistrationsPreempted.String() {
		t.Errorf("the write after it: %q; want %v", got, pr.RegistrationsPreempted)
	}
	if got := status(t, do(t, b, write1, make([]byte, 512), 0)); got != "conflict" {
		t.Errorf("the next write: %q; want a conflict", got)
	}
}

// TestReservationsStayBeside: the image keeps them, whoever closes it, and by
// whatever name it is opened.
func TestReservationsStayBeside(t *testing.T) {
	dir := fastDir(t)
	l := nexuses(t, dir, "a")[0]
	if got := out(t, l, pr.Out{Action: pr.Register, ServiceKey: 1}); got != "" {
		t.Fatal(got)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Join(dir, "disk.img"), link); err != nil {
		t.Fatal(err)
	}
	l = openDisk(t, link, Options{Initiator: "a"})
	l.takeAttention()
	if got := out(t, l, pr.Out{Action: pr.Reserve, Key: 1, Type: pr.WriteExclusive}); got != "" {
		t.Errorf("RESERVE with the registration from before: %q", got)
	}
}
