package virtio

import (
	"encoding/binary"
	"fmt"
	"sync"

	"vmm/internal/sys"
	"vmm/memory"
)

// MaxQueueSize is the largest size of a split virtqueue, in descriptors
// (virtio 1.3, 2.7).
const MaxQueueSize = 1 << 15

// Descriptor flags (virtio 1.3, 2.7.5).
const (
	descNext     = 1 << 0
	descWrite    = 1 << 1
	descIndirect = 1 << 2
)

// Suppression flags for queues without EVENT_IDX (virtio 1.3, 2.7.7, 2.7.10).
const (
	availNoInterrupt = 1 << 0
	usedNoNotify     = 1 << 0
)

// Layout of the three parts in bytes (virtio 1.3, 2.7). The two rings share
// a shape: flags, index, one element per descriptor, event index.
const (
	descSize      = 16
	availElemSize = 2
	usedElemSize  = 8
	ringFlags     = 0
	ringIndex     = 2
	ringElems     = 4
	ringOverhead  = 6 // flags, index, event index
)

// Segment is a piece of guest memory that one descriptor names, already
// checked to be RAM; it is never empty. The guest may change Data's bytes at
// any instant.
type Segment struct {
	GPA  memory.GPA
	Data []byte
}

// Chain is one request: the descriptors from Head on, those the device reads
// before those it writes. Pop fills it and reuses its slices.
type Chain struct {
	Head     uint16 // index of the first descriptor, which names the chain to the driver
	Readable []Segment
	Writable []Segment

	segments []Segment // what both are cut from
}

// QueueState is what a queue is, as plain values for migration: where the
// driver put it and how far it has been worked. It is not trusted: NewQueue
// checks it.
type QueueState struct {
	Size  uint16     // in descriptors
	Desc  memory.GPA // descriptor area, 16-byte aligned
	Avail memory.GPA // driver area, 2-byte aligned
	Used  memory.GPA // device area, 4-byte aligned

	LastAvail      uint16 // available index up to which chains were popped
	UsedIndex      uint16 // used index as last published
	SignalledUsed  uint16 // used index at the last decision about an interrupt
	SignalledValid bool   // false: SignalledUsed says nothing, interrupt next time
}

// QueueConfig is what a queue works with. The queue owns none of it.
type QueueConfig struct {
	RAM      *memory.RAM
	Features uint64 // as negotiated

	// MaxSize is the largest size that the device offered for this queue. It
	// bounds the length of a chain; the size that the driver chose may be
	// smaller, but Linux does not shorten its indirect tables then.
	MaxSize uint16

	Doorbell  *sys.EventFD // the driver's notifications
	Interrupt func()       // raises the queue's vector; called from any goroutine
}

// Queue is the device's side of a split virtqueue (virtio 1.3, 2.7). Pop,
// EnableNotify, DisableNotify and Wait belong to one goroutine, the queue's
// worker, whose loop is:
//
//	for !stopping {
//		q.DisableNotify()
//		... Pop until there is no chain ...
//		if !q.EnableNotify() {
//			q.Wait()
//		}
//	}
//
// Push, Interrupt and Kick may be called from any goroutine. State may be
// called while the worker rests and no request is in flight.
type Queue struct {
	cfg      QueueConfig
	size     uint16 // a power of two
	eventIdx bool
	indirect bool

	at    QueueState // the addresses of the parts
	desc  []byte
	avail []byte
	used  []byte

	// The worker's.
	lastAvail uint16 // next avail ring element to pop
	seenAvail uint16 // avail index when last read; lastAvail up to here may be popped

	mu             sync.Mutex // guards the used ring's elements and index, and below
	usedIndex      uint16
	signalledUsed  uint16
	signalledValid bool

	afterCopy func() // tests only: runs when a descriptor has been copied
}

// NewQueue makes a live queue of what a driver or a migration stream says.
// The memory of its three parts is looked up here, once.
func NewQueue(cfg QueueConfig, s QueueState) (*Queue, error) {
	size := uint64(s.Size)
	switch {
	case size == 0 || size&(size-1) != 0 || size > MaxQueueSize:
		return nil, fmt.Errorf("virtqueue of %d descriptors: the size must be a power of two up to %d", size, MaxQueueSize)
	case s.Size > cfg.MaxSize:
		return nil, fmt.Errorf("virtqueue of %d descriptors: the device offers %d", size, cfg.MaxSize)
	case s.LastAvail != s.UsedIndex:
		// A request that was popped but not pushed would never be answered.
		return nil, fmt.Errorf("virtqueue with %d requests in flight (available index %d, used index %d): a new queue has none",
			s.LastAvail-s.UsedIndex, s.LastAvail, s.UsedIndex)
	}
	q := &Queue{
		cfg:            cfg,
		size:           s.Size,
		eventIdx:       cfg.Features&FeatureEventIdx != 0,
		indirect:       cfg.Features&FeatureIndirectDesc != 0,
		at:             s,
		lastAvail:      s.LastAvail,
		seenAvail:      s.LastAvail,
		usedIndex:      s.UsedIndex,
		signalledUsed:  s.SignalledUsed,
		signalledValid: s.SignalledValid,
	}
	for _, part := range []struct {
		name  string
		gpa   memory.GPA
		align memory.GPA // virtio 1.3, 2.7
		bytes uint64
		view  *[]byte
	}{
		{"descriptor area", s.Desc, 16, descSize * size, &q.desc},
		{"driver area", s.Avail, 2, ringOverhead + availElemSize*size, &q.avail},
		{"device area", s.Used, 4, ringOverhead + usedElemSize*size, &q.used},
	} {
		if part.gpa%part.align != 0 {
			return nil, fmt.Errorf("virtqueue %s at %v is not %d-byte aligned", part.name, part.gpa, part.align)
		}
		view, err := cfg.RAM.Slice(part.gpa, part.bytes)
		if err != nil {
			return nil, fmt.Errorf("virtqueue %s: %w", part.name, err)
		}
		*part.view = view
	}
	return q, nil
}

