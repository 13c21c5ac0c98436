// Package twohosts runs vmm on two lab hosts. A LUN that one of them keeps is an
// iSCSI disk of both, each under a name of its own; a second network is there
// for migrations, and can be cut. The tests run outside, on whatever machine,
// and order the hosts through their agents; scripts/guests builds the test
// binary, puts what the hosts need beside it and names that directory in
// VMM_TEST_GUESTS.
package twohosts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/tests/guest"
	"vmm/tests/lab"
	"vmm/tests/lab/agent"
	"vmm/tests/lab/lio"
)

// stage is the directory with vmm, the kernels and this program; the hosts have
// it as /share.
var stage = os.Getenv("VMM_TEST_GUESTS")

// TestMain is also what this program does in a host.
func TestMain(m *testing.M) {
	flag.Parse()
	if args := flag.Args(); len(args) > 0 {
		if err := inHost(args[0], args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if stage == "" {
		fmt.Println("twohosts: these tests boot guests in two lab hosts; run them with make soak")
		return
	}
	os.Exit(m.Run())
}

const (
	lunSize = 64 << 20
	portal  = "10.1.0.1:3260"
)

// What a host's devices are.
type devices struct {
	Target string
	LUN    lio.Device // by iSCSI
	Third  lio.Device // of the target's host: a third node's nexus
}

// inHost makes the LUN and gives it to the initiators (target INITIATOR...), or
// logs in to it (login INITIATOR TARGET), and prints the devices; or it prints
// the states of a guest (watch NAME), or is a source of another version (relay
// FROM TO).
func inHost(what string, args []string) (err error) {
	ctx := context.Background()
	var d devices
	switch {
	case what == "target":
		l, err := lio.Create(ctx, lio.Config{Name: "shared", Size: lunSize, Nexuses: 1})
		if err != nil {
			return err
		}
		p, err := l.ExportISCSI(portal, args...)
		if err != nil {
			return err
		}
		d.Target, d.Third = p.Target, l.Nexuses[0].Device
	case what == "login" && len(args) == 2:
		if d.LUN, err = lio.Login(ctx, args[0], args[1], portal); err != nil {
			return err
		}
	case what == "watch" && len(args) == 1:
		return watch(ctx, args[0])
	case what == "relay" && len(args) == 2:
		return relay(args[0], args[1])
	default:
		return fmt.Errorf("not a thing to do in a host: %s %v", what, args)
	}
	return json.NewEncoder(os.Stdout).Encode(d)
}

// watch prints each state that a guest is in, in a line.
func watch(ctx context.Context, name string) error {
	dir, err := control.DefaultRunDir()
	if err != nil {
		return err
	}
	client, err := dir.Dial(name)
	if err != nil {
		return err
	}
	defer client.Close()
	events, err := client.Events(ctx, connect.NewRequest(&vmmv1.EventsRequest{}))
	if err != nil {
		return err
	}
	for events.Receive() {
		switch e := events.Msg(); e.Kind {
		case "state":
			fmt.Println(e.State)
		case "missed":
			return errors.New("events were missed")
		}
	}
	return events.Err()
}

// host is one of the two.
type host struct {
	*lab.Host
	t       *testing.T
	name    string // one, two
	address string // in the network of migrations
	lun     lio.Device
}

// pair is both, what they share, and what is between them.
type pair struct {
	one, two *host
	third    lio.Device // of host one
	net      *network
}

// startTime is how long anything may take that starts something; everything is
// emulated, on a machine with other work.
const startTime = 10 * time.Minute

func initiator(name string) string { return "iqn.2026-01.lab:" + name }

func startPair(t *testing.T) *pair {
	t.Helper()
	begin := time.Now()
	storageOne, storageTwo, err := lab.Cable()
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{net: newNetwork()}
	moveOne, moveTwo, err := lab.TappedCable(p.net.pass)
	if err != nil {
		t.Fatal(err)
	}
	start := func(name string, number int, memory int64, storage, move *os.File, more ...string) *host {
		h := &host{t: t, name: name, address: fmt.Sprintf("10.2.0.%d", number)}
		ctx, cancel := context.WithTimeout(t.Context(), startTime)
		defer cancel()
		var err error
		h.Host, err = lab.Start(ctx, lab.Config{
			Name: name, Memory: memory, Share: stage, Programs: []string{"vmm"}, Initiator: true, QEMU: more,
			NICs: []lab.NIC{{End: storage, Address: fmt.Sprintf("10.1.0.%d/24", number)}, {End: move, Address: h.address + "/24"}},
		})
		if err != nil {
			t.Error(err)
			return nil
		}
		return h
	}
	var wg sync.WaitGroup
	// They are not alike: host two has less memory, and a processor without adx.
	wg.Go(func() { p.one = start("one", 1, 2560<<20, storageOne, moveOne) })
	wg.Go(func() { p.two = start("two", 2, 1024<<20, storageTwo, moveTwo, "-cpu", lab.Processor+",-adx") })
	wg.Wait()
	// The initiator's host goes first: a session without its target waits.
	for _, h := range []*host{p.one, p.two} {
		if h != nil {
			t.Cleanup(func() {
				if err := h.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	d := p.one.do("target", initiator("one"), initiator("two"))
	p.third = d.Third
	for _, h := range []*host{p.one, p.two} {
		h.lun = h.do("login", initiator(h.name), d.Target).LUN
		h.sh("sg_turs " + h.lun.SG + " || sg_turs " + h.lun.SG) // takes its unit attentions away
	}
	p.one.sh("sg_turs " + p.third.SG + " || sg_turs " + p.third.SG)
	t.Logf("two hosts with one iSCSI LUN after %.1f s", time.Since(begin).Seconds())
	return p
}

// do has this program do something in the host.
func (h *host) do(what string, args ...string) (d devices) {
	h.t.Helper()
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(h.t.Context(), startTime)
	defer cancel()
	out, err := h.Command(ctx, "/share/"+filepath.Base(self), append([]string{what}, args...)...).Output()
	if err == nil {
		err = json.Unmarshal(out, &d)
	}
	if err != nil {
		h.t.Fatalf("host %s: %v", h.name, err)
	}
	return d
}

// try runs a script in the host.
func (h *host) try(script string) (string, error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), startTime)
	defer cancel()
	out, err := h.Command(ctx, "sh", "-c", script).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// sh runs a script in the host, which must succeed.
func (h *host) sh(script string) string {
	h.t.Helper()
	out, err := h.try(script)
	if err != nil {
		h.t.Fatalf("host %s: %s: %v\n%s", h.name, script, err, out)
	}
	return out
}

// put writes a file in the host, which nobody else reads.
func (h *host) put(path string, data []byte) {
	h.t.Helper()
	cmd := h.Command(h.t.Context(), "sh", "-c", fmt.Sprintf("mkdir -p %s && umask 077 && cat > %s", filepath.Dir(path), path))
	cmd.Stdin = bytes.NewReader(data)
	if err := cmd.Run(); err != nil {
		h.t.Fatalf("host %s: write %s: %v", h.name, path, err)
	}
}

// process is a vmm that runs in a host.
type process struct {
	t              *testing.T
	at             *host
	cmd            *agent.Cmd
	stdout, stderr *guest.Output
	ended          chan struct{}
	err            error
}

// start runs vmm in the host and waits for nothing.
func (h *host) start(args ...string) *process {
	h.t.Helper()
	p := &process{t: h.t, at: h, stdout: guest.NewOutput(), stderr: guest.NewOutput(), ended: make(chan struct{})}
	p.cmd = h.Command(h.t.Context(), "/share/vmm", args...)
	p.cmd.Stdout, p.cmd.Stderr = p.stdout, p.stderr
	if err := p.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	h.t.Cleanup(func() {
		if h.t.Failed() {
			h.t.Logf("host %s: vmm %s: %v\nstderr:\n%s\nend of its output:\n%s", h.name, strings.Join(args, " "), p.status(), p.stderr, tail(p.stdout.String()))
		}
	})
	return p
}

func (p *process) status() string {
	select {
	case <-p.ended:
		return fmt.Sprint(p.err)
	default:
		return "runs"
	}
}

// wait returns vmm's exit status; -1 for a killed process.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(startTime):
		p.t.Fatalf("%v runs on after %v\n%s", p.cmd.Args, startTime, p.stderr)
	}
	if e, ok := errors.AsType[*agent.ExitError](p.err); ok {
		return e.ExitCode()
	}
	if p.err != nil {
		p.t.Fatal(p.err)
	}
	return 0
}

// strike is kill -9: after it the process does nothing any more, though its end
// may take the host a while.
func (p *process) strike() {
	p.t.Helper()
	if err := p.cmd.Signal(unix.SIGKILL); err != nil {
		p.t.Fatal(err)
	}
	p.at.sh(":") // the agent takes one thing after the other
}

// kill is strike, and the wait for the process's end.
func (p *process) kill() {
	p.t.Helper()
	p.strike()
	p.wait()
}

// await waits until an output matches a regular expression.
func (p *process) await(o *guest.Output, text string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), startTime)
	defer cancel()
	if err := o.Wait(ctx, p.ended, regexp.MustCompile(text).MatchString); err != nil {
		p.t.Fatalf("%v (%s) has not written %q: %v\n%s\n%s", p.cmd.Args, p.status(), text, err, p.stderr, tail(p.stdout.String()))
	}
}

func tail(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// vm is a guest, wherever it is.
type vm struct {
	*process
	serial string // socket of its second UART, in the host
	agent  *guest.Guest
}

// boot starts a guest in h that has the LUN, and waits for its agent.
func boot(h *host) *vm {
	h.t.Helper()
	v := &vm{serial: "/run/serial-0"}
	v.process = h.start("run", "web1", "--kernel", "/share/cloud/bzImage", "--initrd", "/share/cloud/initrd", "--cpus", "2", "--memory", "192M", "--cpu", "x86-64-v2",
		"--cmdline", "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog guest.work=agent",
		"--serial", v.serial, "--lun", "id=data,path="+h.lun.SG)
	v.await(v.stdout, "guest: init")
	v.dial()
	return v
}

// dial reaches the guest's agent where the guest is.
func (v *vm) dial() {
	v.t.Helper()
	if v.agent != nil {
		v.agent.Close()
	}
	ctx, cancel := context.WithTimeout(v.t.Context(), startTime)
	defer cancel()
	conn, err := v.at.Dial(v.t.Context(), v.serial)
	if err != nil {
		v.t.Fatal(err)
	}
	if v.agent, err = guest.Dial(ctx, conn); err != nil {
		v.t.Fatal(err)
	}
}

// in runs a script in the guest, which must succeed.
func (v *vm) in(script string) (out string) {
	v.t.Helper()
	v.ask(func(ctx context.Context) (err error) {
		out, err = v.agent.Must(ctx, script)
		return err
	})
	return out
}

// ask asks something of the guest, which must succeed in time.
func (v *vm) ask(f func(context.Context) error) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.t.Context(), startTime)
	defer cancel()
	if err := f(ctx); err != nil {
		v.t.Fatalf("in the guest: %v", err)
	}
}

