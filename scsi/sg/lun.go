// Package sg passes a SCSI logical unit of the host through to the guest with
// the kernel's SG_IO interface, version 3.
//
// Which way a command takes is settled at Open. A process with CAP_SYS_RAWIO
// uses the block node: its SG_IO works on the guest's memory without a copy.
// Any other, and any LUN without a block node, uses /dev/sgN by write and
// read, with one copy in the kernel (see sgRoute for why not by SG_IO). Either
// way a command occupies one OS thread until it ends, so a slow one delays no
// other, and is sent exactly once.
package sg

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/scsi"
)

// maxWorkers bounds the threads, and so the commands that the kernel has of
// one LUN at a time. It is the queue depth that virtio-scsi drivers assume.
const maxWorkers = 128

// roomPause is how long a command that the kernel had no room for waits for
// another of this LUN to end before it is offered again. Memory freed by
// somebody else makes no event that we could wait for.
var roomPause = 10 * time.Millisecond

// LUN is a logical unit of this host, held exclusively. It implements
// scsi.LUN.
type LUN struct {
	node     string // as the user named it
	via      string // the device node that commands go to
	nexus    Nexus
	identity *scsi.Identity
	limits   scsi.Limits
	maxPages int    // of guest memory in one command; more are copied first
	timeout  uint32 // ms
	fd       int    // of via; Reset's, and in the block node's case the workers'
	hold     *hold

	// blockSize is the logical block length in bytes, as the last READ
	// CAPACITY that came by said.
	blockSize atomic.Uint32

	slots    slots
	newRoute func() (route, error) // each worker has its own

	mu       sync.Mutex
	backlog  fifo      // commands that no worker has taken yet
	workers  []*worker // all there are
	idle     []*worker // those asleep; the last went to sleep last and is woken first
	coming   int       // workers woken or made that have not looked at the backlog yet
	waiting  []*worker // those whose command the kernel had no room for
	inFlight int       // commands submitted and not done
	spawning bool      // a worker is being made
	closing  bool
	quiet    *sync.Cond // inFlight reached zero, or spawning ended
	exited   sync.WaitGroup
}

// worker is a thread that carries one command at a time.
type worker struct {
	lun   *LUN
	route route
	slot  *slotMem
	wake  *sys.EventFD
}

// start makes the first worker, so that whatever can fail has failed before a
// command is accepted.
func (l *LUN) start() error {
	l.quiet = sync.NewCond(&l.mu)
	return l.spawn(true)
}

// spawn makes one more worker, which begins idle or by looking for work. Only
// one goroutine at a time does.
func (l *LUN) spawn(idle bool) error {
	wake, err := sys.NewEventFD()
	if err != nil {
		return err
	}
	w := &worker{lun: l, slot: l.slots.at(len(l.workers)), wake: wake}
	w.slot.prepare()
	l.exited.Add(1)
	ready := make(chan error)
	go func() {
		defer l.exited.Done()
		defer wake.Close()
		runtime.LockOSThread() // ends with the goroutine, and the thread with it
		// The route is opened by the thread that uses it: an sg node refuses
		// reads and writes under other credentials than those it was opened
		// with, and where they changed since the process began, every thread
		// has its own.
		p, err := l.newRoute()
		if err == nil {
			defer p.close()
			w.route = p
			l.mu.Lock()
			l.workers = append(l.workers, w)
			if idle {
				l.idle = append(l.idle, w)
			} else {
				l.coming++
			}
			l.mu.Unlock()
		}
		ready <- err
		if err == nil {
			w.run(idle)
		}
	}()
	return <-ready
}

// Submit implements scsi.LUN.
func (l *LUN) Submit(c *scsi.Command) {
	if n := c.DataLen(); n > int(l.limits.MaxTransfer) || cdbLen(c.CDB) == 0 {
		// More than one SG_IO carries: splitting would change what the command
		// means to the device, so the guest learns that it is too large.
		c.Check(scsi.InvalidFieldInCDB)
		return
	}
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		c.Fail(scsi.Failure)
		return
	}
	l.inFlight++
	l.backlog.push(c)
	var w *worker
	grow := false
	if l.backlog.len() > l.coming { // else somebody is on the way to c
		if n := len(l.idle); n > 0 {
			w = l.idle[n-1]
			l.idle = l.idle[:n-1]
			l.coming++
		} else {
			grow = !l.spawning && len(l.workers) < maxWorkers
			l.spawning = l.spawning || grow
		}
	}
	l.mu.Unlock()
	if w != nil {
		w.wake.Signal()
	} else if grow {
		go l.grow()
	}
}

