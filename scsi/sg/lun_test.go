package sg

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/scsi"
)

// fakeRoute is a device that lives in a function. It sees each command as the
// kernel would: through the header's addresses.
type fakeRoute func(h *ioHdr) unix.Errno

func (f fakeRoute) do(h *ioHdr) unix.Errno { return f(h) }
func (fakeRoute) close()                   {}

// at is what the address in p points to; p is the address of that field.
func at(p *uintptr) *byte { return (*byte)(*(*unsafe.Pointer)(unsafe.Pointer(p))) }

// sentCDB is the CDB that h points at.
func sentCDB(h *ioHdr) []byte { return unsafe.Slice(at(&h.cmdp), h.cmdLen) }

// sentData is the memory that h names, in pieces.
func sentData(h *ioHdr) (bufs [][]byte) {
	if h.iovecCount == 0 {
		return [][]byte{unsafe.Slice(at(&h.dxferp), h.dxferLen)}
	}
	for _, v := range unsafe.Slice((*iovec)(unsafe.Pointer(at(&h.dxferp))), h.iovecCount) {
		bufs = append(bufs, unsafe.Slice(at(&v.base), v.len))
	}
	return bufs
}

// answer puts a status and sense data where h wants them.
func answer(h *ioHdr, status uint8, sense []byte) {
	h.status = status
	h.senseLen = uint8(copy(unsafe.Slice(at(&h.sbp), h.mxSenseLen), sense))
}

