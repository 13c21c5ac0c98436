package machine

import (
	"errors"
	"fmt"
	"math/bits"

	"vmm/kvm"
	"vmm/memory"
)

// DirtyLog says which pages of guest memory were written since they were
// visited last: by vCPUs, and by the kernel for them, which KVM's dirty log has,
// and by devices, which memory's bitmap has. One goroutine uses it.
type DirtyLog struct {
	m *Machine
	// all says that no page was visited yet: each counts as written.
	all     bool
	regions []loggedRegion
	marks   []uint64 // what Swap fills
}

// loggedRegion is a region and its memory slot. A bitmap has bit i%64 of word
// i/64 for page i.
type loggedRegion struct {
	memory.Region
	slot    kvm.Slot
	vcpus   []uint64 // as KVM had it at the last Collect; it has it still
	devices []uint64 // taken from memory's bitmap since the last Visit
}

// chunk is how many pages are told to be watched again at a time, a multiple of
// 64: KVM holds its lock for so long, and a page that is written while an
// earlier chunk is visited need not be visited twice.
const chunk = 4096 // 16 MiB

// TrackDirty begins to note which pages are written. All of them count as
// written at first.
func (m *Machine) TrackDirty() (_ *DirtyLog, err error) {
	if !m.tracked.CompareAndSwap(false, true) {
		return nil, errors.New("the guest's writes to memory are tracked already")
	}
	d := &DirtyLog{m: m, all: true, marks: make([]uint64, m.ram.Dirty().Words())}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	// A host that cannot begin with every page dirty (before Linux 5.7) begins
	// with none: what has memory behind it is visited first all the same.
	if _, err := m.vm.EnableManualDirtyLog(); err != nil {
		return nil, err
	}
	for i, r := range m.ram.Regions() {
		if err := m.vm.SetMemory(kvm.Slot(i), r.GPA, r.Bytes, kvm.LogDirtyPages); err != nil {
			return nil, err
		}
		words := (len(r.Bytes)/memory.PageSize + 63) / 64
		d.regions = append(d.regions, loggedRegion{Region: r, slot: kvm.Slot(i), vcpus: make([]uint64, words), devices: make([]uint64, words)})
	}
	return d, nil
}

// Collect takes what was written since it was visited last, and says how many
// pages that is. Collect again adds to it.
func (d *DirtyLog) Collect() (pages uint64, err error) {
	d.m.ram.Dirty().Swap(d.marks)
	for i := range d.regions {
		r := &d.regions[i]
		if err := d.m.vm.DirtyLog(r.slot, r.vcpus); err != nil {
			return 0, err
		}
		// A region begins at a multiple of 64 pages in the memfd: the first at
		// 0, the second at HoleStart.
		marks := d.marks[r.Offset/memory.PageSize/64:]
		for w := range r.devices {
			r.devices[w] |= marks[w]
			pages += uint64(bits.OnesCount64(r.devices[w] | r.vcpus[w]))
		}
	}
	if !d.all {
		return pages, nil
	}
	pages = 0
	err = d.visitAll(func(_ memory.GPA, n uint64) error {
		pages += n / memory.PageSize
		return nil
	})
	return pages, err
}

// visitAll calls fn with all runs that have memory behind them.
func (d *DirtyLog) visitAll(fn func(gpa memory.GPA, n uint64) error) error {
	for _, r := range d.regions {
		if err := d.m.ram.Extents(r.GPA, uint64(len(r.Bytes)), fn); err != nil {
			return err
		}
	}
	return nil
}

// Visit calls fn with each run of collected pages, of n bytes in one region, in
// ascending order. Before that the run's pages are watched again: what is
// written while fn reads them is collected the next time. The first Visit
// leaves holes alone, pages that nobody ever touched: they are zero. fn's error
// ends it, and the log is of no use then but to be closed.
func (d *DirtyLog) Visit(fn func(gpa memory.GPA, n uint64) error) error {
	finder := d.m.ram.Finder() // a guest of vmm gives no memory back
	for i := range d.regions {
		r := &d.regions[i]
		total := len(r.Bytes) / memory.PageSize
		for first := 0; first < total; first += chunk {
			n := min(chunk, total-first)
			vcpus, devices := r.vcpus[first/64:(first+n+63)/64], r.devices[first/64:(first+n+63)/64]
			if marked(vcpus) {
				if err := d.m.vm.ClearDirtyLog(r.slot, first, n, vcpus); err != nil {
					return err
				}
			}
			gpa := r.GPA + memory.GPA(first)*memory.PageSize
			var err error
			if d.all {
				// The holes are looked for when the chunk is watched: a page
				// that is written for the first time from now on is either
				// found or logged. (A Finder remembers no holes.)
				err = finder.Extents(gpa, uint64(n)*memory.PageSize, fn)
			} else {
				err = runs(vcpus, devices, func(at, n int) error {
					return fn(gpa+memory.GPA(at)*memory.PageSize, uint64(n)*memory.PageSize)
				})
			}
			if err != nil {
				return err
			}
			clear(vcpus)
			clear(devices)
		}
	}
	d.all = false
	return nil
}

// marked says whether a bit is set.
func marked(words []uint64) bool {
	for _, w := range words {
		if w != 0 {
			return true
		}
	}
	return false
}

// runs calls fn with each run of bits that are set in one of two bitmaps of the
// same length: n of them from at on, as long as can be.
func runs(a, b []uint64, fn func(at, n int) error) error {
	start := -1 // of the run that goes on, if one does
	for i := range a {
		word := a[i] | b[i]
		if word == 0 && start < 0 || word == ^uint64(0) && start >= 0 {
			continue
		}
		for bit := 0; bit < 64; {
			left := word >> bit
			if start < 0 {
				skip := bits.TrailingZeros64(left)
				if skip == 64 {
					break
				}
				bit += skip
				start = 64*i + bit
				continue
			}
			bit += bits.TrailingZeros64(^left)
			if bit < 64 {
				if err := fn(start, 64*i+bit-start); err != nil {
					return err
				}
				start = -1
			}
		}
	}
	if start >= 0 {
		return fn(start, 64*len(a)-start)
	}
	return nil
}

// Close ends the tracking. A second Close does nothing.
func (d *DirtyLog) Close() error {
	if d.m == nil {
		return nil
	}
	var errs []error
	for i, r := range d.m.ram.Regions() {
		if err := d.m.vm.SetMemory(kvm.Slot(i), r.GPA, r.Bytes, 0); err != nil {
			errs = append(errs, fmt.Errorf("end the dirty log: %w", err))
		}
	}
	d.m.tracked.Store(false)
	d.m = nil
	return errors.Join(errs...)
}
