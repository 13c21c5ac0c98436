package disk

import "sync"

// flusher brings the page cache to the medium with fdatasync(2), one call at a
// time.
//
// One at a time, because the kernel tells of a failed write-back once per open
// file: of two calls that both answer for the lost data, only one would fail.
// So whoever asks while a call is running waits for the next one, which all
// who wait share, and failures are counted, so that everybody whose data may
// be among what was lost hears of it, whoever's call it was that failed.
// RWF_DSYNC is not used for the same reason.
type flusher struct {
	sync func() error // fdatasync

	mu       sync.Mutex
	ended    sync.Cond
	running  bool
	begun    uint64 // calls so far
	failed   uint64 // calls that failed
	reported uint64 // of those, how many flushAll has told of
	err      error  // of the latest that failed
}

func (f *flusher) init(sync func() error) {
	f.sync = sync
	f.ended.L = &f.mu
}

// failures is the number of failed write-backs until now, to be taken before
// data is written that flush is then asked for.
func (f *flusher) failures() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failed
}

// flush brings everything that has been written to the medium. It fails if it
// cannot, or if a write-back has failed since failures was taken.
func (f *flusher) flush(failures uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.round()
	if f.failed != failures {
		return f.err
	}
	return nil
}

// flushAll is flush for one who answers for all that was ever written: it
// fails if there has been a failure that no flushAll, returned before this one
// was called, has told of.
func (f *flusher) flushAll() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	told := f.reported
	f.round()
	if f.failed == told {
		return nil
	}
	f.reported = f.failed
	return f.err
}

// flushUntold is flush for one who cannot tell the guest: it fails if there is
// a failure that no flushAll has told of.
func (f *flusher) flushUntold() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.round()
	if f.failed != f.reported {
		return f.err
	}
	return nil
}

// round waits for a call that has begun after round did. f.mu is held.
func (f *flusher) round() {
	mine := f.begun + 1
	for {
		switch {
		case f.running:
			f.ended.Wait()
		case f.begun >= mine:
			return
		default:
			f.running = true
			f.begun++
			f.mu.Unlock()
			err := f.sync()
			f.mu.Lock()
			f.running = false
			if err != nil {
				f.failed++
				f.err = err
			}
			f.ended.Broadcast()
		}
	}
}
