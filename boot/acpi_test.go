package boot

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"vmm/device"
)

// needTool finds a program or skips the test; with VMM_TEST_REQUIRE_TOOLS=1
// it fails instead.
func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("VMM_TEST_REQUIRE_TOOLS") == "1" {
		t.Fatal(err)
	}
	t.Skip(err)
	return ""
}

// findTables walks from the RSDP as an OS does and returns each table by its
// signature, addresses and checksums checked.
func findTables(t testing.TB, area []byte) map[string][]byte {
	t.Helper()
	le := binary.LittleEndian
	at := func(gpa uint64) []byte {
		t.Helper()
		if gpa < uint64(addrACPI) || gpa+36 > uint64(addrACPI)+uint64(len(area)) {
			t.Fatalf("table at %#x is outside the area", gpa)
		}
		b := area[gpa-uint64(addrACPI):]
		n := le.Uint32(b[4:])
		if uint64(n) > uint64(len(b)) {
			t.Fatalf("%s has %d bytes, more than the area", b[:4], n)
		}
		return b[:n]
	}
	sum := func(name string, b []byte) {
		t.Helper()
		if v := checksum(b); v != 0 {
			t.Errorf("%s: bytes sum up to %#x; want 0", name, -v)
		}
	}
	tables := map[string][]byte{}
	rsdp := area[:36]
	if string(rsdp[:8]) != "RSD PTR " || rsdp[15] != 2 || le.Uint32(rsdp[20:]) != 36 {
		t.Fatalf("RSDP is % x", rsdp)
	}
	sum("RSDP of ACPI 1.0", rsdp[:20])
	sum("RSDP", rsdp)
	xsdt := at(le.Uint64(rsdp[24:]))
	tables["XSDT"] = xsdt
	for entries := xsdt[36:]; len(entries) > 0; entries = entries[8:] {
		table := at(le.Uint64(entries))
		tables[string(table[:4])] = table
	}
	fadt := tables["FACP"]
	if fadt == nil {
		t.Fatal("no FADT")
	}
	if le.Uint64(fadt[140:]) != uint64(le.Uint32(fadt[40:])) {
		t.Error("FADT: the two addresses of the DSDT differ")
	}
	tables["DSDT"] = at(le.Uint64(fadt[140:]))
	for name, table := range tables {
		if string(table[:4]) != name {
			t.Errorf("%s has the signature %q", name, table[:4])
		}
		sum(name, table)
	}
	facs := at(uint64(le.Uint32(fadt[36:])))
	if string(facs[:4]) != "FACS" || len(facs) != 64 || le.Uint32(fadt[36:])%64 != 0 {
		t.Errorf("FACS at %#x: % x", le.Uint32(fadt[36:]), facs[:8])
	}
	tables["FACS"] = facs
	return tables
}

func TestACPITables(t *testing.T) {
	for _, cpus := range []int{1, 8, MaxCPUs} {
		tables := findTables(t, acpiTables(cpus))
		for _, name := range []string{"XSDT", "FACP", "FACS", "DSDT", "APIC", "MCFG"} {
			if tables[name] == nil {
				t.Errorf("%d vCPUs: no %s", cpus, name)
			}
		}
		madt := tables["APIC"][44:]
		var lapics, overrides int
		for len(madt) > 0 {
			switch madt[0] {
			case 0:
				if int(madt[3]) != lapics || madt[4]&1 == 0 {
					t.Errorf("%d vCPUs: local APIC %d has ID %d, flags %#x", cpus, lapics, madt[3], madt[4])
				}
				lapics++
			case 2:
				overrides++
			}
			madt = madt[madt[1]:]
		}
		if lapics != cpus || overrides != 2 {
			t.Errorf("%d vCPUs: %d local APICs, %d overrides; want %d, 2", cpus, lapics, overrides, cpus)
		}
		if n := bytes.Count(tables["DSDT"], []byte("ACPI0007")); n != cpus {
			t.Errorf("%d vCPUs: %d processor devices", cpus, n)
		}
	}
}

