package virtio

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"vmm/internal/sys"
	"vmm/memory"
	"vmm/virtio/virtiotest"
)

const bothFeatures = FeatureVersion1 | FeatureEventIdx | FeatureIndirectDesc

// rig is a queue whose driver is a mock.
type rig struct {
	mem        *virtiotest.Memory
	ring       *virtiotest.Ring
	q          *Queue
	doorbell   *sys.EventFD
	interrupts atomic.Int64
}

func newRig(t testing.TB, size uint16, features uint64) *rig {
	t.Helper()
	return newRigAt(t, size, features, QueueState{})
}

// newRigAt makes a rig whose queue has already been worked as far as at says.
func newRigAt(t testing.TB, size uint16, features uint64, at QueueState) *rig {
	t.Helper()
	r := &rig{mem: virtiotest.NewMemory(t, 1<<20)}
	var err error
	if r.doorbell, err = sys.NewEventFD(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.doorbell.Close() })
	r.ring = virtiotest.NewRing(r.mem, size, features)
	r.ring.Notify = func() { r.doorbell.Signal() }
	at.Size, at.Desc, at.Avail, at.Used = size, r.ring.Desc, r.ring.Avail, r.ring.Used
	r.q, err = NewQueue(r.config(features), at)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) config(features uint64) QueueConfig {
	return QueueConfig{
		RAM: r.mem.RAM, Features: features, MaxSize: 256,
		Doorbell: r.doorbell, Interrupt: func() { r.interrupts.Add(1) },
	}
}

// takeDirty empties the dirty bitmap and returns the pages in it.
func takeDirty(ram *memory.RAM) []uint64 {
	words := make([]uint64, ram.Dirty().Words())
	ram.Dirty().Swap(words)
	var pages []uint64
	for p := range uint64(len(words)) * 64 {
		if words[p/64]>>(p%64)&1 == 1 {
			pages = append(pages, p)
		}
	}
	return pages
}

func TestNewQueueChecksWhereItIsPut(t *testing.T) {
	const size = 1 << 20
	r := newRig(t, 8, bothFeatures)
	good := r.q.State()
	for _, test := range []struct {
		name   string
		change func(*QueueState)
		want   string // "" for none
	}{
		{"good", func(s *QueueState) {}, ""},
		{"size 0", func(s *QueueState) { s.Size = 0 }, "power of two"},
		{"size 1", func(s *QueueState) { s.Size = 1 }, ""},
		{"size 7", func(s *QueueState) { s.Size = 7 }, "power of two"},
		{"size 65535", func(s *QueueState) { s.Size = 65535 }, "power of two"},
		{"larger than offered", func(s *QueueState) { s.Size = 512 }, "offers 256"},
		{"descriptors misaligned", func(s *QueueState) { s.Desc += 8 }, "16-byte aligned"},
		{"avail at 2 mod 4", func(s *QueueState) { s.Avail = 0x1002 }, ""},
		{"avail misaligned", func(s *QueueState) { s.Avail = 0x1001 }, "2-byte aligned"},
		{"used misaligned", func(s *QueueState) { s.Used += 2 }, "4-byte aligned"},
		{"descriptors end with RAM", func(s *QueueState) { s.Desc = size - 16*8 }, ""},
		{"descriptors beyond RAM", func(s *QueueState) { s.Desc = size - 16*8 + 16 }, "not all RAM"},
		{"avail ends with RAM", func(s *QueueState) { s.Avail = size - 6 - 2*8 }, ""},
		{"avail's event index beyond RAM", func(s *QueueState) { s.Avail = size - 4 - 2*8 }, "not all RAM"},
		{"used's event index beyond RAM", func(s *QueueState) { s.Used = size - 4 - 8*8 }, "not all RAM"},
		{"used wraps around", func(s *QueueState) { s.Used = ^memory.GPA(3) }, "not all RAM"},
		{"worked far", func(s *QueueState) { s.LastAvail, s.UsedIndex = 65535, 65535 }, ""},
		{"a request in flight", func(s *QueueState) { s.LastAvail, s.UsedIndex = 1, 0 }, "1 requests in flight"},
		{"used ahead of avail", func(s *QueueState) { s.LastAvail, s.UsedIndex = 0, 1 }, "in flight"},
	} {
		s := good
		test.change(&s)
		q, err := NewQueue(r.config(bothFeatures), s)
		switch {
		case (q == nil) == (err == nil):
			t.Errorf("%s: NewQueue = %v, %v; want a queue or an error", test.name, q, err)
		case test.want == "" && err != nil, test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%s: NewQueue error %v; want %q", test.name, err, test.want)
		case err == nil && q.State() != s:
			t.Errorf("%s: State() = %+v; want %+v", test.name, q.State(), s)
		}
	}
}

// desc is one raw descriptor.
type desc struct {
	gpa         memory.GPA
	length      uint32
	flags, next uint16
}

func put(table []byte, ds ...desc) {
	for i, d := range ds {
		virtiotest.PutDescriptor(table[descSize*i:], d.gpa, d.length, d.flags, d.next)
	}
}

