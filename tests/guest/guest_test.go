package guest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vmm/tests/guest"
	"vmm/tests/lab"
	"vmm/tests/lab/agent"
	"vmm/tests/lab/kernel"
)

// bootTime is how long a guest may take in an emulated host on a machine with
// other work.
const bootTime = 5 * time.Minute

func startHost(t *testing.T) *lab.Host {
	t.Helper()
	if os.Getenv("VMM_TEST_LAB") != "1" {
		t.Skip("starts a lab host; set VMM_TEST_LAB=1")
	}
	host, err := lab.Start(t.Context(), lab.Config{HostRoot: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	return host
}

// vm is a guest under Debian's QEMU in a lab host: the yardstick of what the
// guest does.
type vm struct {
	*guest.Guest
	host    *lab.Host
	cmd     *agent.Cmd
	console string // a file in the host
	monitor string // a socket in the host
}

func boot(t *testing.T, host *lab.Host, flavour kernel.Flavour, image string, params string, more ...string) *vm {
	t.Helper()
	k, err := kernel.Find(t.Context(), flavour)
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := guest.Initrd(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	if image == "" {
		image = k.BzImage
	}
	name := strings.ReplaceAll(t.Name(), "/", "-")
	v := &vm{host: host, console: "/tmp/" + name + ".console", monitor: "/tmp/" + name + ".monitor"}
	args := []string{"qemu-system-x86_64", "-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", image, "-initrd", initrd,
		"-append", "console=ttyS0 panic=-1 " + params,
		"-serial", "file:" + v.console, "-serial", "stdio",
		"-monitor", "unix:" + v.monitor + ",server,nowait",
		"-device", "virtio-rng-pci", "-device", "pvpanic"}
	v.cmd = host.Command(t.Context(), "outer", append(args, more...)...)
	v.cmd.Stderr = &agent.Tail{Max: 4 << 10}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := host.Command(context.Background(), "tail", "-n", "40", v.console).Output()
			t.Logf("console of the guest:\n%s\n%s", out, v.cmd.Stderr.(*agent.Tail).Bytes())
		}
	})
	return v
}

// dial boots a guest that serves the agent.
func (v *vm) dial(t *testing.T) {
	t.Helper()
	conn, err := v.cmd.Conn()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootTime)
	defer cancel()
	if v.Guest, err = guest.Dial(ctx, conn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
}

func (v *vm) consoleText(t *testing.T) string {
	t.Helper()
	out, err := v.host.Command(t.Context(), "cat", v.console).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(out), "\r", "")
}

func TestAgent(t *testing.T) {
	host := startHost(t)
	for _, flavour := range kernel.Flavours {
		t.Run(string(flavour), func(t *testing.T) {
			if testing.Short() && flavour != kernel.Cloud {
				t.Skip("the tests of vmm boot such a guest, too")
			}
			if out, err := host.Command(t.Context(), "sh", "-c", "truncate -s 64M /tmp/disk").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			start := time.Now()
			v := boot(t, host, flavour, "", "quiet",
				"-device", "virtio-scsi-pci", "-drive", "file=/tmp/disk,format=raw,if=none,id=d,cache=writeback,file.locking=off", "-device", "scsi-hd,drive=d")
			v.dial(t)
			t.Logf("agent answers %.1f s after the start of QEMU", time.Since(start).Seconds())
			k, _ := kernel.Find(t.Context(), flavour)
			for _, test := range []struct {
				script string
				want   string
				status int
			}{
				{"uname -r", k.Release + "\n", 0},
				{"echo out; echo err >&2; exit 3", "out\nerr\n", 3},
				{"grep -c . /proc/partitions >/dev/null && ls /dev/sda /dev/sg0", "/dev/sda\n/dev/sg0\n", 0},
				{"cat /sys/class/misc/hw_random/rng_current", "virtio_rng.0\n", 0},
				{`ls -d /sys/devices/virtual/misc/pvpanic* /sys/bus/*/drivers/pvpanic* 2>/dev/null | grep -c .`, "", 0},
			} {
				out, status, err := v.Run(t.Context(), test.script)
				if err != nil || status != test.status || test.want != "" && out != test.want {
					t.Errorf("Run(%q) = %q, %d, %v; want %q, %d", test.script, out, status, err, test.want, test.status)
				}
			}

			filled, err := v.Must(t.Context(), "fill -size 4194304 -seed 7 /dev/sda")
			if err != nil {
				t.Fatal(err)
			}
			for _, again := range []struct{ where, sum string }{
				{"the guest", must(t)(v.Must(t.Context(), "sum -size 4194304 /dev/sda"))},
				{"the host", must(t)(output(host, "sh", "-c", "head -c 4194304 /tmp/disk | sha256sum | cut -d' ' -f1"))},
			} {
				if again.sum != filled {
					t.Errorf("checksum in %s = %s; fill printed %s", again.where, again.sum, filled)
				}
			}
			for _, args := range []string{"-depth 1", "-depth 32", "-depth 32 -write"} {
				out, err := v.Must(t.Context(), "rdtest -time 1s "+args+" /dev/sda")
				if err != nil {
					t.Fatal(err)
				}
				var result struct{ IOPS float64 }
				if err := json.Unmarshal([]byte(out), &result); err != nil || result.IOPS <= 0 {
					t.Errorf("rdtest %s = %s; want a rate above 0 (%v)", args, out, err)
				}
				t.Log(out)
			}

			begin := time.Now()
			big, _, err := v.Run(t.Context(), "head -c 5000 /dev/zero")
			if err != nil || len(big) != 5000 {
				t.Errorf("5,000 bytes of output = %d bytes, %v", len(big), err)
			}
			t.Logf("5,000 bytes over the serial line took %.2f s", time.Since(begin).Seconds())

			// The power button ends it.
			press(t, host, v.monitor)
			select {
			case <-v.Done():
			case <-time.After(bootTime):
				t.Fatal("the guest ignored its power button")
			}
			if text := v.consoleText(t); !strings.Contains(text, "guest: power button") {
				t.Errorf("console after the power button = %q; want the guest's line", text)
			}
		})
	}
}