// poweroff powers the guest off from inside; vmm must end with 0.
func (v *vm) poweroff() {
	v.t.Helper()
	go v.agent.Run(v.t.Context(), "poweroff -f") // the answer may be lost with the guest
	if status := v.wait(); status != 0 {
		v.t.Errorf("vmm's exit status after poweroff = %d; want 0", status)
	}
}

var serials int

// receive waits in h for the guest. Host one sees the LUN twice, by the third
// node's nexus too, and has to be told by which.
func receive(h *host, flags ...string) *vm {
	h.t.Helper()
	serials++
	v := &vm{serial: fmt.Sprintf("/run/serial-%d", serials)}
	if h.name == "one" {
		flags = append(flags, "--lun", "id=data,path="+h.lun.SG)
	}
	v.process = h.start(append([]string{"receive", "web1", "--listen", "tcp://" + h.address + ":4444", "--serial", v.serial}, flags...)...)
	v.await(v.stderr, "waiting for a guest")
	return v
}

// migrate begins to move the guest of h to another host.
func migrate(h, to *host, flags ...string) *process {
	return h.start(append([]string{"migrate", "web1", "tcp://" + to.address + ":4444", "-o", "json"}, flags...)...)
}

// late says that a migration met a deadline, as it can on a machine with other
// work, where an emulated host comes to a stand for seconds. The guest has to be
// where it was then, with what it had.
func (p *process) late() bool {
	p.t.Helper()
	if p.wait() != 1 {
		return false
	}
	for _, says := range []string{"did not answer in time", "the other side closed the connection", "i/o timeout", "deadline exceeded"} {
		if strings.Contains(p.stderr.String(), says) {
			lines := strings.Split(strings.TrimSpace(p.stdout.String()), "\n")
			p.t.Logf("TOO SLOW, again: %s%s", p.stderr, lines[len(lines)-1])
			return true
		}
	}
	return false
}

