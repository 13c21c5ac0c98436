package doctor

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"vmm/control"
	"vmm/kvm/kvmtest"
	"vmm/machine"
	"vmm/migration"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
	"vmm/scsi/sg"
	"vmm/tests/certs"
)

// say is a list of findings, one line each.
func say(found []Finding) string {
	var b strings.Builder
	for _, f := range found {
		b.WriteString(string(f.Verdict) + " " + f.Name + ": " + f.Detail)
		if f.Mend != "" {
			b.WriteString(" | " + f.Mend)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// tree is a host whose /proc and /sys have these files.
func tree(t *testing.T, files map[string]string) host {
	t.Helper()
	h := host{root: t.TempDir(), kvm: "/dev/kvm", now: time.Now()}
	for path, content := range files {
		path = filepath.Join(h.root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func TestMemory(t *testing.T) {
	for _, test := range []struct {
		meminfo, thp, want string
	}{
		{"MemTotal:  2097152 kB\nMemFree: 1 kB\nMemAvailable:    1048576 kB\n", "always within_size advise [never] deny force",
			"ok memory: 2048 MiB, 1024 MiB of it available\nok huge pages: guest memory is in small pages (shmem_enabled is never)"},
		{"MemTotal:  2097152 kB\nMemAvailable:    1024 kB\n", "always [within_size] advise never deny force",
			"warn memory: 2048 MiB, 1 MiB of it available | a stock kernel wants 256 MiB for itself: free some\nok huge pages: guest memory is in huge pages where there are any (shmem_enabled is within_size)"},
		{"what\n", "", "warn memory: 0 MiB, 0 MiB of it available | a stock kernel wants 256 MiB for itself: free some\nok huge pages: this kernel has none for guest memory"},
	} {
		h := tree(t, map[string]string{"proc/meminfo": test.meminfo, "sys/kernel/mm/transparent_hugepage/shmem_enabled": test.thp})
		if got := say([]Finding{h.examineMemory(), h.examineHugePages()}); !strings.HasPrefix(got, test.want) {
			t.Errorf("memory of %q, %q: %s; want %s", test.meminfo, test.thp, got, test.want)
		}
	}
}

func TestKVM(t *testing.T) {
	h := host{kvm: filepath.Join(t.TempDir(), "kvm")}
	if got := say(h.examineKVM()); !strings.Contains(got, "fail kvm: ") || !strings.Contains(got, "load kvm_intel or kvm_amd") {
		t.Errorf("without /dev/kvm: %s", got)
	}
	kvmtest.NeedKVM(t)
	got := say(host{kvm: "/dev/kvm"}.examineKVM())
	for _, want := range []string{"ok kvm: ", "ok capabilities: all ", " native execution: "} {
		if !strings.Contains(got, want) {
			t.Errorf("with /dev/kvm: %s; want %q", got, want)
		}
	}
}

func TestState(t *testing.T) {
	base := t.TempDir()
	at := func(name string) string { return filepath.Join(base, name) }
	journal, err := pr.OpenJournal(at("journal"))
	if err != nil {
		t.Fatal(err)
	}
	if err := journal.For(pr.Entry{LUN: "naa.1", Path: "/dev/sg1", Migration: "1", Key: 1}).Note(false); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(at("empty"), 0o700), os.WriteFile(at("file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{
		at("empty"):     "ok state directory: " + at("empty") + "\nok journal: nothing to settle\n",
		at("a/b/c"):     "ok state directory: " + at("a/b/c") + ", made when it is needed\n",
		at("file/a"):    "warn state directory: ",
		at("journal"):   "ok state directory: " + at("journal") + "\nwarn journal: 1 registrations of guests on the move are not settled | unless a migration is under way: vmm pr recover\n",
		"/proc/1/a/dir": "warn state directory: ",
	} {
		if got := say(examineState(dir, nil)); !strings.HasPrefix(got, want) {
			t.Errorf("state in %s: %s; want %s", dir, got, want)
		}
	}
	if got := say(examineState("", errors.New("no home"))); !strings.HasPrefix(got, "warn state directory: no home | without its journal") {
		t.Errorf("state nowhere: %s", got)
	}
	if _, err := os.Stat(at("a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the examination made %s: %v", at("a"), err)
	}
}

var moment = time.Date(2026, 1, 15, 12, 0, 0, 0, time.UTC)

// newAuthority makes one that ends then.
func newAuthority(t *testing.T, until time.Time) *certs.Authority {
	return certs.New(t, moment.AddDate(-1, 0, 0), until)
}

func TestTLS(t *testing.T) {
	self, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	a := newAuthority(t, moment.AddDate(5, 0, 0))
	cert := func(change func(*x509.Certificate)) *x509.Certificate {
		c := a.Host(self, "host1")
		c.NotBefore, c.NotAfter = moment.AddDate(0, -1, 0), moment.AddDate(1, 0, 0)
		if change != nil {
			change(c)
		}
		return c
	}
	good := a.Directory(cert(nil))
	for _, test := range []struct {
		name string
		dir  string
		want []string // each in some line; no other line is warn or fail
	}{
		{"none", "", []string{"ok tls: there are no TLS files"}},
		{"good", good, []string{"ok tls: " + good, "ok tls certificate: host1, valid until 2027-01-15", "ok tls authority: hosts, valid until 2031-01-15", "ok tls chain: signed", "ok tls names: " + self}},
		{"nowhere", filepath.Join(good, "nowhere"), []string{"fail tls: TLS: stat "}},
		{"expired", a.Directory(cert(func(c *x509.Certificate) { c.NotAfter = moment.AddDate(0, 0, -1) })),
			[]string{"fail tls certificate: host1 was valid until 2026-01-14 | have a new one signed", "ok tls chain"}},
		{"soon", a.Directory(cert(func(c *x509.Certificate) { c.NotAfter = moment.AddDate(0, 0, 5) })),
			[]string{"warn tls certificate: host1 is valid until 2026-01-20 only"}},
		{"not yet", a.Directory(cert(func(c *x509.Certificate) { c.NotBefore = moment.AddDate(0, 0, 1) })),
			[]string{"fail tls certificate: host1 is valid from 2026-01-16T12:00:00Z on", "ok tls chain"}},
		{"an expired authority", newAuthority(t, moment.AddDate(0, 0, -2)).Directory(cert(nil)),
			[]string{"fail tls authority: hosts was valid until 2026-01-13"}},
		{"server only", a.Directory(cert(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] })),
			[]string{"fail tls chain: the certificate is not for the use as client (to send them) | have one signed with extendedKeyUsage"}},
		{"another name", a.Directory(cert(func(c *x509.Certificate) { c.DNSNames = []string{"host9.example"} })),
			[]string{"warn tls names: host9.example; not this host's own name, " + self}},
		{"no name", a.Directory(cert(func(c *x509.Certificate) { c.DNSNames = nil })),
			[]string{"fail tls names: the certificate has no subjectAltName"}},
	} {
		h := host{now: moment}
		found := h.examineTLS(test.dir)
		got := say(found)
		for _, want := range test.want {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %s\nwant %q", test.name, got, want)
			}
		}
		for _, f := range found {
			line := say([]Finding{f})
			expected := f.Verdict == OK
			for _, want := range test.want {
				expected = expected || strings.HasPrefix(line, want)
			}
			if !expected {
				t.Errorf("%s: nobody expects %s", test.name, line)
			}
		}
	}
	// Files that do not belong together, or that anybody can read.
	other := newAuthority(t, moment.AddDate(5, 0, 0))
	if err := os.WriteFile(filepath.Join(good, migration.FileCA), other.Files(cert(nil))[migration.FileCA], 0o644); err != nil {
		t.Fatal(err)
	}
	if got := say(host{now: moment}.examineTLS(good)); !strings.Contains(got, "fail tls chain: x509: certificate signed by unknown authority") {
		t.Errorf("another authority: %s", got)
	}
	if err := os.Chmod(filepath.Join(good, migration.FileKey), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := say(host{now: moment}.examineTLS(good)); !strings.Contains(got, "fail tls: TLS: ") || !strings.Contains(got, "chmod 600") {
		t.Errorf("a key that others can read: %s", got)
	}
}

func TestReservations(t *testing.T) {
	full := pr.Capabilities{Persist: true, TypesValid: true, Types: pr.Types[:]}
	for _, test := range []struct {
		name string
		f    pr.Preflight
		caps pr.Capabilities
		want string
	}{
		{"all", pr.Preflight{FullStatus: true, Move: true}, full,
			"ok : reservations with READ FULL STATUS, REGISTER AND MOVE, APTPL; all types; 0 registered, not reserved\n"},
		{"in use", pr.Preflight{FullStatus: true, Keys: pr.Keys{Keys: []pr.Key{1, 2}}, Held: pr.Reservation{Type: pr.WriteExclusiveRegistrantsOnly}}, full,
			"ok : reservations with READ FULL STATUS, APTPL; without REGISTER AND MOVE; all types; 2 registered, reserved: Write Exclusive, Registrants Only\n"},
		{"keys alone", pr.Preflight{}, pr.Capabilities{},
			"warn : reservations; without READ FULL STATUS, REGISTER AND MOVE, APTPL; 0 registered, not reserved | a guest that shares its key"},
		{"one type", pr.Preflight{FullStatus: true}, pr.Capabilities{TypesValid: true, Types: []pr.Type{pr.WriteExclusive}},
			"warn : reservations with READ FULL STATUS; without REGISTER AND MOVE, APTPL; 0 registered, not reserved | the target has no Exclusive Access"},
	} {
		if got := say([]Finding{reservations(test.f, test.caps)}); !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: %s; want %s", test.name, got, test.want)
		}
	}
}

func TestUnits(t *testing.T) {
	unit := func(node, name string) sg.Unit { return sg.Unit{Node: node, Name: name, Type: "0"} }
	f := examineLUN(t.Context(), "", sg.Unit{Node: "/dev/sg1", Vendor: "A\x1b[31m", Product: "B"})
	if got := say([]Finding{f}); !strings.HasPrefix(got, "warn : it has no designator") {
		t.Errorf("a unit without a name: %s", got)
	}
	if got := called(sg.Unit{Vendor: "A\x1b[31m", Product: "B\n"}); got != "A?[31m B" {
		t.Errorf("called() = %q; want no control characters", got)
	}
	f = examineLUN(t.Context(), control.RunDir(t.TempDir()), unit(filepath.Join(t.TempDir(), "sg1"), "naa.1"))
	if got := say([]Finding{f}); !strings.HasPrefix(got, "warn : not permitted: no such file") {
		t.Errorf("a unit without a node: %s", got)
	}
	got := say(examinePaths([]sg.Unit{unit("/dev/sg1", "naa.1"), unit("/dev/sg2", "naa.2"), unit("/dev/sg3", "naa.1"), unit("/dev/sg4", ""), unit("/dev/sg5", "")}))
	if want := "ok paths: naa.1 is reached by sg1, sg3: a guest gets one of them, and its reservations are that path's alone (docs/luns.md)\n"; got != want {
		t.Errorf("examinePaths() = %q; want %q", got, want)
	}
}

// processor is a survey's, with some features in leaf 1, register C.
func processor(features uint32) *vmmv1.Requirements {
	return &vmmv1.Requirements{
		Hardware: 1, Msrs: []uint32{0x10}, TscKhz: 2_000_000, XsaveBytes: 4096,
		Vcpus: []*vmmv1.VcpuRequirements{{Cpuid: []*vmmv1.CpuidLeaf{{Function: 0}, {Function: 1, Ecx: features}}}},
	}
}

func TestCompare(t *testing.T) {
	lun := func(node, identity, boot, address string) *vmmv1.HostLun {
		return &vmmv1.HostLun{Id: node, Identity: identity, BootId: boot, Address: address}
	}
	here := &vmmv1.HostSurvey{Processor: processor(3), Luns: []*vmmv1.HostLun{
		lun("/dev/sg1", "naa.1", "A", "0:0:0:1"), lun("/dev/sg2", "naa.2", "A", "0:0:0:2"), lun("/dev/sg3", "naa.1", "A", "1:0:0:1"),
	}}
	needs := map[machine.CPUModel]*vmmv1.Requirements{machine.CPUHost: processor(3), machine.CPUv2: processor(1)}
	for _, test := range []struct {
		name   string
		change func(there *vmmv1.HostSurvey)
		want   []string
		can    bool
	}{
		{"the same", nil, []string{
			"ok peer: host2 waits for a guest, with vmm 1.2", "ok peer version: both speak version 1", "ok peer processor: offers all",
			"ok peer tsc: both count 2000000 kHz", "ok peer memory: 4096 MiB", "ok peer /dev/sg1: naa.1 is there, as /dev/sg7", "warn peer /dev/sg2: naa.2 is not there | a guest that has it cannot",
		}, true},
		{"this host", func(s *vmmv1.HostSurvey) { s.Luns[0] = lun("/dev/sg3", "naa.1", "A", "0:0:0:1") },
			[]string{"ok peer /dev/sg1: naa.1 is there, on the same nexus"}, true},
		{"another stream", func(s *vmmv1.HostSurvey) { s.Version = 9 }, []string{"fail peer version: the other host speaks version 9"}, false},
		{"an older one", func(s *vmmv1.HostSurvey) { s.Features = nil }, []string{"warn peer version: it does not know local-holds, local-memory | use the same version"}, true},
		{"another machine", func(s *vmmv1.HostSurvey) { s.Processor.Hardware = 9 }, []string{"fail peer processor: the guest runs on version 9"}, false},
		{"a lesser one", func(s *vmmv1.HostSurvey) { s.Processor = processor(1) },
			[]string{"warn peer processor: it lacks pclmulqdq | only guests that were started with --cpu x86-64-v2 can migrate there"}, true},
		{"the least", func(s *vmmv1.HostSurvey) { s.Processor = processor(0) },
			[]string{"fail peer processor: it lacks sse3, pclmulqdq | no guest of this host can migrate there"}, false},
		{"a richer one", func(s *vmmv1.HostSurvey) { s.Processor = processor(7) },
			[]string{"ok peer processor: offers all", "warn peer processor: this host lacks dtes64 | guests that are started there with --cpu host cannot come here"}, true},
		{"another clock", func(s *vmmv1.HostSurvey) { s.Processor.TscKhz = 3_000_000 }, []string{"ok peer tsc: this host's time-stamp counter runs at 2000000 kHz, the other's at 3000000"}, true},
		{"a sick one", func(s *vmmv1.HostSurvey) { s.Problem, s.Processor = "no\x1b[2J KVM", nil }, []string{"fail peer host: no?[2J KVM | vmm doctor on the other host says more"}, false},
		{"an empty one", func(s *vmmv1.HostSurvey) { proto.Reset(s) }, []string{"fail peer version: the other host speaks version 0"}, false},
	} {
		there := &vmmv1.HostSurvey{
			Version: 1, Features: []string{"local-holds", "local-memory"}, Program: "1.2", Host: "host2", Processor: processor(3), MemoryBytes: 4 << 30,
			Luns: []*vmmv1.HostLun{lun("/dev/sg7", "naa.1", "B", "0:0:0:1"), nil},
		}
		if test.change != nil {
			test.change(there)
		}
		found := compare(here, there, needs)
		got := say(found)
		for _, want := range test.want {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %s\nwant %q", test.name, got, want)
			}
		}
		r := &Report{}
		r.Compare(found)
		if *r.CanMigrate != test.can || r.Healthy() != test.can {
			t.Errorf("%s: can migrate %v, healthy %v; want %v\n%s", test.name, *r.CanMigrate, r.Healthy(), test.can, got)
		}
	}
	if got := say(compareLUNs(nil, nil)); !strings.HasPrefix(got, "ok peer luns: this host has no LUNs") {
		t.Errorf("compareLUNs() of none: %s", got)
	}
}

func TestPeerThatIsNotThere(t *testing.T) {
	a := migration.Address{Network: "unix", Address: filepath.Join(t.TempDir(), "nobody")}
	got := say(Peer(context.Background(), a, migration.Security{}, ""))
	if !strings.HasPrefix(got, "fail peer: connect to unix://"+a.Address) || !strings.Contains(got, "vmm receive --listen") {
		t.Errorf("Peer() of nobody: %s", got)
	}
	a = migration.Address{Network: "tcp", Address: "host2.invalid:4444"}
	if got := say(Peer(context.Background(), a, migration.Security{}, "")); !strings.Contains(got, "without TLS") {
		t.Errorf("Peer() without TLS: %s", got)
	}
}
