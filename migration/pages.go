package migration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"vmm/memory"
)

// A data connection carries frames: a header, a table of runs, and the bytes
// of those runs that are not zero, in the table's order.
//
//	header  0..3 kind: 1 pages, 2 the end of a round
//	        4..7 pages: runs in the table, 1 to 256; end: the round's number
//	        8..15 pages: bytes that follow the table; end: 0
//	run     0..7 guest address, a multiple of 4096; bit 0: the run is zero
//	        8..15 length in bytes, a multiple of 4096
//
// A hole of the source's memory is not mentioned in the first round (see
// DirtyLog).
const (
	frameHead  = 16
	frameRun   = 16
	maxRuns    = 256
	maxPayload = 1 << 20 // bytes of pages in one frame

	framePages = 1
	frameEnd   = 2

	runZero = 1 // in the low bits of an address
)

// run is n bytes of guest memory, in whole pages of one region.
type run struct {
	gpa memory.GPA
	n   uint64
}

var zeroPage [memory.PageSize]byte

// sink is what frames are written to: a data connection, or a snapshot.
type sink interface {
	io.WriteCloser
	SetWriteDeadline(time.Time) error
}

// channel is the sending end of a data connection.
type channel struct {
	conn sink
	idle time.Duration
	head []byte   // header and table, reused
	vec  [][]byte // what is written, reused
}

// send writes the pages of runs, which are at most maxPayload bytes.
func (c *channel) send(ram *memory.RAM, runs []run) (sent uint64, err error) {
	c.head = append(c.head[:0], make([]byte, frameHead)...)
	c.vec = append(c.vec[:0], nil)
	var entries uint32
	var payload uint64
	for _, r := range runs {
		view, err := ram.Slice(r.gpa, r.n)
		if err != nil {
			return 0, err
		}
		for at := 0; at < len(view); {
			zero, end := stretch(view, at)
			flag := uint64(0)
			if zero {
				flag = runZero
			} else {
				c.vec = append(c.vec, view[at:end:end])
				payload += uint64(end - at)
			}
			c.head = binary.LittleEndian.AppendUint64(c.head, uint64(r.gpa)+uint64(at)|flag)
			c.head = binary.LittleEndian.AppendUint64(c.head, uint64(end-at))
			entries++
			at = end
		}
	}
	binary.LittleEndian.PutUint32(c.head[0:], framePages)
	binary.LittleEndian.PutUint32(c.head[4:], entries)
	binary.LittleEndian.PutUint64(c.head[8:], payload)
	return c.flush()
}

// stretch finds the end of the pages from at on that are all zero, or all not.
// A page that a vCPU writes meanwhile is in the dirty log by then, and comes
// again.
func stretch(view []byte, at int) (zero bool, end int) {
	isZero := func(at int) bool { return bytes.Equal(view[at:at+memory.PageSize], zeroPage[:]) }
	zero = isZero(at)
	for end = at + memory.PageSize; end < len(view) && isZero(end) == zero; {
		end += memory.PageSize
	}
	return zero, end
}

// end writes the round's marker.
func (c *channel) end(round uint32) error {
	c.head = append(c.head[:0], make([]byte, frameHead)...)
	c.vec = append(c.vec[:0], nil)
	binary.LittleEndian.PutUint32(c.head[0:], frameEnd)
	binary.LittleEndian.PutUint32(c.head[4:], round)
	_, err := c.flush()
	return err
}

// flush writes header and views in one writev where the connection has it.
func (c *channel) flush() (uint64, error) {
	if err := c.conn.SetWriteDeadline(time.Now().Add(c.idle)); err != nil {
		return 0, err
	}
	c.vec[0] = c.head
	v := net.Buffers(c.vec)
	n, err := v.WriteTo(c.conn)
	return uint64(n), err
}

// pump sends rounds of pages over any number of channels.
type pump struct {
	ram      *memory.RAM
	channels []*channel
	limit    limiter
	sent     atomic.Uint64 // bytes
	walked   atomic.Uint64 // bytes of memory, zero pages included
}

