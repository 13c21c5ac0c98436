package memory

import (
	"errors"
	"math"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func newRAM(t testing.TB, size uint64) *RAM {
	t.Helper()
	r, err := New(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return r
}

func TestNewRefusesBadSizes(t *testing.T) {
	for _, size := range []uint64{0, 1, PageSize + 1, 1 << 60} {
		if r, err := New(size); err == nil {
			r.Close()
			t.Errorf("New(%d) succeeded", size)
		}
	}
}

func TestRegionsLeaveTheHole(t *testing.T) {
	small := newRAM(t, 256<<20)
	if got := small.Regions(); len(got) != 1 || got[0].End() != 256<<20 {
		t.Errorf("256 MiB: regions %v", got)
	}
	big := newRAM(t, 5<<30) // no page of it is touched
	got := big.Regions()
	if len(got) != 2 || got[0].End() != HoleStart || got[1].GPA != HoleEnd || got[1].End() != 6<<30 || got[1].Offset != 3<<30 {
		t.Errorf("5 GiB: regions end at %v; want 3 GiB and 6 GiB", got)
	}
}

func TestSliceChecksEveryRange(t *testing.T) {
	r := newRAM(t, 5<<30)
	for _, test := range []struct {
		name string
		gpa  GPA
		n    uint64
		ok   bool
	}{
		{"start", 0, 1, true},
		{"all low", 0, 3 << 30, true},
		{"one over low", 0, 3<<30 + 1, false},
		{"last low byte", HoleStart - 1, 1, true},
		{"into the hole", HoleStart - 1, 2, false},
		{"hole", HoleStart, 1, false},
		{"hole, nothing", HoleStart + 1, 0, false},
		{"end of low, nothing", HoleStart, 0, true},
		{"across the hole", HoleStart - 1, uint64(HoleEnd-HoleStart) + 2, false},
		{"just below high", HoleEnd - 1, 2, false},
		{"high", HoleEnd, 2 << 30, true},
		{"one over high", HoleEnd, 2<<30 + 1, false},
		{"end, nothing", 6 << 30, 0, true},
		{"end", 6 << 30, 1, false},
		{"wraps", math.MaxUint64, 2, false},
		{"wraps to inside", math.MaxUint64 - 1, 4096, false},
		{"huge", PageSize, math.MaxUint64, false},
	} {
		b, err := r.Slice(test.gpa, test.n)
		var re *RangeError
		switch {
		case test.ok && (err != nil || uint64(len(b)) != test.n):
			t.Errorf("%s: Slice(%v, %d) = %d bytes, %v; want them", test.name, test.gpa, test.n, len(b), err)
		case !test.ok && !errors.As(err, &re):
			t.Errorf("%s: Slice(%v, %d) = %d bytes, %v; want a RangeError", test.name, test.gpa, test.n, len(b), err)
		}
		if cap(b) != len(b) {
			t.Errorf("%s: view can grow to %d bytes", test.name, cap(b))
		}
	}
}

func TestViewsAndFileAreOneMemory(t *testing.T) {
	r := newRAM(t, 3<<30+2*PageSize)
	b, err := r.Slice(HoleEnd+PageSize, 4)
	if err != nil {
		t.Fatal(err)
	}
	copy(b, "high")
	at, err := r.Offset(HoleEnd+PageSize, 4)
	if err != nil || at != int64(HoleStart)+PageSize {
		t.Errorf("Offset = %#x, %v; want it behind the low memory", at, err)
	}
	var got [4]byte
	if _, err := r.File().ReadAt(got[:], at); err != nil || string(got[:]) != "high" {
		t.Errorf("memfd holds %q, %v; want \"high\"", got, err)
	}
}

// Marks equal a plain model, and Swap empties.
func TestDirtyMarksMatchAModel(t *testing.T) {
	r := newRAM(t, 1<<20)
	dst := make([]uint64, r.Dirty().Words())
	rapid.Check(t, func(t *rapid.T) {
		model := map[uint64]bool{}
		for range rapid.IntRange(0, 20).Draw(t, "marks") {
			gpa := rapid.Uint64Range(0, 1<<20+PageSize).Draw(t, "gpa")
			n := rapid.Uint64Range(0, 300_000).Draw(t, "n")
			r.MarkDirty(GPA(gpa), n)
			if n > 0 && gpa+n <= 1<<20 {
				for p := gpa / PageSize; p <= (gpa+n-1)/PageSize; p++ {
					model[p] = true
				}
			}
		}
		r.Dirty().Swap(dst)
		for p := range uint64(1 << 20 / PageSize) {
			if got := dst[p/64]>>(p%64)&1 == 1; got != model[p] {
				t.Fatalf("page %d dirty = %v; want %v", p, got, model[p])
			}
		}
		r.Dirty().Swap(dst)
		for i, w := range dst {
			if w != 0 {
				t.Fatalf("word %d after a second Swap = %#x; want 0", i, w)
			}
		}
	})
}

// No mark is lost between writers and a swapper.
func TestConcurrentMarksAreNeverLost(t *testing.T) {
	const pages, writers = 64, 4
	b := NewBitmap(pages)
	var wg sync.WaitGroup
	for w := range uint64(writers) {
		wg.Go(func() {
			for p := w; p < pages; p += writers {
				b.Set(p, p+1)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	var all uint64
	dst := make([]uint64, b.Words())
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		b.Swap(dst)
		if all&dst[0] != 0 {
			t.Fatalf("pages %#x were taken twice but marked once", all&dst[0])
		}
		all |= dst[0]
	}
	if all != math.MaxUint64 {
		t.Errorf("pages taken %#x; want all 64", all)
	}
}

func TestMarkDirtyDoesNotAllocate(t *testing.T) {
	r := newRAM(t, 1<<20)
	if n := testing.AllocsPerRun(100, func() { r.MarkDirty(4000, 9000) }); n != 0 {
		t.Errorf("MarkDirty allocates %v times; want 0", n)
	}
}

func TestAtomic16KeepsItsNeighbours(t *testing.T) {
	r := newRAM(t, PageSize)
	b, _ := r.Slice(0, 8)
	copy(b, []byte{1, 2, 3, 4, 5, 6, 7, 8})
	Store16(b[2:], 0xbeef)
	if got := Load16(b[2:]); got != 0xbeef {
		t.Errorf("Load16 = %#x; want 0xbeef", got)
	}
	if want := [8]byte{1, 2, 0xef, 0xbe, 5, 6, 7, 8}; [8]byte(b) != want {
		t.Errorf("memory is % x; want % x", b, want)
	}
}

// The store-buffer test: without Fence each side may read the other's old
// value; with it at least one sees the new one.
func TestFenceOrdersStoreBeforeLoad(t *testing.T) {
	r := newRAM(t, PageSize)
	b, _ := r.Slice(0, 256)
	x, y := b[0:2], b[128:130]
	for i := uint16(1); i <= 2000; i++ {
		var seen [2]uint16
		var wg sync.WaitGroup
		wg.Go(func() { Store16(x, i); Fence(); seen[0] = Load16(y) })
		wg.Go(func() { Store16(y, i); Fence(); seen[1] = Load16(x) })
		wg.Wait()
		if seen[0] != i && seen[1] != i {
			t.Fatalf("round %d: both sides read the old value", i)
		}
	}
}

func TestCloseTwice(t *testing.T) {
	r, err := New(PageSize)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
}

func BenchmarkMarkDirty(b *testing.B) {
	r := newRAM(b, 64<<20)
	b.ReportAllocs()
	for b.Loop() {
		r.MarkDirty(5<<20, 4096)
	}
}

// Another mapping of the same file is the same memory, and one whose size could
// change is none.
func TestAdopt(t *testing.T) {
	r := newRAM(t, 2*PageSize)
	dup := func() *os.File {
		fd, err := unix.FcntlInt(r.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "dup")
	}
	again, err := Adopt(dup(), 2*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	a, _ := r.Slice(PageSize, 4)
	b, _ := again.Slice(PageSize, 4)
	copy(a, "same")
	if string(b) != "same" {
		t.Errorf("the adopted memory has %q; want \"same\"", b)
	}
	if err := r.File().Truncate(PageSize); err == nil {
		t.Error("the memory can shrink")
	}
	if _, err := unix.FcntlInt(r.File().Fd(), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE); err == nil {
		t.Error("somebody can bar others from mapping it")
	}
	if err := r.Discard(PageSize, PageSize); err != nil {
		t.Errorf("Discard of sealed memory = %v", err)
	}
	for _, size := range []uint64{0, 1, PageSize, 3 * PageSize} {
		f := dup()
		if _, err := Adopt(f, size); err == nil {
			t.Errorf("Adopt of %d bytes as %d succeeded", 2*PageSize, size)
		}
		if err := f.Close(); err == nil {
			t.Errorf("Adopt as %d bytes left the file open", size)
		}
	}
}
