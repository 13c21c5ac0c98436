package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vmm/tests/lab/lio"
)

// The side-by-side measurements with QEMU: one host, one run, the same kernel,
// initramfs and LUN, taking turns. What counts is the ratios.

const (
	benchRounds = 2
	benchMemory = 512 // MiB
	benchIOTime = 5 * time.Second
)

// monitor starts a guest with one LUN (none if nil) and a second serial port
// at socket.
type monitor struct {
	name  string
	start func(t *testing.T, kernel, initrd, socket string, lun *lio.Nexus, more ...string) *vm
}

const benchCmdline = "console=ttyS0 quiet panic=-1 mitigations=off guest.work=agent"

func vmmMonitor() monitor {
	return monitor{"vmm", func(t *testing.T, kernel, initrd, socket string, lun *lio.Nexus, more ...string) *vm {
		args := []string{"run", "bench", "--kernel", kernel, "--initrd", initrd, "--cmdline", benchCmdline,
			"--cpus", "2", "--memory", fmt.Sprintf("%dM", benchMemory), "--serial", socket}
		if lun != nil {
			args = append(args, "--lun", "path="+lun.SG)
		}
		return start(t, append(args, more...)...)
	}}
}

// qemuMonitor is Debian's QEMU, from the outer machine where the host has none
// of its own.
func qemuMonitor(t *testing.T, machine string) monitor {
	t.Helper()
	program := []string{"qemu-system-x86_64"}
	if _, err := exec.LookPath(program[0]); err != nil {
		if _, err := os.Stat("/outer/usr/bin/qemu-system-x86_64"); err != nil {
			t.Fatal("no qemu-system-x86_64 to compare with: apt-get install qemu-system-x86")
		}
		program = []string{"outer", "/usr/bin/qemu-system-x86_64"}
	}
	name, _, _ := strings.Cut(machine, ",")
	return monitor{"qemu " + name, func(t *testing.T, kernel, initrd, socket string, lun *lio.Nexus, more ...string) *vm {
		args := append(slices.Clone(program[1:]), "-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", fmt.Sprint(benchMemory),
			"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
			"-kernel", kernel, "-initrd", initrd, "-append", benchCmdline,
			"-serial", "stdio", "-serial", "unix:"+socket+",server=on,wait=off")
		if lun != nil {
			args = append(args, "-device", "virtio-scsi-pci,num_queues=2",
				"-drive", "if=none,id=lun,format=raw,cache=none,file="+lun.Block, "-device", "scsi-block,drive=lun")
		}
		return launch(t, program[0], append(args, more...)...)
	}}
}

// awaitInit returns the time from before the start to the guest's init.
func awaitInit(t *testing.T, v *vm, started time.Time) time.Duration {
	t.Helper()
	if err := v.console.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, "guest: init") }); err != nil {
		t.Fatalf("the guest's first process did not run: %v", err)
	}
	return time.Since(started)
}

// overhead is the monitor's resident memory without the guest's RAM, in KiB.
func overhead(t *testing.T, v *vm) int {
	t.Helper()
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", v.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	total, size, ram := 0, 0, 0
	for line := range strings.Lines(string(smaps)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.Atoi(f[1])
		switch f[0] {
		case "Size:":
			size = n
		case "Rss:":
			if size >= benchMemory<<10 {
				ram++
			} else {
				total += n
			}
		}
	}
	if ram != 1 {
		t.Fatalf("%d mappings are as large as the guest's RAM; want one", ram)
	}
	return total
}

