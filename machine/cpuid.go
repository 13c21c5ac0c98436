package machine

import (
	"fmt"
	"strings"

	"vmm/kvm"
)

// CPUModel says which instruction-set extensions the guest is offered.
type CPUModel string

const (
	CPUHost CPUModel = "host"      // all that KVM offers and that can migrate
	CPUv2   CPUModel = "x86-64-v2" // the x86-64 psABI's level 2, nothing more
	CPUv3   CPUModel = "x86-64-v3" // level 3: AVX2, BMI, FMA and what they need
)

// ParseCPUModel reads a CPU model's name.
func ParseCPUModel(s string) (CPUModel, error) {
	switch m := CPUModel(s); m {
	case CPUHost, CPUv2, CPUv3:
		return m, nil
	}
	return "", fmt.Errorf("CPU model %q: give %s, %s or %s", s, CPUHost, CPUv2, CPUv3)
}

// A cpuidReg names one output register of a CPUID leaf.
type cpuidReg struct {
	leaf, subleaf uint32
	reg           byte // 'a' to 'd'
}

var (
	leaf1C   = cpuidReg{1, 0, 'c'}
	leaf1D   = cpuidReg{1, 0, 'd'}
	leaf7B   = cpuidReg{7, 0, 'b'}
	leaf7C   = cpuidReg{7, 0, 'c'}
	leaf7D   = cpuidReg{7, 0, 'd'}
	leafExtC = cpuidReg{0x8000_0001, 0, 'c'}
	leafExtD = cpuidReg{0x8000_0001, 0, 'd'}
	leafExt7 = cpuidReg{0x8000_0007, 0, 'd'}
	leafExt8 = cpuidReg{0x8000_0008, 0, 'b'}
	leafKVM  = cpuidReg{0x4000_0001, 0, 'a'}
)

// A feature is one CPUID bit. The names are the flags of /proc/cpuinfo but for sse3, which Linux calls pni.
type feature struct {
	name string
	in   cpuidReg
	bit  uint
}

// What the named models hold (x86-64 psABI 1.0, table 3.1), after what any
// 64-bit kernel on this machine needs.
var (
	featuresBase = []feature{
		{"fpu", leaf1D, 0}, {"pse", leaf1D, 3}, {"tsc", leaf1D, 4}, {"msr", leaf1D, 5}, {"pae", leaf1D, 6}, {"cx8", leaf1D, 8},
		{"apic", leaf1D, 9}, {"pge", leaf1D, 13}, {"cmov", leaf1D, 15}, {"pat", leaf1D, 16}, {"mmx", leaf1D, 23},
		{"fxsr", leaf1D, 24}, {"sse", leaf1D, 25}, {"sse2", leaf1D, 26},
		{"syscall", leafExtD, 11}, {"nx", leafExtD, 20}, {"lm", leafExtD, 29},
	}
	featuresV2 = []feature{
		{"sse3", leaf1C, 0}, {"ssse3", leaf1C, 9}, {"cx16", leaf1C, 13}, {"sse4_1", leaf1C, 19}, {"sse4_2", leaf1C, 20},
		{"popcnt", leaf1C, 23}, {"lahf_lm", leafExtC, 0},
	}
	featuresV3 = []feature{
		{"fma", leaf1C, 12}, {"movbe", leaf1C, 22}, {"xsave", leaf1C, 26}, {"avx", leaf1C, 28}, {"f16c", leaf1C, 29},
		{"bmi1", leaf7B, 3}, {"avx2", leaf7B, 5}, {"bmi2", leaf7B, 8}, {"abm", leafExtC, 5},
	}
	// featuresKept are passed on in every model where KVM offers them: they
	// belong to the virtual platform, or every 64-bit processor has them but an
	// emulated one may not.
	featuresKept = []feature{
		{"vme", leaf1D, 1}, {"de", leaf1D, 2}, {"mce", leaf1D, 7}, {"sep", leaf1D, 11}, {"mtrr", leaf1D, 12}, {"mca", leaf1D, 14},
		{"pse36", leaf1D, 17}, {"clflush", leaf1D, 19},
		{"x2apic", leaf1C, 21}, {"tsc_deadline_timer", leaf1C, 24}, {"hypervisor", leaf1C, 31}, {"ht", leaf1D, 28},
	}
	// featuresHidden are taken out of every model: they cannot be kept across
	// a migration.
	featuresHidden = []feature{
		{"invariant_tsc", leafExt7, 8}, // the destination's TSC may run at another rate
		// Asynchronous page faults: the guest holds tokens for faults that
		// only this host's KVM knows.
		{"kvm_async_pf", leafKVM, 4}, {"kvm_async_pf_vmexit", leafKVM, 10}, {"kvm_async_pf_int", leafKVM, 14},
		// Performance counters, whose MSRs differ between CPUs (with leaf 0Ah
		// cleared below).
		{"pdcm", leaf1C, 15}, {"perfctr_core", leafExtC, 23}, {"perfctr_nb", leafExtC, 24},
		// Nested virtualization: its state is not migrated.
		{"vmx", leaf1C, 5}, {"svm", leafExtC, 2},
	}
)

// CPUID leaves that need more than bits.
const (
	leafCache      = 0x4
	leafTopology   = 0xb
	leafXSave      = 0xd
	leafPMU        = 0xa
	leafTopologyV2 = 0x1f
	leafAMDCores   = 0x8000_0008
	leafAMDNode    = 0x8000_001e
	leafSVM        = 0x8000_000a
)