func TestPopEnforcesTheRules(t *testing.T) {
	const (
		N, W, I = descNext, descWrite, descIndirect
		buf     = 0x8000
		table   = 0x9000
		end     = 1 << 20
	)
	for _, test := range []struct {
		name     string
		features uint64
		descs    []desc
		table    []desc // at table
		head     uint16
		want     string // error, or the segments' lengths
	}{
		{"one readable", 0, []desc{{buf, 1, 0, 99}}, nil, 0, "r[1] w[]"},
		{"one writable", 0, []desc{{buf, 1, W, 99}}, nil, 0, "r[] w[1]"},
		{"readable then writable", 0, []desc{{buf, 1, N, 1}, {buf, 2, N, 2}, {buf, 3, N | W, 3}, {buf, 4, W, 0}}, nil, 0, "r[1 2] w[3 4]"},
		{"unknown flags are ignored", 0, []desc{{buf, 1, 0xfff0, 0}}, nil, 0, "r[1] w[]"},
		{"writable then readable", 0, []desc{{buf, 1, N | W, 1}, {buf, 2, 0, 0}}, nil, 0, "behind a device-writable"},
		{"head out of range", 0, nil, nil, 8, "descriptor 8 is beyond a table of 8"},
		{"next out of range", 0, []desc{{buf, 1, N, 8}}, nil, 0, "descriptor 8 is beyond"},
		{"loop on itself", 0, []desc{{buf, 1, N, 0}}, nil, 0, "or a loop"},
		{"loop of two", 0, []desc{{buf, 1, N | W, 1}, {buf, 1, N | W, 0}}, nil, 0, "or a loop"},
		{"empty", 0, []desc{{buf, 0, 0, 0}}, nil, 0, "empty"},
		{"beyond RAM", 0, []desc{{end - 1, 2, 0, 0}}, nil, 0, "not all RAM"},
		{"last byte of RAM", 0, []desc{{end - 1, 1, 0, 0}}, nil, 0, "r[1] w[]"},
		{"address wraps", 0, []desc{{^memory.GPA(0), 2, 0, 0}}, nil, 0, "not all RAM"},
		{"huge", 0, []desc{{0, 1<<32 - 1, 0, 0}}, nil, 0, "not all RAM"},

		{"indirect not negotiated", 0, []desc{{table, 16, I, 0}}, []desc{{buf, 1, 0, 0}}, 0, "not negotiated"},
		{"indirect", FeatureIndirectDesc, []desc{{table, 32, I, 0}}, []desc{{buf, 1, N, 1}, {buf, 2, W, 0}}, 0, "r[1] w[2]"},
		{"indirect ignores WRITE", FeatureIndirectDesc, []desc{{table, 16, I | W, 0}}, []desc{{buf, 1, 0, 0}}, 0, "r[1] w[]"},
		{"direct then indirect", FeatureIndirectDesc, []desc{{buf, 7, N, 1}, {table, 32, I, 0}}, []desc{{buf, 1, N, 1}, {buf, 2, W, 0}}, 0, "r[7 1] w[2]"},
		{"writable then indirect readable", FeatureIndirectDesc, []desc{{buf, 7, N | W, 1}, {table, 16, I, 0}}, []desc{{buf, 1, 0, 0}}, 0, "behind a device-writable"},
		{"indirect with NEXT", FeatureIndirectDesc, []desc{{table, 16, I | N, 1}, {buf, 1, 0, 0}}, []desc{{buf, 1, 0, 0}}, 0, "both INDIRECT and NEXT"},
		{"nested", FeatureIndirectDesc, []desc{{table, 16, I, 0}}, []desc{{table, 16, I, 0}}, 0, "itself indirect"},
		{"table of no bytes", FeatureIndirectDesc, []desc{{table, 0, I, 0}}, nil, 0, "no whole number"},
		{"table of 17 bytes", FeatureIndirectDesc, []desc{{table, 17, I, 0}}, nil, 0, "no whole number"},
		{"table beyond RAM", FeatureIndirectDesc, []desc{{end - 16, 32, I, 0}}, nil, 0, "indirect table: 32 bytes"},
		{"next beyond the indirect table", FeatureIndirectDesc, []desc{{table, 32, I, 0}}, []desc{{buf, 1, N, 2}}, 0, "descriptor 2 is beyond a table of 2"},
		{"next beyond the ring, within the table", FeatureIndirectDesc, []desc{{table, 16 * 12, I, 0}},
			[]desc{{buf, 1, N, 11}, 11: {buf, 5, 0, 0}}, 0, "r[1 5] w[]"},
		{"loop in an indirect table", FeatureIndirectDesc, []desc{{table, 16, I, 0}}, []desc{{buf, 1, N, 0}}, 0, "or a loop"},
		{"unaligned table", FeatureIndirectDesc, []desc{{table + 1, 16, I, 0}}, nil, 0, "empty"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, 8, FeatureVersion1|test.features)
			put(r.mem.Bytes(r.ring.Desc, 16*8), test.descs...)
			put(r.mem.Bytes(table, 0x1000), test.table...)
			avail := r.mem.Bytes(r.ring.Avail, 6+2*8)
			memory.Store16(avail[4:], test.head)
			memory.Store16(avail[2:], 1)
			c := r.q.NewChain()
			ok, err := r.q.Pop(c)
			if ok == (err != nil) {
				t.Fatalf("Pop() = %v, %v; want a chain or an error", ok, err)
			}
			got := shape(c)
			if err != nil {
				got = err.Error()
				if s := r.q.State(); s.LastAvail != 0 {
					t.Errorf("a refused chain was taken: LastAvail = %d; want 0", s.LastAvail)
				}
			}
			if !strings.Contains(got, test.want) {
				t.Errorf("Pop() = %q; want %q", got, test.want)
			}
		})
	}
}

