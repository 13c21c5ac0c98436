package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

type machineShape struct {
	kernel image
	cpus   int
	memory string
}

func (m machineShape) String() string {
	return fmt.Sprintf("%v/%dcpu/%s", m.kernel, m.cpus, m.memory)
}

// allShapes is the full product.
func allShapes() []machineShape {
	var all []machineShape
	for _, flavour := range []string{"cloud", "generic"} {
		for _, format := range []string{"bzImage", "vmlinux"} {
			for _, cpus := range []int{1, 2, 4} {
				for _, memory := range []string{"256M", "1G", "5G"} {
					all = append(all, machineShape{image{flavour, format}, cpus, memory})
				}
			}
		}
	}
	return all
}

// pairwise chooses shapes so that each two values of different dimensions meet
// in at least one of them.
func pairwise(all []machineShape) []machineShape {
	pairs := func(m machineShape) []string {
		v := []string{m.kernel.flavour, m.kernel.format, strconv.Itoa(m.cpus), m.memory}
		var list []string
		for i := range v {
			for j := range i {
				list = append(list, fmt.Sprint(j, v[j], i, v[i]))
			}
		}
		return list
	}
	met := map[string]bool{}
	var chosen []machineShape
	for {
		best, gain := -1, 0
		for i, m := range all {
			n := 0
			for _, p := range pairs(m) {
				if !met[p] {
					n++
				}
			}
			if n > gain {
				best, gain = i, n
			}
		}
		if best < 0 {
			return chosen
		}
		chosen = append(chosen, all[best])
		for _, p := range pairs(all[best]) {
			met[p] = true
		}
	}
}

// Stock kernels boot in every shape, see the CPUs and the memory they were
// given, and poweroff ends vmm with 0.
func TestBootMatrix(t *testing.T) {
	shapes := pairwise(allShapes())
	if os.Getenv("VMM_TEST_MODE") == "soak" {
		shapes = allShapes()
	}
	for _, m := range shapes {
		t.Run(m.String(), func(t *testing.T) {
			v := boot(t, m.kernel, "guest.work=agent", "--cpus", strconv.Itoa(m.cpus), "--memory", m.memory)
			v.connect()
			if got := v.sh("grep -c ^processor /proc/cpuinfo"); got != strconv.Itoa(m.cpus) {
				t.Errorf("the guest has %s processors; want %d", got, m.cpus)
			}
			kib, _ := strconv.Atoi(v.sh("awk '/^MemTotal/{print $2}' /proc/meminfo"))
			want := map[string]int{"256M": 256 << 10, "1G": 1 << 20, "5G": 5 << 20}[m.memory]
			if kib < want*3/4 || kib > want {
				t.Errorf("the guest has %d KiB of memory; want at most %d and nearly that", kib, want)
			}
			if got := v.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"); got != "kvm-clock" {
				t.Errorf("the guest's clock source is %s; want kvm-clock", got)
			}
			quietLog(t, v)
			v.poweroff()
		})
	}
}

// quietLog fails if the guest's kernel found something wrong with the machine.
func quietLog(t *testing.T, v *vm) {
	t.Helper()
	log := v.sh("dmesg")
	bad := regexp.MustCompile(`(?m)^.*(BUG: |WARNING: |Oops|Call Trace|ACPI (BIOS )?(Error|Warning)|Firmware Bug|nobody cared|soft lockup|[Uu]nable to handle|invalid opcode|general protection|Failed to).*$`)
	for _, line := range bad.FindAllString(log, -1) {
		t.Errorf("the guest's kernel says: %s", line)
	}
}

func TestReboot(t *testing.T) {
	v := boot(t, cloud, "guest.work=agent", "--cpus", "2")
	v.connect()
	before := v.sh("cat /proc/sys/kernel/random/boot_id")
	go v.agent.Run(v.context(), "reboot -f")
	if err := v.console.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Count(s, "guest: init") == 2 }); err != nil {
		t.Fatalf("the guest did not boot again: %v", err)
	}
	v.agent.Close()
	v.connect()
	if after := v.sh("cat /proc/sys/kernel/random/boot_id"); after == before {
		t.Error("the boot id is the same after a reboot")
	}
	if got := v.sh("grep -c ^processor /proc/cpuinfo"); got != "2" {
		t.Errorf("after the reboot the guest has %s processors; want 2", got)
	}
	v.poweroff()
}

