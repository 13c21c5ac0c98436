package boot

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"vmm/kvm"
	"vmm/memory"
)

const mib = 1 << 20

func newRAM(t testing.TB, size uint64) *memory.RAM {
	t.Helper()
	ram, err := memory.New(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ram.Close() })
	return ram
}

func fileOf(name string, b []byte) File {
	return File{Name: name, Data: bytes.NewReader(b), Size: int64(len(b))}
}

// peek copies guest memory.
func peek(t testing.TB, ram *memory.RAM, gpa, n uint64) []byte {
	t.Helper()
	b, err := ram.Slice(memory.GPA(gpa), n)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(b)
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) ^ byte(i>>8) ^ seed
	}
	return b
}

// bzImage is a file in Debian's shape: 16 MiB preferred, protocol 2.15.
func bzImage(code []byte) []byte {
	const setup = 4
	le := binary.LittleEndian
	b := make([]byte, (setup+1)*sector)
	b[hdrSetupSects] = setup
	le.PutUint32(b[hdrSysSize:], uint32(len(code)/16))
	le.PutUint16(b[hdrBootFlag:], 0xaa55)
	b[hdrJump], b[hdrJump+1] = 0xeb, 0x6a
	copy(b[hdrMagic:], "HdrS")
	le.PutUint16(b[hdrVersion:], 0x20f)
	b[hdrLoadFlags] = loadedHigh
	le.PutUint32(b[hdrInitrdAddrMax:], 0x7fffffff)
	le.PutUint16(b[hdrXLoadFlags:], 0x7f)
	le.PutUint32(b[hdrCmdlineSize:], 2047)
	le.PutUint64(b[hdrPrefAddress:], 16*mib)
	le.PutUint32(b[hdrInitSize:], 4*mib)
	return append(b, code...)
}

func patched(b []byte, off int, v any) []byte {
	b = bytes.Clone(b)
	if _, err := binary.Encode(b[off:], binary.LittleEndian, v); err != nil {
		panic(err)
	}
	return b
}

func note(name string, kind uint32, desc []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(name)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(desc)))
	b = binary.LittleEndian.AppendUint32(b, kind)
	for _, part := range [][]byte{[]byte(name), desc} {
		b = append(b, part...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

var pvhNote = append(note("Linux\x00", 1, []byte("abc")), note("Xen\x00", noteEntry, []byte{0x10, 0, 0, 1, 0, 0, 0, 0})...)

// vmlinux is an ELF with the given program headers in front of data.
func vmlinux(data []byte, progs ...elf.Prog64) []byte {
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(progs)),
	}
	b, _ := binary.Append(nil, binary.LittleEndian, h)
	b, _ = binary.Append(b, binary.LittleEndian, progs)
	b = append(b, make([]byte, max(0, elfData-len(b)))...)
	return append(b, data...)
}

const elfData = 4096 // where the data of a small vmlinux begins

// smallELF has a text at 16 MiB, data with a bss behind it, and the note.
func smallELF() []byte {
	data := append(pattern(8192, 1), pvhNote...)
	return vmlinux(data,
		elf.Prog64{Type: uint32(elf.PT_LOAD), Off: elfData, Paddr: 16 * mib, Filesz: 4096, Memsz: 4096},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Off: elfData + 4096, Paddr: 17 * mib, Filesz: 4096, Memsz: 1 * mib},
		elf.Prog64{Type: uint32(elf.PT_NOTE), Off: elfData + 8192, Filesz: uint64(len(pvhNote)), Memsz: uint64(len(pvhNote)), Align: 4},
	)
}

// dirt fills RAM as a guest does that is about to be booted again.
func dirt(ram *memory.RAM) {
	for _, r := range ram.Regions() {
		for i := range r.Bytes {
			r.Bytes[i] = 0xa5
		}
	}
}

