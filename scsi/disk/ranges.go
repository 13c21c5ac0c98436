package disk

import "sync"

// ranges keeps an exclusive command on a range of bytes apart from every other
// command on them. Only COMPARE AND WRITE (SBC-4 5.3: nothing may come between
// its read and its write) and changes to the whole disk are exclusive; all
// others share, so that they wait for nothing but those. Who comes first goes
// first, hence nobody starves.
type ranges struct {
	mu   sync.Mutex
	free sync.Cond
	held []byteRange // in order of arrival: running, or waiting for an earlier one
}

type byteRange struct {
	owner     *worker
	off, end  uint64
	exclusive bool
}

func (r *ranges) init() {
	r.free.L = &r.mu
	r.held = make([]byteRange, 0, maxWorkers)
}

// lock waits until owner may use the bytes off to end-1; an owner that is to
// be quick does not wait, and then ok is false. An owner has at most one
// range, which is why waiting for earlier ones cannot end in a circle.
func (r *ranges) lock(owner *worker, off, end uint64, exclusive bool) (ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = append(r.held, byteRange{owner, off, end, exclusive})
	for r.blocked(owner) {
		if owner.quick {
			r.held = r.held[:len(r.held)-1]
			return false
		}
		r.free.Wait()
	}
	return true
}

func (r *ranges) blocked(owner *worker) bool {
	i := r.index(owner)
	mine := &r.held[i]
	for j := range r.held[:i] {
		h := &r.held[j]
		if (h.exclusive || mine.exclusive) && h.off < mine.end && mine.off < h.end {
			return true
		}
	}
	return false
}

func (r *ranges) unlock(owner *worker) {
	r.mu.Lock()
	i := r.index(owner)
	r.held = append(r.held[:i], r.held[i+1:]...)
	if i < len(r.held) { // somebody came later and may be waiting
		r.free.Broadcast()
	}
	r.mu.Unlock()
}

func (r *ranges) index(owner *worker) int {
	for i := range r.held {
		if r.held[i].owner == owner {
			return i
		}
	}
	panic("disk: a range that is not held") // lock and unlock come in pairs, in one function
}
