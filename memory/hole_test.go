package memory

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// Extents and Discard equal a plain model of which pages were written, and
// neither allocates a page.
func TestExtentsAndDiscardMatchAModel(t *testing.T) {
	const pages = 64
	rapid.Check(t, func(rt *rapid.T) {
		r, err := New(pages * PageSize)
		if err != nil {
			rt.Fatal(err)
		}
		defer r.Close()
		var model [pages]bool
		for range rapid.IntRange(0, 20).Draw(rt, "steps") {
			first := rapid.IntRange(0, pages-1).Draw(rt, "first")
			n := rapid.IntRange(1, pages-first).Draw(rt, "n")
			view, err := r.Slice(GPA(first*PageSize), uint64(n*PageSize))
			if err != nil {
				rt.Fatal(err)
			}
			write := rapid.Bool().Draw(rt, "write")
			for p := range n {
				model[first+p] = write
				if write {
					view[p*PageSize] = 1
				}
			}
			if !write {
				if err := r.Discard(GPA(first*PageSize), uint64(n*PageSize)); err != nil {
					rt.Fatal(err)
				}
			}
		}
		from := rapid.IntRange(0, pages-1).Draw(rt, "from")
		to := rapid.IntRange(from+1, pages).Draw(rt, "to")
		// In pieces, which may go back, or in one.
		var got [pages]bool
		finder := r.Finder()
		piece := rapid.IntRange(1, pages).Draw(rt, "piece")
		starts := rapid.Permutation(ascending(from, to, piece)).Draw(rt, "order")
		for _, at := range starts {
			n := min(piece, to-at)
			err := finder.Extents(GPA(at*PageSize), uint64(n*PageSize), func(gpa GPA, size uint64) error {
				for p := int(gpa) / PageSize; p < (int(gpa)+int(size))/PageSize; p++ {
					if p < at || p >= at+n {
						rt.Fatalf("page %d in an extent of [%d, %d)", p, at, at+n)
					}
					got[p] = true
				}
				return nil
			})
			if err != nil {
				rt.Fatal(err)
			}
		}
		blocks := int64(0)
		for p := range pages {
			if model[p] {
				blocks += PageSize / 512
			}
			if want := model[p] && p >= from && p < to; got[p] != want {
				rt.Fatalf("page %d of [%d, %d) in an extent: %v; want %v", p, from, to, got[p], want)
			}
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(r.File().Fd()), &st); err != nil || st.Blocks != blocks {
			rt.Fatalf("the memfd has %d blocks, %v; want %d", st.Blocks, err, blocks)
		}
	})
}

// ascending is from, from+step and so on, below to.
func ascending(from, to, step int) (list []int) {
	for ; from < to; from += step {
		list = append(list, from)
	}
	return list
}

// What is written ahead of a Finder is found: a hole is never remembered.
func TestFinderSeesNewMemory(t *testing.T) {
	r := newRAM(t, 8*PageSize)
	view, _ := r.Slice(0, 8*PageSize)
	f := r.Finder()
	var got []uint64
	step := func(page int) {
		t.Helper()
		if err := f.Extents(GPA(page*PageSize), 2*PageSize, func(gpa GPA, n uint64) error {
			got = append(got, uint64(gpa)/PageSize, n/PageSize)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	view[PageSize], view[2*PageSize] = 1, 1
	step(0) // finds pages 1 and 2, hole at 3
	view[3*PageSize], view[4*PageSize] = 1, 1
	step(2)
	view[7*PageSize] = 1
	step(4)
	view[6*PageSize] = 1
	step(6)
	if want := []uint64{1, 1, 2, 1, 3, 1, 4, 1, 6, 2}; !slices.Equal(got, want) {
		t.Errorf("extents (page, pages) = %v; want %v", got, want)
	}
}

func TestExtentsStopsAtAnError(t *testing.T) {
	r := newRAM(t, 4*PageSize)
	view, _ := r.Slice(0, 4*PageSize)
	view[0], view[2*PageSize] = 1, 1
	stop := errors.New("stop")
	calls := 0
	if err := r.Extents(0, 4*PageSize, func(GPA, uint64) error { calls++; return stop }); err != stop || calls != 1 {
		t.Errorf("Extents = %v after %d calls; want %v after 1", err, calls, stop)
	}
	var re *RangeError
	if err := r.Extents(0, 5*PageSize, nil); !errors.As(err, &re) {
		t.Errorf("Extents beyond the end = %v; want a RangeError", err)
	}
	if err := r.Discard(4*PageSize, PageSize); !errors.As(err, &re) {
		t.Errorf("Discard beyond the end = %v; want a RangeError", err)
	}
}
