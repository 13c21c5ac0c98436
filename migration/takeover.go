package migration

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// takeover runs the reservations' machines of one side, those of all LUNs at
// the same time, each in a goroutine of its own. The machines decide what is
// done (package pr); here they are connected to the migration. What concerns
// the migration as a whole, such as READY, a machine does not send: it is
// reported, and done once for all.
//
// Its methods are called by one goroutine, which also reads reports.
type takeover struct {
	luns    []*lunTakeover
	reports chan report
	quit    chan struct{}
	wg      sync.WaitGroup
}

// lunTakeover is one LUN's.
type lunTakeover struct {
	index  int // in the offer
	lun    *LUN
	task   pr.Task
	ledger func(pr.Key) pr.Ledger
	inbox  chan func() // changes to the machine, in its goroutine
	ended  chan struct{}

	// Of the goroutine.
	key    pr.Key        // the guest's, as STATE has it
	ask    time.Duration // bounds an Await, if not 0
	forced bool
	came   []scsi.Sense // the source's unit attentions, with STATE

	// Of takeover's caller.
	finished bool
	told     map[pr.MsgKind]bool // what was reported
	outcome  pr.Outcome
	tell     []scsi.Sense // unit attentions that the guest must get
	began    time.Time
	took     time.Duration
}

// report is what a LUN's goroutine says.
type report struct {
	lun      *lunTakeover
	kind     pr.MsgKind // Ready, Commit, Abort
	finished bool
	outcome  pr.Outcome
	tell     []scsi.Sense
	again    bool // a forced resume could not be done now
}

// maxInbox is how many of a peer's messages may wait for a machine: the
// protocol never has more than two on their way.
const maxInbox = 8

func newTakeover(luns int) *takeover {
	return &takeover{reports: make(chan report, 8*luns), quit: make(chan struct{})}
}

// Note and Erase implement pr.Ledger: the key is known by then.
func (x *lunTakeover) Note(handed bool) error { return x.ledger(x.key).Note(handed) }
func (x *lunTakeover) Erase() error           { return x.ledger(x.key).Erase() }

// add starts a LUN's machine. ledger makes its journal entry, send puts a
// message on the wire, came is what is known by now of unit attentions that
// the guest must get.
func (t *takeover) add(index int, lun *LUN, m pr.Peer, came []scsi.Sense, ledger func(pr.Key) pr.Ledger, send func(*vmmv1.Reservation) error) {
	x := &lunTakeover{index: index, lun: lun, ledger: ledger, came: came, inbox: make(chan func(), 2*maxInbox), ended: make(chan struct{}), told: map[pr.MsgKind]bool{}}
	x.task = pr.Task{Machine: m, Port: lun.Port, Ledger: x}
	x.task.Tell = func(m pr.Msg) error {
		switch m.Kind {
		case pr.Ready, pr.Commit, pr.Abort:
			t.reports <- report{lun: x, kind: m.Kind}
			return nil
		}
		w := encodeReservation(index, m)
		if m.Kind == pr.State {
			x.key = m.Key
			seen := lun.Port.Seen
			if lun.Pending != nil {
				seen = append(lun.Pending(), seen...)
			}
			w.Attentions = encodeSenses(x.keep(seen, false))
		}
		return send(w)
	}
	t.luns = append(t.luns, x)
	t.wg.Go(func() { t.run(x, m) })
}

