package e2e

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// What only a host with KVM and SCSI can get wrong: one line that names the
// thing, status 1, nothing left running or locked. The rest is in cmd/vmm and
// machine.
func TestBadInput(t *testing.T) {
	const nobody = 65534
	lun := needLIO(t, "bad", 16<<20, 2)
	free, used := lun.Nexuses[0], lun.Nexuses[1]

	// One nexus is a running guest's.
	holder := boot(t, cloud, "guest.work=agent", "--lun", "path="+used.SG)
	holder.connect()
	dir, err := os.MkdirTemp("", "rundir") // not below a directory that nobody may not enter
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}

	run := func(luns ...string) []string {
		args := []string{filepath.Join(stage, "vmm"), "run", "bad",
			"--kernel", filepath.Join(stage, "cloud", "bzImage"), "--memory", "256M"}
		for _, l := range luns {
			args = append(args, "--lun", "path="+l)
		}
		return args
	}
	hidden := append([]string{"sh", "-c", `mount -t tmpfs none /dev && exec "$@"`, "sh"}, run()...)
	for _, test := range []struct {
		name      string
		args      []string
		asNobody  bool
		namespace bool
		want      []string
	}{
		{name: "KVM absent", args: hidden, namespace: true, want: []string{"/dev/kvm", "no such file"}},
		{name: "KVM forbidden", args: run(), asNobody: true, want: []string{"/dev/kvm", "permission denied", "group"}},
		{name: "LUN forbidden", args: run(free.SG), asNobody: true, want: []string{"LUN " + free.SG, "permission denied"}},
		{name: "LUN in use by a guest", args: run(used.SG), want: []string{"LUN " + used.SG, "in use", "test"}},
		{name: "its disk in use by a guest", args: run(used.Block), want: []string{"LUN " + used.Block, "in use"}},
		{name: "LUN twice", args: run(free.SG, free.Block), want: []string{"LUN " + free.Block, "in use"}},
		{name: "LUN not SCSI", args: run("/dev/ttyS0"), want: []string{"LUN /dev/ttyS0"}},
		{name: "LUN no disk", args: run("/dev/null"), want: []string{"LUN /dev/null"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := exec.Command(test.args[0], test.args[1:]...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
			if test.asNobody {
				cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
			}
			if test.namespace {
				cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
			}
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("vmm ends with %v; want exit status 1", err)
			}
			text := stderr.String()
			if strings.Count(text, "\n") != 1 || !strings.HasPrefix(text, "vmm: ") || stdout.Len() > 0 {
				t.Errorf("stderr = %q, stdout = %q; want one line on stderr", text, stdout.String())
			}
			for _, want := range test.want {
				if !strings.Contains(text, want) {
					t.Errorf("stderr = %q; want %q in it", text, want)
				}
			}
		})
	}
	holder.poweroff()
	// And now the LUN is free again.
	v := boot(t, cloud, "guest.work=poweroff", "--lun", "path="+used.SG, "--lun", "path="+free.Block)
	if status := v.wait(); status != 0 {
		t.Errorf("after the holder's end: exit status %d: %s", status, v.stderr)
	}
}