// newLUN is a LUN whose device is do.
func newLUN(t testing.TB, do func(h *ioHdr) unix.Errno) *LUN {
	t.Helper()
	l := &LUN{
		fd: -1, timeout: 1000, maxPages: 8,
		limits:   scsi.Limits{MaxTransfer: 8 * 4096, MaxSegments: 8},
		newRoute: func() (route, error) { return fakeRoute(do), nil },
	}
	l.blockSize.Store(512)
	var err error
	if l.slots, err = newSlots(maxWorkers); err != nil {
		t.Fatal(err)
	}
	if err := l.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// exec1 runs one command on l.
func exec1(t testing.TB, l *LUN, c *scsi.Command) {
	t.Helper()
	if err := scsi.Exec(t.Context(), l, c); err != nil {
		t.Fatal(err)
	}
}

func TestCommandReachesTheKernelAsItIs(t *testing.T) {
	write10 := []byte{scsi.OpWrite10, 0, 0, 0, 0, 1, 0, 0, 2, 0}
	var got ioHdr
	var cdb, data []byte
	l := newLUN(t, func(h *ioHdr) unix.Errno {
		got, cdb, data = *h, bytes.Clone(sentCDB(h)), bytes.Join(sentData(h), nil)
		h.resid = 512
		return 0
	})
	a, b := bytes.Repeat([]byte{0xaa}, 512), bytes.Repeat([]byte{0xbb}, 512)
	c := &scsi.Command{CDB: append(write10, make([]byte, 22)...), DataOut: [][]byte{a, nil, b}}
	exec1(t, l, c)
	if !bytes.Equal(cdb, write10) {
		t.Errorf("CDB % x; want % x", cdb, write10)
	}
	if want := append(a, b...); !bytes.Equal(data, want) {
		t.Error("the data is not what was submitted")
	}
	if got.interfaceID != 'S' || got.direction != dxferToDev || got.dxferLen != 1024 || got.timeout != 1000 || got.flags != flagQueueAtTail || got.mxSenseLen != scsi.MaxSense {
		t.Errorf("header %+v", got)
	}
	if c.Err() != nil || c.Residual != 512 {
		t.Errorf("ended with %v, residual %d; want success, 512", c.Err(), c.Residual)
	}

	in := make([]byte, 512)
	exec1(t, l, &scsi.Command{CDB: []byte{scsi.OpRead6, 0, 0, 0, 1, 0}, DataIn: [][]byte{in}, Attr: scsi.HeadOfQueue})
	if got.direction != dxferFromDev || got.iovecCount != 0 || got.dxferp != addr(in) || got.flags != flagQueueAtHead {
		t.Errorf("header of a read %+v", got)
	}
	exec1(t, l, &scsi.Command{CDB: make([]byte, 6)})
	if got.direction != dxferNone || got.dxferLen != 0 || got.dxferp != 0 {
		t.Errorf("header without data %+v", got)
	}
}

func TestSenseIsUnchanged(t *testing.T) {
	for _, n := range []int{0, 18, 96, 252} {
		sense := bytes.Repeat([]byte{0x5c}, n)
		l := newLUN(t, func(h *ioHdr) unix.Errno { answer(h, 2, sense); h.resid = 3; h.hostStatus = hostOK; return 0 })
		c := &scsi.Command{CDB: make([]byte, 6), DataIn: [][]byte{make([]byte, 8)}}
		exec1(t, l, c)
		if c.Status != scsi.CheckCondition || !bytes.Equal(c.Sense[:c.SenseLen], sense) || c.Residual != 3 {
			t.Errorf("%d bytes of sense: %v, %d bytes, residual %d", n, c.Status, c.SenseLen, c.Residual)
		}
	}
}

func TestTooLargeOrMalformedIsRefusedUnsent(t *testing.T) {
	l := newLUN(t, func(h *ioHdr) unix.Errno { t.Errorf("sent: % x, %d bytes", sentCDB(h), h.dxferLen); return 0 })
	big := make([]byte, l.limits.MaxTransfer+1)
	for _, c := range []*scsi.Command{
		{CDB: make([]byte, 10), DataIn: [][]byte{big}},
		{CDB: make([]byte, 10), DataOut: [][]byte{big[:1], big[1:]}},
		{CDB: nil},
		{CDB: make([]byte, 5)},
	} {
		exec1(t, l, c)
		if s, _ := scsi.ParseSense(c.Sense[:c.SenseLen]); c.Status != scsi.CheckCondition || s != scsi.InvalidFieldInCDB {
			t.Errorf("CDB of %d bytes, data of %d: %v; want 5/24/00", len(c.CDB), c.DataLen(), c.Err())
		}
	}
}

// TestScatteredDataIsCopied sends what a driver may send and the kernel could
// not map: more pages than segments.
func TestScatteredDataIsCopied(t *testing.T) {
	var mapped *ioHdr
	l := newLUN(t, func(h *ioHdr) unix.Errno {
		c := *h
		mapped = &c
		for _, b := range sentData(h) {
			for i := range b {
				if h.direction == dxferFromDev {
					b[i] = byte(i)
				} else if b[i] != byte(i) {
					return unix.EIO
				}
			}
		}
		h.resid = 100
		return 0
	})
	// Nine pieces in nine pages; eight are the limit.
	pieces := func(fill bool) (bufs [][]byte) {
		n := 0
		for range 9 {
			b := make([]byte, 64)
			for i := range b {
				if fill {
					b[i] = byte(n)
				}
				n++
			}
			bufs = append(bufs, b)
		}
		return bufs
	}
	out := &scsi.Command{CDB: make([]byte, 6), DataOut: pieces(true)}
	exec1(t, l, out)
	if out.Err() != nil || out.Residual != 100 || mapped.iovecCount != 0 {
		t.Errorf("write: %v, residual %d, %d iovecs", out.Err(), out.Residual, mapped.iovecCount)
	}
	in := &scsi.Command{CDB: make([]byte, 6), DataIn: pieces(false)}
	exec1(t, l, in)
	got := bytes.Join(in.DataIn, nil)
	for i, v := range got {
		want := byte(i)
		if i >= len(got)-100 { // what was not transferred is not touched
			want = 0
		}
		if v != want {
			t.Fatalf("read: byte %d = %d; want %d", i, v, want)
		}
	}
}

// TestSlowCommandsDelayNoOther holds back all that the kernel may have but
// one, and runs many more through the last place.
func TestSlowCommandsDelayNoOther(t *testing.T) {
	release := make(chan struct{})
	var slow atomic.Int32
	allSlow := make(chan struct{})
	l := newLUN(t, func(h *ioHdr) unix.Errno {
		if sentCDB(h)[0] == scsi.OpRead6 {
			if slow.Add(1) == maxWorkers-1 {
				close(allSlow)
			}
			<-release
		}
		return 0
	})
	var held sync.WaitGroup
	for range maxWorkers - 1 {
		held.Add(1)
		l.Submit(&scsi.Command{CDB: []byte{scsi.OpRead6, 0, 0, 0, 0, 0}, Done: func(*scsi.Command) { held.Done() }})
	}
	<-allSlow
	for range 1000 {
		exec1(t, l, &scsi.Command{CDB: make([]byte, 6)})
	}
	close(release)
	held.Wait()
}

func TestEveryCommandIsSentAndDoneOnce(t *testing.T) {
	const submitters, each = 16, 400
	var sent [submitters * each]atomic.Int32
	var inside, tooMany atomic.Int32
	l := newLUN(t, func(h *ioHdr) unix.Errno {
		if n := inside.Add(1); n > maxWorkers {
			tooMany.Store(n)
		}
		defer inside.Add(-1)
		b := sentData(h)[0]
		sent[int(b[0])<<8|int(b[1])].Add(1)
		return 0
	})
	var all sync.WaitGroup
	all.Add(submitters * each)
	var done [submitters * each]atomic.Int32
	for s := range submitters {
		go func() {
			for i := range each {
				n := s*each + i
				l.Submit(&scsi.Command{
					CDB: make([]byte, 6), DataOut: [][]byte{{byte(n >> 8), byte(n)}},
					Done: func(*scsi.Command) { done[n].Add(1); all.Done() },
				})
			}
		}()
	}
	all.Wait()
	for n := range sent {
		if a, b := sent[n].Load(), done[n].Load(); a != 1 || b != 1 {
			t.Fatalf("command %d was sent %d times and done %d times", n, a, b)
		}
	}
	if n := tooMany.Load(); n != 0 {
		t.Errorf("%d commands at a time; want at most %d", n, maxWorkers)
	}
}

// TestNoRoomQueues lets the kernel say "later" in each of its ways, and checks
// that a command it said that to goes again when another has ended, or after
// a while.
func TestNoRoomQueues(t *testing.T) {
	for _, e := range []unix.Errno{unix.EDOM, unix.EAGAIN, unix.ENOMEM} {
		t.Run(e.Error(), func(t *testing.T) {
			var tries atomic.Int32
			release := make(chan struct{})
			l := newLUN(t, func(h *ioHdr) unix.Errno {
				switch sentCDB(h)[0] {
				case scsi.OpRead6:
					<-release
				case scsi.OpWrite6:
					if tries.Add(1) < 4 {
						return e
					}
				}
				return 0
			})
			l.timeout = math.MaxInt32 // a machine under load must not make it give up
			slow := make(chan struct{})
			l.Submit(&scsi.Command{CDB: []byte{scsi.OpRead6, 0, 0, 0, 0, 0}, Done: func(*scsi.Command) { close(slow) }})
			c := &scsi.Command{CDB: []byte{scsi.OpWrite6, 0, 0, 0, 0, 0}}
			exec1(t, l, c) // ends although the slow one does not
			if c.Err() != nil || tries.Load() != 4 {
				t.Errorf("%v after %d tries; want success after 4", c.Err(), tries.Load())
			}
			close(release)
			<-slow
		})
	}
}

func TestNoRoomIsBusyWhenTimeIsUp(t *testing.T) {
	l := newLUN(t, func(h *ioHdr) unix.Errno { return unix.ENOMEM })
	l.timeout = 30
	c := &scsi.Command{CDB: make([]byte, 6)}
	exec1(t, l, c)
	if c.Outcome != scsi.Busy {
		t.Errorf("outcome %v; want busy", c.Outcome)
	}
}

// TestAnEndedCommandWakesTheRefused needs no clock: the pause is longer than
// the test may take.
func TestAnEndedCommandWakesTheRefused(t *testing.T) {
	defer func(d time.Duration) { roomPause = d }(roomPause)
	roomPause = time.Hour
	var room atomic.Bool
	refusals := make(chan struct{}, 100)
	l := newLUN(t, func(h *ioHdr) unix.Errno {
		if sentCDB(h)[0] == scsi.OpWrite6 && !room.Load() {
			refusals <- struct{}{}
			return unix.ENOMEM
		}
		return 0
	})
	l.timeout = math.MaxInt32
	done := make(chan struct{})
	l.Submit(&scsi.Command{CDB: []byte{scsi.OpWrite6, 0, 0, 0, 0, 0}, Done: func(*scsi.Command) { close(done) }})
	<-refusals
	<-refusals // from now on it is on the list of those that wait
	room.Store(true)
	exec1(t, l, &scsi.Command{CDB: make([]byte, 6)})
	<-done
}

func TestWorkersThatCannotBeMadeAreDoneWithout(t *testing.T) {
	l := newLUN(t, func(h *ioHdr) unix.Errno { return 0 })
	l.newRoute = func() (route, error) { return nil, errors.New("out of descriptors") }
	var all sync.WaitGroup
	for range 300 {
		all.Add(1)
		l.Submit(&scsi.Command{CDB: make([]byte, 6), Done: func(*scsi.Command) { all.Done() }})
	}
	all.Wait()
}

func TestCloseWaitsAndRefuses(t *testing.T) {
	release, inside := make(chan struct{}), make(chan struct{})
	l := newLUN(t, func(h *ioHdr) unix.Errno { close(inside); <-release; return 0 })
	var done atomic.Bool
	l.Submit(&scsi.Command{CDB: make([]byte, 6), Done: func(*scsi.Command) { done.Store(true) }})
	<-inside
	closed := make(chan error)
	go func() { closed <- l.Close() }()
	close(release)
	if err := <-closed; err != nil || !done.Load() {
		t.Errorf("Close() = %v, command done %v; want nil, true", err, done.Load())
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close() = %v", err)
	}
	c := &scsi.Command{CDB: make([]byte, 6)}
	exec1(t, l, c)
	if c.Outcome != scsi.Failure {
		t.Errorf("outcome of a late command %v; want failure", c.Outcome)
	}
}

func TestSubmitDoesNotAllocate(t *testing.T) {
	l := newLUN(t, func(h *ioHdr) unix.Errno { return 0 })
	done := make(chan struct{}, 1)
	c := &scsi.Command{CDB: make([]byte, 32), Done: func(*scsi.Command) { done <- struct{}{} }}
	c.CDB[0] = scsi.OpRead10
	for range 3 {
		c.DataIn = append(c.DataIn, make([]byte, 4096))
	}
	l.maxPages = 6
	run := func() { l.Submit(c); <-done }
	run()
	if n := len(l.workers); n != 1 {
		t.Errorf("one command at a time makes %d workers; want 1", n)
	}
	// The race detector makes system calls allocate; what waking a thread
	// costs without us is the measure.
	e, err := sys.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	wake := testing.AllocsPerRun(200, func() { e.Signal(); e.Wait() })
	if n := testing.AllocsPerRun(200, run); n > wake {
		t.Errorf("a command allocates %v times; want %v", n, wake)
	}
}

func TestOutcome(t *testing.T) {
	for _, c := range []struct {
		what    string
		h       ioHdr
		outcome scsi.Outcome
		status  scsi.Status
	}{
		{"good", ioHdr{}, scsi.Completed, scsi.Good},
		{"check condition", ioHdr{status: 2, driverStatus: 8}, scsi.Completed, scsi.CheckCondition},
		{"conflict, DID_NEXUS_FAILURE", ioHdr{status: 0x18, hostStatus: 0x11}, scsi.Completed, scsi.ReservationConflict},
		{"task set full, DID_BUS_BUSY", ioHdr{status: 0x28, hostStatus: 2}, scsi.Completed, scsi.TaskSetFull},
		{"check, DID_TARGET_FAILURE", ioHdr{status: 2, hostStatus: 0x10}, scsi.Completed, scsi.CheckCondition},
		{"DID_NO_CONNECT", ioHdr{hostStatus: 1}, scsi.BadTarget, 0},
		{"DID_BUS_BUSY", ioHdr{hostStatus: 2}, scsi.Busy, 0},
		{"DID_TIME_OUT", ioHdr{hostStatus: 3}, scsi.Aborted, 0},
		{"DID_BAD_TARGET", ioHdr{hostStatus: 4}, scsi.BadTarget, 0},
		{"DID_ABORT", ioHdr{hostStatus: 5}, scsi.Aborted, 0},
		{"DID_PARITY", ioHdr{hostStatus: 6}, scsi.Failure, 0},
		{"DID_ERROR", ioHdr{hostStatus: 7}, scsi.Failure, 0},
		{"DID_RESET", ioHdr{hostStatus: 8}, scsi.ResetOccurred, 0},
		{"DID_REQUEUE", ioHdr{hostStatus: 0xd}, scsi.Busy, 0},
		{"DID_TRANSPORT_DISRUPTED", ioHdr{hostStatus: 0xe}, scsi.TransportFailure, 0},
		{"DID_TRANSPORT_FAILFAST", ioHdr{hostStatus: 0xf}, scsi.TransportFailure, 0},
		{"DID_TRANSPORT_MARGINAL", ioHdr{hostStatus: 0x14}, scsi.TransportFailure, 0},
		{"unknown host status", ioHdr{hostStatus: 0x77}, scsi.Failure, 0},
		{"sense without a status, old kernels", ioHdr{driverStatus: 8, senseLen: 18}, scsi.Completed, scsi.CheckCondition},
		{"DRIVER_TIMEOUT, old kernels", ioHdr{driverStatus: 6}, scsi.Aborted, 0},
		{"DRIVER_HARD, old kernels", ioHdr{driverStatus: 7}, scsi.Failure, 0},
	} {
		if o, s := outcome(&c.h); o != c.outcome || s != c.status {
			t.Errorf("%s: outcome = %v, %v; want %v, %v", c.what, o, s, c.outcome, c.status)
		}
	}
}

func TestErrnoIsAnOutcome(t *testing.T) {
	for e, want := range map[unix.Errno]scsi.Outcome{
		unix.ENODEV: scsi.BadTarget, unix.ENXIO: scsi.BadTarget,
		unix.EIO: scsi.Failure, unix.EPERM: scsi.Failure, unix.EINVAL: scsi.Failure, unix.EINTR: scsi.Failure,
	} {
		tries := 0
		l := newLUN(t, func(h *ioHdr) unix.Errno { tries++; return e })
		c := &scsi.Command{CDB: make([]byte, 6), DataIn: [][]byte{make([]byte, 4)}}
		exec1(t, l, c)
		if c.Outcome != want || tries != 1 || c.Residual != 4 {
			t.Errorf("%v: outcome %v, %d tries, residual %d; want %v, 1, 4", e, c.Outcome, tries, c.Residual, want)
		}
	}
}

func TestResidualStaysWithinTheData(t *testing.T) {
	for _, c := range []struct{ resid, want int32 }{{0, 0}, {7, 7}, {8, 8}, {9, 8}, {-1, 0}, {math.MinInt32, 0}, {math.MaxInt32, 8}} {
		if got := residual(&ioHdr{dxferLen: 8, resid: c.resid}); got != uint32(c.want) {
			t.Errorf("residual %d of 8 = %d; want %d", c.resid, got, c.want)
		}
	}
}

func TestCDBLen(t *testing.T) {
	for _, c := range []struct {
		op   byte
		have int
		want int
	}{
		{0x00, 32, 6}, {0x12, 6, 6}, {0x1a, 5, 0}, {0x28, 32, 10}, {0x5f, 10, 10}, {0x5f, 9, 0},
		{0x88, 32, 16}, {0x88, 15, 0}, {0xa8, 12, 12}, {0xa8, 11, 0}, {0x7e, 32, 16}, {0x7e, 10, 10},
		{0xc0, 32, 16}, {0xff, 6, 6}, {0xff, 5, 0},
	} {
		b := make([]byte, c.have)
		b[0] = c.op
		if got := cdbLen(b); got != c.want {
			t.Errorf("cdbLen(%02x and %d bytes) = %d; want %d", c.op, c.have, got, c.want)
		}
	}
	variable := make([]byte, 64)
	variable[0] = scsi.OpVariableLength
	for add, want := range map[byte]int{0: 8, 0x18: 32, 0x19: 0, 0xff: 0} {
		variable[7] = add
		if got := cdbLen(variable); got != want {
			t.Errorf("cdbLen(7Fh with %d additional bytes) = %d; want %d", add, got, want)
		}
	}
	if got := cdbLen(variable[:7]); got != 0 {
		t.Errorf("cdbLen(7 bytes of 7Fh) = %d; want 0", got)
	}
}

// FuzzSubmit sends what a guest may put into a request: any CDB, any lengths.
// A command is done once, and sent as it is or refused.
func FuzzSubmit(f *testing.F) {
	f.Add([]byte{scsi.OpRead10, 0, 0, 0, 0, 1, 0, 0, 8, 0}, uint32(4096), uint16(512), true)
	f.Add([]byte{scsi.OpVariableLength, 0, 0, 0, 0, 0, 0, 0x18, 31: 0}, uint32(32768), uint16(4096), false)
	f.Add([]byte{scsi.OpInquiry, 1, 0xb0, 0, 64, 0}, uint32(64), uint16(10), true)
	f.Add([]byte{0xc1, 0, 0, 0, 0, 0, 0}, uint32(32769), uint16(1), true)
	f.Add([]byte{}, uint32(0), uint16(0), true)
	pattern := make([]byte, 1<<16)
	for i := range pattern {
		pattern[i] = byte(i * 7)
	}
	var sent, data []byte
	sends := 0
	l := newLUN(f, func(h *ioHdr) unix.Errno {
		sends++
		sent, data = bytes.Clone(sentCDB(h)), data[:0]
		if h.dxferLen > 0 {
			for _, b := range sentData(h) {
				if h.direction == dxferFromDev {
					copy(b, pattern[len(data):])
				}
				data = append(data, b...)
			}
		}
		return 0
	})
	f.Fuzz(func(t *testing.T, cdb []byte, size uint32, piece uint16, in bool) {
		buf := make([]byte, min(size, 1<<16))
		if !in {
			copy(buf, pattern)
		}
		var bufs [][]byte
		for b := range slices.Chunk(buf, max(int(piece), 1)) {
			bufs = append(bufs, b)
		}
		c := &scsi.Command{CDB: cdb}
		if in {
			c.DataIn = bufs
		} else {
			c.DataOut = bufs
		}
		sends = 0
		exec1(t, l, c)
		switch n := cdbLen(cdb); {
		case len(buf) > int(l.limits.MaxTransfer) || n == 0:
			if sends != 0 || c.Status != scsi.CheckCondition {
				t.Fatalf("sent %d times, %v; want a refusal", sends, c.Err())
			}
		case sends != 1 || c.Err() != nil:
			t.Fatalf("sent %d times, %v; want once", sends, c.Err())
		case len(sent) < 6 || len(sent) > maxCDB || !bytes.Equal(sent, cdb[:len(sent)]):
			t.Fatalf("CDB % x went as % x", cdb, sent)
		case !bytes.Equal(data, pattern[:len(buf)]) || !bytes.Equal(buf, data):
			t.Fatalf("%d bytes in pieces of %d came out different", len(buf), piece)
		}
	})
}

func TestFifo(t *testing.T) {
	var f fifo
	var cs [500]scsi.Command
	in, out := 0, 0
	for _, step := range []int{+3, -2, +100, -50, +300, -351, +5, -5} {
		for ; step > 0; step-- {
			f.push(&cs[in])
			in++
		}
		for ; step < 0; step++ {
			if c := f.pop(); c != &cs[out] {
				t.Fatalf("pop %d is another command", out)
			}
			out++
		}
		if f.len() != in-out {
			t.Fatalf("len() = %d; want %d", f.len(), in-out)
		}
	}
	if c := f.pop(); c != nil {
		t.Error("pop of an empty queue is a command")
	}
}

func BenchmarkSubmit(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			l := newLUN(b, func(h *ioHdr) unix.Errno { return 0 })
			free := make(chan *scsi.Command, depth)
			buf := make([]byte, 4096)
			for range depth {
				free <- &scsi.Command{CDB: make([]byte, 6), DataIn: [][]byte{buf}, Done: func(c *scsi.Command) { free <- c }}
			}
			b.ReportAllocs()
			for b.Loop() {
				l.Submit(<-free)
			}
			for range depth {
				<-free
			}
		})
	}
}