func shape(c *Chain) string {
	lens := func(ss []Segment) []int {
		out := []int{}
		for _, s := range ss {
			out = append(out, len(s.Data))
		}
		return out
	}
	return fmt.Sprintf("r%v w%v", lens(c.Readable), lens(c.Writable))
}

// More than 2^32 bytes in one chain: 1 GiB of RAM, named five times.
func TestPopBoundsTheChainsBytes(t *testing.T) {
	r := &rig{mem: virtiotest.NewMemory(t, 1<<30)} // no page of it is touched but the ring
	ring := virtiotest.NewRing(r.mem, 8, FeatureVersion1)
	q, err := NewQueue(r.config(FeatureVersion1), QueueState{Size: 8, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used})
	if err != nil {
		t.Fatal(err)
	}
	gib := virtiotest.Buffer{GPA: 0, Len: 1 << 30}
	ring.Add(gib, gib, gib, gib)
	ring.Add(gib, gib, gib, virtiotest.Buffer{GPA: 0, Len: 1 << 30})
	c := q.NewChain()
	if ok, err := q.Pop(c); !ok || err != nil {
		t.Fatalf("Pop() of 2^32 bytes = %v, %v; want it", ok, err)
	}
	ring = virtiotest.NewRing(r.mem, 8, FeatureVersion1)
	q, err = NewQueue(r.config(FeatureVersion1), QueueState{Size: 8, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used})
	if err != nil {
		t.Fatal(err)
	}
	ring.Add(gib, gib, gib, gib, virtiotest.Buffer{GPA: 0, Len: 1})
	if ok, err := q.Pop(c); ok || err == nil || !strings.Contains(err.Error(), "longer than 2^32") {
		t.Fatalf("Pop() of 2^32+1 bytes = %v, %v; want an error", ok, err)
	}
}

func TestPopRefusesAnAvailableIndexTooFarAhead(t *testing.T) {
	for _, test := range []struct {
		index uint16
		ok    bool
	}{{8, true}, {9, false}, {65535, false}} {
		r := newRig(t, 8, bothFeatures)
		put(r.mem.Bytes(r.ring.Desc, 16), desc{0x8000, 1, 0, 0})
		memory.Store16(r.mem.Bytes(r.ring.Avail+2, 2), test.index)
		if !r.q.EnableNotify() {
			t.Errorf("index %d: EnableNotify() = false; want true", test.index)
		}
		for range 2 { // the error stays
			if ok, err := r.q.Pop(r.q.NewChain()); ok != test.ok || ok == (err != nil) {
				t.Errorf("index %d: Pop() = %v, %v; want %v", test.index, ok, err, test.ok)
			}
		}
	}
}

// A chain may be as long as the device offered even in a smaller queue.
func TestChainLengthIsBoundedByTheOffer(t *testing.T) {
	r := newRig(t, 8, bothFeatures)
	bufs := make([]virtiotest.Buffer, 257)
	for i := range bufs {
		bufs[i] = virtiotest.Buffer{GPA: 0x8000, Len: 1}
	}
	r.ring.AddIndirect(bufs[:256]...)
	r.ring.AddIndirect(bufs...)
	c := r.q.NewChain()
	if ok, err := r.q.Pop(c); !ok || err != nil || len(c.Readable) != 256 {
		t.Errorf("Pop() of 256 segments = %v, %v, %d; want them", ok, err, len(c.Readable))
	}
	if ok, err := r.q.Pop(c); ok || err == nil || !strings.Contains(err.Error(), "more than 256") {
		t.Errorf("Pop() of 257 segments = %v, %v; want an error", ok, err)
	}
}

