package kvm

import (
	"encoding/binary"

	"vmm/memory"
)

// PageTablesSize is the room that PageTables takes, in bytes.
const PageTablesSize = 3 * PageSize

// PageTables writes page tables for 64-bit mode into tables, which is the guest's
// memory at gpa: the first GiB of virtual addresses is the first GiB of the
// guest's, in pages of 2 MiB, for supervisor code only. gpa is what LongMode takes.
// The accessed and dirty bits are set already, so that no processor need write them.
func PageTables(tables []byte, gpa memory.GPA) {
	const (
		table = 1<<0 | 1<<1 | 1<<5 // present, writable, accessed
		page  = table | 1<<6 | 1<<7
	)
	clear(tables[:PageTablesSize])
	binary.LittleEndian.PutUint64(tables, uint64(gpa+PageSize)|table)
	binary.LittleEndian.PutUint64(tables[PageSize:], uint64(gpa+2*PageSize)|table)
	for i := range 512 {
		binary.LittleEndian.PutUint64(tables[2*PageSize+8*i:], uint64(i)<<21|page)
	}
}

// LongMode changes s, a vCPU's registers after reset, to flat 64-bit supervisor mode
// with paging by the tables at cr3. The selectors are those of the Linux boot
// protocol, 0x10 for code and 0x18 for data; a guest that loads a segment or takes an
// interrupt needs a GDT that has them.
func (s *Sregs2) LongMode(cr3 memory.GPA) {
	const (
		cr0PE, cr0ET, cr0PG = 1 << 0, 1 << 4, 1 << 31
		cr4PAE              = 1 << 5
		eferLME, eferLMA    = 1 << 8, 1 << 10
	)
	// Types as the processor leaves them once a segment is in use, accessed bit
	// set: 11 is code that can be read, 3 data that can be written.
	code := Segment{Selector: 0x10, Limit: 0xffffffff, Type: 11, Present: 1, S: 1, L: 1, G: 1}
	data := Segment{Selector: 0x18, Limit: 0xffffffff, Type: 3, Present: 1, S: 1, DB: 1, G: 1}
	s.CS = code
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.CR0 = cr0PE | cr0ET | cr0PG
	s.CR3 = uint64(cr3)
	s.CR4 = cr4PAE
	s.EFER = eferLME | eferLMA
}
