package machine

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"vmm/kvm"
	"vmm/kvm/kvmtest"
	vmmv1 "vmm/proto/vmm/v1"
)

// lesser is the rich host without what change takes away.
func lesser(change func(entries []kvm.CPUIDEntry2)) []kvm.CPUIDEntry2 {
	entries := rich()
	change(entries)
	return entries
}

// set replaces a register, which must be there.
func set(entries []kvm.CPUIDEntry2, in cpuidReg, v uint32) { *register(entries, in) = v }

func TestCompareCPUID(t *testing.T) {
	for _, test := range []struct {
		name  string
		guest func(entries []kvm.CPUIDEntry2)
		host  func(entries []kvm.CPUIDEntry2)
		want  []string
	}{
		{"the same", nil, nil, nil},
		{"a lesser guest", func(e []kvm.CPUIDEntry2) { set(e, leaf7B, 0); set(e, leaf1C, 1) }, nil, nil},
		{"no AVX2, no SSE3", nil, func(e []kvm.CPUIDEntry2) {
			*register(e, leaf7B) &^= 1 << 5
			*register(e, leaf1C) &^= 1 << 0
		}, []string{"sse3", "avx2"}},
		{"no name for it", nil, func(e []kvm.CPUIDEntry2) { *register(e, leaf7B) &^= 1 << 22 }, []string{"CPUID 0x7.0 EBX bit 22"}},
		{"what no model has", nil, func(e []kvm.CPUIDEntry2) { *register(e, leaf7B) &^= 1<<19 | 1<<16 }, []string{"avx512f", "adx"}},
		{"a leaf is missing", nil, func(e []kvm.CPUIDEntry2) {
			e[slices.IndexFunc(e, func(x kvm.CPUIDEntry2) bool { return x.Function == 0xd && x.Index == 1 })].Index = 99
		},
			[]string{"xsaveopt", "xsavec", "xgetbv1", "xsaves"}},
		{"a paravirtual feature", nil, func(e []kvm.CPUIDEntry2) { *register(e, leafKVM) &^= 1 << 3 }, []string{"kvm_clocksource2"}},
		{"another vendor", func(e []kvm.CPUIDEntry2) { set(e, cpuidReg{0, 0, 'b'}, 0x756e6547) }, nil,
			[]string{`a processor of "Genu\x00\x00\x00\x00\x00\x00\x00\x00" (this one is of "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")`}},
		{"a component elsewhere", nil, func(e []kvm.CPUIDEntry2) { set(e, cpuidReg{leafXSave, 5, 'b'}, 832) }, []string{"XSAVE component 5 of 64 bytes at 1088"}},
		{"fewer physical addresses", nil, func(e []kvm.CPUIDEntry2) { set(e, cpuidReg{leafAMDCores, 0, 'a'}, 0x3027) }, []string{"physical addresses of 48 bits (this host has 39)"}},
		{"fewer linear addresses", func(e []kvm.CPUIDEntry2) { set(e, cpuidReg{leafAMDCores, 0, 'a'}, 0x3930) }, nil, []string{"linear addresses of 57 bits (this host has 48)"}},
	} {
		guest, host := rich(), rich()
		if test.guest != nil {
			guest = lesser(test.guest)
		}
		if test.host != nil {
			host = lesser(test.host)
		}
		if got := compareCPUID(guest, host); !slices.Equal(got, test.want) {
			t.Errorf("%s: compareCPUID() = %q; want %q", test.name, got, test.want)
		}
	}
}

// The models' own names, and some that the AMD and Intel manuals put at the end of a
// register, pin the places of all between them.
func TestFlags(t *testing.T) {
	pins := []feature{
		{"rdrand", leaf1C, 30}, {"pbe", leaf1D, 31}, {"avx512vl", leaf7B, 31}, {"rdpid", leaf7C, 22}, {"pks", leaf7C, 31},
		{"fsrm", leaf7D, 4}, {"serialize", leaf7D, 14}, {"spec_ctrl_ssbd", leaf7D, 31}, {"lam", cpuidReg{7, 1, 'a'}, 26},
		{"mwaitx", leafExtC, 29}, {"3dnow", leafExtD, 31}, {"psfd", leafExt8, 28}, {"kvm_clocksource_stable", leafKVM, 24},
	}
	for _, list := range [][]feature{featuresBase, featuresV2, featuresV3, featuresKept, featuresHidden, pins} {
		for _, f := range list {
			names := strings.Fields(flags[f.in])
			if f.name == "sse3" {
				f.name = "pni" // Linux's
			}
			if len(names) > 0 && (len(names) <= int(f.bit) || names[f.bit] != f.name) {
				t.Errorf("%v bit %d is not %s among %q", f.in, f.bit, f.name, names)
			}
		}
	}
	seen := map[string]bool{"-": false}
	for in, line := range flags {
		names := strings.Fields(line)
		if len(names) > 32 {
			t.Errorf("%v has %d bits", in, len(names))
		}
		for _, name := range names {
			if seen[name] {
				t.Errorf("%s is there twice", name)
			}
			seen[name] = name != "-"
		}
	}
}