// round sends what visit visits, then the round's marker on every channel. When
// ctx ends the channels are of no use any more.
func (p *pump) round(ctx context.Context, number uint32, visit func(func(memory.GPA, uint64) error) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work := make(chan []run, len(p.channels))
	free := make(chan []run, 2*len(p.channels)+1)
	for range cap(free) {
		free <- make([]run, 0, maxRuns)
	}
	var wg sync.WaitGroup
	for _, c := range p.channels {
		wg.Go(func() {
			unblock := context.AfterFunc(ctx, func() { c.conn.SetWriteDeadline(time.Unix(1, 0)) })
			defer unblock()
			for runs := range work {
				if ctx.Err() == nil {
					if err := p.send(ctx, c, runs); err != nil {
						cancel(err)
					}
				}
				free <- runs[:0]
			}
			if ctx.Err() == nil {
				if err := c.end(number); err != nil {
					cancel(err)
				}
			}
		})
	}
	err := p.feed(ctx, work, free, visit)
	close(work)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// feed cuts what visit visits into portions of one frame.
func (p *pump) feed(ctx context.Context, work chan<- []run, free <-chan []run, visit func(func(memory.GPA, uint64) error) error) error {
	runs, size := <-free, uint64(0)
	hand := func() error {
		select {
		case work <- runs:
			runs, size = <-free, 0
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := visit(func(gpa memory.GPA, n uint64) error {
		for n > 0 {
			k := min(n, maxPayload-size)
			p.walked.Add(k)
			runs = append(runs, run{gpa, k})
			size, gpa, n = size+k, gpa+memory.GPA(k), n-k
			if size == maxPayload {
				if err := hand(); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err == nil && size > 0 {
		err = hand()
	}
	return err
}

func (p *pump) send(ctx context.Context, c *channel, runs []run) error {
	n, err := c.send(p.ram, runs)
	p.sent.Add(n)
	if err != nil {
		return err
	}
	return p.limit.wait(ctx, n)
}

// limiter keeps what all channels send together below a rate.
type limiter struct {
	mu   sync.Mutex
	rate uint64 // bytes per second; 0: no limit
	next time.Time
}

func (l *limiter) set(rate uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rate, l.next = rate, time.Time{}
}

// wait returns when the n bytes that were sent are within the rate.
func (l *limiter) wait(ctx context.Context, n uint64) error {
	d := l.take(n, time.Now())
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// take books n bytes at now and says how long they occupy the line from then.
func (l *limiter) take(n uint64, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rate == 0 {
		return 0
	}
	if l.next.Before(now) {
		l.next = now
	}
	l.next = l.next.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	return l.next.Sub(now)
}

// pageReader is the receiving end of a data connection.
type pageReader struct {
	r    io.Reader
	ram  *memory.RAM
	door *door // of r; nil: pages are read into the mapping

	ended bool // a round has: pages that come now may have come before
	head  [frameHead]byte
	table [maxRuns * frameRun]byte
}

// newPageReader reads one connection of a migration, whose connections share
// turn, and counts in came the bytes that arrive. It is to be closed before ram is.
func newPageReader(conn net.Conn, ram *memory.RAM, turn *sync.Mutex, came *atomic.Uint64) *pageReader {
	return &pageReader{r: countingReader{conn, came}, ram: ram, door: newDoor(conn, ram, turn, came)}
}

func (p *pageReader) close() {
	if p.door != nil {
		p.door.close()
	}
}

// next reads frames into guest memory until one ends a round. io.EOF means
// that the connection was closed between two frames.
func (p *pageReader) next() (round uint32, err error) {
	for {
		if _, err := io.ReadFull(p.r, p.head[:]); err != nil {
			return 0, err
		}
		kind, count := binary.LittleEndian.Uint32(p.head[0:]), binary.LittleEndian.Uint32(p.head[4:])
		payload := binary.LittleEndian.Uint64(p.head[8:])
		switch {
		case kind == frameEnd && payload == 0:
			p.ended = true
			return count, nil
		case kind != framePages || count == 0 || count > maxRuns || payload > maxPayload:
			return 0, errProtocol("a data frame of kind %d with %d runs and %d bytes", kind, count, payload)
		}
		if err := p.pages(p.table[:count*frameRun], payload); err != nil {
			return 0, unexpectedEOF(err)
		}
	}
}

// pages reads a table and the bytes that belong to it. The whole table is
// checked before a page is written.
func (p *pageReader) pages(table []byte, payload uint64) error {
	if _, err := io.ReadFull(p.r, table); err != nil {
		return err
	}
	var sum uint64
	for at := 0; at < len(table); at += frameRun {
		gpa, n, zero := parseRun(table[at:])
		if gpa%memory.PageSize != 0 || n == 0 || n%memory.PageSize != 0 {
			return errProtocol("a run of %d bytes at guest address %v", n, gpa)
		}
		if _, err := p.ram.Slice(gpa, n); err != nil {
			return errProtocol("%v", err)
		}
		if zero {
			continue
		}
		if sum += n; sum > payload {
			return errProtocol("runs of more than the frame's %d bytes", payload)
		}
	}
	if sum != payload {
		return errProtocol("runs of %d bytes in a frame of %d", sum, payload)
	}
	for at := 0; at < len(table); {
		gpa, n, zero := parseRun(table[at:])
		at += frameRun
		if zero {
			// A page that came earlier is cleared, one that did not stays a
			// hole, as in the first round all do.
			if p.ended {
				if err := p.ram.Discard(gpa, n); err != nil {
					return err
				}
			}
			continue
		}
		for at < len(table) { // neighbours go together
			next, more, zero := parseRun(table[at:])
			if zero || next != gpa+memory.GPA(n) {
				break
			}
			if _, err := p.ram.Slice(gpa, n+more); err != nil {
				break
			}
			n += more
			at += frameRun
		}
		if err := p.run(gpa, n, payload); err != nil {
			return err
		}
		payload -= n
	}
	return nil
}

// run reads n bytes of pages, of left that are still to come in their frame.
func (p *pageReader) run(gpa memory.GPA, n, left uint64) error {
	if p.door != nil {
		err := p.door.pass(gpa, n, left)
		if !errors.Is(err, errNoDoor) {
			return err
		}
		p.close()
		p.door = nil
	}
	view, err := p.ram.Slice(gpa, n)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(p.r, view)
	return err
}

func parseRun(b []byte) (gpa memory.GPA, n uint64, zero bool) {
	a := binary.LittleEndian.Uint64(b)
	return memory.GPA(a &^ runZero), binary.LittleEndian.Uint64(b[8:]), a&runZero != 0
}

// countingReader notes that something arrives.
type countingReader struct {
	r io.Reader
	n *atomic.Uint64
}

func (c countingReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n.Add(uint64(n))
	return n, err
}

// isTimeout says that a deadline passed.
func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// whyLost is a broken connection as a sentence.
func whyLost(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the other side closed the connection")
	case isTimeout(err):
		return fmt.Errorf("the other side stands still: %w", err)
	}
	return err
}
