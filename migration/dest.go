package migration

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// arrival is one migration at its destination. Its methods belong to one
// goroutine.
type arrival struct {
	r     *receiver
	id    ID
	state state
	link  *link // nil after it is lost
	why   error

	hello    *vmmv1.Hello
	local    bool        // memory is handed over
	handed   *fileReader // what came beside Hello
	machine  Destination
	luns     []*LUN
	pairs    []*pr.Pair
	files    []*file
	takeover *takeover

	readers  sync.WaitGroup
	conns    []net.Conn
	bytes    atomic.Uint64 // of pages and attachments that came: the link lives
	marks    chan mark
	count    map[uint32]int // channels that have ended a round
	round    uint32         // complete, acknowledged
	last     uint32         // round; 0: not known
	saved    *vmmv1.MachineState
	loaded   chan error // nil: not being loaded
	loading  bool
	loadTook time.Duration
}

// file is an attachment that arrives.
type file struct {
	have bool // it is on this host already
	name string
	left uint64 // bytes that are still to come
	want [sha256.Size]byte
	hash hash.Hash
}

// mark is a round's end on one channel, or the channel's.
type mark struct {
	round uint32
	err   error
}

func (a *arrival) run(ctx context.Context, h *hello) (*Arrival, error) {
	defer a.r.end()
	defer a.handed.close()
	a.link = newLink(h.conn, h.id, a.r.opts.Deadlines.Idle)
	a.marks = make(chan mark)
	a.count = map[uint32]int{}
	fail := func(err error) (*Arrival, error) {
		err = a.abort(err)
		return nil, err
	}
	if err := a.offer(ctx, h.m); err != nil {
		return fail(err)
	}
	if err := a.open(ctx); err != nil {
		return fail(err)
	}
	if err := a.fill(ctx); err != nil {
		return fail(err)
	}
	if err := a.load(ctx); err != nil {
		return fail(err)
	}
	if err := a.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Ready{Ready: &vmmv1.Ready{LoadUs: micros(a.loadTook)}}}); err != nil {
		return fail(err)
	}
	if err := a.wait(ctx, a.r.opts.Deadlines.Ready, func() bool { return a.state == moving }); err != nil {
		return fail(err)
	}
	return a.move(ctx)
}

func micros(d time.Duration) uint64 { return uint64(max(d, 0) / time.Microsecond) }

// offer answers the source's offer.
func (a *arrival) offer(ctx context.Context, m *vmmv1.StreamMessage) error {
	if err := a.receive(m); err != nil {
		return err
	}
	err := a.prepare(ctx, false)
	var found []*vmmv1.HostLun
	if err == nil {
		found, err = a.sameLUNs()
	}
	if err != nil {
		why := err.Error()
		if a.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Refused{Refused: &vmmv1.Refused{Reason: why}}}) == nil {
			return fmt.Errorf("%w: %s", ErrRefused, why)
		}
		return err
	}
	welcome := &vmmv1.Welcome{Version: version, Luns: found}
	for i, f := range a.files {
		if f.have {
			welcome.Have = append(welcome.Have, uint32(i))
		}
	}
	return a.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Welcome{Welcome: welcome}})
}

// features are those that a source may ask for.
var features = map[string]bool{featureLocal: true, featureHeld: true}

// Bounds of an offer. Host.Prepare bounds memory and vCPUs.
const (
	maxLUNs        = 256
	maxAttachments = 16
)

