package scsi

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// Identity is what a logical unit says about which one it is: the part of its
// identification that is the same whatever port, path or host asks. Two
// identities that are Same name one logical unit.
type Identity struct {
	DeviceType  uint8 // peripheral device type (SPC-5 6.7.2)
	Vendor      string
	Product     string
	Revision    string
	Serial      string       // VPD page 80h; may be empty
	Designators []Designator // VPD page 83h, those of the logical unit, as the device lists them
}

// Designator is one designation descriptor of VPD page 83h.
type Designator struct {
	Type    DesignatorType
	CodeSet uint8 // 1 binary, 2 ASCII, 3 UTF-8
	ID      []byte
}

// DesignatorType is a DESIGNATOR TYPE (SPC-5 7.7.6.1).
type DesignatorType uint8

const (
	DesignatorVendor DesignatorType = 0x0 // vendor specific: unique nowhere
	DesignatorT10    DesignatorType = 0x1 // T10 vendor ID and what that vendor makes unique
	DesignatorEUI64  DesignatorType = 0x2
	DesignatorNAA    DesignatorType = 0x3
	DesignatorName   DesignatorType = 0x8 // SCSI name string
	DesignatorUUID   DesignatorType = 0xa
)

// rank orders designators by what they are worth as a name: the more parties
// would have to err for two logical units to share it, the lower. Zero means
// that it names nothing.
func (d Designator) rank() int {
	if len(d.ID) == 0 { // an identity may come from another host
		return 0
	}
	switch d.Type {
	case DesignatorNAA:
		switch d.ID[0] >> 4 {
		case 2, 5, 6: // IEEE assigned
			return 1
		case 3: // locally assigned: unique only where somebody sees to it
			return 6
		}
	case DesignatorEUI64:
		return 2
	case DesignatorUUID:
		return 3
	case DesignatorName:
		return 4
	case DesignatorT10:
		return 5
	}
	return 0
}

// String is d in the way it is usually written: naa.6001405..., eui.0123...,
// uuid.xxxxxxxx-..., a SCSI name string as it is, t10.VENDOR_and_the_rest.
func (d Designator) String() string {
	h := hex.EncodeToString(d.ID)
	switch d.Type {
	case DesignatorNAA:
		return "naa." + h
	case DesignatorEUI64:
		return "eui." + h
	case DesignatorUUID:
		if len(h) == 36 { // 1xh, reserved, then the UUID (SPC-5 7.7.6.11)
			u := h[4:]
			return "uuid." + u[:8] + "-" + u[8:12] + "-" + u[12:16] + "-" + u[16:20] + "-" + u[20:]
		}
		return "uuid." + h
	case DesignatorName:
		return printable(d.ID)
	case DesignatorT10:
		return "t10." + printable(d.ID)
	}
	return fmt.Sprintf("type%d.%s", d.Type, h)
}

// printable is b on one line and without spaces, for messages and file names'
// beginnings; what is not a graphic ASCII character becomes an underscore.
// Runs of them, with which fixed-width fields are filled, become one.
func printable(b []byte) string {
	var s strings.Builder
	gap := false
	for _, c := range b {
		if c <= ' ' || c >= 0x7f {
			gap = s.Len() > 0
			continue
		}
		if gap {
			s.WriteByte('_')
			gap = false
		}
		s.WriteByte(c)
	}
	return s.String()
}

// Name is the designator that identifies the logical unit best; ok is false
// if it has none that names it.
func (id *Identity) Name() (d Designator, ok bool) {
	for _, e := range id.Designators {
		if r := e.rank(); r != 0 && (!ok || r < d.rank()) {
			d, ok = e, true
		}
	}
	return d, ok
}

// String is the best name there is, else vendor, product and serial number.
func (id *Identity) String() string {
	if d, ok := id.Name(); ok {
		return d.String()
	}
	s := printable([]byte(id.Vendor + " " + id.Product))
	if id.Serial != "" {
		s += " serial " + printable([]byte(id.Serial))
	}
	return s
}

// Unique reports whether Same can hold for id at all.
func (id *Identity) Unique() bool {
	_, ok := id.Name()
	return ok || id.Serial != ""
}

// Same reports whether id and other name one logical unit. The best kind of
// designator that both have decides: a target that gains or loses a lesser
// one with a firmware update stays the same. Without a kind in common,
// vendor, product and serial number must agree; nothing known is not the same
// as nothing known.
func (id *Identity) Same(other *Identity) bool {
	for rank := 1; rank <= 6; rank++ {
		a, b := id.ranked(rank), other.ranked(rank)
		if len(a) == 0 || len(b) == 0 {
			continue
		}
		return slices.ContainsFunc(a, func(d Designator) bool {
			return slices.ContainsFunc(b, func(e Designator) bool { return bytes.Equal(d.ID, e.ID) })
		})
	}
	return id.Serial != "" && id.Serial == other.Serial && id.Vendor == other.Vendor && id.Product == other.Product
}

func (id *Identity) ranked(rank int) []Designator {
	var ds []Designator
	for _, d := range id.Designators {
		if d.rank() == rank {
			ds = append(ds, d)
		}
	}
	return ds
}

// VPD pages (SPC-5 7.7).
const (
	vpdSupported  = 0x00
	vpdUnitSerial = 0x80
	vpdDeviceID   = 0x83
)