// guestCPUID derives from what KVM supports what every vCPU of a guest of
// this model is told. The entry for one vCPU comes from forVCPU.
func guestCPUID(supported []kvm.CPUIDEntry2, model CPUModel, tscDeadline bool) ([]kvm.CPUIDEntry2, error) {
	var keep []feature
	switch model {
	case CPUv2:
		keep = append(append(keep, featuresBase...), featuresV2...)
	case CPUv3:
		keep = append(append(append(keep, featuresBase...), featuresV2...), featuresV3...)
	}
	entries := make([]kvm.CPUIDEntry2, len(supported))
	copy(entries, supported)

	// Two bits are true though KVM_GET_SUPPORTED_CPUID does not have them: the
	// guest runs under a hypervisor (without it no guest looks for kvm-clock),
	// and the TSC deadline timer, which a capability tells (KVM api 4.46).
	if r := register(entries, leaf1C); r != nil {
		*r |= 1 << 31
		if tscDeadline {
			*r |= 1 << 24
		}
	}
	if keep != nil {
		var missing []string
		for _, f := range keep {
			if r := register(entries, f.in); r == nil || *r>>f.bit&1 == 0 {
				missing = append(missing, f.name)
			}
		}
		if missing != nil {
			return nil, fmt.Errorf("CPU model %s: this host lacks %s; choose a lower model or host", model, strings.Join(missing, ", "))
		}
		masks := map[cpuidReg]uint32{leaf1C: 0, leaf1D: 0, leaf7B: 0, leaf7C: 0, leaf7D: 0, leafExtC: 0, leafExtD: 0, leafExt8: 0}
		for _, f := range append(keep, featuresKept...) {
			masks[f.in] |= 1 << f.bit
		}
		// AMD repeats the low bits of leaf 1 in the extended leaf.
		masks[leafExtD] |= masks[leaf1D] & 0x0183_f3ff
		for in, mask := range masks {
			if r := register(entries, in); r != nil {
				*r &= mask
			}
		}
	}
	for _, f := range featuresHidden {
		if r := register(entries, f.in); r != nil {
			*r &^= 1 << f.bit
		}
	}
	kept := entries[:0]
	for _, e := range entries {
		switch e.Function {
		case leafPMU, leafSVM:
			e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0
		case 7:
			if model != CPUHost && e.Index > 0 {
				continue
			}
			if model != CPUHost {
				e.EAX = 0 // the highest subleaf
			}
		case leafXSave:
			switch {
			case model == CPUv2: // no XSAVE, so no state components
				e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0
			case model == CPUv3 && e.Index == 0:
				const x87SSEAVX, avxEnd = 7, 576 + 256 // bytes: legacy area, header, YMM
				e.EAX, e.EDX = x87SSEAVX, 0
				e.EBX, e.ECX = avxEnd, avxEnd
			case model == CPUv3 && e.Index == 1:
				e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0 // XSAVEOPT and the like
			case model == CPUv3 && e.Index > 2:
				continue
			}
		}
		kept = append(kept, e)
	}
	return kept, nil
}

// register finds an output register among entries.
func register(entries []kvm.CPUIDEntry2, in cpuidReg) *uint32 {
	for i := range entries {
		e := &entries[i]
		if e.Function != in.leaf || e.Index != in.subleaf {
			continue
		}
		switch in.reg {
		case 'a':
			return &e.EAX
		case 'b':
			return &e.EBX
		case 'c':
			return &e.ECX
		case 'd':
			return &e.EDX
		}
	}
	return nil
}

// forVCPU returns a copy of entries for vCPU id of n: each is a core of one
// package, its APIC id is id. Leaves that give the id or the topology say so.
func forVCPU(entries []kvm.CPUIDEntry2, id, n int) []kvm.CPUIDEntry2 {
	shift := uint32(0) // bits of the APIC id that tell cores of a package apart
	for 1<<shift < n {
		shift++
	}
	out := make([]kvm.CPUIDEntry2, 0, len(entries)+6)
	for _, e := range entries {
		switch e.Function {
		case 1:
			e.EBX = e.EBX&0x0000_ffff | uint32(id)<<24 | 1<<shift<<16
		case leafCache:
			// EAX 25:14 is the sharing of the cache, 31:26 the cores of the
			// package, both less one. Private caches, but for the last level.
			if e.EAX&0x1f == 0 {
				break
			}
			e.EAX &= 1<<14 - 1
			e.EAX |= (1<<shift - 1) << 26
			if level := e.EAX >> 5 & 7; level >= 3 {
				e.EAX |= (1<<shift - 1) << 14
			}
		case leafAMDCores:
			e.ECX = e.ECX&^0xf0ff | shift<<12 | uint32(n-1)
		case leafAMDNode:
			e.EAX, e.EBX, e.ECX = uint32(id), uint32(id), 0 // extended APIC id, core id with one thread, one node
		case leafTopology, leafTopologyV2:
			continue
		}
		out = append(out, e)
	}
	// The extended topology: one thread per core, n cores (SDM 2A, CPUID).
	const significantIndex, smtType, coreType = 1, 1, 2
	highest := uint32(0)
	for _, e := range entries {
		if e.Function < 0x4000_0000 {
			highest = max(highest, e.Function)
		}
	}
	for _, leaf := range []uint32{leafTopology, leafTopologyV2} {
		if leaf > highest {
			continue
		}
		out = append(out,
			kvm.CPUIDEntry2{Function: leaf, Index: 0, Flags: significantIndex, EAX: 0, EBX: 1, ECX: 0 | smtType<<8, EDX: uint32(id)},
			kvm.CPUIDEntry2{Function: leaf, Index: 1, Flags: significantIndex, EAX: shift, EBX: uint32(n), ECX: 1 | coreType<<8, EDX: uint32(id)},
			kvm.CPUIDEntry2{Function: leaf, Index: 2, Flags: significantIndex, ECX: 2, EDX: uint32(id)})
	}
	return out
}
