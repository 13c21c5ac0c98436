package virtio

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"vmm/scsi"
)

// Layout of a command in bytes (virtio 1.3, 5.6.6.1). No struct has it: the
// fields are not aligned, and the sizes of CDB and sense data vary.
const (
	scsiHeaderSize = 19 // lun, id, task_attr, prio, crn; then the CDB
	scsiHeaderID   = 8
	scsiHeaderAttr = 16

	scsiResponseSize     = 12 // then the sense data
	scsiResponseResidual = 4
	scsiResponseStatus   = 10
	scsiResponseCode     = 11
)

// Response codes (virtio 1.3, 5.6.6.1 and 5.6.6.2).
const (
	scsiOK                = 0 // also FUNCTION COMPLETE
	scsiAborted           = 2
	scsiBadTarget         = 3
	scsiReset             = 4
	scsiBusy              = 5
	scsiTransportFailure  = 6
	scsiFailure           = 9
	scsiFunctionSucceeded = 10
	scsiFunctionRejected  = 11
	scsiIncorrectLUN      = 12
)

// responseCodes maps how a command came back to what the driver is told.
var responseCodes = [...]byte{
	scsi.Completed:        scsiOK,
	scsi.BadTarget:        scsiBadTarget,
	scsi.ResetOccurred:    scsiReset,
	scsi.Aborted:          scsiAborted,
	scsi.Busy:             scsiBusy,
	scsi.TransportFailure: scsiTransportFailure,
	scsi.Failure:          scsiFailure,
}

// request is one chain of a control or request queue on its way from Pop to
// Push. Requests are made once and used again and again.
type request struct {
	queue  *requestQueue
	chain  Chain
	header [scsiHeaderSize + scsiMaxCDBSize]byte // the driver's part, copied once
	views  [][]byte                              // backs cmd's data buffers
	dataIn int                                   // length of cmd.DataIn in bytes
	cmd    scsi.Command
	stats  *QueueStats   // what it counts for; nil: nothing
	began  time.Duration // since started; 0: it is not timed

	// Guarded by queue.mu.
	arrival uint64 // the queue's count of requests when it came; 0 while free
	to      address
	id      uint64 // the driver's name for it
}

// requestQueue is a queue and its requests in flight, which SAM calls the
// task set's part of this nexus and this queue.
type requestQueue struct {
	*Queue
	session *scsiSession
	name    string
	index   int                  // among the request queues; -1: the control queue
	handle  func(*request) error // begins a request; an error: the driver broke a rule
	spare   *request             // the worker's: what the next chain goes into

	mu       sync.Mutex
	returned sync.Cond  // a request has come back
	waiting  int        // waiters for returned
	arrivals uint64     // requests that have come so far
	requests []request  // as many as the queue can have in flight
	free     []*request // those that are not in flight
}

func newRequestQueue(l *scsiSession, q *Queue, name string, index int, handle func(*request) error) *requestQueue {
	rq := &requestQueue{
		Queue:    q,
		session:  l,
		name:     name,
		index:    index,
		handle:   handle,
		requests: make([]request, q.Size()),
		free:     make([]*request, 0, q.Size()),
	}
	rq.returned.L = &rq.mu
	for i := range rq.requests {
		r := &rq.requests[i]
		r.queue = rq
		r.cmd.CDB = r.header[scsiHeaderSize : scsiHeaderSize+l.cdbSize]
		r.cmd.Done = r.done
		rq.free = append(rq.free, r)
	}
	return rq
}

// take works off what is available.
func (q *requestQueue) take() (again bool, err error) {
	q.DisableNotify()
	for {
		if q.spare == nil {
			q.spare = q.get()
		}
		if q.spare == nil || q.session.halting() {
			return false, nil
		}
		r := q.spare
		ok, err := q.Pop(&r.chain)
		if err == nil && !ok {
			return q.EnableNotify(), nil
		}
		if err == nil {
			err = q.handle(r)
		}
		if err != nil {
			return false, fmt.Errorf("%s: %w", q.name, err)
		}
	}
}

// get takes a free request. A driver that has no more in flight than the
// queue has descriptors waits here for the end of a Push at most; one that
// uses a descriptor twice waits for its own commands, or for a quiesce, where
// the answer is nil.
func (q *requestQueue) get() *request {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.free) == 0 {
		if q.session.halting() {
			return nil
		}
		q.waiting++
		q.returned.Wait()
		q.waiting--
	}
	last := len(q.free) - 1
	r := q.free[last]
	q.free = q.free[:last]
	return r
}

// enter notes that the worker's spare request is in flight. It comes before
// the target is looked up: Detach takes the target away, then looks at what
// is in flight, so one of the two sees the other.
func (q *requestQueue) enter(to address, id uint64) {
	r := q.spare
	q.spare = nil
	q.mu.Lock()
	q.arrivals++
	r.arrival, r.to, r.id = q.arrivals, to, id
	q.mu.Unlock()
	if r.stats, r.began = nil, 0; r.arrival%timedEvery == 1 && q.index >= 0 {
		r.began = time.Since(started)
	}
}

// leave gives a request back to the driver, its answer complete, and is the
// last to touch it. Whoever waits for the request learns of it only then, so
// a task management function is answered after the commands that it ended
// (virtio 1.3, 5.6.6.2).
func (q *requestQueue) leave(r *request, written int) {
	q.Push(&r.chain, uint32(written))
	q.Interrupt()
	q.mu.Lock()
	if r.stats != nil {
		r.stats.count(r)
	}
	r.arrival = 0
	q.free = append(q.free, r)
	if q.waiting > 0 {
		q.returned.Broadcast()
	}
	q.mu.Unlock()
}

