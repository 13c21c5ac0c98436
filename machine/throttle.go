package machine

import (
	"context"
	"time"
)

// throttlePeriod is what a throttled guest's time is divided into: short
// enough for the guest not to notice more than a slow machine.
const throttlePeriod = 20 * time.Millisecond

// Throttle takes percent (0 to 99) of the vCPUs' time away, until it is called
// again or the guest is paused for good. A guest that writes memory faster than
// a migration can copy it is slowed down by it.
func (m *Machine) Throttle(percent int) {
	m.throttle.Store(int32(min(max(percent, 0), 99)))
	if percent > 0 && m.slowed.CompareAndSwap(false, true) {
		go m.slow()
	}
}

// slow lets the vCPUs stand for their part of each period.
func (m *Machine) slow() {
	for {
		percent := m.throttle.Load()
		if percent == 0 {
			m.slowed.Store(false)
			// Who throttles again from here on starts another, or is seen.
			if m.throttle.Load() == 0 || !m.slowed.CompareAndSwap(false, true) {
				return
			}
			continue
		}
		nap := throttlePeriod * time.Duration(percent) / 100
		if m.ask(context.Background(), requestNap, func() { time.Sleep(nap) }) != nil {
			return // the guest has ended
		}
		time.Sleep(throttlePeriod - nap)
	}
}

// wayNice is what is added to the nice value of vCPUs that give way: against one
// other thread they get a quarter of a processor then (sched(7)), and all of one
// that nobody else wants.
const wayNice = 5

// GiveWay says whether the vCPUs leave the processors to others where there are
// too few, this host's part of a migration first of all: the memory of a guest
// that works is copied much sooner then, and the guest writes less of it
// meanwhile. Those that could not be raised again are left alone.
func (m *Machine) GiveWay(on bool) {
	for _, v := range m.vcpus {
		if on {
			_ = v.cpu.Lower(wayNice) // a help, so a failure is none
		} else if err := v.cpu.Raise(); err != nil {
			m.cfg.Warn(err.Error())
		}
	}
}
