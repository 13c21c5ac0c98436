// Package lab starts hosts with nested KVM under QEMU's emulator: machines
// whose /dev/kvm runs stock kernels, with the kernel's SCSI target for LUNs,
// wherever Go, QEMU and Debian's package archive are at hand.
//
//	host, err := lab.Start(ctx, lab.Config{Share: dir})
//	...
//	defer host.Close()
//	out, err := host.Command(ctx, "sg_persist", "-k", "/dev/sg0").Output()
//
// A host keeps nothing: its disk is memory, and it ends with the process that
// started it, however that one ends. What is to stay goes to the shared
// directory.
package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"vmm/tests/lab/agent"
	"vmm/tests/lab/emulator"
	"vmm/tests/lab/kernel"
)

// Config describes a host. The zero value is a good one.
type Config struct {
	Name   string         // its host name; "lab" if empty
	Memory int64          // bytes; 4 GiB if 0
	CPUs   int            // 1 if 0: under more, emulated, a guest now and then ends in a triple fault
	Kernel *kernel.Kernel // Debian's generic kernel if nil; needs kvm_amd, LIO and 9p as modules

	// Share is a directory of the outer machine that the host has as /share,
	// writable; none if empty.
	Share string
	// Programs are files of Share that the host has in its memory: through
	// /share it reads each page of a program's code when it comes to run.
	Programs []string
	// HostRoot gives the host the outer machine's root directory, read-only, as
	// /outer, with /dev, /proc, /sys, /run and /tmp of the host and /share as
	// /mnt, ready for "outer PROGRAM" (chroot /outer PROGRAM).
	HostRoot bool
	// NICs are network interfaces, eth0 and so on.
	NICs []NIC
	// Initiator gives the host an iSCSI initiator: Debian's iscsistart.
	Initiator bool

	Console io.Writer // gets the console's output as it comes, if not nil
	Cmdline string    // more kernel parameters
	QEMU    []string  // more arguments for QEMU
}

// Processor is a host's: everything that the emulator has, but for "rep movsb
// and stosb are fast" (ERMS, FSRM), which is not true of it. A kernel that
// believes it clears and copies pages byte by byte, and where a page still has
// code of somebody who is gone each byte is a slow store: 1.5 ms for one page.
// One without the other does not boot: Linux's memmove takes FSRM for both.
const Processor = "max,+svm,+npt,-erms,-fsrm"

// NIC is one end of a cable between two hosts.
type NIC struct {
	End     *os.File // of a cable; the host owns it after Start, whatever Start returns
	Address string   // IPv4 with prefix length, 10.0.0.1/24
}

// Cable makes a network link of two ends; each goes into the NIC of another
// host.
func Cable() (a, b *os.File, err error) {
	return socketPair(false)
}

// TappedCable is a Cable of which this process holds the middle. It shows each
// Ethernet frame to pass, from one goroutine for each direction: toB says which
// way the frame goes, false drops it, and no other frame of the direction passes
// before pass returns. The cable is gone when a host at one end is.
func TappedCable(pass func(frame []byte, toB bool) bool) (a, b *os.File, err error) {
	middleA, a, err := socketPair(true)
	if err != nil {
		return nil, nil, err
	}
	middleB, b, err := socketPair(true)
	if err != nil {
		middleA.Close()
		a.Close()
		return nil, nil, err
	}
	relay := func(from, to *os.File, toB bool) {
		defer from.Close()
		defer to.Close()
		r := bufio.NewReaderSize(from, 64<<10)
		for {
			// QEMU's stream of frames: four bytes of length, big-endian, each.
			var head [4]byte
			if _, err := io.ReadFull(r, head[:]); err != nil {
				return
			}
			n := binary.BigEndian.Uint32(head[:])
			if n > maxFrame {
				return
			}
			b := make([]byte, 4+n)
			copy(b, head[:])
			if _, err := io.ReadFull(r, b[4:]); err != nil {
				return
			}
			if !pass(b[4:], toB) {
				continue
			}
			if _, err := to.Write(b); err != nil {
				return
			}
		}
	}
	go relay(middleA, middleB, true)
	go relay(middleB, middleA, false)
	return a, b, nil
}

