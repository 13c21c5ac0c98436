package boot

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"vmm/memory"
)

// File is a file to load.
type File struct {
	Name string // for messages
	Data io.ReaderAt
	Size int64 // bytes
}

// Config is what to boot.
type Config struct {
	Kernel  File
	Initrd  *File // nil for none
	Cmdline string
	CPUs    int // 1 to MaxCPUs; their local APIC IDs are 0 to CPUs-1
}

// MaxCPUs is how many vCPUs the ACPI tables can describe: local APIC IDs have
// 8 bits, and 255 is all of them.
const MaxCPUs = 254

// Load puts all of c into ram and returns how to enter the kernel. It may be
// called again to boot a guest once more; what it writes is marked dirty. An
// error says what is wrong with which file; memory is undefined then.
func Load(ram *memory.RAM, c Config) (Entry, error) {
	if c.CPUs < 1 || c.CPUs > MaxCPUs {
		return Entry{}, fmt.Errorf("%d vCPUs: give 1 to %d", c.CPUs, MaxCPUs)
	}
	l := &loader{ram: ram, top: uint64(ram.Regions()[0].End())}
	k, err := l.kernel(c.Kernel)
	if err != nil {
		return Entry{}, fmt.Errorf("kernel %s: %w", c.Kernel.Name, err)
	}
	initrd, err := l.initrd(c.Initrd, k)
	if err != nil {
		return Entry{}, fmt.Errorf("initrd %s: %w", c.Initrd.Name, err)
	}
	if err := l.cmdline(c.Cmdline, k.maxCmdline); err != nil {
		return Entry{}, fmt.Errorf("kernel command line: %w", err)
	}
	if err := l.put(addrACPI, acpiTables(c.CPUs), uint64(addrHigh-addrACPI)); err != nil {
		return Entry{}, fmt.Errorf("ACPI tables: %w", err)
	}
	if err := l.put(addrGDT, gdt(), 0); err != nil {
		return Entry{}, fmt.Errorf("GDT: %w", err)
	}
	entry := Entry{Protocol: k.protocol, IP: memory.GPA(k.entry)}
	if k.protocol == PVH {
		entry.Info, err = l.startInfo(initrd)
	} else {
		entry.Info, err = l.bootParams(k, initrd)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("boot information: %w", err)
	}
	return entry, nil
}

// kernel is what the rest of the loader needs to know of one that is in memory.
type kernel struct {
	protocol   Protocol
	entry      uint64 // address of its first instruction
	start, end uint64 // the memory that is its own from the start
	maxInitrd  uint64 // the highest address that the initrd may use
	maxCmdline uint64 // bytes, without the NUL
	header     []byte // bzImage: the setup header
}

func (l *loader) kernel(f File) (kernel, error) {
	head := make([]byte, max(min(f.Size, headSize), 0))
	if err := readFull(f.Data, head, 0); err != nil {
		return kernel{}, err
	}
	switch {
	case isBzImage(head):
		return l.bzImage(f, head)
	case isELF(head):
		return l.elf(f, head)
	}
	return kernel{}, fmt.Errorf("not a kernel: %s, %s", describe(head), expected)
}

// headSize is how much of a kernel's file tells what it is: it holds the
// bzImage's setup header and the ELF header.
const headSize = 4096

const expected = "expected a bzImage or an ELF with a PVH note"

// describe says what a file is that is no kernel, from its first bytes.
func describe(head []byte) string {
	if len(head) == 0 {
		return "an empty file"
	}
	for _, known := range []struct {
		magic string
		off   int
		name  string
	}{
		{"\x1f\x8b", 0, "gzip data"},
		{"\xfd7zXZ\x00", 0, "xz data"},
		{"\x28\xb5\x2f\xfd", 0, "zstd data"},
		{"\x02\x21\x4c\x18", 0, "lz4 data"},
		{"BZh", 0, "bzip2 data"},
		{"070701", 0, "a cpio archive (an initrd?)"},
		{"QFI\xfb", 0, "a qcow2 disk image"},
		{"ARM\x64", 56, "an arm64 kernel"},
		{"MZ", 0, "an EFI program without the Linux boot protocol"},
		{"#!", 0, "a script"},
		{"\x55\xaa", 510, "a disk image with a boot sector"},
	} {
		if len(head) >= known.off && strings.HasPrefix(string(head[known.off:]), known.magic) {
			return known.name
		}
	}
	return fmt.Sprintf("a file that begins with % x", head[:min(len(head), 8)])
}

