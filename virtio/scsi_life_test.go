package virtio

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"vmm/scsi"
	"vmm/scsi/scsitest"
	"vmm/virtio/virtiotest"
)

// Quiesce takes nothing more and returns when what it took has come back;
// Resume misses nothing that was made available meanwhile.
func TestSCSIQuiesceAndResume(t *testing.T) {
	r := newSCSIRig(t, 2)
	held := scsitest.NewHeld(4)
	r.attach(0, held)
	r.start()
	for range 3 {
		r.submit(2, &scsiCommand{lun: unit0(0), id: 1, cdb: []byte{0}})
		c := <-held.Commands
		abort := r.tmf(tmfAbortTask, unit0(0), 1)
		r.doTMF(tmfQueryTask, unit0(0), 1)
		rest := make(chan struct{})
		go func() { quiesce(t, r.dev); close(rest) }()
		select {
		case <-rest:
			t.Fatal("Quiesce returned with a command in flight")
		default:
		}
		c.Finish(0)
		<-rest
		if a := r.fetch(abort)[0]; a != scsiOK {
			t.Errorf("ABORT TASK after Quiesce = %d; want %d", a, scsiOK)
		}
		r.reap(2)
		r.reap(0)

		r.submit(2, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
		r.submit(3, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
		before := [2]QueueState{r.act.Queues[2].State(), r.act.Queues[3].State()}
		for _, s := range before {
			if s.LastAvail != s.UsedIndex {
				t.Errorf("a quiesced queue has taken %d requests and answered %d", s.LastAvail, s.UsedIndex)
			}
		}
		if len(held.Commands) != 0 {
			t.Error("a quiesced device started a command")
		}
		r.dev.Resume()
		for range 2 {
			(<-held.Commands).Finish(0)
		}
		r.reap(2)
		r.reap(3)
	}
	quiesce(t, r.dev)
	r.dev.Stop() // also on a quiesced device
	r.dev.Stop() // and on one that is not started
}

// A Quiesce whose time is over names what is in flight, and the device goes on
// as if nothing had been: the command comes back, and so do new ones.
func TestSCSIQuiesceInTime(t *testing.T) {
	r := newSCSIRig(t, 1)
	held := scsitest.NewHeld(4)
	r.attach(5, held)
	r.start()
	for range 3 {
		r.submit(2, &scsiCommand{lun: unit0(5), cdb: []byte{0x12}})
		c := <-held.Commands
		ctx, cancel := context.WithCancelCause(t.Context())
		late := make(chan error)
		go func() { late <- r.dev.Quiesce(ctx) }()
		over := errors.New("too late")
		cancel(over)
		if err := <-late; !errors.Is(err, over) || !strings.Contains(err.Error(), "commands still in flight: 1, one of them for target 5, operation code 0x12") {
			t.Errorf("Quiesce() = %v; want that, for it is %v", err, over)
		}
		r.dev.Resume()
		r.submit(2, &scsiCommand{lun: unit0(5), cdb: []byte{0}})
		(<-held.Commands).Finish(0)
		r.reap(2)
		c.Finish(0)
		r.reap(2)
	}
	quiesce(t, r.dev)
	r.dev.Resume()
}

// A driver that has more requests in flight than the queue has descriptors, by
// using one of them twice, keeps the worker waiting for a free request: a
// Quiesce is not delayed by that.
func TestSCSIQuiesceWhileWorkerWaits(t *testing.T) {
	r := newSCSIRig(t, 1)
	r.start()
	q := r.dev.live.requests[0]
	quiesce(t, r.dev)
	free := q.free
	q.spare, q.free = nil, nil // all in flight, as far as get can see
	r.dev.Resume()
	for {
		q.mu.Lock()
		waits := q.waiting > 0
		q.mu.Unlock()
		if waits {
			break
		}
		runtime.Gosched()
	}
	quiesce(t, r.dev)
	q.free = free
	r.dev.Resume()
}

// asyncLUN completes commands on other goroutines, in any order.
type asyncLUN struct {
	scsitest.Null
	pending chan *scsi.Command
	done    sync.WaitGroup
}

func newAsyncLUN(t testing.TB, goroutines int) *asyncLUN {
	l := &asyncLUN{pending: make(chan *scsi.Command, 4096)}
	for range goroutines {
		l.done.Go(func() {
			for c := range l.pending {
				c.Finish(c.Scatter([]byte{c.CDB[1], c.CDB[2], c.CDB[3], c.CDB[4]}))
			}
		})
	}
	t.Cleanup(func() { close(l.pending); l.done.Wait() })
	return l
}

func (l *asyncLUN) Submit(c *scsi.Command) { l.pending <- c }

// Every command comes back once with its own data, while the device is
// quiesced and resumed, targets come and go, and functions are sent.
func TestSCSIUnderStress(t *testing.T) {
	const queues, perQueue, depth = 3, 200, 24
	r := newSCSIRig(t, queues)
	lun := newAsyncLUN(t, 3)
	r.attach(0, lun)
	r.start()
	var stop atomic.Bool
	var others, drivers sync.WaitGroup
	others.Go(func() {
		for !stop.Load() {
			quiesce(t, r.dev)
			for q := range r.act.Queues {
				if s := r.act.Queues[q].State(); s.LastAvail != s.UsedIndex {
					t.Errorf("queue %d of a quiesced device: taken %d, answered %d", q, s.LastAvail, s.UsedIndex)
				}
			}
			r.dev.Resume()
		}
	})
	others.Go(func() {
		orderly := false
		for !stop.Load() {
			if err := r.dev.Attach(9, lun); err != nil {
				t.Error(err)
			}
			r.dev.Changed(9, scsi.CapacityChanged)
			if orderly = !orderly; orderly {
				if _, err := r.dev.Detach(t.Context(), 9, func() error { return nil }); err != nil {
					t.Error(err)
				}
			} else if err := r.remove(9); err != nil {
				t.Error(err)
			}
		}
	})
	// Each queue has a driver goroutine of its own and guest memory that was
	// laid out before.
	type work struct {
		cmds []*scsiCommand
	}
	for q := 2; q < 2+queues; q++ {
		w := &work{}
		for i := range depth {
			c := &scsiCommand{lun: unit0(uint8(9 * (i & 1))), id: uint64(q*depth + i), cdb: []byte{0xc0}, in: 4}
			c.sense = 96
			w.cmds = append(w.cmds, c)
			c.response = r.place(make([]byte, 108), 108, true)
			c.data = r.place(make([]byte, 4), 4, true)
		}
		headers := make([][]virtiotest.Buffer, depth)
		for i, c := range w.cmds {
			headers[i] = r.place(c.header(), 1000, false)
		}
		drivers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(q), 1))
			ring, free := r.rings[q], rng.Perm(depth)
			byHead := map[uint16]int{}
			for sent, back := 0, 0; back < perQueue; {
				for len(free) > 0 && sent < perQueue {
					i := free[0]
					free = free[1:]
					tag := [4]byte{byte(q), byte(i), byte(sent), byte(sent >> 8)}
					copy(r.mem.Bytes(headers[i][0].GPA+20, 4), tag[:])
					w.cmds[i].cdb = tag[:]
					head, ok := ring.Add(headers[i][0], w.cmds[i].response[0], w.cmds[i].data[0])
					if !ok {
						t.Error("no room")
						return
					}
					byHead[head] = i
					sent++
				}
				ring.Kick()
				u := r.reap(q)
				i, ok := byHead[u.Head]
				if !ok {
					t.Errorf("queue %d: chain %d came back, which was not in flight", q, u.Head)
					return
				}
				delete(byHead, u.Head)
				c := w.cmds[i]
				a := r.answer(c, u)
				switch {
				case a.code == scsiBadTarget && c.lun[1] == 9:
				case a.String() == "BUSY" && c.lun[1] == 9:
				case a.code == scsiOK && [4]byte(a.data) == [4]byte(c.cdb):
				default:
					t.Errorf("queue %d: %v with data % x; want % x", q, a, a.data, c.cdb)
				}
				free = append(free, i)
				back++
			}
		})
	}
	drivers.Go(func() { // the control queue's
		for i := range 50 {
			if got := r.doTMF(tmfAbortTaskSet, unit0(uint8(9*(i&1))), 0); got != scsiOK && got != scsiBadTarget {
				t.Errorf("ABORT TASK SET = %d", got)
			}
			if got := r.doTMF(tmfLogicalUnitReset, unit0(0), 0); got != scsiOK {
				t.Errorf("LOGICAL UNIT RESET = %d; want %d", got, scsiOK)
			}
		}
	})
	drivers.Wait()
	stop.Store(true)
	others.Wait()
	select {
	case err := <-r.failed:
		t.Errorf("the device failed: %v", err)
	default:
	}
}