// press writes to QEMU's monitor.
func press(t *testing.T, host *lab.Host, monitor string) {
	t.Helper()
	conn, err := host.Dial(t.Context(), monitor)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("system_powerdown\n")); err != nil {
		t.Fatal(err)
	}
	// It echoes the command, then prompts again.
	var seen bytes.Buffer
	buf := make([]byte, 512)
	for strings.Count(seen.String(), "(qemu)") < 2 {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("monitor: %v: %q", err, seen.String())
		}
		seen.Write(buf[:n])
	}
}

func output(host *lab.Host, name string, args ...string) (string, error) {
	out, err := host.Command(context.Background(), name, args...).Output()
	return strings.TrimSpace(string(out)), err
}

func must(t *testing.T) func(string, error) string {
	return func(s string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

func TestWork(t *testing.T) {
	host := startHost(t)
	script, err := guest.Script("echo 'hello from' $(uname -n); exit 7")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, params string
		more         []string
		want         string // on the console
		stderr       string // of QEMU
	}{
		{"poweroff", "guest.work=poweroff", nil, "reboot: Power down", ""},
		{"reboot", "guest.work=reboot", nil, "reboot: Restarting system", ""},
		{"panic", "guest.work=panic", nil, "Kernel panic - not syncing: sysrq triggered crash", ""},
		{"triplefault", "guest.work=triplefault", []string{"-d", "cpu_reset"}, "guest: ready", "CPU Reset"},
		{"script", script, nil, "hello from guest\nguest: status 7\n", ""},
		{"unknown", "guest.work=nonsense", nil, "guest.work=nonsense: no such work", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			if testing.Short() && test.name != "script" {
				t.Skip("the tests of vmm boot such a guest, too")
			}
			k, err := kernel.Find(t.Context(), kernel.Cloud)
			if err != nil {
				t.Fatal(err)
			}
			v := boot(t, host, kernel.Cloud, k.VMLinux, "quiet "+test.params, test.more...)
			if err := v.cmd.Run(); err != nil {
				t.Fatal(err)
			}
			text := v.consoleText(t)
			for _, want := range []string{"guest: init kernel=" + k.Release + " uptime=", "guest: ready uptime=", test.want} {
				if !strings.Contains(text, want) {
					t.Errorf("console = %s; want %q in it", text, want)
				}
			}
			if stderr := string(v.cmd.Stderr.(*agent.Tail).Bytes()); !strings.Contains(stderr, test.stderr) {
				t.Errorf("QEMU's standard error = %q; want %q in it", stderr, test.stderr)
			}
		})
	}
}

func TestScriptTooLong(t *testing.T) {
	if _, err := guest.Script(strings.Repeat("x", 2000)); err == nil {
		t.Error("Script of 2,000 bytes was accepted; the kernel's command line has 2,048")
	}
}

func TestInitrdNeedsModules(t *testing.T) {
	k := &kernel.Kernel{Modules: filepath.Join(t.TempDir(), "6.1.0")}
	if _, err := guest.Initrd(t.Context(), k); err == nil {
		t.Error("Initrd for a kernel without a module directory succeeded")
	}
}
