package memory

import (
	"errors"
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
		var got [pages]bool
		err = r.Extents(GPA(from*PageSize), uint64((to-from)*PageSize), func(gpa GPA, n uint64) error {
			for p := uint64(gpa) / PageSize; p < (uint64(gpa)+n)/PageSize; p++ {
				got[p] = true
			}
			return nil
		})
		if err != nil {
			rt.Fatal(err)
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
