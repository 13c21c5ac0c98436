package machine

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"vmm/kvm"
	vmmv1 "vmm/proto/vmm/v1"
)

// hardwareVersion is the version of what the guest can see of this machine
// (proto/vmm/v1/state.proto).
const hardwareVersion = 1

// given is what the guest was given of a processor when it was started. It
// goes with the guest, and no host takes it back.
type given struct {
	cpuid      [][]kvm.CPUIDEntry2 // by vCPU
	msrs       []uint32            // the registers that are a vCPU's state
	tscKHz     int
	hostTSCKHz int   // this host's, the rate of a vCPU that nobody asked for another
	xsave      int   // bytes
	tscRefused error // KVM does not run a guest's counter at tscKHz here
}

// offeredCPUID is what this host can tell a guest of this CPU model.
func offeredCPUID(system *kvm.System, model CPUModel) ([]kvm.CPUIDEntry2, error) {
	supported, err := system.SupportedCPUID()
	if err != nil {
		return nil, err
	}
	deadline, err := system.Check(kvm.CapTSCDeadlineTimer)
	if err != nil && !errors.Is(err, kvm.ErrNotSupported) {
		return nil, err
	}
	return guestCPUID(supported, model, deadline > 0)
}

// give makes a new vCPU what the guest is to have. What the first vCPU cannot
// do for a guest that arrives is refused here, before anything of it is.
func (m *Machine) give(system *kvm.System, cpu *kvm.VCPU) error {
	g := &m.given
	if err := cpu.SetCPUID(g.cpuid[cpu.ID()]); err != nil {
		return err
	}
	if cpu.ID() == 0 {
		mine, err := guestMSRs(system, cpu)
		if err != nil {
			return err
		}
		if g.msrs == nil {
			g.msrs = mine
		}
		if missing := without(g.msrs, mine); missing != nil {
			return fmt.Errorf("the guest's processor has model-specific registers that KVM on this host does not: %s", listMSRs(missing))
		}
		if g.hostTSCKHz, err = cpu.TSCKHz(); err != nil {
			return err
		}
		if g.tscKHz == 0 {
			g.tscKHz = g.hostTSCKHz
		}
		area, err := cpu.XSave()
		if err != nil {
			return err
		}
		g.xsave = max(g.xsave, len(area))
	}
	if g.tscKHz != g.hostTSCKHz {
		if err := cpu.SetTSCKHz(g.tscKHz); err != nil && cpu.ID() == 0 {
			// The guest's clock is kvm-clock as a rule, which does not mind;
			// Load refuses another guest.
			g.tscRefused = fmt.Errorf("the guest's time-stamp counter runs at %d kHz, this host's at %d: %w", g.tscKHz, g.hostTSCKHz, err)
			m.cfg.Warn(g.tscRefused.Error())
		}
	}
	return nil
}

// without is a list's elements that are not in another.
func without(list, other []uint32) (rest []uint32) {
	for _, x := range list {
		if !slices.Contains(other, x) {
			rest = append(rest, x)
		}
	}
	return rest
}

func listMSRs(indices []uint32) string {
	names := make([]string, len(indices))
	for i, x := range indices {
		names[i] = fmt.Sprintf("%#x", x)
	}
	return strings.Join(names, ", ")
}

// Requirements is what the guest needs of a host: what it was given when it
// was started. It does not change, and may be asked for while the guest runs.
func (m *Machine) Requirements() *vmmv1.Requirements {
	r := &vmmv1.Requirements{
		Hardware: hardwareVersion, Msrs: m.given.msrs, TscKhz: uint32(m.given.tscKHz), XsaveBytes: uint32(m.given.xsave),
	}
	for _, leaves := range m.given.cpuid {
		v := &vmmv1.VcpuRequirements{}
		for _, e := range leaves {
			v.Cpuid = append(v.Cpuid, &vmmv1.CpuidLeaf{
				Function: e.Function, Index: e.Index, Flags: e.Flags, Eax: e.EAX, Ebx: e.EBX, Ecx: e.ECX, Edx: e.EDX,
			})
		}
		r.Vcpus = append(r.Vcpus, v)
	}
	return r
}