// mark names all requests that have come so far.
func (q *requestQueue) mark() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.arrivals
}

// has reports whether a request that match selects is in flight.
func (q *requestQueue) has(match func(*request) bool) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.inFlight(q.arrivals, match)
}

// inFlight looks for a request up to mark. The lock is held.
func (q *requestQueue) inFlight(mark uint64, match func(*request) bool) bool {
	for i := range q.requests {
		if r := &q.requests[i]; r.arrival != 0 && r.arrival <= mark && match(r) {
			return true
		}
	}
	return false
}

// await returns when the requests up to mark that match selects have come
// back, or ctx is done; it reports whether they have.
func (q *requestQueue) await(ctx context.Context, mark uint64, match func(*request) bool) bool {
	stop := context.AfterFunc(ctx, q.wake)
	defer stop()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting++
	defer func() { q.waiting-- }()
	for q.inFlight(mark, match) {
		if ctx.Err() != nil {
			return false
		}
		q.returned.Wait()
	}
	return true
}

// wake makes whoever waits look again. The lock makes sure that none is
// between looking and waiting.
func (q *requestQueue) wake() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.returned.Broadcast()
}

// handleCommand begins what came on a request queue.
func (l *scsiSession) handleCommand(r *request) error {
	// Where one descriptor ends and the next begins means nothing (virtio
	// 1.3, 2.7.4): header and CDB are the first bytes, whatever they lie in.
	header := r.header[:l.headerSize]
	if n := gather(header, r.chain.Readable); n < len(header) {
		return fmt.Errorf("a command's header is %d bytes with a CDB of %d, the driver sent %d",
			len(header), l.headerSize-scsiHeaderSize, n)
	}
	room := scsiResponseSize + l.senseSize
	writable := length(r.chain.Writable)
	if writable < room {
		return fmt.Errorf("a command's response is %d bytes with sense data of %d, the driver left room for %d",
			room, l.senseSize, writable)
	}

	c := &r.cmd
	c.Attr = scsi.TaskAttr(header[scsiHeaderAttr])
	if c.Attr > scsi.ACA {
		c.Attr = scsi.Simple // any may be mapped to it (virtio 1.3, 5.6.6.1)
	}
	c.Outcome, c.Status, c.Residual, c.SenseLen = scsi.Completed, scsi.Good, 0, 0
	r.views = viewsAfter(r.views[:0], r.chain.Readable, len(header))
	out := len(r.views)
	r.views = viewsAfter(r.views, r.chain.Writable, room)
	c.DataOut = r.views[:out:out]
	c.DataIn = r.views[out:]
	r.dataIn = writable - room

	to := parseAddress([8]byte(header))
	r.queue.enter(to, binary.LittleEndian.Uint64(header[scsiHeaderID:]))
	if len(c.DataOut) > 0 && len(c.DataIn) > 0 {
		// The answer of 5.6.6.1 where INOUT was not negotiated.
		c.Fail(scsi.Failure)
		return nil
	}
	l.controller.dispatch(to, r)
	return nil
}

// done is the command's Done: it answers the driver.
func (r *request) done(c *scsi.Command) {
	l := r.queue.session
	var buf [scsiResponseSize + scsiMaxSenseSize]byte
	answer := buf[:scsiResponseSize+l.senseSize]
	code := byte(scsiFailure)
	if int(c.Outcome) < len(responseCodes) {
		code = responseCodes[c.Outcome]
	}
	data := r.dataIn
	for _, b := range c.DataOut {
		data += len(b)
	}
	residual := min(c.Residual, uint32(data))
	sense := copy(answer[scsiResponseSize:], c.Sense[:min(max(c.SenseLen, 0), len(c.Sense))])
	le := binary.LittleEndian
	le.PutUint32(answer[0:], uint32(sense))
	le.PutUint32(answer[scsiResponseResidual:], residual)
	answer[scsiResponseStatus] = byte(c.Status)
	answer[scsiResponseCode] = code
	scatter(r.chain.Writable, answer)

	// The sense area counts as written to its end: zeroes follow the sense.
	r.queue.leave(r, len(answer)+max(r.dataIn-int(residual), 0))
}

// length is the number of bytes in segments.
func length(segments []Segment) int {
	n := 0
	for i := range segments {
		n += len(segments[i].Data)
	}
	return n
}

// gather copies the first bytes of segments into p and returns how many there
// were.
func gather(p []byte, segments []Segment) int {
	n := 0
	for i := range segments {
		if n == len(p) {
			break
		}
		n += copy(p[n:], segments[i].Data)
	}
	return n
}

// scatter copies p into the first bytes of segments, which have room for it.
func scatter(segments []Segment, p []byte) {
	for i := range segments {
		if len(p) == 0 {
			break
		}
		p = p[copy(segments[i].Data, p):]
	}
}

// viewsAfter appends what follows the first skip bytes of segments to views.
func viewsAfter(views [][]byte, segments []Segment, skip int) [][]byte {
	for i := range segments {
		b := segments[i].Data
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		views = append(views, b[skip:])
		skip = 0
	}
	return views
}