// What Pop has checked is what it uses: a guest that rewrites a descriptor
// as soon as it was read changes nothing.
func TestPopLooksAtADescriptorOnce(t *testing.T) {
	r := newRig(t, 8, bothFeatures)
	table := r.mem.Alloc(32, 16)
	put(r.mem.Bytes(table, 32), desc{0x8000, 16, descNext, 1}, desc{0x8010, 16, descWrite, 0})
	put(r.mem.Bytes(r.ring.Desc, 16), desc{table, 32, descIndirect, 0})
	memory.Store16(r.mem.Bytes(r.ring.Avail+2, 2), 1)
	copied := 0
	places := []memory.GPA{r.ring.Desc, table, table + 16}
	r.q.afterCopy = func() {
		// The descriptor just read becomes as bad as can be.
		put(r.mem.Bytes(places[copied], 16), desc{^memory.GPA(0), 0xffffffff, 0xffff, 0xffff})
		copied++
	}
	c := r.q.NewChain()
	if ok, err := r.q.Pop(c); !ok || err != nil {
		t.Fatalf("Pop() = %v, %v; want the chain as first read", ok, err)
	}
	if copied != 3 {
		t.Errorf("%d descriptors were read; want 3", copied)
	}
	want := Chain{
		Readable: []Segment{{0x8000, r.mem.Bytes(0x8000, 16)}},
		Writable: []Segment{{0x8010, r.mem.Bytes(0x8010, 16)}},
	}
	for i, s := range append(slices.Clone(c.Readable), c.Writable...) {
		w := append(want.Readable, want.Writable...)[i]
		if s.GPA != w.GPA || len(s.Data) != len(w.Data) || &s.Data[0] != &w.Data[0] {
			t.Errorf("segment %d is %d bytes at %v; want %d at %v", i, len(s.Data), s.GPA, len(w.Data), w.GPA)
		}
	}
}

func TestPushMarksWhatItWrote(t *testing.T) {
	for _, written := range []uint32{0, 1, 3 * 4096} {
		r := newRig(t, 256, bothFeatures)
		read := r.mem.Alloc(4096, 4096)
		write := r.mem.Alloc(3*4096, 4096)
		r.ring.Add(virtiotest.Buffer{GPA: read, Len: 4096}, virtiotest.Buffer{GPA: write + 4095, Len: 2, Write: true},
			virtiotest.Buffer{GPA: write + 2*4096, Len: 1, Write: true})
		c := r.q.NewChain()
		if ok, err := r.q.Pop(c); !ok {
			t.Fatal(err)
		}
		takeDirty(r.mem.RAM)
		r.q.Push(c, written)
		want := []uint64{uint64(r.ring.Used) / 4096, uint64(write) / 4096, uint64(write)/4096 + 1, uint64(write)/4096 + 2}
		slices.Sort(want)
		if got := takeDirty(r.mem.RAM); !slices.Equal(got, want) {
			t.Errorf("Push(%d) marked pages %v; want %v", written, got, want)
		}
		if u, ok := r.ring.Reap(); !ok || u.Written != written || u.Head != c.Head {
			t.Errorf("driver reaped %v, %v; want head %d, %d bytes", u, ok, c.Head, written)
		}
	}
}

// Element and index of the used ring may lie in different pages.
func TestPushMarksBothPagesOfTheRing(t *testing.T) {
	r := newRig(t, 8, bothFeatures)
	at := QueueState{Size: 8, Desc: 0x10000, Avail: 0x11000, Used: 0x20000 - 4 - 8*3, LastAvail: 3, UsedIndex: 3}
	q, err := NewQueue(r.config(bothFeatures), at)
	if err != nil {
		t.Fatal(err)
	}
	takeDirty(r.mem.RAM)
	q.Push(&Chain{}, 0)
	if got, want := takeDirty(r.mem.RAM), []uint64{0x1f, 0x20}; !slices.Equal(got, want) {
		t.Errorf("Push marked pages %v; want %v", got, want)
	}
}

func TestEnableNotifyMarksTheRing(t *testing.T) {
	for _, features := range []uint64{FeatureVersion1, bothFeatures} {
		r := newRig(t, 1024/4, features)
		takeDirty(r.mem.RAM)
		r.q.DisableNotify()
		r.q.EnableNotify()
		at := r.ring.Used
		if features&FeatureEventIdx != 0 {
			at += 4 + 8*256
		}
		if got, want := takeDirty(r.mem.RAM), []uint64{uint64(at) / 4096}; !slices.Equal(got, want) {
			t.Errorf("features %#x: marked pages %v; want %v", features, got, want)
		}
	}
}

// The event index is the last of the used ring; what follows is the driver's.
func TestStoresStayInTheUsedRing(t *testing.T) {
	for _, features := range []uint64{FeatureVersion1, bothFeatures} {
		r := newRig(t, 2, features)
		all := r.mem.Bytes(0, 1<<20)
		for i := range all {
			all[i] = 0xa5
		}
		memory.Store16(r.mem.Bytes(r.ring.Avail+2, 2), 0)
		before := bytes.Clone(all)
		r.q.DisableNotify()
		r.q.EnableNotify()
		r.q.Push(&Chain{Head: 1}, 7)
		used := int(r.ring.Used)
		for i := range all {
			if all[i] != before[i] && (i < used || i >= used+6+8*2) {
				t.Fatalf("features %#x: byte %#x changed, the used ring is at %#x", features, i, used)
			}
		}
	}
}