func TestFADTDescribesTheDevices(t *testing.T) {
	fadt := findTables(t, acpiTables(1))["FACP"]
	le := binary.LittleEndian
	for _, test := range []struct {
		name      string
		got, want uint64
	}{
		{"length", uint64(len(fadt)), 276},
		{"SCI", uint64(le.Uint16(fadt[46:])), 9},
		{"PM1a event", uint64(le.Uint32(fadt[56:])), 0x600},
		{"PM1a control", uint64(le.Uint32(fadt[64:])), 0x604},
		{"PM timer", uint64(le.Uint32(fadt[76:])), 0x608},
		{"SMI command port", uint64(le.Uint32(fadt[48:])), 0},
		{"boot architecture", uint64(le.Uint16(fadt[109:])), 0x0005},
		{"flags", uint64(le.Uint32(fadt[112:])), 0x565},
		{"reset register", le.Uint64(fadt[120:]), 0xcf9},
		{"reset value", uint64(fadt[128]), device.ResetValue},
		{"century", uint64(fadt[108]), 0x32},
		{"X PM1a event", le.Uint64(fadt[152:]), 0x600},
		{"X PM1a control", le.Uint64(fadt[176:]), 0x604},
		{"X PM timer", le.Uint64(fadt[212:]), 0x608},
	} {
		if test.got != test.want {
			t.Errorf("%s = %#x; want %#x", test.name, test.got, test.want)
		}
	}
}

// The reference compiler understands every table, finds nothing to warn of,
// and makes the same bytes of what it understood.
func TestTablesSurviveIASL(t *testing.T) {
	iasl := needTool(t, "iasl")
	for _, cpus := range []int{1, 8} {
		for name, table := range findTables(t, acpiTables(cpus)) {
			t.Run(fmt.Sprintf("%s/%d vCPUs", name, cpus), func(t *testing.T) {
				dir := t.TempDir()
				run := func(args ...string) string {
					t.Helper()
					cmd := exec.Command(iasl, args...)
					cmd.Dir = dir
					out, err := cmd.CombinedOutput()
					if err != nil {
						t.Fatalf("iasl %v: %v\n%s", args, err, out)
					}
					for _, bad := range []string{"Invalid", "Warning  ", "Remark  ", "Error  ", "incorrect checksum"} {
						if strings.Contains(string(out), bad) {
							t.Errorf("iasl %v:\n%s", args, out)
							break
						}
					}
					return string(out)
				}
				if err := os.WriteFile(filepath.Join(dir, "t.dat"), table, 0o666); err != nil {
					t.Fatal(err)
				}
				run("-d", "t.dat")
				dsl, err := os.ReadFile(filepath.Join(dir, "t.dsl"))
				if err != nil {
					t.Fatal(err)
				}
				if bytes.Contains(dsl, []byte("Unknown")) {
					t.Errorf("iasl does not know all of the table:\n%s", dsl)
				}
				out := run("-p", "again", "t.dsl")
				again, err := os.ReadFile(filepath.Join(dir, "again.aml"))
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				// The compiler puts its own name and a checksum into the header.
				from := 36
				if name == "FACS" {
					from = 0
				}
				if !bytes.Equal(again[from:], table[from:]) {
					t.Errorf("recompiled table differs:\n%x\n%x\n%s", again[from:], table[from:], dsl)
				}
			})
		}
	}
}

func TestAMLEncodings(t *testing.T) {
	for _, test := range []struct {
		name string
		got  aml
		want string
	}{
		{"zero", amlInteger(0), "00"},
		{"one", amlInteger(1), "01"},
		{"byte", amlInteger(0x80), "0a80"},
		{"word", amlInteger(0x1234), "0b3412"},
		{"dword", amlInteger(0x12345678), "0c78563412"},
		{"qword", amlInteger(1 << 32), "0e0000000001000000"},
		{"EISA ID", amlEISA("PNP0A08"), "0c41d00a08"},
		{"string", amlString("ab"), "0d616200"},
		{"name", amlName("RTC"), "5254435f"},
		{"whole name", amlName("PCI0"), "50434930"},
		{"UUID", uuid("00112233-4455-6677-8899-aabbccddeeff")[4:], "33221100554477668899aabbccddeeff"},
	} {
		if got := fmt.Sprintf("%x", []byte(test.got)); got != test.want {
			t.Errorf("%s = %s; want %s", test.name, got, test.want)
		}
	}
	// The length of a package counts its own bytes.
	for _, n := range []int{0, 62, 63, 64, 4092, 4093, 4094, 1<<20 - 4, 1<<20 - 3} {
		p := amlPackage(aml{0xff}, make(aml, n))
		extra := int(p[1] >> 6)
		length := int(p[1] & 0x3f)
		if extra > 0 {
			length = int(p[1] & 0xf)
			for i := range extra {
				length |= int(p[2+i]) << (4 + 8*i)
			}
		}
		if length != len(p)-1 {
			t.Errorf("package of %d bytes says %d; want %d", n, length, len(p)-1)
		}
	}
}
