package virtio

import (
	"context"
	"crypto/rand"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
)

// rngQueueSize is the size of the entropy device's queue: drivers keep one
// request in it.
const rngQueueSize = 64

// rngMost is how many bytes one request gets at most. Fewer than asked for is
// allowed, as long as it is one (virtio 1.3, 5.4.6.2), and bounds the work that one
// request can cause.
const rngMost = 64 << 10

// RNG is the entropy device (virtio 1.3, 5.4). Its bytes come from getrandom(2) by
// way of crypto/rand.
type RNG struct {
	queue *Queue // nil when not started
	fail  func(error)
	stop  atomic.Bool
	done  sync.WaitGroup
}

// NewRNG makes an entropy device.
func NewRNG() *RNG { return &RNG{} }

func (r *RNG) ID() uint16                       { return IDEntropy }
func (r *RNG) Features() uint64                 { return FeatureIndirectDesc | FeatureEventIdx }
func (r *RNG) QueueSizes() []uint16             { return []uint16{rngQueueSize} }
func (r *RNG) ReadConfig(off uint32, p []byte)  { clear(p) } // there is none
func (r *RNG) WriteConfig(off uint32, p []byte) {}

func (r *RNG) Start(a Activation) error {
	r.queue, r.fail = a.Queues[0], a.Fail
	r.Resume()
	return nil
}

func (r *RNG) Resume() {
	if r.queue == nil {
		return // the driver left the queue disabled
	}
	r.stop.Store(false)
	r.done.Go(r.work)
}

// Quiesce does not look at ctx: a request is 64 KiB of bytes at most.
func (r *RNG) Quiesce(context.Context) error {
	if r.queue == nil {
		return nil
	}
	r.stop.Store(true)
	r.queue.Kick()
	r.done.Wait()
	return nil
}

func (r *RNG) Stop() {
	_ = r.Quiesce(context.Background()) // it cannot fail
	r.queue, r.fail = nil, nil
}

// work serves the queue on a thread of its own, which sleeps in the kernel
// while there is nothing to do.
func (r *RNG) work() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := r.queue.NewChain()
	for !r.stop.Load() {
		r.queue.DisableNotify()
		if err := r.drain(c); err != nil {
			r.fail(err)
			return
		}
		if r.stop.Load() || r.queue.EnableNotify() {
			continue
		}
		if err := r.queue.Wait(); err != nil {
			r.fail(err)
			return
		}
	}
}

func (r *RNG) drain(c *Chain) error {
	for !r.stop.Load() {
		ok, err := r.queue.Pop(c)
		if !ok {
			return err
		}
		if len(c.Readable) > 0 { // virtio 1.3, 5.4.6.1
			return errors.New("a request for entropy has device-readable buffers")
		}
		filled := 0
		for _, s := range c.Writable {
			n := min(len(s.Data), rngMost-filled)
			_, _ = rand.Read(s.Data[:n]) // it cannot fail
			filled += n
		}
		r.queue.Push(c, uint32(filled))
		r.queue.Interrupt()
	}
	return nil
}

var _ Device = (*RNG)(nil)