func TestLoadBzImage(t *testing.T) {
	ram := newRAM(t, 64*mib)
	dirt(ram)
	code, initrd := pattern(1*mib, 2), pattern(5*mib+3, 3)
	rd := fileOf("rd", initrd)
	const cmdline = "console=ttyS0 quiet"
	entry, err := Load(ram, Config{Kernel: fileOf("k", bzImage(code)), Initrd: &rd, Cmdline: cmdline, CPUs: 2})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Entry{Linux64, 16*mib + 0x200, addrBootParams}); entry != want {
		t.Errorf("entry = %+v; want %+v", entry, want)
	}
	if !bytes.Equal(peek(t, ram, 16*mib, 1*mib), code) {
		t.Error("the code in memory is not the file's")
	}
	le := binary.LittleEndian
	p := peek(t, ram, uint64(addrBootParams), bootParamsSize)
	start := uint64(le.Uint32(p[hdrRamdiskImage:]))
	if want := uint64(64*mib-len(initrd)) &^ 4095; start != want || le.Uint32(p[hdrRamdiskSize:]) != uint32(len(initrd)) {
		t.Errorf("initrd at %#x+%#x; want %#x+%#x", start, le.Uint32(p[hdrRamdiskSize:]), want, len(initrd))
	}
	if !bytes.Equal(peek(t, ram, start, uint64(len(initrd))), initrd) {
		t.Error("the initrd in memory is not the file's")
	}
	if got := peek(t, ram, uint64(le.Uint32(p[hdrCmdLinePtr:])), uint64(len(cmdline)+1)); string(got) != cmdline+"\x00" {
		t.Errorf("command line %q; want %q", got, cmdline)
	}
	if got := peek(t, ram, le.Uint64(p[bpACPIRSDP:]), 8); string(got) != "RSD PTR " {
		t.Errorf("at the RSDP's address is %q", got)
	}
	findTables(t, peek(t, ram, uint64(addrACPI), uint64(addrHigh-addrACPI)))
	if string(p[hdrMagic:hdrMagic+4]) != "HdrS" || p[hdrTypeOfLoader] != 0xff || le.Uint32(p[hdrCode32Start:]) != 16*mib {
		t.Errorf("header % x, type of loader %#x, code32_start %#x", p[hdrMagic:hdrMagic+4], p[hdrTypeOfLoader], le.Uint32(p[hdrCode32Start:]))
	}
	// What is not the header is zero; above all the sentinel at 1ef.
	if !bytes.Equal(p[0x1ef:0x1f1], []byte{0, 0}) || !bytes.Equal(p[0:0x70], make([]byte, 0x70)) || p[0x26c] != 0 {
		t.Error("boot_params has bytes that nobody put there")
	}
	n := int(p[bpE820Entries])
	for i, r := range memoryMap(ram.Regions()) {
		e := p[bpE820Table+20*i:]
		if got := (memoryRange{le.Uint64(e), le.Uint64(e[8:]), le.Uint32(e[16:])}); i >= n || got != r {
			t.Errorf("e820 entry %d of %d = %+v; want %+v", i, n, got, r)
		}
	}
}