func TestNoReboot(t *testing.T) {
	v := boot(t, cloud, "guest.work=reboot", "--no-reboot")
	if status := v.wait(); status != 0 {
		t.Errorf("vmm --no-reboot ends with %d at the guest's reset; want 0", status)
	}
	if n := strings.Count(v.console.String(), "guest: init"); n != 1 {
		t.Errorf("the guest booted %d times; want once", n)
	}
}

// The guest's own ends of the world each end vmm with 1 and one clear line.
func TestGuestFailures(t *testing.T) {
	for _, test := range []struct{ work, want string }{
		{"guest.work=panic", "the guest's kernel panicked"},
		{"guest.work=triplefault reboot=t", "triple fault"},
	} {
		t.Run(test.work, func(t *testing.T) {
			v := boot(t, cloud, test.work)
			if status := v.wait(); status != 1 {
				t.Errorf("exit status = %d; want 1", status)
			}
			line := strings.TrimSpace(v.stderr.String())
			if !strings.Contains(line, test.want) || strings.Count(line, "\n") != 0 {
				t.Errorf("stderr = %q; want one line with %q", line, test.want)
			}
			if strings.HasPrefix(test.work, "guest.work=panic") && !strings.Contains(v.console.String(), "Kernel panic - not syncing") {
				t.Error("the panic's message did not reach the console")
			}
		})
	}
}

// SIGTERM presses the power button.
func TestPowerButton(t *testing.T) {
	v := boot(t, cloud, "guest.work=agent", "--stop-timeout", bootTimeout.String())
	v.connect()
	v.cmd.Process.Signal(syscall.SIGTERM)
	if status := v.wait(); status != 0 {
		t.Errorf("exit status = %d; want 0", status)
	}
	if !strings.Contains(v.console.String(), "guest: power button") {
		t.Error("the guest did not see its power button")
	}
	if s := v.stderr.String(); strings.Contains(s, "force") {
		t.Errorf("stderr = %q; want no force", s)
	}
}

// A guest that does not react is ended by force, after --stop-timeout or by
// the second signal.
func TestStopByForce(t *testing.T) {
	// A shell as the first process knows no power button.
	deaf := func(t *testing.T, timeout string) *vm {
		v := boot(t, cloud, "rdinit=/bin/sh", "--stop-timeout", timeout)
		if err := v.console.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, "# ") }); err != nil {
			t.Fatalf("no prompt: %v", err)
		}
		return v
	}
	t.Run("timeout", func(t *testing.T) {
		v := deaf(t, "1s")
		v.cmd.Process.Signal(syscall.SIGTERM)
		if status := v.wait(); status != 0 {
			t.Errorf("exit status = %d; want 0", status)
		}
		if s := v.stderr.String(); !strings.Contains(s, "ended by force") {
			t.Errorf("stderr = %q; want to hear of the force", s)
		}
	})
	t.Run("second signal", func(t *testing.T) {
		v := deaf(t, "24h")
		v.cmd.Process.Signal(syscall.SIGTERM)
		// Signals of one kind merge while one is pending: another kind.
		v.cmd.Process.Signal(syscall.SIGINT)
		if status := v.wait(); status != 0 {
			t.Errorf("exit status = %d; want 0", status)
		}
	})
}

func TestCPUModels(t *testing.T) {
	host := " " + local(t, "grep -m1 ^flags /proc/cpuinfo") + " "
	for _, model := range []string{"x86-64-v2", "x86-64-v3"} {
		t.Run(model, func(t *testing.T) {
			v := boot(t, cloud, "guest.work=agent", "--cpu", model)
			if model == "x86-64-v3" && !strings.Contains(host, " avx2 ") {
				// A host older than the model.
				if status := v.wait(); status != 1 || !strings.Contains(v.stderr.String(), "this host lacks") || !strings.Contains(v.stderr.String(), "avx2") {
					t.Errorf("exit status %d, stderr %q; want 1 and to hear that the host lacks avx2", status, v.stderr)
				}
				return
			}
			v.connect()
			flags := " " + v.sh("grep -m1 ^flags /proc/cpuinfo") + " "
			for flag, level := range map[string]int{"sse4_2": 2, "popcnt": 2, "avx2": 3, "bmi2": 3, "fma": 3, "svm": 9, "rdseed": 9} {
				want := level == 2 || level == 3 && model == "x86-64-v3"
				if got := strings.Contains(flags, " "+flag+" "); got != want {
					t.Errorf("flag %s in the guest = %v; want %v", flag, got, want)
				}
			}
			v.poweroff()
		})
	}
}
