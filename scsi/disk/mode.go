package disk

import (
	"encoding/binary"

	"vmm/scsi"
)

// modePage is a mode page that MODE SENSE shows: its default values, and which
// of its bits MODE SELECT may change. Both begin with page code and length.
type modePage struct {
	values, changeable []byte
}

const (
	pageCaching = 0x08
	wceByte     = 2
	wceBit      = 0x04
)

// The mode pages, by page code.
var modePages = [...]modePage{
	{ // caching (SBC-4 6.5.6)
		values:     []byte{pageCaching, 18, wceBit, 19: 0},
		changeable: []byte{pageCaching, 18, wceBit, 19: 0},
	},
	{ // control (SPC-5 7.5.10)
		values: []byte{0x0a, 10,
			0x02, // GLTSD: there are no log parameters to save
			0x10, // QUEUE ALGORITHM MODIFIER: SIMPLE commands in any order
			8:    0xff, 0xff, // BUSY TIMEOUT PERIOD: unlimited
			11: 0},
		changeable: []byte{0x0a, 10, 11: 0},
	},
}

// put writes the page's current values to b and returns their length.
func (p *modePage) put(l *LUN, b []byte) int {
	n := copy(b, p.values)
	if p.values[0] == pageCaching && !l.wce.Load() {
		b[wceByte] &^= wceBit
	}
	return n
}

// modeHeader takes apart what MODE SENSE and MODE SELECT (6) and (10) have in
// different places: the lengths of the CDB's and the header's fields.
func modeHeader(cdb []byte) (length uint32, header int) {
	if cdb[0] == scsi.OpModeSense6 || cdb[0] == scsi.OpModeSelect6 {
		return uint32(cdb[4]), 4
	}
	return uint32(binary.BigEndian.Uint16(cdb[7:])), 8
}

// modeSense is MODE SENSE (6) and (10) (SPC-5 6.14).
func (l *LUN) modeSense(_ *worker, c *scsi.Command, _ extent) result {
	const (
		pageControl = 0xc0
		saved       = 0xc0
		changeable  = 0x40
		defaults    = 0x80
		allPages    = 0x3f
	)
	allocation, header := modeHeader(c.CDB)
	control, code, subpage := c.CDB[2]&pageControl, c.CDB[2]&^pageControl, c.CDB[3]
	if subpage != 0 && subpage != 0xff { // no page here has subpages; FFh asks for all there are
		return invalidCDB(3, 7)
	}
	if control == saved {
		return check(noSavedPages)
	}

	var b [128]byte
	n := header
	if c.CDB[1]&0x08 == 0 { // DBD, disable block descriptors
		long := c.CDB[1]&0x10 != 0 // LLBAA, which (6) does not have
		n += l.putBlockDescriptor(b[n:], long)
		b[header-1] = byte(n - header) // the least significant byte of the block descriptor length
		if long {
			b[4] = 0x01 // LONGLBA
		}
	}
	before := n
	for i := range modePages {
		p := &modePages[i]
		if code != p.values[0] && code != allPages {
			continue
		}
		switch control {
		case changeable:
			n += copy(b[n:], p.changeable)
		case defaults:
			n += copy(b[n:], p.values)
		default:
			n += p.put(l, b[n:])
		}
	}
	if n == before {
		return invalidCDB(2, 5)
	}
	specific := byte(0x10) // DPOFUA
	if l.readOnly {
		specific |= 0x80 // WP
	}
	if header == 4 {
		b[0], b[2] = byte(n-1), specific
	} else {
		binary.BigEndian.PutUint16(b[:], uint16(n-2))
		b[3] = specific
	}
	return reply(c, b[:n], allocation)
}

// putBlockDescriptor writes the mode parameter block descriptor (SBC-4 6.5.2)
// and returns its length.
func (l *LUN) putBlockDescriptor(b []byte, long bool) int {
	if long {
		binary.BigEndian.PutUint64(b, l.blocks.Load())
		binary.BigEndian.PutUint32(b[12:], l.blockSize)
		return 16
	}
	binary.BigEndian.PutUint32(b, uint32(min(l.blocks.Load(), 0xffffffff)))
	binary.BigEndian.PutUint32(b[4:], l.blockSize) // 24 bits behind a reserved byte
	return 8
}

// modeSelect is MODE SELECT (6) and (10) (SPC-5 6.12). The whole list is
// checked before anything changes.
func (l *LUN) modeSelect(w *worker, c *scsi.Command, _ extent) result {
	length, header := modeHeader(c.CDB)
	if c.CDB[1]&0x10 == 0 { // PF: the pages are as SPC has them
		return invalidCDB(1, 4)
	}
	if length == 0 {
		return result{}
	}
	list := w.buffer()[:length] // at most 64 KiB - 1
	if uint32(c.Gather(list)) != length || int(length) < header {
		return check(scsi.ParameterListLength)
	}

	long := header == 8 && list[4]&0x01 != 0 // LONGLBA
	at := header
	field, descriptors := 3, int(list[3]) // the block descriptor length
	if header == 8 {
		field, descriptors = 6, int(binary.BigEndian.Uint16(list[6:]))
	}
	if descriptors != 0 {
		var want [16]byte
		size := l.putBlockDescriptor(want[:], long)
		if descriptors != size {
			return invalidList(field)
		}
		if len(list) < at+size {
			return check(scsi.ParameterListLength)
		}
		if field, ok := sameGeometry(list[at:at+size], want[:size]); !ok {
			return invalidList(at + field)
		}
		at += size
	}

	wce := l.wce.Load()
	for at < len(list) {
		page := list[at:]
		var p *modePage
		for i := range modePages {
			if modePages[i].values[0] == page[0]&0x7f { // bit 7, PS, is reserved here; bit 6, SPF, is not set
				p = &modePages[i]
			}
		}
		switch {
		case p == nil:
			return invalidList(at)
		case len(page) < 2:
			return check(scsi.ParameterListLength)
		case page[1] != p.values[1]:
			return invalidList(at + 1)
		case len(page) < len(p.values):
			return check(scsi.ParameterListLength)
		}
		var current [32]byte
		p.put(l, current[:])
		for i := 2; i < len(p.values); i++ {
			if (page[i]^current[i])&^p.changeable[i] != 0 {
				return invalidList(at + i)
			}
		}
		if p.values[0] == pageCaching {
			wce = page[wceByte]&wceBit != 0
		}
		at += len(p.values)
	}

	if wce == l.wce.Load() {
		return result{moved: len(list)}
	}
	// Nothing may be on its way into the cache while it is turned off.
	l.ranges.lock(w, 0, ^uint64(0), true)
	defer l.ranges.unlock(w)
	l.wce.Store(wce)
	if !wce {
		if err := l.flusher.flushAll(); err != nil {
			return failed(err, writeError)
		}
	}
	return result{moved: len(list)}
}

// sameGeometry says whether the block descriptor got asks for the disk as it
// is, and otherwise which field does not. A number of blocks of zero or of all
// ones also means the present one (SBC-4 6.5.2.2).
func sameGeometry(got, want []byte) (field int, ok bool) {
	half := len(want) / 2
	count, zero, ones := got[:half], true, true
	for _, b := range count {
		zero, ones = zero && b == 0, ones && b == 0xff
	}
	if !zero && !ones && string(count) != string(want[:half]) {
		return 0, false
	}
	return half, string(got[half:]) == string(want[half:])
}
