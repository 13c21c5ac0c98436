package scsi

import "encoding/binary"

// Guard keeps a guest from doing to a logical unit what its owner has not
// allowed. Both policies look at the CDB alone, which is a copy: parameter
// data lies in guest memory and may change after any look at it.
//
// Commands are judged as a direct-access block device understands them (SBC-4
// and SPC-5); on another device type some opcodes mean something else.
//
// A command that ReadOnly refuses gets 7/27/00 (WRITE PROTECTED). Where
// AllowUnsafe is missing the answer is 5/20/02 (ACCESS DENIED - NO ACCESS
// RIGHTS): never retried, not taken for a read-only medium, and, other than
// INVALID COMMAND OPERATION CODE, it tells the guest's administrator that
// this is somebody's decision and no defect.
type Guard struct {
	LUN

	// ReadOnly refuses whatever is not known to leave medium, mode pages,
	// reservations and power state alone, unknown commands included, and sets
	// WP in what MODE SENSE returns.
	ReadOnly bool

	// AllowUnsafe lets pass what can destroy the device, lock out its other
	// users, or reach logical units that the guest was not given.
	AllowUnsafe bool
}

// AccessDenied is ACCESS DENIED - NO ACCESS RIGHTS, the answer to a command
// that only AllowUnsafe lets pass.
var AccessDenied = Sense{IllegalRequest, 0x20, 0x02}

// Submit passes c on or refuses it.
func (g *Guard) Submit(c *Command) {
	k := ordinary
	if len(c.CDB) > 0 {
		if k = kinds[c.CDB[0]]; k == mixed {
			k = inspect(c.CDB)
		}
	}
	switch {
	case g.ReadOnly && k != harmless && k != modeSense:
		c.Check(WriteProtected)
	case k == unsafe && !g.AllowUnsafe:
		c.Check(AccessDenied)
	case g.ReadOnly && k == modeSense:
		g.submitModeSense(c)
	default:
		g.LUN.Submit(c)
	}
}

// submitModeSense sets WP, bit 7 of the device-specific parameter (SBC-4
// 6.5.1), in the mode parameter header on its way back.
func (g *Guard) submitModeSense(c *Command) {
	done := c.Done
	c.Done = func(c *Command) {
		c.Done = done
		at := 2 // of the header of MODE SENSE(6) (SPC-5 7.5.5)
		if c.CDB[0] == OpModeSense10 {
			at = 3
		}
		if c.Outcome == Completed && c.Status == Good && c.DataLen()-int(c.Residual) > at {
			for _, b := range c.DataIn {
				if at < len(b) {
					b[at] |= 0x80
					break
				}
				at -= len(b)
			}
		}
		done(c)
	}
	g.LUN.Submit(c)
}

// kind is what a command may do.
type kind uint8

const (
	// ordinary changes the logical unit in ways that its users expect, or is
	// of no known effect.
	ordinary kind = iota
	// harmless changes nothing that another user could notice.
	harmless
	// unsafe is what AllowUnsafe is about.
	unsafe
	// modeSense is harmless and reports WP.
	modeSense
	// mixed depends on a field of the CDB: see inspect.
	mixed
)

// Opcodes that only the guard knows by name.
const (
	opFormatWithPreset    = 0x38
	opChangeDefinition    = 0x40
	opExtendedCDB         = 0x7e
	opAccessControlIn     = 0x86
	opAccessControlOut    = 0x87
	opServiceActionOut12  = 0xa9
	opServiceActionOut16  = 0x9f
	opRedundancyGroupOut  = 0xbb
	opSpareOut            = 0xbd
	opVolumeSetOut        = 0xbf
	opCopy                = 0x18
	opCopyAndVerify       = 0x3a
	opReadLong10          = 0x3e
	opReadBuffer16        = 0x9b
	opServiceActionIn12   = 0xab
	opReadDefectData12    = 0xb7
	opReadAttribute       = 0x8c
	opSeek6               = 0x0b
	opRezeroUnit          = 0x01
	opSeek10              = 0x2b
	firstVendorSpecificOp = 0xc0
)

