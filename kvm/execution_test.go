package kvm_test

import (
	"testing"
	"time"

	"vmm/kvm/kvmtest"
)

func TestProbeExecution(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	start := time.Now()
	e, err := s.ProbeExecution()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%v; ratio %.5f; took %v", e, e.Guest/e.Host, time.Since(start))
}
