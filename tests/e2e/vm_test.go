// Package e2e runs vmm with stock kernels, on the host where it is started: a
// real one with KVM, or one of the lab. scripts/guests builds the test binary,
// puts kernels and the guest's image beside it and names that directory in
// VMM_TEST_GUESTS.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"vmm/tests/guest"
)

// stage is the directory with vmm, the kernels and the guest's images.
var stage = os.Getenv("VMM_TEST_GUESTS")

func TestMain(m *testing.M) {
	flag.Parse()
	if stage == "" {
		fmt.Println("e2e: these tests boot guests; run them with make e2e")
		return
	}
	os.Exit(m.Run())
}

// bootTimeout is how long a guest may take to answer. In the lab everything
// is emulated and shares two processors.
const bootTimeout = 4 * time.Minute

// image names a stock kernel in one of its two formats.
type image struct{ flavour, format string }

func (i image) String() string { return i.flavour + "/" + i.format }

var cloud = image{"cloud", "bzImage"}

// vm is a running vmm process with a guest in it.
type vm struct {
	t       *testing.T
	cmd     *exec.Cmd
	console *guest.Output // the guest's
	stderr  *guest.Output
	serial  string // socket of the guest's second UART
	agent   *guest.Guest
	exited  chan struct{}
	status  int
}

// start runs vmm with args and does not wait for anything.
func start(t *testing.T, args ...string) *vm {
	t.Helper()
	return launch(t, filepath.Join(stage, "vmm"), args...)
}

// launch runs a monitor, ours or another one.
func launch(t *testing.T, program string, args ...string) *vm {
	t.Helper()
	return launchWith(t, nil, program, args...)
}

// launchWith runs a program that reads stdin.
func launchWith(t *testing.T, stdin *os.File, program string, args ...string) *vm {
	t.Helper()
	cmd := exec.Command(program, args...)
	if stdin != nil {
		cmd.Stdin = stdin
	}
	cmd.SysProcAttr = new(syscall.SysProcAttr)
	return supervise(t, cmd)
}

// supervise starts a monitor that is ready to be started, and ends it with the
// test.
func supervise(t *testing.T, cmd *exec.Cmd) *vm {
	t.Helper()
	v := &vm{t: t, cmd: cmd, console: guest.NewOutput(), stderr: guest.NewOutput(), exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = v.console, v.stderr
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		v.cmd.Wait()
		v.status = v.cmd.ProcessState.ExitCode()
		close(v.exited)
	}()
	t.Cleanup(func() {
		if v.agent != nil {
			v.agent.Close()
		}
		v.cmd.Process.Kill()
		select {
		case <-v.exited:
		case <-time.After(killTime):
			// A command that its disk never answers keeps its thread, and so the
			// process and the disk: nothing can follow this.
			panic(fmt.Sprintf("%s cannot be killed:\n%s\nstderr:\n%s\nend of the guest's console:\n%s", cmd,
				stacks(v.cmd.Process.Pid), v.stderr, tail(v.console.String(), 60)))
		}
		if t.Failed() {
			t.Logf("%s\nstderr:\n%s\nend of the guest's console:\n%s", cmd, v.stderr, tail(v.console.String(), 60))
		}
	})
	return v
}

// killTime is how long a killed process may take to end.
const killTime = time.Minute

// stacks is where the threads of a process are in the kernel.
func stacks(pid int) string {
	var b strings.Builder
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", pid))
	for _, path := range tasks {
		stack, _ := os.ReadFile(path)
		fmt.Fprintf(&b, "%s\n%s", path, stack)
	}
	return b.String()
}

// boot starts a guest of a stock kernel with the parameter work and more
// flags of vmm run.
func boot(t *testing.T, k image, work string, flags ...string) *vm {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	if os.Getenv("VMM_TEST_EMULATED") != "" {
		work += " nowatchdog" // it would see ghosts on a busy machine
	}
	args := append([]string{"run", "test",
		"--kernel", filepath.Join(stage, k.flavour, k.format),
		"--initrd", filepath.Join(stage, k.flavour, "initrd"),
		"--cmdline", "console=ttyS0 quiet panic=-1 mitigations=off " + work,
		"--serial", socket}, flags...)
	v := start(t, args...)
	v.serial = socket
	return v
}

// connect waits for the guest's agent.
func (v *vm) connect() {
	v.t.Helper()
	if err := v.console.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, "guest: init") }); err != nil {
		v.t.Fatalf("the guest's first process did not run: %v", err)
	}
	v.dial()
}

// dial reaches the agent of a guest that has booted.
func (v *vm) dial() {
	v.t.Helper()
	conn, err := net.Dial("unix", v.serial)
	if err != nil {
		v.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(v.t.Context(), bootTimeout)
	defer cancel()
	if v.agent, err = guest.Dial(ctx, conn); err != nil {
		v.t.Fatal(err)
	}
}

// sh runs a script in the guest, which must succeed.
func (v *vm) sh(script string) string {
	v.t.Helper()
	out, err := v.agent.Must(v.context(), script)
	if err != nil {
		v.t.Fatalf("in the guest: %v", err)
	}
	return out
}

// try runs a script in the guest and returns its output and status.
func (v *vm) try(script string) (string, int) {
	v.t.Helper()
	out, status, err := v.agent.Run(v.context(), script)
	if err != nil {
		v.t.Fatalf("in the guest: %s: %v", script, err)
	}
	return out, status
}

func (v *vm) context() context.Context {
	ctx, cancel := context.WithTimeout(v.t.Context(), bootTimeout)
	v.t.Cleanup(cancel)
	return ctx
}

// wait returns vmm's exit status.
func (v *vm) wait() int {
	v.t.Helper()
	timer := time.NewTimer(bootTimeout)
	defer timer.Stop()
	select {
	case <-v.exited:
	case <-timer.C:
		v.t.Fatalf("vmm runs on after %v", bootTimeout)
	}
	return v.status
}

// poweroff powers the guest off from inside; vmm must end with 0.
func (v *vm) poweroff() {
	v.t.Helper()
	// The answer may be lost with the guest.
	go v.agent.Run(v.context(), "poweroff -f")
	if status := v.wait(); status != 0 {
		v.t.Errorf("vmm's exit status after poweroff = %d; want 0", status)
	}
}

// local runs a script on the host.
func local(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimRight(string(out), " \t\r\n")
}

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// tryLocal runs a script on the host that may fail.
func tryLocal(t *testing.T, script string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput()
	return string(out), err
}
