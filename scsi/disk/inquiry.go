package disk

import (
	"encoding/binary"

	"vmm/scsi"
)

// As INQUIRY shows them, padded with spaces.
const (
	vendor   = "VMM     "
	product  = "SOFTWARE DISK   "
	revision = "0001"
)

// Vital product data pages (SPC-5 7.7, SBC-4 6.6).
const (
	pageSupported       = 0x00
	pageSerial          = 0x80
	pageIdentification  = 0x83
	pageExtended        = 0x86
	pageLimits          = 0xb0
	pageCharacteristics = 0xb1
	pageProvisioning    = 0xb2
)

// inquiry is INQUIRY (SPC-5 6.7).
func (l *LUN) inquiry(_ *worker, c *scsi.Command, _ extent) result {
	page, allocation := c.CDB[2], uint32(binary.BigEndian.Uint16(c.CDB[3:]))
	if c.CDB[1]&0x01 != 0 { // EVPD
		return l.vitalProductData(c, page, allocation)
	}
	if page != 0 {
		return invalidCDB(2, 7)
	}
	var b [96]byte
	// Byte 0: a direct access block device, connected. Byte 1: not removable.
	b[2] = 0x07 // SPC-5
	b[3] = 0x12 // HISUP; response data format
	b[4] = byte(len(b) - 5)
	b[7] = 0x02 // CMDQUE
	copy(b[8:], vendor)
	copy(b[16:], product)
	copy(b[32:], revision)
	for i, version := range [...]uint16{0x00a0, 0x05c0, 0x0600} { // SAM-5, SPC-5, SBC-4
		binary.BigEndian.PutUint16(b[58+2*i:], version)
	}
	return reply(c, b[:], allocation)
}

func (l *LUN) vitalProductData(c *scsi.Command, page byte, allocation uint32) result {
	var buf [128]byte
	b := buf[4:] // behind the header
	n := 0
	switch page {
	case pageSupported:
		n = copy(b, []byte{pageSupported, pageSerial, pageIdentification, pageExtended,
			pageLimits, pageCharacteristics, pageProvisioning})
	case pageSerial:
		n = len(l.uuid.putHex(b))
	case pageIdentification:
		// Both designators are of the logical unit: association 0.
		d := b[:12]
		d[0] = 0x01 // binary
		d[1] = 0x03 // NAA
		d[3] = 8
		binary.BigEndian.PutUint64(d[4:], l.uuid.naa())
		d = b[12:]
		d[0] = 0x02 // ASCII
		d[1] = 0x01 // T10 vendor ID
		d[3] = byte(copy(d[4:], vendor) + len(l.uuid.putHex(d[4+len(vendor):])))
		n = 12 + 4 + int(d[3])
	case pageExtended:
		n = 0x3c
		b[5-4] = 0x07 // HEADSUP, ORDSUP, SIMPSUP
		b[6-4] = 0x01 // V_SUP: there is a volatile cache
		b[7-4] = 0x01 // LUICLR: a unit attention of one nexus is that nexus's own
	case pageLimits:
		n = 0x3c
		b[0] = 0x01 // WSNZ: a WRITE SAME of 0 blocks is refused
		b[5-4] = byte(l.maxCompareBlocks())
		binary.BigEndian.PutUint16(b[6-4:], uint16(granule>>l.blockShift)) // optimal transfer length granularity
		binary.BigEndian.PutUint32(b[8-4:], maxTransfer>>l.blockShift)
		if l.thin {
			binary.BigEndian.PutUint32(b[20-4:], maxUnmap>>l.blockShift)
			binary.BigEndian.PutUint32(b[24-4:], maxUnmapDesc)
			binary.BigEndian.PutUint32(b[28-4:], granule>>l.blockShift) // optimal unmap granularity
			binary.BigEndian.PutUint32(b[32-4:], 1<<31)                 // UGAVALID; aligned to block 0
		}
		binary.BigEndian.PutUint64(b[36-4:], maxWriteSame>>l.blockShift)
	case pageCharacteristics:
		n = 0x3c
		b[5-4] = 1    // medium rotation rate: does not rotate
		b[8-4] = 0x02 // FUAB: SYNCHRONIZE CACHE and FUA reach the medium
	case pageProvisioning:
		n = 4
		if l.thin {
			b[5-4] = 0xe4 // LBPU, LBPWS, LBPWS10; LBPRZ: unmapped blocks read as zeros
			b[6-4] = 2    // thin provisioned
		}
	default:
		return invalidCDB(2, 7)
	}
	buf[1] = page
	binary.BigEndian.PutUint16(buf[2:], uint16(n))
	return reply(c, buf[:4+n], allocation)
}