// grow adds workers while commands wait that nobody is on the way to.
func (l *LUN) grow() {
	for {
		err := l.spawn(false)
		l.mu.Lock()
		// Out of descriptors or memory is slower, not broken: there is one
		// worker at least, and the next command tries again.
		if err != nil || len(l.workers) == maxWorkers || l.backlog.len() <= l.coming {
			l.spawning = false
			l.quiet.Broadcast()
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
	}
}

// run is a worker's life. It begins idle if it is on the list already.
func (w *worker) run(idle bool) {
	l := w.lun
	for coming := true; ; coming = idle {
		if idle {
			w.wake.Wait() // whoever signals has taken it off the list
		}
		l.mu.Lock()
		if coming {
			l.coming--
		}
		c := l.backlog.pop()
		if c == nil {
			idle = w.rest()
			l.mu.Unlock()
			if !idle {
				break
			}
			continue
		}
		l.mu.Unlock()
		w.serve(c)
		l.mu.Lock()
		for _, other := range l.waiting {
			other.wake.Signal()
		}
		// Idle before Done: whoever submits the next command because this one
		// is done finds this worker, and makes no other.
		idle = w.rest()
		l.mu.Unlock()
		c.Done(c)
		l.mu.Lock()
		l.inFlight--
		if l.inFlight == 0 {
			l.quiet.Broadcast()
		}
		l.mu.Unlock()
	}
}

// rest puts w among the idle, unless there is work or the LUN is closing.
// l.mu is held.
func (w *worker) rest() bool {
	l := w.lun
	if l.backlog.len() > 0 || l.closing {
		return false
	}
	l.idle = append(l.idle, w)
	return true
}

// serve carries c to the device and back, and fills in all but Done.
func (w *worker) serve(c *scsi.Command) {
	l, h := w.lun, &w.slot.hdr
	n := c.DataLen()
	bufs := c.DataIn
	h.direction = dxferFromDev
	if len(c.DataOut) > 0 {
		bufs, h.direction = c.DataOut, dxferToDev
	}
	if n == 0 {
		h.direction = dxferNone
	}
	h.dxferLen = uint32(n)
	h.cmdLen = uint8(copy(w.slot.cdb[:], c.CDB[:cdbLen(c.CDB)]))
	h.mxSenseLen = mxSense
	h.timeout = l.timeout
	h.flags = flagQueueAtTail
	if c.Attr == scsi.HeadOfQueue {
		h.flags = flagQueueAtHead
	}
	var e unix.Errno
	if w.slot.setData(bufs, l.maxPages) {
		e = w.send(h)
	} else {
		e = w.sendCopy(c)
	}
	if e == 0 {
		c.Outcome, c.Status = outcome(h)
		c.Residual = residual(h)
		c.SenseLen = copy(c.Sense[:], w.slot.sense[:min(h.senseLen, mxSense)])
		l.inspect(c)
		return
	}
	c.Outcome, c.Status, c.Residual, c.SenseLen = failed(e), scsi.Good, uint32(n), 0
}

// sendCopy is send for a command whose data lies in more pieces or pages than
// the kernel has segments for: it takes them in one contiguous copy. The guest
// that sends such a command pays for it.
func (w *worker) sendCopy(c *scsi.Command) unix.Errno {
	h := &w.slot.hdr
	m, err := sys.MapAnonymous(int(h.dxferLen))
	if err != nil {
		return unix.ENOMEM
	}
	defer m.Close()
	data := m.Bytes()[:h.dxferLen]
	c.Gather(data)
	w.slot.setOne(data)
	e := w.send(h)
	if e == 0 {
		c.Scatter(data[:h.dxferLen-residual(h)])
	}
	return e
}

// residual is what h says was not transferred, within what was to be.
func residual(h *ioHdr) uint32 {
	return uint32(min(max(int64(h.resid), 0), int64(h.dxferLen)))
}

// send gives the command to the kernel until it takes it: EDOM, EAGAIN and
// ENOMEM are its way of saying later. It gives up when the command's own
// timeout is over.
func (w *worker) send(h *ioHdr) unix.Errno {
	e := w.route.do(h)
	if !refused(e) {
		return e
	}
	l := w.lun
	for end := time.Now().Add(time.Duration(l.timeout) * time.Millisecond); ; {
		// On the list first, then once more: a command that ends in between
		// has made room, or finds us and says so.
		l.mu.Lock()
		l.waiting = append(l.waiting, w)
		l.mu.Unlock()
		e = w.route.do(h)
		again := refused(e) && time.Now().Before(end)
		if again {
			wait(w.wake.FD(), int(roomPause/time.Millisecond))
		}
		l.mu.Lock()
		l.waiting = slices.DeleteFunc(l.waiting, func(other *worker) bool { return other == w })
		l.mu.Unlock()
		w.wake.Drain() // nobody signals a worker that is on no list
		if !again {
			return e
		}
	}
}

// Reset implements scsi.LUN. The kernel resets the logical unit alone, never
// its target or bus. It wants CAP_SYS_ADMIN and CAP_SYS_RAWIO, and a host
// adapter that can do it.
func (l *LUN) Reset() error {
	switch e := resetUnit(l.fd); e {
	case 0:
		return nil
	case unix.EACCES, unix.EPERM, unix.EINVAL, unix.ENOTTY, unix.EOPNOTSUPP:
		return scsi.ErrRejected
	default:
		return fmt.Errorf("%s: SG_SCSI_RESET of the logical unit: %w", l.via, e)
	}
}

// Limits implements scsi.LUN.
func (l *LUN) Limits() scsi.Limits { return l.limits }

// Identity is what the logical unit said about itself when it was opened. The
// caller does not change it.
func (l *LUN) Identity() *scsi.Identity { return l.identity }

// Nexus is the path to the logical unit.
func (l *LUN) Nexus() Nexus { return l.nexus }

// String names the LUN in messages: "/dev/sg2 (2:0:0:0 naa.6001405..., by
// /dev/sdb)".
func (l *LUN) String() string {
	return fmt.Sprintf("%s (%s %s, by %s)", l.node, l.nexus.Address, l.identity, l.via)
}

// Close implements scsi.LUN: it waits for every command in flight, as long as
// that takes, and gives the logical unit free.
func (l *LUN) Close() error {
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		return nil
	}
	l.closing = true // a worker that finds no command from now on ends
	for l.inFlight > 0 || l.spawning {
		l.quiet.Wait()
	}
	idle := l.idle
	l.idle = nil
	l.coming += len(idle)
	l.mu.Unlock()
	for _, w := range idle {
		w.wake.Signal()
	}
	l.exited.Wait()
	return l.release()
}