// Needs is what a guest of this CPU model would need of another host, were it
// started here: it makes a machine of one vCPU for a moment. A guest of model
// host needs what this host offers.
func Needs(model CPUModel) (*vmmv1.Requirements, error) {
	m := empty(Config{CPUs: 1, Memory: minMemory, CPU: model, Warn: func(string) {}})
	for _, make := range []func() error{m.makeMemory, m.makeVM} {
		if err := make(); err != nil {
			return nil, errors.Join(err, m.Close())
		}
	}
	return m.Requirements(), m.Close()
}

// Lacks names what a guest needs that a host does not offer, which is what
// Needs says there of model host. Either may come from another host, and is
// not trusted. An error says that the two do not speak of the same virtual hardware.
func Lacks(need, offered *vmmv1.Requirements) (lacks []string, err error) {
	for _, r := range []*vmmv1.Requirements{need, offered} {
		if err := checkShape(r); err != nil {
			return nil, err
		}
	}
	lacks = compareCPUID(cpuidOf(need.Vcpus[0]), cpuidOf(offered.Vcpus[0]))
	if missing := without(need.Msrs, offered.Msrs); missing != nil {
		lacks = append(lacks, "model-specific registers "+listMSRs(missing))
	}
	return lacks, nil
}

// CheckCompatible says whether this host can offer what a guest needs. The
// error names everything that it cannot. A TSC rate is no reason: see
// NewIncoming.
func CheckCompatible(need *vmmv1.Requirements) error {
	system, err := kvm.Open(kvm.DefaultPath)
	if err != nil {
		return err
	}
	defer system.Close()
	if err := system.Require(kvm.Required...); err != nil {
		return err
	}
	return checkCompatible(system, need)
}

func checkCompatible(system *kvm.System, need *vmmv1.Requirements) error {
	if err := checkShape(need); err != nil {
		return err
	}
	offered, err := offeredCPUID(system, CPUHost)
	if err != nil {
		return err
	}
	listed, err := system.MSRIndices()
	if err != nil {
		return err
	}
	var lacks []string
	for _, v := range need.GetVcpus() {
		for _, lack := range compareCPUID(cpuidOf(v), offered) {
			if !slices.Contains(lacks, lack) { // the vCPUs differ in their ids only
				lacks = append(lacks, lack)
			}
		}
	}
	if missing := without(need.GetMsrs(), append(listed, mtrrs()...)); missing != nil {
		lacks = append(lacks, "model-specific registers "+listMSRs(missing))
	}
	if lacks != nil {
		return fmt.Errorf("the guest's processor has what this host cannot offer: %s", strings.Join(lacks, "; "))
	}
	return nil
}

// Bounds of what a peer may ask for.
const (
	maxCPUIDLeaves = 256 // KVM_MAX_CPUID_ENTRIES
	maxMSRs        = 1024
	maxTSCKHz      = 100_000_000 // 100 GHz
)

// checkShape refuses what no version of this program would ask for, and what
// only a later one understands.
func checkShape(need *vmmv1.Requirements) error {
	switch {
	case need.GetHardware() != hardwareVersion:
		return fmt.Errorf("the guest runs on version %d of the virtual hardware, this program has version %d: use the same version of vmm on both hosts",
			need.GetHardware(), hardwareVersion)
	case len(need.GetFeatures()) > 0:
		return fmt.Errorf("the guest's state has features that this version of vmm does not know: %q: use the same version on both hosts", need.GetFeatures())
	case len(need.GetVcpus()) < 1 || len(need.GetVcpus()) > MaxCPUs:
		return fmt.Errorf("the guest has %d vCPUs; a machine has 1 to %d", len(need.GetVcpus()), MaxCPUs)
	case len(need.GetMsrs()) < 1 || len(need.GetMsrs()) > maxMSRs:
		return fmt.Errorf("the guest's processor has %d model-specific registers; 1 to %d can be", len(need.GetMsrs()), maxMSRs)
	case need.GetTscKhz() < 1 || need.GetTscKhz() > maxTSCKHz:
		return fmt.Errorf("the guest's time-stamp counter runs at %d kHz; 1 to %d can be", need.GetTscKhz(), maxTSCKHz)
	case need.GetXsaveBytes() < minXSave || need.GetXsaveBytes() > maxXSave:
		return fmt.Errorf("the guest's XSAVE area has %d bytes; %d to %d can be", need.GetXsaveBytes(), minXSave, maxXSave)
	}
	seen := map[uint32]bool{}
	for _, x := range need.GetMsrs() {
		if seen[x] {
			return fmt.Errorf("model-specific register %#x is required twice", x)
		}
		seen[x] = true
	}
	for id, v := range need.GetVcpus() {
		if n := len(v.GetCpuid()); n < 1 || n > maxCPUIDLeaves {
			return fmt.Errorf("vCPU %d has %d CPUID leaves; 1 to %d can be", id, n, maxCPUIDLeaves)
		}
	}
	return nil
}

