// Demo is the main job, shown: on a host with KVM it makes a LUN of the
// kernel's SCSI target, boots a stock Debian kernel on it with vmm, and plays a
// shell session in the guest. scripts/demo runs it here or in a lab host.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"vmm/tests/guest"
	"vmm/tests/lab/lio"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo DIRECTORY (that tests/e2e/stage has filled)")
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 9*time.Minute)
	defer cancel()
	if err := demo(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

const (
	bold  = "\x1b[1m"
	plain = "\x1b[0m"
)

func say(format string, args ...any) { fmt.Printf("\n"+bold+"## "+format+plain+"\n", args...) }

// prompt shows a command as if it had been typed.
func prompt(where, command string) { fmt.Printf(bold+"%s# "+plain+"%s\n", where, command) }

func demo(ctx context.Context, stage string) (err error) {
	say("A LUN of the Linux kernel's SCSI target, seen by this host three times: three I_T nexuses")
	lun, err := lio.Create(ctx, lio.Config{Name: "demo", Size: 64 << 20, Nexuses: 3})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lun.Close()) }()
	mine, next, other := lun.Nexuses[0], lun.Nexuses[1], lun.Nexuses[2]
	fmt.Printf("%s goes to the guest, %s is the one it will move to; %s stays on the host, to look at what the guest did\n", mine.SG, next.SG, other.SG)

	dir, err := os.MkdirTemp("", "demo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	image := filepath.Join(dir, "scratch.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(image, 256<<20); err != nil {
		return err
	}

	say("vmm boots Debian's stock kernel, nothing rebuilt")
	socket := filepath.Join(dir, "agent")
	args := []string{"run", "web1",
		"--kernel", filepath.Join(stage, "cloud/bzImage"), "--initrd", filepath.Join(stage, "cloud/initrd"),
		"--cmdline", "console=ttyS0 quiet panic=-1 guest.work=agent", "--cpus", "2", "--memory", "512M",
		"--lun", "id=data,path=" + mine.SG, "--lun", "id=scratch,path=" + image, "--serial", socket}
	started := time.Now()
	ended, err := vmm(ctx, stage, "guest: init", args...)
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	g, err := guest.Dial(ctx, conn)
	if err != nil {
		return err
	}
	defer g.Close()
	fmt.Printf("(the guest answers %.1f s after vmm was started)\n", time.Since(started).Seconds())

	say("A session in the guest")
	shell := func(command string) (string, error) {
		prompt("guest", command)
		out, err := g.Must(ctx, command)
		fmt.Println(out)
		return out, err
	}
	var sum string
	for _, command := range []string{
		"uname -r",
		"cat /proc/cpuinfo | grep 'model name'",
		"for d in /sys/block/sd*; do echo ${d##*/} $(cat $d/size) blocks, $(cat $d/device/vendor $d/device/model); done",
		"sg_inq /dev/sg0",
		"sg_persist -c /dev/sg0",
		"sg_persist --out --register-ignore --param-sark=0xcafe /dev/sg0 && sg_persist --out --reserve --param-rk=0xcafe --prout-type=5 /dev/sg0",
		"dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null && dd if=/tmp/data of=/dev/sda bs=1M oflag=direct 2>/dev/null && sha256sum < /tmp/data",
	} {
		if sum, err = shell(command); err != nil {
			return err
		}
	}

	say("What the host sees, through the other nexus")
	var read string
	for _, command := range []string{
		"sg_persist --in --read-reservation " + other.SG,
		"dd if=" + other.Block + " bs=1M count=8 iflag=direct 2>/dev/null | sha256sum",
	} {
		prompt("host", command)
		out, err := exec.CommandContext(ctx, "sh", "-c", command).CombinedOutput()
		fmt.Print(string(out))
		if err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		read = strings.TrimSpace(string(out))
	}
	if read != sum {
		return fmt.Errorf("the guest wrote %s, the host reads %s", sum, read)
	}
	fmt.Println("the same checksum: what the guest wrote is on the LUN")

	say("Another vmm waits for the guest, as it would on another host; the guest moves there, running")
	address := "unix://" + filepath.Join(dir, "incoming")
	moved := filepath.Join(dir, "agent2")
	ended2, err := vmm(ctx, stage, "waiting for a guest", "receive", "web2", "--listen", address, "--serial", moved)
	if err != nil {
		return err
	}
	for _, command := range []string{
		"sg_persist --in --read-full-status " + other.SG,
		filepath.Join(stage, "vmm") + " migrate web1 " + address,
		"sg_persist --in --read-full-status " + other.SG,
		filepath.Join(stage, "vmm") + " pr show web2",
	} {
		prompt("host", command)
		cmd := exec.CommandContext(ctx, "sh", "-c", command)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
	}
	if err := <-ended; err != nil {
		return fmt.Errorf("vmm run web1: %w", err)
	}
	fmt.Println("vmm run web1 has ended with status 0; the reservation is on the other nexus, and on no other")
	g.Close()
	if conn, err = net.Dial("unix", moved); err != nil {
		return err
	}
	if g, err = guest.Dial(ctx, conn); err != nil {
		return err
	}
	if read, err = shell("uptime; dd if=/dev/sda bs=1M count=8 iflag=direct 2>/dev/null | sha256sum"); err != nil {
		return err
	}
	if !strings.HasSuffix(read, sum) {
		return fmt.Errorf("the guest wrote %s before it moved and reads %s after", sum, read)
	}
	ended = ended2

	say("The guest powers off; vmm ends with status 0")
	prompt("guest", "poweroff -f")
	go g.Run(ctx, "poweroff -f") // the answer is lost with the guest
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("vmm: %w", err)
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// vmm starts vmm in the foreground, shows what it says, and returns when it has
// said text. ended has its result.
func vmm(ctx context.Context, stage, text string, args ...string) (ended <-chan error, err error) {
	prompt("host", "vmm "+strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, filepath.Join(stage, "vmm"), args...)
	seen := make(chan struct{})
	said := sync.OnceFunc(func() { close(seen) })
	cmd.Stdout, cmd.Stderr = &marker{to: os.Stdout, text: text, seen: said}, &marker{to: os.Stderr, text: text, seen: said}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	result := make(chan error, 1)
	go func() { result <- cmd.Wait() }()
	select {
	case <-seen:
		return result, nil
	case err := <-result:
		return nil, fmt.Errorf("vmm %s ended early: %w", args[0], err)
	}
}

// marker is a writer that passes everything on and calls seen when text goes
// by.
type marker struct {
	to   io.Writer
	text string
	seen func()
	last string // the end of what was written, as long as text
}

func (m *marker) Write(p []byte) (int, error) {
	s := m.last + string(p)
	if strings.Contains(s, m.text) {
		m.seen()
	}
	m.last = s[max(0, len(s)-len(m.text)):]
	return m.to.Write(p)
}