func TestLoadELF(t *testing.T) {
	ram := newRAM(t, 64*mib)
	dirt(ram)
	initrd := pattern(100_000, 3)
	rd := fileOf("rd", initrd)
	file := smallELF()
	entry, err := Load(ram, Config{Kernel: fileOf("k", file), Initrd: &rd, Cmdline: "quiet", CPUs: 1})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Entry{PVH, 16*mib + 0x10, addrStartInfo}); entry != want {
		t.Errorf("entry = %+v; want %+v", entry, want)
	}
	if !bytes.Equal(peek(t, ram, 16*mib, 4096), file[elfData:elfData+4096]) || !bytes.Equal(peek(t, ram, 17*mib, 4096), file[elfData+4096:elfData+8192]) {
		t.Error("the segments in memory are not the file's")
	}
	if bss := peek(t, ram, 17*mib+4096, 1*mib-4096); !bytes.Equal(bss, make([]byte, len(bss))) {
		t.Error("the bss is not zero")
	}
	le := binary.LittleEndian
	info := peek(t, ram, uint64(addrStartInfo), 56)
	if le.Uint32(info) != 0x336ec578 || le.Uint32(info[4:]) != 1 || le.Uint32(info[12:]) != 1 {
		t.Errorf("start info % x", info[:16])
	}
	module := peek(t, ram, le.Uint64(info[16:]), 32)
	if got := peek(t, ram, le.Uint64(module), le.Uint64(module[8:])); !bytes.Equal(got, initrd) {
		t.Error("the module is not the initrd")
	}
	if got := peek(t, ram, le.Uint64(info[24:]), 6); string(got) != "quiet\x00" {
		t.Errorf("command line %q", got)
	}
	if got := peek(t, ram, le.Uint64(info[32:]), 8); string(got) != "RSD PTR " {
		t.Errorf("at the RSDP's address is %q", got)
	}
	for i, r := range memoryMap(ram.Regions()) {
		e := peek(t, ram, le.Uint64(info[40:])+24*uint64(i), 24)
		if got := (memoryRange{le.Uint64(e), le.Uint64(e[8:]), le.Uint32(e[16:])}); i >= int(le.Uint32(info[48:])) || got != r {
			t.Errorf("memory map entry %d = %+v; want %+v", i, got, r)
		}
	}
	if _, err := Load(ram, Config{Kernel: fileOf("k", file), CPUs: 1}); err != nil {
		t.Fatal(err)
	}
	if info := peek(t, ram, uint64(addrStartInfo), 56); le.Uint32(info[12:]) != 0 {
		t.Error("a module without an initrd")
	}
}

// The registers are what each protocol asks for.
func TestEntryRegisters(t *testing.T) {
	garbage := kvm.Sregs2{CR0: 1 << 31, CR3: 1, CR4: 1 << 5, EFER: 1 << 8}
	for _, test := range []struct {
		entry         Entry
		rsi, rbx, cr0 uint64
		cr3, cr4      uint64
		efer          uint64
		cs, ds        uint64 // descriptors
	}{
		{Entry{Linux64, 0x1000200, 0x7000}, 0x7000, 0, 0x80000011, 0x9000, 0x20, 0x500, 0x00af9b000000ffff, 0x00cf93000000ffff},
		{Entry{PVH, 0x1000010, 0x6000}, 0, 0x6000, 0x11, 0, 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff},
	} {
		r, s := kvm.Regs{RAX: 1, RDX: 0x600, RFlags: 0x202}, garbage
		test.entry.Set(&r, &s)
		if want := (kvm.Regs{RIP: uint64(test.entry.IP), RSI: test.rsi, RBX: test.rbx, RFlags: 2}); r != want {
			t.Errorf("%v: registers %+v; want %+v", test.entry.Protocol, r, want)
		}
		if s.CR0 != test.cr0 || s.CR3 != test.cr3 || s.CR4 != test.cr4 || s.EFER != test.efer {
			t.Errorf("%v: CR0 %#x CR3 %#x CR4 %#x EFER %#x; want %#x %#x %#x %#x", test.entry.Protocol, s.CR0, s.CR3, s.CR4, s.EFER, test.cr0, test.cr3, test.cr4, test.efer)
		}
		// A segment register is what loading its selector from the GDT gives.
		table := gdt()
		for name, seg := range map[string]struct {
			kvm.Segment
			want uint64
		}{"CS": {s.CS, test.cs}, "DS": {s.DS, test.ds}, "ES": {s.ES, test.ds}, "SS": {s.SS, test.ds}, "TR": {s.TR, 0x00008b0000000067}} {
			got := binary.LittleEndian.Uint64(table[seg.Selector:])
			if got != seg.want || descriptor(seg.Segment) != got {
				t.Errorf("%v: %s is %#x by its hidden part, %#x in the GDT; want %#x", test.entry.Protocol, name, descriptor(seg.Segment), got, seg.want)
			}
		}
		if s.GDT.Base != uint64(addrGDT) || int(s.GDT.Limit) != len(table)-1 {
			t.Errorf("%v: GDT %#x+%#x", test.entry.Protocol, s.GDT.Base, s.GDT.Limit)
		}
	}
}