func TestBench(t *testing.T) {
	dir := t.TempDir()
	// In memory, so that nobody's file system is measured.
	kernel, initrd := filepath.Join(dir, "bzImage"), filepath.Join(dir, "initrd")
	for _, f := range []string{kernel, initrd} {
		data, err := os.ReadFile(filepath.Join(stage, "cloud", filepath.Base(f)))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ours, q35 := vmmMonitor(), qemuMonitor(t, "q35")
	// microvm has no PCI unless asked, and then no ACPI PCI hot plug: it boots
	// the same kernel and initramfs without a LUN.
	microvm := qemuMonitor(t, "microvm,isa-serial=on,pcie=on,rtc=on")
	results := map[string][]float64{} // "what, who": one a round
	note := func(what, who string, x float64) {
		results[what+"\t"+who] = append(results[what+"\t"+who], x)
	}

	defer func() { report(results, ours.name) }() // what was measured before a failure, too

	t.Run("boot", func(t *testing.T) {
		for round := range benchRounds {
			for _, m := range []monitor{ours, q35, microvm} {
				t.Logf("round %d: boot %s", round+1, m.name)
				socket := filepath.Join(dir, "s")
				started := time.Now()
				v := m.start(t, kernel, initrd, socket, nil)
				note("start to the guest's init, s", m.name, awaitInit(t, v, started).Seconds())
				// Not through the agent: microvm has one serial port.
				if err := v.console.Wait(v.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, "guest: ready") }); err != nil {
					t.Fatalf("the guest did not get ready: %v", err)
				}
				note("resident beyond guest RAM, MiB", m.name, float64(overhead(t, v))/1024)
				v.cmd.Process.Kill()
				<-v.exited
				os.Remove(socket)
			}
		}
	})

	t.Run("io", func(t *testing.T) {
		lun := needLIO(t, "bench", 256<<20, 1)
		for round := range benchRounds {
			for _, m := range []monitor{ours, q35} {
				t.Logf("round %d: I/O %s", round+1, m.name)
				socket := filepath.Join(dir, "s")
				v := m.start(t, kernel, initrd, socket, lun.Nexuses[0])
				v.serial = socket
				v.connect()
				for _, mode := range []string{"", " -write"} {
					for _, depth := range []int{1, 32} {
						before := readCosts()
						out := v.sh(fmt.Sprintf("rdtest -depth %d -time %v%s /dev/sda", depth, benchIOTime, mode))
						after := readCosts()
						var r struct{ IOPS, Ops float64 }
						if err := json.Unmarshal([]byte(out), &r); err != nil || r.IOPS == 0 {
							t.Fatalf("rdtest: %v: %s", err, out)
						}
						what := fmt.Sprintf("4 KiB random %s, depth %d, ", map[string]string{"": "read", " -write": "write"}[mode], depth)
						note(what+"IOPS", m.name, r.IOPS)
						for _, name := range slices.Sorted(maps.Keys(after)) {
							note(what+name+" each", m.name, (after[name]-before[name])/r.Ops)
						}
					}
				}
				v.agent.Close()
				v.cmd.Process.Kill()
				<-v.exited
				os.Remove(socket)
			}
		}
	})

	t.Run("migrate", func(t *testing.T) { benchMigrate(t, kernel, initrd, ours, q35, note) })
}

// readCosts reads what the host has counted so far of what makes an I/O
// expensive. It does not depend on how busy the machine is, as times do.
func readCosts() map[string]float64 {
	costs := map[string]float64{}
	for name, path := range map[string]string{"VM exits": "exits", "interrupts injected": "irq_injections", "halts": "halt_exits"} {
		// Without debugfs there is no such row.
		if text, err := os.ReadFile("/sys/kernel/debug/kvm/" + path); err == nil {
			costs[name], _ = strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		}
	}
	stat, _ := os.ReadFile("/proc/stat")
	for line := range strings.Lines(string(stat)) {
		if n, ok := strings.CutPrefix(line, "ctxt "); ok {
			costs["context switches"], _ = strconv.ParseFloat(strings.TrimSpace(n), 64)
		}
	}
	return costs
}

// report prints medians and how many times this monitor's is ours.
func report(results map[string][]float64, ours string) {
	fmt.Printf("\n%-62s %-12s %10s %10s\n", "what", "who", "median", "vmm/this")
	var keys []string
	for k := range results {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		what, who, _ := strings.Cut(k, "\t")
		fmt.Printf("%-62s %-12s %10.2f %10.2f\n", what, who, median(results[k]), median(results[what+"\t"+ours])/median(results[k]))
	}
}

func median(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	return s[len(s)/2]
}
