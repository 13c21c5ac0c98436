package virtio

import (
	"encoding/binary"
	"fmt"
	"sync"
)

// Events (virtio 1.3, 5.6.6.3).
const (
	eventSize = 16 // bytes: event, lun, reason

	scsiNoEvent        = 0
	scsiTransportReset = 1
	scsiParamChange    = 3
	scsiEventsMissed   = 1 << 31

	scsiReasonRescan  = 1
	scsiReasonRemoved = 2
)

// eventQueue tells the driver of things it did not ask for. Events do not
// queue up here: where there is no buffer, or guest memory must not be
// touched, all that remains is that events were missed. A driver that hears
// so scans the bus, which finds out everything.
type eventQueue struct {
	mu     sync.Mutex   // makes its holder the one goroutine that pops
	live   *scsiSession // nil unless the device is started
	open   bool         // the device is not quiesced
	missed bool
	chain  Chain
}

func (e *eventQueue) start(l *scsiSession) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.live, e.open = l, true
}

// rest keeps e from touching guest memory until start.
func (e *eventQueue) rest() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.open = false
}

// forget is what a reset does. A driver that starts anew scans the bus anyway.
func (e *eventQueue) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.live, e.open, e.missed = nil, false, false
}

func (e *eventQueue) isMissed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.missed
}

func (e *eventQueue) setMissed(missed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.missed = missed
}

// send reports one event, if the driver has agreed to hear such events. A
// device that is not started has nobody to tell: the driver will scan. told is
// false of a driver that runs and does not learn of this very event.
func (e *eventQueue) send(event uint32, to [8]byte, reason uint32) (told bool) {
	e.mu.Lock()
	l := e.live
	feature := uint64(scsiFeatureHotplug)
	if event == scsiParamChange {
		feature = scsiFeatureChange
	}
	if l == nil || l.features&feature == 0 {
		e.mu.Unlock()
		return l == nil
	}
	sent, err := e.put(event, to, reason)
	if !sent {
		e.missed = true
		if l.event != nil {
			l.event.Kick() // the worker asks to be told of the next buffer
		}
	}
	e.mu.Unlock()
	if err != nil {
		l.broke(err) // which may call back: no lock is held
	}
	return sent
}

// put fills the next buffer, if there is one. The lock is held.
func (e *eventQueue) put(event uint32, to [8]byte, reason uint32) (sent bool, err error) {
	l := e.live
	if !e.open || l.event == nil || l.failed.Load() {
		return false, nil
	}
	ok, err := l.event.Pop(&e.chain)
	if err == nil && !ok {
		return false, nil
	}
	if err == nil && (len(e.chain.Readable) > 0 || length(e.chain.Writable) < eventSize) {
		err = fmt.Errorf("a buffer for an event has %d writable bytes behind %d readable ones: it must have %d and none",
			length(e.chain.Writable), length(e.chain.Readable), eventSize)
	}
	if err != nil {
		return false, fmt.Errorf("event queue: %w", err)
	}
	if e.missed {
		event |= scsiEventsMissed
		e.missed = false
	}
	var b [eventSize]byte
	binary.LittleEndian.PutUint32(b[0:], event)
	copy(b[4:], to[:])
	binary.LittleEndian.PutUint32(b[12:], reason)
	scatter(e.chain.Writable, b[:])
	l.event.Push(&e.chain, eventSize)
	l.event.Interrupt()
	return true, nil
}

// take is the event queue's worker: it has something to do only when events
// were missed and a buffer turns up.
func (e *eventQueue) take() (again bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.open {
		return false, nil // the worker is about to leave
	}
	if e.missed {
		if _, err := e.put(scsiNoEvent, [8]byte{}, 0); err != nil {
			return false, err
		}
	}
	// Buffers that lie ready are for later events: they are no reason to come
	// again.
	more := e.live.event.EnableNotify()
	return e.missed && more, nil
}