// descriptor is the 8 bytes in a GDT that make a segment register.
func descriptor(s kvm.Segment) uint64 {
	limit := uint64(s.Limit)
	if s.G != 0 {
		limit >>= 12
	}
	flags := uint64(s.Type) | uint64(s.S)<<4 | uint64(s.DPL)<<5 | uint64(s.Present)<<7 |
		uint64(s.Avl)<<12 | uint64(s.L)<<13 | uint64(s.DB)<<14 | uint64(s.G)<<15
	return limit&0xffff | s.Base&0xffffff<<16 | flags<<40 | limit>>16<<48 | s.Base>>24<<56
}

// Page tables map each address below 4 GiB to itself.
func TestIdentityMap(t *testing.T) {
	const base = uint64(addrPageTables)
	tables := identityMap(base)
	next := func(at, index uint64) uint64 {
		e := binary.LittleEndian.Uint64(tables[at-base+8*index:])
		if e&0x23 != 0x23 {
			t.Fatalf("entry %d of the table at %#x = %#x; want it present, writable, accessed", index, at, e)
		}
		return e
	}
	for addr := uint64(0); addr < 4<<30; addr += 2 * mib {
		e := next(base, addr>>39)
		e = next(e&^0xfff, addr>>30&511)
		e = next(e&^0xfff, addr>>21&511)
		if e&^0xfff != addr || e&0xc0 != 0xc0 {
			t.Fatalf("%#x is mapped by %#x", addr, e)
		}
	}
}

func TestLoadPlacesTheInitrd(t *testing.T) {
	kernel := bzImage(make([]byte, 4096))
	for _, test := range []struct {
		name string
		ram  uint64
		max  uint32 // initrd_addr_max
		size int
		want uint64 // 0: it does not fit
	}{
		{"end of RAM", 64 * mib, 0x7fffffff, 4096, 64*mib - 4096},
		{"not page-sized", 64 * mib, 0x7fffffff, 4097, 64*mib - 8192},
		{"below the kernel's limit", 64 * mib, 40*mib - 1, 4096, 40*mib - 4096},
		{"limit within a page", 64 * mib, 40*mib + 10, 4096, 40*mib - 4096},
		{"just fits", 64 * mib, 0xffffffff, 44 * mib, 20 * mib},
		{"one byte too much", 64 * mib, 0xffffffff, 44*mib + 1, 0},
		{"larger than memory", 64 * mib, 0xffffffff, 65 * mib, 0},
		{"limit below the kernel", 64 * mib, mib, 4096, 0},
	} {
		ram := newRAM(t, test.ram)
		rd := File{Name: "rd.img", Data: zeroes{}, Size: int64(test.size)}
		_, err := Load(ram, Config{Kernel: fileOf("k", patched(kernel, hdrInitrdAddrMax, test.max)), Initrd: &rd, CPUs: 1})
		p := peek(t, ram, uint64(addrBootParams), bootParamsSize)
		got := uint64(binary.LittleEndian.Uint32(p[hdrRamdiskImage:]))
		switch {
		case test.want == 0 && (err == nil || !strings.HasPrefix(err.Error(), "initrd rd.img: ")):
			t.Errorf("%s: Load() = %v; want an error that begins with \"initrd rd.img: \"", test.name, err)
		case test.want != 0 && (err != nil || got != test.want):
			t.Errorf("%s: initrd at %#x, %v; want %#x", test.name, got, err, test.want)
		}
	}
}

// A guest of more than 3 GiB has its initrd below the hole.
func TestLoadIntoABigGuest(t *testing.T) {
	ram := newRAM(t, 5<<30)
	rd := fileOf("rd", pattern(10_000, 1))
	for _, kernel := range [][]byte{patched(bzImage(make([]byte, 4096)), hdrInitrdAddrMax, uint32(0xffffffff)), smallELF()} {
		if _, err := Load(ram, Config{Kernel: fileOf("k", kernel), Initrd: &rd, CPUs: 1}); err != nil {
			t.Fatal(err)
		}
		if got := peek(t, ram, 3<<30-12288, 10_000); !bytes.Equal(got, pattern(10_000, 1)) {
			t.Error("no initrd below 3 GiB")
		}
	}
}

type zeroes struct{}

