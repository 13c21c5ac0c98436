package kvm_test

import (
	"os"
	"testing"
	"time"

	"vmm/kvm/kvmtest"
)

// The verdict is compared with what the kernel says about itself: kvm_pvm runs
// guest kernel code in the emulator, kvm_amd and kvm_intel do not. A measurement
// near the line between the two would be wrong next time.
func TestProbeExecution(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	start := time.Now()
	e, err := s.ProbeExecution()
	if err != nil {
		t.Fatal(err)
	}
	ratio := e.Guest / e.Host
	t.Logf("%v; ratio %.5f; took %v", e, ratio, time.Since(start))
	if e.Guest < 1e4 || e.Host < 1e6 {
		t.Errorf("ProbeExecution() = %+v; no machine is so slow", e)
	}
	for module, native := range map[string]bool{"kvm_pvm": false, "kvm_amd": true, "kvm_intel": true} {
		if _, err := os.Stat("/sys/module/" + module); err != nil {
			continue
		}
		if e.Native != native {
			t.Errorf("ProbeExecution() = %+v, ratio %.5f; module %s is loaded: want native %v", e, ratio, module, native)
		}
	}
}