// prepare weighs the offer, LUNs apart, and makes the machine: everything that
// can be refused is refused here. saved says that it comes from a snapshot.
func (a *arrival) prepare(ctx context.Context, saved bool) error {
	h := a.hello
	if h.Version != version {
		return fmt.Errorf("the source speaks version %d of the stream, this destination version %d", h.Version, version)
	}
	for _, f := range h.Features {
		if !features[f] {
			return fmt.Errorf("the source needs the feature %q, which this destination does not know; use the same version of vmm on both hosts", f)
		}
	}
	a.local = slices.Contains(h.Features, featureLocal)
	if h.Config == nil || (h.Channels < 1) != a.local || h.Channels > MaxChannels || len(h.Luns) > maxLUNs || len(h.Attachments) > maxAttachments {
		return errProtocol("an offer with %d channels, %d LUNs, %d attachments", h.Channels, len(h.Luns), len(h.Attachments))
	}
	offer := Offer{ID: a.id, Config: h.Config, Requirements: h.Requirements, Saved: saved}
	for _, l := range h.Luns {
		offered, err := offeredLUN(l)
		if err != nil {
			return err
		}
		offer.LUNs = append(offer.LUNs, offered)
	}
	for _, f := range h.Attachments {
		if int64(f.GetSize()) < 0 || len(f.GetSha256()) != sha256.Size {
			return errProtocol("attachment %s of %d bytes with a digest of %d", f.GetName(), f.GetSize(), len(f.GetSha256()))
		}
		digest := [sha256.Size]byte(f.GetSha256())
		offer.Attachments = append(offer.Attachments, Attachment{Name: f.GetName(), Size: int64(f.GetSize()), SHA256: digest})
		a.files = append(a.files, &file{name: f.GetName(), left: f.GetSize(), want: digest, hash: sha256.New()})
	}
	ctx, done := context.WithTimeout(ctx, a.r.opts.Deadlines.Connect)
	defer done()
	err := a.handed.take(h, a.local, &offer)
	if err != nil {
		return err
	}
	a.machine, err = a.r.host.Prepare(ctx, offer)
	a.handed.close()
	if err != nil {
		a.machine = nil
		if offer.Memory != nil {
			offer.Memory.Close()
		}
		return err
	}
	for i, f := range a.files {
		f.have = a.machine.Has(i)
	}
	a.luns = a.machine.LUNs()
	if len(a.luns) != len(h.Luns) {
		return fmt.Errorf("the guest has %d LUNs, and %d of them are here", len(h.Luns), len(a.luns))
	}
	for i, l := range a.luns {
		if theirs := h.Luns[i]; l.Identity != theirs.GetIdentity() {
			return fmt.Errorf("LUN %s is %s at the source and %s here", theirs.GetId(), theirs.GetIdentity(), l.Identity)
		}
		if n := h.Luns[i].GetNonce(); len(n) > 0 && !saved && (l.Met == nil || !l.Met(n)) {
			return fmt.Errorf("LUN %s: %s is not the file that the guest has, but a copy of it, or the other host's locks are not seen here: share the directory by NFS 4 or the like, or say with --lun id=%[1]s,path=PATH where the file is", l.ID, l.Path)
		}
	}
	return a.sameMemory()
}

// sameMemory checks that both sides mean the same addresses, and makes the
// memory here one hole.
func (a *arrival) sameMemory() error {
	ram := a.machine.RAM()
	regions := ram.Regions()
	same := len(regions) == len(a.hello.Regions)
	for i := 0; same && i < len(regions); i++ {
		w := a.hello.Regions[i]
		same = uint64(regions[i].GPA) == w.GetAddress() && uint64(len(regions[i].Bytes)) == w.GetSize()
	}
	if !same {
		return fmt.Errorf("the guest's memory map at the source is not the one that this destination makes: %v", a.hello.Regions)
	}
	if a.local {
		return nil
	}
	for _, reg := range regions {
		if err := ram.Discard(reg.GPA, uint64(len(reg.Bytes))); err != nil {
			return err
		}
	}
	return nil
}