func (zeroes) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

type brokenFile struct{}

func (brokenFile) ReadAt([]byte, int64) (int, error) { return 0, errors.New("I/O error") }

func TestLoadRefuses(t *testing.T) {
	bz, vm := bzImage(pattern(64<<10, 1)), smallELF()
	const ph = 64 // of the first program header; Off is at 8, Paddr 24, Filesz 32, Memsz 40, Align 48
	noNote := patched(vm, ph+2*56, uint32(elf.PT_NULL))
	for _, test := range []struct {
		name    string
		kernel  []byte
		cmdline string
		ram     uint64
		want    string
	}{
		{"empty", nil, "", 0, "kernel k: not a kernel: an empty file, expected a bzImage or an ELF with a PVH note"},
		{"text", []byte("hello, world"), "", 0, "kernel k: not a kernel: a file that begins with 68 65 6c 6c 6f 2c 20 77, expected a bzImage or an ELF with a PVH note"},
		{"one byte", []byte{1}, "", 0, "kernel k: not a kernel: a file that begins with 01, expected a bzImage or an ELF with a PVH note"},
		{"gzip", []byte("\x1f\x8b\x08\x00"), "", 0, "kernel k: not a kernel: gzip data, expected a bzImage or an ELF with a PVH note"},
		{"cpio", []byte("070701000"), "", 0, "kernel k: not a kernel: a cpio archive (an initrd?), expected a bzImage or an ELF with a PVH note"},
		{"arm64", append(append([]byte("MZ"), make([]byte, 54)...), "ARM\x64"...), "", 0, "kernel k: not a kernel: an arm64 kernel, expected a bzImage or an ELF with a PVH note"},
		{"EFI program", append([]byte("MZ"), make([]byte, 1000)...), "", 0, "kernel k: not a kernel: an EFI program without the Linux boot protocol, expected a bzImage or an ELF with a PVH note"},
		{"disk image", patched(make([]byte, 4096), 510, uint16(0xaa55)), "", 0, "kernel k: not a kernel: a disk image with a boot sector, expected a bzImage or an ELF with a PVH note"},

		{"bzImage cut in the header", bz[:0x240], "", 0, "kernel k: truncated: a bzImage of 576 bytes"},
		{"bzImage cut in the code", bz[:len(bz)-100], "", 0, "kernel k: truncated: the file ends at byte 67996, 100 more are needed"},
		{"bzImage, 32 bits", patched(bz, hdrXLoadFlags, uint16(0)), "", 0, "kernel k: not a kernel for this machine: a bzImage without a 64-bit entry (32-bit, or older than Linux 3.8; its boot protocol is 2.15)"},
		{"bzImage, old", patched(bz, hdrVersion, uint16(0x20b)), "", 0, "kernel k: not a kernel for this machine: a bzImage without a 64-bit entry (32-bit, or older than Linux 3.8; its boot protocol is 2.11)"},
		{"zImage", patched(bz, hdrLoadFlags, uint8(0)), "", 0, "kernel k: not a kernel for this machine: a zImage, expected a bzImage or an ELF with a PVH note"},
		{"bzImage, short header", patched(bz, hdrJump+1, uint8(0x30)), "", 0, "kernel k: corrupt: its setup header ends at 0x232, not at 0x264 or above"},
		{"bzImage without code", patched(bz, hdrSysSize, uint32(32)), "", 0, "kernel k: corrupt: it says that it has 512 bytes of code"},
		{"bzImage, 64 GiB of code", patched(bz, hdrSysSize, ^uint32(0)), "", 0, "kernel k: it needs 68719476720 bytes at 0x1000000, but the guest's memory ends at 0x2000000: give it more"},
		{"bzImage at 0", patched(bz, hdrPrefAddress, uint64(0)), "", 0, "kernel k: it wants to be at 0x0, below 1 MiB"},
		{"bzImage beyond everything", patched(bz, hdrPrefAddress, ^uint64(0)), "", 0, "kernel k: it needs 4194304 bytes at 0xffffffffffffffff, but the guest's memory ends at 0x2000000: give it more"},
		{"bzImage in little memory", bz, "", 18 * mib, "kernel k: it needs 4194304 bytes at 0x1000000, but the guest's memory ends at 0x1200000: give it more"},
		{"bzImage in a page", bz, "", 4096, "kernel k: it needs 4194304 bytes at 0x1000000, but the guest's memory ends at 0x1000: give it more"},

		{"ELF, 20 bytes", vm[:20], "", 0, "kernel k: not a kernel: an ELF of 20 bytes, expected a bzImage or an ELF with a PVH note"},
		{"ELF, 32 bits", patched(vm, elf.EI_CLASS, uint8(elf.ELFCLASS32)), "", 0, "kernel k: not a kernel: an ELF of ELFCLASS32, ELFDATA2LSB, expected a bzImage or an ELF with a PVH note of 64 bits"},
		{"ELF, big-endian", patched(vm, elf.EI_DATA, uint8(elf.ELFDATA2MSB)), "", 0, "kernel k: not a kernel: an ELF of ELFCLASS64, ELFDATA2MSB, expected a bzImage or an ELF with a PVH note of 64 bits"},
		{"ELF, arm", patched(vm, 18, uint16(elf.EM_AARCH64)), "", 0, "kernel k: not a kernel: an ELF for EM_AARCH64, expected a bzImage or an ELF with a PVH note for x86-64"},
		{"ELF, object", patched(vm, 16, uint16(elf.ET_REL)), "", 0, "kernel k: not a kernel: an ELF of type ET_REL, expected a bzImage or an ELF with a PVH note"},
		{"ELF without a note", noNote, "", 0, "kernel k: not a kernel: an ELF without a PVH note (CONFIG_PVH), expected a bzImage or an ELF with one"},
		{"ELF, no program headers", patched(vm, 56, uint16(0)), "", 0, "kernel k: corrupt: an ELF with 0 program headers of 56 bytes; 1 to 64 of 56 bytes are understood"},
		{"ELF, many program headers", patched(vm, 56, ^uint16(0)), "", 0, "kernel k: corrupt: an ELF with 65535 program headers of 56 bytes; 1 to 64 of 56 bytes are understood"},
		{"ELF, program headers nowhere", patched(vm, 32, ^uint64(0)), "", 0, fmt.Sprintf("kernel k: truncated: its program headers are at 18446744073709551615, the file ends at %d", len(vm))},
		{"ELF, program headers at the end", patched(vm, 32, uint64(len(vm)-10)), "", 0, fmt.Sprintf("kernel k: truncated: the file ends at byte %d, 158 more are needed", len(vm))},
		{"ELF, segment cut", patched(vm, ph+56+32, uint64(mib)), "", 0, fmt.Sprintf("kernel k: truncated: a segment has 1048576 bytes at 8192, the file ends at %d", len(vm))},
		{"ELF, segment wraps", patched(vm, ph+8, ^uint64(0)), "", 0, fmt.Sprintf("kernel k: truncated: a segment has 4096 bytes at 18446744073709551615, the file ends at %d", len(vm))},
		{"ELF, file larger than memory", patched(vm, ph+40, uint64(100)), "", 0, "kernel k: corrupt: a segment has 4096 bytes in the file and 100 in memory"},
		{"ELF, segments overlap", patched(vm, ph+24, uint64(17*mib+4096)), "", 0, "kernel k: corrupt: the segment at 0x1101000 begins before the one below it ends, at 0x1200000"},
		{"ELF at 0", patched(vm, ph+24, uint64(0)), "", 0, "kernel k: it wants to be at 0x0, below 1 MiB"},
		{"ELF, huge bss", patched(vm, ph+56+40, uint64(1)<<63), "", 0, "kernel k: it needs 9223372036854775808 bytes at 0x1100000, but the guest's memory ends at 0x2000000: give it more"},
		{"ELF, nothing to load", patched(patched(vm, ph, uint32(0)), ph+56, uint32(0)), "", 0, "kernel k: corrupt: an ELF with nothing to load"},
		{"ELF, entry elsewhere", patched(vm, elfData+8192+len(pvhNote)-8, uint64(mib)), "", 0, "kernel k: corrupt: its PVH entry 0x100000 is not in its segments, 0x1000000 to 0x1200000"},
		{"ELF, many notes", append(patched(vm, ph+2*56+32, uint64(maxNotes+1)), make([]byte, maxNotes)...), "", 0, "kernel k: ELF with 65537 bytes of notes: at most 65536 are understood"},
		{"ELF, notes cut", patched(vm, ph+2*56+32, uint64(1000)), "", 0, "kernel k: truncated: a segment has 1000 bytes at 12288, the file ends at 12336"},
		{"ELF, note too long", patched(vm, elfData+8192+4, ^uint32(0)), "", 0, "kernel k: corrupt: an ELF note ends 4294967267 bytes behind its segment"},
		{"ELF, odd alignment", patched(vm, ph+2*56+48, uint64(16)), "", 0, "kernel k: ELF notes aligned to 16: 4 and 8 are understood"},

		{"command line too long", bz, strings.Repeat("x", 2048), 0, "kernel command line: 2048 bytes, but this kernel takes no more than 2047"},
		{"command line too long for PVH", vm, strings.Repeat("x", 2048), 0, "kernel command line: 2048 bytes, but this kernel takes no more than 2047"},
		{"command line of a kernel that lies", patched(bz, hdrCmdlineSize, ^uint32(0)), strings.Repeat("x", 65536), 0, "kernel command line: 65536 bytes, but this kernel takes no more than 65535"},
		{"command line with a NUL", bz, "quiet\x00", 0, "kernel command line: NUL character at position 5"},
	} {
		if test.ram == 0 {
			test.ram = 32 * mib
		}
		entry, err := Load(newRAM(t, test.ram), Config{Kernel: fileOf("k", test.kernel), Cmdline: test.cmdline, CPUs: 1})
		if err == nil || err.Error() != test.want || entry != (Entry{}) {
			t.Errorf("%s: Load() = %v, %v\nwant %s", test.name, entry, err, test.want)
		}
	}

	ram := newRAM(t, 32*mib)
	for _, cpus := range []int{-1, 0, MaxCPUs + 1} {
		if _, err := Load(ram, Config{Kernel: fileOf("k", bz), CPUs: cpus}); err == nil {
			t.Errorf("Load() with %d vCPUs succeeded", cpus)
		}
	}
	if _, err := Load(ram, Config{Kernel: File{"k", brokenFile{}, 1000}, CPUs: 1}); err == nil || err.Error() != "kernel k: read 1000 bytes at 0: I/O error" {
		t.Errorf("Load() of a broken file = %v", err)
	}
	// A file that became shorter since its size was asked.
	short := File{"rd", bytes.NewReader(make([]byte, 10)), 20}
	if _, err := Load(ram, Config{Kernel: fileOf("k", bz), Initrd: &short, CPUs: 1}); err == nil || err.Error() != "initrd rd: truncated: the file ends at byte 10, 10 more are needed" {
		t.Errorf("Load() of a shorter initrd = %v", err)
	}
}

