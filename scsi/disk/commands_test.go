package disk

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"vmm/scsi"
)

// unhex reads hexadecimal digits between spaces; "xx*n" is xx repeated n times.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	var b []byte
	for f := range strings.FieldsSeq(s) {
		times := 1
		if at := strings.IndexByte(f, '*'); at >= 0 {
			fmt.Sscan(f[at+1:], &times)
			f = f[:at]
		}
		p, err := hex.DecodeString(f)
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		for range times {
			b = append(b, p...)
		}
	}
	return b
}

// memDisk is a disk of 1 MiB of zeros in memory with a known identity.
func memDisk(t testing.TB, o Options) *LUN {
	return newMem(t, &memFile{data: make([]byte, 1<<20)}, o)
}

func TestDataIn(t *testing.T) {
	const serial = "30*31 31" // 31 zeros and a one, as digits
	plain := memDisk(t, Options{})
	large := memDisk(t, Options{BlockSize: 4096})
	reader := memDisk(t, Options{ReadOnly: true})
	thick := newMem(t, &memFile{data: make([]byte, 1<<20), noHoles: true}, Options{})
	huge := memDisk(t, Options{})
	huge.blocks.Store(1<<32 + 8)
	edge := memDisk(t, Options{})
	edge.blocks.Store(1 << 32)
	stopped := memDisk(t, Options{})
	expect(t, do(t, stopped, unhex(t, "1b 00 00 00 00 00"), nil, 0), "")

	caching := "08 12 04 00*17 "
	control := "0a 0a 02 10 00*4 ffff 0000 "
	for _, test := range []struct {
		name string
		l    *LUN
		cdb  string
		want string
	}{
		{"INQUIRY", plain, "12 00 00 01 00 00", "00 00 07 12 5b 00 00 02" +
			hex.EncodeToString([]byte("VMM     SOFTWARE DISK   0001")) + " 00*22 00a0 05c0 0600 00*32"},
		{"INQUIRY truncated", plain, "12 00 00 00 05 00", "00 00 07 12 5b"},
		{"INQUIRY of nothing", plain, "12 00 00 00 00 00", ""},
		{"supported pages", plain, "12 01 00 00 ff 00", "00 00 0007 00 80 83 86 b0 b1 b2"},
		{"unit serial number", plain, "12 01 80 00 ff 00", "00 80 0020 " + serial},
		{"device identification", plain, "12 01 83 00 ff 00", "00 83 0038 01 03 00 08 3000000000000001" +
			"02 01 00 28 564d4d2020202020 " + serial},
		{"device identification truncated", plain, "12 01 83 00 08 00", "00 83 0038 01 03 00 08"},
		{"extended INQUIRY", plain, "12 01 86 00 ff 00", "00 86 003c 00 07 01 01 00*56"},
		{"block limits", plain, "12 01 b0 00 ff 00", "00 b0 003c 01 80 0008 00002000 00000000 00000000" +
			"00200000 00000100 00000008 80000000 0000000000020000 00*20"},
		{"block limits, 4096", large, "12 01 b0 00 ff 00", "00 b0 003c 01 10 0001 00000400 00000000 00000000" +
			"00040000 00000100 00000001 80000000 0000000000004000 00*20"},
		{"block limits, not thin", thick, "12 01 b0 00 ff 00", "00 b0 003c 01 80 0008 00002000 00*24 0000000000020000 00*20"},
		{"block device characteristics", plain, "12 01 b1 00 ff 00", "00 b1 003c 0001 00 00 02 00*55"},
		{"logical block provisioning", plain, "12 01 b2 00 ff 00", "00 b2 0004 00 e4 02 00"},
		{"logical block provisioning, not thin", thick, "12 01 b2 00 ff 00", "00 b2 0004 00 00 00 00"},

		{"READ CAPACITY(10)", plain, "25 00*9", "000007ff 00000200"},
		{"READ CAPACITY(10), 4096", large, "25 00*9", "000000ff 00001000"},
		{"READ CAPACITY(10), 2 TiB", edge, "25 00*9", "ffffffff 00000200"},
		{"READ CAPACITY(10), more", huge, "25 00*9", "ffffffff 00000200"},
		{"READ CAPACITY(16)", plain, "9e 10 00*8 00000100 00 00", "00000000000007ff 00000200 00 03 c000 00*16"},
		{"READ CAPACITY(16), 4096", large, "9e 10 00*8 00000020 00 00", "00000000000000ff 00001000 00 00 c000 00*16"},
		{"READ CAPACITY(16), not thin", thick, "9e 10 00*8 00000020 00 00", "00000000000007ff 00000200 00 03 0000 00*16"},
		{"READ CAPACITY(16), more than 2 TiB", huge, "9e 10 00*8 0000000c 00 00", "0000000100000007 00000200"},

		{"MODE SENSE(6), all", plain, "1a 00 3f 00 ff 00", "2b 00 10 08 00000800 00000200" + caching + control},
		{"MODE SENSE(6), subpages too", plain, "1a 00 3f ff ff 00", "2b 00 10 08 00000800 00000200" + caching + control},
		{"MODE SENSE(6), read-only", reader, "1a 08 08 00 ff 00", "17 00 90 00" + caching},
		{"MODE SENSE(6), more than 2 TiB", huge, "1a 00 0a 00 0c 00", "17 00 10 08 ffffffff 00000200"},
		{"MODE SENSE(6), changeable", plain, "1a 08 7f 00 ff 00", "23 00 10 00" + "08 12 04 00*17 0a 0a 00*10"},
		{"MODE SENSE(6), default", plain, "1a 08 bf 00 ff 00", "23 00 10 00" + caching + control},
		{"MODE SENSE(10)", plain, "5a 00 0a 00 00 00 00 00ff 00", "001a 00 10 0000 0008 00000800 00000200" + control},
		{"MODE SENSE(10), long", huge, "5a 10 0a 00 00 00 00 00ff 00", "0022 00 10 0100 0010 0000000100000008 00000000 00000200" + control},
		{"MODE SENSE(10), truncated", plain, "5a 08 3f 00 00 00 00 0009 00", "0026 00 10 0000 0000 08"},

		{"REPORT LUNS", plain, "a0 00 00 00 00 00 00000010 00 00", "00000008 00*12"},
		{"REPORT LUNS, well-known", plain, "a0 00 01 00 00 00 00000010 00 00", "00000000 00000000"},
		{"REPORT LUNS, all", plain, "a0 00 02 00 00 00 00000010 00 00", "00000008 00*12"},

		{"REQUEST SENSE", plain, "03 00 00 00 ff 00", "70 00 00 00*4 0a 00*10"},
		{"REQUEST SENSE, descriptor", plain, "03 01 00 00 ff 00", "72 00 00 00 00*4"},
		{"REQUEST SENSE, stopped", stopped, "03 01 00 00 ff 00", "72 02 04 02 00*4"},

		{"supported TMFs", plain, "a3 0d 00 00 00 00 000000ff 00 00", "88 00 00 00"},
		{"supported TMFs, extended", plain, "a3 0d 80 00 00 00 000000ff 00 00", "88 00 00 0c 00*12"},

		{"supported opcode, READ(10)", plain, "a3 0c 01 28 0000 000000ff 00 00", "00 03 000a 28 18 ffffffff 00 ffff 00"},
		{"supported opcode, READ(10), timeouts", plain, "a3 0c 81 28 0000 000000ff 00 00", "00 83 000a 28 18 ffffffff 00 ffff 00 000a 00*10"},
		{"supported opcode, READ CAPACITY(16)", plain, "a3 0c 02 9e 0010 000000ff 00 00", "00 03 0010 9e 10 00*8 ffffffff 00 00"},
		{"supported opcode, by either", plain, "a3 0c 03 9e 0010 000000ff 00 00", "00 03 0010 9e 10 00*8 ffffffff 00 00"},
		{"supported opcode, by either, none", plain, "a3 0c 03 28 0000 000000ff 00 00", "00 03 000a 28 18 ffffffff 00 ffff 00"},
		{"supported opcode, no such action", plain, "a3 0c 02 9e 0011 000000ff 00 00", "00 01 0000"},
		{"supported opcode, no 16-bit action", plain, "a3 0c 02 9e 0110 000000ff 00 00", "00 01 0000"},
		{"supported opcode, by either, an action too many", plain, "a3 0c 03 28 0001 000000ff 00 00", "00 01 0000"},
		{"supported opcode, none", plain, "a3 0c 01 5e 0000 000000ff 00 00", "00 01 0000"},
		{"supported opcode, UNMAP", plain, "a3 0c 01 42 0000 000000ff 00 00", "00 03 000a 42 00 00000000 00 ffff 00"},
		{"supported opcode, UNMAP, not thin", thick, "a3 0c 01 42 0000 000000ff 00 00", "00 01 0000"},
		{"supported opcode, WRITE SAME(16)", plain, "a3 0c 01 93 0000 000000ff 00 00", "00 03 0010 93 09 ff*12 00 00"},
		{"supported opcode, WRITE SAME(16), not thin", thick, "a3 0c 01 93 0000 000000ff 00 00", "00 03 0010 93 01 ff*12 00 00"},

		{"GET LBA STATUS", plain, "9e 12 00*8 00000018 00 00", "00000014 00000000 0000000000000000 00000800 01 000000"},
		{"GET LBA STATUS, one descriptor at least", plain, "9e 12 0000000000000010 00000008 00 00", "00000014 00000000"},
		{"GET LBA STATUS, last block", plain, "9e 12 00000000000007ff 00000fff 00 00", "00000014 00000000 00000000000007ff 00000001 01 000000"},

		{"START STOP UNIT, start", plain, "1b 00 00 00 01 00", ""},
		{"PREVENT ALLOW MEDIUM REMOVAL", plain, "1e 00 00 00 01 00", ""},
		{"SEND DIAGNOSTIC, self-test", plain, "1d 04 00 00 00 00", ""},
		{"TEST UNIT READY", plain, "00*6", ""},
		{"READ(10) of nothing", plain, "28 00 000007ff 00 0000 00", ""},
		{"WRITE SAME(16), no data-out buffer", plain, "93 01 00*8 00000008 00 00", ""},
	} {
		cdb, want := unhex(t, test.cdb), unhex(t, test.want)
		c := do(t, test.l, cdb, nil, 4096)
		if got := sense(t, c); got != "" {
			t.Errorf("%s: sense %s", test.name, got)
			continue
		}
		if got := dataIn(c); !bytes.Equal(got, want) {
			t.Errorf("%s:\n got % x\nwant % x", test.name, got, want)
		}
		// A buffer shorter than the allocation length truncates as well.
		if half := len(want) / 2; half > 0 {
			if got := dataIn(do(t, test.l, cdb, nil, half)); len(got) > half || !bytes.HasPrefix(want, got) {
				t.Errorf("%s with a buffer of %d bytes: got % x; want the start of % x", test.name, half, got, want)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	plain := memDisk(t, Options{})
	reader := memDisk(t, Options{ReadOnly: true})
	thick := newMem(t, &memFile{data: make([]byte, 1<<20), noHoles: true}, Options{})
	huge := memDisk(t, Options{})
	huge.blocks.Store(1 << 55)
	stopped := memDisk(t, Options{})
	expect(t, do(t, stopped, unhex(t, "1b 00 00 00 00 00"), nil, 0), "")
	const ones = "ffffffffffffffff"

	for _, test := range []struct {
		name string
		l    *LUN
		cdb  string
		out  string
		want string // sense, then what the specific and information fields say
	}{
		{"unknown", plain, "ff 00*5", "", "5/20/00"},
		{"PERSISTENT RESERVE IN", plain, "5e 00*9", "", "5/20/00"},
		{"PERSISTENT RESERVE OUT", plain, "5f 00*9", "", "5/20/00"},
		{"RESERVE(6)", plain, "16 00*5", "", "5/20/00"},
		{"RELEASE(10)", plain, "57 00*9", "", "5/20/00"},
		{"unknown service action", plain, "9e 11 00*14", "", "5/24/00 cdb 1.4"},
		{"CDB too short", plain, "28 00 00", "", "5/24/00"},
		{"NACA", plain, "00 00 00 00 00 04", "", "5/24/00 cdb 5.2"},
		{"RDPROTECT", plain, "28 20 00*8", "", "5/24/00 cdb 1.5"},

		{"READ(6) beyond", plain, "08 00 07ff 02 00", "", "5/21/00 info 7ff"},
		{"READ(6) of 256 beyond", plain, "08 00 0701 00 00", "", "5/21/00 info 701"},
		{"READ(10) behind", plain, "28 00 00000800 00 0001 00", "", "5/21/00 info 800"},
		{"READ(10) of nothing behind", plain, "28 00 00000800 00 0000 00", "", "5/21/00 info 800"},
		{"READ(12) beyond", plain, "a8 00 000007ff 00000002 00 00", "", "5/21/00 info 7ff"},
		{"READ(16) far beyond", plain, "88 00 " + ones + " 00000001 00 00", "", "5/21/00"},
		{"READ(16) that wraps", plain, "88 00 fffffffffffffff8 00000010 00 00", "", "5/21/00"},
		{"READ(16), huge disk", huge, "88 00 0080000000000000 00000000 00 00", "", "5/21/00"},
		{"WRITE(16) that wraps", plain, "8a 00 " + ones + "ffffffff 00 00", "", "5/21/00"},
		{"SYNCHRONIZE CACHE(16) behind", plain, "91 00 0000000000000800 00000000 00 00", "", "5/21/00 info 800"},
		{"VERIFY(10) beyond", plain, "2f 00 00000000 00 0801 00", "", "5/21/00 info 0"},
		{"WRITE SAME(10) beyond", plain, "41 00 000007ff 00 0002 00", "00*512", "5/21/00 info 7ff"},
		{"GET LBA STATUS behind", plain, "9e 12 0000000000000800 00000018 00 00", "", "5/21/00 info 800"},

		{"READ(12) too long", huge, "a8 00 00000000 00002001 00 00", "", "5/24/00 cdb 6.7"},
		{"READ(10) too long", huge, "28 00 00000000 00 2001 00", "", "5/24/00 cdb 7.7"},
		{"WRITE(16) too long", huge, "8a 00 00*8 00002001 00 00", "", "5/24/00 cdb 10.7"},
		{"VERIFY(16) too long", huge, "8f 00 00*8 00002001 00 00", "", "5/24/00 cdb 10.7"},
		{"COMPARE AND WRITE too long", huge, "89 00 00*8 000000 81 00 00", "", "5/24/00 cdb 13.7"},
		{"WRITE SAME(16) too long", huge, "93 00 00*8 00020001 00 00", "00*512", "5/24/00 cdb 10.7"},
		{"WRITE SAME(10) of no blocks", plain, "41 00 00000000 00 0000 00", "00*512", "5/24/00 cdb 7.7"},

		{"WRITE(10) without data", plain, "2a 00 00000000 00 0001 00", "", "5/0e/03"},
		{"WRITE(10), too little data", plain, "2a 00 00000000 00 0002 00", "00*1023", "5/0e/03"},
		{"COMPARE AND WRITE, too little data", plain, "89 00 00*8 000000 01 00 00", "00*1023", "5/0e/03"},
		{"WRITE SAME(16), too little data", plain, "93 00 00*8 00000001 00 00", "00*511", "5/0e/03"},
		{"VERIFY(10), too little data", plain, "2f 02 00000000 00 0001 00", "00*511", "5/0e/03"},
		{"VERIFY(10), BYTCHK 11b", plain, "2f 06 00000000 00 0001 00", "00*512", "5/24/00 cdb 1.2"},

		{"UNMAP, not thin", thick, "42 00*6 0008 00", "00*8", "5/20/00"},
		{"WRITE SAME(16) with UNMAP, not thin", thick, "93 08 00*8 00000001 00 00", "00*512", "5/24/00 cdb 1.3"},
		{"UNMAP with ANCHOR", plain, "42 01 00*5 0008 00", "00*8", "5/24/00 cdb 1.0"},
		{"UNMAP, short list", plain, "42 00*6 0007 00", "00*7", "5/1a/00"},
		{"UNMAP, less data than said", plain, "42 00*6 0018 00", "0016 0010 00*19", "5/1a/00"},
		{"UNMAP, truncated", plain, "42 00*6 0017 00", "0016 0010 00*19", "5/1a/00"},
		{"UNMAP beyond", plain, "42 00*6 0018 00", "0016 0010 00*4 00000000000007ff 00000002 00*4", "5/21/00 info 7ff"},
		{"UNMAP that wraps", plain, "42 00*6 0018 00", "0016 0010 00*4 " + ones + " 00000002 00*4", "5/21/00"},
		{"UNMAP of too much", huge, "42 00*6 0028 00", "0026 0020 00*4 00*8 00200000 00*4 00*8 00000001 00*4", "5/26/00 list 32"},
		{"UNMAP, too many descriptors", plain, "42 00*6 1018 00", "1016 1010 00*4116", "5/26/00 list 2"},

		{"read-only WRITE(6)", reader, "0a 00 0000 01 00", "00*512", "7/27/00"},
		{"read-only COMPARE AND WRITE", reader, "89 00 00*8 000000 01 00 00", "00*1024", "7/27/00"},
		{"read-only WRITE SAME(16)", reader, "93 01 00*8 00000001 00 00", "", "7/27/00"},
		{"read-only UNMAP", reader, "42 00*6 0008 00", "00*8", "5/20/00"},

		{"stopped TEST UNIT READY", stopped, "00*6", "", "2/04/02"},
		{"stopped READ(10)", stopped, "28 00*9", "", "2/04/02"},
		{"stopped SYNCHRONIZE CACHE(10)", stopped, "35 00*9", "", "2/04/02"},

		{"INQUIRY, page without EVPD", plain, "12 00 80 00 ff 00", "", "5/24/00 cdb 2.7"},
		{"INQUIRY, no such page", plain, "12 01 b7 00 ff 00", "", "5/24/00 cdb 2.7"},
		{"INQUIRY, CMDDT", plain, "12 02 00 00 ff 00", "", "5/24/00 cdb 1.1"},
		{"REPORT LUNS, little room", plain, "a0 00 00 00 00 00 0000000f 00 00", "", "5/24/00 cdb 6.7"},
		{"REPORT LUNS, administrative", plain, "a0 00 10 00 00 00 00000010 00 00", "", "5/24/00 cdb 2.7"},
		{"START STOP UNIT, power condition", plain, "1b 00 00 00 10 00", "", "5/24/00 cdb 4.4"},
		{"supported opcodes, no action asked", plain, "a3 0c 01 9e 0000 000000ff 00 00", "", "5/24/00 cdb 2.2"},
		{"supported opcodes, action asked", plain, "a3 0c 02 28 0000 000000ff 00 00", "", "5/24/00 cdb 2.2"},
		{"supported opcodes, reserved", plain, "a3 0c 04 28 0000 000000ff 00 00", "", "5/24/00 cdb 2.2"},

		{"MODE SENSE(6), no such page", plain, "1a 00 01 00 ff 00", "", "5/24/00 cdb 2.5"},
		{"MODE SENSE(6), no such subpage", plain, "1a 00 0a 01 ff 00", "", "5/24/00 cdb 3.7"},
		{"MODE SENSE(6), saved", plain, "1a 00 ff 00 ff 00", "", "5/39/00"},
		{"MODE SELECT(6), SP", plain, "15 11 00 00 18 00", "00*4 08 12 04 00*17", "5/24/00 cdb 1.0"},
		{"MODE SELECT(6), no PF", plain, "15 00 00 00 18 00", "00*4 08 12 04 00*17", "5/24/00 cdb 1.4"},
		{"MODE SELECT(6), short header", plain, "15 10 00 00 03 00", "00*3", "5/1a/00"},
		{"MODE SELECT(6), less data than said", plain, "15 10 00 00 18 00", "00*4 08 12 04 00*16", "5/1a/00"},
		{"MODE SELECT(6), page cut", plain, "15 10 00 00 17 00", "00*4 08 12 04 00*16", "5/1a/00"},
		{"MODE SELECT(6), page header cut", plain, "15 10 00 00 05 00", "00*4 08", "5/1a/00"},
		{"MODE SELECT(6), no such page", plain, "15 10 00 00 06 00", "00*4 01 00", "5/26/00 list 4"},
		{"MODE SELECT(6), subpage", plain, "15 10 00 00 06 00", "00*4 48 12", "5/26/00 list 4"},
		{"MODE SELECT(6), page length", plain, "15 10 00 00 18 00", "00*4 08 11 04 00*17", "5/26/00 list 5"},
		{"MODE SELECT(6), unchangeable bit", plain, "15 10 00 00 18 00", "00*4 08 12 05 00*17", "5/26/00 list 6"},
		{"MODE SELECT(6), D_SENSE", plain, "15 10 00 00 10 00", "00*4 0a 0a 06 10 00*4 ffff 0000", "5/26/00 list 6"},
		{"MODE SELECT(6), other capacity", plain, "15 10 00 00 0c 00", "00*3 08 00000801 00000200", "5/26/00 list 4"},
		{"MODE SELECT(6), other block size", plain, "15 10 00 00 0c 00", "00*3 08 00000800 00001000", "5/26/00 list 8"},
		{"MODE SELECT(6), two descriptors", plain, "15 10 00 00 14 00", "00*3 10 00000800 00000200 00000800 00000200", "5/26/00 list 3"},
		{"MODE SELECT(6), descriptor cut", plain, "15 10 00 00 0b 00", "00*3 08 00000800 000002", "5/1a/00"},
		{"MODE SELECT(10), descriptor length", plain, "55 10 00*5 0010 00", "00*6 0009 00000800 00000200", "5/26/00 list 6"},
	} {
		var out []byte
		if test.out != "" {
			out = unhex(t, test.out)
		}
		c := do(t, test.l, unhex(t, test.cdb), out, 0)
		got := sense(t, c)
		if s := c.Sense; got != "" {
			if s[0]&0x80 != 0 {
				got += fmt.Sprintf(" info %x", binary.BigEndian.Uint32(s[3:]))
			}
			field := binary.BigEndian.Uint16(s[16:])
			switch s[15] & 0xc8 {
			case 0xc8:
				got += fmt.Sprintf(" cdb %d.%d", field, s[15]&7)
			case 0x80:
				got += fmt.Sprintf(" list %d", field)
			}
		}
		if got != test.want {
			t.Errorf("%s: %q; want %q", test.name, got, test.want)
		}
		if int(c.Residual) != len(out) {
			t.Errorf("%s: residual %d; want %d", test.name, c.Residual, len(out))
		}
	}
	for _, attr := range []scsi.TaskAttr{scsi.ACA, 7} {
		c := &scsi.Command{CDB: unhex(t, "00*6"), Attr: attr}
		run(plain, c)
		expect(t, c, "5/49/00")
	}
	c := &scsi.Command{}
	run(plain, c)
	expect(t, c, "5/20/00")
}

// TestUsageMasks sets every bit that the table does not name, in every
// command, and expects to be told which.
func TestUsageMasks(t *testing.T) {
	l := newDisk(t, Options{})
	if !l.thin {
		t.Skip("the file system of TMPDIR cannot punch holes")
	}
	rows := 0
	for _, row := range commands {
		rows++
		for i := 1; i < len(row.cdb); i++ {
			for bit := range 8 {
				// Another service action is another command.
				if row.cdb[i]&(1<<bit) != 0 || i == 1 && row.flags&serviceAction != 0 && bit < 5 {
					continue
				}
				cdb := make([]byte, 32) // as long as the controller's
				cdb[0], cdb[i] = row.cdb[0], 1<<bit
				if row.flags&serviceAction != 0 {
					cdb[1] |= row.cdb[1]
				}
				c := do(t, l, cdb, nil, 0)
				if got := sense(t, c); got != "5/24/00" || c.Sense[15] != 0xc8|byte(bit) || int(c.Sense[17]) != i {
					t.Errorf("% x with byte %d bit %d set: %s, % x; want 5/24/00 that points there", row.cdb[:2], i, bit, got, c.Sense[15:18])
				}
			}
		}
	}
	for op := range 256 {
		supported := len(byOpcode[op]) > 0
		got := sense(t, do(t, l, append([]byte{byte(op)}, make([]byte, 31)...), nil, 0))
		if (got != "5/20/00") != supported {
			t.Errorf("operation code %#02x: sense %q, but it is in the table: %v", op, got, supported)
		}
		rows -= len(byOpcode[op])
	}
	if rows != 0 {
		t.Errorf("%d rows of the table are out of reach: rows of one operation code are not neighbours", rows)
	}
}

// TestReportSupportedOpcodes checks that the list is the table.
func TestReportSupportedOpcodes(t *testing.T) {
	for _, l := range []*LUN{memDisk(t, Options{}), memDisk(t, Options{ReadOnly: true}), newDisk(t, Options{})} {
		for _, timeouts := range []byte{0, 0x80} {
			c := do(t, l, []byte{scsi.OpMaintenanceIn, scsi.SAReportSupportedOpcodes, timeouts, 0, 0, 0, 0, 0, 0x20, 0, 0, 0}, nil, 8192)
			expect(t, c, "")
			list := dataIn(c)
			if n := binary.BigEndian.Uint32(list); int(n) != len(list)-4 {
				t.Fatalf("the list claims %d bytes and has %d", n, len(list)-4)
			}
			listed := 0
			for list = list[4:]; len(list) > 0; listed++ {
				op, action, n := list[0], list[3], 8
				if timeouts != 0 {
					n = 20
				}
				cdb := []byte{op, action}
				if row := l.lookup(cdb); row == nil || len(row.cdb) != int(list[7]) {
					t.Errorf("operation code %#02x/%#02x is listed with % x but the table says %v", op, action, list[:n], row)
				}
				list = list[n:]
			}
			want := 0
			for op := range byOpcode {
				want += len(l.rows(byte(op)))
			}
			if listed != want {
				t.Errorf("%d commands are listed; want %d", listed, want)
			}
		}
	}
}

// TestStrangersRead has sg3-utils read what the disk says of itself.
func TestStrangersRead(t *testing.T) {
	if _, err := exec.LookPath("sg_vpd"); err != nil {
		t.Skip("sg3-utils are not installed")
	}
	l := memDisk(t, Options{})
	for _, test := range []struct {
		cdb  string
		tool []string
		want []string
	}{
		{"12 00 00 01 00 00", []string{"sg_inq", "-d"}, []string{"version=0x07  [SPC-5]", "CmdQue=1", "SAM-5", "SBC-4"}},
		{"12 01 00 01 00 00", []string{"sg_vpd", "-p", "0"}, []string{"Supported VPD pages", "Block limits", "Logical block provisioning"}},
		{"12 01 80 01 00 00", []string{"sg_vpd", "-p", "0x80"}, []string{"Unit serial number: 00000000000000000000000000000001"}},
		{"12 01 83 01 00 00", []string{"sg_vpd", "-p", "0x83"}, []string{"designator type: NAA", "0x3000000000000001", "vendor id: VMM"}},
		{"12 01 86 01 00 00", []string{"sg_vpd", "-p", "0x86"}, []string{"HEADSUP=1 ORDSUP=1 SIMPSUP=1", "V_SUP=1", "LUICLR=1"}},
		{"12 01 b0 01 00 00", []string{"sg_vpd", "-p", "0xb0"}, []string{
			"Write same non-zero (WSNZ): 1", "Maximum compare and write length: 128 blocks", "Maximum transfer length: 8192 blocks",
			"Maximum unmap LBA count: 2097152", "Maximum unmap block descriptor count: 256", "Optimal unmap granularity: 8 blocks",
			"Unmap granularity alignment valid: true", "Maximum write same length: 0x20000 blocks"}},
		{"12 01 b1 01 00 00", []string{"sg_vpd", "-p", "0xb1"}, []string{"Non-rotating medium", "FUAB=1"}},
		{"12 01 b2 01 00 00", []string{"sg_vpd", "-p", "0xb2"}, []string{"(LBPU): 1", "(LBPWS): 1", "(LBPWS10): 1", "(LBPRZ): 1", "thin provisioned"}},
	} {
		data := dataIn(do(t, l, unhex(t, test.cdb), nil, 256))
		name := filepath.Join(t.TempDir(), "hex")
		if err := os.WriteFile(name, fmt.Appendf(nil, "% x\n", data), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(test.tool[0], append(test.tool[1:], "--inhex="+name)...).CombinedOutput()
		if err != nil {
			t.Errorf("%v: %v\n%s", test.tool, err, out)
		}
		for _, want := range test.want {
			if !strings.Contains(string(out), want) {
				t.Errorf("%v does not say %q:\n%s", test.tool, want, out)
			}
		}
	}
}
