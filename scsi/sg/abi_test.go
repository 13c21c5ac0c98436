package sg

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unsafe"
)

// TestABI asks the C compiler for the layout and the numbers of <scsi/sg.h>.
func TestABI(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		if os.Getenv("VMM_TEST_REQUIRE_GCC") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	type question struct {
		c   string // an integer expression
		got int64
	}
	var h ioHdr
	asked := []question{
		{"sizeof(struct sg_io_hdr)", int64(unsafe.Sizeof(h))},
		{"sizeof(struct sg_iovec)", int64(unsafe.Sizeof(iovec{}))},
		{"offsetof(struct sg_iovec, iov_base)", int64(unsafe.Offsetof(iovec{}.base))},
		{"offsetof(struct sg_iovec, iov_len)", int64(unsafe.Offsetof(iovec{}.len))},
		{"SG_IO", ioctlSGIO},
		{"SG_SCSI_RESET", ioctlReset},
		{"SG_GET_SG_TABLESIZE", ioctlTableSize},
		{"BLKSECTGET", ioctlSectGet},
		{"SG_SCSI_RESET_DEVICE", resetDevice},
		{"SG_DXFER_NONE", dxferNone},
		{"SG_DXFER_TO_DEV", dxferToDev},
		{"SG_DXFER_FROM_DEV", dxferFromDev},
		{"UIO_MAXIOV", maxIovecs},
	}
	names := map[string]string{
		"interfaceID": "interface_id", "direction": "dxfer_direction", "cmdLen": "cmd_len", "mxSenseLen": "mx_sb_len",
		"iovecCount": "iovec_count", "dxferLen": "dxfer_len", "dxferp": "dxferp", "cmdp": "cmdp", "sbp": "sbp",
		"timeout": "timeout", "flags": "flags", "packID": "pack_id", "usrPtr": "usr_ptr", "status": "status",
		"maskedStatus": "masked_status", "msgStatus": "msg_status", "senseLen": "sb_len_wr", "hostStatus": "host_status",
		"driverStatus": "driver_status", "resid": "resid", "duration": "duration", "info": "info",
	}
	typ := reflect.TypeOf(h)
	for i := range typ.NumField() {
		f := typ.Field(i)
		if f.Name == "_" {
			continue
		}
		c, ok := names[f.Name]
		if !ok {
			t.Errorf("ioHdr.%s has no counterpart in this test", f.Name)
		}
		asked = append(asked,
			question{"offsetof(struct sg_io_hdr, " + c + ")", int64(f.Offset)},
			question{"sizeof(((struct sg_io_hdr *)0)->" + c + ")", int64(f.Type.Size())})
	}
	var src strings.Builder
	src.WriteString("#include <stddef.h>\n#include <stdio.h>\n#include <scsi/sg.h>\n#include <linux/fs.h>\n#include <linux/uio.h>\nint main(void) {\n")
	for _, q := range asked {
		fmt.Fprintf(&src, "printf(\"%%lld\\n\", (long long)(%s));\n", q.c)
	}
	src.WriteString("}\n")
	bin := filepath.Join(t.TempDir(), "abi")
	cc := exec.Command("gcc", "-x", "c", "-o", bin, "-")
	cc.Stdin = strings.NewReader(src.String())
	if out, err := cc.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		if got := fmt.Sprint(asked[i].got); got != line {
			t.Errorf("%s = %s here; the compiler says %s", asked[i].c, got, line)
		}
	}
}

func TestSlotsDoNotOverlap(t *testing.T) {
	s, err := newSlots(3)
	if err != nil {
		t.Fatal(err)
	}
	defer s.m.Close()
	for i := range 3 {
		m := s.at(i)
		m.prepare()
		m.hdr.packID = int32(i)
		m.cdb[maxCDB-1], m.sense[mxSense-1], m.iov[maxIovecs-1].len = byte(i), byte(i), uintptr(i)
	}
	for i := range 3 {
		m := s.at(i)
		if m.hdr.packID != int32(i) || m.cdb[maxCDB-1] != byte(i) || m.sense[mxSense-1] != byte(i) || m.iov[maxIovecs-1].len != uintptr(i) {
			t.Errorf("slot %d was written through another", i)
		}
		if m.hdr.cmdp != uintptr(unsafe.Pointer(&m.cdb)) || m.hdr.sbp != uintptr(unsafe.Pointer(&m.sense)) {
			t.Errorf("slot %d's header points elsewhere", i)
		}
	}
}

func TestSetData(t *testing.T) {
	s, err := newSlots(1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.m.Close()
	m := s.at(0)
	m.prepare()
	mem, err := newSlots(2) // some pages
	if err != nil {
		t.Fatal(err)
	}
	defer mem.m.Close()
	page := func(from, to int) []byte { return mem.m.Bytes()[from:to] }
	many := func(n int) (bufs [][]byte) {
		for range n {
			bufs = append(bufs, page(0, 1))
		}
		return bufs
	}
	for _, c := range []struct {
		what     string
		bufs     [][]byte
		maxPages int
		ok       bool
		iovecs   int // 0: none or one piece named directly
	}{
		{"nothing", nil, 4, true, 0},
		{"empty pieces", [][]byte{nil, {}}, 4, true, 0},
		{"one piece", [][]byte{page(0, 8192)}, 2, true, 0},
		{"one piece and empty ones", [][]byte{nil, page(0, 8192), {}}, 2, true, 0},
		{"one byte into a third page", [][]byte{page(4095, 8193)}, 2, false, 0},
		{"the same, allowed", [][]byte{page(4095, 8193)}, 3, true, 0},
		{"two pieces", [][]byte{page(0, 4096), page(8192, 12288)}, 2, true, 2},
		{"two pieces of one page count twice", [][]byte{page(0, 512), page(512, 1024)}, 1, false, 0},
		{"as many pieces as there may be", many(maxIovecs), 2000, true, maxIovecs},
		{"one more", many(maxIovecs + 1), 2000, false, 0},
	} {
		if got := m.setData(c.bufs, c.maxPages); got != c.ok {
			t.Errorf("%s: setData = %v; want %v", c.what, got, c.ok)
		}
		if !c.ok {
			continue
		}
		if got := int(m.hdr.iovecCount); got != c.iovecs {
			t.Errorf("%s: %d iovecs; want %d", c.what, got, c.iovecs)
		}
		var want []iovec
		for _, b := range c.bufs {
			if len(b) > 0 {
				want = append(want, iovec{addr(b), uintptr(len(b))})
			}
		}
		switch {
		case c.iovecs > 0:
			if m.hdr.dxferp != uintptr(unsafe.Pointer(&m.iov)) || !reflect.DeepEqual(m.iov[:c.iovecs], want) {
				t.Errorf("%s: iovecs %v at %#x; want %v", c.what, m.iov[:c.iovecs], m.hdr.dxferp, want)
			}
		case len(want) == 1:
			if m.hdr.dxferp != want[0].base {
				t.Errorf("%s: data at %#x; want %#x", c.what, m.hdr.dxferp, want[0].base)
			}
		case m.hdr.dxferp != 0:
			t.Errorf("%s: data at %#x; want none", c.what, m.hdr.dxferp)
		}
	}
}
