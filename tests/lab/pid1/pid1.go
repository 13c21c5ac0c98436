// Package pid1 is what the first process of a machine without a distribution
// does: mount the kernel's file systems, load modules, run one child that does
// the work, and bury the orphans.
package pid1

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"vmm/tests/lab/initrd"
)

// Env is the environment of everything that runs on such a machine.
var Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=linux", "LC_ALL=C.UTF-8"}

// A Mount is a file system to be mounted.
type Mount struct {
	Source, Target, Type string
	Flags                uintptr
	Data                 string
}

// Basic are the file systems that programs expect.
var Basic = []Mount{
	{"proc", "/proc", "proc", 0, ""},
	{"sysfs", "/sys", "sysfs", 0, ""},
	{"devtmpfs", "/dev", "devtmpfs", 0, ""},
	{"devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666"},
	{"tmpfs", "/dev/shm", "tmpfs", 0, ""},
	{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
	{"tmpfs", "/tmp", "tmpfs", 0, "mode=1777"},
}

// Do mounts a file system; its target is made if need be.
func (m Mount) Do() error {
	if err := os.MkdirAll(m.Target, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	err := unix.Mount(m.Source, m.Target, m.Type, m.Flags, m.Data)
	if err != nil && err != unix.EBUSY { // the kernel may have mounted /dev
		return fmt.Errorf("mount %s (%s, %s) on %s: %w", m.Source, m.Type, m.Data, m.Target, err)
	}
	return nil
}

// Cmdline is the kernel's command line.
type Cmdline string

// ReadCmdline reads it; /proc must be mounted.
func ReadCmdline() (Cmdline, error) {
	b, err := os.ReadFile("/proc/cmdline")
	return Cmdline(strings.TrimSpace(string(b))), err
}

// Fields splits it as the kernel does: at spaces outside double quotes.
func (c Cmdline) Fields() []string {
	quoted := false
	fields := strings.FieldsFunc(string(c), func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return r == ' ' && !quoted
	})
	for i := range fields {
		fields[i] = strings.ReplaceAll(fields[i], `"`, "")
	}
	return fields
}

// Get returns the value of the last key=value.
func (c Cmdline) Get(key string) (value string, ok bool) {
	for _, f := range c.Fields() {
		if k, v, _ := strings.Cut(f, "="); k == key {
			value, ok = v, true
		}
	}
	return value, ok
}

// All returns the values of every key=value, in order.
func (c Cmdline) All(key string) (values []string) {
	for _, f := range c.Fields() {
		if k, v, found := strings.Cut(f, "="); found && k == key {
			values = append(values, v)
		}
	}
	return values
}

// ModuleParameters returns what is given for a module as module.name=value, in
// the form that finit_module(2) takes. - and _ are the same in module names.
func (c Cmdline) ModuleParameters(module string) string {
	var params []string
	for _, f := range c.Fields() {
		name, param, found := strings.Cut(f, ".")
		if found && !strings.Contains(name, "=") && strings.ReplaceAll(name, "-", "_") == module {
			params = append(params, param)
		}
	}
	return strings.Join(params, " ")
}

// LoadModules loads the modules that the image lists, in its order, each with
// its parameters: those of the command line after the defaults. A module that
// does not load is reported and does not stop the others.
func LoadModules(c Cmdline, defaults map[string]string) error {
	list, err := os.ReadFile(initrd.ListFile)
	if err != nil {
		return err
	}
	var failed []error
	for file := range strings.FieldsSeq(string(list)) {
		name, _, _ := strings.Cut(path.Base(file), ".ko")
		name = strings.ReplaceAll(name, "-", "_")
		params := strings.TrimSpace(defaults[name] + " " + c.ModuleParameters(name))
		if err := loadModule(file, params); err != nil {
			failed = append(failed, fmt.Errorf("load module %s (parameters %q): %w", file, params, err))
		}
	}
	return errors.Join(failed...)
}

func loadModule(file, params string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), params, 0)
	if err == unix.EEXIST { // loaded by the kernel itself
		return nil
	}
	return err
}

// Log writes lines to the kernel's console, whatever its log level.
func Log(format string, args ...any) {
	console, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return
	}
	defer console.Close()
	io.WriteString(console, fmt.Sprintf(format, args...)+"\n")
}

// Supervise starts this program again with an argument as the one child that
// does the work, reaps every process that ends, and returns when the child has
// ended. Orphans become children of process 1; in this way os/exec in the
// child and the reaping here do not compete for an exit status.
func Supervise(arg string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	child, err := os.StartProcess(self, []string{self, arg}, &os.ProcAttr{
		Env:   Env,
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Dir:   "/",
	})
	if err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait4: %w", err)
		case pid == child.Pid && (status.Exited() || status.Signaled()):
			return fmt.Errorf("%s %s ended: status %#x", self, arg, uint32(status))
		}
	}
}

// PowerOff ends the machine. It does not return.
func PowerOff() { reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) }

// Reboot starts the machine again. It does not return.
func Reboot() { reboot(unix.LINUX_REBOOT_CMD_RESTART) }

func reboot(cmd int) {
	unix.Sync()
	if err := unix.Reboot(cmd); err != nil {
		Log("reboot(%#x): %v", cmd, err)
	}
	select {}
}
