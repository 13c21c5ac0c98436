package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"vmm/boot/boottest"
	"vmm/control"
	"vmm/control/controltest"
	"vmm/kvm/kvmtest"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// fakeGuest is the program "fakeguest NAME [deaf]": it leaves a process behind
// that is a guest for everybody who controls it, and ends when that can be
// reached. It has printed a line, and prints what is typed. A deaf one does not
// mind its power button.
func fakeGuest() {
	const child = "VMM_TEST_FAKE_GUEST"
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "fakeguest:", err)
		os.Exit(1)
	}
	if os.Getenv(child) == "" {
		c := &exec.Cmd{Path: "/proc/self/exe", Args: os.Args, Env: append(os.Environ(), child+"=1"), Stderr: os.Stderr}
		out, err := c.StdoutPipe()
		if err == nil {
			err = c.Start()
		}
		if err != nil {
			fail(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			fail(fmt.Errorf("it says %q: %v", line, err))
		}
		os.Exit(0)
	}
	dir, err := control.DefaultRunDir()
	if err != nil {
		fail(err)
	}
	claim, err := dir.Claim(os.Args[1])
	if err != nil {
		fail(err)
	}
	m := controltest.New(os.Args[1])
	m.Console().Write([]byte("booted\n"))
	if !slices.Contains(os.Args, "deaf") {
		m.Button = func() { m.Stop() }
	}
	s := control.NewServer(claim, m, version)
	go s.Serve()
	fmt.Println("ready")
	os.Stdout.Close()
	os.Stderr.Close() // the script waits for its end
	<-m.Ended()
	s.Close(context.Background())
	claim.Close()
	os.Exit(0)
}

// kill kills a process and waits for its end.
func kill(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return err
	}
	for {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
			return err
		}
	}
}

// killGuest is "killguest NAME...": kill -9, and nothing cleans up.
func killGuest(ts *testscript.TestScript, _ bool, names []string) {
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(ts.Getenv("VMM_RUN_DIR"), name+".pid"))
		ts.Check(err)
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		ts.Check(err)
		ts.Check(kill(pid))
	}
}

// check ends a program of the scripts that cannot go on.
func check(err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
}

// number reads a key or a type.
func number(s string) uint64 {
	n, err := strconv.ParseUint(s, 0, 64)
	check(err)
	return n
}

// register is the program "register IMAGE NEXUS KEY [TYPE]": the nexus of that
// name registers, and reserves if there is a type. It is no function of the
// test's own process: what that starts for other scripts has its open files,
// and so its locks, for a moment.
func register() {
	args := os.Args[1:]
	nexus, err := pr.NamedNexus(args[1])
	check(err)
	f, err := pr.Open(args[0], nexus)
	check(err)
	defer f.Close()
	key := pr.Key(number(args[2]))
	do := func(o pr.Out) {
		cdb, list := o.Encode()
		_, a, err := f.Execute(cdb, list)
		if err == nil && !a.OK() {
			err = fmt.Errorf("%v: %v", o.Action, a)
		}
		check(err)
	}
	do(pr.Out{Action: pr.RegisterAndIgnoreExistingKey, ServiceKey: key})
	if len(args) > 3 {
		do(pr.Out{Action: pr.Reserve, Key: key, Type: pr.Type(number(args[3]))})
	}
}

// journal is the program "journal IMAGE HERE THERE KEY": a crash of this host
// has left its journal with the registration of nexus HERE, whose guest moved
// to nexus THERE.
func journal() {
	args := os.Args[1:]
	here, err := pr.NamedNexus(args[1])
	check(err)
	there, err := pr.NamedNexus(args[2])
	check(err)
	dir, err := control.DefaultRunDir()
	check(err)
	d, err := dir.OpenDisk(context.Background(), args[0], "looking", "journal")
	check(err)
	defer d.Close()
	j, err := pr.OpenJournal(os.Getenv("VMM_STATE_DIR"))
	check(err)
	check(j.Write(pr.Entry{LUN: d.Name, Path: args[0], Migration: "1", Key: pr.Key(number(args[3])), Pair: pr.Pair{Old: here, New: there, FullStatus: true}}))
}

// What differs from run to run, in JSON that is compared, beside the
// directories.
var varying = regexp.MustCompile(`"(pid|uptime_seconds|started|version|go)": ("[^"]*"|[0-9.e+]+)`)

// anyImage is the identity of a disk image.
var anyImage = regexp.MustCompile(`(t10\.VMM_)[0-9a-f]{32}`)

