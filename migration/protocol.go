package migration

import (
	"fmt"

	"google.golang.org/protobuf/reflect/protoreflect"

	vmmv1 "vmm/proto/vmm/v1"
)

// kind is a message's meaning: the number of its field in StreamMessage.
type kind int

const (
	kindHello kind = iota + 2
	kindWelcome
	kindRefused
	kindProgress
	kindRoundDone
	kindState
	kindReservation
	kindReady
	kindCommit
	kindRunning
	kindAborted
	kindAbort
	kindAcknowledge
	kindQuery
	kindUndecided
	kindAttachment
	kinds // one more than the last
)

func (k kind) String() string {
	d := (*vmmv1.StreamMessage)(nil).ProtoReflect().Descriptor().Fields()
	for i := range d.Len() {
		if f := d.Get(i); f.Number() == protoreflect.FieldNumber(k) {
			return string(f.Name())
		}
	}
	return fmt.Sprintf("message %d", int(k))
}

// kindOf is m's kind; 0 for a message that this version does not know.
func kindOf(m *vmmv1.StreamMessage) kind {
	r := m.ProtoReflect()
	if f := r.WhichOneof(r.Descriptor().Oneofs().Get(0)); f != nil {
		return kind(f.Number())
	}
	return 0
}

// state is where one side stands.
type state uint8

const (
	_ state = iota

	// The source.
	offering // Hello is to be sent
	offered  // Welcome is due; the guest runs here
	copying  // rounds; the guest runs here, or was stopped and State is to be sent
	handing  // State was sent: the destination loads and prepares
	willing  // READY came
	handed   // COMMIT was sent: the guest runs here no more
	revoking // ABORT was sent, ABORTED is due
	returned // the guest is the source's, for good
	gone     // the guest runs at the destination

	// The destination.
	listening // Hello is due
	weighing  // Welcome or Refused is to be sent
	filling   // rounds
	loading   // State came: it is loaded, the reservations are prepared
	ready     // READY was sent, COMMIT is due
	moving    // COMMIT came: the reservations move
	undoing   // ABORT came
	running   // noted and run: RUNNING is the answer to everything
	aborted   // noted: ABORTED is the answer to everything
	stuck     // after COMMIT, but the guest cannot run here
	over      // nothing more is said

	states
)

func (s state) String() string {
	return [states]string{
		"no state", "offering", "offered", "copying", "handing", "willing", "handed", "revoking", "returned", "gone",
		"listening", "weighing", "filling", "loading", "ready", "moving", "undoing", "running", "aborted", "stuck", "over",
	}[s]
}

// arrow is something that happens to a side: it sends or receives a message.
type arrow struct {
	at   state
	sent bool
	kind kind
}

const (
	sends    = true
	receives = false
)

// protocol is every message that may be sent or received, and the state that
// it leads to. What is not here is an error: before COMMIT it ends the
// migration, after COMMIT the connection.
//
// A message that was sent before the sender knew of an abort arrives after
// it. Those are the arrows at revoking, undoing and aborted that lead back.
var protocol = map[arrow]state{
	{offering, sends, kindHello}: offered,

	{offered, receives, kindWelcome}: copying,
	{offered, receives, kindRefused}: returned,
	{offered, receives, kindAborted}: returned,
	{offered, sends, kindAbort}:      revoking,

	{copying, sends, kindProgress}:     copying,
	{copying, sends, kindAttachment}:   copying,
	{copying, receives, kindRoundDone}: copying,
	{copying, sends, kindState}:        handing,
	{copying, sends, kindAbort}:        revoking,
	{copying, receives, kindAborted}:   returned,

	{handing, receives, kindRoundDone}:   handing,
	{handing, sends, kindReservation}:    handing,
	{handing, receives, kindReservation}: handing,
	{handing, receives, kindReady}:       willing,
	{handing, sends, kindAbort}:          revoking,
	{handing, receives, kindAborted}:     returned,

	{willing, sends, kindCommit}:     handed,
	{willing, sends, kindAbort}:      revoking,
	{willing, receives, kindAborted}: returned,

	{handed, sends, kindReservation}:    handed,
	{handed, receives, kindReservation}: handed,
	{handed, receives, kindUndecided}:   handed,
	{handed, receives, kindRunning}:     gone,
	{handed, receives, kindAborted}:     returned,

	{revoking, receives, kindWelcome}:     revoking,
	{revoking, receives, kindRefused}:     returned,
	{revoking, receives, kindRoundDone}:   revoking,
	{revoking, receives, kindReservation}: revoking,
	{revoking, receives, kindReady}:       revoking,
	{revoking, receives, kindAborted}:     returned,

	{returned, sends, kindAcknowledge}: returned,
	{returned, receives, kindAborted}:  returned, // to ABORT, and at the deadline
	{gone, sends, kindAcknowledge}:     gone,

	{listening, receives, kindHello}: weighing,

	{weighing, sends, kindWelcome}:  filling,
	{weighing, sends, kindRefused}:  over,
	{weighing, receives, kindAbort}: undoing,
	{weighing, sends, kindAborted}:  aborted,

	{filling, receives, kindProgress}:   filling,
	{filling, receives, kindAttachment}: filling,
	{filling, sends, kindRoundDone}:     filling,
	{filling, receives, kindState}:      loading,
	{filling, receives, kindAbort}:      undoing,
	{filling, sends, kindAborted}:       aborted,

	{loading, sends, kindRoundDone}:      loading,
	{loading, sends, kindReservation}:    loading,
	{loading, receives, kindReservation}: loading,
	{loading, sends, kindReady}:          ready,
	{loading, receives, kindAbort}:       undoing,
	{loading, sends, kindAborted}:        aborted,

	{ready, receives, kindReservation}: ready, // nobody has asked for it
	{ready, receives, kindCommit}:      moving,
	{ready, receives, kindAbort}:       undoing,
	{ready, sends, kindAborted}:        aborted,

	{moving, sends, kindReservation}:    moving,
	{moving, receives, kindReservation}: moving,
	{moving, sends, kindRunning}:        running,
	{moving, sends, kindUndecided}:      stuck,

	{undoing, sends, kindAborted}: aborted,

	{running, receives, kindReservation}: running, // a late answer
	{running, sends, kindRunning}:        running,
	{running, receives, kindAcknowledge}: over,

	{stuck, receives, kindReservation}: stuck,

	{aborted, receives, kindProgress}:    aborted,
	{aborted, receives, kindAttachment}:  aborted,
	{aborted, receives, kindState}:       aborted,
	{aborted, receives, kindReservation}: aborted,
	{aborted, receives, kindCommit}:      aborted,
	{aborted, receives, kindAbort}:       aborted,
	{aborted, sends, kindAborted}:        aborted,
	{aborted, receives, kindAcknowledge}: over,
}

// step is what a message does to a side at s.
func (s state) step(sent bool, k kind) (state, error) {
	if next, ok := protocol[arrow{s, sent, k}]; ok {
		return next, nil
	}
	if sent {
		return s, fmt.Errorf("migration: %v is not to be sent while %v", k, s)
	}
	return s, errProtocol("%v, while this side is %v", k, s)
}