func TestCheckShape(t *testing.T) {
	good := func() *vmmv1.Requirements {
		return &vmmv1.Requirements{
			Hardware: hardwareVersion, Vcpus: []*vmmv1.VcpuRequirements{{Cpuid: []*vmmv1.CpuidLeaf{{}}}},
			Msrs: []uint32{msrTSC}, TscKhz: 2_000_000, XsaveBytes: 4096,
		}
	}
	if err := checkShape(good()); err != nil {
		t.Errorf("checkShape() = %v", err)
	}
	for want, change := range map[string]func(*vmmv1.Requirements){
		"version 0 of the virtual hardware":     func(r *vmmv1.Requirements) { proto.Reset(r) },
		"version 2 of the virtual hardware":     func(r *vmmv1.Requirements) { r.Hardware = 2 },
		`does not know: ["sound"]`:              func(r *vmmv1.Requirements) { r.Features = []string{"sound"} },
		"0 vCPUs":                               func(r *vmmv1.Requirements) { r.Vcpus = nil },
		"9 vCPUs":                               func(r *vmmv1.Requirements) { r.Vcpus = make([]*vmmv1.VcpuRequirements, 9) },
		"vCPU 0 has 0 CPUID leaves":             func(r *vmmv1.Requirements) { r.Vcpus[0] = nil },
		"vCPU 0 has 257 CPUID leaves":           func(r *vmmv1.Requirements) { r.Vcpus[0].Cpuid = make([]*vmmv1.CpuidLeaf, 257) },
		"0 model-specific registers":            func(r *vmmv1.Requirements) { r.Msrs = nil },
		"5000 model-specific registers":         func(r *vmmv1.Requirements) { r.Msrs = make([]uint32, 5000) },
		"register 0x10 is required twice":       func(r *vmmv1.Requirements) { r.Msrs = []uint32{msrTSC, msrTSC} },
		"runs at 0 kHz":                         func(r *vmmv1.Requirements) { r.TscKhz = 0 },
		"XSAVE area has 0 bytes":                func(r *vmmv1.Requirements) { r.XsaveBytes = 0 },
		"XSAVE area has 4294967295 bytes":       func(r *vmmv1.Requirements) { r.XsaveBytes = 1<<32 - 1 },
		"counter runs at 4000000000 kHz; 1 to ": func(r *vmmv1.Requirements) { r.TscKhz = 4_000_000_000 },
	} {
		r := good()
		change(r)
		if err := checkShape(r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("checkShape() = %v; want an error with %q", err, want)
		}
	}
}

