package disk

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"vmm/scsi"
)

// tasks is a queue whose commands end when the test says so.
type tasks struct {
	queue
	t       *testing.T
	mu      sync.Mutex
	running map[string]chan struct{} // by the command's name, its CDB
	done    []string
	reset   []string // came back with ResetOccurred
	full    []string // came back with TASK SET FULL
}

func newTasks(t *testing.T) *tasks {
	q := &tasks{t: t, running: map[string]chan struct{}{}}
	q.init(func(_ *worker, c *scsi.Command) {
		end := make(chan struct{})
		q.mu.Lock()
		q.running[string(c.CDB)] = end
		q.mu.Unlock()
		<-end
		c.Finish(0)
	})
	return q
}

func (q *tasks) send(attr scsi.TaskAttr, names ...string) {
	for _, name := range names {
		q.submit(&scsi.Command{CDB: []byte(name), Attr: attr, Done: func(c *scsi.Command) {
			q.mu.Lock()
			defer q.mu.Unlock()
			switch {
			case c.Outcome == scsi.ResetOccurred:
				q.reset = append(q.reset, string(c.CDB))
			case c.Status == scsi.TaskSetFull:
				q.full = append(q.full, string(c.CDB))
			default:
				q.done = append(q.done, string(c.CDB))
			}
			c.CDB = []byte("somebody else's by now")
			c.Attr = scsi.Ordered
		}})
	}
}

// end lets commands that are running end.
func (q *tasks) end(names ...string) {
	q.t.Helper()
	synctest.Wait()
	for _, name := range names {
		q.mu.Lock()
		end := q.running[name]
		delete(q.running, name)
		q.mu.Unlock()
		if end == nil {
			q.t.Fatalf("%q is not running", name)
		}
		close(end)
		synctest.Wait()
	}
}

// expect compares what is running with want.
func (q *tasks) expect(want ...string) {
	q.t.Helper()
	synctest.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	var got []string
	for name := range q.running {
		got = append(got, name)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		q.t.Errorf("running: %q; want %q", got, want)
	}
}

func (q *tasks) endAll() {
	q.t.Helper()
	for {
		synctest.Wait()
		q.mu.Lock()
		for name, end := range q.running {
			delete(q.running, name)
			close(end)
		}
		q.mu.Unlock()
		synctest.Wait()
		if len(q.running) == 0 {
			break
		}
	}
	if !q.close() {
		q.t.Error("the queue was closed already")
	}
}

func TestTaskAttributes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTasks(t)
		q.send(scsi.Simple, "a", "b")
		q.send(scsi.Ordered, "c")
		q.send(scsi.Simple, "d", "e")
		q.send(scsi.Ordered, "f", "g")
		q.expect("a", "b")
		q.send(scsi.HeadOfQueue, "h") // at once, and it delays c
		q.expect("a", "b", "h")
		q.end("a", "b")
		q.expect("h")
		q.end("h")
		q.expect("c") // alone
		q.send(scsi.Simple, "i")
		q.send(scsi.HeadOfQueue, "j")
		q.expect("c", "j")
		q.end("c")
		q.expect("d", "e", "j")
		q.end("j", "e", "d")
		q.expect("f")
		q.end("f")
		q.expect("g")
		q.end("g")
		q.expect("i")
		q.endAll()
	})
}

func TestSlowCommandDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTasks(t)
		q.send(scsi.Simple, "slow")
		for range 3 * maxWorkers {
			q.send(scsi.Simple, "quick")
			q.expect("quick", "slow")
			q.end("quick")
		}
		if q.workers != 2 {
			t.Errorf("%d workers for two commands at a time", q.workers)
		}
		q.endAll()
	})
}

func TestTaskSetFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTasks(t)
		name := func(i int) string { return string(rune('A'+i/1000)) + string(rune(0x100+i%1000)) }
		all := maxWorkers + maxQueued
		for i := range all + 2 {
			q.send(scsi.Simple, name(i))
		}
		synctest.Wait()
		if want := []string{name(all), name(all + 1)}; !slices.Equal(q.full, want) {
			t.Errorf("TASK SET FULL for %q; want %q", q.full, want)
		}
		if q.workers != maxWorkers || len(q.running) != maxWorkers {
			t.Errorf("%d workers run %d commands; want %d", q.workers, len(q.running), maxWorkers)
		}
		q.endAll()
		if len(q.done) != all {
			t.Errorf("%d commands are done; want %d", len(q.done), all)
		}
	})
}

func TestResetDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTasks(t)
		q.send(scsi.Simple, "a", "b")
		q.send(scsi.Ordered, "c")
		q.send(scsi.Simple, "d")
		resets := 0
		over := make(chan error, 2)
		for range 2 {
			go func() {
				over <- q.drain(func() {
					resets++
					if q.active != 0 {
						t.Errorf("reset with %d commands running", q.active)
					}
				})
			}()
			synctest.Wait()
		}
		if want := []string{"c", "d"}; !slices.Equal(q.reset, want) {
			t.Errorf("given back: %q; want %q", q.reset, want)
		}
		q.send(scsi.Simple, "e")
		q.send(scsi.HeadOfQueue, "f")
		q.expect("a", "b")
		q.end("a")
		if len(over) != 0 {
			t.Error("a reset was over before the commands were")
		}
		q.end("b")
		if err := <-over; err != nil {
			t.Error(err)
		}
		q.expect("e", "f") // which the second reset waits for
		q.end("e", "f")
		if err := <-over; err != nil {
			t.Error(err)
		}
		if resets != 2 {
			t.Errorf("%d resets; want 2", resets)
		}
		q.endAll()
		if want := []string{"a", "b", "e", "f"}; !slices.Equal(q.done, want) || len(q.reset) != 2 {
			t.Errorf("done: %q; want %q; given back: %q", q.done, want, q.reset)
		}
	})
}

// TestCloseWaits also has a Done that submits.
func TestCloseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTasks(t)
		again := &scsi.Command{CDB: []byte("again")}
		q.submit(&scsi.Command{CDB: []byte("first"), Done: func(*scsi.Command) {
			again.Done = func(*scsi.Command) { q.done = append(q.done, "again") }
			q.submit(again)
		}})
		q.end("first")
		closed := make(chan bool, 1)
		go func() { closed <- q.close() }()
		synctest.Wait()
		if len(closed) != 0 {
			t.Error("close did not wait")
		}
		q.end("again")
		if !<-closed || q.close() {
			t.Error("close says that it was not the first, or the second that it was")
		}
	})
}

func TestRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r ranges
		r.init()
		type holder struct {
			worker
			has bool
		}
		lock := func(off, end uint64, exclusive bool) *holder {
			h := &holder{}
			go func() {
				r.lock(&h.worker, off, end, exclusive)
				h.has = true
			}()
			synctest.Wait()
			return h
		}
		unlock := func(h *holder) {
			r.unlock(&h.worker)
			synctest.Wait()
		}
		expect := func(name string, h *holder, want bool) {
			t.Helper()
			if h.has != want {
				t.Errorf("%s holds its range: %v; want %v", name, h.has, want)
			}
		}
		a := lock(0, 10, false)
		b := lock(5, 15, false)
		expect("a", a, true)
		expect("b, shared", b, true)
		c := lock(9, 12, true)
		expect("c, exclusive", c, false)
		d := lock(11, 12, false)
		expect("d, behind c", d, false)
		e := lock(12, 13, false)
		expect("e, beside c", e, true)
		f := lock(20, 30, true)
		expect("f, elsewhere", f, true)
		unlock(a)
		expect("c", c, false)
		unlock(b)
		expect("c", c, true)
		expect("d", d, false)
		unlock(c)
		expect("d", d, true)
		all := lock(0, ^uint64(0), true)
		for _, h := range []*holder{d, f} {
			unlock(h)
			expect("all", all, false)
		}
		unlock(e)
		expect("all", all, true)
		unlock(all)
		if len(r.held) != 0 {
			t.Errorf("left: %v", r.held)
		}
	})
}
