// Package boottest makes kernels of a few instructions, for tests of what runs
// guests. They work on every KVM, also on one that interprets guest code.
package boottest

import (
	"encoding/binary"
	"os"
)

// CodeAt is where a kernel's code is loaded and begins to run.
const CodeAt = 0x100000

// Endless is a guest that prints an exclamation mark and then turns round and
// round.
var Endless = []byte{
	0x66, 0xba, 0xf8, 0x03, 0xb0, '!', 0xee, // mov dx, COM1; mov al, '!'; out dx, al
	0xeb, 0xfe, // jmp .
}

// WriteKernel makes 32-bit code an ELF kernel with a PVH note (boot.Load).
func WriteKernel(path string, code []byte) error {
	const (
		programs = 64 // behind the header: two program headers
		note     = programs + 2*56
		noteSize = 20
		text     = (note + noteSize + 15) &^ 15
	)
	le := binary.LittleEndian
	file := make([]byte, text, text+len(code))
	copy(file, "\x7fELF\x02\x01\x01")
	le.PutUint16(file[16:], 2)  // executable
	le.PutUint16(file[18:], 62) // x86-64
	le.PutUint32(file[20:], 1)  // version
	le.PutUint64(file[24:], CodeAt)
	le.PutUint64(file[32:], programs)
	le.PutUint16(file[52:], 64)
	le.PutUint16(file[54:], 56)
	le.PutUint16(file[56:], 2)
	for i, h := range []struct {
		kind                  uint32
		offset, address, size uint64
	}{
		{1, text, CodeAt, uint64(len(code))}, // to be loaded
		{4, note, 0, noteSize},
	} {
		p := file[programs+56*i:]
		le.PutUint32(p, h.kind)
		le.PutUint32(p[4:], 5) // readable, executable
		le.PutUint64(p[8:], h.offset)
		le.PutUint64(p[16:], h.address)
		le.PutUint64(p[24:], h.address)
		le.PutUint64(p[32:], h.size)
		le.PutUint64(p[40:], h.size)
		le.PutUint64(p[48:], 4)
	}
	le.PutUint32(file[note:], 4)    // size of the name
	le.PutUint32(file[note+4:], 4)  // and of the entry
	le.PutUint32(file[note+8:], 18) // XEN_ELFNOTE_PHYS32_ENTRY
	copy(file[note+12:], "Xen")
	le.PutUint32(file[note+16:], CodeAt)
	return os.WriteFile(path, append(file, code...), 0o600)
}
