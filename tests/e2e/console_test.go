package e2e

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// console attaches to a guest's console. What is written to the keyboard is
// typed there.
func console(t *testing.T, name string, flags ...string) (v *vm, keyboard io.Writer) {
	t.Helper()
	r, w, err := os.Pipe() // not io.Pipe, whose end cmd.Wait would wait for
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return launchWith(t, r, filepath.Join(stage, "vmm"), append([]string{"console", name}, flags...)...), w
}

// A guest in the background: its boot log is there for who comes later, its
// shell answers whoever types, and it runs on when they leave.
func TestConsole(t *testing.T) {
	run := start(t, "run", "test", "--detach",
		"--kernel", filepath.Join(stage, "cloud", "bzImage"), "--initrd", filepath.Join(stage, "cloud", "initrd"),
		"--cmdline", "console=ttyS0 panic=-1 mitigations=off nowatchdog rdinit=/bin/sh")
	if status := run.wait(); status != 0 {
		t.Fatalf("vmm run --detach ends with %d: %s", status, run.stderr)
	}
	t.Cleanup(func() {
		if out, err := exec.Command(filepath.Join(stage, "vmm"), "stop", "test", "--force").CombinedOutput(); err != nil {
			t.Errorf("vmm stop: %v\n%s", err, out)
		}
	})
	first, _ := console(t, "test")
	if err := first.console.Wait(first.t.Context(), first.exited, func(s string) bool { return strings.Contains(s, "# ") }); err != nil {
		t.Fatalf("no prompt: %v", err)
	}
	// Who attaches now reads what was printed before, and types.
	second, keyboard := console(t, "test")
	answers := func(v *vm, text string) {
		t.Helper()
		if err := v.console.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, text) }); err != nil {
			t.Fatalf("waiting for %q: %v", text, err)
		}
	}
	answers(second, "Linux version ")
	io.WriteString(keyboard, "echo $((6*7))fold\r")
	answers(first, "42fold")
	answers(second, "42fold")
	second.cmd.Process.Signal(syscall.SIGTERM)
	if status := second.wait(); status != 0 {
		t.Errorf("vmm console ends with %d: %s; want 0", status, second.stderr)
	}
	third, keyboard := console(t, "test", "--scrollback", "0")
	io.WriteString(keyboard, "echo $((7*7))fold\r")
	answers(third, "49fold")
	answers(first, "49fold")
	if s := third.console.String(); strings.Contains(s, "42fold") {
		t.Errorf("without scrollback: %q", s)
	}
	if got := local(t, filepath.Join(stage, "vmm")+" status test -o json"); !strings.Contains(got, `"state": "running"`) {
		t.Errorf("vmm status: %s; want running", got)
	}
	if got := local(t, filepath.Join(stage, "vmm")+" console test --no-follow"); !strings.Contains(got, "Linux version ") || !strings.Contains(got, "49fold") {
		t.Errorf("vmm console --no-follow: %s; want everything from the boot on", tail(got, 20))
	}
}
