package disk

import (
	"errors"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
)

// slowFlusher's calls last until something is sent to end; begun counts them.
type slowFlusher struct {
	flusher
	begun int
	end   chan error
}

func newSlowFlusher() *slowFlusher {
	f := &slowFlusher{end: make(chan error)}
	f.init(func() error {
		f.begun++
		return <-f.end
	})
	return f
}

// start calls flush in another goroutine and returns where its answer comes.
func start(flush func() error) chan error {
	answer := make(chan error, 1)
	go func() { answer <- flush() }()
	synctest.Wait() // it runs, or waits for the one that does
	return answer
}

// TestFlushesShare: who comes while a call is running gets the next one,
// together with all others who do.
func TestFlushesShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newSlowFlusher()
		first := start(f.flushAll)
		var late []chan error
		for range 10 {
			late = append(late, start(func() error { return f.flush(0) }))
		}
		f.end <- nil
		synctest.Wait()
		if err := <-first; err != nil || f.begun != 2 {
			t.Errorf("the first = %v, and %d calls have begun; want 2", err, f.begun)
		}
		for i := range late {
			if len(late[i]) > 0 {
				t.Errorf("caller %d is done before the call that began after it", i)
			}
		}
		f.end <- nil
		synctest.Wait()
		for i := range late {
			if err := <-late[i]; err != nil {
				t.Errorf("caller %d: %v", i, err)
			}
		}
		if f.begun != 2 {
			t.Errorf("%d calls; want 2", f.begun)
		}
	})
}

// TestFlushTellsAll: the kernel tells of a failed write-back once; the flusher
// tells everybody whose data may have been in it, and nobody later.
func TestFlushTellsAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newSlowFlusher()
		expect := func(name string, answer chan error, want error) {
			t.Helper()
			if err := <-answer; err != want {
				t.Errorf("%s = %v; want %v", name, err, want)
			}
		}
		early := f.failures()
		first := start(f.flushAll)
		second := start(f.flushAll)
		fua := start(func() error { return f.flush(early) })
		f.end <- unix.EIO
		f.end <- nil // the call that second and fua share succeeds
		expect("the flush that failed", first, unix.EIO)
		expect("one that was waiting", second, unix.EIO)
		expect("a FUA write that was waiting", fua, unix.EIO)

		later := start(f.flushAll)
		f.end <- nil
		expect("a later flush", later, nil)
		late := start(func() error { return f.flush(early) })
		f.end <- nil
		expect("a FUA write whose data was written before the failure", late, unix.EIO)

		// A failure that only a FUA write met is still news to a flush.
		now := f.failures()
		fua = start(func() error { return f.flush(now) })
		f.end <- unix.ENOSPC
		expect("a FUA write that failed", fua, unix.ENOSPC)
		for _, want := range []error{unix.ENOSPC, nil} {
			next := start(f.flushAll)
			f.end <- nil
			expect("the next flush", next, want)
		}
	})
}

// Who leaves the disk to another host has everything on the medium, and does
// not swallow an error that the guest has still to hear of.
func TestLeave(t *testing.T) {
	f := &memFile{data: make([]byte, 1<<20)}
	l := newMem(t, f, Options{})
	if err := l.Leave(); err != nil || f.syncs != 1 {
		t.Errorf("Leave() = %v after %d syncs; want nil after one", err, f.syncs)
	}
	f.onSync = func() error { return unix.EIO }
	for range 2 {
		if err := l.Leave(); !errors.Is(err, unix.EIO) {
			t.Errorf("Leave() = %v; want EIO", err)
		}
	}
	f.onSync = nil
	if err := l.Leave(); !errors.Is(err, unix.EIO) {
		t.Errorf("Leave() = %v; want EIO until the guest knows", err)
	}
	l.wce.Store(false) // then the write that met it has told
	if err := l.Leave(); err != nil {
		t.Errorf("Leave() with the write cache off = %v; want nil", err)
	}
	l.wce.Store(true)
	if err := l.flusher.flushAll(); err == nil {
		t.Error("flushAll() = nil; want the error that nobody has told of")
	}
	if err := l.Leave(); err != nil {
		t.Errorf("Leave() = %v; want nil once the error was told", err)
	}
	if err := l.Arrive(); err != nil || f.forgotten != 1 {
		t.Errorf("Arrive() = %v, the cache was dropped %d times; want once", err, f.forgotten)
	}
}
