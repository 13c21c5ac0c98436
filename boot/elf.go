package boot

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"vmm/memory"
)

const (
	maxProgramHeaders = 64       // a vmlinux has 5
	maxNotes          = 64 << 10 // bytes in one note segment; a vmlinux has 512

	// noteEntry is XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit physical address of
	// the PVH entry (Xen's public/elfnote.h).
	noteEntry = 18

	// cmdlineLinux is what Linux keeps of its command line, without the NUL
	// (COMMAND_LINE_SIZE on x86). The PVH protocol states no limit.
	cmdlineLinux = 2047
)

func isELF(head []byte) bool { return bytes.HasPrefix(head, []byte(elf.ELFMAG)) }

func (l *loader) elf(f File, head []byte) (kernel, error) {
	progs, err := programHeaders(f, head)
	if err != nil {
		return kernel{}, err
	}
	entry, err := pvhEntry(f, progs)
	if err != nil {
		return kernel{}, err
	}
	start, end, err := l.segments(f, progs)
	if err != nil {
		return kernel{}, err
	}
	if entry < start || entry >= end {
		return kernel{}, fmt.Errorf("corrupt: its PVH entry %#x is not in its segments, %#x to %#x", entry, start, end)
	}
	return kernel{protocol: PVH, entry: entry, start: start, end: end, maxInitrd: 1<<32 - 1, maxCmdline: cmdlineLinux}, nil
}

// programHeaders reads the ELF header in head and the program headers that it
// leads to, and nothing else of the file: a kernel stripped of its sections
// boots as well.
func programHeaders(f File, head []byte) ([]elf.Prog64, error) {
	var h elf.Header64
	if len(head) < binary.Size(h) {
		return nil, fmt.Errorf("not a kernel: an ELF of %d bytes, %s", len(head), expected)
	}
	if class, data := elf.Class(head[elf.EI_CLASS]), elf.Data(head[elf.EI_DATA]); class != elf.ELFCLASS64 || data != elf.ELFDATA2LSB {
		return nil, fmt.Errorf("not a kernel: an ELF of %v, %v, %s of 64 bits", class, data, expected)
	}
	if _, err := binary.Decode(head, binary.LittleEndian, &h); err != nil {
		return nil, err
	}
	var prog elf.Prog64
	switch {
	case elf.Machine(h.Machine) != elf.EM_X86_64:
		return nil, fmt.Errorf("not a kernel: an ELF for %v, %s for x86-64", elf.Machine(h.Machine), expected)
	case elf.Type(h.Type) != elf.ET_EXEC && elf.Type(h.Type) != elf.ET_DYN:
		return nil, fmt.Errorf("not a kernel: an ELF of type %v, %s", elf.Type(h.Type), expected)
	case int(h.Phentsize) != binary.Size(prog) || h.Phnum == 0 || h.Phnum > maxProgramHeaders:
		return nil, fmt.Errorf("corrupt: an ELF with %d program headers of %d bytes; 1 to %d of %d bytes are understood", h.Phnum, h.Phentsize, maxProgramHeaders, binary.Size(prog))
	case h.Phoff > uint64(f.Size):
		return nil, fmt.Errorf("truncated: its program headers are at %d, the file ends at %d", h.Phoff, f.Size)
	}
	raw := make([]byte, int(h.Phnum)*binary.Size(prog))
	if err := readFull(f.Data, raw, int64(h.Phoff)); err != nil {
		return nil, err
	}
	progs := make([]elf.Prog64, h.Phnum)
	_, err := binary.Decode(raw, binary.LittleEndian, progs)
	return progs, err
}

// within refuses a part of the file that is not all there.
func within(f File, p elf.Prog64) error {
	if size := uint64(f.Size); p.Off > size || p.Filesz > size-p.Off {
		return fmt.Errorf("truncated: a segment has %d bytes at %d, the file ends at %d", p.Filesz, p.Off, size)
	}
	return nil
}

// pvhEntry finds the address of the PVH entry.
func pvhEntry(f File, progs []elf.Prog64) (uint64, error) {
	for _, p := range progs {
		if elf.ProgType(p.Type) != elf.PT_NOTE {
			continue
		}
		if err := within(f, p); err != nil {
			return 0, err
		}
		if p.Filesz > maxNotes {
			return 0, fmt.Errorf("ELF with %d bytes of notes: at most %d are understood", p.Filesz, maxNotes)
		}
		notes := make([]byte, p.Filesz)
		if err := readFull(f.Data, notes, int64(p.Off)); err != nil {
			return 0, err
		}
		entry, err := findEntry(notes, max(4, p.Align))
		if err != nil || entry != 0 {
			return entry, err
		}
	}
	return 0, errors.New("not a kernel: an ELF without a PVH note (CONFIG_PVH), expected a bzImage or an ELF with one")
}

