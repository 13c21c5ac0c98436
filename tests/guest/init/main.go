// Init is the first program of a test guest; package guest says what it does.
// Called by other names, it is one of the small tools of the guest's tests.
package main

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"vmm/tests/lab/agent"
	"vmm/tests/lab/pid1"
)

func main() {
	tools := map[string]func(args []string) error{"rdtest": rdtest, "fill": fill, "sum": sum, "dirty": dirty, "churn": churn, "now": now, "beat": beat}
	if tool, ok := tools[filepath.Base(os.Args[0])]; ok {
		if err := tool(os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(os.Args[0]), err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "work" {
		if err := work(); err != nil {
			pid1.Log("guest: %v", err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this program is the first process of a test guest")
		os.Exit(2)
	}
	setUp()
	err := pid1.Supervise("work")
	pid1.Log("guest: %v", err)
	pid1.PowerOff()
}

func setUp() {
	report := func(err error) {
		if err != nil {
			pid1.Log("guest: %v", err)
		}
	}
	mounts := pid1.Basic
	for _, m := range mounts[:3] { // proc, sys, dev: as little as possible before the marker
		report(m.Do())
	}
	var uts unix.Utsname
	report(unix.Uname(&uts))
	pid1.Log("guest: init kernel=%s uptime=%s", unix.ByteSliceToString(uts.Release[:]), uptime())
	for _, m := range mounts[3:] {
		report(m.Do())
	}
	cmdline, err := pid1.ReadCmdline()
	report(err)
	for _, entry := range pid1.Env {
		key, value, _ := strings.Cut(entry, "=")
		os.Setenv(key, value)
	}
	report(unix.Sethostname([]byte("guest")))
	// A synchronous scan: the disks are there when the driver has been loaded.
	report(pid1.LoadModules(cmdline, map[string]string{"scsi_mod": "scan=sync"}))
	// The boot was quiet; from here on the console has all that the kernel says,
	// and it says early where a task stands that does not go on.
	report(os.WriteFile("/proc/sys/kernel/printk", []byte("8"), 0))
	report(os.WriteFile("/proc/sys/kernel/hung_task_timeout_secs", []byte("60"), 0))
	pid1.Log("guest: ready uptime=%s", uptime())
}

func uptime() string {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return "?"
	}
	seconds, _, _ := strings.Cut(string(b), " ")
	return seconds
}

// work does what the kernel's command line says.
func work() error {
	go powerButton()
	cmdline, err := pid1.ReadCmdline()
	if err != nil {
		return err
	}
	script, isScript := cmdline.Get("guest.sh")
	what, ok := cmdline.Get("guest.work")
	switch {
	case ok:
	case isScript:
		what = "sh"
	default:
		what = "agent"
	}
	switch what {
	case "agent":
		port, ok := cmdline.Get("guest.port")
		if !ok {
			port = "ttyS1"
		}
		return serve("/dev/" + port)
	case "sh":
		return runScript(script)
	case "idle":
		select {}
	case "poweroff":
		pid1.PowerOff()
	case "reboot":
		pid1.Reboot()
	case "panic":
		return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case "triplefault":
		// The kernel loads an empty interrupt descriptor table and traps.
		if err := os.WriteFile("/sys/kernel/reboot/type", []byte("triple"), 0); err != nil {
			return err
		}
		pid1.Reboot()
	}
	return fmt.Errorf("guest.work=%s: no such work", what)
}

func runScript(encoded string) error {
	script, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		return fmt.Errorf("guest.sh: %w", err)
	}
	console, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	cmd := exec.Command("sh", "-c", string(script))
	cmd.Env = pid1.Env
	cmd.Stdout, cmd.Stderr = console, console
	err = cmd.Run()
	if cmd.ProcessState == nil {
		return err
	}
	pid1.Log("guest: status %d", cmd.ProcessState.ExitCode())
	pid1.PowerOff()
	return nil
}

// serve runs commands for whoever is at the other end of a serial line.
func serve(path string) error {
	// Non-blocking: the open does not wait for a carrier.
	port, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	conn, err := port.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Control(func(fd uintptr) {
		// As cfmakeraw(3), at the highest standard rate; no modem lines.
		failed = unix.IoctlSetTermios(int(fd), unix.TCSETS, &unix.Termios{
			Iflag:  unix.IGNBRK | unix.IGNPAR,
			Cflag:  unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200,
			Ispeed: unix.B115200, Ospeed: unix.B115200,
			Cc: [19]uint8{unix.VMIN: 1},
		})
		if failed == nil {
			failed = unix.IoctlSetInt(int(fd), unix.TCFLSH, unix.TCIFLUSH)
		}
	})
	if err := errors.Join(err, failed); err != nil {
		return fmt.Errorf("%s: raw mode: %w", path, err)
	}
	return agent.Serve(port, agent.Options{Env: pid1.Env, PowerOff: pid1.PowerOff, Chunk: 512})
}

// powerButton powers the guest off when its button is pressed.
func powerButton() {
	devices, _ := filepath.Glob("/dev/input/event*")
	for _, path := range devices {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		go func() {
			defer f.Close()
			// struct input_event: a time of 16 bytes, type, code, value.
			var event [24]byte
			for {
				if _, err := io.ReadFull(f, event[:]); err != nil {
					return
				}
				kind := binary.LittleEndian.Uint16(event[16:])
				code := binary.LittleEndian.Uint16(event[18:])
				value := binary.LittleEndian.Uint32(event[20:])
				const evKey, keyPower, pressed = 1, 116, 1 // linux/input-event-codes.h
				if kind == evKey && code == keyPower && value == pressed {
					pid1.Log("guest: power button")
					pid1.PowerOff()
				}
			}
		}()
	}
}
