package migration

import (
	"math"
	"time"
)

// convergence decides when to stop the guest, and when to slow it down.
type convergence struct {
	limit     time.Duration
	bandwidth float64 // bytes per second
	dirtyRate float64 // bytes per second
	expected  time.Duration
	slow      int // rounds in a row that gained too little
	throttle  int
	polished  int // rounds that would not have been necessary
}

// Throttling begins after the second round in a row that leaves more than
// half of what it sent, as every further one of its kind makes it stronger.
const (
	throttleAfter = 2
	throttleStep  = 20
	throttleMost  = 99
	// A round shorter than this says more about latency than about bandwidth.
	minSample = 1 << 20
	// What fits the downtime is made less by some more rounds, as long as each at
	// least halves it: together they take no longer than twice what is allowed. A
	// downtime of so small a part of that is not worth one.
	mostPolished = 3
	polishedPart = 8
)

// fits says that what is left can be sent within the downtime.
func (c *convergence) fits(left uint64) bool {
	c.expected = time.Duration(min(float64(left)/c.bandwidth*float64(time.Second), math.MaxInt64/2))
	return c.expected <= c.limit
}

// after is told of a round: the bytes that were sent, what the guest has written
// meanwhile, how long it took, and the time that is left for others.
func (c *convergence) after(sent, dirtied uint64, took, left time.Duration) (stop bool, throttle int) {
	seconds := max(took.Seconds(), 1e-6)
	if sent >= minSample || c.bandwidth == 0 {
		c.bandwidth = max(float64(sent)/seconds, 1)
	}
	c.dirtyRate = float64(dirtied) / seconds
	if c.fits(dirtied) {
		polish := c.polished < mostPolished && dirtied*2 <= sent && c.expected > c.limit/polishedPart && left/2 > c.limit
		if polish {
			c.polished++
		}
		return !polish, c.throttle
	}
	if dirtied*2 > sent {
		c.slow++
	} else {
		c.slow = 0
	}
	if c.slow >= throttleAfter {
		c.throttle = min(c.throttle+throttleStep, throttleMost)
	}
	return false, c.throttle
}