// attempts is how often a migration is tried that is late.
const attempts = 3

// summary is what a migration said at its end.
func (p *process) summary() *vmmv1.MigrationSummary {
	p.t.Helper()
	lines := strings.Split(strings.TrimSpace(p.stdout.String()), "\n")
	var m vmmv1.MigrateResponse
	if err := protojson.Unmarshal([]byte(lines[len(lines)-1]), &m); err != nil || m.GetSummary() == nil {
		p.t.Fatalf("%v ends with %q; want a summary (%v)", p.cmd.Args, lines[len(lines)-1], err)
	}
	return m.GetSummary()
}

const guestKey = "0x1122334455667788"

// reserve gives the guest's disk a reservation of a type.
func (v *vm) reserve(typ int) {
	v.t.Helper()
	v.in(fmt.Sprintf("sg_persist -n -o -G -S %s /dev/sda && sg_persist -n -o -R -K %[1]s -T %[2]d /dev/sda", guestKey, typ))
}

func (v *vm) unregister() {
	v.t.Helper()
	v.in("sg_persist -n -o -G -K " + guestKey + " -S 0 /dev/sda")
}

var types = map[int]string{
	1: "Write Exclusive", 3: "Exclusive Access", 5: "Write Exclusive, registrants only", 6: "Exclusive Access, registrants only",
	7: "Write Exclusive, all registrants", 8: "Exclusive Access, all registrants",
}

