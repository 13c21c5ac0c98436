package disk

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

const (
	maxWorkers = 128  // commands that run at once
	maxQueued  = 1024 // commands that wait for a worker; one more gets TASK SET FULL
	maxIovecs  = 1024 // pieces of memory in one system call (UIO_MAXIOV)
	scratchLen = 64 << 10
)

// worker is a goroutine with what a command needs beside its own buffers.
type worker struct {
	wake    chan *scsi.Command
	iov     []unix.Iovec // all zero between commands: see LUN.transfer
	scratch []byte       // made when first asked for
	segs    [64][]byte   // names scratch, for commands that move it
	quick   bool         // the goroutine of Submit runs the command: nothing may wait
}

// buffer is scratchLen bytes for the current command.
func (w *worker) buffer() []byte {
	if w.scratch == nil {
		w.scratch = make([]byte, scratchLen)
	}
	return w.scratch
}

// queue is the task set (SAM-5 8). Every command gets a worker of its own as
// soon as it may start, so a slow one delays no other; the worker that was
// idle last is taken first, because its stack and thread are warm. Workers
// stay until close: about 20 KiB each.
type queue struct {
	run func(*worker, *scsi.Command) // calls Done

	mu       sync.Mutex
	idle     []*worker
	workers  int
	active   int  // commands given to workers and not yet finished
	ordered  bool // one of them has the ORDERED attribute and runs alone
	draining bool // nothing starts until a reset is over
	closed   bool
	finished sync.Cond // active has become zero, or draining has ended

	waiting [maxQueued]*scsi.Command // a ring
	head, n int
}

func (q *queue) init(run func(*worker, *scsi.Command)) {
	q.run = run
	q.finished.L = &q.mu
	q.idle = make([]*worker, 0, maxWorkers)
}

// submit starts c, or keeps it until it may start. It does not wait.
func (q *queue) submit(c *scsi.Command) {
	q.mu.Lock()
	switch {
	case q.closed:
		q.mu.Unlock()
		c.Fail(scsi.Failure)
		return
	case q.n == maxQueued:
		q.mu.Unlock()
		c.Outcome, c.Status, c.SenseLen, c.Residual = scsi.Completed, scsi.TaskSetFull, 0, uint32(c.DataLen())
		c.Done(c)
		return
	case c.Attr == scsi.HeadOfQueue: // SAM-5 8.6.4
		q.head = (q.head + maxQueued - 1) % maxQueued
		q.waiting[q.head] = c
	default:
		q.waiting[(q.head+q.n)%maxQueued] = c
	}
	q.n++
	q.dispatch()
	q.mu.Unlock()
}

// claim takes an idle worker for a SIMPLE or HEAD OF QUEUE command that
// could start at once, so that its caller runs the command; nil if there is
// none. The caller either releases the worker, or wakes it with the command.
func (q *queue) claim() *worker {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.idle)
	if n == 0 || q.n > 0 || q.draining || q.ordered || q.closed || q.active == maxWorkers {
		return nil
	}
	w := q.idle[n-1]
	q.idle = q.idle[:n-1]
	q.active++
	return w
}

// release ends the command of a worker that was claimed.
func (q *queue) release(w *worker) {
	if c := q.finish(w, false); c != nil {
		w.wake <- c
	}
}

// next takes the first waiting command if it may start now. q.mu is held.
func (q *queue) next() *scsi.Command {
	if q.n == 0 || q.draining || q.active == maxWorkers {
		return nil
	}
	c := q.waiting[q.head]
	switch c.Attr {
	case scsi.HeadOfQueue:
	case scsi.Ordered: // after all before it, before all after it (SAM-5 8.6.3)
		if q.active > 0 {
			return nil
		}
		q.ordered = true
	default:
		if q.ordered {
			return nil
		}
	}
	q.waiting[q.head] = nil
	q.head = (q.head + 1) % maxQueued
	q.n--
	q.active++
	return c
}

// dispatch gives a worker to every command that may start. q.mu is held.
func (q *queue) dispatch() {
	for c := q.next(); c != nil; c = q.next() {
		if n := len(q.idle); n > 0 {
			q.idle[n-1].wake <- c // never blocks: an idle worker's channel is empty and holds one
			q.idle = q.idle[:n-1]
			continue
		}
		q.workers++
		w := &worker{wake: make(chan *scsi.Command, 1), iov: make([]unix.Iovec, maxIovecs)}
		w.wake <- c
		go q.work(w)
	}
}

func (q *queue) work(w *worker) {
	for c := range w.wake {
		for c != nil {
			// c belongs to somebody else once it is done.
			ordered := c.Attr == scsi.Ordered
			q.run(w, c)
			c = q.finish(w, ordered)
		}
	}
}

// finish ends w's command and gives it the next one, or nil.
func (q *queue) finish(w *worker, ordered bool) *scsi.Command {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.active--
	if ordered {
		q.ordered = false
	}
	c := q.next()
	if c == nil {
		q.idle = append(q.idle, w)
	}
	q.dispatch() // the end of an ORDERED command may let several start
	if q.active == 0 {
		q.finished.Broadcast()
	}
	return c
}

// drain gives back what has not started, waits for what has, calls reset and
// goes on.
func (q *queue) drain(reset func()) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.draining {
		q.finished.Wait()
	}
	if q.closed {
		return os.ErrClosed
	}
	q.draining = true
	// Done may submit: what comes from now on waits for the reset, so only
	// as many as there are now are given back.
	for n := q.n; n > 0; n-- {
		c := q.waiting[q.head]
		q.waiting[q.head] = nil
		q.head = (q.head + 1) % maxQueued
		q.n--
		q.mu.Unlock()
		c.Fail(scsi.ResetOccurred)
		q.mu.Lock()
	}
	for q.active > 0 {
		q.finished.Wait()
	}
	reset()
	q.draining = false
	q.dispatch()
	q.finished.Broadcast()
	return nil
}

// close waits for every command and ends the workers. It says whether this
// call was the one that closed.
func (q *queue) close() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false
	}
	q.closed = true
	for q.active > 0 || q.n > 0 || q.draining {
		q.finished.Wait()
	}
	for _, w := range q.idle {
		close(w.wake)
	}
	return true
}