// maxFrame is more than QEMU sends: 64 KiB and headers.
const maxFrame = 128 << 10

// socketPair makes two connected stream sockets. If pollable, the first is in
// non-blocking mode, in the care of Go's poller: only then does Close wake a
// reader.
func socketPair(pollable bool) (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("lab: socketpair: %w", err)
	}
	if err := unix.SetNonblock(fds[0], pollable); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, fmt.Errorf("lab: socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "socketpair"), os.NewFile(uintptr(fds[1]), "socketpair"), nil
}

// Host is a running host.
type Host struct {
	qemu    *process
	client  *agent.Client
	console *console
}

// consoleSize is how much of a host's console output is kept, in bytes.
const consoleSize = 256 << 10

// Start starts a host and waits until it takes commands. When ctx is done
// before that, the host is ended; afterwards it lives until Close.
func Start(ctx context.Context, cfg Config) (_ *Host, err error) {
	// Once QEMU has its own descriptors, ours go: an end that we keep open
	// would hide QEMU's end from us and from the host at the other side.
	var inherited []*os.File
	for _, nic := range cfg.NICs {
		inherited = append(inherited, nic.End)
	}
	closeInherited := func() {
		for _, f := range inherited {
			f.Close()
		}
		inherited = nil
	}
	defer closeInherited()
	if cfg.Kernel == nil {
		if cfg.Kernel, err = kernel.Find(ctx, kernel.Generic); err != nil {
			return nil, err
		}
	}
	image, err := Image(ctx, cfg.Kernel, cfg.Initiator)
	if err != nil {
		return nil, err
	}
	qemu, err := emulator.Find(ctx)
	if err != nil {
		return nil, err
	}
	conn, theirs, err := socketPair(true)
	if err != nil {
		return nil, err
	}
	inherited = append(inherited, theirs)
	args, files, err := cfg.arguments(image, theirs)
	if err != nil {
		conn.Close()
		return nil, err
	}
	h := &Host{console: &console{tail: agent.Tail{Max: consoleSize}, also: cfg.Console}}
	h.qemu, err = startProcess(slices.Concat([]string{qemu.Program}, qemu.Args, args), files, h.console)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("lab: %w", err)
	}
	closeInherited()
	h.client = agent.NewClient(conn)
	if err := h.client.Ping(ctx); err != nil {
		select {
		case <-h.client.Done():
			h.awaitEnd(lastWords)
		default:
		}
		h.kill()
		return nil, fmt.Errorf("lab: host did not start: %w\n%s", err, h.post())
	}
	go h.nudge()
	if len(cfg.Programs) > 0 {
		if err := h.Command(ctx, "sh", append([]string{"-ec", holdPrograms, "sh"}, cfg.Programs...)...).Run(); err != nil {
			h.Kill()
			return nil, fmt.Errorf("lab: programs of %s: %w", cfg.Share, err)
		}
	}
	return h, nil
}

// holdPrograms puts a copy in memory in the place of each file.
const holdPrograms = `mkdir -p /run/share
for f; do
	cp "/share/$f" "/run/share/$f"
	mount --bind "/run/share/$f" "/share/$f"
done`

// nudge interrupts the host once a second. QEMU's VMRUN sets a bit of the
// processor's pending interrupts without its lock (helper_vmrun, at least up to
// 10.0), and now and then it so drops the timer's interrupt that another thread
// has just set. A host that is otherwise idle then never wakes again, and with
// it stand its guests; any interrupt makes it look at its timers.
func (h *Host) nudge() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	go func() {
		<-h.Done()
		cancel()
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_ = h.client.Ping(ctx) // which repeats itself until it is answered
		}
	}
}

