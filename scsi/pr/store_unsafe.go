package pr

import (
	"sync/atomic"
	"unsafe"
)

// word64 and word32 are the integers at offset at of a mapping, for atomic
// access by every process that maps the same file.
//
// A mapping begins at a page, and at is a multiple of the word's size inside
// it (layout constants of store_lock.go), so the word is aligned and in
// bounds. The mapping is outside Go's heap and is unmapped in Close, which
// comes after every other call. Other processes only access the words
// atomically, too.
func word64(mem []byte, at int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&mem[at : at+8][0]))
}

func word32(mem []byte, at int) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&mem[at : at+4][0]))
}