// What this host gives a guest it can give another; what it lacks is named, all
// of it, by the destination as it is by the check.
func TestCheckCompatible(t *testing.T) {
	m, _ := newMachine(t, asm{}.poweroff(), func(c *Config) { c.CPUs = 2 })
	good := m.Requirements()
	if err := CheckCompatible(travelled(t, good)); err != nil {
		t.Errorf("CheckCompatible() of this host's own = %v", err)
	}
	bad := proto.CloneOf(good)
	for _, v := range bad.Vcpus {
		for _, l := range v.Cpuid {
			if l.Function == 1 {
				l.Ecx |= 1 << 5 // vmx, which no guest is offered
			}
		}
	}
	bad.Msrs = append(bad.Msrs, 0xdead)
	cfg := m.cfg
	cfg.Kernel = ""
	n, fromNew := NewIncoming(cfg, Incoming{Requirements: bad})
	if fromNew == nil {
		n.Close()
	}
	for _, err := range []error{CheckCompatible(bad), fromNew} {
		if err == nil || !strings.HasSuffix(err.Error(), "cannot offer: vmx; model-specific registers 0xdead") {
			t.Errorf("got %v; want an error that names both", err)
		}
	}
	for cpus, want := range map[int]string{1: "2 vCPUs; its configuration says 1", 99: "give 1 to 8"} {
		cfg.CPUs = cpus
		file := &closer{}
		if n, err := NewIncoming(cfg, Incoming{Requirements: good, Kernel: &Image{Data: file}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("NewIncoming() with %d vCPUs = %v, %v; want an error with %q", cpus, n, err, want)
		}
		if file.closed != 1 {
			t.Errorf("NewIncoming() with %d vCPUs closed the kernel's image %d times; want once", cpus, file.closed)
		}
	}
}

// closer counts how often it is closed.
type closer struct {
	bytes.Reader
	closed int
}

func (c *closer) Close() error { c.closed++; return nil }

// A register that this host's KVM lists but does not give to this guest's
// processor is found with its first vCPU.
func TestRegisterThatTheProcessorLacks(t *testing.T) {
	system := kvmtest.NeedKVM(t)
	m, _ := newMachine(t, asm{}.poweroff(), nil)
	m.given.msrs = append(slices.Clone(m.given.msrs), 0xdead)
	if err := m.give(system, m.vcpus[0].cpu); err == nil || !strings.HasSuffix(err.Error(), "does not: 0xdead") {
		t.Errorf("give() = %v; want an error that names the register", err)
	}
}

// A rate that KVM does not provide is a warning, and the end for a guest that
// reads no other clock.
func TestTSCRate(t *testing.T) {
	m, s := idleState(t)
	need := m.Requirements()
	need.TscKhz /= 2
	cfg := m.cfg
	var warnings []string
	cfg.Kernel, cfg.Warn = "", func(s string) { warnings = append(warnings, s) }
	for _, kvmclock := range []bool{false, true} {
		n, err := NewIncoming(cfg, Incoming{Requirements: need, Kernel: image(t, m)})
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		if n.given.tscRefused == nil {
			t.Skip("this KVM gives a guest any rate")
		}
		if len(warnings) != 1 || !strings.Contains(warnings[0], "KVM_SET_TSC_KHZ") {
			t.Errorf("warnings %q; want one of the rate", warnings)
		}
		warnings = nil
		s := proto.CloneOf(s)
		if kvmclock {
			s.Vcpus[0].Msrs[msrIndex(s.Vcpus[0].Msrs, msrSystemTime)].Value = 12<<20 | systemTimeOn
		}
		if err := n.Load(s); (err == nil) != kvmclock {
			t.Errorf("Load() of a guest with kvm-clock %v = %v", kvmclock, err)
		}
	}
}

// What a guest of this host needs, this host offers; what the survey says is
// what a machine says of itself.
func TestNeedsAndLacks(t *testing.T) {
	kvmtest.NeedKVM(t)
	need, err := Needs(CPUHost)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckCompatible(need); err != nil {
		t.Errorf("CheckCompatible(Needs()) = %v", err)
	}
	if lacks, err := Lacks(need, need); lacks != nil || err != nil {
		t.Errorf("Lacks(x, x) = %v, %v; want none", lacks, err)
	}
	lesser := proto.CloneOf(need)
	for _, l := range lesser.Vcpus[0].Cpuid {
		if l.Function == 1 {
			l.Edx &^= 1 << 25
		}
	}
	lesser.Msrs = lesser.Msrs[1:]
	lacks, err := Lacks(need, lesser)
	if want := []string{"sse", "model-specific registers " + listMSRs(need.Msrs[:1])}; err != nil || !slices.Equal(lacks, want) {
		t.Errorf("Lacks() of a lesser host = %q, %v; want %q", lacks, err, want)
	}
	if lacks, err := Lacks(lesser, need); lacks != nil || err != nil {
		t.Errorf("Lacks() of a richer host = %q, %v; want none", lacks, err)
	}
	if _, err := Lacks(need, &vmmv1.Requirements{Hardware: 99}); err == nil || !strings.Contains(err.Error(), "version 99 of the virtual hardware") {
		t.Errorf("Lacks() of other hardware: %v", err)
	}
}
