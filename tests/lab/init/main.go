// Init is the first program of a lab host. It mounts what a host has, loads
// the modules of its image, configures the network as the kernel's command
// line says, and serves the lab's commands on a virtio-serial port.
//
// It runs in the initramfs itself, not in a chroot: the kernel's SCSI target
// opens its state files in the root that kernel threads see.
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"vmm/kvm"
	"vmm/tests/lab/agent"
	"vmm/tests/lab/pid1"
)

// portName is the virtio-serial port that package lab gives its hosts.
const portName = "vmm.lab.agent"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		pid1.Log("lab: agent: %v", serve())
		os.Exit(1)
	}
	if len(os.Args) == 3 && os.Args[1] == "connect" {
		if err := connect(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "connect:", err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this program is the first process of a lab host")
		os.Exit(2)
	}
	if err := setUp(); err != nil {
		pid1.Log("lab: %v", err) // the agent may still come up and be of use
	}
	err := pid1.Supervise("agent")
	pid1.Log("lab: %v", err)
	pid1.PowerOff()
}

func setUp() error {
	var failed []error
	check := func(err error) {
		if err != nil {
			failed = append(failed, err)
		}
	}
	for _, m := range pid1.Basic {
		check(m.Do())
	}
	cmdline, err := pid1.ReadCmdline()
	check(err)
	for _, entry := range pid1.Env {
		key, value, _ := strings.Cut(entry, "=")
		os.Setenv(key, value)
	}
	name, ok := cmdline.Get("lab.name")
	if !ok {
		name = "lab"
	}
	check(unix.Sethostname([]byte(name)))
	check(pid1.LoadModules(cmdline, map[string]string{
		// Disks are there when the module that makes them has been loaded.
		"scsi_mod": "scan=sync",
	}))
	check(pid1.Mount{Source: "configfs", Target: "/sys/kernel/config", Type: "configfs"}.Do())
	check(pid1.Mount{Source: "debugfs", Target: "/sys/kernel/debug", Type: "debugfs"}.Do())
	check(pid1.Mount{Source: "tracefs", Target: "/sys/kernel/tracing", Type: "tracefs"}.Do())
	check(pid1.Mount{Source: "cgroup2", Target: "/sys/fs/cgroup", Type: "cgroup2"}.Do())
	for _, share := range cmdline.All("lab.share") {
		check(mountShare(share))
	}
	check(holdKVM())
	check(networkUp("lo", "127.0.0.1/8"))
	for i, address := range cmdline.All("lab.ip") {
		check(networkUp(fmt.Sprintf("eth%d", i), address))
	}
	return errors.Join(failed...)
}

// held is a virtual machine that nobody uses.
//
//lint:ignore U1000 holding it is its use
var held *kvm.VM

// holdKVM keeps a virtual machine as long as the host lives. With the first
// one and after the last one the kernel patches its scheduler's code, and
// QEMU's emulator sometimes goes on running the breakpoint that stands there
// meanwhile: both processors then take breakpoints for ever.
func holdKVM() (err error) {
	system, err := kvm.Open(kvm.DefaultPath)
	if err != nil {
		return err
	}
	defer system.Close()
	held, err = system.CreateVM()
	return err
}

// mountShare mounts a directory of the outer machine: TAG:rw or TAG:ro on
// /TAG. The writable one may change at both ends and is not cached. The
// read-only one is the outer machine's root, made into a place to chroot to.
func mountShare(share string) error {
	tag, mode, _ := strings.Cut(share, ":")
	dir := "/" + tag
	options := "trans=virtio,version=9p2000.L,msize=512000"
	if mode == "rw" {
		return pid1.Mount{Source: tag, Target: dir, Type: "9p", Data: options + ",cache=none"}.Do()
	}
	mounts := []pid1.Mount{
		{Source: tag, Target: dir, Type: "9p", Flags: unix.MS_RDONLY, Data: options + ",cache=loose"},
		{Source: "/dev", Target: dir + "/dev", Flags: unix.MS_BIND | unix.MS_REC},
		{Source: "/proc", Target: dir + "/proc", Flags: unix.MS_BIND},
		{Source: "/sys", Target: dir + "/sys", Flags: unix.MS_BIND | unix.MS_REC},
		{Source: "/run", Target: dir + "/run", Flags: unix.MS_BIND},
		{Source: "/tmp", Target: dir + "/tmp", Flags: unix.MS_BIND},
	}
	if _, err := os.Stat("/share"); err == nil {
		mounts = append(mounts, pid1.Mount{Source: "/share", Target: dir + "/mnt", Flags: unix.MS_BIND})
	}
	for _, m := range mounts {
		if err := m.Do(); err != nil {
			return err
		}
	}
	return nil
}

// networkUp gives an interface its IPv4 address and starts it.
func networkUp(name, cidr string) error {
	fail := func(err error) error { return fmt.Errorf("network interface %s, address %s: %w", name, cidr, err) }
	ip, network, err := net.ParseCIDR(cidr)
	if err != nil {
		return fail(err)
	}
	if ip = ip.To4(); ip == nil {
		return fail(errors.New("not IPv4"))
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fd)
	for _, step := range []struct {
		request uint
		address []byte
	}{{unix.SIOCSIFADDR, ip}, {unix.SIOCSIFNETMASK, network.Mask}} {
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return fail(err)
		}
		if err := ifr.SetInet4Addr(step.address); err != nil {
			return fail(err)
		}
		if err := unix.IoctlIfreq(fd, step.request, ifr); err != nil {
			return fail(err)
		}
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fail(err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fail(err)
	}
	return nil
}

// serve answers on the lab's port until the outer end is closed; it returns
// why it does not any more.
func serve() error {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return err
	}
	for _, file := range names {
		if b, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(b)) != portName {
			continue
		}
		port, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return agent.Serve(port, agent.Options{Env: pid1.Env, PowerOff: pid1.PowerOff})
	}
	return fmt.Errorf("no virtio-serial port is called %s", portName)
}

// connect relays between a Unix socket and the standard input and output; it
// is how a program outside dials a socket in the host.
func connect(path string) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() {
		io.Copy(conn, os.Stdin)
		conn.CloseWrite()
	}()
	_, err = io.Copy(os.Stdout, conn)
	return err
}
