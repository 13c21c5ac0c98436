package lio

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func needTarget(t *testing.T) {
	t.Helper()
	if os.Getenv("VMM_TEST_LIO") != "1" {
		t.Skip("makes SCSI devices in this machine's kernel; set VMM_TEST_LIO=1 as root on a test host")
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestNexuses(t *testing.T) {
	needTarget(t)
	l, err := Create(t.Context(), Config{Name: "data", Size: 64 << 20, Serial: "0123456789abcdef", Nexuses: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	// One logical unit ...
	identity := run(t, "sg_vpd", "-p", "di", "-i", l.Nexuses[0].SG)
	if want := "0x60014050123456789abcdef000000000"; !strings.Contains(identity, want) {
		t.Errorf("identity of %s = %s; want %s", l.Nexuses[0].SG, identity, want)
	}
	run(t, "dd", "if=/dev/urandom", "of="+l.Nexuses[0].Block, "bs=64k", "count=16", "conv=fsync", "oflag=direct")
	sums := map[string]bool{}
	for _, n := range l.Nexuses {
		sums[strings.Fields(run(t, "sh", "-c", "dd if="+n.Block+" bs=64k count=16 iflag=direct 2>/dev/null | sha256sum"))[0]] = true
	}
	if len(sums) != 1 {
		t.Errorf("three nexuses read %d different contents; want 1", len(sums))
	}

	// ... and three initiators, each with its own registration.
	for i, n := range l.Nexuses {
		key := string(rune('a' + i))
		run(t, "sg_persist", "--out", "--register", "--param-sark=0x"+key, n.SG)
	}
	status := run(t, "sg_persist", "-s", l.Nexuses[0].SG)
	for i, n := range l.Nexuses {
		key, address := "Key=0x"+string(rune('a'+i)), "SAS address: 0x"+strings.TrimPrefix(n.WWN, "naa.")
		if !strings.Contains(status, key) || !strings.Contains(status, address) {
			t.Errorf("READ FULL STATUS = %s; want %s and %s", status, key, address)
		}
	}
	run(t, "sg_persist", "--out", "--reserve", "--param-rk=0xa", "--prout-type=5", l.Nexuses[0].SG)
	if held := run(t, "sg_persist", "-r", l.Nexuses[2].SG); !strings.Contains(held, "Key=0xa") || !strings.Contains(held, "Write Exclusive, registrants only") {
		t.Errorf("READ RESERVATION = %s; want key 0xa, type 5", held)
	}

	// A nexus that goes takes its devices along; a new one gets its own.
	gone := l.Nexuses[1]
	if err := l.RemoveNexus(gone); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(gone.SG); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s after its removal: %v; want it gone", gone.SG, err)
	}
	if len(l.Nexuses) != 2 {
		t.Errorf("%d nexuses left; want 2", len(l.Nexuses))
	}
	added, err := l.AddNexus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if keys := run(t, "sg_persist", "-k", added.SG); !strings.Contains(keys, "0xa") {
		t.Errorf("keys through the new nexus = %s; want 0xa among them", keys)
	}

	file := l.File
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, filepath.Join(core, "data"), added.SG, l.File} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s after Close: %v; want it gone", path, err)
		}
	}
	if left, _ := filepath.Glob(loopback + "/naa.*"); len(left) > 0 {
		t.Errorf("left after Close: %v", left)
	}
	if err := l.Close(); err != nil {
		t.Errorf("Close, twice = %v", err)
	}
}

// Reservations survive with APTPL only if the target can write its state.
func TestPersistThroughPowerLoss(t *testing.T) {
	needTarget(t)
	l, err := Create(t.Context(), Config{Name: "aptpl", Size: 1 << 20, Nexuses: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	run(t, "sg_persist", "--out", "--register", "--param-sark=0x77", "--param-aptpl", l.Nexuses[0].SG)
	root, err := readLine(configfs + "/dbroot")
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(root, "pr", "aptpl_"+l.Serial)
	if b, err := os.ReadFile(state); err != nil || !strings.Contains(string(b), "sa_res_key=119") {
		t.Errorf("%s = %q, %v; want key 0x77 = 119 in it", state, b, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s after Close: %v; want it gone", state, err)
	}
}

func TestTwoLUNs(t *testing.T) {
	needTarget(t)
	one, err := Create(t.Context(), Config{Name: "one", Size: 8 << 20, Nexuses: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	two, err := Create(t.Context(), Config{Name: "two", Size: 16 << 20, Nexuses: 1, Attributes: map[string]string{"block_size": "4096"}})
	if err != nil {
		t.Fatal(err)
	}
	defer two.Close()
	for _, test := range []struct {
		n    *Nexus
		want string
	}{{one.Nexuses[0], "512"}, {two.Nexuses[0], "4096"}} {
		if got, err := readLine(filepath.Join(test.n.Sys(), "block", filepath.Base(test.n.Block), "queue/logical_block_size")); err != nil || got != test.want {
			t.Errorf("block size of %s = %s, %v; want %s", test.n.Block, got, err, test.want)
		}
	}
	if _, err := Create(t.Context(), Config{Name: "one", Size: 8 << 20}); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("Create of a second \"one\" = %v; want a refusal", err)
	}
	if len(one.Nexuses) != 1 {
		t.Error("the refusal harmed the first")
	}
	if _, err := os.Stat(one.Nexuses[0].SG); err != nil {
		t.Errorf("the refusal harmed the first: %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []Config{
		{}, {Name: "a/b", Size: 512}, {Name: "..", Size: 512}, {Name: "ok", Size: 0}, {Name: "ok", Size: 513}, {Name: "ok", Size: -512},
	} {
		if l, err := Create(t.Context(), cfg); err == nil {
			t.Errorf("Create(%+v) = %+v; want an error", cfg, l)
		}
	}
}

func TestDebug(t *testing.T) {
	needTarget(t)
	d, err := LoadDebug(t.Context(), "dev_size_mb=16", "sector_size=512", "delay=0", "num_tgts=2")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if len(d.Devices) != 2 {
		t.Fatalf("disks of scsi_debug = %+v; want 2", d.Devices)
	}
	if _, err := LoadDebug(t.Context()); err == nil {
		t.Error("scsi_debug was loaded twice")
	}
	disk := d.Devices[0]
	if inquiry := run(t, "sg_inq", disk.SG); !strings.Contains(inquiry, "scsi_debug") {
		t.Errorf("INQUIRY of %s = %s; want scsi_debug", disk.SG, inquiry)
	}
	// READ(10) of block 0x1234, where medium errors are injected.
	read := []string{"-r", "512", "-o", "/dev/null", disk.SG, "28", "00", "00", "00", "12", "34", "00", "00", "01", "00"}
	if err := d.Inject(OptMediumError, 0); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("sg_raw", read...).CombinedOutput(); err == nil || !strings.Contains(string(out), "Medium Error") {
		t.Errorf("a read with an injected error = %v: %s; want a medium error", err, out)
	}
	if err := d.Inject(0, 0); err != nil {
		t.Fatal(err)
	}
	run(t, "sg_raw", read...)
	if err := d.Set("no_such_parameter", "1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Set of an unknown parameter = %v; want ErrNotExist", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(disk.SG); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s after Close: %v; want it gone", disk.SG, err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("Close, twice = %v", err)
	}
}
