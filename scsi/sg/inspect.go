package sg

import (
	"encoding/binary"

	"vmm/scsi"
)

// inspect looks at the answer to the few commands that tell the guest about
// limits which are not the device's alone, or us about the device.
func (l *LUN) inspect(c *scsi.Command) {
	if c.Outcome != scsi.Completed || c.Status != scsi.Good {
		return
	}
	switch cdb := c.CDB; cdb[0] {
	case scsi.OpInquiry:
		if cdb[1]&1 != 0 && cdb[2] == vpdBlockLimits {
			l.clampBlockLimits(c)
		}
	case scsi.OpReadCapacity10:
		var b [8]byte // last LBA, block length (SBC-4 5.20)
		if peek(c, b[:]) == len(b) {
			l.learnBlockSize(binary.BigEndian.Uint32(b[4:]))
		}
	case scsi.OpServiceActionIn16:
		var b [12]byte // last LBA, block length (SBC-4 5.21)
		if cdb[1]&0x1f == scsi.SAReadCapacity16 && peek(c, b[:]) == len(b) {
			l.learnBlockSize(binary.BigEndian.Uint32(b[8:]))
		}
	}
}

// vpdBlockLimits is the VPD page that says what one command may carry.
const vpdBlockLimits = 0xb0

// unknownBlockSize stands in for a block size that nobody could read, as when
// another host has the LUN reserved: with the largest in use the limit in
// blocks comes out too low, and never too high.
const unknownBlockSize = 4096

// learnBlockSize takes a device's word for its block size, if it makes sense.
func (l *LUN) learnBlockSize(n uint32) {
	if n >= 512 && n <= 1<<20 && n&(n-1) == 0 {
		l.blockSize.Store(n)
	}
}

// clampBlockLimits lowers MAXIMUM TRANSFER LENGTH (bytes 8-11, blocks) and
// OPTIMAL TRANSFER LENGTH (bytes 12-15) of a Block Limits page to what one
// SG_IO on this host carries (SBC-4 6.6.4). A zero says "no limit" in the
// first, which is no longer true, and "not reported" in the second. A field
// that the guest's allocation length cuts off is left as it is: nobody can
// read it. Lengths and residual stay the device's.
func (l *LUN) clampBlockLimits(c *scsi.Command) {
	var page [16]byte
	n := peek(c, page[:])
	if n < 12 || page[1] != vpdBlockLimits {
		return
	}
	most := max(l.limits.MaxTransfer/l.blockSize.Load(), 1)
	if v := binary.BigEndian.Uint32(page[8:]); v == 0 || v > most {
		poke(c, 8, most)
	}
	if n == len(page) && binary.BigEndian.Uint32(page[12:]) > most {
		poke(c, 12, most)
	}
}

// peek copies the beginning of the data that c received into p, and returns
// how much there was.
func peek(c *scsi.Command, p []byte) int {
	got := c.DataLen() - int(c.Residual)
	n := 0
	for _, b := range c.DataIn {
		n += copy(p[n:min(len(p), max(got, n))], b)
	}
	return n
}

// poke writes v at byte off of the data that c received.
func poke(c *scsi.Command, off int, v uint32) {
	var p [4]byte
	binary.BigEndian.PutUint32(p[:], v)
	rest := p[:]
	for _, b := range c.DataIn {
		if off >= len(b) {
			off -= len(b)
			continue
		}
		rest = rest[copy(b[off:], rest):]
		off = 0
	}
}