// sameLUNs finds out which nexuses the reservations move between.
func (a *arrival) sameLUNs() ([]*vmmv1.HostLun, error) {
	var found []*vmmv1.HostLun
	for i, l := range a.luns {
		theirs := a.hello.Luns[i]
		ours := offerLUN(l)
		ours.Key, ours.Spc2 = 0, false
		pair, err := pairOf(theirs, ours)
		if err != nil {
			return nil, err
		}
		if pair != nil {
			why := l.Preflight.Refuse(pair, pr.Tracked{Key: pr.Key(theirs.Key), SPC2: theirs.Spc2})
			if why != pr.NoReason {
				return nil, errors.New(pr.Outcome{Kind: pr.Refused, Reason: why}.Sentence(theirs.Id))
			}
		}
		a.pairs = append(a.pairs, pair)
		found = append(found, ours)
	}
	return found, nil
}

// open waits for the data connections and starts reading them.
func (a *arrival) open(ctx context.Context) error {
	channels := int(a.hello.Channels)
	seen := make([]bool, channels)
	late := time.NewTimer(a.r.opts.Deadlines.Connect)
	defer late.Stop()
	for len(a.conns) < channels {
		select {
		case d := <-a.r.data:
			if d.id != a.id || int(d.channel) >= channels || seen[d.channel] {
				d.conn.Close()
				continue
			}
			seen[d.channel] = true
			a.conns = append(a.conns, d.conn)
		case m := <-a.link.in: // Progress does not come before there is any
			if err := a.receive(m); err != nil {
				return err
			}
		case <-a.link.lost:
			return a.lose(a.link.err)
		case <-late.C:
			return fmt.Errorf("%d of %d data connections came in time", len(a.conns), channels)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	marks := a.marks
	for _, conn := range a.conns {
		a.readers.Go(func() { a.read(conn, marks) })
	}
	return nil
}

// read reads a data connection until it ends. marks is drained until then.
func (a *arrival) read(conn net.Conn, marks chan<- mark) {
	p := newPageReader(conn, a.machine.RAM(), &a.bytes, len(a.conns))
	defer p.close()
	for {
		round, err := p.next()
		marks <- mark{round, err}
		if err != nil {
			return
		}
	}
}

// fill receives rounds until the last one is complete, and what else comes.
func (a *arrival) fill(ctx context.Context) error {
	complete := func() bool { return a.state == loading && a.round == a.last }
	for !complete() {
		before := a.bytes.Load()
		err := a.wait(ctx, a.r.opts.Deadlines.Idle, complete)
		if errors.Is(err, errLate) && a.bytes.Load() != before {
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// marked books the end of a round on one channel; the last one's is
// acknowledged.
func (a *arrival) marked(m mark) error {
	if m.err != nil {
		if a.last != 0 && a.round == a.last {
			return nil // nothing more was to come
		}
		return fmt.Errorf("data connection: %w", whyLost(m.err))
	}
	if m.round != a.round+1 || a.last != 0 && m.round > a.last {
		return errProtocol("the end of round %d after round %d", m.round, a.round)
	}
	a.count[m.round]++
	if a.count[m.round] < len(a.conns) {
		return nil
	}
	delete(a.count, m.round)
	a.round = m.round
	return a.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_RoundDone{RoundDone: &vmmv1.RoundDone{Round: m.round}}})
}

// load loads the state while the reservations are prepared and proven.
func (a *arrival) load(ctx context.Context) error {
	began := time.Now()
	a.loaded = make(chan error, 1)
	a.loading = true
	go func() { a.loaded <- a.machine.Load(a.saved) }()
	return a.wait(ctx, a.r.opts.Deadlines.Ready, func() bool {
		if !a.loading && a.loadTook == 0 {
			a.loadTook = time.Since(began)
		}
		return !a.loading && a.takeover.all(pr.Ready)
	})
}

// take starts the reservations' machines, when the source's guest has stopped.
func (a *arrival) take() {
	a.takeover = newTakeover(len(a.luns))
	link := a.link
	for i, l := range a.luns {
		pair := a.pairs[i]
		if pair == nil {
			continue
		}
		m := pr.NewDest(pair)
		a.takeover.add(i, l, &m, nil, func(key pr.Key) pr.Ledger {
			own := *pair
			own.Old, own.New = pair.New, pair.Old
			return a.r.intents.For(entry(a.id, l, key, own))
		}, func(w *vmmv1.Reservation) error {
			return link.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Reservation{Reservation: w}})
		})
	}
}

func (a *arrival) change(f func(*pr.Dest)) {
	if a.takeover != nil {
		a.takeover.change(func(x *lunTakeover) { f(x.task.Machine.(*pr.Dest)) })
	}
}

// move takes the reservations over and lets the guest run: COMMIT has come.
func (a *arrival) move(ctx context.Context) (*Arrival, error) {
	a.doubt("the destination is moving the guest's reservations")
	ask, began := a.r.opts.Deadlines.Ask, time.Now()
	for _, x := range a.takeover.luns {
		x.began = began
	}
	a.takeover.change(func(x *lunTakeover) {
		x.ask = ask // from here on each question to the source is bounded by itself
		x.task.Machine.(*pr.Dest).Receive(pr.Msg{Kind: pr.Commit})
	})
	if a.link == nil {
		a.change(func(d *pr.Dest) { d.Lost() })
	}
	for !a.takeover.finished() {
		// Nothing ends this early: each machine ends by itself.
		if err := a.event(context.WithoutCancel(ctx), nil); err != nil {
			_ = a.lose(err)
		}
	}
	if a.takeover.blocked() {
		return nil, a.stick(a.takeover.failure())
	}
	a.takeover.settled()
	started := time.Now()
	if err := a.r.verdicts.note(a.id, verdictRunning, ""); err != nil {
		return nil, a.stick(err.Error())
	}
	since, err := a.machine.Run()
	if err != nil {
		if ferr := a.r.verdicts.forget(a.id); ferr != nil {
			err = errors.Join(err, ferr)
		}
		return nil, a.stick(err.Error())
	}
	for _, x := range a.takeover.luns {
		// The registration is the running guest's: no recovery may remove it.
		// An entry that stays is settled by looking, and by the verdict.
		if err := x.Erase(); err != nil {
			a.r.opts.Warn(err)
		}
	}
	m := &vmmv1.Running{StartUs: micros(since.Sub(started))}
	outcomes := a.takeover.outcomes()
	for _, l := range outcomes {
		m.Luns = append(m.Luns, &vmmv1.LunOutcome{Id: l.ID, Sentence: l.Sentence, TakeoverUs: micros(l.Takeover)})
	}
	m.LagUs = micros(time.Since(since))
	if a.link == nil || a.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Running{Running: m}}) != nil {
		a.state = running
	}
	a.takeover.close()
	a.closeData()
	return &Arrival{ID: a.id, Machine: a.machine, LUNs: outcomes}, nil
}

