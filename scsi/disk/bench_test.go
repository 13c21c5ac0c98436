package disk

import (
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/scsi"
)

// steady is a command that a test sends again and again.
type steady struct {
	scsi.Command
	done chan struct{}
}

func newSteady(cdb []byte) *steady {
	s := &steady{done: make(chan struct{}, 1)}
	s.CDB = cdb
	s.Done = func(*scsi.Command) { s.done <- struct{}{} }
	return s
}

func (s *steady) run(l *LUN) {
	l.Submit(&s.Command)
	<-s.done
}

func buffers(n, size int) [][]byte {
	segs := make([][]byte, n)
	for i := range segs {
		segs[i] = make([]byte, size)
	}
	return segs
}

func TestDataPathDoesNotAllocate(t *testing.T) {
	l := newDisk(t, Options{})
	read, write, flush := newSteady(read10(0, 0, 1024)), newSteady(write10(0x08, 0, 1024)), newSteady(synchronizeCache)
	read.DataIn, write.DataOut = buffers(128, 4096), buffers(128, 4096)
	ready := newSteady(make([]byte, 6))
	for name, c := range map[string]*steady{"READ": read, "WRITE": write, "SYNCHRONIZE CACHE": flush, "TEST UNIT READY": ready} {
		if n := testing.AllocsPerRun(20, func() { c.run(l) }); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
		if c.Status != scsi.Good || c.Residual != 0 {
			t.Errorf("%s: %v, residual %d", name, c.Status, c.Residual)
		}
	}
}

func benchmark(b *testing.B, cdb []byte, in, out [][]byte, depth int) {
	l := newDisk(b, Options{})
	full := newSteady(cdb16(scsi.OpWriteSame16, 0, 0, 2048)) // no holes
	full.DataOut = [][]byte{pattern(1, 512)}
	full.run(l)

	// As many commands at a time as depth; each that ends starts another.
	b.ReportAllocs()
	left, over := b.N-depth, make(chan struct{})
	ended := make(chan *steady, depth)
	for range depth {
		c := newSteady(cdb)
		c.DataIn, c.DataOut = in, out
		c.Done = func(*scsi.Command) { ended <- c }
		ended <- c
	}
	b.ResetTimer()
	go func() {
		for range max(0, left) + depth {
			l.Submit(&(<-ended).Command)
		}
		for range depth {
			<-ended
		}
		close(over)
	}()
	<-over
	b.StopTimer()
	for _, segs := range [][][]byte{in, out} {
		if n := size(segs); n > 0 {
			b.SetBytes(int64(n))
		}
	}
}

func BenchmarkTestUnitReady(b *testing.B) { benchmark(b, make([]byte, 6), nil, nil, 1) }
func BenchmarkRead4K(b *testing.B)        { benchmark(b, read10(0, 8, 8), buffers(1, 4096), nil, 1) }
func BenchmarkRead4KDepth32(b *testing.B) { benchmark(b, read10(0, 8, 8), buffers(1, 4096), nil, 32) }
func BenchmarkWrite4K(b *testing.B)       { benchmark(b, write10(0, 8, 8), nil, buffers(1, 4096), 1) }
func BenchmarkRead512K(b *testing.B)      { benchmark(b, read10(0, 8, 1024), buffers(128, 4096), nil, 1) }
func BenchmarkWrite512K(b *testing.B)     { benchmark(b, write10(0, 8, 1024), nil, buffers(128, 4096), 1) }

// BenchmarkThreadRead4K has the caller that the disk has in a VM: a locked
// thread that blocks in read(2) on an eventfd between two commands. Where a
// worker has to be woken, that thread still holds the P that the worker needs.
func BenchmarkThreadRead4K(b *testing.B) {
	for _, test := range []struct {
		name string
		attr scsi.TaskAttr
	}{
		{"cached", scsi.Simple},
		{"worker", scsi.Ordered}, // is never tried without one
	} {
		b.Run(test.name, func(b *testing.B) {
			l := newDisk(b, Options{})
			full := newSteady(cdb16(scsi.OpWriteSame16, 0, 0, 2048))
			full.DataOut = [][]byte{pattern(1, 512)}
			full.run(l)
			event, err := sys.NewEventFD()
			if err != nil {
				b.Fatal(err)
			}
			defer event.Close()
			c := &scsi.Command{CDB: read10(0, 8, 8), Attr: test.attr, DataIn: buffers(1, 4096)}
			c.Done = func(*scsi.Command) { event.Signal() }
			times := make([]time.Duration, b.N)
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			b.ResetTimer()
			cpu := cpuTime(b)
			for i := range times {
				start := time.Now()
				l.Submit(c)
				event.Wait()
				times[i] = time.Since(start)
			}
			b.ReportMetric(float64(cpuTime(b)-cpu)/float64(b.N), "cpu-ns/op")
			slices.Sort(times)
			b.ReportMetric(float64(times[b.N/2]), "p50-ns")
			b.ReportMetric(float64(times[b.N*99/100]), "p99-ns")
		})
	}
}

// cpuTime is what this process has used, which other load on the machine
// disturbs less than the clock.
func cpuTime(b *testing.B) int64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return r.Utime.Nano() + r.Stime.Nano()
}