func TestFindEntry(t *testing.T) {
	// With 8-byte alignment the descriptor begins at a multiple of 8.
	eight := []byte{4, 0, 0, 0, 8, 0, 0, 0, noteEntry, 0, 0, 0, 'X', 'e', 'n', 0, 1, 2, 3, 4, 0, 0, 0, 0}
	nine := append([]byte{6, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 'L', 'i', 'n', 'u', 'x', 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0}, eight...)
	for _, test := range []struct {
		name  string
		notes []byte
		align uint64
		want  uint64
		ok    bool
	}{
		{"none", nil, 4, 0, true},
		{"behind others", pvhNote, 4, 0x1000010, true},
		{"4 bytes", note("Xen\x00", noteEntry, []byte{1, 0, 0, 0}), 4, 1, true},
		{"another's", note("Lin\x00", noteEntry, []byte{1, 0, 0, 0}), 4, 0, true},
		{"name without NUL", note("Xen", noteEntry, []byte{1, 0, 0, 0}), 4, 0, true},
		{"2 bytes", note("Xen\x00", noteEntry, []byte{1, 0}), 4, 0, false},
		{"aligned to 8", eight, 8, 0x04030201, true},
		{"aligned to 8, second", nine, 8, 0x04030201, true},
		{"a rest", append(bytes.Clone(pvhNote), 1, 2, 3), 4, 0x1000010, true},
		{"a rest alone", []byte{1, 2, 3}, 4, 0, true},
	} {
		got, err := findEntry(test.notes, test.align)
		if got != test.want || (err == nil) != test.ok {
			t.Errorf("%s: findEntry() = %#x, %v; want %#x, %v", test.name, got, err, test.want, test.ok)
		}
	}
}