// kinds has the kind of every opcode. What is not named is ordinary: a device
// answers a reserved opcode itself, and a read-only one gets none of them.
// Some choices among the ordinary ones need a reason:
//   - MODE SELECT and LOG SELECT: cluster and multipath software needs the
//     first, both can be undone by the same command.
//   - PERSISTENT RESERVE OUT and RESERVE are what this program is for. They
//     are state that a read-only user has no business to change.
//   - START STOP UNIT can stop a shared disk, and START brings it back.
//   - REASSIGN BLOCKS and WRITE LONG spoil no more than a write does.
//   - WRITE USING TOKEN writes to this logical unit, with data of another
//     only where the guest holds that one's token, which cannot be guessed.
var kinds = func() (k [256]kind) {
	for _, op := range []byte{
		OpTestUnitReady, opRezeroUnit, OpRequestSense, OpRead6, opSeek6, OpInquiry,
		OpReceiveDiagnostic, OpPreventAllowRemoval, OpReadCapacity10, OpRead10, opSeek10,
		OpVerify10, OpPreFetch10, OpSynchronizeCache10, OpReadDefectData10, OpReadBuffer,
		opReadLong10, OpLogSense, OpPersistentReserveIn, OpThirdPartyCopyIn, opAccessControlIn,
		OpRead16, opReadAttribute, OpVerify16, OpPreFetch16, OpSynchronizeCache16, OpZBCIn,
		opReadBuffer16, OpReportLUNs, OpSecurityProtocolIn, OpMaintenanceIn, OpRead12,
		opServiceActionIn12, OpVerify12, opReadDefectData12,
	} {
		k[op] = harmless
	}
	k[OpModeSense6], k[OpModeSense10] = modeSense, modeSense
	for _, op := range []byte{
		// They destroy the data of the whole medium, or take it away for hours.
		OpFormatUnit, opFormatWithPreset, OpSanitize,
		// TCG and ATA security: passwords, locked ranges, instant erasure.
		OpSecurityProtocolOut,
		// Locks out other initiators (until SPC-3).
		opAccessControlOut,
		// Another device type or standard from now on (until SPC-2).
		opChangeDefinition,
		// Array controllers (SCC-2): they delete volumes.
		opRedundancyGroupOut, opSpareOut, opVolumeSetOut,
		// The target copies between any logical units that the host's
		// initiator port can reach, the guest's or not (until SPC-3; see
		// EXTENDED COPY in inspect).
		opCopy, opCopyAndVerify,
		// A wrapper for any other command, which hides its opcode.
		opExtendedCDB,
		// Nothing that a disk needs is behind it.
		opServiceActionOut12,
		// Vendor-specific for disks in every version of SPC's opcode table.
		0x02, 0x06, 0x09, 0x0c, 0x0d, 0x0e, 0x20, 0x21, 0x22, 0x26, 0x27,
	} {
		k[op] = unsafe
	}
	for op := firstVendorSpecificOp; op <= 0xff; op++ {
		k[op] = unsafe
	}
	for _, op := range []byte{
		OpStartStopUnit, OpSendDiagnostic, OpWriteBuffer, OpThirdPartyCopyOut, OpATAPassThrough12,
		OpATAPassThrough16, OpVariableLength, OpServiceActionIn16, opServiceActionOut16, OpMaintenanceOut,
	} {
		k[op] = mixed
	}
	return k
}()

