package pr

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"vmm/scsi"
)

// Sender carries one SCSI command to a logical unit and waits for its answer:
// what a machine's commands go through. data, if not nil, receives what the
// target transfers, list is what it is sent; n is how much of either was.
// An error says that the target did not answer, or not in time; a command that
// was answered with an error must not be carried out after a later one.
type Sender interface {
	Send(ctx context.Context, cdb, list, data []byte) (n int, a Answer, err error)
}

// LUN is a Sender over any scsi.LUN, for one goroutine. The guest must be
// stopped: a unit attention that was the guest's to see would be answered to
// us.
type LUN struct {
	scsi.LUN
	stuck <-chan struct{} // closed when a command that was given up has come back
}

// Send implements Sender. Past ctx's end it returns although the command is
// still in flight, keeping list and data; then no other is sent before it has
// come back. A machine concludes from what it reads what became of a command,
// which it could not if the command might still be carried out.
func (l *LUN) Send(ctx context.Context, cdb, list, data []byte) (int, Answer, error) {
	if l.stuck != nil {
		select {
		case <-l.stuck:
			l.stuck = nil
		case <-ctx.Done():
			return 0, Answer{}, fmt.Errorf("SCSI command %#02x: not sent, an earlier one has not come back: %w", cdb[0], ctx.Err())
		}
	}
	if err := ctx.Err(); err != nil {
		return 0, Answer{}, fmt.Errorf("SCSI command %#02x: not sent: %w", cdb[0], err)
	}
	done := make(chan struct{})
	c := &scsi.Command{CDB: cdb, Done: func(*scsi.Command) { close(done) }}
	switch {
	case len(list) > 0:
		c.DataOut = [][]byte{list}
	case len(data) > 0:
		c.DataIn = [][]byte{data}
	}
	l.Submit(c)
	select {
	case <-done:
	case <-ctx.Done():
		l.stuck = done
		return 0, Answer{}, fmt.Errorf("SCSI command %#02x: %w", cdb[0], ctx.Err())
	}
	if c.Outcome != scsi.Completed {
		return 0, Answer{}, fmt.Errorf("SCSI command %#02x: %v", cdb[0], c.Outcome)
	}
	a := Answer{Status: c.Status}
	if c.Status == scsi.CheckCondition {
		a.Sense, _ = scsi.ParseSense(c.Sense[:c.SenseLen])
	}
	return max(0, c.DataLen()-int(c.Residual)), a, nil
}

// Port is one LUN as its host's nexus sees it: it sends a machine's commands
// and tells it what the answers mean. It is used by one goroutine.
type Port struct {
	Sender Sender
	// Timeout bounds one command; 0 means 2 seconds.
	Timeout time.Duration
	// Seen is every unit attention that was met on the way, in order. Keep
	// says which of them the guest must still be told.
	Seen []scsi.Sense
}

// maxAttentions bounds how often one command is repeated for unit attentions,
// and for a target that is busy.
const maxAttentions = 16

// maxInData is the largest allocation length of PERSISTENT RESERVE IN.
const maxInData = 65535