func cpuidOf(v *vmmv1.VcpuRequirements) []kvm.CPUIDEntry2 {
	leaves := make([]kvm.CPUIDEntry2, len(v.GetCpuid()))
	for i, l := range v.GetCpuid() {
		leaves[i] = kvm.CPUIDEntry2{
			Function: l.GetFunction(), Index: l.GetIndex(), Flags: l.GetFlags(),
			EAX: l.GetEax(), EBX: l.GetEbx(), ECX: l.GetEcx(), EDX: l.GetEdx(),
		}
	}
	return leaves
}

// featureRegisters are the CPUID registers in which each bit is a feature that
// software may use once it has seen it.
var featureRegisters = []cpuidReg{
	leaf1C, leaf1D, leaf7B, leaf7C, leaf7D, {7, 1, 'a'}, {7, 1, 'b'}, {7, 1, 'd'}, {7, 2, 'd'},
	{leafXSave, 0, 'a'}, {leafXSave, 0, 'd'}, {leafXSave, 1, 'a'}, {leafXSave, 1, 'c'}, {leafXSave, 1, 'd'},
	leafKVM, leafExtC, leafExtD, leafExt7, leafExt8, {0x8000_000a, 0, 'd'}, {0x8000_0021, 0, 'a'},
}

// compareCPUID names what a guest has seen that a host does not offer.
func compareCPUID(guest, host []kvm.CPUIDEntry2) (lacks []string) {
	value := func(entries []kvm.CPUIDEntry2, in cpuidReg) uint32 {
		if r := register(entries, in); r != nil {
			return *r
		}
		return 0
	}
	if g, h := vendor(guest), vendor(host); g != h {
		return []string{fmt.Sprintf("a processor of %s (this one is of %s)", g, h)}
	}
	for _, in := range featureRegisters {
		for left := value(guest, in) &^ value(host, in); left != 0; left &= left - 1 {
			lacks = append(lacks, featureName(in, uint(bits.TrailingZeros32(left))))
		}
	}
	// The processor's own layout of the XSAVE area is what the guest has saved
	// its threads' registers in: size and place of each component.
	for i := uint32(2); i < 63; i++ {
		size, place := cpuidReg{leafXSave, i, 'a'}, cpuidReg{leafXSave, i, 'b'}
		if value(guest, size) != 0 && (value(guest, size) != value(host, size) || value(guest, place) != value(host, place)) {
			lacks = append(lacks, fmt.Sprintf("XSAVE component %d of %d bytes at %d", i, value(guest, size), value(guest, place)))
		}
	}
	address := cpuidReg{leafAMDCores, 0, 'a'}
	if g, h := value(guest, address)&0xff, value(host, address)&0xff; g > h {
		lacks = append(lacks, fmt.Sprintf("physical addresses of %d bits (this host has %d)", g, h))
	}
	if g, h := value(guest, address)>>8&0xff, value(host, address)>>8&0xff; g > h {
		lacks = append(lacks, fmt.Sprintf("linear addresses of %d bits (this host has %d)", g, h))
	}
	return lacks
}

// vendor is the processor's vendor string, from leaf 0.
func vendor(entries []kvm.CPUIDEntry2) string {
	var b []byte
	for _, reg := range []byte{'b', 'd', 'c'} {
		if r := register(entries, cpuidReg{0, 0, reg}); r != nil {
			b = append(b, byte(*r), byte(*r>>8), byte(*r>>16), byte(*r>>24))
		}
	}
	return fmt.Sprintf("%q", b)
}
