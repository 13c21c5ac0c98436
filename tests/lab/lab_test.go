package lab

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vmm/tests/lab/agent"
	"vmm/tests/lab/initrd"
	"vmm/tests/lab/kernel"
)

// startTime is how long a host may take on a machine with other work.
const startTime = 5 * time.Minute

func needLab(t *testing.T) {
	t.Helper()
	if os.Getenv("VMM_TEST_LAB") != "1" {
		t.Skip("starts lab hosts; set VMM_TEST_LAB=1")
	}
}

func start(t *testing.T, cfg Config) *Host {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTime)
	defer cancel()
	begin := time.Now()
	h, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("host up after %.1f s", time.Since(begin).Seconds())
	t.Cleanup(func() {
		begin := time.Now()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		t.Logf("host off after %.1f s", time.Since(begin).Seconds())
	})
	return h
}

func output(t *testing.T, h *Host, script string) string {
	t.Helper()
	out, err := h.Command(t.Context(), "sh", "-c", script).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func TestHost(t *testing.T) {
	needLab(t)
	share := t.TempDir()
	if err := os.WriteFile(filepath.Join(share, "in"), []byte("from outside"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(share, "hello"), []byte("#!/bin/sh\necho hello\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	h := start(t, Config{Name: "alpha", Memory: 2 << 30, CPUs: 2, Share: share, Programs: []string{"hello"}, HostRoot: true})
	k, err := kernel.Find(t.Context(), kernel.Generic)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ script, want string }{
		{"uname -n; uname -r; nproc", "alpha\n" + k.Release + "\n2"},
		{"test -c /dev/kvm && cat /sys/module/kvm_amd/parameters/npt", "Y"},
		{"cat /share/in", "from outside"},
		{"mount | grep -c -E ' (/proc|/sys|/dev|/sys/kernel/config|/sys/kernel/debug|/share|/outer) '", "7"},
		{"outer cat /etc/debian_version", strings.TrimSpace(read(t, "/etc/debian_version"))},
		{"outer cat /mnt/in", "from outside"},
		{"/share/hello; df /share/hello | grep -c 9p || true", "hello\n0"},
		{"touch /outer/etc/x 2>/dev/null || echo refused", "refused"},
		{"lsmod | grep -c -E '^(tcm_loop|target_core_file|kvm_amd|sd_mod|sg) '", "5"},
		{"ip -4 -o addr show lo | grep -c 127.0.0.1", "1"},
		{"dmesg | grep -c -E 'Oops|BUG:'; true", "0"},
		// Process 1 reaps orphans.
		{"sh -c 'sleep 0.1 & :'; sleep 0.5; ps -o stat,args | grep -c '^Z'; true", "0"},
		// Modules for later load by name, with parameters.
		{"modprobe scsi_debug dev_size_mb=16 && rmmod scsi_debug && modprobe iscsi_target_mod && echo ok", "ok"},
	} {
		if got := output(t, h, test.script); got != test.want {
			t.Errorf("%s = %q; want %q", test.script, got, test.want)
		}
	}

	output(t, h, "echo from inside > /share/out")
	if got := read(t, filepath.Join(share, "out")); got != "from inside\n" {
		t.Errorf("a file written in /share = %q outside; want \"from inside\\n\"", got)
	}

	err = h.Command(t.Context(), "sh", "-c", "exit 5").Run()
	if e, ok := errors.AsType[*agent.ExitError](err); !ok || e.ExitCode() != 5 {
		t.Errorf("exit 5 = %v; want an ExitError with 5", err)
	}

	// A socket in the host can be dialled from outside.
	serve := h.Command(t.Context(), "outer", "socat", "UNIX-LISTEN:/tmp/echo,fork", "EXEC:cat")
	if h.Command(t.Context(), "outer", "sh", "-c", "command -v socat").Run() == nil {
		if err := serve.Start(); err != nil {
			t.Fatal(err)
		}
		output(t, h, "while ! test -S /tmp/echo; do sleep 0.1; done")
		conn, err := h.Dial(t.Context(), "/tmp/echo")
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "ping")
		got := make([]byte, 4)
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "ping" {
			t.Errorf("echo through a socket in the host = %q, %v; want ping", got, err)
		}
		conn.Close()
		serve.Signal(syscall.SIGTERM)
		serve.Wait()
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The tests of package lio need a kernel with LIO, and root: a host.
func TestLIO(t *testing.T) {
	needLab(t)
	share := t.TempDir()
	build := exec.Command("go", "test", "-c", "-o", filepath.Join(share, "lio.test"), "vmm/tests/lab/lio")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	h := start(t, Config{Memory: 2 << 30, Share: share})
	cmd := h.Command(t.Context(), "/share/lio.test", "-test.v")
	cmd.Env = []string{"VMM_TEST_LIO=1"}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	if bytes.Contains(out, []byte("--- SKIP")) {
		t.Error("a test was skipped in the host, where none may be")
	}
}

func TestCable(t *testing.T) {
	needLab(t)
	a, b, err := Cable()
	if err != nil {
		t.Fatal(err)
	}
	one := start(t, Config{Name: "one", Memory: 1 << 30, NICs: []NIC{{a, "10.9.0.1/24"}}})
	two := start(t, Config{Name: "two", Memory: 1 << 30, NICs: []NIC{{b, "10.9.0.2/24"}}})
	server := one.Command(t.Context(), "nc", "-l", "-p", "7000", "-w", "120")
	var got bytes.Buffer
	server.Stdout = &got
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	output(t, one, "while ! netstat -ltn | grep -q :7000; do sleep 0.1; done")
	output(t, two, "echo hello over the cable | nc -w 60 10.9.0.1 7000")
	if err := server.Wait(); err != nil || got.String() != "hello over the cable\n" {
		t.Errorf("received %q, %v; want \"hello over the cable\\n\"", got.String(), err)
	}
}

func TestTappedCable(t *testing.T) {
	frame := func(s string) string { return "\x00\x00\x00" + string(rune(len(s))) + s }
	held, free := make(chan string), make(chan bool)
	a, b, err := TappedCable(func(f []byte, toB bool) bool {
		if !toB {
			return true
		}
		held <- string(f)
		return <-free
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	// The pieces in which a frame comes are no matter.
	first, second := frame("one"), frame("two")
	io.WriteString(a, first[:2])
	io.WriteString(a, first[2:]+second)
	if got := <-held; got != "one" {
		t.Errorf("the tap is shown %q; want one", got)
	}
	io.WriteString(b, frame("back")) // the other direction is not held up
	got := make([]byte, 8)
	if _, err := io.ReadFull(a, got); err != nil || string(got) != frame("back") {
		t.Errorf("received %q, %v; want the frame", got, err)
	}
	free <- false
	if got := <-held; got != "two" {
		t.Errorf("the tap is shown %q; want two", got)
	}
	free <- true
	got = got[:7]
	if _, err := io.ReadFull(b, got); err != nil || string(got) != second {
		t.Errorf("received %q, %v; want the second frame alone", got, err)
	}
	b.Close()
	if n, err := a.Read(got); err != io.EOF {
		t.Errorf("with the other end gone Read = %d, %v; want EOF", n, err)
	}
}

func TestPanicIsReported(t *testing.T) {
	needLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), startTime)
	defer cancel()
	h, err := Start(ctx, Config{Memory: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	err = h.Command(ctx, "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000").Run()
	if err == nil || !strings.Contains(err.Error(), "connection lost") {
		t.Errorf("a command during a panic = %v; want a lost connection", err)
	}
	if err := h.Close(); err == nil || !strings.Contains(err.Error(), "Kernel panic - not syncing: sysrq triggered crash") {
		t.Errorf("Close after a panic = %v; want the panic's line", err)
	}
}

func TestStartFails(t *testing.T) {
	needLab(t)
	// An initramfs without our init: the kernel panics.
	ctx, cancel := context.WithTimeout(t.Context(), startTime)
	defer cancel()
	_, err := Start(ctx, Config{Memory: 1 << 30, Cmdline: "rdinit=/no/such/init root=/dev/none"})
	if err == nil || !strings.Contains(err.Error(), "Kernel panic - not syncing") {
		t.Errorf("Start of a host without init = %v; want the kernel's panic", err)
	}
	if _, err := Start(t.Context(), Config{Share: "/no/such/dir"}); err == nil || !strings.Contains(err.Error(), "/no/such/dir") {
		t.Errorf("Start with a missing share = %v; want an error that names it", err)
	}
	short, cancel := context.WithTimeoutCause(t.Context(), 2*time.Second, errors.New("too slow"))
	defer cancel()
	if _, err := Start(short, Config{Memory: 1 << 30}); err == nil || !strings.Contains(err.Error(), "too slow") {
		t.Errorf("Start with too little time = %v; want the cause", err)
	}
	if _, err := Start(t.Context(), Config{QEMU: []string{"-device", "no-such-device"}}); err == nil || !strings.Contains(err.Error(), "'no-such-device' is not a valid device model name") {
		t.Errorf("Start with a wrong argument = %v; want QEMU's words", err)
	}
}

// TestMain is also the program of TestNothingOutlivesUs.
func TestMain(m *testing.M) {
	if name := os.Getenv("LAB_TEST_CHILD"); name != "" {
		p, err := startProcess([]string{name, "1000"}, nil, io.Discard)
		if err != nil {
			os.Exit(3)
		}
		os.Stdout.WriteString(strconv.Itoa(p.cmd.Process.Pid) + "\n")
		signal.Ignore(syscall.SIGHUP)
		select {}
	}
	os.Exit(m.Run())
}

// A process started here ends when this process is killed and has no chance to
// clean up.
func TestNothingOutlivesUs(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "LAB_TEST_CHILD=sleep")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 32)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(line[:n])))
	if err != nil {
		t.Fatal(err)
	}
	// It is nobody's child that we could wait for: a pidfd tells its end.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatalf("the child does not run: %v", err)
	}
	defer unix.Close(fd)
	cmd.Process.Kill()
	cmd.Wait()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000)
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			t.Errorf("the child %d outlived its parent by a minute (poll: %v)", pid, err)
			unix.Kill(pid, unix.SIGKILL)
		}
		return
	}
}

