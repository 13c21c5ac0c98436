package boot

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
)

// AML, the byte code of the DSDT, as far as ours needs it (ACPI 6.5, chapter
// 20). Each function returns one encoded term; nesting them nests the terms.

type aml []byte

func join(parts ...aml) aml { return slices.Concat(parts...) }

// amlPackage is an opcode with a length in front of what belongs to it. The
// length counts itself (20.2.4).
func amlPackage(opcode aml, parts ...aml) aml {
	body := join(parts...)
	n := len(body) + 1
	if n < 1<<6 {
		return join(opcode, aml{byte(n)}, body)
	}
	for extra := 1; ; extra++ {
		n = len(body) + 1 + extra
		if n < 1<<(4+8*extra) {
			length := aml{byte(extra<<6 | n&0xf)}
			for i := range extra {
				length = append(length, byte(n>>(4+8*i)))
			}
			return join(opcode, length, body)
		}
	}
}

// amlName is a name of up to four characters.
func amlName(s string) aml { return aml((s + "____")[:4]) }

func amlInteger(v uint64) aml {
	switch {
	case v <= 1:
		return aml{byte(v)} // Zero, One
	case v < 1<<8:
		return aml{0x0a, byte(v)}
	case v < 1<<16:
		return binary.LittleEndian.AppendUint16(aml{0x0b}, uint16(v))
	case v < 1<<32:
		return binary.LittleEndian.AppendUint32(aml{0x0c}, uint32(v))
	}
	return binary.LittleEndian.AppendUint64(aml{0x0e}, v)
}

func amlString(s string) aml { return append(append(aml{0x0d}, s...), 0) }

func amlBuffer(b []byte) aml {
	return amlPackage(aml{0x11}, amlInteger(uint64(len(b))), b)
}

func amlList(elements ...aml) aml {
	return amlPackage(aml{0x12}, aml{byte(len(elements))}, join(elements...))
}

// amlEISA is a hardware ID of three letters and four hexadecimal digits,
// packed into an integer (19.3.4).
func amlEISA(id string) aml {
	product, err := strconv.ParseUint(id[3:], 16, 16)
	if err != nil || len(id) != 7 {
		panic("EISA ID " + id) // the program's own text, no input
	}
	v := uint32(id[0]-'@')<<26 | uint32(id[1]-'@')<<21 | uint32(id[2]-'@')<<16 | uint32(product)
	return binary.BigEndian.AppendUint32(aml{0x0c}, v)
}

func define(name string, value aml) aml { return join(aml{0x08}, amlName(name), value) }

func scope(name string, body ...aml) aml {
	return amlPackage(aml{0x10}, amlName(name), join(body...))
}

func acpiDevice(name string, body ...aml) aml {
	return amlPackage(aml{0x5b, 0x82}, amlName(name), join(body...))
}

// method takes one caller at a time: it may create names.
func method(name string, args int, body ...aml) aml {
	const serialized = 1 << 3
	return amlPackage(aml{0x14}, amlName(name), aml{byte(args | serialized)}, join(body...))
}

func arg(n int) aml   { return aml{byte(0x68 + n)} }
func local(n int) aml { return aml{byte(0x60 + n)} }

func store(value, target aml) aml    { return join(aml{0x70}, value, target) }
func and(a, b, target aml) aml       { return join(aml{0x7b}, a, b, target) }
func or(a, b, target aml) aml        { return join(aml{0x7d}, a, b, target) }
func equal(a, b aml) aml             { return join(aml{0x93}, a, b) }
func not(a aml) aml                  { return join(aml{0x92}, a) }
func when(cond aml, then ...aml) aml { return amlPackage(aml{0xa0}, cond, join(then...)) }
func otherwise(then ...aml) aml      { return amlPackage(aml{0xa1}, join(then...)) }
func giveBack(value aml) aml         { return join(aml{0xa4}, value) }

// dwordField makes name stand for the 4 bytes at off of a buffer.
func dwordField(buffer aml, off uint64, name string) aml {
	return join(aml{0x8a}, buffer, amlInteger(off), amlName(name))
}

// uuid is ToUUID's buffer: the first three groups are little-endian (19.6.142).
func uuid(s string) aml {
	var a uint32
	var b, c, d uint16
	var e uint64
	if n, err := fmt.Sscanf(s, "%08x-%04x-%04x-%04x-%012x", &a, &b, &c, &d, &e); n != 5 || err != nil {
		panic("UUID " + s) // the program's own text, no input
	}
	p := binary.LittleEndian.AppendUint32(nil, a)
	p = binary.LittleEndian.AppendUint16(p, b)
	p = binary.LittleEndian.AppendUint16(p, c)
	p = binary.BigEndian.AppendUint16(p, d)
	return amlBuffer(append(p, binary.BigEndian.AppendUint64(nil, e)[2:]...))
}

// Resource descriptors (6.4) and the buffer that holds them.

func resources(descriptors ...aml) aml {
	return amlBuffer(append(join(descriptors...), 0x79, 0)) // end tag; 0 is "no checksum"
}

// portRange is I/O ports that a device has.
func portRange(start, n uint16) aml {
	const decode16 = 1
	d := aml{0x47, decode16}
	d = binary.LittleEndian.AppendUint16(d, start)
	d = binary.LittleEndian.AppendUint16(d, start)
	return append(d, 1, byte(n))
}

// isaIRQ is an interrupt line: edge-triggered, active high, not shared.
func isaIRQ(irq int) aml { return binary.LittleEndian.AppendUint16(aml{0x22}, 1<<irq) }

func fixedMemory(start, size uint32) aml {
	const writable = 1
	d := aml{0x86, 9, 0, writable}
	d = binary.LittleEndian.AppendUint32(d, start)
	return binary.LittleEndian.AppendUint32(d, size)
}

// Kinds of address space that a bridge hands on, and their type-specific
// flags.
const (
	spaceMemory, spaceMemoryFlags = 0, 1 // writable, not cacheable
	spaceIO, spaceIOFlags         = 1, 3 // all of it, no ISA aliases
	spaceBus, spaceBusFlags       = 2, 0

	// spaceFixed: a bridge's window (producer) with both ends fixed.
	spaceFixed = 1<<2 | 1<<3
)

func window16(kind, flags byte, first, last uint16) aml {
	d := aml{0x88, 13, 0, kind, spaceFixed, flags}
	for _, v := range [...]uint16{0, first, last, 0, last - first + 1} { // granularity, ends, translation, length
		d = binary.LittleEndian.AppendUint16(d, v)
	}
	return d
}

func window32(kind, flags byte, first, last uint32) aml {
	d := aml{0x87, 23, 0, kind, spaceFixed, flags}
	for _, v := range [...]uint32{0, first, last, 0, last - first + 1} {
		d = binary.LittleEndian.AppendUint32(d, v)
	}
	return d
}