// cmpJSON is "cmpjson FILE": standard output is the JSON in testdata/FILE, but
// for what varies. VMM_UPDATE=1 in the environment of go test writes it.
func cmpJSON(ts *testscript.TestScript, _ bool, args []string) {
	got := varying.ReplaceAllString(ts.ReadFile("stdout"), `"$1": "VARIES"`)
	got = strings.ReplaceAll(got, ts.Getenv("VMM_RUN_DIR"), "$VMM_RUN_DIR")
	got = anyImage.ReplaceAllString(got, "${1}VARIES")
	path := filepath.Join(ts.Getenv("TESTDATA"), args[0])
	if os.Getenv("VMM_UPDATE") == "1" {
		ts.Check(os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	ts.Check(err)
	if got != string(want) {
		ts.Fatalf("%s has:\n%s\nstandard output:\n%s", path, want, got)
	}
}

// screen gathers what a guest prints.
type screen struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more sync.Cond
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.more.Broadcast()
	return s.buf.Write(p)
}

func (s *screen) waitFor(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !strings.Contains(s.buf.String(), text) {
		s.more.Wait()
	}
}

// fragile is a guest that prints an exclamation mark and breaks when something is typed.
var fragile = []byte{
	0x66, 0xba, 0xf8, 0x03, 0xb0, '!', 0xee, // mov dx, COM1; mov al, '!'; out dx, al
	0x66, 0xba, 0xfc, 0x03, 0xb0, 0x02, 0xee, // mov dx, MCR; mov al, RTS; out dx, al
	0x66, 0xba, 0xfd, 0x03, // mov dx, LSR
	0xec, 0xa8, 0x01, 0x74, 0xfb, // in al, dx; test al, data ready; jz back to the in
	0x0f, 0x0b, // ud2, with no handler for it: a triple fault
}

// A guest of a few instructions, from one command to the next.
func TestCommandsOnARealGuest(t *testing.T) {
	kvmtest.NeedKVM(t)
	dir, err := os.MkdirTemp("", "vmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("VMM_RUN_DIR", dir)
	image, kernel := filepath.Join(t.TempDir(), "disk.img"), filepath.Join(t.TempDir(), "kernel")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20), boottest.WriteKernel(kernel, boottest.Endless)); err != nil {
		t.Fatal(err)
	}
	args := []string{"run", "web1", "--kernel", kernel, "--memory", "16M", "--lun", "id=root,path=" + image}
	var out screen
	out.more.L = &out.mu
	var errs bytes.Buffer
	ended := make(chan int, 1)
	go func() { ended <- run(t.Context(), args, strings.NewReader(""), &out, &errs) }()
	out.waitFor("!")
	vmm := func(want int, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if got := run(t.Context(), args, strings.NewReader(""), &out, &errs); got != want {
			t.Errorf("vmm %v: status %d; want %d\n%s%s", args, got, want, &out, &errs)
		}
		return out.String() + errs.String()
	}
	for _, test := range []struct {
		status int
		args   []string
		want   string
	}{
		{0, []string{"status", "web1"}, "running"},
		{1, args, fmt.Sprintf("guest web1 runs already (pid %d)", os.Getpid())},
		{0, []string{"pause", "web1"}, "web1 is paused"},
		{0, []string{"pause", "web1"}, "web1 is paused"},
		{0, []string{"ls"}, "paused"},
		{1, []string{"stop", "web1"}, "paused and would not see the power button"},
		{0, []string{"resume", "web1"}, "web1 is running"},
		{0, []string{"pr", "show", "web1"}, "LUN root of guest web1"},
		{0, []string{"pr", "show", image}, "LUN root of guest web1"},
		{1, []string{"pr", "unregister", image, "--key", "1", "-y"}, "guest web1 has it"},
	} {
		if got := vmm(test.status, test.args...); !strings.Contains(got, test.want) {
			t.Errorf("vmm %v: %s; want %q", test.args, got, test.want)
		}
	}
	// A host that never answers: the migration is given up from elsewhere.
	in := filepath.Join(dir, "in")
	ln, err := net.Listen("unix", in)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for range 3 {
		migrated := make(chan string, 1)
		go func() { migrated <- vmm(1, "migrate", "web1", "unix://"+in) }()
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := vmm(0, "status", "web1"); !strings.Contains(got, "migrating to unix://"+in) {
			t.Errorf("vmm status: %s; want to hear of the migration", got)
		}
		if got := vmm(1, "pause", "web1"); !strings.Contains(got, "migrating to unix://"+in) {
			t.Errorf("vmm pause: %s; want to hear of the migration", got)
		}
		vmm(0, "migrate", "web1", "--cancel")
		conn.Close()
		if got := <-migrated; !strings.Contains(got, "runs on here") && !strings.Contains(got, "refused") {
			t.Errorf("vmm migrate: %s; want to hear that the guest runs on here", got)
		}
	}
	// It goes into a file and comes back, as another process would have it.
	t.Setenv("VMM_STATE_DIR", t.TempDir())
	file := filepath.Join(t.TempDir(), "web1.snap")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := vmm(1, "save", "web1", file); !strings.Contains(got, "is there already; --force replaces it") {
		t.Errorf("vmm save over a file: %s", got)
	}
	// Here the guest is in this very process, whose end the commands save and
	// stop would wait for.
	client, err := control.RunDir(dir).Dial("web1")
	if err != nil {
		t.Fatal(err)
	}
	steps, err := client.Save(t.Context(), connect.NewRequest(&vmmv1.SaveRequest{Path: file, Force: true}))
	if err != nil {
		t.Fatal(err)
	}
	for steps.Receive() {
	}
	if err := steps.Err(); err != nil {
		t.Errorf("Save: %v", err)
	}
	steps.Close()
	client.Close()
	if status := <-ended; status != 0 || errs.Len() > 0 {
		t.Errorf("vmm run: status %d, %s; want 0 after vmm save", status, &errs)
	}
	if got := vmm(1, "status", "web1"); !strings.Contains(got, "no such guest runs here") {
		t.Errorf("vmm status after vmm save: %s", got)
	}
	var says screen
	says.more.L = &says.mu
	go func() { ended <- run(t.Context(), []string{"run", "--from", file}, strings.NewReader(""), &out, &says) }()
	says.waitFor("vmm: root: the guest has no registration; nothing had to move.\n")
	if got := vmm(1, "run", "web2", "--from", file); !strings.Contains(got, "--again") {
		t.Errorf("vmm run of a used file: %s", got)
	}
	if client, err = control.RunDir(dir).Dial("web1"); err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := stopByForce(t.Context(), client); err != nil {
		t.Error(err)
	}
	if status := <-ended; status != 0 {
		t.Errorf("vmm run --from: status %d; want 0 after vmm stop", status)
	}
	if left, _ := filepath.Glob(dir + "/web1.*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// The documented configuration file, as it stands, beside the files that it
// names.
func TestRunsTheExampleConfig(t *testing.T) {
	kvmtest.NeedKVM(t)
	run0, err := os.MkdirTemp("", "vmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run0) })
	t.Setenv("VMM_RUN_DIR", run0)
	t.Setenv("VMM_STATE_DIR", t.TempDir())
	dir := t.TempDir()
	example, err := os.ReadFile("../../docs/examples/web1.yaml")
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		boottest.WriteKernel(filepath.Join(dir, "vmlinuz"), boottest.Endless),
		os.WriteFile(filepath.Join(dir, "web1.yaml"), example, 0o600),
		os.WriteFile(filepath.Join(dir, "initrd.img"), []byte("initrd"), 0o600),
		os.WriteFile(filepath.Join(dir, "root.img"), make([]byte, 1<<20), 0o600),
		os.WriteFile(filepath.Join(dir, "shared.img"), make([]byte, 1<<20), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	var out screen
	out.more.L = &out.mu
	var errs bytes.Buffer
	ended := make(chan int, 1)
	args := []string{"run", "--config", filepath.Join(dir, "web1.yaml"), "--memory", "16M", "--cpu", "host", "--lun", "id=third,path=" + filepath.Join(dir, "third.img")}
	if err := os.WriteFile(filepath.Join(dir, "third.img"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	go func() { ended <- run(t.Context(), args, strings.NewReader(""), &out, &errs) }()
	printed := make(chan struct{})
	go func() { out.waitFor("!"); close(printed) }()
	select {
	case <-printed:
	case status := <-ended:
		t.Fatalf("vmm %v: status %d, %s", args, status, &errs)
	}
	client, err := control.RunDir(run0).Dial("web1")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	s, err := ask(t.Context(), client, askTime, client.Status, &vmmv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintf("%s %d %s %d:", s.Name, s.Cpus, s.CpuModel, s.MemoryBytes>>20)
	for _, l := range s.Luns {
		got += fmt.Sprintf(" %s@%d %s", l.Id, l.Target, filepath.Base(l.Path))
	}
	if want := "web1 2 host 16: root@0 root.img shared@4 shared.img third@2 third.img"; got != want {
		t.Errorf("the guest is %q; want %q", got, want)
	}
	if err := stopByForce(t.Context(), client); err != nil {
		t.Error(err)
	}
	if status := <-ended; status != 0 {
		t.Errorf("vmm %v: status %d, %s; want 0", args, status, &errs)
	}
}

func stopByForce(ctx context.Context, c *control.Client) error {
	_, err := ask(ctx, c, askTime, c.Stop, &vmmv1.StopRequest{Force: true})
	return err
}