// inspect is the kind of a command that its opcode does not tell. What it
// does not know is unsafe: new service actions have not been kind to disks.
func inspect(cdb []byte) kind {
	var whole [16]byte // a short CDB reads as if zeroes followed
	copy(whole[:], cdb)
	cdb = whole[:]
	action := cdb[1] & 0x1f
	switch cdb[0] {
	case OpStartStopUnit:
		// Starting harms nobody, and a disk must be started to be read. Any
		// other power condition, or LOEJ, is felt by all users.
		if cdb[4]&0xf3 == 0x01 {
			return harmless
		}
		return ordinary

	case OpSendDiagnostic: // SPC-5 6.42
		// DEVOFFL and UNITOFFL let a test affect other logical units and the
		// medium; in the foreground (codes 5 and 6) it blocks everybody.
		code := cdb[1] >> 5
		if cdb[1]&0x03 != 0 || code == 5 || code == 6 {
			return unsafe
		}
		return ordinary

	case OpWriteBuffer: // SPC-5 6.49
		switch action {
		case 0x02, 0x0a: // data; echo buffer
			return ordinary
		}
		return unsafe // firmware in many ways, vendor-specific ones among them

	case OpThirdPartyCopyOut: // SPC-5 6.6
		switch action {
		case 0x10, 0x11, 0x1c: // POPULATE TOKEN, WRITE USING TOKEN, COPY OPERATION ABORT
			return ordinary
		}
		// EXTENDED COPY names source and destination itself, and targets have
		// let it reach the logical units of others (CVE-2020-28374).
		return unsafe

	case OpATAPassThrough12:
		return inspectATA(cdb[1], cdb[3], cdb[9])
	case OpATAPassThrough16:
		return inspectATA(cdb[1], cdb[4], cdb[14])

	case OpVariableLength:
		switch action := binary.BigEndian.Uint16(cdb[8:]); {
		case action == 0x03, action == 0x09, action == 0x0a, action == 0x12:
			return harmless // XDREAD, READ, VERIFY, GET LBA STATUS
		case action < 0x800: // the other block commands
			return ordinary
		}
		return unsafe // ATA PASS-THROUGH(32), object storage, vendor-specific

	case OpServiceActionIn16:
		switch {
		case action >= 0x10 && action <= 0x13, action == 0x16, action == 0x17:
			return harmless // READ CAPACITY(16) to REPORT REFERRALS; two status reports
		case action == 0x14, action == 0x15:
			return ordinary // STREAM CONTROL, BACKGROUND CONTROL
		}
		return unsafe // REMOVE ELEMENT AND TRUNCATE and its kin: capacity is gone

	case opServiceActionOut16:
		switch action {
		case 0x11, 0x12: // WRITE LONG(16), WRITE SCATTERED(16)
			return ordinary
		}
		return unsafe

	case OpMaintenanceOut:
		switch action {
		case 0x06, 0x0a, 0x0b, 0x0e, 0x0f:
			// SET IDENTIFYING INFORMATION, SET TARGET PORT GROUPS, CHANGE
			// ALIASES, SET PRIORITY, SET TIMESTAMP: multipath software needs
			// the second, none is hard to undo.
			return ordinary
		}
		return unsafe // MANAGEMENT PROTOCOL OUT, array configuration, vendor-specific
	}
	return unsafe
}

// inspectATA is the kind of an ATA command in an ATA PASS-THROUGH CDB (SAT-4
// 12.2): its second byte, FEATURES and COMMAND. Only what health monitoring
// reads is known to be harmless; the same door leads to SECURITY ERASE UNIT
// and DOWNLOAD MICROCODE.
func inspectATA(protocol, features, command byte) kind {
	switch protocol >> 1 & 0xf {
	case 3, 4, 6, 15: // non-data, PIO in, DMA, return response information
	default: // resets among them
		return unsafe
	}
	switch command {
	case 0xec, 0xa1, 0xe5, 0x2f, 0x47: // IDENTIFY (PACKET) DEVICE, CHECK POWER MODE, READ LOG (DMA) EXT
		return harmless
	case 0xb0: // SMART
		switch features {
		case 0xd0, 0xd1, 0xd5, 0xda: // READ DATA, READ THRESHOLDS, READ LOG, RETURN STATUS
			return harmless
		}
	}
	return unsafe
}
