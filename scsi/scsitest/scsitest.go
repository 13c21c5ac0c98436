// Package scsitest has logical units for tests, fuzzers and benchmarks: one
// that does nothing, one that keeps its blocks in memory, and one whose
// commands come back when the test says so.
package scsitest

import (
	"encoding/binary"
	"sync"

	"vmm/scsi"
)

// Null answers every command with GOOD and all of its data as transferred,
// without touching it, before Submit returns.
type Null struct{}

func (Null) Submit(c *scsi.Command) { c.Finish(c.DataLen()) }
func (Null) Reset() error           { return nil }
func (Null) Limits() scsi.Limits    { return scsi.Limits{MaxTransfer: 1 << 20, MaxSegments: 254} }
func (Null) Close() error           { return nil }

// BlockSize is the length of a Disk's blocks in bytes.
const BlockSize = 512

// Disk is a direct-access block device in memory that knows just enough
// commands to be found, read and written. It answers before Submit returns.
type Disk struct {
	Null
	mu     sync.Mutex
	blocks []byte
}

// NewDisk makes a disk of zeroed blocks.
func NewDisk(blocks int) *Disk { return &Disk{blocks: make([]byte, blocks*BlockSize)} }

// Bytes is a copy of the disk's contents.
func (d *Disk) Bytes() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]byte(nil), d.blocks...)
}

// Submit carries out c.
func (d *Disk) Submit(c *scsi.Command) {
	be := binary.BigEndian
	switch cdb := c.CDB; cdb[0] {
	case scsi.OpTestUnitReady, scsi.OpSynchronizeCache10:
		c.Finish(0)
	case scsi.OpInquiry:
		data := make([]byte, 36)
		data[2], data[3], data[4] = 0x07, 0x02, 31
		copy(data[8:], "vmm     memory disk     0   ")
		reply(c, data, int(be.Uint16(cdb[3:])))
	case scsi.OpModeSense6:
		reply(c, []byte{3, 0, 0, 0}, int(cdb[4]))
	case scsi.OpModeSense10:
		reply(c, []byte{0, 6, 0, 0, 0, 0, 0, 0}, int(be.Uint16(cdb[7:])))
	case scsi.OpReadCapacity10:
		data := make([]byte, 8)
		be.PutUint32(data, uint32(len(d.blocks)/BlockSize-1))
		be.PutUint32(data[4:], BlockSize)
		reply(c, data, len(data))
	case scsi.OpRead10, scsi.OpWrite10:
		d.move(c, uint64(be.Uint32(cdb[2:])), uint64(be.Uint16(cdb[7:])), cdb[0] == scsi.OpWrite10)
	case scsi.OpRead16, scsi.OpWrite16:
		d.move(c, be.Uint64(cdb[2:]), uint64(be.Uint32(cdb[10:])), cdb[0] == scsi.OpWrite16)
	default:
		c.Check(scsi.InvalidOpcode)
	}
}

func (d *Disk) move(c *scsi.Command, lba, n uint64, write bool) {
	have := uint64(len(d.blocks) / BlockSize)
	if lba > have || n > have-lba {
		c.Check(scsi.LBAOutOfRange)
		return
	}
	d.mu.Lock()
	span := d.blocks[lba*BlockSize : (lba+n)*BlockSize]
	var moved int
	if write {
		moved = c.Gather(span)
	} else {
		moved = c.Scatter(span)
	}
	d.mu.Unlock()
	c.Finish(moved)
}

func reply(c *scsi.Command, data []byte, allocation int) {
	c.Finish(c.Scatter(data[:min(len(data), allocation)]))
}

// Held hands each command to the test, which finishes it.
type Held struct {
	// Commands has the commands submitted and not yet received, in order.
	Commands chan *scsi.Command
	// Resets has one send per call of Reset, which returns what the test
	// sends back.
	Resets chan chan<- error
}

// NewHeld makes a logical unit that can hold n commands unreceived; a further
// one is answered Busy.
func NewHeld(n int) *Held {
	return &Held{Commands: make(chan *scsi.Command, n), Resets: make(chan chan<- error)}
}

func (h *Held) Submit(c *scsi.Command) {
	select {
	case h.Commands <- c:
	default:
		c.Fail(scsi.Busy)
	}
}

func (h *Held) Reset() error {
	answer := make(chan error)
	h.Resets <- answer
	return <-answer
}

func (h *Held) Limits() scsi.Limits { return Null{}.Limits() }
func (h *Held) Close() error        { return nil }
