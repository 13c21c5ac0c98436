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
