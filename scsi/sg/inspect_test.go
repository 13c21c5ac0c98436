package sg

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// blockLimits is a VPD page B0h with the two lengths.
func blockLimits(maximum, optimal uint32) []byte {
	p := bytes.Repeat([]byte{0xee}, 64)
	copy(p, []byte{0, 0xb0, 0, 60})
	binary.BigEndian.PutUint32(p[8:], maximum)
	binary.BigEndian.PutUint32(p[12:], optimal)
	return p
}

func TestBlockLimitsAreClamped(t *testing.T) {
	inquiry := func(page byte, evpd byte, n int) []byte { return []byte{scsi.OpInquiry, evpd, page, 0, byte(n), 0} }
	const most = 64 // 32 KiB in blocks of 512
	for _, c := range []struct {
		what          string
		cdb           []byte
		device        []byte
		n             int // allocation length
		first         int // size of the first piece of memory
		max, opt      uint32
		wantMax       uint32
		wantOpt       uint32
		status        uint8
		wantUnchanged bool
	}{
		{what: "LIO's", cdb: inquiry(0xb0, 1, 64), n: 64, max: 16384, opt: 16384, wantMax: most, wantOpt: most},
		{what: "no limit, none reported", cdb: inquiry(0xb0, 1, 64), n: 64, wantMax: most},
		{what: "lower already", cdb: inquiry(0xb0, 1, 64), n: 64, max: 63, opt: 8, wantMax: 63, wantOpt: 8},
		{what: "equal", cdb: inquiry(0xb0, 1, 64), n: 64, max: 64, opt: 64, wantMax: 64, wantOpt: 64},
		{what: "largest number", cdb: inquiry(0xb0, 1, 64), n: 64, max: 0xffffffff, opt: 0xffffffff, wantMax: most, wantOpt: most},
		{what: "in pieces", cdb: inquiry(0xb0, 1, 64), n: 64, first: 10, max: 16384, opt: 16384, wantMax: most, wantOpt: most},
		{what: "only one length fits", cdb: inquiry(0xb0, 1, 12), n: 12, max: 16384, opt: 16384, wantMax: most, wantOpt: 16384},
		{what: "no length fits", cdb: inquiry(0xb0, 1, 11), n: 11, max: 16384, opt: 16384, wantUnchanged: true},
		{what: "header only", cdb: inquiry(0xb0, 1, 4), n: 4, max: 16384, wantUnchanged: true},
		{what: "another page", cdb: inquiry(0xb1, 1, 64), n: 64, max: 16384, wantUnchanged: true},
		{what: "standard data", cdb: inquiry(0, 0, 64), n: 64, max: 16384, wantUnchanged: true},
		{what: "not good", cdb: inquiry(0xb0, 1, 64), n: 64, max: 16384, status: 2, wantUnchanged: true},
	} {
		device := blockLimits(c.max, c.opt)[:c.n]
		l := newLUN(t, func(h *ioHdr) unix.Errno {
			rest := device
			for _, b := range sentData(h) {
				rest = rest[copy(b, rest):]
			}
			h.status = c.status
			h.resid = int32(h.dxferLen) - int32(len(device))
			return 0
		})
		buf := make([]byte, 64)
		cmd := &scsi.Command{CDB: c.cdb, DataIn: [][]byte{buf[:c.first], buf[c.first:]}}
		exec1(t, l, cmd)
		want := bytes.Clone(device)
		if !c.wantUnchanged {
			full := make([]byte, 64)
			copy(full, device)
			binary.BigEndian.PutUint32(full[8:], c.wantMax)
			if c.n >= 16 {
				binary.BigEndian.PutUint32(full[12:], c.wantOpt)
			}
			want = full[:c.n]
		}
		if !bytes.Equal(buf[:c.n], want) || cmd.Residual != uint32(64-c.n) {
			t.Errorf("%s: page % x, residual %d; want % x, %d", c.what, buf[:c.n], cmd.Residual, want, 64-c.n)
		}
	}
}

func TestBlockSizeIsLearned(t *testing.T) {
	var page []byte
	l := newLUN(t, func(h *ioHdr) unix.Errno {
		h.resid = int32(h.dxferLen) - int32(copy(sentData(h)[0], page))
		return 0
	})
	readCapacity10 := func(size uint32) {
		page = binary.BigEndian.AppendUint32([]byte{0, 0, 0, 9}, size)
		exec1(t, l, &scsi.Command{CDB: []byte{scsi.OpReadCapacity10, 9: 0}, DataIn: [][]byte{make([]byte, 8)}})
	}
	readCapacity16 := func(size uint32, n int) {
		page = append(binary.BigEndian.AppendUint32(make([]byte, 8), size), make([]byte, 20)...)[:n]
		exec1(t, l, &scsi.Command{CDB: []byte{scsi.OpServiceActionIn16, scsi.SAReadCapacity16, 15: 0}, DataIn: [][]byte{make([]byte, 32)}})
	}
	for _, step := range []struct {
		do   func()
		want uint32
	}{
		{func() {}, 512},
		{func() { readCapacity10(4096) }, 4096},
		{func() { readCapacity16(512, 32) }, 512},
		{func() { readCapacity16(4096, 11) }, 512}, // cut off
		{func() { readCapacity10(0) }, 512},        // nonsense
		{func() { readCapacity10(513) }, 512},
		{func() { readCapacity10(1 << 31) }, 512},
		{func() { readCapacity16(4096, 12) }, 4096},
	} {
		step.do()
		page = blockLimits(0, 0)
		buf := make([]byte, 64)
		exec1(t, l, &scsi.Command{CDB: []byte{scsi.OpInquiry, 1, 0xb0, 0, 64, 0}, DataIn: [][]byte{buf}})
		if got, want := binary.BigEndian.Uint32(buf[8:]), l.limits.MaxTransfer/step.want; got != want {
			t.Fatalf("MAXIMUM TRANSFER LENGTH %d; want %d blocks of %d", got, want, step.want)
		}
	}
}

// FuzzInspect gives any answer to any command: it may write into what was
// received, only there, and only where the rules above say so.
func FuzzInspect(f *testing.F) {
	f.Add([]byte{scsi.OpInquiry, 1, 0xb0, 0, 64, 0}, blockLimits(16384, 16384), uint32(0), uint8(10))
	f.Add([]byte{scsi.OpReadCapacity10, 0, 0, 0, 0, 0, 0, 0, 0, 0}, []byte{0, 0, 0, 9, 0, 0, 16, 0}, uint32(0), uint8(3))
	f.Add([]byte{scsi.OpServiceActionIn16, 0x10, 0, 0, 0, 0}, make([]byte, 32), uint32(20), uint8(0))
	f.Fuzz(func(t *testing.T, cdb, data []byte, residual uint32, cut uint8) {
		if cdbLen(cdb) == 0 || len(data) == 0 {
			return
		}
		l := &LUN{limits: scsi.Limits{MaxTransfer: 1 << 20}}
		l.blockSize.Store(512)
		at := int(cut) % (len(data) + 1)
		before := bytes.Clone(data)
		c := &scsi.Command{CDB: cdb, DataIn: [][]byte{data[:at:at], data[at:]}, Residual: min(residual, uint32(len(data)))}
		l.inspect(c)
		got := len(data) - int(c.Residual)
		for i := range data {
			if data[i] != before[i] && (i < 8 || i >= 16 || i >= got) {
				t.Fatalf("byte %d of %d changed", i, got)
			}
		}
		if s := l.blockSize.Load(); s < 512 || s > 1<<20 {
			t.Fatalf("block size %d", s)
		}
	})
}