// Size is the number of descriptors, a power of two.
func (q *Queue) Size() uint16 { return q.size }

// NewChain makes a chain that Pop never needs to grow.
func (q *Queue) NewChain() *Chain {
	return &Chain{segments: make([]Segment, 0, q.longest())}
}

// longest bounds the descriptors of one chain, an indirect table's included
// (virtio 1.3, 2.7.5.3.1).
func (q *Queue) longest() int { return int(q.cfg.MaxSize) }

// Pop takes the next available chain. It answers false if there is none. An
// error says which rule the driver broke; nothing was taken then, and the
// device cannot go on.
func (q *Queue) Pop(c *Chain) (bool, error) {
	if q.lastAvail == q.seenAvail && !q.pending() {
		return false, nil
	}
	// pending may have been called by EnableNotify, so check here, always.
	if n := q.seenAvail - q.lastAvail; n > q.size {
		return false, fmt.Errorf("virtqueue: available index %d is %d chains ahead of %d, the queue has %d descriptors",
			q.seenAvail, n, q.lastAvail, q.size)
	}
	// pending read the index before this reads the element: loads stay in
	// order, and the driver wrote the element, and the descriptors that it
	// names, before the index (virtio 1.3, 2.7.13.3).
	slot := int(q.lastAvail & (q.size - 1))
	head := memory.Load16(q.avail[ringElems+availElemSize*slot:])
	if err := q.walk(c, head); err != nil {
		return false, fmt.Errorf("virtqueue: chain at descriptor %d: %w", head, err)
	}
	c.Head = head
	q.lastAvail++
	return true, nil
}

// pending reads the available index and reports whether there is something
// to pop.
func (q *Queue) pending() bool {
	q.seenAvail = memory.Load16(q.avail[ringIndex:])
	return q.seenAvail != q.lastAvail
}

// walk follows the descriptors from head on and puts them into c. It looks at
// each descriptor once: what it checks is what it uses, whatever the guest
// writes meanwhile.
func (q *Queue) walk(c *Chain, head uint16) error {
	table := q.desc
	inTable := false // walking an indirect table
	index := head
	readable := 0
	segments := c.segments[:0]
	total := uint64(0)
	for {
		if n := len(table) / descSize; int(index) >= n {
			return fmt.Errorf("descriptor %d is beyond a table of %d", index, n)
		}
		d := table[descSize*int(index):][:descSize]
		gpa := memory.GPA(binary.LittleEndian.Uint64(d))
		rest := binary.LittleEndian.Uint64(d[8:]) // one load for length, flags and next
		length, flags, next := uint32(rest), uint16(rest>>32), uint16(rest>>48)
		if q.afterCopy != nil {
			q.afterCopy()
		}

		if flags&descIndirect != 0 {
			// Any number of direct descriptors, then one that refers to a
			// table (virtio 1.3, 2.7.5.3.2).
			switch {
			case !q.indirect:
				return fmt.Errorf("descriptor %d is indirect, which was not negotiated", index)
			case inTable:
				return fmt.Errorf("descriptor %d of an indirect table is itself indirect", index)
			case flags&descNext != 0:
				return fmt.Errorf("descriptor %d has both INDIRECT and NEXT", index)
			case length == 0 || length%descSize != 0:
				return fmt.Errorf("descriptor %d: an indirect table of %d bytes is no whole number of descriptors", index, length)
			}
			view, err := q.cfg.RAM.Slice(gpa, uint64(length))
			if err != nil {
				return fmt.Errorf("descriptor %d: indirect table: %w", index, err)
			}
			table, inTable, index = view, true, 0
			continue
		}

		// Each turn but the one above adds a segment, so this also ends a loop.
		if len(segments) == q.longest() {
			return fmt.Errorf("more than %d descriptors, or a loop", q.longest())
		}
		if length == 0 {
			return fmt.Errorf("descriptor %d is empty", index)
		}
		// A chain is at most 2^32 bytes (virtio 1.3, 2.7.5); the sum cannot
		// wrap, it stands at that at most.
		if total += uint64(length); total > 1<<32 {
			return fmt.Errorf("descriptor %d: the chain is longer than 2^32 bytes", index)
		}
		view, err := q.cfg.RAM.Slice(gpa, uint64(length))
		if err != nil {
			return fmt.Errorf("descriptor %d: %w", index, err)
		}
		segments = append(segments, Segment{GPA: gpa, Data: view})
		if flags&descWrite == 0 {
			if readable++; readable != len(segments) {
				return fmt.Errorf("descriptor %d is device-readable behind a device-writable one", index)
			}
		}
		if flags&descNext == 0 {
			break
		}
		index = next
	}
	c.segments = segments
	c.Readable = segments[:readable:readable]
	c.Writable = segments[readable:]
	return nil
}

