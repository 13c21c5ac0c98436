// Package guest builds the initramfs of a test guest for a stock kernel, and
// talks to it: it prints one line when its first process runs, loads the
// drivers of a virtual machine, and does what the kernel's command line says.
//
// # Kernel parameters
//
//	guest.work=agent        take commands on the second UART (the default); see [Dial]
//	guest.work=sh           run the script of guest.sh on the console, print
//	                        "guest: status N" and power off
//	guest.work=idle         do nothing
//	guest.work=poweroff     power off
//	guest.work=reboot       reset
//	guest.work=panic        panic (sysrq)
//	guest.work=triplefault  end in a triple fault
//	guest.sh=SCRIPT         base64 (URL alphabet, no padding) of a shell script;
//	                        see [Script]. It implies guest.work=sh
//	guest.port=ttyS1        the agent's port
//	MODULE.PARAMETER=VALUE  also reaches the modules that the image loads
//
// # Marker lines on the console
//
//	guest: init kernel=RELEASE uptime=SECONDS     the first process runs
//	guest: ready uptime=SECONDS                   drivers are loaded, disks are there
//	guest: power button                           it was pressed; the guest powers off
//
// # Programs
//
// Besides busybox and sg3-utils: rdtest (random 4 KiB reads and writes, see
// its usage), fill and sum (a pattern on a block device, its checksum), dirty
// (writes to memory all the time), churn (works memory, disk and clock, and
// checks them), now (the time, in ns).
package guest

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"vmm/tests/lab"
	"vmm/tests/lab/agent"
	"vmm/tests/lab/deb"
	"vmm/tests/lab/initrd"
	"vmm/tests/lab/kernel"
)

// modules are what a virtual machine's devices need. What a kernel has built
// in needs no loading. Disks come last: when they are there, all is.
var modules = []string{
	"button", "evdev", "pvpanic_mmio", "pvpanic_pci",
	"sd_mod", "sg", "virtio_rng", "virtio_pci", "virtio_scsi",
}

// Initrd returns the path of the test guest's initramfs for a kernel, from
// the cache of package lab or built into it.
func Initrd(ctx context.Context, k *kernel.Kernel) (string, error) {
	var a initrd.Archive
	init, err := lab.GoProgram(ctx, "vmm/tests/guest/init")
	if err != nil {
		return "", err
	}
	a.File("/init", 0o755, init)
	for _, name := range []string{"rdtest", "fill", "sum", "dirty", "churn", "now", "beat"} {
		a.Symlink("../init", "/bin/"+name)
	}
	tools, err := filepath.Glob("/usr/bin/sg_*")
	if err != nil {
		return "", err
	}
	if len(tools) == 0 {
		return "", deb.NeedTool("sg_persist", "sg3-utils")
	}
	if err := a.Programs(tools...); err != nil {
		return "", err
	}
	if err := a.Busybox(); err != nil {
		return "", err
	}
	tree, err := initrd.OpenTree(k.Modules)
	if err != nil {
		return "", err
	}
	if err := a.Modules(tree, modules, nil); err != nil {
		return "", err
	}
	a.Dir("/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/mnt")
	a.File("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	a.File("/etc/group", 0o644, []byte("root:x:0:\n"))
	return lab.Store(ctx, "guest-"+k.Release, &a)
}

// maxScript keeps the kernel's command line within its 2,048 bytes.
const maxScript = 1200

// Script returns the kernel parameter that makes the guest run a shell script
// and power off.
func Script(script string) (string, error) {
	if len(script) > maxScript {
		return "", fmt.Errorf("guest: a script of %d bytes; the kernel's command line has room for %d", len(script), maxScript)
	}
	return "guest.sh=" + base64.RawURLEncoding.EncodeToString([]byte(script)), nil
}

// Guest is a running test guest, seen through its agent.
type Guest struct{ *agent.Client }

// Dial waits until the guest's agent answers on conn, the outer end of the
// guest's second UART, and returns the guest, which owns conn from then on.
// After an error conn is closed.
func Dial(ctx context.Context, conn io.ReadWriteCloser) (*Guest, error) {
	g := &Guest{agent.NewClient(conn)}
	if err := g.Ping(ctx); err != nil {
		g.Close()
		return nil, fmt.Errorf("guest: %w", err)
	}
	return g, nil
}

// Run runs a shell script in the guest. It returns what the script wrote
// (standard output and error, in order) and its exit status, or an error if it
// did not run to its end.
func (g *Guest) Run(ctx context.Context, script string) (output string, status int, err error) {
	out, err := g.Command(ctx, "sh", "-c", script).CombinedOutput()
	if e, ok := errors.AsType[*agent.ExitError](err); ok && e.Status.Exited() {
		return string(out), e.ExitCode(), nil
	}
	return string(out), 0, err
}

// Must runs a shell script that is expected to succeed and returns what it
// wrote, without space at the end.
func (g *Guest) Must(ctx context.Context, script string) (string, error) {
	out, status, err := g.Run(ctx, script)
	out = strings.TrimRight(out, " \t\r\n")
	if err == nil && status != 0 {
		err = fmt.Errorf("guest: %s: exit status %d: %s", script, status, out)
	}
	return out, err
}