func TestInterruptSuppression(t *testing.T) {
	type step struct {
		push  int
		event uint16 // EVENT_IDX: the driver's used_event; else the flag
		want  int64  // interrupts of one Interrupt call
	}
	for _, test := range []struct {
		name     string
		features uint64
		at       QueueState
		steps    []step
	}{
		{"flags", FeatureVersion1, QueueState{}, []step{{1, 0, 1}, {1, 1, 0}, {0, 0, 0}, {1, 0, 1}, {0, 0, 0}}},
		{"event index", bothFeatures, QueueState{SignalledValid: true}, []step{
			{1, 0, 1},     // wants the first: 0 -> 1
			{1, 0, 0},     // still wants the first, that is past
			{1, 2, 1},     // wants the third
			{0, 3, 0},     // nothing new
			{3, 5, 1},     // wants the third of three
			{3, 9, 0},     // wants the one after these
			{1, 9, 1},     // there it is
			{2, 65535, 0}, // far away
		}},
		{"event index, first decision", bothFeatures, QueueState{}, []step{{1, 1000, 1}, {1, 1000, 0}}},
		{"event index wraps", bothFeatures, QueueState{LastAvail: 65535, UsedIndex: 65535, SignalledUsed: 65535, SignalledValid: true},
			[]step{{1, 65535, 1}, {1, 65535, 0}, {1, 1, 1}}},
		{"2^16 without a decision", bothFeatures, QueueState{SignalledValid: true}, []step{{1 << 16, 40000, 1}, {1, 40000, 0}}},
		{"2^16+1 without a decision", bothFeatures, QueueState{SignalledValid: true}, []step{{1<<16 + 1, 40000, 1}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRigAt(t, 8, test.features, test.at)
			avail := r.mem.Bytes(r.ring.Avail, 6+2*8)
			for i, s := range test.steps {
				off := 0
				if test.features&FeatureEventIdx != 0 {
					off = 4 + 2*8
				}
				memory.Store16(avail[off:], s.event)
				for range s.push {
					r.q.Push(&Chain{}, 0)
				}
				before := r.interrupts.Load()
				r.q.Interrupt()
				if got := r.interrupts.Load() - before; got != s.want {
					t.Errorf("step %d %+v: %d interrupts; want %d", i, s, got, s.want)
				}
			}
		})
	}
}

// The notification decision, which Linux makes the same way
// (virtio 1.3, 2.7.10.1), against its definition: event is among old..now-1.
func TestPassedMatchesItsDefinition(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		old := rapid.Uint16().Draw(t, "old")
		n := rapid.Uint16Range(0, 2000).Draw(t, "n")
		event := old + rapid.Uint16Range(0, 2100).Draw(t, "ahead") - 50
		want := false
		for i := range n {
			want = want || old+i == event
		}
		if got := passed(event, old, old+n); got != want {
			t.Fatalf("passed(%d, %d, %d) = %v; want %v", event, old, old+n, got, want)
		}
	})
}