// send sends a command until it is answered with something other than a unit
// attention: such an answer means that the command was not carried out.
func (p *Port) send(ctx context.Context, cdb, list, data []byte) (int, Answer, error) {
	timeout := p.Timeout
	if timeout == 0 {
		timeout = 2 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for range maxAttentions {
		n, a, err := p.Sender.Send(ctx, cdb, list, data)
		if err != nil {
			return 0, a, err
		}
		switch {
		case a.Status == scsi.CheckCondition && a.Sense.Key == scsi.UnitAttention:
			p.Seen = append(p.Seen, a.Sense)
		case a.Status == scsi.BusyStatus, a.Status == scsi.TaskSetFull:
		default:
			return n, a, nil
		}
	}
	return 0, Answer{}, fmt.Errorf("SCSI command %#02x: answered %d times with a unit attention or BUSY", cdb[0], maxAttentions)
}

// Drain reads the unit attentions that are pending, with TEST UNIT READY:
// every reservation allows it.
func (p *Port) Drain(ctx context.Context) error {
	_, _, err := p.send(ctx, make([]byte, 6), nil, nil)
	return err
}

// Keep is which of the unit attentions that were met at a nexus the guest must
// be told. ours says that commands of our own can have caused those about
// reservations: then the outcome tells more than they do.
func Keep(seen []scsi.Sense, ours bool) []scsi.Sense {
	var keep []scsi.Sense
	for _, s := range seen {
		switch {
		case s.ASC == 0x29, s.ASC == 0x2f: // resets, lost nexuses, cleared commands
			continue
		case s.ASC == 0x2a && s.ASCQ >= 0x03 && s.ASCQ <= 0x05 && ours:
			continue
		}
		if !slices.Contains(keep, s) {
			keep = append(keep, s)
		}
	}
	return keep
}

// Attention is what the guest must be told because of an outcome: it finds
// out, at its next command, that it was fenced.
func (o Outcome) Attention() (s scsi.Sense, ok bool) {
	if o.Kind == FencedMeanwhile {
		return RegistrationsPreempted, true
	}
	return s, false
}

// in sends a PERSISTENT RESERVE IN and returns its parameter data.
func (p *Port) in(ctx context.Context, action InAction, size int) ([]byte, Answer, error) {
	data := make([]byte, size)
	n, a, err := p.send(ctx, In{action, uint16(size)}.CDB(), nil, data)
	return data[:min(n, size)], a, err
}

// readIn reads the parameter data of a PERSISTENT RESERVE IN command whole.
func (p *Port) readIn(ctx context.Context, action InAction) ([]byte, error) {
	for _, size := range []int{4096, maxInData} {
		data, a, err := p.in(ctx, action, size)
		if err != nil {
			return nil, err
		}
		if !a.OK() {
			return nil, &NotGood{action, a}
		}
		if len(data) < 8 {
			return nil, fmt.Errorf("%v: %d bytes of parameter data", action, len(data))
		}
		if action == ReportCapabilities || action == ReadReservation || uint64(binary.BigEndian.Uint32(data[4:]))+8 <= uint64(len(data)) {
			return data, nil
		}
	}
	return nil, fmt.Errorf("%v: the target has more registrations than %d bytes can carry", action, maxInData)
}

// FullStatus reads who is registered and who holds.
func (p *Port) FullStatus(ctx context.Context) (FullStatus, error) {
	data, err := p.readIn(ctx, ReadFullStatus)
	if err != nil {
		return FullStatus{}, err
	}
	return ParseFullStatus(data)
}

// Capabilities reads REPORT CAPABILITIES.
func (p *Port) Capabilities(ctx context.Context) (Capabilities, error) {
	data, err := p.readIn(ctx, ReportCapabilities)
	if err != nil {
		return Capabilities{}, err
	}
	return ParseCapabilities(data)
}

// Reservation reads READ RESERVATION.
func (p *Port) Reservation(ctx context.Context) (Reservation, error) {
	data, err := p.readIn(ctx, ReadReservation)
	if err != nil {
		return Reservation{}, err
	}
	return ParseReservation(data)
}

// Keys reads READ KEYS.
func (p *Port) Keys(ctx context.Context) (Keys, error) {
	data, err := p.readIn(ctx, ReadKeys)
	if err != nil {
		return Keys{}, err
	}
	return ParseKeys(data)
}

// Do carries out a command of a machine that works with pair. Its errors are told to the machine as
// Failed: what is so, it settles by reading.
func (p *Port) Do(ctx context.Context, pair *Pair, c Cmd) Reply {
	if c.Write {
		r, _ := p.out(ctx, pair, c)
		return Reply{Result: r}
	}
	var s Sight
	var err error
	switch c.In {
	case ReadFullStatus:
		var f FullStatus
		if f, err = p.FullStatus(ctx); err == nil {
			s = pair.seeFull(f, c.Key)
		}
	case ReadKeys:
		var k Keys
		if k, err = p.Keys(ctx); err == nil {
			s = seeKeys(k, c.Key)
		}
	case ReadReservation:
		var r Reservation
		if r, err = p.Reservation(ctx); err == nil {
			s = seeReservation(r, c.Key)
		}
	case ReportCapabilities:
		var caps Capabilities
		if caps, err = p.Capabilities(ctx); err == nil {
			s.Persist = caps.PersistActive
		}
	}
	if err != nil {
		return Reply{Result: Failed}
	}
	return Reply{Sight: s}
}

// out sends a PERSISTENT RESERVE OUT.
func (p *Port) out(ctx context.Context, pair *Pair, c Cmd) (Result, error) {
	o := Out{Action: c.Out, Type: c.Type, Key: c.Key, ServiceKey: c.ServiceKey, APTPL: c.APTPL}
	if c.Out == RegisterAndMove {
		o.MoveTo, o.Unregister = pair.New, true
	}
	cdb, list := o.Encode()
	_, a, err := p.send(ctx, cdb, list, nil)
	switch {
	case err != nil:
		return Failed, fmt.Errorf("%v: %w", c, err)
	case a.OK():
		return Done, nil
	case a.Status == scsi.ReservationConflict:
		return Conflicted, fmt.Errorf("%v: %v", c, a)
	}
	return Failed, fmt.Errorf("%v: %v", c, a)
}

// Machine is what Dest, Source and Recovery have in common.
type Machine interface {
	Next() Step
	Pair() *Pair // what the next command works with
	Answer(Reply)
	Noted(ok bool)
}

// Peer is a machine with another side.
type Peer interface {
	Machine
	Told()
	Receive(Msg)
	Lost()
}

// Ledger is where a machine's intent is kept while it matters.
type Ledger interface {
	Note(handed bool) error
	Erase() error
}

// Run carries out what m wants until it waits for a message (Await) or is
// over (Finish), and says which. tell hands a message to the link; its error
// means that the link is gone. Past ctx's end, commands fail and links are
// lost: m then ends as it must, in bounded time.
func (p *Port) Run(ctx context.Context, m Machine, l Ledger, tell func(Msg) error) StepKind {
	for {
		st := m.Next()
		switch st.Kind {
		case Do:
			m.Answer(p.Do(ctx, m.Pair(), st.Cmd))
		case Note:
			m.Noted(l.Note(st.Handed) == nil)
		case Erase:
			m.Noted(l.Erase() == nil)
		case Tell:
			peer, ok := m.(Peer)
			if !ok {
				return st.Kind
			}
			err := tell(st.Msg)
			peer.Told()
			if err != nil {
				peer.Lost()
			}
		default:
			return st.Kind
		}
	}
}

// Task is one LUN's machine with what it needs to run.
type Task struct {
	Machine Machine
	Port    *Port
	Ledger  Ledger
	Tell    func(Msg) error // called from a goroutine of its own
}

// ErrLeftover says that this host's nexus is registered already.
var ErrLeftover = errors.New("this host's nexus is registered already")

// Preflight is what can be found out about a LUN while the guest still runs,
// and without changing anything for anybody.
type Preflight struct {
	FullStatus bool
	Move       bool // REGISTER AND MOVE is reported as supported
	Persist    bool
	Status     FullStatus // if FullStatus
	Keys       Keys
	Held       Reservation
}

// Probe reads what a takeover needs to know in advance. An error means that
// the LUN has no persistent reservations, or does not answer.
func (p *Port) Probe(ctx context.Context) (Preflight, error) {
	var f Preflight
	var err error
	if err = p.Drain(ctx); err != nil {
		return f, err
	}
	if f.Held, err = p.Reservation(ctx); err != nil {
		return f, err
	}
	if f.Keys, err = p.Keys(ctx); err != nil {
		return f, err
	}
	caps, err := p.Capabilities(ctx)
	if err != nil {
		return f, err
	}
	f.Persist = caps.PersistActive
	if f.Status, err = p.FullStatus(ctx); err == nil {
		f.FullStatus = true
	}
	f.Move, err = p.supports(ctx, RegisterAndMove)
	return f, err
}

// Refuse is why a guest with this state cannot migrate between the two
// nexuses of pair, as far as it can be seen while the guest runs; NoReason if
// it can. Destination and source find the same again, and what has changed,
// when the guest is stopped.
func (f *Preflight) Refuse(pair *Pair, guest Tracked) Reason {
	if guest.SPC2 {
		return HeldBySPC2
	}
	if pair.Same || guest.Key == 0 && !f.FullStatus {
		return NoReason
	}
	held := seeReservation(f.Held, guest.Key)
	s := seeKeys(f.Keys, guest.Key)
	if f.FullStatus {
		s = pair.seeFull(f.Status, guest.Key)
		if s.New != 0 {
			return LeftoverRegistration
		}
		held = s
	}
	shared := s.Third > 0 || !f.FullStatus && s.Count > 1
	if shared && held.Type.Single() && (held.Holder == Old || held.Holder == Holder) && !(f.Move && f.FullStatus) {
		return KeyShared
	}
	return NoReason
}

// supports asks REPORT SUPPORTED OPERATION CODES for one service action of
// PERSISTENT RESERVE OUT (SPC-5 6.33); a target that does not answer it is
// taken not to support anything that need not be.
func (p *Port) supports(ctx context.Context, a OutAction) (bool, error) {
	cdb := make([]byte, 12)
	cdb[0], cdb[1] = scsi.OpMaintenanceIn, scsi.SAReportSupportedOpcodes
	cdb[2], cdb[3], cdb[5] = 2, scsi.OpPersistentReserveOut, byte(a)
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(cdb[6:], uint32(len(data)))
	n, answer, err := p.send(ctx, cdb, nil, data)
	if err != nil {
		return false, err
	}
	// SUPPORT 3: supported as the standard has it.
	return answer.OK() && n >= 2 && data[1]&7 == 3, nil
}

// Identify finds out this host's own nexus: a random key, registered for a
// moment, is found in READ FULL STATUS. ledger makes the journal's entry for
// it. ErrLeftover means that the nexus was registered before, with a key that
// is then not touched.
func (p *Port) Identify(ctx context.Context, ledger func(Key) Ledger) (Nexus, error) {
	caps, err := p.Capabilities(ctx)
	if err != nil {
		return Nexus{}, err
	}
	var b [8]byte
	rand.Read(b[:])
	k := Key(binary.BigEndian.Uint64(b[:]) | 1<<63)
	l := ledger(k)
	if err := l.Note(false); err != nil {
		return Nexus{}, err
	}
	result, err := p.out(ctx, nil, Cmd{Write: true, Out: Register, ServiceKey: k, APTPL: caps.PersistActive})
	if result == Conflicted {
		return Nexus{}, errors.Join(ErrLeftover, l.Erase())
	}
	status, readErr := p.FullStatus(ctx)
	// Whatever the answers were: the key goes, and until it has gone it stays
	// in the journal.
	for range maxRemoves {
		if r, e := p.out(ctx, nil, Cmd{Write: true, Out: Register, Key: k, APTPL: caps.PersistActive}); r != Failed {
			if e := l.Erase(); e != nil {
				return Nexus{}, e
			}
			break
		} else {
			err = errors.Join(err, e)
		}
	}
	if err != nil || readErr != nil {
		return Nexus{}, errors.Join(err, readErr)
	}
	for _, r := range status.Registrations {
		if r.Key == k {
			return r.Nexus, nil
		}
	}
	return Nexus{}, fmt.Errorf("READ FULL STATUS does not show key %v, which this host has just registered", k)
}