// run drives one machine to its end. No context bounds it: each command has
// its deadline (pr.Port.Timeout), each machine gives up after few of them, and
// a removal of ours must not be cut short because something else is late.
func (t *takeover) run(x *lunTakeover, m pr.Peer) {
	defer close(x.ended)
	ctx := context.Background()
	drain := func() {
		// On a nexus that both sides have, the guest finds by itself what is
		// pending there; and it may run on the other side already.
		if !x.same() {
			// What does not answer now will not answer the machine either,
			// which knows what to do then.
			_ = x.lun.Port.Drain(ctx)
		}
	}
	drain()
	for {
		at := x.lun.Port.Run(ctx, m, x.task.Ledger, x.task.Tell)
		if at == pr.Finish {
			break
		}
		if x.forced {
			x.forced = false
			t.reports <- report{lun: x, again: true}
		}
		var late <-chan time.Time
		if x.ask > 0 {
			late = time.After(x.ask)
		}
		select {
		case change := <-x.inbox:
			change()
		case <-late:
			m.Lost()
		case <-t.quit:
			return
		}
	}
	drain()
	o := outcomeOf(m)
	tell := slices.Clone(x.came)
	add := func(s scsi.Sense) {
		if !slices.Contains(tell, s) {
			tell = append(tell, s)
		}
	}
	for _, s := range x.keep(x.lun.Port.Seen, o.Kind != pr.Kept && o.Kind != pr.NothingHeld) {
		add(s)
	}
	if s, ok := o.Attention(); ok {
		add(s)
	}
	t.reports <- report{lun: x, finished: true, outcome: o, tell: tell}
}

// same says that both sides have the LUN by one nexus.
func (x *lunTakeover) same() bool { return x.task.Machine.Pair().Same }

// keep is which of the unit attentions that were met the guest must be told
// (pr.Keep): all, on a nexus that stays its own, where nothing of ours causes
// any.
func (x *lunTakeover) keep(seen []scsi.Sense, ours bool) []scsi.Sense {
	if x.same() {
		return seen
	}
	return pr.Keep(seen, ours)
}

func outcomeOf(m pr.Peer) pr.Outcome {
	switch m := m.(type) {
	case *pr.Source:
		return m.Outcome()
	case *pr.Dest:
		return m.Outcome()
	}
	return pr.Outcome{}
}

// take books a report.
func (t *takeover) take(r report) {
	x := r.lun
	if r.kind != pr.NoMessage {
		x.told[r.kind] = true
	}
	if r.finished {
		x.finished, x.outcome, x.tell = true, r.outcome, r.tell
		if !x.began.IsZero() {
			x.took = time.Since(x.began)
		}
	}
}

// all says that every LUN has reported kind, or has finished.
func (t *takeover) all(kind pr.MsgKind) bool {
	return !slices.ContainsFunc(t.luns, func(x *lunTakeover) bool { return !x.finished && !x.told[kind] })
}

func (t *takeover) finished() bool {
	return !slices.ContainsFunc(t.luns, func(x *lunTakeover) bool { return !x.finished })
}

// change has every machine that has not finished changed by f, in its own
// goroutine.
func (t *takeover) change(f func(*lunTakeover)) {
	for _, x := range t.luns {
		select {
		case x.inbox <- func() { f(x) }:
		case <-x.ended:
		}
	}
}

// failure is the first LUN that keeps the migration from going on, as a
// sentence.
func (t *takeover) failure() string {
	for _, x := range t.luns {
		if x.finished {
			switch x.outcome.Kind {
			case pr.Refused, pr.GivenUp, pr.Blocked, pr.Undecided:
				return x.outcome.Sentence(x.lun.ID)
			}
		}
	}
	return ""
}

func (t *takeover) blocked() bool {
	return slices.ContainsFunc(t.luns, func(x *lunTakeover) bool {
		return x.finished && (x.outcome.Kind == pr.Blocked || x.outcome.Kind == pr.Undecided)
	})
}

// settled tells the LUNs, whose guest is about to run here.
func (t *takeover) settled() {
	for _, x := range t.luns {
		if x.lun.Settled != nil {
			x.lun.Settled(x.outcome, x.tell)
		}
	}
}

func (t *takeover) outcomes() []LUNOutcome {
	var list []LUNOutcome
	for _, x := range t.luns {
		list = append(list, LUNOutcome{ID: x.lun.ID, Sentence: x.outcome.Sentence(x.lun.ID), Takeover: x.took})
	}
	return list
}