// What was written is marked, whatever kind of kernel it is.
func TestLoadMarksDirty(t *testing.T) {
	for _, kernel := range [][]byte{bzImage(pattern(64<<10, 1)), smallELF()} {
		ram := newRAM(t, 32*mib)
		rd := fileOf("rd", pattern(5000, 9))
		if _, err := Load(ram, Config{Kernel: fileOf("k", kernel), Initrd: &rd, Cmdline: "x", CPUs: 1}); err != nil {
			t.Fatal(err)
		}
		dirty := make([]uint64, ram.Dirty().Words())
		ram.Dirty().Swap(dirty)
		b := ram.Regions()[0].Bytes
		zero := make([]byte, memory.PageSize)
		for page := range len(b) / memory.PageSize {
			if dirty[page/64]>>(page%64)&1 == 0 && !bytes.Equal(b[page*memory.PageSize:][:memory.PageSize], zero) {
				t.Errorf("page %#x was written and not marked", page*memory.PageSize)
			}
		}
	}
}

// The kernels that distributions ship. The paths come from the environment:
// the test machine unpacks them.
func TestLoadRealKernels(t *testing.T) {
	for _, test := range []struct {
		env      string
		protocol Protocol
	}{{"VMM_TEST_BZIMAGE", Linux64}, {"VMM_TEST_VMLINUX", PVH}} {
		t.Run(test.env, func(t *testing.T) {
			path := os.Getenv(test.env)
			if path == "" {
				t.Skip(test.env + " is not set")
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			ram := newRAM(t, 256*mib)
			rd := fileOf("rd", pattern(8*mib, 1))
			entry, err := Load(ram, Config{Kernel: File{path, f, info.Size()}, Initrd: &rd, Cmdline: "console=ttyS0", CPUs: 4})
			if err != nil {
				t.Fatal(err)
			}
			if entry.Protocol != test.protocol {
				t.Errorf("protocol %v; want %v", entry.Protocol, test.protocol)
			}
			t.Logf("entry %+v, first bytes % x", entry, peek(t, ram, uint64(entry.IP), 8))
		})
	}
}

// FuzzLoad takes any file for a kernel: an error or an entry into what was
// loaded, nothing else.
func FuzzLoad(f *testing.F) {
	f.Add(bzImage(pattern(1024, 1)), uint32(1000), "quiet")
	f.Add(smallELF(), uint32(0), "")
	f.Add(smallELF()[:200], uint32(1<<31), strings.Repeat("x", 3000))
	f.Add(patched(bzImage(make([]byte, 1024)), hdrPrefAddress, uint64(mib)), uint32(5000), "a\x00b")
	ram := newRAM(f, 24*mib)
	f.Fuzz(func(t *testing.T, kernel []byte, initrd uint32, cmdline string) {
		rd := File{"rd", zeroes{}, int64(initrd)}
		entry, err := Load(ram, Config{Kernel: fileOf("k", kernel), Initrd: &rd, Cmdline: cmdline, CPUs: 1})
		switch {
		case err != nil && entry != Entry{}:
			t.Fatalf("Load() = %+v and %v", entry, err)
		case err == nil && (entry.IP < addrHigh || entry.IP >= 24*mib):
			t.Fatalf("entry at %v", entry.IP)
		case err != nil && strings.Contains(err.Error(), "\n"):
			t.Fatalf("error of several lines: %q", err)
		}
	})
}