// Any sequence of what a driver and a device do equals a naive model: chains
// come in order, as they were added; used elements go back in order of Push.
func TestQueueMatchesAModel(t *testing.T) {
	r := newRig(t, 16, bothFeatures) // RAM lives as long as the test; each case lays out a new ring
	rapid.Check(t, func(t *rapid.T) {
		mem := *r.mem // allocations of this case are forgotten with it
		features := uint64(FeatureVersion1 | FeatureIndirectDesc)
		if rapid.Bool().Draw(t, "event index") {
			features |= FeatureEventIdx
		}
		ring := virtiotest.NewRing(&mem, 16, features)
		clear(mem.Bytes(ring.Avail, 6+2*16))
		clear(mem.Bytes(ring.Used, 6+8*16))
		ring.Notify = func() { r.doorbell.Signal() }
		r.doorbell.Drain()
		q, err := NewQueue(r.config(features), QueueState{Size: 16, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used})
		if err != nil {
			t.Fatal(err)
		}
		type request struct {
			head uint16
			bufs []virtiotest.Buffer
		}
		var waiting []request // added, not popped
		var popped []*Chain
		var used []virtiotest.Used // pushed, not reaped
		steps := rapid.SliceOf(rapid.IntRange(0, 6)).Draw(t, "steps")
		for _, step := range steps {
			switch step {
			case 0, 1: // add
				n := rapid.IntRange(1, 6).Draw(t, "bufs")
				nr := rapid.IntRange(0, n).Draw(t, "readable")
				bufs := make([]virtiotest.Buffer, n)
				for i := range bufs {
					bufs[i] = virtiotest.Buffer{
						GPA:   memory.GPA(rapid.Uint64Range(0, 1<<20-5000).Draw(t, "gpa")),
						Len:   rapid.Uint32Range(1, 5000).Draw(t, "len"),
						Write: i >= nr,
					}
				}
				add := ring.Add
				if step == 1 {
					add = ring.AddIndirect
				}
				if head, ok := add(bufs...); ok {
					waiting = append(waiting, request{head, bufs})
				}
			case 2, 3: // pop
				c := q.NewChain()
				ok, err := q.Pop(c)
				if err != nil {
					t.Fatalf("Pop() = %v", err)
				}
				if ok != (len(waiting) > 0) {
					t.Fatalf("Pop() = %v with %d chains waiting", ok, len(waiting))
				}
				if !ok {
					continue
				}
				want := waiting[0]
				waiting = waiting[1:]
				if c.Head != want.head {
					t.Fatalf("Pop() took chain %d; want %d", c.Head, want.head)
				}
				got := []virtiotest.Buffer{}
				for i, s := range append(slices.Clone(c.Readable), c.Writable...) {
					got = append(got, virtiotest.Buffer{GPA: s.GPA, Len: uint32(len(s.Data)), Write: i >= len(c.Readable)})
					if &s.Data[0] != &mem.Bytes(s.GPA, 1)[0] {
						t.Fatalf("segment %d is not a view of %v", i, s.GPA)
					}
				}
				if !slices.Equal(got, want.bufs) {
					t.Fatalf("Pop() = %v; want %v", got, want.bufs)
				}
				popped = append(popped, c)
			case 4: // push any one
				if len(popped) == 0 {
					continue
				}
				i := rapid.IntRange(0, len(popped)-1).Draw(t, "which")
				written := rapid.Uint32().Draw(t, "written")
				q.Push(popped[i], written)
				used = append(used, virtiotest.Used{Head: popped[i].Head, Written: written})
				popped = slices.Delete(popped, i, i+1)
				q.Interrupt()
			case 5: // reap
				u, ok := ring.Reap()
				if ok != (len(used) > 0) {
					t.Fatalf("Reap() = %v with %d used", ok, len(used))
				}
				if ok {
					if u != used[0] {
						t.Fatalf("Reap() = %v; want %v", u, used[0])
					}
					used = used[1:]
				}
			case 6:
				q.DisableNotify()
				if more := q.EnableNotify(); more != (len(waiting) > 0) {
					t.Fatalf("EnableNotify() = %v with %d chains waiting", more, len(waiting))
				}
				if len(waiting) == 0 {
					// Armed and empty: the next chain must ring.
					r.doorbell.Drain()
					ring.Kick()
					if head, ok := ring.Add(virtiotest.Buffer{GPA: 0x8000, Len: 1}); ok {
						waiting = append(waiting, request{head, []virtiotest.Buffer{{GPA: 0x8000, Len: 1}}})
						if !ring.Kick() || !r.doorbell.Pending() {
							t.Fatal("the queue asked for a notification and got none")
						}
					}
				}
			}
		}
		if s := q.State(); int(s.LastAvail-s.UsedIndex) != len(popped) {
			t.Fatalf("State() = %+v; want %d in flight", s, len(popped))
		}
	})
}

// dawdle passes a little time, mostly none, so that the two sides meet at
// every point of each other's way to sleep.
func dawdle(rng *rand.Rand) {
	for range rng.IntN(1 << rng.IntN(13)) {
		memory.Fence()
	}
}

// A driver and a device that both sleep whenever there is nothing to do. If
// either misses a wake-up the two sleep for ever, and the test says who.
func TestNoWakeUpIsLost(t *testing.T) {
	for _, features := range []uint64{FeatureVersion1, bothFeatures} {
		for _, completers := range []int{0, 3} {
			t.Run(fmt.Sprintf("features=%#x/completers=%d", features, completers), func(t *testing.T) {
				stress(t, features, completers)
			})
		}
	}
}

