package machine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"pgregory.net/rapid"

	"vmm/boot/boottest"
	"vmm/memory"
)

// Where the guest of these tests is told what to write, and what it may be
// told: pages that nobody else writes.
const (
	orderAt    = 5 << 20
	firstOrder = 6 << 20
	lastOrder  = 8<<20 - memory.PageSize
)

// writer is a guest that increments the byte whose address it is told.
func writer() asm {
	a := asm{}.enableAPIC().print("up")
	loop := len(a)
	a = a.raw(0xa1).u32(orderAt)              // mov eax, [orderAt]
	a = a.raw(0x85, 0xc0)                     // test eax, eax
	a = a.raw(0x74, byte(loop-len(a)-2))      // jz loop
	a = a.raw(0xfe, 0x00)                     // inc byte [eax]
	a = a.raw(0xc7, 0x05).u32(orderAt).u32(0) // mov dword [orderAt], 0
	return a.raw(0xeb, byte(loop-len(a)-2))   // jmp loop
}

// order has the guest write to a page, and waits until it has.
func order(m *Machine, gpa memory.GPA) {
	b, _ := m.ram.Slice(orderAt, 4)
	word := (*atomic.Uint32)(unsafe.Pointer(&b[0]))
	word.Store(uint32(gpa))
	for word.Load() != 0 {
		runtime.Gosched()
	}
}

