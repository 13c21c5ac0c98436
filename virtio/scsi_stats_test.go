package virtio

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"vmm/scsi"
	"vmm/scsi/scsitest"
)

// A bucket has what is not longer than its bound and longer than the one
// before it.
func TestLatencyBuckets(t *testing.T) {
	if got := LatencyBound(0); got != 16384*time.Nanosecond {
		t.Errorf("LatencyBound(0) = %v; want 16.384us", got)
	}
	rapid.Check(t, func(t *rapid.T) {
		d := time.Duration(rapid.Int64().Draw(t, "d"))
		b := latencyBucket(d)
		if b < LatencyBuckets && d > LatencyBound(b) || b > 0 && d <= LatencyBound(b-1) || b < 0 || b > LatencyBuckets {
			t.Errorf("latencyBucket(%v) = %d", d, b)
		}
	})
	for b := range LatencyBuckets {
		if got := latencyBucket(LatencyBound(b)); got != b {
			t.Errorf("latencyBucket(%v) = %d; want %d", LatencyBound(b), got, b)
		}
		if got := latencyBucket(LatencyBound(b) + 1); got != b+1 {
			t.Errorf("latencyBucket(%v+1) = %d; want %d", LatencyBound(b), got, b+1)
		}
	}
}

func TestSCSIStats(t *testing.T) {
	r := newSCSIRig(t, 2)
	held := scsitest.NewHeld(64)
	r.attach(4, held)
	r.attach(5, scsitest.NewDisk(64))
	r.start()
	end := func(queue int, c *scsiCommand, how func(*scsi.Command)) {
		t.Helper()
		c.lun = unit0(4)
		if c.cdb == nil {
			c.cdb = []byte{0}
		}
		r.submit(queue, c)
		how(<-held.Commands)
		r.reap(queue)
	}
	status := func(s scsi.Status) func(*scsi.Command) {
		return func(c *scsi.Command) { c.Outcome, c.Status, c.SenseLen = scsi.Completed, s, 0; c.Done(c) }
	}
	end(2, &scsiCommand{in: 4096}, func(c *scsi.Command) { c.Finish(4096) })
	end(2, &scsiCommand{in: 4096}, func(c *scsi.Command) { c.Finish(512) })
	end(2, &scsiCommand{out: make([]byte, 1024)}, func(c *scsi.Command) { c.Finish(1024) })
	end(2, &scsiCommand{}, func(c *scsi.Command) { c.Finish(0) })
	end(3, &scsiCommand{}, func(c *scsi.Command) { c.Check(scsi.Sense{Key: scsi.MediumError, ASC: 0x11}) })
	end(3, &scsiCommand{}, func(c *scsi.Command) { c.Check(scsi.PowerOnOccurred) })
	end(3, &scsiCommand{}, func(c *scsi.Command) { c.Conflict() })
	end(3, &scsiCommand{}, status(scsi.TaskSetFull))
	end(3, &scsiCommand{}, status(scsi.TaskAborted))
	end(3, &scsiCommand{}, status(scsi.ConditionMet))
	end(3, &scsiCommand{}, status(scsi.CheckCondition)) // without sense data
	end(3, &scsiCommand{}, func(c *scsi.Command) { c.Fail(scsi.TransportFailure) })
	r.doTMF(tmfQueryTask, unit0(4), 1) // no request
	quiesce(t, r.dev)

	want := make([]QueueStats, 2)
	want[0].Reads, want[0].ReadBytes, want[0].Writes, want[0].WriteBytes, want[0].Others = 2, 4096+512, 1, 1024, 1
	want[0].Outcomes[scsi.Completed] = 4
	want[1].Others, want[1].Senses[scsi.MediumError], want[1].Senses[scsi.UnitAttention] = 8, 1, 1
	want[1].Conflicts, want[1].Busy, want[1].Other = 1, 1, 2
	want[1].Outcomes[scsi.Completed], want[1].Outcomes[scsi.TransportFailure] = 7, 1
	got := r.dev.Stats(4)
	for i := range got {
		timed := uint64(0)
		for _, n := range got[i].Latency {
			timed += n
		}
		if timed != 1 || got[i].LatencySum <= 0 {
			t.Errorf("queue %d: %d requests timed, %v; want the first", i, timed, got[i].LatencySum)
		}
		got[i].Latency, got[i].LatencySum = want[i].Latency, 0
		if got[i] != want[i] {
			t.Errorf("queue %d: Stats(4) = %+v; want %+v", i, got[i], want[i])
		}
	}
	if other := r.dev.Stats(5); len(other) != 2 || other[0] != (QueueStats{}) || r.dev.Stats(6) != nil {
		t.Errorf("Stats(5) = %+v, Stats(6) = %+v; want nothing", other, r.dev.Stats(6))
	}
	// They outlive a reset, and go with the target.
	r.dev.Stop()
	if got := r.dev.Stats(4); got[0].Reads != 2 {
		t.Errorf("after a reset Stats(4) = %+v", got)
	}
	if err := r.remove(4); err != nil {
		t.Fatal(err)
	}
	r.attach(4, held)
	if got := r.dev.Stats(4); got[0] != (QueueStats{}) {
		t.Errorf("of a new target Stats(4) = %+v", got)
	}
}
