package memory

// Go has no 16-bit atomics, and a virtqueue's ring indices are 16 bits beside
// fields that the other side owns, so a wider access would overwrite or tear
// the neighbour. These are single MOVs in assembly, which the compiler can
// neither split, merge nor move. On amd64 an aligned MOV is atomic, every load
// is an acquire and every store a release (Intel SDM 3A, 9.1.1 and 9.2.2);
// only a store followed by a load of another place may be seen out of order,
// and Fence stands between those.

// Load16 reads the first two bytes of b, little-endian, atomically, before any
// later memory access. b[0] is at an even address.
func Load16(b []byte) uint16 {
	_ = b[1]
	return load16(&b[0])
}

// Store16 writes v to the first two bytes of b, little-endian, atomically,
// after any earlier memory access. b[0] is at an even address.
func Store16(b []byte, v uint16) {
	_ = b[1]
	store16(&b[0], v)
}

// Fence makes every earlier store visible before any later load is done.
func Fence() { fence() }

//go:noescape
func load16(p *byte) uint16

//go:noescape
func store16(p *byte, v uint16)

//go:noescape
func fence()