// stick ends a migration whose guest is neither here nor given back: the
// source is told, and keeps it stopped until its operator decides.
func (a *arrival) stick(why string) error {
	if a.link != nil {
		_ = a.send(undecided(why))
	}
	a.tearDown()
	return fmt.Errorf("%w: %s; 'vmm resume --force' on the source takes it back", ErrBlocked, why)
}

// linger keeps answering until the source has acknowledged RUNNING.
func (a *arrival) linger(ctx context.Context) {
	late := time.NewTimer(a.r.opts.Deadlines.Answer)
	defer late.Stop()
	defer a.hangUp()
	for a.state != over {
		var in chan *vmmv1.StreamMessage
		var lost chan struct{}
		if a.link != nil {
			in, lost = a.link.in, a.link.lost
		}
		select {
		case m := <-in:
			if next, err := a.state.step(receives, kindOf(m)); err == nil {
				a.state = next
			} else {
				a.hangUp()
			}
		case <-lost:
			a.hangUp()
		case d := <-a.r.data:
			d.conn.Close()
		case h := <-a.r.control:
			a.r.refuse(h.conn, h.id, "the guest that this destination waited for has arrived")
			h.conn.Close()
			h.files.close()
			a.r.end()
		case id := <-a.r.acked:
			if id == a.id {
				return
			}
		case <-late.C:
			return
		case <-ctx.Done():
			return
		}
	}
	if err := a.r.verdicts.forget(a.id); err != nil {
		a.r.opts.Warn(err)
	}
}

