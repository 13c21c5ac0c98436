package machine

import (
	"slices"
	"strings"
	"testing"

	"vmm/kvm"
)

// rich is a host that has everything.
func rich() []kvm.CPUIDEntry2 {
	const all = ^uint32(0)
	return []kvm.CPUIDEntry2{
		{Function: 0, EAX: 0x1f},
		{Function: 1, EAX: 0x806f8, EBX: 0x12345678, ECX: all &^ (1<<24 | 1<<31), EDX: all},
		{Function: 4, Index: 0, Flags: 1, EAX: 1 | 1<<5 | 7<<26 | 3<<14},
		{Function: 4, Index: 3, Flags: 1, EAX: 3 | 3<<5 | 7<<26 | 3<<14},
		{Function: 4, Index: 4, Flags: 1},
		{Function: 7, Index: 0, Flags: 1, EAX: 2, EBX: all, ECX: all, EDX: all},
		{Function: 7, Index: 1, Flags: 1, EAX: all},
		{Function: 0xa, EAX: all, EBX: all, ECX: all, EDX: all},
		{Function: 0xb, Index: 0, Flags: 1, EAX: 1, EBX: 2, ECX: 1 << 8, EDX: 99},
		{Function: 0xd, Index: 0, Flags: 1, EAX: 0xe7, EBX: 2696, ECX: 2696},
		{Function: 0xd, Index: 1, Flags: 1, EAX: 0xf},
		{Function: 0xd, Index: 2, Flags: 1, EAX: 256, EBX: 576},
		{Function: 0xd, Index: 5, Flags: 1, EAX: 64, EBX: 1088},
		{Function: 0x1f, Index: 0, Flags: 1},
		{Function: 0x4000_0001, EAX: all},
		{Function: 0x8000_0001, ECX: all, EDX: all},
		{Function: 0x8000_0007, EDX: all},
		{Function: 0x8000_0008, EAX: 0x3030, EBX: all, ECX: 0xf},
		{Function: 0x8000_000a, EAX: 1, EBX: all},
		{Function: 0x8000_001e, EAX: 77, EBX: 77, ECX: 77},
	}
}

func has(entries []kvm.CPUIDEntry2, f feature) bool {
	r := register(entries, f.in)
	return r != nil && *r>>f.bit&1 == 1
}

func TestCPUModels(t *testing.T) {
	avx512 := feature{"avx512f", leaf7B, 16}
	for _, test := range []struct {
		model   CPUModel
		has     []feature
		without []feature
	}{
		{CPUHost, slices.Concat(featuresBase, featuresV2, featuresV3, featuresKept, []feature{avx512}), featuresHidden},
		{CPUv3, slices.Concat(featuresBase, featuresV2, featuresV3, featuresKept), append([]feature{avx512}, featuresHidden...)},
		{CPUv2, slices.Concat(featuresBase, featuresV2, featuresKept), slices.Concat(featuresV3, []feature{avx512}, featuresHidden)},
	} {
		got, err := guestCPUID(rich(), test.model, true)
		if err != nil {
			t.Errorf("%s: %v", test.model, err)
			continue
		}
		for _, f := range test.has {
			if !has(got, f) {
				t.Errorf("%s lacks %s", test.model, f.name)
			}
		}
		for _, f := range test.without {
			if has(got, f) {
				t.Errorf("%s has %s", test.model, f.name)
			}
		}
	}
}

func TestCPUModelMissesByName(t *testing.T) {
	poor := rich()
	*register(poor, leaf7B) &^= 1<<5 | 1<<8
	_, err := guestCPUID(poor, CPUv3, false)
	if err == nil || !strings.Contains(err.Error(), "this host lacks avx2, bmi2;") {
		t.Errorf("guestCPUID = %v; want an error that names avx2 and bmi2", err)
	}
	if _, err := guestCPUID(poor, CPUv2, false); err != nil {
		t.Errorf("x86-64-v2: %v", err)
	}
}

func TestXSaveAreaFollowsTheModel(t *testing.T) {
	v3, _ := guestCPUID(rich(), CPUv3, false)
	if e := entry(v3, 0xd, 0); e.EAX != 7 || e.EBX != 832 || e.ECX != 832 {
		t.Errorf("x86-64-v3: leaf 0Dh = %+v; want components 7 in 832 bytes", e)
	}
	if entry(v3, 0xd, 5) != nil {
		t.Error("x86-64-v3 describes an AVX-512 component")
	}
	v2, _ := guestCPUID(rich(), CPUv2, false)
	if e := entry(v2, 0xd, 0); e.EAX != 0 {
		t.Errorf("x86-64-v2: leaf 0Dh = %+v; want nothing", e)
	}
}

func entry(entries []kvm.CPUIDEntry2, leaf, index uint32) *kvm.CPUIDEntry2 {
	for i := range entries {
		if entries[i].Function == leaf && entries[i].Index == index {
			return &entries[i]
		}
	}
	return nil
}

func TestEachVCPUHasItsOwnAPICID(t *testing.T) {
	base, err := guestCPUID(rich(), CPUHost, false)
	if err != nil {
		t.Fatal(err)
	}
	for id := range 3 {
		got := forVCPU(base, id, 3)
		if e := entry(got, 1, 0); e.EBX>>24 != uint32(id) || e.EBX>>16&0xff != 4 || e.EBX&0xffff != 0x5678 {
			t.Errorf("vCPU %d of 3: leaf 1 EBX = %#x", id, e.EBX)
		}
		for _, leaf := range []uint32{0xb, 0x1f} {
			for index := range uint32(3) {
				if e := entry(got, leaf, index); e == nil || e.EDX != uint32(id) {
					t.Errorf("vCPU %d: leaf %#x.%d = %+v; want x2APIC id %d", id, leaf, index, e, id)
				}
			}
			if e := entry(got, leaf, 1); e.EAX != 2 || e.EBX != 3 {
				t.Errorf("vCPU %d: leaf %#x.1 = %+v; want 2 bits and 3 cores", id, leaf, e)
			}
		}
		if e := entry(got, 4, 0); e.EAX>>26 != 3 || e.EAX>>14&0xfff != 0 {
			t.Errorf("L1 cache: leaf 4.0 EAX = %#x; want private, 4 cores", e.EAX)
		}
		if e := entry(got, 4, 3); e.EAX>>14&0xfff != 3 {
			t.Errorf("L3 cache: leaf 4.3 EAX = %#x; want shared by 4", e.EAX)
		}
		if e := entry(got, 0x8000_001e, 0); e.EAX != uint32(id) {
			t.Errorf("extended APIC id = %d; want %d", e.EAX, id)
		}
		if e := entry(got, 0x8000_0008, 0); e.ECX != 2|2<<12 {
			t.Errorf("leaf 80000008h ECX = %#x; want 3 cores in 2 bits", e.ECX)
		}
	}
	if e := entry(base, 1, 0); e.EBX != 0x12345678 {
		t.Error("forVCPU changed the shared entries")
	}
}
