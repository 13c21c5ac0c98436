package machine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"vmm/boot"
	"vmm/boot/boottest"
	"vmm/device"
	"vmm/kvm/kvmtest"
	"vmm/scsi/disk"
)

// The tests in this file run guests of a few instructions, which any KVM can
// run. They are ELF kernels with a PVH note: 32-bit code at 1 MiB.

// asm is 32-bit machine code, built by name where a name helps.
type asm []byte

func (a asm) raw(b ...byte) asm { return append(a, b...) }

func (a asm) u16(v int) asm { return binary.LittleEndian.AppendUint16(a, uint16(v)) }
func (a asm) u32(v int) asm { return binary.LittleEndian.AppendUint32(a, uint32(v)) }

func (a asm) outb(port int, v byte) asm {
	return a.raw(0x66, 0xba).u16(port).raw(0xb0, v, 0xee) // mov dx, port; mov al, v; out dx, al
}

func (a asm) outw(port, v int) asm {
	return a.raw(0x66, 0xba).u16(port).raw(0x66, 0xb8).u16(v).raw(0x66, 0xef) // mov dx, port; mov ax, v; out dx, ax
}

func (a asm) print(s string) asm {
	for _, c := range []byte(s) {
		a = a.outb(boot.PortCOM1, c)
	}
	return a
}

func (a asm) poweroff() asm {
	return a.outw(boot.PortPM+device.PMControl, device.SleepTypeS5<<10|1<<13).forever()
}
func (a asm) reset() asm   { return a.outb(boot.PortReset, 6).forever() }
func (a asm) forever() asm { return a.raw(0xeb, 0xfe) } // jmp .

// kernelFile writes code as a kernel.
func kernelFile(t testing.TB, code asm) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kernel")
	if err := boottest.WriteKernel(path, code); err != nil {
		t.Fatal(err)
	}
	return path
}

// console gathers the guest's output and lets a test wait for some.
type console struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more sync.Cond
}

func newConsole() *console {
	c := &console{}
	c.more.L = &c.mu
	return c
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.more.Broadcast()
	return c.buf.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

func (c *console) waitFor(s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !strings.Contains(c.buf.String(), s) {
		c.more.Wait()
	}
}

func newMachine(t testing.TB, code asm, change func(*Config)) (*Machine, *console) {
	t.Helper()
	kvmtest.NeedKVM(t)
	out := newConsole()
	cfg := Config{Name: "test", CPUs: 1, Memory: 16 << 20, CPU: CPUHost, Kernel: kernelFile(t, code),
		Console: out, RunDir: t.TempDir(), Warn: func(s string) { t.Errorf("warning: %s", s) }}
	if change != nil {
		change(&cfg)
	}
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 2 {
			if err := m.Close(); err != nil {
				t.Errorf("Close() = %v", err)
			}
		}
	})
	return m, out
}

func TestGuestPrintsAndPowersOff(t *testing.T) {
	m, out := newMachine(t, asm{}.print("hello").poweroff(), func(c *Config) { c.CPUs = 3 })
	if err := m.Run(t.Context()); err != nil {
		t.Errorf("Run() = %v; want nil after a power-off", err)
	}
	if got := out.String(); got != "hello" {
		t.Errorf("console = %q; want \"hello\"", got)
	}
}

// countBoots increments a byte of RAM that no loader touches, prints a dot for
// each boot so far, and resets until there were three.
func countBoots() asm {
	const counter = 0x300000
	a := asm{}.print(".")
	a = a.raw(0xfe, 0x05).u32(counter)        // inc byte [counter]
	a = a.raw(0x80, 0x3d).u32(counter).raw(3) // cmp byte [counter], 3
	off := asm{}.poweroff()
	a = a.raw(0x75, byte(len(off))) // jne reset
	return append(a, off...).reset()
}

func TestResetBootsAgain(t *testing.T) {
	m, out := newMachine(t, countBoots(), func(c *Config) { c.CPUs = 2 })
	if err := m.Run(t.Context()); err != nil {
		t.Errorf("Run() = %v", err)
	}
	if got := out.String(); got != "..." {
		t.Errorf("console = %q; want three boots", got)
	}
}

func TestNoRebootEndsAtReset(t *testing.T) {
	m, out := newMachine(t, countBoots(), func(c *Config) { c.NoReboot = true })
	if err := m.Run(t.Context()); err != nil {
		t.Errorf("Run() = %v; want nil at the reset", err)
	}
	if got := out.String(); got != "." {
		t.Errorf("console = %q; want one boot", got)
	}
}

func TestKeyboardResetBootsAgain(t *testing.T) {
	a := asm{}.print("k").raw(0xfe, 0x05).u32(0x300000).raw(0x80, 0x3d).u32(0x300000).raw(2)
	off := asm{}.poweroff()
	a = append(a.raw(0x75, byte(len(off))), off...).outb(boot.PortKeyboard, 0xfe).forever()
	m, out := newMachine(t, a, nil)
	if err := m.Run(t.Context()); err != nil {
		t.Errorf("Run() = %v", err)
	}
	if got := out.String(); got != "kk" {
		t.Errorf("console = %q; want two boots", got)
	}
}

