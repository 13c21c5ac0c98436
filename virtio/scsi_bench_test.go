package virtio

import (
	"fmt"
	"testing"

	"vmm/scsi"
	"vmm/scsi/scsitest"
	"vmm/virtio/virtiotest"
)

// scsiLoad is a driver that sends the same 4 KiB READ(10) again and again, up
// to depth of them at once, without allocating.
type scsiLoad struct {
	*scsiRig
	requests [][]virtiotest.Buffer
}

func newSCSILoad(t testing.TB, lun scsi.LUN, depth int) *scsiLoad {
	l := &scsiLoad{scsiRig: newSCSIRig(t, 1)}
	l.attach(0, lun)
	l.start()
	for range depth {
		header := (&scsiCommand{lun: unit0(0), cdb: rw10(scsi.OpRead10, 0, 8)}).header()
		var bufs []virtiotest.Buffer
		bufs = append(bufs, l.place(header, 51, false)...)
		bufs = append(bufs, l.place(make([]byte, 108), 108, true)...)
		bufs = append(bufs, l.place(make([]byte, 4096), 4096, true)...)
		l.requests = append(l.requests, bufs)
	}
	return l
}

// turn sends all requests and takes them back. sleep waits for an interrupt.
func (l *scsiLoad) turn(sleep func()) {
	ring := l.rings[2]
	for _, bufs := range l.requests {
		if _, ok := ring.AddIndirect(bufs...); !ok {
			l.t.Fatal("no room")
		}
	}
	ring.Kick()
	for back := 0; back < len(l.requests); {
		if _, ok := ring.Reap(); ok {
			back++
		} else if !ring.EnableInterrupt() {
			sleep()
		}
	}
}

// byHand lets the test do the worker's work on its own goroutine, so that
// nothing but the controller's path is counted.
func (l *scsiLoad) byHand() func() {
	quiesce(l.t, l.dev)
	l.dev.live.halted.Store(false)
	l.rings[2].Notify = func() {} // no worker to wake
	q := l.dev.live.requests[0]
	return func() {
		if _, err := q.take(); err != nil {
			l.t.Fatal(err)
		}
	}
}

func TestSCSIRequestsDoNotAllocate(t *testing.T) {
	l := newSCSILoad(t, scsitest.Null{}, 32)
	work := l.byHand()
	l.turn(work) // chains and views grow to what the driver sends
	if n := testing.AllocsPerRun(100, func() { l.turn(work) }); n != 0 {
		t.Errorf("32 requests allocate %v times; want 0", n)
	}
}

// The controller with a null logical unit: its path alone, and with the
// worker's thread, which is woken by an eventfd for each turn.
func BenchmarkSCSI(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("path/depth=%d", depth), func(b *testing.B) {
			l := newSCSILoad(b, scsitest.Null{}, depth)
			l.run(b, l.byHand())
		})
		b.Run(fmt.Sprintf("thread/depth=%d", depth), func(b *testing.B) {
			l := newSCSILoad(b, scsitest.Null{}, depth)
			l.run(b, func() { <-l.irq[2] })
		})
	}
}

func (l *scsiLoad) run(b *testing.B, sleep func()) {
	l.turn(sleep)
	raised := l.raised[2].Load()
	b.ReportAllocs()
	requests := 0
	for b.Loop() {
		l.turn(sleep)
		requests += len(l.requests)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(requests), "ns/request")
	b.ReportMetric(float64(l.raised[2].Load()-raised)/float64(requests), "interrupts/request")
}