func TestProcess(t *testing.T) {
	var out bytes.Buffer
	p, err := startProcess([]string{"sh", "-c", "echo out; echo why >&2; exit 3"}, nil, &out)
	if err != nil {
		t.Fatal(err)
	}
	<-p.ended
	if got, want := p.failure(), "sh: exit status 3: why"; out.String() != "out\n" || got == nil || got.Error() != want {
		t.Errorf("output %q, failure %v; want \"out\\n\", %s", out.String(), got, want)
	}
	p, err = startProcess([]string{"sleep", "1000"}, nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.failure(); err != nil {
		t.Errorf("failure of a running process = %v", err)
	}
	p.kill()
	p.kill()
	if err := p.failure(); err != nil {
		t.Errorf("failure of a process that we killed = %v; want none", err)
	}
	if _, err := startProcess([]string{"/no/such/program"}, nil, io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("start of a missing program = %v; want ErrNotExist", err)
	}
}

func TestTrouble(t *testing.T) {
	for _, test := range []struct {
		console, want string
	}{
		{"[    1.0] SCSI subsystem initialized\nall is well\n", ""},
		{"[    1.0] x\r\n[    2.0] Kernel panic - not syncing: Attempted to kill init!\r\n", "[    2.0] Kernel panic - not syncing: Attempted to kill init!"},
		{"[   12.3] BUG: kernel NULL pointer dereference, address: 0000\n", "[   12.3] BUG: kernel NULL pointer dereference, address: 0000"},
		{"[   12.3] Oops: 0002 [#1] PREEMPT SMP\n", "[   12.3] Oops: 0002 [#1] PREEMPT SMP"},
		{"[ 1.0] general protection fault, probably for non-canonical address\n", "[ 1.0] general protection fault, probably for non-canonical address"},
		{"[ 1.0] Out of memory: Killed process 7\n", "[ 1.0] Out of memory: Killed process 7"},
	} {
		h := &Host{console: &console{tail: agent.Tail{Max: consoleSize}}, qemu: &process{ended: make(chan struct{})}}
		h.console.Write([]byte(test.console))
		err := h.Trouble()
		switch {
		case test.want == "" && err != nil:
			t.Errorf("Trouble with %q = %v; want none", test.console, err)
		case test.want != "" && (err == nil || !strings.Contains(err.Error(), "reports: "+test.want+"\n")):
			t.Errorf("Trouble with %q = %v; want %q", test.console, err, test.want)
		}
	}
}

func TestArguments(t *testing.T) {
	k := &kernel.Kernel{BzImage: "/boot/vmlinuz", VMLinux: "/boot/vmlinux"}
	comma := filepath.Join(t.TempDir(), "a,b")
	if err := os.Mkdir(comma, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Kernel: k, Memory: 3 << 30, CPUs: 4, Name: "x", Share: comma, HostRoot: true, Cmdline: "more=1", QEMU: []string{"-s"},
		NICs: []NIC{{nil, "10.0.0.7/24"}}}
	args, files, err := cfg.arguments("/image", nil)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(args, " ")
	for _, want := range []string{
		"-smp 4 ", "-m 3072 ", "path=" + strings.ReplaceAll(comma, ",", ",,") + " ", "readonly=on ",
		"socket,id=net0,fd=4 ", "mac=52:54:0a:00:00:07 ", "lab.name=x ", "lab.share=share:rw ", "lab.share=outer:ro ", "lab.ip=10.0.0.7/24 more=1 -s",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("arguments = %s; want %q in them", line, want)
		}
	}
	if len(files) != 2 {
		t.Errorf("%d descriptors inherited; want 2", len(files))
	}
	if _, _, err := (&Config{Kernel: k, Share: filepath.Join(comma, "missing")}).arguments("/image", nil); err == nil {
		t.Error("a missing share was accepted")
	}
}

