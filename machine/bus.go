package machine

import (
	"fmt"
	"slices"
)

// handler answers accesses to a range of ports or of guest addresses; off
// counts from the start of the range, len(p) is the width. Both may be called
// by several vCPUs at once.
type handler interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

// bus sends an access to the device whose range it falls into. Ranges are
// added while the machine is built and never change afterwards.
type bus struct {
	ranges []busRange // in ascending order, disjoint
}

type busRange struct {
	start, end uint64 // end is behind the last one
	handler    handler
}

func (b *bus) add(start, size uint64, h handler) {
	r := busRange{start, start + size, h}
	i, _ := slices.BinarySearchFunc(b.ranges, r, func(a, b busRange) int {
		switch {
		case a.start < b.start:
			return -1
		case a.start > b.start:
			return 1
		}
		return 0
	})
	if i > 0 && b.ranges[i-1].end > r.start || i < len(b.ranges) && r.end > b.ranges[i].start {
		panic(fmt.Sprintf("machine: two devices at %#x", start)) // a mistake in the layout; a test builds every machine
	}
	b.ranges = slices.Insert(b.ranges, i, r)
}

func (b *bus) find(addr uint64) *busRange {
	for i := range b.ranges {
		if r := &b.ranges[i]; addr >= r.start && addr < r.end {
			return r
		}
	}
	return nil
}

// read fills p; where no device answers a PC reads all ones.
func (b *bus) read(addr uint64, p []byte) {
	if r := b.find(addr); r != nil {
		r.handler.Read(addr-r.start, p)
		return
	}
	for i := range p {
		p[i] = 0xff
	}
}

// write passes p on; where no device listens it is lost.
func (b *bus) write(addr uint64, p []byte) {
	if r := b.find(addr); r != nil {
		r.handler.Write(addr-r.start, p)
	}
}
