package machine

import (
	"fmt"
	"math/bits"
	"time"

	"vmm/kvm"
	vmmv1 "vmm/proto/vmm/v1"
)

const (
	msrTSC         = 0x10
	msrTSCDeadline = 0x6e0

	// KVM's paravirtual clock (Documentation/virt/kvm/x86/msr.rst), by its old
	// and its new number.
	msrWallClockOld  = 0x11
	msrSystemTimeOld = 0x12
	msrWallClock     = 0x4b564d00
	msrSystemTime    = 0x4b564d01
	systemTimeOn     = 1 << 0
)

// maxClock bounds a clock that a peer names: 146 years in nanoseconds, so that
// what is added to it cannot wrap.
const maxClock = 1 << 62

// readClock reads the guest's clock and the host's at one instant, or as near
// to that as a host without KVM_CLOCK_REALTIME can tell.
func (m *Machine) readClock() (*vmmv1.ClockState, error) {
	c, err := m.vm.Clock()
	if err != nil {
		return nil, err
	}
	s := &vmmv1.ClockState{ClockNs: c.Clock, RealtimeNs: c.Realtime, HostTscKhz: uint32(m.given.hostTSCKHz)}
	if c.Flags&kvm.ClockRealtime == 0 {
		// Later than the guest's clock rather than earlier: the time that the
		// destination adds is too short then, not too long.
		s.RealtimeNs = uint64(time.Now().UnixNano())
	}
	if c.Flags&kvm.ClockHostTSC != 0 {
		s.HostTsc = &c.HostTSC
	}
	return s, nil
}

// readTSCs replaces the vCPUs' time-stamp counters, which were read one after
// the other, by those of the instant at which the first one is read now.
func (m *Machine) readTSCs(vcpus []*vmmv1.VcpuState) error {
	first := vcpus[0].TscOffset
	for id, v := range vcpus {
		at := msrIndex(v.Msrs, msrTSC)
		if at < 0 {
			return nil // of none
		}
		if id > 0 && first != nil && v.TscOffset != nil {
			v.Msrs[at].Value = vcpus[0].Msrs[at].Value + (*v.TscOffset - *first)
			continue
		}
		e, err := m.vcpus[id].cpu.MSRs([]uint32{msrTSC})
		if err != nil {
			return err
		}
		v.Msrs[at].Value = e[0].Data
	}
	return nil
}

func msrIndex(msrs []*vmmv1.Msr, index uint32) int {
	for i, e := range msrs {
		if e.GetIndex() == index {
			return i
		}
	}
	return -1
}

// An instant is the time of a guest and of its host.
type instant struct {
	clock uint64 // kvmclock, nanoseconds
	tsc   uint64 // the host's time-stamp counter
}

// movedOffset is the offset that a guest's time-stamp counter needs on its new
// host, to be what its old offset would have made of the time that has passed
// (KVM devices/vcpu 4.1). The guest's counter and those of both hosts run at
// khz.
func movedOffset(offset uint64, old, now instant, khz uint32) uint64 {
	// All arithmetic is modulo 2^64, as the processor's.
	return offset + ticks(now.clock-old.clock, khz) + old.tsc - now.tsc
}

// ticks is how far a counter of khz goes in ns nanoseconds.
func ticks(ns uint64, khz uint32) uint64 {
	hi, lo := bits.Mul64(ns, uint64(khz))
	n, _ := bits.Div64(hi%1_000_000, lo, 1_000_000) // modulo 2^64
	return n
}

// checkClock refuses a clock that nobody's guest has.
func checkClock(c *vmmv1.ClockState) error {
	if c == nil {
		return fmt.Errorf("missing")
	}
	if c.ClockNs > maxClock {
		return fmt.Errorf("%d ns is beyond all guests' clocks", c.ClockNs)
	}
	return nil
}

// passed is the time between an instant of the old host's real time and one of
// ours, never negative: the hosts' clocks may differ, the guest's does not go
// back.
func passed(then, now uint64) uint64 {
	if now <= then {
		return 0
	}
	return now - then
}

// setClock sets the guest's clock to what it was plus the real time that has
// passed, and the time-stamp counters accordingly. From here on it runs, though
// the guest does not yet.
func (m *Machine) setClock(c *vmmv1.ClockState, vcpus []*vmmv1.VcpuState) error {
	can, err := m.vm.Check(kvm.CapAdjustClock)
	if err != nil {
		return err
	}
	d := kvm.ClockData{Clock: c.ClockNs}
	if can&kvm.ClockRealtime != 0 {
		d.Flags, d.Realtime = kvm.ClockRealtime, c.RealtimeNs // the kernel does what passed does
	} else {
		d.Clock += passed(c.RealtimeNs, uint64(time.Now().UnixNano()))
	}
	if err := m.vm.SetClock(d); err != nil {
		return err
	}
	now, err := m.vm.Clock()
	if err != nil {
		return err
	}
	byOffset := m.movesByOffset(c, now, vcpus)
	for id, v := range m.vcpus {
		state := vcpus[id]
		if byOffset {
			offset := movedOffset(state.GetTscOffset(), instant{c.ClockNs, c.GetHostTsc()}, instant{now.Clock, now.HostTSC}, c.HostTscKhz)
			if err := v.cpu.SetTSCOffset(offset); err != nil {
				return err
			}
			continue
		}
		if at := msrIndex(state.Msrs, msrTSC); at >= 0 {
			tsc := state.Msrs[at].Value + ticks(passed(c.ClockNs, now.Clock), uint32(m.given.tscKHz))
			if err := v.cpu.SetMSRs([]kvm.MSREntry{{Index: msrTSC, Data: tsc}}); err != nil {
				return err
			}
		}
	}
	return nil
}

// movesByOffset says whether both hosts could tell what the TSC-offset
// procedure needs, and no counter is scaled.
func (m *Machine) movesByOffset(c *vmmv1.ClockState, now kvm.ClockData, vcpus []*vmmv1.VcpuState) bool {
	khz := uint32(m.given.tscKHz)
	if c.HostTsc == nil || now.Flags&kvm.ClockHostTSC == 0 || c.HostTscKhz != khz || uint32(m.given.hostTSCKHz) != khz || now.Clock < c.ClockNs {
		return false
	}
	for id, v := range m.vcpus {
		if vcpus[id].TscOffset == nil {
			return false
		}
		if _, err := v.cpu.TSCOffset(); err != nil {
			return false
		}
	}
	return true
}

// usesKVMClock says whether a vCPU reads the time from KVM's page rather than
// from its time-stamp counter.
func usesKVMClock(v *vmmv1.VcpuState) bool {
	for _, e := range v.GetMsrs() {
		if (e.GetIndex() == msrSystemTime || e.GetIndex() == msrSystemTimeOld) && e.GetValue()&systemTimeOn != 0 {
			return true
		}
	}
	return false
}