// close ends the goroutines, those of machines that have not finished too, and
// waits for them: at most as long as a few commands take.
func (t *takeover) close() {
	close(t.quit)
	t.wg.Wait()
}

// deliver passes a message of the other side on.
func (t *takeover) deliver(w *vmmv1.Reservation, f func(*lunTakeover, pr.Msg)) error {
	i := slices.IndexFunc(t.luns, func(x *lunTakeover) bool { return uint64(x.index) == uint64(w.Lun) })
	if i < 0 {
		return errProtocol("a reservation of LUN %d, which has none that moves", w.Lun)
	}
	m, err := decodeReservation(w)
	if err != nil {
		return err
	}
	x := t.luns[i]
	if len(x.inbox) >= maxInbox { // the other half is for what this side has to say
		return errProtocol("more than %d messages about LUN %s at a time", maxInbox, x.lun.ID)
	}
	select {
	case x.inbox <- func() { f(x, m) }:
	case <-x.ended:
	}
	return nil
}

// The words of package pr on the wire.
var (
	steps = map[pr.MsgKind]vmmv1.Reservation_Step{
		pr.State: vmmv1.Reservation_STEP_STATE, pr.Proved: vmmv1.Reservation_STEP_PROVED, pr.Gave: vmmv1.Reservation_STEP_GAVE,
		pr.AskProof: vmmv1.Reservation_STEP_ASK_PROOF, pr.AskMove: vmmv1.Reservation_STEP_ASK_MOVE, pr.AskUnregister: vmmv1.Reservation_STEP_ASK_UNREGISTER,
	}
	results = map[pr.Result]vmmv1.Reservation_Result{
		pr.Done: vmmv1.Reservation_RESULT_DONE, pr.Conflicted: vmmv1.Reservation_RESULT_CONFLICT, pr.Failed: vmmv1.Reservation_RESULT_ERROR,
	}
)

func encodeReservation(lun int, m pr.Msg) *vmmv1.Reservation {
	return &vmmv1.Reservation{
		Lun: uint32(lun), Step: steps[m.Kind], Result: results[m.Result],
		Type: uint32(m.Type), Persist: m.Persist, Fenced: m.Fenced, Key: uint64(m.Key),
	}
}

func decodeReservation(w *vmmv1.Reservation) (pr.Msg, error) {
	m := pr.Msg{Persist: w.Persist, Fenced: w.Fenced, Key: pr.Key(w.Key), Type: pr.Type(w.Type), Result: pr.Failed}
	for k, s := range steps {
		if s == w.Step {
			m.Kind = k
		}
	}
	for r, s := range results {
		if s == w.Result {
			m.Result = r
		}
	}
	if m.Kind == pr.NoMessage || results[m.Result] != w.Result || w.Type > 0xf {
		return m, errProtocol("reservation step %v with result %v and type %d", w.Step, w.Result, w.Type)
	}
	return m, nil
}

// maxAttentions bounds the unit attentions that travel with one LUN.
const maxAttentions = 16

func encodeSenses(list []scsi.Sense) []uint32 {
	var w []uint32
	for _, s := range list[:min(len(list), maxAttentions)] {
		w = append(w, uint32(s.Key)<<16|uint32(s.ASC)<<8|uint32(s.ASCQ))
	}
	return w
}

func decodeSenses(w []uint32) ([]scsi.Sense, error) {
	if len(w) > maxAttentions {
		return nil, errProtocol("%d unit attentions", len(w))
	}
	var list []scsi.Sense
	for _, v := range w {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], v)
		s := scsi.Sense{Key: scsi.SenseKey(b[1]), ASC: b[2], ASCQ: b[3]}
		if b[0] != 0 || s.Key != scsi.UnitAttention {
			return nil, errProtocol("unit attention %#x", v)
		}
		list = append(list, s)
	}
	return list, nil
}