// abort undoes everything: COMMIT did not come, and if it comes the answer is
// ABORTED.
func (a *arrival) abort(cause error) error {
	if a.takeover != nil {
		a.change(func(d *pr.Dest) { d.Lost() })
		for !a.takeover.finished() {
			a.takeover.take(<-a.takeover.reports)
		}
	}
	if a.state != over && a.state != listening {
		why := cause.Error()
		if err := a.r.verdicts.note(a.id, verdictAborted, why); err != nil {
			// Nothing may be said then: the source asks again, or its
			// operator decides.
			cause = errors.Join(cause, err)
		} else if a.link != nil && a.send(abortedBecause(why)) == nil {
			a.lateCommit()
		}
	}
	a.tearDown()
	return cause
}

// lateCommit answers a COMMIT that was on its way when ABORTED was sent, and
// hears that the source knows.
func (a *arrival) lateCommit() {
	late := time.NewTimer(a.r.opts.Deadlines.Ask)
	defer late.Stop()
	for a.state == aborted {
		select {
		case m := <-a.link.in:
			next, err := a.state.step(receives, kindOf(m))
			if err != nil {
				return
			}
			a.state = next
			if kindOf(m) == kindCommit && a.send(abortedBecause("")) != nil {
				return
			}
		case <-a.marks: // what the source sent before it knew
		case <-a.link.lost:
			return
		case <-late.C:
			return
		}
	}
	_ = a.r.verdicts.forget(a.id) // it is harmless where it stays
}

// tearDown frees everything; nothing of the guest runs here.
func (a *arrival) tearDown() {
	if a.takeover != nil {
		a.takeover.close()
	}
	a.hangUp()
	a.closeData()
	if a.loading {
		<-a.loaded
	}
	if a.machine != nil {
		if err := a.machine.Close(); err != nil {
			a.r.opts.Warn(err)
		}
	}
}

// closeData ends the data connections and waits for their readers: nobody
// writes guest memory after it.
func (a *arrival) closeData() {
	for _, c := range a.conns {
		c.Close()
	}
	done := make(chan struct{})
	go func() { a.readers.Wait(); close(done) }()
	for {
		select {
		case <-a.marks:
		case <-done:
			return
		}
	}
}

func (a *arrival) hangUp() {
	if a.link != nil {
		a.link.close()
		a.link = nil
	}
}

// lose ends the link and says why.
func (a *arrival) lose(err error) error {
	if a.link != nil {
		a.why = err
		a.hangUp()
		if a.state == moving {
			a.change(func(d *pr.Dest) { d.Lost() })
		}
	}
	return fmt.Errorf("%w: %w", errLink, whyLost(a.why))
}

func (a *arrival) doubt(why string) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.r.doubt = why
}

func (a *arrival) send(m *vmmv1.StreamMessage) error {
	if a.link == nil {
		return fmt.Errorf("%w: %w", errLink, whyLost(a.why))
	}
	next, err := a.state.step(sends, kindOf(m))
	if err != nil {
		return err
	}
	if err := a.link.send(m); err != nil {
		return a.lose(err)
	}
	a.state = next
	return nil
}

// wait handles what happens until until is true, d has passed (errLate), or
// something ends the migration.
func (a *arrival) wait(ctx context.Context, d time.Duration, until func() bool) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for !until() {
		if err := a.event(ctx, timer.C); err != nil {
			return err
		}
	}
	return nil
}