// readFull fills p from off of f. A file that ends before is an error of its
// own: it was cut, or it lies about its sizes.
func readFull(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("truncated: the file ends at byte %d, %d more are needed", off+int64(n), len(p)-n)
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}

// loader writes into the RAM below the hole.
type loader struct {
	ram *memory.RAM
	top uint64 // where that RAM ends
}

// view is guest memory to write to, marked dirty already: no vCPU runs, and
// nobody collects marks while a guest is being loaded.
func (l *loader) view(gpa memory.GPA, n uint64) ([]byte, error) {
	b, err := l.ram.Slice(gpa, n)
	if err == nil {
		l.ram.MarkDirty(gpa, n)
	}
	return b, err
}

// put writes p at gpa and zeroes up to size bytes.
func (l *loader) put(gpa memory.GPA, p []byte, size uint64) error {
	b, err := l.view(gpa, max(size, uint64(len(p))))
	if err != nil {
		return err
	}
	clear(b[copy(b, p):])
	return nil
}

// cmdlineRoom is the memory for the command line, its NUL included.
const cmdlineRoom = 64 << 10

// cmdline writes the kernel's command line.
func (l *loader) cmdline(s string, limit uint64) error {
	limit = min(limit, cmdlineRoom-1)
	if uint64(len(s)) > limit {
		return fmt.Errorf("%d bytes, but this kernel takes no more than %d", len(s), limit)
	}
	if i := strings.IndexByte(s, 0); i >= 0 {
		return fmt.Errorf("NUL character at position %d", i)
	}
	return l.put(addrCmdline, []byte(s), uint64(len(s))+1)
}

// extent is a run of guest memory.
type extent struct{ start, size uint64 }

// initrd puts f as high as it may be, page-aligned. It is empty without f.
func (l *loader) initrd(f *File, k kernel) (extent, error) {
	if f == nil || f.Size <= 0 {
		return extent{}, nil
	}
	size, end := uint64(f.Size), min(l.top, k.maxInitrd+1)
	room := (end - min(end, k.end)) &^ (memory.PageSize - 1)
	start := (end - min(end, size)) &^ (memory.PageSize - 1)
	if size > room || start < k.end {
		return extent{}, fmt.Errorf("%d bytes do not fit into the %d of guest memory above the kernel that it may use: give the guest more", size, room)
	}
	b, err := l.view(memory.GPA(start), size)
	if err != nil {
		return extent{}, err
	}
	return extent{start, size}, readFull(f.Data, b, 0)
}

// fits refuses a kernel that is not within RAM above 1 MiB.
func (l *loader) fits(start, size uint64) error {
	switch {
	case start < uint64(addrHigh):
		return fmt.Errorf("it wants to be at %#x, below 1 MiB", start)
	case start > l.top || size > l.top-start:
		return fmt.Errorf("it needs %d bytes at %#x, but the guest's memory ends at %#x: give it more", size, start, l.top)
	}
	return nil
}

// Types of memory in the map that the kernel is given (ACPI 6.5, 15.1).
const (
	memoryRAM      = 1
	memoryReserved = 2
)

type memoryRange struct {
	start, size uint64
	kind        uint32
}

// memoryMap is what a BIOS answers to INT 15h, E820: all RAM, and what else
// the kernel must not use, in ascending order.
func memoryMap(regions []memory.Region) []memoryRange {
	low := uint64(regions[0].End())
	m := []memoryRange{
		{0, uint64(addrBIOS), memoryRAM},
		{uint64(addrBIOS), uint64(addrHigh - addrBIOS), memoryReserved},
		{uint64(addrHigh), low - uint64(addrHigh), memoryRAM},
		{uint64(ECAM), ECAMSize, memoryReserved},
		{uint64(IdentityMap), uint64(memory.HoleEnd - IdentityMap), memoryReserved},
	}
	for _, r := range regions[1:] {
		m = append(m, memoryRange{uint64(r.GPA), uint64(len(r.Bytes)), memoryRAM})
	}
	return m
}
