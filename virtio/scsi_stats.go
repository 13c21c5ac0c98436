package virtio

import (
	"math/bits"
	"time"

	"vmm/scsi"
)

// Latencies are counted in powers of four of 16.384 us, the last of which is
// 17 s; what took longer comes behind.
const (
	LatencyBuckets   = 11
	latencyFirstBits = 14
)

// LatencyBound is the upper bound of a bucket of QueueStats.Latency.
func LatencyBound(bucket int) time.Duration { return 1 << (latencyFirstBits + 2*bucket) }

// timedEvery: one request of so many on a queue is timed, the first included.
// To read the clock twice for each would cost more than the rest of the
// bookkeeping, and much more where the host's clock needs a system call.
const timedEvery = 32

// QueueStats counts what one request queue has done with one target since the
// target was attached.
type QueueStats struct {
	Reads, Writes, Others  uint64     // requests with data from the device, to it, without
	ReadBytes, WriteBytes  uint64     // transferred
	Senses                 [16]uint64 // CHECK CONDITION, by sense key
	Conflicts, Busy, Other uint64     // status RESERVATION CONFLICT; BUSY or TASK SET FULL; another that is not GOOD
	Outcomes               [len(responseCodes)]uint64
	Latency                [LatencyBuckets + 1]uint64 // of the requests that were timed, each once
	LatencySum             time.Duration

	_ [64]byte // the next queue's are written by another processor
}

// started is where monotonic times begin.
var started = time.Now()

// count notes how a request ended. The lock of its queue is held.
func (s *QueueStats) count(r *request) {
	c := &r.cmd
	data := uint64(r.dataIn)
	for _, b := range c.DataOut {
		data += uint64(len(b))
	}
	moved := data - min(uint64(c.Residual), data)
	switch {
	case len(c.DataIn) > 0:
		s.Reads++
		s.ReadBytes += moved
	case len(c.DataOut) > 0:
		s.Writes++
		s.WriteBytes += moved
	default:
		s.Others++
	}
	if int(c.Outcome) < len(s.Outcomes) {
		s.Outcomes[c.Outcome]++
	}
	if c.Outcome == scsi.Completed && c.Status != scsi.Good {
		s.status(c)
	}
	if r.began != 0 {
		took := time.Since(started) - r.began
		s.Latency[latencyBucket(took)]++
		s.LatencySum += took
	}
}

func (s *QueueStats) status(c *scsi.Command) {
	switch c.Status {
	case scsi.CheckCondition:
		if sense, ok := scsi.ParseSense(c.Sense[:min(max(c.SenseLen, 0), len(c.Sense))]); ok {
			s.Senses[sense.Key&0xf]++
			return
		}
		s.Other++
	case scsi.ReservationConflict:
		s.Conflicts++
	case scsi.BusyStatus, scsi.TaskSetFull:
		s.Busy++
	case scsi.ConditionMet:
	default:
		s.Other++
	}
}

// latencyBucket is the first bucket whose bound is not below d.
func latencyBucket(d time.Duration) int {
	if d <= 0 {
		return 0
	}
	over := bits.Len64(uint64(d-1) >> latencyFirstBits) // 0: within the first bound
	return min((over+1)/2, LatencyBuckets)
}

// Stats is what each request queue has done with a target; nil if there is
// none.
func (s *SCSI) Stats(number uint8) []QueueStats {
	s.mu.Lock() // no session begins or ends: its queues' locks are those that count
	defer s.mu.Unlock()
	t := s.targets[number].Load()
	if t == nil {
		return nil
	}
	if s.live != nil {
		for _, q := range s.live.requests {
			q.mu.Lock()
			defer q.mu.Unlock()
		}
	}
	return append([]QueueStats(nil), t.stats...)
}
