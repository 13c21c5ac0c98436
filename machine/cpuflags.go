package machine

import (
	"fmt"
	"strings"
)

// flags are the flags of /proc/cpuinfo for the bits of a register, from bit 0
// on; a dash is a bit that has none (Linux, cpufeatures.h; Intel SDM volume 2A,
// CPUID; AMD APM volume 3, appendix E).
var flags = map[cpuidReg]string{
	leaf1C: "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm " +
		"- pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
	leaf1D: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov " +
		"pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
	leaf7B: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a " +
		"avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
	leaf7C: "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 user_shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - " +
		"la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
	leaf7D: "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - - serialize hybrid_cpu " +
		"tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
	{7, 1, 'a'}: "- - - - avx_vnni avx512_bf16 - - - - fzrm fsrs fsrc - - - - - - - - amx_fp16 - avx_ifma - - lam",
	leafExtC: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp " +
		"fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
	leafExtD: "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
	leafExt8: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - - - - - amd_ppin ssbd virt_ssbd ssb_no - psfd",

	// By their names in KVM's cpuid.rst.
	leafKVM: "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt " +
		"- kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id " +
		"kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable",

	{leafXSave, 1, 'a'}: "xsaveopt xsavec xgetbv1 xsaves xfd",
}

// featureName is a feature's name in the CPU models, its flag in /proc/cpuinfo,
// or its place.
func featureName(in cpuidReg, bit uint) string {
	for _, list := range [][]feature{featuresBase, featuresV2, featuresV3, featuresKept, featuresHidden} {
		for _, f := range list {
			if f.in == in && f.bit == bit {
				return f.name
			}
		}
	}
	if names := strings.Fields(flags[in]); int(bit) < len(names) && names[bit] != "-" {
		return names[bit]
	}
	return fmt.Sprintf("CPUID %#x.%d E%cX bit %d", in.leaf, in.subleaf, in.reg-'a'+'A', bit)
}
