package memory

import (
	"errors"
	"os"
	"sync/atomic"
)

// Bitmap is a set of page numbers that many goroutines add to while another
// takes what has gathered.
type Bitmap struct {
	pages uint64
	words []atomic.Uint64
}

// NewBitmap makes an empty set of the pages 0 to pages-1.
func NewBitmap(pages uint64) Bitmap {
	return Bitmap{pages: pages, words: make([]atomic.Uint64, (pages+63)/64)}
}

// Set adds the pages first to end-1.
func (b *Bitmap) Set(first, end uint64) {
	for first < end {
		word, bit := first/64, first%64
		n := min(64-bit, end-first)
		mask := ^uint64(0) >> (64 - n) << bit
		// Always the locked OR, even where the bits are set already: it also
		// makes the write that it stands for visible first. A plain load could
		// be done before that write leaves the store buffer, find the bit that
		// Swap is about to take, and leave the page's last bytes unsent.
		b.words[word].Or(mask)
		first += n
	}
}

// Swap moves the set into dst, which has one word per 64 pages, and leaves it
// empty. Each word is taken atomically: a mark lands either in dst or in the
// set, never in neither.
func (b *Bitmap) Swap(dst []uint64) {
	for i := range b.words {
		dst[i] = 0
		if b.words[i].Load() != 0 {
			dst[i] = b.words[i].Swap(0)
		}
	}
}

// Words is the length that Swap needs of its destination.
func (b *Bitmap) Words() int { return len(b.words) }

func isClosed(err error) bool { return errors.Is(err, os.ErrClosed) }
