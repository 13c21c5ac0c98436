package twohosts

import (
	"bytes"
	"sync"
	"testing"
	"time"
)

// network is the cable that migrations use. It can be cut, and so without a
// reset, without either end being told; and it can hold up a message of a
// migration that is not encrypted (package migration has the framing).
type network struct {
	mu   sync.Mutex
	down bool
	id   []byte // of the last migration
	hold *hold  // nil: nothing is awaited
}

// hold is a wait for a message.
type hold struct {
	kind    byte          // the protobuf tag of its field in StreamMessage
	toTwo   bool          // or to host one
	reached chan struct{} // closed when it has come
	pass    chan bool     // whether it is to go on
}

// Messages, as proto/vmm/v1/stream.proto numbers them, all of wire type 2.
const (
	msgProgress    = 5<<3 | 2
	msgState       = 7<<3 | 2
	msgReservation = 8<<3 | 2
	msgReady       = 9<<3 | 2
	msgCommit      = 10<<3 | 2
	msgRunning     = 11<<3 | 2
)

func newNetwork() *network { return new(network) }

// pass is the cable's tap.
func (n *network) pass(frame []byte, toTwo bool) bool {
	n.mu.Lock()
	// The preamble of a control connection: magic, role, channel, six zero
	// bytes, ID.
	if at := bytes.Index(frame, []byte("vmmigr\r\n\x01\x00")); at >= 0 && len(frame) >= at+32 {
		n.id = bytes.Clone(frame[at+16 : at+32])
	}
	h := n.hold
	// A message begins with field 1, the ID, and then has the field that it is.
	if h != nil && h.toTwo == toTwo && n.id != nil && bytes.Contains(frame, append(append([]byte{0x0a, 16}, n.id...), h.kind)) {
		n.hold = nil
	} else {
		h = nil
	}
	down := n.down
	n.mu.Unlock()
	if down {
		return false
	}
	if h != nil {
		close(h.reached)
		return <-h.pass
	}
	return true
}

// at holds up the next migration's first message of a kind.
func (n *network) at(kind byte, toTwo bool) *hold {
	h := &hold{kind: kind, toTwo: toTwo, reached: make(chan struct{}), pass: make(chan bool, 1)}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hold, n.id = h, nil
	return h
}

// cut lets nothing through until mend.
func (n *network) cut() { n.set(true) }

func (n *network) mend() { n.set(false) }

func (n *network) set(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = down
}

// wait waits until the message is there. It stays where it is until release.
func (h *hold) wait(t *testing.T, m *process) {
	t.Helper()
	select {
	case <-h.reached:
	case <-m.ended:
		t.Fatalf("the migration ended before the message: %v\n%s", m.err, m.stderr)
	case <-time.After(startTime):
		t.Fatalf("no such message after %v", startTime)
	}
}

// release lets the message go on, or drops it.
func (h *hold) release(pass bool) { h.pass <- pass }