// arguments returns QEMU's arguments, and the descriptors it inherits,
// from 3 on.
func (cfg *Config) arguments(image string, port *os.File) ([]string, []*os.File, error) {
	memory, cpus, name := cfg.Memory, cfg.CPUs, cfg.Name
	if memory == 0 {
		memory = 4 << 30
	}
	if cpus == 0 {
		cpus = 1
	}
	if name == "" {
		name = "lab"
	}
	params := []string{
		"console=ttyS0", "panic=-1", "oops=panic", "quiet", "loglevel=4",
		// An emulated machine on a busy one: its watchdogs see ghosts, and
		// whether the timer ticks is not to be asked within ten milliseconds.
		"no_timer_check", "nosoftlockup", "nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1",
		"mitigations=off", "kvm_amd.nested=0", "lab.name=" + name,
	}
	files := []*os.File{port}
	args := []string{
		"-machine", "q35", "-accel", "tcg,thread=multi,tb-size=1024",
		"-cpu", Processor, "-smp", strconv.Itoa(cpus), "-m", strconv.FormatInt(memory>>20, 10),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		// The ELF image: unpacking the other one would cost the emulator 6 s.
		"-kernel", cfg.Kernel.VMLinux, "-initrd", image,
		"-serial", "stdio", "-monitor", "none",
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,fd=3",
		"-device", "virtserialport,chardev=agent,name=vmm.lab.agent",
	}
	share := func(tag, dir, mode string) error {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		if info, err := os.Stat(dir); err != nil {
			return fmt.Errorf("lab: shared directory: %w", err)
		} else if !info.IsDir() {
			return fmt.Errorf("lab: shared directory: %s is not a directory", dir)
		}
		fsdev := "local,id=" + tag + ",security_model=none,multidevs=remap,path=" + strings.ReplaceAll(dir, ",", ",,")
		if mode == "ro" {
			fsdev += ",readonly=on"
		}
		args = append(args, "-fsdev", fsdev, "-device", "virtio-9p-pci,fsdev="+tag+",mount_tag="+tag)
		params = append(params, "lab.share="+tag+":"+mode)
		return nil
	}
	if cfg.Share != "" {
		if err := share("share", cfg.Share, "rw"); err != nil {
			return nil, nil, err
		}
	}
	if cfg.HostRoot {
		if err := share("outer", "/", "ro"); err != nil {
			return nil, nil, err
		}
	}
	for i, nic := range cfg.NICs {
		files = append(files, nic.End)
		id := "net" + strconv.Itoa(i)
		args = append(args,
			"-netdev", fmt.Sprintf("socket,id=%s,fd=%d", id, 3+len(files)-1),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=%s,romfile=,mac=%s", id, macOf(nic.Address)))
		params = append(params, "lab.ip="+nic.Address)
	}
	if cfg.Cmdline != "" {
		params = append(params, cfg.Cmdline)
	}
	args = append(args, "-append", strings.Join(params, " "))
	return append(args, cfg.QEMU...), files, nil
}

// macOf makes a locally administered MAC address that differs where the IPv4
// addresses do.
func macOf(address string) string {
	var ip [4]int
	fmt.Sscanf(address, "%d.%d.%d.%d", &ip[0], &ip[1], &ip[2], &ip[3])
	return fmt.Sprintf("52:54:%02x:%02x:%02x:%02x", ip[0]&255, ip[1]&255, ip[2]&255, ip[3]&255)
}

// Command returns a command to run in the host, after the pattern of
// exec.CommandContext.
func (h *Host) Command(ctx context.Context, name string, args ...string) *agent.Cmd {
	return h.client.Command(ctx, name, args...)
}

// Dial connects to a Unix socket in the host.
func (h *Host) Dial(ctx context.Context, path string) (io.ReadWriteCloser, error) {
	conn, err := h.Command(ctx, "/init", "connect", path).Conn()
	if err != nil {
		return nil, fmt.Errorf("lab: dial %s in the host: %w", path, err)
	}
	return conn, nil
}

// Done is closed when the host no longer takes commands.
func (h *Host) Done() <-chan struct{} { return h.client.Done() }

// Console returns what the host's kernel and its first process have printed;
// of very much, the end.
func (h *Host) Console() string { return string(h.console.tail.Bytes()) }

var trouble = regexp.MustCompile(`(?m)^.*(?:Kernel panic - not syncing|BUG: |Oops: |general protection fault|kernel BUG at|Out of memory: ).*$`)

// Trouble returns an error with the console's output if the host's kernel
// reported a fault of its own.
func (h *Host) Trouble() error {
	console := h.Console()
	if line := trouble.FindString(console); line != "" {
		return fmt.Errorf("lab: the host's kernel reports: %s\n%s", strings.TrimSpace(line), h.post())
	}
	return nil
}

// post returns what a post-mortem needs.
func (h *Host) post() string {
	const most = 8 << 10
	console := bytes.TrimSpace([]byte(strings.ReplaceAll(h.Console(), "\r", "")))
	if len(console) > most {
		console = append([]byte("[...]\n"), console[len(console)-most:]...)
	}
	text := fmt.Sprintf("--- console of the host ---\n%s\n---", console)
	if err := h.qemu.failure(); err != nil {
		text += "\n" + err.Error()
	}
	return text
}

const (
	// closeTime is how long a host may take to power itself off.
	closeTime = 30 * time.Second
	// lastWords is how long QEMU may take to end by itself once its end of the
	// agent's line is gone: it has something to say.
	lastWords = 5 * time.Second
)

func (h *Host) awaitEnd(most time.Duration) {
	select {
	case <-h.qemu.ended:
	case <-time.After(most):
	}
}

// Close powers the host off and waits for its end. The error says whether its
// kernel was in trouble.
func (h *Host) Close() error {
	h.client.PowerOff()
	h.awaitEnd(closeTime)
	h.kill()
	return h.Trouble()
}

// Kill ends the host at once, as a power failure would.
func (h *Host) Kill() { h.kill() }

func (h *Host) kill() {
	h.qemu.kill()
	h.client.Close()
}

// PID returns the process id of the host's QEMU on the outer machine.
func (h *Host) PID() int { return h.qemu.cmd.Process.Pid }

// console is where the host's first serial port goes.
type console struct {
	tail agent.Tail
	also io.Writer
}

func (c *console) Write(p []byte) (int, error) {
	c.tail.Write(p)
	if c.also != nil {
		c.also.Write(p)
	}
	return len(p), nil
}

// process is a child that cannot outlive this one.
type process struct {
	cmd    *exec.Cmd
	stderr agent.Tail
	ended  chan struct{}
	killed sync.Once
	wanted bool  // it was killed from here
	err    error // from Wait
}

func startProcess(args []string, files []*os.File, stdout io.Writer) (*process, error) {
	p := &process{ended: make(chan struct{}), stderr: agent.Tail{Max: 16 << 10}}
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = stdout, &p.stderr
	p.cmd.ExtraFiles = files
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // a Ctrl-C on the terminal is for the lab, which then ends its hosts
	}
	started := make(chan error, 1)
	go func() {
		// The signal is sent when the *thread* that forked ends (prctl(2)), so
		// that thread waits here for as long as the child lives.
		runtime.LockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// kill ends the process, if it has not ended, and waits for its end.
func (p *process) kill() {
	p.killed.Do(func() {
		select {
		case <-p.ended:
			return
		default:
		}
		p.wanted = true
		p.cmd.Process.Kill()
	})
	<-p.ended
}

// failure says how the process failed by itself, or that it is still there.
func (p *process) failure() error {
	select {
	case <-p.ended:
	default:
		return nil
	}
	if p.wanted || p.err == nil && len(p.stderr.Bytes()) == 0 {
		return nil
	}
	return errors.New(strings.TrimSpace(fmt.Sprintf("%s: %v: %s", p.cmd.Args[0], p.err, bytes.TrimSpace(p.stderr.Bytes()))))
}