// Push gives a chain back to the driver, with written bytes of its writable
// segments filled from the start on. All of them are marked dirty: a failed
// transfer may have left bytes beyond those it reports. Everything the device
// wrote must be complete.
func (q *Queue) Push(c *Chain, written uint32) {
	for _, s := range c.Writable {
		q.cfg.RAM.MarkDirty(s.GPA, uint64(len(s.Data)))
	}
	q.mu.Lock()
	slot := int(q.usedIndex & (q.size - 1))
	off := ringElems + usedElemSize*slot
	binary.LittleEndian.PutUint32(q.used[off:], uint32(c.Head))
	binary.LittleEndian.PutUint32(q.used[off+4:], written)
	q.usedIndex++
	// Store16 comes after every earlier store, so the driver that sees the
	// index also sees the element and the data (virtio 1.3, 2.7.8.2).
	memory.Store16(q.used[ringIndex:], q.usedIndex)
	// A mark stands for a write that is complete; the driver needs no mark to
	// see the ring, only a migration does, and that waits for this queue to rest.
	q.cfg.RAM.MarkDirty(q.at.Used+memory.GPA(off), usedElemSize)
	q.cfg.RAM.MarkDirty(q.at.Used+ringIndex, 2)
	if q.usedIndex == q.signalledUsed {
		q.signalledValid = false // 2^16 chains without a decision: the distance is lost
	}
	q.mu.Unlock()
}

// Interrupt raises the queue's vector if the driver wants to hear of what has
// been pushed since the last call.
func (q *Queue) Interrupt() {
	if q.wanted() {
		q.cfg.Interrupt()
	}
}

func (q *Queue) wanted() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	// Every chain is judged once, by one caller: the range from old to new is
	// taken under the lock. A caller that finds its chain already judged may
	// leave, because the verdict was made after its Push.
	old, now := q.signalledUsed, q.usedIndex
	if q.signalledValid && old == now {
		return false
	}
	valid := q.signalledValid
	q.signalledUsed, q.signalledValid = now, true
	// The used index must be visible before the driver's wish is read; the
	// driver states its wish, fences, and reads the used index. So either it
	// sees our index or we see its wish (virtio 1.3, 2.7.7.2).
	memory.Fence()
	if !q.eventIdx {
		return memory.Load16(q.avail[ringFlags:])&availNoInterrupt == 0
	}
	event := memory.Load16(q.avail[ringElems+availElemSize*int(q.size):])
	return !valid || passed(event, old, now)
}

// passed reports whether an index that went from old to now went over event,
// that is, whether element event is among those added, modulo 2^16.
func passed(event, old, now uint16) bool { return now-event-1 < now-old }

// EnableNotify asks the driver to notify the queue of new chains, then looks
// once more: true means that there are chains already, for which no
// notification may come, so the worker must not wait.
func (q *Queue) EnableNotify() (more bool) {
	if q.eventIdx {
		// The event index lies behind the ring's last element, and what
		// follows it is the driver's: 16 bits, no more.
		q.storeUsed(ringElems+usedElemSize*int(q.size), q.lastAvail)
	} else {
		q.storeUsed(ringFlags, 0)
	}
	// Our wish must be visible before the index is read; the driver writes
	// its index, fences, and reads our wish. So either it notifies or we see
	// its chain.
	memory.Fence()
	return q.pending()
}

// DisableNotify tells the driver that notifications are of no use, because
// the worker is looking anyway. It is advice: they may still come.
func (q *Queue) DisableNotify() {
	// With EVENT_IDX the event index simply stays behind: the driver passes
	// it once in 2^16 chains.
	if !q.eventIdx {
		q.storeUsed(ringFlags, usedNoNotify)
	}
}

func (q *Queue) storeUsed(off int, v uint16) {
	memory.Store16(q.used[off:], v)
	q.cfg.RAM.MarkDirty(q.at.Used+memory.GPA(off), 2)
}

// Wait blocks the calling OS thread until the queue is kicked or has been
// since the last Wait. It may wake for nothing.
func (q *Queue) Wait() error {
	_, err := q.cfg.Doorbell.Wait()
	return err
}

// Kick wakes the worker. The driver's notifications do the same.
func (q *Queue) Kick() {
	// It can only fail on a closed doorbell, whose worker is gone.
	_ = q.cfg.Doorbell.Signal()
}

// State is the queue as plain values.
func (q *Queue) State() QueueState {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.at
	s.LastAvail = q.lastAvail
	s.UsedIndex = q.usedIndex
	s.SignalledUsed = q.signalledUsed
	s.SignalledValid = q.signalledValid
	return s
}
