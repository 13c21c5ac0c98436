package disk

import (
	"encoding/binary"
	"math/bits"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// Sense that only the disk answers with (SPC-5, table of additional sense
// codes).
var (
	notStarted       = scsi.Sense{Key: scsi.NotReady, ASC: 0x04, ASCQ: 0x02}       // LOGICAL UNIT NOT READY, INITIALIZING COMMAND REQUIRED
	writeError       = scsi.Sense{Key: scsi.MediumError, ASC: 0x0c, ASCQ: 0x00}    // WRITE ERROR
	readError        = scsi.Sense{Key: scsi.MediumError, ASC: 0x11, ASCQ: 0x00}    // UNRECOVERED READ ERROR
	noSpace          = scsi.Sense{Key: scsi.DataProtect, ASC: 0x27, ASCQ: 0x07}    // SPACE ALLOCATION FAILED WRITE PROTECT
	miscompare       = scsi.Sense{Key: scsi.Miscompare, ASC: 0x1d, ASCQ: 0x00}     // MISCOMPARE DURING VERIFY OPERATION
	noSavedPages     = scsi.Sense{Key: scsi.IllegalRequest, ASC: 0x39, ASCQ: 0x00} // SAVING PARAMETERS NOT SUPPORTED
	invalidFieldInIU = scsi.Sense{Key: scsi.IllegalRequest, ASC: 0x0e, ASCQ: 0x03} // INVALID FIELD IN COMMAND INFORMATION UNIT
	invalidMessage   = scsi.Sense{Key: scsi.IllegalRequest, ASC: 0x49, ASCQ: 0x00} // INVALID MESSAGE ERROR
)

// What one command may ask for, in bytes. VPD page B0h reports the same in
// logical blocks.
const (
	maxTransfer  = 4 << 20      // READ, WRITE, VERIFY
	maxCompare   = scratchLen   // COMPARE AND WRITE: the half that is compared; at most 255 blocks
	maxWriteSame = 64 << 20     // a pattern has to be written out, which takes time
	maxUnmap     = 1 << 30      // all descriptors of an UNMAP together
	maxUnmapDesc = 256          // descriptors of an UNMAP
	maxQuick     = 64 << 10     // READ without a worker: some microseconds of copying
	granule      = uint32(4096) // bytes of a physical block: a page, and a block of any usual file system
)

// command is a row of the table.
type command struct {
	// cdb is the CDB usage data (SPC-5 6.36.3): its length is the CDB's, byte
	// 0 is the operation code, byte 1 holds the service action if there is
	// one, and of all other bits those are set that the disk evaluates. A
	// command with any other bit set is refused.
	cdb   []byte
	flags flags
	run   func(*LUN, *worker, *scsi.Command, extent) result
}

type flags uint16

const (
	serviceAction flags = 1 << iota // byte 1, bits 4 to 0, tells commands apart
	immediate                       // does not wait, other than for the reservations, and needs no worker
	evenAttention                   // is done although a unit attention is pending, and leaves it so (SAM-5 5.14)
	medium                          // needs the disk started
	blocks                          // names a logical block and a number of blocks, where all of its kind do
	transfers                       // that number is limited to maxTransfer
	changes                         // the medium: refused by a read-only disk
	thinOnly                        // exists only where blocks can be deallocated
	quick                           // if short, is first tried without a worker
	unmapBit                        // byte 1 bit 3 is UNMAP, which exists only there

	alone    // needs that nobody else's command runs meanwhile
	reserves // is a matter of the reservations, and exists only where there are some
)

// extent is a range of logical blocks inside the capacity.
type extent struct {
	lba uint64
	n   uint32
}

// The table. READ and its kind share a layout per CDB length; see decode.
var commands = []command{
	{cdb: []byte{scsi.OpTestUnitReady, 0, 0, 0, 0, 0},
		flags: immediate | medium, run: (*LUN).testUnitReady},
	{cdb: []byte{scsi.OpRequestSense, 0x01, 0, 0, 0xff, 0},
		flags: immediate | evenAttention, run: (*LUN).requestSense},
	{cdb: []byte{scsi.OpRead6, 0x1f, 0xff, 0xff, 0xff, 0},
		flags: quick | medium | blocks | transfers, run: (*LUN).read},
	{cdb: []byte{scsi.OpWrite6, 0x1f, 0xff, 0xff, 0xff, 0},
		flags: medium | blocks | transfers | changes, run: (*LUN).write},
	{cdb: []byte{scsi.OpInquiry, 0x01, 0xff, 0xff, 0xff, 0},
		flags: immediate | evenAttention, run: (*LUN).inquiry},
	{cdb: []byte{scsi.OpModeSelect6, 0x10, 0, 0, 0xff, 0},
		run: (*LUN).modeSelect},
	{cdb: []byte{scsi.OpModeSense6, 0x08, 0xff, 0xff, 0xff, 0},
		flags: immediate, run: (*LUN).modeSense},
	{cdb: []byte{scsi.OpStartStopUnit, 0x01, 0, 0, 0x05, 0},
		run: (*LUN).startStop},
	{cdb: []byte{scsi.OpReserve6, 0, 0, 0, 0, 0},
		flags: reserves, run: (*LUN).reserveUnit},
	{cdb: []byte{scsi.OpRelease6, 0, 0, 0, 0, 0},
		flags: reserves, run: (*LUN).reserveUnit},
	{cdb: []byte{scsi.OpSendDiagnostic, 0x04, 0, 0, 0, 0},
		flags: immediate, run: (*LUN).nothing}, // the default self-test: nothing can be broken
	{cdb: []byte{scsi.OpPreventAllowRemoval, 0, 0, 0, 0x03, 0},
		flags: immediate, run: (*LUN).nothing}, // the medium cannot be removed
	{cdb: []byte{scsi.OpReadCapacity10, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		flags: immediate, run: (*LUN).readCapacity10},
	{cdb: []byte{scsi.OpRead10, 0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0},
		flags: quick | medium | blocks | transfers, run: (*LUN).read},
	{cdb: []byte{scsi.OpWrite10, 0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0},
		flags: medium | blocks | transfers | changes, run: (*LUN).write},
	{cdb: []byte{scsi.OpVerify10, 0x12, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0},
		flags: medium | blocks | transfers, run: (*LUN).verify},
	{cdb: []byte{scsi.OpSynchronizeCache10, 0x02, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0},
		flags: medium | blocks, run: (*LUN).synchronizeCache},
	{cdb: []byte{scsi.OpWriteSame10, 0x08, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0},
		flags: medium | blocks | changes | unmapBit, run: (*LUN).writeSame},
	{cdb: []byte{scsi.OpUnmap, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0},
		flags: medium | changes | thinOnly, run: (*LUN).unmap},
	{cdb: []byte{scsi.OpModeSelect10, 0x10, 0, 0, 0, 0, 0, 0xff, 0xff, 0},
		run: (*LUN).modeSelect},
	{cdb: []byte{scsi.OpReserve10, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		flags: reserves, run: (*LUN).reserveUnit},
	{cdb: []byte{scsi.OpRelease10, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		flags: reserves, run: (*LUN).reserveUnit},
	{cdb: []byte{scsi.OpModeSense10, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0},
		flags: immediate, run: (*LUN).modeSense},
	{cdb: []byte{scsi.OpPersistentReserveIn, byte(pr.ReadKeys), 0, 0, 0, 0, 0, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentIn},
	{cdb: []byte{scsi.OpPersistentReserveIn, byte(pr.ReadReservation), 0, 0, 0, 0, 0, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentIn},
	{cdb: []byte{scsi.OpPersistentReserveIn, byte(pr.ReportCapabilities), 0, 0, 0, 0, 0, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentIn},
	{cdb: []byte{scsi.OpPersistentReserveIn, byte(pr.ReadFullStatus), 0, 0, 0, 0, 0, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentIn},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.Register), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.Reserve), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.Release), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.Clear), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.Preempt), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.PreemptAndAbort), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.RegisterAndIgnoreExistingKey), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpPersistentReserveOut, byte(pr.RegisterAndMove), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0},
		flags: reserves | serviceAction, run: (*LUN).persistentOut},
	{cdb: []byte{scsi.OpRead16, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: quick | medium | blocks | transfers, run: (*LUN).read},
	{cdb: []byte{scsi.OpCompareAndWrite, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, 0, 0},
		flags: medium | blocks | changes | alone, run: (*LUN).compareAndWrite},
	{cdb: []byte{scsi.OpWrite16, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: medium | blocks | transfers | changes, run: (*LUN).write},
	{cdb: []byte{scsi.OpVerify16, 0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: medium | blocks | transfers, run: (*LUN).verify},
	{cdb: []byte{scsi.OpSynchronizeCache16, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: medium | blocks, run: (*LUN).synchronizeCache},
	{cdb: []byte{scsi.OpWriteSame16, 0x09, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: medium | blocks | changes | unmapBit, run: (*LUN).writeSame},
	{cdb: []byte{scsi.OpServiceActionIn16, scsi.SAReadCapacity16, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: immediate | serviceAction, run: (*LUN).readCapacity16},
	{cdb: []byte{scsi.OpServiceActionIn16, scsi.SAGetLBAStatus, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: serviceAction | medium, run: (*LUN).getLBAStatus},
	{cdb: []byte{scsi.OpReportLUNs, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: immediate | evenAttention, run: (*LUN).reportLUNs},
	{cdb: []byte{scsi.OpMaintenanceIn, scsi.SAReportSupportedOpcodes, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: immediate | serviceAction, run: (*LUN).reportOpcodes},
	{cdb: []byte{scsi.OpMaintenanceIn, scsi.SAReportSupportedTMFs, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: immediate | serviceAction, run: (*LUN).reportTMFs},
	{cdb: []byte{scsi.OpRead12, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: quick | medium | blocks | transfers, run: (*LUN).read},
	{cdb: []byte{scsi.OpWrite12, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0},
		flags: medium | blocks | transfers | changes, run: (*LUN).write},
}

// byOpcode leads from an operation code to its rows of the table, which are
// neighbours there. init fills it, because functions of the table read it.
var byOpcode [256][]command

func init() {
	for i := 0; i < len(commands); {
		op, end := commands[i].cdb[0], i
		for end < len(commands) && commands[end].cdb[0] == op {
			end++
		}
		byOpcode[op] = commands[i:end]
		i = end
	}
}

// rows is the rows of the table for op that are for this disk: all that there
// are, or none.
func (l *LUN) rows(op byte) []command {
	rows := byOpcode[op]
	if len(rows) > 0 && (rows[0].flags&thinOnly != 0 && !l.thin || rows[0].flags&reserves != 0 && l.reservations == nil) {
		return nil
	}
	return rows
}

// lookup finds the row of cdb; nil if the disk has no such command.
func (l *LUN) lookup(cdb []byte) *command {
	rows := l.rows(cdb[0])
	for i := range rows {
		cmd := &rows[i]
		if cmd.flags&serviceAction == 0 || len(cdb) > 1 && cdb[1]&0x1f == cmd.cdb[1]&0x1f {
			return cmd
		}
	}
	return nil
}

// usage is byte i of cmd's CDB usage data on this disk.
func (l *LUN) usage(cmd *command, i int) byte {
	b := cmd.cdb[i]
	if i == 1 && cmd.flags&unmapBit != 0 && !l.thin {
		b &^= unmapField
	}
	return b
}

// execute carries out c and calls Done.
func (l *LUN) execute(w *worker, c *scsi.Command) {
	l.answer(c, l.perform(w, c))
}

// perform finds out whether c may run, in the order that SAM-5 5.3.3 gives to
// the answers, and runs it. Without a worker it does not wait: see
// result.again.
func (l *LUN) perform(w *worker, c *scsi.Command) result {
	if c.Attr > scsi.HeadOfQueue { // there is no auto contingent allegiance (NORMACA is 0)
		return check(invalidMessage)
	}
	if len(c.CDB) == 0 {
		return check(scsi.InvalidOpcode)
	}
	cmd := l.lookup(c.CDB)
	if cmd == nil || cmd.flags&evenAttention == 0 {
		if sense, ok := l.takeAttention(); ok {
			return check(sense)
		}
		switch {
		case l.reservations == nil:
		case cmd == nil || cmd.flags&reserves != 0: // conflicts with nothing, or does its own asking
			sense, r := l.reservedAttention(w)
			if !r.good() || r.again {
				return r
			}
			if sense != (scsi.Sense{}) {
				return check(sense)
			}
		default:
			pass, r := l.enter(w, c.CDB, cmd.flags&alone != 0)
			if !r.good() || r.again {
				return r
			}
			defer l.reservations.Exit(pass)
		}
	}
	if cmd == nil {
		if l.hasServiceActions(c.CDB[0]) {
			return invalidCDB(1, 4)
		}
		return check(scsi.InvalidOpcode)
	}
	if len(c.CDB) < len(cmd.cdb) {
		return check(scsi.InvalidFieldInCDB)
	}
	for i, b := range c.CDB[1:len(cmd.cdb)] {
		if extra := b &^ l.usage(cmd, i+1); extra != 0 {
			return invalidCDB(i+1, bits.Len8(extra)-1)
		}
	}
	if cmd.flags&medium != 0 && l.stopped.Load() {
		return check(notStarted)
	}
	if cmd.flags&changes != 0 && l.readOnly {
		return check(scsi.WriteProtected)
	}
	var e extent
	if cmd.flags&blocks != 0 {
		e = decode(c.CDB)
		if !l.contains(e) {
			return outOfRange(e.lba)
		}
		if cmd.flags&transfers != 0 && e.n > maxTransfer>>l.blockShift {
			return invalidCDB(countField(c.CDB), 7)
		}
	}
	return cmd.run(l, w, c, e)
}

func (l *LUN) hasServiceActions(op byte) bool {
	rows := l.rows(op)
	return len(rows) > 0 && rows[0].flags&serviceAction != 0
}

// contains says whether e is inside the capacity. Even an empty extent must
// begin there.
func (l *LUN) contains(e extent) bool {
	capacity := l.blocks.Load()
	// Subtraction only: lba+n may wrap around.
	return e.lba < capacity && uint64(e.n) <= capacity-e.lba
}

// decode takes logical block address and number of blocks from where READ,
// WRITE and their kind have them (SBC-4 5). COMPARE AND WRITE is no exception:
// of the four bytes it has only the last, and the others are zero.
func decode(cdb []byte) extent {
	switch cdb[0] >> 5 {
	case 0: // 6 bytes
		e := extent{uint64(binary.BigEndian.Uint32(cdb) & 0x1fffff), uint32(cdb[4])}
		if e.n == 0 {
			e.n = 256
		}
		return e
	case 1, 2: // 10 bytes
		return extent{uint64(binary.BigEndian.Uint32(cdb[2:])), uint32(binary.BigEndian.Uint16(cdb[7:]))}
	case 5: // 12 bytes
		return extent{uint64(binary.BigEndian.Uint32(cdb[2:])), binary.BigEndian.Uint32(cdb[6:])}
	}
	return extent{binary.BigEndian.Uint64(cdb[2:]), binary.BigEndian.Uint32(cdb[10:])}
}

// countField is the first byte of the number of blocks in cdb.
func countField(cdb []byte) int {
	switch cdb[0] >> 5 {
	case 0:
		return 4
	case 1, 2:
		return 7
	case 5:
		return 6
	}
	return 10
}

// result is how a command ended. Commands return it, so that Done is called in
// one place, once.
type result struct {
	moved    int // bytes moved to or from the command's buffers
	sense    scsi.Sense
	info     uint64 // the INFORMATION field of the sense data
	hasInfo  bool
	specific [3]byte // the sense-key specific field
	conflict bool    // RESERVATION CONFLICT
	again    bool    // a try without waiting came to nothing: nothing was done
}

func check(s scsi.Sense) result { return result{sense: s} }

// checkAt answers with s and an INFORMATION field.
func checkAt(s scsi.Sense, info uint64) result {
	return result{sense: s, info: info, hasInfo: true}
}

func outOfRange(lba uint64) result { return checkAt(scsi.LBAOutOfRange, lba) }

// invalidCDB refuses a field of the CDB, pointing at its first byte and most
// significant bit (SPC-5 4.4.2.4.2).
func invalidCDB(field, bit int) result {
	return result{sense: scsi.InvalidFieldInCDB, specific: [3]byte{0xc8 | byte(bit), 0, byte(field)}}
}

// invalidList refuses a field of the parameter list.
func invalidList(field int) result {
	return result{sense: scsi.InvalidFieldInList, specific: [3]byte{0x80, byte(field >> 8), byte(field)}}
}

func (r *result) good() bool { return r.sense.Key == scsi.NoSense && !r.conflict }

// answer completes c with r and calls Done.
func (l *LUN) answer(c *scsi.Command, r result) {
	switch {
	case r.conflict:
		c.Conflict()
		return
	case r.sense.Key == scsi.NoSense:
		c.Finish(r.moved)
		return
	}
	c.Outcome, c.Status = scsi.Completed, scsi.CheckCondition
	c.Residual = uint32(c.DataLen() - r.moved)
	c.SenseLen = r.putSense(c.Sense[:])
	c.Done(c)
}

// putSense encodes r's sense as current fixed-format sense data (SPC-5 4.4.3)
// and returns its length.
func (r *result) putSense(b []byte) int {
	b = b[:scsi.FixedSenseLen]
	clear(b)
	b[0] = 0x70
	// An address beyond 32 bits does not fit, and is then not valid.
	if r.hasInfo && r.info <= 0xffffffff {
		b[0] |= 0x80
		binary.BigEndian.PutUint32(b[3:], uint32(r.info))
	}
	b[2] = byte(r.sense.Key)
	b[7] = scsi.FixedSenseLen - 8
	b[12], b[13] = r.sense.ASC, r.sense.ASCQ
	copy(b[15:], r.specific[:])
	return len(b)
}

// reply sends as much of data as the allocation length and the buffers admit
// (SPC-5 4.2.5.6).
func reply(c *scsi.Command, data []byte, allocation uint32) result {
	if uint64(allocation) < uint64(len(data)) {
		data = data[:allocation]
	}
	return result{moved: c.Scatter(data)}
}

// reportOpcodes is REPORT SUPPORTED OPERATION CODES (SPC-5 6.36).
func (l *LUN) reportOpcodes(_ *worker, c *scsi.Command, _ extent) result {
	const timeoutsLen = 12
	cdb := c.CDB
	timeouts := cdb[2]&0x80 != 0
	op, action := cdb[3], binary.BigEndian.Uint16(cdb[4:])
	allocation := binary.BigEndian.Uint32(cdb[6:])

	var buf [2048]byte
	if cdb[2]&0x07 == 0 { // every command
		list := buf[4:4]
		for op := range byOpcode {
			for _, cmd := range l.rows(byte(op)) {
				var d [8 + timeoutsLen]byte
				d[0] = cmd.cdb[0]
				if cmd.flags&serviceAction != 0 {
					d[3] = cmd.cdb[1] & 0x1f
					d[5] = 0x01 // SERVACTV
				}
				d[7] = byte(len(cmd.cdb))
				if !timeouts {
					list = append(list, d[:8]...)
					continue
				}
				d[5] |= 0x02 // CTDP
				d[9] = timeoutsLen - 2
				list = append(list, d[:]...) // no time is indicated: all zero
			}
		}
		binary.BigEndian.PutUint32(buf[:], uint32(len(list)))
		return reply(c, buf[:4+len(list)], allocation)
	}

	hasActions := l.hasServiceActions(op)
	switch cdb[2] & 0x07 {
	case 1:
		if hasActions {
			return invalidCDB(2, 2)
		}
		action = 0
	case 2:
		if l.rows(op) != nil && !hasActions {
			return invalidCDB(2, 2)
		}
	case 3: // a command without service actions is asked for as service action 0
	default:
		return invalidCDB(2, 2)
	}
	var cmd *command
	if action <= 0x1f && (hasActions || action == 0) {
		cmd = l.lookup([]byte{op, byte(action)})
	}
	if cmd == nil {
		buf[1] = 0x01 // SUPPORT: not supported
		return reply(c, buf[:4], allocation)
	}
	buf[1] = 0x03 // SUPPORT: as the standard has it
	buf[3] = byte(len(cmd.cdb))
	n := 4
	for i := range cmd.cdb {
		buf[n] = l.usage(cmd, i)
		n++
	}
	if timeouts {
		buf[1] |= 0x80 // CTDP
		buf[n+1] = timeoutsLen - 2
		n += timeoutsLen
	}
	return reply(c, buf[:n], allocation)
}

// reportTMFs is REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-5 6.37).
func (l *LUN) reportTMFs(_ *worker, c *scsi.Command, _ extent) result {
	buf := [16]byte{0: 0x88} // ABORT TASK, LOGICAL UNIT RESET
	n := 4
	if c.CDB[2]&0x80 != 0 { // REPD: the extended form
		buf[3] = 12 // additional length; no timeout is indicated
		n = len(buf)
	}
	return reply(c, buf[:n], binary.BigEndian.Uint32(c.CDB[6:]))
}