// findEntry goes through notes, whose parts begin at multiples of align, 4 or
// 8. It returns 0 where none is the PVH entry.
func findEntry(notes []byte, align uint64) (uint64, error) {
	const header = 12 // sizes of name and descriptor, type: 4 bytes each
	if align != 4 && align != 8 {
		return 0, fmt.Errorf("ELF notes aligned to %d: 4 and 8 are understood", align)
	}
	up := func(n uint64) uint64 { return (n + align - 1) &^ (align - 1) }
	for pos, size := uint64(0), uint64(len(notes)); pos+header <= size; {
		le := binary.LittleEndian
		nameSize, descSize, kind := le.Uint32(notes[pos:]), le.Uint32(notes[pos+4:]), le.Uint32(notes[pos+8:])
		name := pos + header
		desc := up(name + uint64(nameSize)) // no overflow: the sizes have 32 bits
		end := desc + uint64(descSize)
		if end > size {
			return 0, fmt.Errorf("corrupt: an ELF note ends %d bytes behind its segment", end-size)
		}
		if kind == noteEntry && string(notes[name:name+uint64(nameSize)]) == "Xen\x00" {
			switch descSize {
			case 4:
				return uint64(le.Uint32(notes[desc:])), nil
			case 8:
				return le.Uint64(notes[desc:]), nil
			}
			return 0, fmt.Errorf("corrupt: its PVH entry has %d bytes", descSize)
		}
		pos = up(end)
	}
	return 0, nil
}

// segments loads the program and returns the addresses from its first byte to
// behind its last.
func (l *loader) segments(f File, progs []elf.Prog64) (start, end uint64, err error) {
	var load []elf.Prog64
	for _, p := range progs {
		if elf.ProgType(p.Type) == elf.PT_LOAD && p.Memsz > 0 {
			load = append(load, p)
		}
	}
	if len(load) == 0 {
		return 0, 0, errors.New("corrupt: an ELF with nothing to load")
	}
	slices.SortFunc(load, func(a, b elf.Prog64) int { return cmp.Compare(a.Paddr, b.Paddr) })
	start = load[0].Paddr
	for _, p := range load {
		if err := within(f, p); err != nil {
			return 0, 0, err
		}
		if p.Filesz > p.Memsz {
			return 0, 0, fmt.Errorf("corrupt: a segment has %d bytes in the file and %d in memory", p.Filesz, p.Memsz)
		}
		if err := l.fits(p.Paddr, p.Memsz); err != nil {
			return 0, 0, err
		}
		if p.Paddr < end {
			return 0, 0, fmt.Errorf("corrupt: the segment at %#x begins before the one below it ends, at %#x", p.Paddr, end)
		}
		b, err := l.view(memory.GPA(p.Paddr), p.Memsz)
		if err != nil {
			return 0, 0, err
		}
		if err := readFull(f.Data, b[:p.Filesz], int64(p.Off)); err != nil {
			return 0, 0, err
		}
		clear(b[p.Filesz:])
		end = p.Paddr + p.Memsz
	}
	return start, end, nil
}

// startInfo writes struct hvm_start_info, version 1, and the tables that it
// leads to.
func (l *loader) startInfo(initrd extent) (memory.GPA, error) {
	const magic, version = 0x336ec578, 1
	le := binary.LittleEndian
	var modules, memmap []byte
	if initrd.size > 0 {
		modules = le.AppendUint64(modules, initrd.start)
		modules = le.AppendUint64(modules, initrd.size)
		modules = append(modules, make([]byte, 16)...) // no command line; reserved
	}
	ranges := memoryMap(l.ram.Regions())
	for _, r := range ranges {
		memmap = le.AppendUint64(memmap, r.start)
		memmap = le.AppendUint64(memmap, r.size)
		memmap = le.AppendUint32(memmap, r.kind)
		memmap = le.AppendUint32(memmap, 0) // reserved
	}
	info := le.AppendUint32(nil, magic)
	info = le.AppendUint32(info, version)
	info = le.AppendUint32(info, 0) // flags
	info = le.AppendUint32(info, uint32(len(modules)/32))
	info = le.AppendUint64(info, uint64(addrModules))
	info = le.AppendUint64(info, uint64(addrCmdline))
	info = le.AppendUint64(info, uint64(addrACPI))
	info = le.AppendUint64(info, uint64(addrMemmap))
	info = le.AppendUint32(info, uint32(len(ranges)))
	info = le.AppendUint32(info, 0) // reserved
	for _, part := range []struct {
		gpa memory.GPA
		b   []byte
	}{{addrModules, modules}, {addrMemmap, memmap}, {addrStartInfo, info}} {
		if err := l.put(part.gpa, part.b, 0); err != nil {
			return 0, err
		}
	}
	return addrStartInfo, nil
}
