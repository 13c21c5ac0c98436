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
	turn     sync.Mutex    // whose it is to write into the memory's file
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
	p := newPageReader(conn, a.machine.RAM(), &a.turn, &a.bytes)
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