// ReadIdentity asks lun who it is. It sends INQUIRY only, which every
// reservation lets pass and which reports no unit attention, so nothing that
// the guest should see is lost.
func ReadIdentity(ctx context.Context, lun LUN) (*Identity, error) {
	std, err := inquire(ctx, lun, -1)
	if err != nil {
		return nil, err
	}
	id := new(Identity)
	if err := id.parseStandard(std); err != nil {
		return nil, err
	}
	pages, err := inquire(ctx, lun, vpdSupported)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return id, nil // no vital product data: SPC-2 and older, cheap USB bridges
	}
	// Only what is listed is asked for: some devices hang on other pages.
	for _, page := range pages[4:] {
		switch page {
		case vpdUnitSerial:
			p, err := inquire(ctx, lun, vpdUnitSerial)
			if err != nil {
				return nil, err
			}
			id.Serial = trim(p[4:])
		case vpdDeviceID:
			p, err := inquire(ctx, lun, vpdDeviceID)
			if err != nil {
				return nil, err
			}
			if id.Designators, err = ParseDesignators(p); err != nil {
				return nil, err
			}
		}
	}
	return id, nil
}

// inquire reads standard INQUIRY data (page -1) or a VPD page, and answers as
// many bytes as the device says there are: a page's four header bytes at
// least.
func inquire(ctx context.Context, lun LUN, page int) ([]byte, error) {
	// SPC-2 and older have one byte of allocation length; longer pages are
	// asked for again.
	size := 252
	for {
		cdb := []byte{OpInquiry, 0, 0, byte(size >> 8), byte(size), 0}
		if page >= 0 {
			cdb[1], cdb[2] = 1, byte(page)
		}
		buf := make([]byte, size)
		c := &Command{CDB: cdb, DataIn: [][]byte{buf}}
		// A target that reports unit attentions here breaks the rules; it is
		// asked again.
		for try := 0; ; try++ {
			if err := Exec(ctx, lun, c); err != nil {
				return nil, err
			}
			err := c.Err()
			if err == nil {
				break
			}
			if s, ok := c.sense(); !ok || s.Key != UnitAttention || try == maxRepeats {
				return nil, err
			}
		}
		if c.Residual > uint32(size) {
			return nil, fmt.Errorf("%s: residual of %d bytes for %d", OpName(cdb), c.Residual, size)
		}
		buf = buf[:size-int(c.Residual)]
		if page < 0 {
			return buf, nil
		}
		if len(buf) < 4 || buf[1] != byte(page) {
			return nil, fmt.Errorf("%s: the answer is no such page: % x", OpName(cdb), buf[:min(len(buf), 8)])
		}
		if n := 4 + int(buf[2])<<8 + int(buf[3]); n <= len(buf) {
			return buf[:n], nil
		} else if size < n {
			size = min(n, 0xffff)
			if size < n {
				return nil, fmt.Errorf("%s: %d bytes are more than INQUIRY can carry", OpName(cdb), n)
			}
			continue
		}
		return nil, fmt.Errorf("%s: %d bytes of the page are missing", OpName(cdb), 4+int(buf[2])<<8+int(buf[3])-len(buf))
	}
}

// parseStandard reads standard INQUIRY data (SPC-5 6.7.2).
func (id *Identity) parseStandard(p []byte) error {
	if len(p) < 36 {
		return fmt.Errorf("INQUIRY: %d bytes of standard data; want 36", len(p))
	}
	if q := p[0] >> 5; q != 0 {
		return fmt.Errorf("INQUIRY: no logical unit here (peripheral qualifier %d)", q)
	}
	id.DeviceType = p[0] & 0x1f
	id.Vendor, id.Product, id.Revision = trim(p[8:16]), trim(p[16:32]), trim(p[32:36])
	return nil
}

// trim is a fixed-width ASCII field without its padding.
func trim(b []byte) string { return strings.Trim(string(b), " \x00") }

// ParseDesignators reads VPD page 83h, header included, and answers the
// designators that are associated with the logical unit; those of the target
// port or device differ from path to path.
func ParseDesignators(page []byte) ([]Designator, error) {
	if len(page) < 4 || page[1] != vpdDeviceID {
		return nil, fmt.Errorf("VPD page 83h: bad header % x", page[:min(len(page), 4)])
	}
	rest := page[4:]
	if n := int(page[2])<<8 + int(page[3]); n > len(rest) {
		return nil, fmt.Errorf("VPD page 83h: %d bytes; its header says %d", len(rest), n)
	} else {
		rest = rest[:n]
	}
	var ds []Designator
	for len(rest) > 0 {
		// SPC-5 7.7.6.1: byte 0 protocol and code set, 1 association (bits
		// 5-4) and type, 3 length.
		if len(rest) < 4 || 4+int(rest[3]) > len(rest) {
			return nil, fmt.Errorf("VPD page 83h: designator at byte %d runs beyond the page of %d bytes", len(page)-len(rest), len(page))
		}
		id := rest[4 : 4+int(rest[3])]
		const logicalUnit = 0
		if rest[1]>>4&3 == logicalUnit && len(id) > 0 {
			d := Designator{Type: DesignatorType(rest[1] & 0xf), CodeSet: rest[0] & 0xf, ID: bytes.Clone(id)}
			if d.Type == DesignatorName {
				// Padded with NULs to a multiple of four bytes (7.7.6.9).
				d.ID = bytes.TrimRight(d.ID, "\x00")
			}
			if len(d.ID) > 0 {
				ds = append(ds, d)
			}
		}
		rest = rest[4+int(rest[3]):]
	}
	return ds, nil
}