// visited is the pages that a Visit finds.
func visited(t *testing.T, d *DirtyLog) (pages []uint64) {
	t.Helper()
	end := memory.GPA(0)
	err := d.Visit(func(gpa memory.GPA, n uint64) error {
		if n == 0 || n%memory.PageSize != 0 || gpa%memory.PageSize != 0 || gpa < end {
			t.Errorf("a run of %d bytes at %v after one to %v", n, gpa, end)
		}
		end = gpa + memory.GPA(n)
		for ; n > 0; n -= memory.PageSize {
			pages = append(pages, uint64(gpa)/memory.PageSize)
			gpa += memory.PageSize
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pages
}

func collect(t *testing.T, d *DirtyLog) uint64 {
	t.Helper()
	n, err := d.Collect()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func track(t *testing.T, m *Machine) *DirtyLog {
	t.Helper()
	d, err := m.TrackDirty()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func blocks(t *testing.T, f *os.File) int64 {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks
}

func TestDirtyLogFindsWhatWasWritten(t *testing.T) {
	m, out := newMachine(t, writer(), nil)
	run(t, m)
	out.waitFor("up")
	order(m, firstOrder)
	d := track(t, m)
	if _, err := m.TrackDirty(); err == nil {
		t.Error("a second log of the same machine")
	}

	// At first all that there is, and no hole of the rest.
	have := blocks(t, m.ram.File())
	n := collect(t, d)
	all := visited(t, d)
	if uint64(len(all)) != n || n*8 != uint64(have) {
		t.Errorf("collected %d pages and visited %d; the memory has %d blocks of half a KiB", n, len(all), have)
	}
	for _, page := range []uint64{boottest.CodeAt / memory.PageSize, orderAt / memory.PageSize, firstOrder / memory.PageSize} {
		if !slices.Contains(all, page) {
			t.Errorf("page %#x was written before the log began, and is not visited", page)
		}
	}
	if now := blocks(t, m.ram.File()); now != have {
		t.Errorf("the memory has %d blocks after the visit of its %d", now, have)
	}
	// Then what was written. The order's own page is written by the guest with
	// each; others are the kernel's business.
	only := func(what string, want ...uint64) {
		t.Helper()
		n := collect(t, d)
		got := visited(t, d)
		if uint64(len(got)) != n {
			t.Errorf("%s: collected %d pages, visited %d", what, n, len(got))
		}
		got = slices.DeleteFunc(got, func(p uint64) bool { return p < firstOrder/memory.PageSize })
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: visited %#x; want %#x", what, got, want)
		}
	}
	const page = firstOrder / memory.PageSize
	only("nothing")
	order(m, firstOrder)
	order(m, firstOrder+5*memory.PageSize) // a hole until now
	only("two pages", page, page+5)
	only("nothing again")
	order(m, firstOrder)
	collect(t, d)
	order(m, firstOrder+memory.PageSize)
	only("collected twice", page, page+1)
	order(m, firstOrder)
	only("watched again", page)
	// Devices' writes, and both.
	m.ram.MarkDirty(firstOrder+3*memory.PageSize-1, 2)
	order(m, firstOrder+4*memory.PageSize)
	only("a device and the guest", page+2, page+3, page+4)
	m.ram.MarkDirty(firstOrder, 1)
	collect(t, d)
	m.ram.MarkDirty(firstOrder+memory.PageSize, 1)
	only("a device, collected twice", page, page+1)

	// What is written while a page is visited counts for the next time, whoever
	// writes it.
	order(m, firstOrder)
	collect(t, d)
	if err := d.Visit(func(gpa memory.GPA, n uint64) error {
		if gpa == firstOrder {
			order(m, firstOrder)
			m.ram.MarkDirty(firstOrder+memory.PageSize, 1)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	only("written while visited", page, page+1)

	pause(t, m)
	rng := drive(t, m)[1]
	collect(t, d)
	visited(t, d)
	entropy(rng)
	collect(t, d)
	found := visited(t, d) // and whatever the other device's workers began with
	for _, page := range []uint64{15 << 20 / memory.PageSize, uint64(rng.Rings[0].Used) / memory.PageSize} {
		if !slices.Contains(found, page) {
			t.Errorf("the entropy device wrote page %#x; visited %#x", page, found)
		}
	}

	stop := errors.New("stop")
	m.ram.MarkDirty(0, 1)
	collect(t, d)
	if err := d.Visit(func(memory.GPA, uint64) error { return stop }); err != stop {
		t.Errorf("Visit() = %v; want its function's error", err)
	}
	for range 2 {
		if err := d.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	d = track(t, m) // anew
	if n := collect(t, d); n < uint64(len(all)) {
		t.Errorf("a new log begins with %d pages; there were %d", n, len(all))
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// What was copied in any number of rounds, while guest and device write, is
// what memory holds when both stand still.
func TestDirtyLogLosesNothing(t *testing.T) {
	// The guest increments a word of one page after the other, round and round.
	const start, end = 9 << 20, 9<<20 + 64*memory.PageSize
	a := asm{}.print("up")
	outer := len(a)
	a = a.raw(0xbf).u32(start) // mov edi, start
	loop := len(a)
	a = a.raw(0xff, 0x07)                      // inc dword [edi]
	a = a.raw(0x81, 0xc7).u32(memory.PageSize) // add edi, PageSize
	a = a.raw(0x81, 0xff).u32(end)             // cmp edi, end
	a = a.raw(0x72, byte(loop-len(a)-2))       // jb loop
	m, out := newMachine(t, a.raw(0xeb, byte(outer-len(a)-2)), nil)
	run(t, m)
	out.waitFor("up")
	d := track(t, m)
	defer d.Close()
	copied := make([]byte, m.ram.Size())
	round := func() {
		collect(t, d)
		err := d.Visit(func(gpa memory.GPA, n uint64) error {
			b, err := m.ram.Slice(gpa, n)
			for i := 0; i < len(b); i += 4 { // as a peer would see it: some word or other while it is written
				w := atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[i])))
				binary.NativeEndian.PutUint32(copied[int(gpa)+i:], w)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	device := make(chan struct{})
	go func() {
		defer close(device)
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			at := memory.GPA(10<<20 + rand.IntN(1<<20)&^3)
			b, _ := m.ram.Slice(at, 4)
			atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[0])), uint32(i))
			m.ram.MarkDirty(at, 4)
			if i%64 == 0 {
				runtime.Gosched()
			}
		}
	}()
	for range 40 {
		round()
	}
	close(done)
	<-device
	pause(t, m)
	round()
	if now := m.ram.Regions()[0].Bytes; !bytes.Equal(copied, now) {
		for i := range now {
			if now[i] != copied[i] {
				t.Fatalf("byte %#x is %#x in memory and %#x in the copy", i, now[i], copied[i])
			}
		}
	}
	if n := collect(t, d); n != 0 {
		t.Errorf("%d pages are written though all stand still", n)
	}
}

func TestRuns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 5).Draw(t, "words")
		word := rapid.OneOf(rapid.Uint64(), rapid.SampledFrom([]uint64{0, ^uint64(0), 1, 1 << 63}))
		a, b := rapid.SliceOfN(word, n, n).Draw(t, "a"), rapid.SliceOfN(word, n, n).Draw(t, "b")
		got := make([]uint64, n)
		last := -1
		runs(a, b, func(at, n int) error {
			if at <= last || n < 1 {
				t.Fatalf("a run of %d at %d, behind one that ended at %d", n, at, last)
			}
			last = at + n // so at that is no bit
			for i := at; i < at+n; i++ {
				got[i/64] |= 1 << (i % 64)
			}
			return nil
		})
		for i := range got {
			if got[i] != a[i]|b[i] {
				t.Fatalf("word %d of the runs = %#x; want %#x", i, got[i], a[i]|b[i])
			}
		}
	})
	stop := errors.New("stop")
	for _, words := range [][]uint64{{1}, {1 << 63}, {2, 0}} {
		if err := runs(words, make([]uint64, len(words)), func(int, int) error { return stop }); err != stop {
			t.Errorf("runs() = %v; want its function's error", err)
		}
	}
}

// A round costs a request or two for each 16 MiB, whatever was written.
func TestVisitAllocatesNothingPerPage(t *testing.T) {
	m, _ := newMachine(t, asm{}.poweroff(), nil)
	d := track(t, m)
	defer d.Close()
	collect(t, d)
	visited(t, d)
	pages := 0
	count := func(memory.GPA, uint64) error { pages++; return nil }
	allocs := testing.AllocsPerRun(10, func() {
		for p := memory.GPA(0); p < 16<<20; p += 2 * memory.PageSize {
			m.ram.MarkDirty(p, 1)
		}
		if _, err := d.Collect(); err != nil {
			t.Fatal(err)
		}
		if err := d.Visit(count); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 8 || pages < 10*2048 {
		t.Errorf("a round of 2048 runs allocates %v times (%d runs)", allocs, pages)
	}
}