// release frees what l holds of the system, as far as Open came.
func (l *LUN) release() error {
	var errs []error
	if l.slots.m != nil {
		errs = append(errs, l.slots.m.Close())
	}
	if l.fd >= 0 {
		errs = append(errs, unix.Close(l.fd))
	}
	if l.hold != nil {
		errs = append(errs, l.hold.Close())
	}
	return errors.Join(errs...)
}

// fifo is a queue of commands. It grows to the most there ever were and does
// not allocate after that.
type fifo struct {
	ring       []*scsi.Command // length a power of two, or zero
	head, tail uint            // count up; their difference is the length
}

func (f *fifo) len() int { return int(f.tail - f.head) }

func (f *fifo) push(c *scsi.Command) {
	if f.len() == len(f.ring) {
		ring := make([]*scsi.Command, max(64, 2*len(f.ring)))
		n := uint(0)
		for c := f.pop(); c != nil; c = f.pop() {
			ring[n] = c
			n++
		}
		f.ring, f.head, f.tail = ring, 0, n
	}
	f.ring[f.tail%uint(len(f.ring))] = c
	f.tail++
}

func (f *fifo) pop() *scsi.Command {
	if f.head == f.tail {
		return nil
	}
	p := &f.ring[f.head%uint(len(f.ring))]
	c := *p
	*p = nil
	f.head++
	return c
}