func (a *arrival) event(ctx context.Context, late <-chan time.Time) error {
	var in chan *vmmv1.StreamMessage
	var lost chan struct{}
	if a.link != nil {
		in, lost = a.link.in, a.link.lost
	}
	var reports chan report
	if a.takeover != nil {
		reports = a.takeover.reports
	}
	select {
	case m := <-in:
		return a.receive(m)
	case <-lost:
		err := a.lose(a.link.err)
		if a.state == moving {
			return nil
		}
		return err
	case m := <-a.marks:
		return a.marked(m)
	case d := <-a.r.data:
		d.conn.Close()
	case <-a.r.acked:
	case r := <-reports:
		a.takeover.take(r)
		if why := a.takeover.failure(); why != "" && a.state != moving {
			return errors.New(why)
		}
	case err := <-a.loaded:
		a.loading = false
		if err != nil {
			return fmt.Errorf("load the guest's state: %w", err)
		}
	case <-late:
		return errLate
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// receive takes a message of the source.
func (a *arrival) receive(m *vmmv1.StreamMessage) error {
	next, err := a.state.step(receives, kindOf(m))
	if err != nil {
		return err
	}
	a.state = next
	switch b := m.Body.(type) {
	case *vmmv1.StreamMessage_Hello:
		a.hello = b.Hello
	case *vmmv1.StreamMessage_Progress:
		if a.r.opts.Progress != nil {
			p := b.Progress
			a.r.opts.Progress(Progress{Round: int(p.Round), Remaining: p.RemainingBytes, Sent: p.SentBytes})
		}
	case *vmmv1.StreamMessage_Attachment:
		return a.attach(b.Attachment)
	case *vmmv1.StreamMessage_State:
		if err := a.attached(); err != nil {
			return err
		}
		if b.State.Machine == nil || (b.State.LastRound == 0) != a.local || b.State.LastRound < a.round {
			return errProtocol("round %d is to be the last after round %d", b.State.LastRound, a.round)
		}
		a.saved, a.last = b.State.Machine, b.State.LastRound
		a.take()
	case *vmmv1.StreamMessage_Reservation:
		if a.takeover == nil {
			return nil
		}
		senses, err := decodeSenses(b.Reservation.Attentions)
		if err != nil {
			return err
		}
		return a.takeover.deliver(b.Reservation, func(x *lunTakeover, m pr.Msg) {
			if m.Kind == pr.State {
				x.key, x.came = m.Key, senses
			}
			x.task.Machine.(*pr.Dest).Receive(m)
		})
	case *vmmv1.StreamMessage_Abort:
		return fmt.Errorf("the source gave up: %s", sentence(b.Abort.Reason))
	}
	return nil
}

// attached checks that the attachments are complete, and what was offered.
func (a *arrival) attached() error {
	for _, f := range a.files {
		if f.have {
			continue
		}
		if f.left > 0 {
			return errProtocol("attachment %s lacks %d bytes", f.name, f.left)
		}
		if got := [sha256.Size]byte(f.hash.Sum(nil)); got != f.want {
			return fmt.Errorf("attachment %s has digest %x, and was offered with %x: did the file change on the source?", f.name, got, f.want)
		}
	}
	return nil
}

func (a *arrival) attach(c *vmmv1.AttachmentChunk) error {
	if uint64(c.Attachment) >= uint64(len(a.files)) {
		return errProtocol("a part of attachment %d of %d", c.Attachment, len(a.files))
	}
	f := a.files[c.Attachment]
	if uint64(len(c.Data)) > f.left {
		return errProtocol("%d bytes more of attachment %s, which lacks %d", len(c.Data), f.name, f.left)
	}
	f.left -= uint64(len(c.Data))
	a.bytes.Add(uint64(len(c.Data)))
	if f.have { // the source is older than Welcome.have
		return nil
	}
	f.hash.Write(c.Data)
	if err := a.machine.Attach(int(c.Attachment), c.Data); err != nil {
		return fmt.Errorf("attachment %s: %w", f.name, err)
	}
	return nil
}