func TestStore(t *testing.T) {
	t.Setenv("VMM_LAB_CACHE", t.TempDir())
	a := testArchive("one")
	first, err := Store(t.Context(), "x", a)
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(first)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Store(t.Context(), "x", testArchive("one"))
	if err != nil || again != first {
		t.Errorf("Store of the same = %s, %v; want %s", again, err, first)
	}
	if after, _ := os.Stat(first); !os.SameFile(before, after) {
		t.Error("Store of the same wrote a new file")
	}
	other, err := Store(t.Context(), "x", testArchive("two"))
	if err != nil || other == first {
		t.Errorf("Store of something else = %s, %v; want another name", other, err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(first)); len(entries) != 2 {
		t.Errorf("the cache has %d entries; want 2", len(entries))
	}

	// An image that is used stays; one that was not for long goes when a new
	// one comes.
	long := time.Now().Add(-2 * unused)
	for _, path := range []string{first, other} {
		if err := os.Chtimes(path, long, long); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Store(t.Context(), "x", testArchive("one")); err != nil {
		t.Fatal(err)
	}
	if _, err := Store(t.Context(), "x", testArchive("three")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(first); err != nil {
		t.Errorf("an image in use was removed: %v", err)
	}
	if _, err := os.Stat(other); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an image unused for two days is still there: %v", err)
	}
}

func testArchive(text string) *initrd.Archive {
	var a initrd.Archive
	a.File("/file", 0o644, []byte(text))
	return &a
}