// offerLUN is a LUN as this host sees it.
func offerLUN(l *LUN) *vmmv1.HostLun {
	w := &vmmv1.HostLun{
		Id: l.ID, Identity: l.Identity, BootId: l.BootID, Address: l.Address,
		TransportId: []byte(l.Nexus.Initiator), TargetPort: uint32(l.Nexus.TargetPort),
	}
	w.Nonce = l.Nonce
	if f := l.Preflight; f != nil {
		w.Reservations, w.FullStatus, w.RegisterAndMove = true, f.FullStatus, f.Move
	}
	if l.Tracked != nil {
		t := l.Tracked()
		w.Key, w.Spc2 = uint64(t.Key), t.SPC2
	}
	return w
}

// offeredLUN is what a peer says of a LUN of its own.
func offeredLUN(w *vmmv1.HostLun) (OfferedLUN, error) {
	n, err := nexusOf(w)
	l := OfferedLUN{ID: w.GetId(), Identity: w.GetIdentity(), BootID: w.GetBootId(), Address: w.GetAddress(), Nexus: n}
	if w.GetReservations() {
		l.Preflight = &pr.Preflight{FullStatus: w.FullStatus, Move: w.RegisterAndMove}
	}
	return l, err
}

// nexusOf is the nexus that a peer claims to be; the zero value if it does
// not know.
func nexusOf(w *vmmv1.HostLun) (pr.Nexus, error) {
	if len(w.TransportId) == 0 {
		return pr.Nexus{}, nil
	}
	id, rest, err := pr.ParseTransportID(w.TransportId)
	if err != nil || len(rest) > 0 || w.TargetPort > 0xffff {
		return pr.Nexus{}, errProtocol("LUN %s: TransportID %x, target port %d", w.Id, w.TransportId, w.TargetPort)
	}
	return pr.Nexus{Initiator: id, TargetPort: uint16(w.TargetPort)}, nil
}

// pairOf is what both sides make of a LUN's two ends. It is nil if nothing of
// it moves: the LUN has no persistent reservations.
func pairOf(src, dst *vmmv1.HostLun) (*pr.Pair, error) {
	p, err := joined(src, dst, src.BootId != "" && src.Address != "" && src.BootId == dst.BootId && src.Address == dst.Address)
	if err == nil && p != nil && !p.Same && p.Old != (pr.Nexus{}) && p.Old == p.New {
		return nil, fmt.Errorf("LUN %s: both hosts reach it as %v, though they are not one: two guests on one nexus cannot be told apart", src.Id, p.Old)
	}
	return p, err
}

// joined is the pair of two hosts' nexuses; same says that they are one.
func joined(src, dst *vmmv1.HostLun, same bool) (*pr.Pair, error) {
	if !src.Reservations && !dst.Reservations {
		return nil, nil
	}
	if src.Reservations != dst.Reservations {
		return nil, fmt.Errorf("LUN %s: one host sees persistent reservations on it and the other does not", src.Id)
	}
	from, err := nexusOf(src)
	if err != nil {
		return nil, err
	}
	to, err := nexusOf(dst)
	if err != nil {
		return nil, err
	}
	p := &pr.Pair{Old: from, New: to, Same: same}
	if same {
		if to == (pr.Nexus{}) {
			to = from
		}
		p.Old, p.New = to, to
	}
	known := p.Old != (pr.Nexus{}) && p.New != (pr.Nexus{})
	p.FullStatus = src.FullStatus && dst.FullStatus && known
	p.Move = p.FullStatus && src.RegisterAndMove && dst.RegisterAndMove
	return p, nil
}

// entry is a LUN's journal entry at the host whose nexus is p.Old.
func entry(id ID, l *LUN, key pr.Key, p pr.Pair) pr.Entry {
	via := l.Address
	if via == "" {
		via = p.Old.Initiator.String()
	}
	return pr.Entry{
		LUN: l.Identity, Path: l.Path, Via: via, Migration: id.String(), Key: key,
		Pair: pr.Pair{Old: p.Old, New: p.New, Same: p.Same, FullStatus: p.FullStatus},
	}
}
