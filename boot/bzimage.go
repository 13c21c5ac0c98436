package boot

import (
	"encoding/binary"
	"fmt"

	"vmm/memory"
)

// The setup header: offsets in the file and, the same, in struct boot_params
// (boot protocol, "The Real-Mode Kernel Header").
const (
	hdrSetupSects    = 0x1f1 // 1 byte: size of the real-mode code in sectors, 0 means 4
	hdrSysSize       = 0x1f4 // 4: size of the protected-mode code in units of 16 bytes
	hdrVidMode       = 0x1fa // 2
	hdrBootFlag      = 0x1fe // 2: AA55
	hdrJump          = 0x200 // 2: a short jump over the header; its distance is at 201
	hdrMagic         = 0x202 // 4: "HdrS"
	hdrVersion       = 0x206 // 2
	hdrTypeOfLoader  = 0x210 // 1
	hdrLoadFlags     = 0x211 // 1
	hdrCode32Start   = 0x214 // 4
	hdrRamdiskImage  = 0x218 // 4
	hdrRamdiskSize   = 0x21c // 4
	hdrCmdLinePtr    = 0x228 // 4
	hdrInitrdAddrMax = 0x22c // 4: the highest address of the initrd's last byte
	hdrXLoadFlags    = 0x236 // 2
	hdrCmdlineSize   = 0x238 // 4: longest command line, without its NUL
	hdrPrefAddress   = 0x258 // 8: where the kernel wants to be
	hdrInitSize      = 0x260 // 4: memory that it needs there before it reads the memory map
	hdrMinEnd        = 0x264 // a header of protocol 2.12 is at least this long
	hdrMaxEnd        = 0x290 // what struct boot_params has room for

	// Of struct boot_params alone (boot protocol, "The zero page").
	bpACPIRSDP     = 0x070 // 8
	bpE820Entries  = 0x1e8 // 1
	bpE820Table    = 0x2d0 // 128 entries of 20 bytes
	bootParamsSize = 0x1000

	protocol212   = 0x020c
	loadedHigh    = 1 << 0 // hdrLoadFlags: the protected-mode code is above 1 MiB
	xlfKernel64   = 1 << 0 // hdrXLoadFlags: has a 64-bit entry
	entry64       = 0x200  // where that is in the code
	loaderUnknown = 0xff   // hdrTypeOfLoader: one without a number
	vidModeNormal = 0xffff // hdrVidMode
	sector        = 512
)

func isBzImage(head []byte) bool {
	return len(head) >= hdrVersion && string(head[hdrMagic:hdrMagic+4]) == "HdrS" &&
		binary.LittleEndian.Uint16(head[hdrBootFlag:]) == 0xaa55
}

func (l *loader) bzImage(f File, head []byte) (kernel, error) {
	if len(head) < hdrMaxEnd {
		return kernel{}, fmt.Errorf("truncated: a bzImage of %d bytes", len(head))
	}
	le := binary.LittleEndian
	version := le.Uint16(head[hdrVersion:])
	hdrEnd := hdrMagic + int(head[hdrJump+1])
	switch {
	case version < protocol212 || le.Uint16(head[hdrXLoadFlags:])&xlfKernel64 == 0:
		return kernel{}, fmt.Errorf("not a kernel for this machine: a bzImage without a 64-bit entry (32-bit, or older than Linux 3.8; its boot protocol is %d.%02d)", version>>8, version&0xff)
	case head[hdrLoadFlags]&loadedHigh == 0:
		return kernel{}, fmt.Errorf("not a kernel for this machine: a zImage, %s", expected)
	case hdrEnd < hdrMinEnd:
		return kernel{}, fmt.Errorf("corrupt: its setup header ends at %#x, not at %#x or above", hdrEnd, hdrMinEnd)
	}
	setup := int64(head[hdrSetupSects])
	if setup == 0 {
		setup = 4 // as boot loaders have always done
	}
	size := uint64(le.Uint32(head[hdrSysSize:])) * 16
	if size <= entry64 {
		return kernel{}, fmt.Errorf("corrupt: it says that it has %d bytes of code", size)
	}
	start := le.Uint64(head[hdrPrefAddress:])
	need := max(size, uint64(le.Uint32(head[hdrInitSize:])))
	if err := l.fits(start, need); err != nil {
		return kernel{}, err
	}
	code, err := l.view(memory.GPA(start), size)
	if err != nil {
		return kernel{}, err
	}
	return kernel{
		protocol: Linux64,
		entry:    start + entry64,
		start:    start, end: start + need,
		maxInitrd:  uint64(le.Uint32(head[hdrInitrdAddrMax:])),
		maxCmdline: uint64(le.Uint32(head[hdrCmdlineSize:])),
		header:     head[hdrSetupSects:min(hdrEnd, hdrMaxEnd)],
	}, readFull(f.Data, code, (setup+1)*sector)
}

// bootParams writes struct boot_params, the zero page, and the page tables.
func (l *loader) bootParams(k kernel, initrd extent) (memory.GPA, error) {
	le := binary.LittleEndian
	p := make([]byte, bootParamsSize)
	copy(p[hdrSetupSects:], k.header)
	p[hdrTypeOfLoader] = loaderUnknown
	le.PutUint16(p[hdrVidMode:], vidModeNormal)
	le.PutUint32(p[hdrCode32Start:], uint32(k.start))
	le.PutUint32(p[hdrRamdiskImage:], uint32(initrd.start))
	le.PutUint32(p[hdrRamdiskSize:], uint32(initrd.size))
	le.PutUint32(p[hdrCmdLinePtr:], uint32(addrCmdline))
	le.PutUint64(p[bpACPIRSDP:], uint64(addrACPI))
	e820 := p[bpE820Table:bpE820Table]
	for _, r := range memoryMap(l.ram.Regions()) {
		e820 = le.AppendUint64(e820, r.start)
		e820 = le.AppendUint64(e820, r.size)
		e820 = le.AppendUint32(e820, r.kind)
		p[bpE820Entries]++
	}
	if err := l.put(addrPageTables, identityMap(uint64(addrPageTables)), 0); err != nil {
		return 0, err
	}
	return addrBootParams, l.put(addrBootParams, p, 0)
}

// identityMap is page tables for the first 4 GiB, to be put at base: the boot
// protocol wants the kernel, its parameters and the initrd mapped, and all of
// them are there. The accessed and dirty bits are set, as those of the GDT.
func identityMap(base uint64) []byte {
	const (
		gib     = 4
		entries = 512
		table   = 1<<0 | 1<<1 | 1<<5  // present, writable, accessed
		page    = table | 1<<6 | 1<<7 // dirty, 2 MiB
		tables  = (2 + gib) * memory.PageSize
	)
	p := make([]byte, tables)
	le := binary.LittleEndian
	le.PutUint64(p, base+memory.PageSize|table)
	for i := range uint64(gib) {
		le.PutUint64(p[memory.PageSize+8*i:], base+(2+i)*memory.PageSize|table)
	}
	for i := range uint64(gib * entries) {
		le.PutUint64(p[2*memory.PageSize+8*i:], i<<21|page)
	}
	return p
}
