// Package virtiotest plays the guest: a driver's side of the split virtqueue
// in guest memory, and a virtio driver that finds and drives a device through
// the registers of its PCI function.
//
// It is for tests, fuzzers and benchmarks. It shares no code with package
// virtio, so that a misreading of the specification there shows here, and it
// panics where a device breaks the rules.
package virtiotest

import (
	"encoding/binary"
	"fmt"
	"testing"

	"vmm/memory"
)

// Feature bits that a ring knows (virtio 1.3, 6).
const (
	IndirectDesc = 1 << 28
	EventIdx     = 1 << 29
	Version1     = 1 << 32
)

// Memory is guest RAM and an allocator that never frees.
type Memory struct {
	RAM  *memory.RAM
	next memory.GPA
}

// NewMemory makes size bytes of guest RAM that last as long as the test.
func NewMemory(tb testing.TB, size uint64) *Memory {
	tb.Helper()
	ram, err := memory.New(size)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { ram.Close() })
	return &Memory{RAM: ram, next: memory.PageSize} // page 0 stays unused: a null pointer shows
}

// Alloc takes n bytes at a multiple of align, a power of two.
func (m *Memory) Alloc(n, align uint64) memory.GPA {
	at := memory.GPA((uint64(m.next) + align - 1) &^ (align - 1))
	m.Bytes(at, n)
	m.next = at + memory.GPA(n)
	return at
}

// Bytes is a view of n bytes at gpa.
func (m *Memory) Bytes(gpa memory.GPA, n uint64) []byte {
	b, err := m.RAM.Slice(gpa, n)
	if err != nil {
		panic(fmt.Sprintf("virtiotest: %v", err))
	}
	return b
}

// Buffer is a piece of guest memory that a request hands to the device.
type Buffer struct {
	GPA   memory.GPA
	Len   uint32 // bytes
	Write bool   // the device writes it
}

// Used is a request that the device has given back.
type Used struct {
	Head    uint16 // what Add answered
	Written uint32 // bytes
}

// Ring is the driver's side of a split virtqueue. One goroutine uses it.
type Ring struct {
	Size              uint16
	Desc, Avail, Used memory.GPA // where its three parts are

	// Notify tells the device of new chains; Kick calls it.
	Notify func()

	eventIdx          bool
	mem               *Memory
	desc, avail, used []byte

	next      []uint16 // free list, and the descriptors of each chain in use
	free      uint16
	numFree   uint16
	length    []uint16     // by head: descriptors of the chain in use there, else 0
	tables    []memory.GPA // by head: its indirect table, allocated when first needed
	tableSize []uint64     // by head: bytes of it

	availIndex uint16
	usedIndex  uint16
	kicked     uint16 // available index at the last Kick
}

// NewRing lays out an empty ring of size descriptors, with the features
// negotiated. The driver area is at an address that is 2 modulo 4, which the
// specification allows.
func NewRing(m *Memory, size uint16, features uint64) *Ring {
	n := uint64(size)
	r := &Ring{
		Size:      size,
		Desc:      m.Alloc(16*n, 16),
		Avail:     m.Alloc(6+2*n+2, 4) + 2,
		Used:      m.Alloc(6+8*n, 4),
		Notify:    func() {},
		eventIdx:  features&EventIdx != 0,
		mem:       m,
		next:      make([]uint16, size),
		numFree:   size,
		length:    make([]uint16, size),
		tables:    make([]memory.GPA, size),
		tableSize: make([]uint64, size),
	}
	r.desc = m.Bytes(r.Desc, 16*n)
	r.avail = m.Bytes(r.Avail, 6+2*n)
	r.used = m.Bytes(r.Used, 6+8*n)
	for i := range r.next {
		r.next[i] = uint16(i + 1)
	}
	return r
}

// PutDescriptor writes one descriptor, of the ring's table or an indirect one.
func PutDescriptor(d []byte, gpa memory.GPA, length uint32, flags, next uint16) {
	binary.LittleEndian.PutUint64(d[0:], uint64(gpa))
	binary.LittleEndian.PutUint32(d[8:], length)
	binary.LittleEndian.PutUint16(d[12:], flags)
	binary.LittleEndian.PutUint16(d[14:], next)
}

// Descriptor flags (virtio 1.3, 2.7.5).
const (
	FlagNext     = 1
	FlagWrite    = 2
	FlagIndirect = 4
)