func stress(t *testing.T, features uint64, completers int) {
	const size, requests = 4, 2500
	r := newRig(t, size, features)
	irq, err := sys.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer irq.Close()
	r.q.cfg.Interrupt = func() { irq.Signal() }
	bufs := r.mem.Alloc(size*64, 64)

	var stop atomic.Bool
	var driverAsleep, workerAsleep atomic.Bool
	var wg sync.WaitGroup

	// The device answers each request with the sum of its bytes plus one.
	answer := func(c *Chain) {
		sum := uint32(1)
		for _, s := range c.Readable {
			for _, b := range s.Data {
				sum += uint32(b)
			}
		}
		binary.LittleEndian.PutUint32(c.Writable[0].Data, sum)
		r.q.Push(c, 4)
		r.q.Interrupt()
	}
	work := make(chan *Chain, size) // never full: no more can be in flight
	for range completers {
		wg.Go(func() {
			for c := range work {
				answer(c)
			}
		})
	}
	wg.Go(func() {
		defer close(work)
		rng := rand.New(rand.NewPCG(2, features))
		for !stop.Load() {
			r.q.DisableNotify()
			for {
				c := r.q.NewChain()
				ok, err := r.q.Pop(c)
				if err != nil {
					t.Errorf("Pop() = %v", err)
					stop.Store(true)
					irq.Signal()
					return
				}
				if !ok {
					break
				}
				if completers > 0 {
					work <- c
				} else {
					answer(c)
				}
			}
			dawdle(rng)
			if r.q.EnableNotify() {
				continue
			}
			dawdle(rng)
			workerAsleep.Store(true)
			r.q.Wait()
			workerAsleep.Store(false)
		}
	})

	finished := make(chan struct{})
	var sent, received int
	wg.Go(func() {
		defer close(finished)
		rng := rand.New(rand.NewPCG(1, features))
		want := map[uint16]uint32{}
		where := map[uint16]int{}
		free := []int{0, 1, 2, 3}
		for received < requests && !stop.Load() {
			for n := rng.IntN(size); n >= 0 && len(free) > 0 && sent < requests && r.ring.Free() >= 2; n-- {
				slot := free[len(free)-1]
				free = free[:len(free)-1]
				at := bufs + memory.GPA(64*slot)
				data := r.mem.Bytes(at, 64)
				sum := uint32(1)
				for i := range 8 {
					data[i] = byte(rng.Uint32())
					sum += uint32(data[i])
				}
				in, out := virtiotest.Buffer{GPA: at, Len: 8}, virtiotest.Buffer{GPA: at + 8, Len: 4, Write: true}
				add := r.ring.Add
				if features&FeatureIndirectDesc != 0 && sent%2 == 0 {
					add = r.ring.AddIndirect
				}
				head, ok := add(in, out)
				if !ok {
					t.Errorf("Add failed with %d free", r.ring.Free())
					return
				}
				want[head], where[head] = sum, slot
				sent++
			}
			dawdle(rng)
			r.ring.Kick()
			r.ring.DisableInterrupt()
			for {
				u, ok := r.ring.Reap()
				if !ok {
					dawdle(rng)
					if r.ring.EnableInterrupt() {
						continue
					}
					break
				}
				slot := where[u.Head]
				got := binary.LittleEndian.Uint32(r.mem.Bytes(bufs+memory.GPA(64*slot+8), 4))
				if got != want[u.Head] || u.Written != 4 {
					t.Errorf("request %d answered %d, %d bytes; want %d, 4", received, got, u.Written, want[u.Head])
				}
				free = append(free, slot)
				received++
			}
			// Sleep only if nothing can be sent, or sometimes: then the
			// device runs dry too.
			if received < requests && (sent == requests || len(free) == 0 || received < sent && rng.IntN(2) == 0) {
				driverAsleep.Store(true)
				irq.Wait()
				driverAsleep.Store(false)
			}
		}
	})

	select {
	case <-finished:
	case <-time.After(2 * time.Minute): // far beyond what a loaded machine needs
		t.Errorf("stuck: sent %d, received %d, driver asleep %v, worker asleep %v, state %+v",
			sent, received, driverAsleep.Load(), workerAsleep.Load(), r.q.State())
	}
	stop.Store(true)
	irq.Signal()
	r.q.Kick()
	wg.Wait()
}

func TestQueueDoesNotAllocate(t *testing.T) {
	for _, indirect := range []bool{false, true} {
		r := newRig(t, 256, bothFeatures)
		c := r.q.NewChain()
		turn := func() { roundTrip(t, r, c, indirect) }
		turn()
		if n := testing.AllocsPerRun(100, turn); n != 0 {
			t.Errorf("indirect %v: a request allocates %v times; want 0", indirect, n)
		}
	}
}

// roundTrip is one request, from the driver's Add to its Reap.
func roundTrip(t testing.TB, r *rig, c *Chain, indirect bool) {
	bufs := [...]virtiotest.Buffer{{GPA: 0x8000, Len: 64}, {GPA: 0x9000, Len: 4096, Write: true}, {GPA: 0xa000, Len: 108, Write: true}}
	if indirect {
		r.ring.AddIndirect(bufs[:]...)
	} else {
		r.ring.Add(bufs[:]...)
	}
	r.ring.Kick()
	ok, err := r.q.Pop(c)
	if !ok || err != nil {
		t.Fatalf("Pop() = %v, %v", ok, err)
	}
	r.q.Push(c, 4204)
	r.q.Interrupt()
	if u, ok := r.ring.Reap(); !ok || u.Written != 4204 {
		t.Fatalf("Reap() = %v, %v", u, ok)
	}
}

// One request through the queue, the mock driver's work included; no thread
// is woken.
func BenchmarkQueue(b *testing.B) {
	for _, indirect := range []bool{false, true} {
		b.Run(fmt.Sprintf("indirect=%v", indirect), func(b *testing.B) {
			r := newRig(b, 256, bothFeatures)
			r.ring.Notify = func() {}
			c := r.q.NewChain()
			b.ReportAllocs()
			for b.Loop() {
				roundTrip(b, r, c, indirect)
			}
		})
	}
}

