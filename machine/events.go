package machine

import (
	"sync"
	"time"
)

// Event is something that happened to a machine.
type Event struct {
	Time   time.Time
	Kind   EventKind
	State  State  // of EventState: the state from now on
	Text   string // more, in one line
	Missed int    // of EventMissed: how many events this subscriber has not got
}

// EventKind is what an Event is about.
type EventKind string

const (
	EventState   EventKind = "state"
	EventReset   EventKind = "reset"   // the guest reset itself and boots again
	EventWarning EventKind = "warning" // what Config.Warn is told
	EventLUN     EventKind = "lun"     // a LUN was attached or detached
	EventMissed  EventKind = "missed"  // the subscriber was too slow
)

// maxPending bounds the events that wait for a slow subscriber.
const maxPending = 64

// feed hands events to whoever has subscribed. It never waits for any of them.
type feed struct {
	mu     sync.Mutex
	last   Event // the last of EventState: where a subscriber begins
	subs   map[*subscriber]bool
	closed bool
}

type subscriber struct {
	events chan Event
	missed int // since the last event that got through
}

// send passes e on if there is room, and says before it how many did not pass.
func (s *subscriber) send(e Event) {
	if s.missed > 0 && cap(s.events)-len(s.events) >= 2 {
		s.events <- Event{Time: e.Time, Kind: EventMissed, Missed: s.missed}
		s.missed = 0
	}
	if s.missed > 0 || len(s.events) == cap(s.events) {
		s.missed++
		return
	}
	s.events <- e
}

func (f *feed) publish(e Event) {
	e.Time = time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if e.Kind == EventState {
		f.last = e
	}
	for s := range f.subs {
		s.send(e)
	}
}

// end closes every subscriber's channel. What a slow one missed is not told
// any more, save that the state it saw last is not the last.
func (f *feed) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for s := range f.subs {
		close(s.events)
	}
	f.subs = nil
}

// Events subscribes to what happens to the machine. The first event is the
// state it is in. The channel is closed when the machine has ended, after the
// last event, or by cancel; a subscriber that does not keep up misses events
// and is told how many.
func (m *Machine) Events() (events <-chan Event, cancel func()) {
	f := &m.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &subscriber{events: make(chan Event, maxPending)}
	s.send(f.last)
	if f.closed {
		close(s.events)
		return s.events, func() {}
	}
	if f.subs == nil {
		f.subs = map[*subscriber]bool{}
	}
	f.subs[s] = true
	return s.events, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.subs[s] {
			delete(f.subs, s)
			close(s.events)
		}
	}
}