// putHex writes u's 32 hexadecimal digits to b and returns them.
func (u *uuid) putHex(b []byte) []byte {
	const digits = "0123456789abcdef"
	for i, v := range u {
		b[2*i], b[2*i+1] = digits[v>>4], digits[v&0xf]
	}
	return b[:2*len(u)]
}

// maxCompareBlocks is MAXIMUM COMPARE AND WRITE LENGTH, which is one byte.
func (l *LUN) maxCompareBlocks() uint32 { return min(255, uint32(maxCompare)>>l.blockShift) }

// reportLUNs is REPORT LUNS (SPC-5 6.33) as this logical unit, the only one
// it knows of, answers it.
func (l *LUN) reportLUNs(_ *worker, c *scsi.Command, _ extent) result {
	allocation := binary.BigEndian.Uint32(c.CDB[6:])
	if allocation < 16 {
		return invalidCDB(6, 7)
	}
	var b [16]byte
	switch c.CDB[2] { // SELECT REPORT
	case 0x00, 0x02: // addressable logical units; all
		b[3] = 8 // one of them: LUN 0, all zero
		return reply(c, b[:], allocation)
	case 0x01: // well-known logical units
		return reply(c, b[:8], allocation)
	}
	return invalidCDB(2, 7)
}

// readCapacity10 is READ CAPACITY (10) (SBC-4 5.20).
func (l *LUN) readCapacity10(_ *worker, c *scsi.Command, _ extent) result {
	var b [8]byte
	// A last block beyond 32 bits is told as FFFFFFFFh: ask (16).
	binary.BigEndian.PutUint32(b[:], uint32(min(l.blocks.Load()-1, 0xffffffff)))
	binary.BigEndian.PutUint32(b[4:], l.blockSize)
	return reply(c, b[:], uint32(len(b)))
}

// readCapacity16 is READ CAPACITY (16) (SBC-4 5.21).
func (l *LUN) readCapacity16(_ *worker, c *scsi.Command, _ extent) result {
	var b [32]byte
	binary.BigEndian.PutUint64(b[:], l.blocks.Load()-1)
	binary.BigEndian.PutUint32(b[8:], l.blockSize)
	if l.blockSize == 512 {
		b[13] = 3 // logical blocks per physical block: 2^3
	}
	if l.thin {
		b[14] = 0xc0 // LBPME, LBPRZ
	}
	return reply(c, b[:], binary.BigEndian.Uint32(c.CDB[10:]))
}

// testUnitReady is TEST UNIT READY (SPC-5 6.50): that the disk is started has
// been checked.
func (l *LUN) testUnitReady(*worker, *scsi.Command, extent) result { return result{} }

// nothing is a command that has nothing to do here.
func (l *LUN) nothing(*worker, *scsi.Command, extent) result { return result{} }

// requestSense is REQUEST SENSE (SPC-5 6.39): a pending unit attention is told
// as data, and that ends it.
func (l *LUN) requestSense(w *worker, c *scsi.Command, _ extent) result {
	sense, ok := l.takeAttention()
	if !ok {
		var r result
		if sense, r = l.reservedAttention(w); !r.good() || r.again {
			return r
		}
		ok = sense != scsi.Sense{}
	}
	if !ok && l.stopped.Load() {
		sense = notStarted
	}
	allocation := uint32(c.CDB[4])
	if c.CDB[1]&0x01 != 0 { // DESC
		d := [8]byte{0x72, byte(sense.Key), sense.ASC, sense.ASCQ}
		return reply(c, d[:], allocation)
	}
	var b [scsi.FixedSenseLen]byte
	r := check(sense)
	r.putSense(b[:])
	return reply(c, b[:], allocation)
}