// Free is the number of descriptors that are not in use.
func (r *Ring) Free() int { return int(r.numFree) }

// Add makes a chain of bufs available and names it. It answers false if there
// are too few descriptors. The device is not told: see Kick.
func (r *Ring) Add(bufs ...Buffer) (head uint16, ok bool) {
	n := uint16(len(bufs))
	if n == 0 || n > r.numFree {
		return 0, false
	}
	head = r.free
	for i, b := range bufs {
		slot := r.free
		r.free = r.next[slot]
		flags := uint16(0)
		if b.Write {
			flags |= FlagWrite
		}
		if i < len(bufs)-1 {
			flags |= FlagNext
		}
		PutDescriptor(r.desc[16*int(slot):], b.GPA, b.Len, flags, r.free)
	}
	r.numFree -= n
	r.publish(head, n)
	return head, true
}

// AddIndirect is Add with all of bufs in an indirect table.
func (r *Ring) AddIndirect(bufs ...Buffer) (head uint16, ok bool) {
	if len(bufs) == 0 || r.numFree == 0 {
		return 0, false
	}
	head = r.free
	size := 16 * uint64(len(bufs))
	if r.tableSize[head] < size {
		r.tables[head], r.tableSize[head] = r.mem.Alloc(size, 16), size
	}
	table := r.mem.Bytes(r.tables[head], size)
	for i, b := range bufs {
		flags := uint16(0)
		if b.Write {
			flags |= FlagWrite
		}
		if i < len(bufs)-1 {
			flags |= FlagNext
		}
		PutDescriptor(table[16*i:], b.GPA, b.Len, flags, uint16(i+1))
	}
	r.free = r.next[head]
	r.numFree--
	PutDescriptor(r.desc[16*int(head):], r.tables[head], uint32(size), FlagIndirect, 0)
	r.publish(head, 1)
	return head, true
}

func (r *Ring) publish(head, n uint16) {
	r.length[head] = n
	slot := int(r.availIndex % r.Size)
	memory.Store16(r.avail[4+2*slot:], head)
	r.availIndex++
	memory.Store16(r.avail[2:], r.availIndex)
}

// Kick notifies the device if it wants to hear of the chains added since the
// last Kick, and reports whether it did.
func (r *Ring) Kick() bool {
	old, now := r.kicked, r.availIndex
	r.kicked = now
	memory.Fence() // the index is visible before the device's wish is read
	var wanted bool
	if r.eventIdx {
		event := memory.Load16(r.used[4+8*int(r.Size):])
		wanted = now-event-1 < now-old // virtio 1.3, 2.7.10.1
	} else {
		wanted = old != now && memory.Load16(r.used)&1 == 0
	}
	if wanted {
		r.Notify()
	}
	return wanted
}

// Reap takes the next request that the device has given back, if any.
func (r *Ring) Reap() (u Used, ok bool) {
	if memory.Load16(r.used[2:]) == r.usedIndex {
		return Used{}, false
	}
	elem := r.used[4+8*int(r.usedIndex%r.Size):]
	id, written := binary.LittleEndian.Uint32(elem), binary.LittleEndian.Uint32(elem[4:])
	if id >= uint32(r.Size) || r.length[id] == 0 {
		panic(fmt.Sprintf("virtiotest: the device gave back descriptor %d, which is not in use", id))
	}
	r.usedIndex++
	head := uint16(id)
	last := head
	for range r.length[head] - 1 {
		last = r.next[last]
	}
	r.next[last] = r.free
	r.free = head
	r.numFree += r.length[head]
	r.length[head] = 0
	return Used{Head: head, Written: written}, true
}

// EnableInterrupt asks the device for an interrupt, then looks once more:
// true means that a request has come back already.
func (r *Ring) EnableInterrupt() (more bool) {
	if r.eventIdx {
		memory.Store16(r.avail[4+2*int(r.Size):], r.usedIndex)
	} else {
		memory.Store16(r.avail, 0)
	}
	memory.Fence() // the wish is visible before the index is read
	return memory.Load16(r.used[2:]) != r.usedIndex
}

// DisableInterrupt tells the device that the driver is looking anyway.
func (r *Ring) DisableInterrupt() {
	if !r.eventIdx {
		memory.Store16(r.avail, 1)
	}
}