// wantReserved checks what the target says, by a nexus that has no part in it:
// the guest's registration alone, on h's nexus, with a reservation of the type.
func (p *pair) wantReserved(h *host, typ int) {
	h.t.Helper()
	status := p.one.sh("sg_persist -n -i -s " + p.third.SG)
	if strings.Count(status, "Key=") != 1 || !strings.Contains(status, "Key="+guestKey) || !strings.Contains(status, initiator(h.name)+",") {
		h.t.Errorf("READ FULL STATUS shows\n%s\nwant one registration, %s of %s", status, guestKey, initiator(h.name))
	}
	held := p.one.sh("sg_persist -n -i -r " + p.third.SG)
	if typ < 7 && !strings.Contains(held, guestKey) || !strings.Contains(held, types[typ]) {
		h.t.Errorf("READ RESERVATION shows\n%s\nwant %s, key %s", held, types[typ], guestKey)
	}
}

// intruder writes by the third nexus, which may not, until it is stopped: a
// write that succeeds is an error.
func (p *pair) intruder() (stop func()) {
	t := p.one.t
	t.Helper()
	const script = `touch /run/intruder
while test -e /run/intruder; do
	out=$(sg_raw -s 512 -i /dev/zero %s 2a 00 00 00 00 00 00 00 01 00 2>&1) && echo WROTE
	case $out in *[Rr]eservation\ [Cc]onflict*) echo refused ;; esac
	sleep 0.1
done`
	out := guest.NewOutput()
	cmd := p.one.Command(t.Context(), "sh", "-c", fmt.Sprintf(script, p.third.SG))
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		p.one.sh("rm /run/intruder")
		if err := cmd.Wait(); err != nil {
			t.Errorf("the third node's writer: %v", err)
		}
		refused := strings.Count(out.String(), "refused")
		if refused == 0 || strings.Contains(out.String(), "WROTE") {
			t.Errorf("a third node's writes: %q; want all refused, and some", out)
		}
		t.Logf("a third node's writes were refused %d times", refused)
	}
}

// churn has the guest write its disk and its memory and check both (package
// guest) until stopChurn, past the block that the intruder aims at.
func (v *vm) churn() {
	v.t.Helper()
	v.ask(func(ctx context.Context) error {
		return v.agent.Churn(ctx, "-memory 4194304 -offset 16777216 -rest 100ms /dev/sda")
	})
}

// churned is how often it has written them, all of which was as it must be.
func (v *vm) churned() (n guest.Churned) {
	v.t.Helper()
	v.ask(func(ctx context.Context) (err error) {
		n, err = v.agent.Churned(ctx)
		return err
	})
	return n
}

// churnsOn waits until it has written them again since.
func (v *vm) churnsOn(since guest.Churned) {
	v.t.Helper()
	v.ask(func(ctx context.Context) error { return v.agent.ChurnsOn(ctx, since) })
}

func (v *vm) stopChurn() {
	v.t.Helper()
	v.ask(v.agent.StopChurn)
	v.churned()
}

// does begins what this program does in a host (inHost), and waits until it says
// something.
func (h *host) does(says, what string, args ...string) (out *guest.Output, end func()) {
	h.t.Helper()
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	out = guest.NewOutput()
	cmd := h.Command(h.t.Context(), "/share/"+filepath.Base(self), append([]string{what}, args...)...)
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.awaits(out, says, 1)
	return out, func() {
		_ = cmd.Signal(unix.SIGKILL) // it may have ended by itself
		_ = cmd.Wait()
	}
}

// awaits waits until out has a text so many times.
func (h *host) awaits(out *guest.Output, text string, count int) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), startTime)
	defer cancel()
	if err := out.Wait(ctx, nil, func(have string) bool { return strings.Count(have, text) >= count }); err != nil {
		h.t.Fatalf("host %s: there was %q; want %s: %v", h.name, out, text, err)
	}
}

// watch notes what happens to a guest of h until stop, which returns the states
// that it was in.
func (h *host) watch(name string) (stop func() (states []string)) {
	h.t.Helper()
	out, end := h.does("running", "watch", name)
	return func() []string {
		h.t.Helper()
		before := strings.Count(out.String(), "running")
		// Events come in order: those of a pause and a resume end the watch.
		h.sh("/share/vmm pause " + name + " && /share/vmm resume " + name)
		h.awaits(out, "running", before+1)
		end()
		states := strings.Fields(out.String())
		return states[:len(states)-2]
	}
}