// FuzzQueue gives a queue any ring memory and any order of calls. The input
// is the calls, then what guest memory holds from the rings on.
func FuzzQueue(f *testing.F) {
	const (
		ramSize = 16 << 10
		rings   = 0x1000 // descriptors, then the two rings
		size    = 8
		avail   = rings + 16*size
		used    = avail + 32
		usedEnd = used + 6 + 8*size
	)
	const ( // calls
		pop = iota
		push
		interrupt
		enable
		disable
		restart
		more // the driver makes one more chain available
		calls
	)
	ram, err := memory.New(ramSize)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { ram.Close() })
	doorbell, err := sys.NewEventFD()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { doorbell.Close() })

	// Seeds: what the mock driver writes, and each rule broken.
	seed := func(features byte, descs []desc, table []desc, heads ...uint16) {
		b := make([]byte, 0x400)
		put(b, descs...)
		put(b[0x200:], table...)
		for i, h := range heads {
			binary.LittleEndian.PutUint16(b[avail-rings+4+2*i:], h)
		}
		binary.LittleEndian.PutUint16(b[avail-rings+2:], uint16(len(heads)))
		f.Add([]byte{disable, pop, pop, push, interrupt, enable, more, pop, push, interrupt, push, restart, pop}, features, b)
	}
	const N, W, I = descNext, descWrite, descIndirect
	seed(0, []desc{{0x2000, 16, 0, 0}}, nil, 0)
	seed(1, []desc{{0x2000, 16, N, 1}, {0x3000, 4096, W, 0}}, nil, 0, 0)
	seed(3, []desc{{rings + 0x200, 48, I, 0}}, []desc{{0x2000, 16, N, 1}, {0x3000, 512, N | W, 2}, {0x3800, 8, W, 0}}, 0)
	seed(3, []desc{{0x2000, 16, N, 1}, {rings + 0x200, 16, I, 0}}, []desc{{rings + 0x200, 16, I, 0}}, 0)
	seed(1, []desc{{0x2000, 16, N, 0}}, nil, 0)
	seed(1, []desc{{0x2000, 0xffffffff, W, 0}}, nil, 0)
	seed(2, []desc{{used, 64, W, 0}}, nil, 0) // the device overwrites its own ring

	fill := bytes.Repeat([]byte{0x5a}, ramSize)
	f.Fuzz(func(t *testing.T, ops []byte, features byte, image []byte) {
		all, _ := ram.Slice(0, ramSize)
		clear(all)
		copy(all[rings:], image)
		cfg := QueueConfig{RAM: ram, Features: FeatureVersion1, MaxSize: 16, Doorbell: doorbell, Interrupt: func() {}}
		if features&1 != 0 {
			cfg.Features |= FeatureEventIdx
		}
		if features&2 != 0 {
			cfg.Features |= FeatureIndirectDesc
		}
		state := QueueState{Size: size, Desc: rings, Avail: avail, Used: used}
		q, err := NewQueue(cfg, state)
		if err != nil {
			t.Fatal(err)
		}
		expect := bytes.Clone(all)  // what guest memory must look like
		drivers := bytes.Clone(all) // and without what the device wrote
		takeDirty(ram)
		var chains []*Chain
		for _, op := range ops {
			switch op % calls {
			case pop:
				c := q.NewChain()
				ok, err := q.Pop(c)
				if ok && err != nil {
					t.Fatalf("Pop() = a chain and %v", err)
				}
				if !ok {
					continue
				}
				if n := len(c.Readable) + len(c.Writable); n == 0 || n > 16 || c.Head >= size {
					t.Fatalf("Pop() = chain %d of %d segments", c.Head, n)
				}
				chains = append(chains, c)
			case push:
				if len(chains) == 0 {
					continue
				}
				c := chains[0]
				chains = chains[1:]
				// A device fills what it may write, and nothing else.
				for _, s := range c.Writable {
					n := copy(s.Data, fill)
					copy(expect[s.GPA:], fill[:n])
				}
				q.Push(c, 1)
			case interrupt:
				q.Interrupt()
			case enable:
				q.EnableNotify()
			case disable:
				q.DisableNotify()
			case restart:
				s := q.State()
				nq, err := NewQueue(cfg, s)
				if (err == nil) != (s.LastAvail == s.UsedIndex) || (nq == nil) == (err == nil) {
					t.Fatalf("NewQueue(%+v) = %v, %v", s, nq, err)
				}
				if err == nil {
					q = nq
				}
			case more:
				index := binary.LittleEndian.Uint16(all[avail+2:]) + 1
				memory.Store16(all[avail+2:], index)
				memory.Store16(expect[avail+2:], index)
				memory.Store16(drivers[avail+2:], index)
			}
			if !bytes.Equal(all[:used], expect[:used]) || !bytes.Equal(all[usedEnd:], expect[usedEnd:]) {
				t.Fatalf("op %d wrote outside the used ring and the writable segments", op%calls)
			}
			copy(expect[used:usedEnd], all[used:usedEnd])
		}
		dirty := takeDirty(ram)
		for p := range uint64(ramSize / memory.PageSize) {
			at := p * memory.PageSize
			if !bytes.Equal(all[at:at+memory.PageSize], drivers[at:at+memory.PageSize]) && !slices.Contains(dirty, p) {
				t.Fatalf("the device wrote into page %d without marking it", p)
			}
		}
	})
}