func TestGuestFailuresAreNamed(t *testing.T) {
	for _, test := range []struct {
		name string
		code asm
		want []string
	}{
		{"triple fault", asm{}.raw(0x66, 0xb8).u16(0xfff8).raw(0x8e, 0xd8), // mov ax, no such selector; mov ds, ax: #GP, and there is no IDT
			[]string{"KVM_EXIT_SHUTDOWN", "triple fault"}},
		{"panic", asm{}.outb(boot.PortPVPanic, 1).forever(),
			[]string{"the guest's kernel panicked (pvpanic)"}},
		{"emulation", asm{}.raw(0xd8, 0x05).u32(int(boot.PCIWindow) + 0x800_0000).forever(), // fadd dword [MMIO]
			[]string{"KVM_EXIT_INTERNAL_ERROR", "could not emulate", "rip 0x100000", "d8 05 00 00 00 c8"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, _ := newMachine(t, test.code, nil)
			err := m.Run(t.Context())
			for _, want := range test.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("Run() = %v; want an error with %q", err, want)
				}
			}
		})
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	m, out := newMachine(t, asm{}.print("x").forever(), func(c *Config) { c.CPUs = 2 })
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		out.waitFor("x")
		cancel()
	}()
	if err := m.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Run() = %v; want context.Canceled", err)
	}
}

// A guest that does port I/O all the time is paused and resumed at random
// moments; no output is lost or repeated, so every instruction at which a vCPU
// stood was completed exactly once.
func TestPauseAtRandomMoments(t *testing.T) {
	// loop: out COM1, al; inc al; jmp loop, 3,000 times, then power off.
	a := asm{}.raw(0xb9).u32(3000).raw(0xb3, 0).raw(0x66, 0xba).u16(boot.PortCOM1) // mov ecx, 3000; mov bl, 0; mov dx, COM1
	loop := len(a)
	a = a.raw(0x88, 0xd8, 0xee, 0xfe, 0xc3, 0x49) // mov al, bl; out dx, al; inc bl; dec ecx
	a = a.raw(0x75, byte(loop-len(a)-2))          // jnz loop
	m, out := newMachine(t, a.poweroff(), func(c *Config) { c.CPUs = 2 })
	done := make(chan error, 1)
	go func() { done <- m.Run(t.Context()) }()
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(time.Duration(rand.IntN(200)) * time.Microsecond): // a random moment is what this test is about
			if err := m.Pause(t.Context()); err != nil && !errors.Is(err, ErrEnded) {
				t.Fatal(err)
			}
			if err := m.Resume(); err != nil && !errors.Is(err, ErrEnded) {
				t.Fatal(err)
			}
		}
	}
	got := []byte(out.String())
	if len(got) != 3000 {
		t.Errorf("the guest wrote %d bytes; want 3000", len(got))
	}
	for i, b := range got {
		if b != byte(i) {
			t.Fatalf("byte %d is %#x; want %#x", i, b, byte(i))
		}
	}
}

func TestNewRefusesAndLeavesNothing(t *testing.T) {
	kvmtest.NeedKVM(t)
	good := kernelFile(t, asm{}.poweroff())
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.img")
	text := filepath.Join(dir, "text")
	for path, size := range map[string]int64{image: 1 << 20, filepath.Join(dir, "initrd"): 64 << 20} {
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		f.Truncate(size)
		f.Close()
	}
	os.WriteFile(text, []byte("just text"), 0o600)
	before := openFiles(t)
	for name, test := range map[string]struct {
		change func(*Config)
		want   string
		is     error
	}{
		"no kernel":        {func(c *Config) { c.Kernel = "" }, "no kernel: give the path", nil},
		"kernel missing":   {func(c *Config) { c.Kernel = filepath.Join(dir, "no") }, "kernel " + filepath.Join(dir, "no") + ": no such file", os.ErrNotExist},
		"kernel is a text": {func(c *Config) { c.Kernel = text }, "not a kernel", nil},
		"kernel is a dir":  {func(c *Config) { c.Kernel = dir }, "not a regular file", nil},
		"initrd too large": {func(c *Config) { c.Initrd = filepath.Join(dir, "initrd") }, "initrd", nil},
		"LUN missing":      {func(c *Config) { c.LUNs = []LUNConfig{{Path: filepath.Join(dir, "no"), Target: -1}} }, "LUN " + filepath.Join(dir, "no") + ": no such file", os.ErrNotExist},
		"LUN no SCSI":      {func(c *Config) { c.LUNs = []LUNConfig{{Path: "/dev/null", Target: -1}} }, "LUN /dev/null: ", nil},
		"LUN directory":    {func(c *Config) { c.LUNs = []LUNConfig{{Path: dir, Target: -1}} }, "neither a device nor a regular file", nil},
		"LUN twice": {func(c *Config) { c.LUNs = []LUNConfig{{Path: image, Target: -1}, {Path: image, Target: -1}} },
			"in use", disk.ErrInUse},
	} {
		cfg := Config{Name: "test", CPUs: 1, Memory: 16 << 20, CPU: CPUHost, Kernel: good, RunDir: dir}
		test.change(&cfg)
		m, err := New(cfg)
		if err == nil {
			m.Close()
			t.Errorf("%s: New succeeded", name)
			continue
		}
		if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: New() = %q; want one line with %q", name, err, test.want)
		}
		if test.is != nil && !errors.Is(err, test.is) {
			t.Errorf("%s: New() = %v; it is not a %v", name, err, test.is)
		}
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after failed builds", before, after)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
