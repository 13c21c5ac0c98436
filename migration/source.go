package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"time"

	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// version is the stream's. A destination refuses any other; what may differ
// between peers of one version is a feature.
const version = 1

// Options of an outgoing migration.
type Options struct {
	// Dial opens a connection to the destination (see Dialer).
	Dial func(context.Context) (net.Conn, error)
	// Channels is the number of data connections, 1 to MaxChannels; 0: 1.
	Channels int
	// Downtime is how long the guest may stand still; 0: DefaultDowntime.
	Downtime time.Duration
	// MaxBandwidth bounds the copy while the guest runs, bytes per second; 0:
	// unbounded. The last pages are sent as fast as they go.
	MaxBandwidth uint64
	// Timeout ends a migration whose guest has not stopped by then; 0: never.
	Timeout   time.Duration
	Deadlines Deadlines
	// Local hands the guest's memory itself to a destination on this host, which
	// Dial reaches by a unix socket. Channels, Downtime, MaxBandwidth and
	// Timeout do not matter then.
	Local bool
	// Name is the lock by which this process has the guest's name, to be shared
	// in a Local migration; nil: it is not.
	Name *os.File
	// Journal is where a LUN's intent is noted before the guest is handed
	// over. It may be nil if no LUN has reservations.
	Journal *pr.Journal
	// Progress, if not nil, is called about once a second and at each round,
	// from one goroutine.
	Progress func(Progress)
}

// Outgoing is one migration away from this host.
type Outgoing struct {
	src  Source
	opts Options
	id   ID

	life   context.Context // ends with Cancel and with Run's context
	cancel context.CancelCauseFunc
	force  chan chan error
	over   chan struct{} // closed when Run returns

	// Of Run's goroutine.
	ctx       context.Context // Run's
	deaf      bool            // to life's end
	state     state
	link      *link // nil before it is made, and after it is lost
	why       error // why it was lost
	reason    string
	answers   chan *vmmv1.StreamMessage
	asking    bool
	pages     *pump
	rounds    int
	acked     uint32
	working   chan error // of what during has begun; nil: nothing
	takeover  *takeover
	throttled int
	paused    bool
	pausedAt  time.Time
	progress  Progress // as of the last round's end
	begun     struct { // the round under way
		at           time.Time // zero: none
		sent, walked uint64
	}
	ticker  *time.Ticker
	landed  []*vmmv1.LunOutcome
	down    Downtime
	forcing chan error // the operator's request that is under way
	welcome *vmmv1.Welcome
}

// NewOutgoing prepares a migration of src. Nothing happens before Run.
func NewOutgoing(src Source, opts Options) (*Outgoing, error) {
	if opts.Channels == 0 {
		opts.Channels = 1
	}
	if opts.Channels < 1 || opts.Channels > MaxChannels {
		return nil, fmt.Errorf("%d data connections: give 1 to %d", opts.Channels, MaxChannels)
	}
	if opts.Downtime == 0 {
		opts.Downtime = DefaultDowntime
	}
	opts.Deadlines = opts.Deadlines.withDefaults()
	o := &Outgoing{
		src: src, opts: opts, id: NewID(), state: offering,
		force: make(chan chan error), over: make(chan struct{}), answers: make(chan *vmmv1.StreamMessage, 1),
	}
	o.life, o.cancel = context.WithCancelCause(context.Background())
	return o, nil
}

// ID names the migration.
func (o *Outgoing) ID() ID { return o.id }

// Cancel gives the migration up. Past COMMIT it does nothing.
func (o *Outgoing) Cancel() { o.cancel(errCanceled) }

// Force makes the guest run here although it was handed over: the operator
// states that the destination is dead, and stays dead. It returns when the
// guest runs, or with the reason why it cannot yet.
func (o *Outgoing) Force() error {
	done := make(chan error, 1)
	select {
	case o.force <- done:
		return <-done
	case <-o.over:
		return errors.New("the migration is over")
	}
}

var (
	errCanceled = errors.New("canceled")
	errLate     = errors.New("the destination did not answer in time")
	errLink     = errors.New("the connection is lost")
)

// Run migrates the guest. Without an error the guest runs at the destination,
// and this machine is to be closed. An error wraps one of:
//
//   - ErrRefused, ErrKept: the guest runs on here; it was stopped, if at all,
//     for a moment.
//   - ErrHandedOver: ctx ended while the destination did not say whether it
//     runs the guest, which stays stopped here. Until then Run goes on asking.
//   - ErrBlocked: the guest is stopped and must stay so.
//
// Before COMMIT the end of ctx is a Cancel.
func (o *Outgoing) Run(ctx context.Context) (Summary, error) {
	defer close(o.over)
	began := time.Now()
	o.ctx = ctx
	defer o.cancel(nil)
	defer context.AfterFunc(ctx, func() { o.cancel(context.Cause(ctx)) })()
	o.ticker = time.NewTicker(time.Second)
	defer o.ticker.Stop()
	err := o.migrate()
	if err != nil && o.state != handed && o.state != gone {
		err = o.rollBack(err)
	}
	if o.state == handed {
		err = o.settle()
	}
	if o.takeover != nil {
		o.takeover.close()
	}
	if o.forcing != nil {
		o.forcing <- err
	}
	o.hangUp()
	if err != nil {
		return Summary{}, err
	}
	s := Summary{ID: o.id, Rounds: o.rounds, Sent: o.pages.sent.Load(), Total: time.Since(began), Downtime: o.down}
	for _, l := range o.landed {
		s.LUNs = append(s.LUNs, LUNOutcome{l.Id, l.Sentence, time.Duration(l.TakeoverUs) * time.Microsecond})
		s.Downtime.Takeover = max(s.Downtime.Takeover, time.Duration(l.TakeoverUs)*time.Microsecond)
	}
	if o.takeover != nil {
		s.Left = o.takeover.outcomes()
	}
	return s, nil
}

// migrate does everything up to COMMIT.
func (o *Outgoing) migrate() error {
	if err := o.refuse(); err != nil {
		return err
	}
	move := o.copy
	if o.opts.Local {
		move = o.switchLocal
	}
	for _, phase := range []func() error{o.negotiate, o.attach, move, o.stop, o.hand} {
		if err := phase(); err != nil {
			return err
		}
	}
	return nil
}

// refuse is what can be said without asking the destination.
func (o *Outgoing) refuse() error {
	for _, l := range o.src.LUNs() {
		if l.Tracked == nil || l.Preflight == nil {
			continue
		}
		if why := l.Preflight.Refuse(&pr.Pair{Same: true}, l.Tracked()); why != pr.NoReason {
			return fmt.Errorf("%w: %s", ErrRefused, pr.Outcome{Kind: pr.Refused, Reason: why}.Sentence(l.ID))
		}
		if o.opts.Journal == nil {
			return fmt.Errorf("%w: LUN %s has reservations, and this host has no journal to note its hand-over in", ErrRefused, l.ID)
		}
	}
	return nil
}

// open dials and says what for.
func (o *Outgoing) open(ctx context.Context, p preamble) (net.Conn, error) {
	conn, err := o.opts.Dial(ctx)
	if err != nil {
		return nil, err
	}
	p.id = o.id
	if err = conn.SetWriteDeadline(time.Now().Add(o.opts.Deadlines.Connect)); err == nil {
		_, err = conn.Write(p.bytes())
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (o *Outgoing) negotiate() error {
	ctx, done := context.WithTimeout(o.life, o.opts.Deadlines.Connect)
	defer done()
	conn, err := o.open(ctx, preamble{role: roleControl})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	o.link = newLink(conn, o.id, o.opts.Deadlines.Idle)
	hello := offerOf(o.src, o.opts.Channels)
	if o.opts.Local {
		err = o.handOver(hello)
	} else {
		err = o.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Hello{Hello: hello}})
	}
	if err != nil {
		return err
	}
	if err := o.wait(o.opts.Deadlines.Connect, func() bool { return o.state != offered }); err != nil {
		return err
	}
	if err := o.pairs(hello.Luns); err != nil {
		return err
	}
	o.pages = &pump{ram: o.src.RAM()}
	o.pages.limit.set(o.opts.MaxBandwidth)
	for i := range hello.Channels {
		conn, err := o.open(ctx, preamble{role: roleData, channel: uint8(i)})
		if err != nil {
			return fmt.Errorf("data connection %d: %w", i, err)
		}
		o.pages.channels = append(o.pages.channels, &channel{conn: conn, idle: o.opts.Deadlines.Idle})
	}
	return nil
}

// offerOf is what src has to offer over so many channels.
func offerOf(src Source, channels int) *vmmv1.Hello {
	hello := &vmmv1.Hello{Version: version, Config: src.Config(), Requirements: src.Requirements(), Channels: uint32(channels)}
	for _, r := range src.RAM().Regions() {
		hello.Regions = append(hello.Regions, &vmmv1.MemoryRegion{Address: uint64(r.GPA), Size: uint64(len(r.Bytes))})
	}
	for _, l := range src.LUNs() {
		hello.Luns = append(hello.Luns, offerLUN(l))
	}
	for _, a := range src.Attachments() {
		hello.Attachments = append(hello.Attachments, &vmmv1.Attachment{Name: a.Name, Size: uint64(a.Size), Sha256: a.SHA256[:]})
	}
	return hello
}

// pairs finds out whether the destination's LUNs are the source's.
func (o *Outgoing) pairs(offered []*vmmv1.HostLun) error {
	found := o.welcome.GetLuns()
	if len(found) != len(offered) {
		return errProtocol("%d LUNs were offered, %d accepted", len(offered), len(found))
	}
	for i, l := range offered {
		if l.Identity != found[i].Identity {
			return fmt.Errorf("%w: LUN %s is %s here and %s at the destination", ErrRefused, l.Id, l.Identity, found[i].Identity)
		}
		if _, err := pairOf(l, found[i]); err != nil {
			return fmt.Errorf("%w: %w", ErrRefused, err)
		}
	}
	return nil
}

// attach sends the files that move with the guest.
func (o *Outgoing) attach() error {
	return sendAttachments(o.src.Attachments(), func(m *vmmv1.StreamMessage) error {
		if err := o.send(m); err != nil {
			return err
		}
		return o.poll()
	})
}

// sendAttachments has files sent in pieces. The data of a message is good until
// send returns. Whether a file is still what it was, the receiver tells by its
// digest.
func sendAttachments(files []Attachment, send func(*vmmv1.StreamMessage) error) error {
	const chunk = 256 << 10
	buf := make([]byte, chunk)
	for i, a := range files {
		for at := int64(0); at < a.Size; at += chunk {
			data := buf[:min(chunk, a.Size-at)]
			if n, err := a.Data.ReadAt(data, at); n < len(data) {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return fmt.Errorf("read %s: %w", a.Name, err)
			}
			err := send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Attachment{
				Attachment: &vmmv1.AttachmentChunk{Attachment: uint32(i), Data: data},
			}})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// copy sends rounds of pages until what is left fits the downtime.
func (o *Outgoing) copy() error {
	log, err := o.src.TrackDirty()
	if err != nil {
		return fmt.Errorf("track written pages: %w", err)
	}
	defer log.Close()
	var deadline time.Time
	if o.opts.Timeout > 0 {
		deadline = time.Now().Add(o.opts.Timeout)
	}
	pages, err := log.Collect()
	if err != nil {
		return err
	}
	c := convergence{limit: o.opts.Downtime}
	settled := false
	for {
		o.progress.Remaining = pages * memory.PageSize
		began, before := time.Now(), o.pages.sent.Load()
		if err := o.sendRound(log, deadline); err != nil {
			return err
		}
		took, sent := time.Since(began), o.pages.sent.Load()-before
		if pages, err = log.Collect(); err != nil {
			return err
		}
		stop, throttle := c.after(sent, pages*memory.PageSize, took)
		if stop && !settled {
			settled = true
			if err := o.during(until(deadline), o.src.Settle); err != nil {
				if errors.Is(err, errLate) {
					err = fmt.Errorf("what the guest wrote to its disk images could not be written back within %v; give it more time", o.opts.Timeout)
				}
				return err
			}
			if pages, err = log.Collect(); err != nil {
				return err
			}
			stop = c.fits(pages * memory.PageSize)
		}
		if throttle != o.throttled {
			o.throttled = throttle
			o.src.Throttle(throttle)
		}
		o.progress.Remaining, o.progress.Bandwidth, o.progress.DirtyRate = pages*memory.PageSize, uint64(c.bandwidth), uint64(c.dirtyRate)
		o.progress.Expected, o.progress.Throttle = c.expected, throttle
		o.begun.at = time.Time{}
		o.report()
		if stop {
			return o.switchOver(log)
		}
		if !deadline.IsZero() && time.Now().After(deadline) {
			return o.notConverged()
		}
	}
}

func (o *Outgoing) notConverged() error {
	if o.progress.Expected == 0 { // no round has ended
		return fmt.Errorf("%v were too short to send the guest's memory once, %d MiB; give it more time or bandwidth", o.opts.Timeout, o.progress.Remaining>>20)
	}
	return fmt.Errorf("the guest writes memory faster than it can be sent: after %v %d MiB were left, %v of downtime where %v are allowed; "+
		"give it more time, bandwidth or downtime", o.opts.Timeout, o.progress.Remaining>>20, o.progress.Expected.Round(time.Millisecond), o.opts.Downtime)
}

// sendRound sends what the log has collected, and waits for the destination
// to have it all. A deadline in the past is none.
func (o *Outgoing) sendRound(log DirtyLog, deadline time.Time) error {
	o.rounds++
	number := uint32(o.rounds)
	o.progress.Round = o.rounds
	o.begun.at, o.begun.sent, o.begun.walked = time.Now(), o.pages.sent.Load(), o.pages.walked.Load()
	err := o.during(until(deadline), func(ctx context.Context) error {
		if err := o.pages.round(ctx, number, log.Visit); err != nil {
			return fmt.Errorf("send memory: %w", whyLost(err))
		}
		return nil
	})
	if errors.Is(err, errLate) && !o.paused {
		return o.notConverged()
	}
	if err != nil {
		return err
	}
	if err := o.wait(o.opts.Deadlines.Idle, func() bool { return o.acked == number }); err != nil {
		return err
	}
	return o.sendProgress()
}

// until is the time that is left; of no deadline, all of it.
func until(deadline time.Time) time.Duration {
	if deadline.IsZero() {
		return math.MaxInt64
	}
	return time.Until(deadline)
}

// during does what happens while f works, which has to be over within d, and
// ends when its context does.
func (o *Outgoing) during(d time.Duration, f func(context.Context) error) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	result := make(chan error, 1)
	o.working = result
	go func() { result <- f(ctx) }()
	err := o.wait(d, func() bool { return o.working == nil })
	if err != nil && o.working != nil {
		stop()
		<-result
		o.working = nil
	}
	return err
}

func (o *Outgoing) sendProgress() error {
	if o.state != copying {
		return nil
	}
	return o.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Progress{Progress: &vmmv1.Progress{
		Round: uint32(o.rounds), RemainingBytes: o.progress.Remaining, SentBytes: o.pages.sent.Load(),
	}}})
}

// switchOver stops the guest and sends the rest: state, then last pages.
func (o *Outgoing) switchOver(log DirtyLog) error {
	o.unthrottle()
	o.pages.limit.set(0)
	if err := o.halt(uint32(o.rounds + 1)); err != nil {
		return err
	}
	at := time.Now()
	if _, err := log.Collect(); err != nil {
		return err
	}
	err := o.sendRound(log, time.Now().Add(o.opts.Deadlines.Ready))
	o.down.Pages = time.Since(at)
	return err
}

// halt stops the guest and sends its state. The reservations are read while
// the last pages, if any, are on their way.
func (o *Outgoing) halt(lastRound uint32) error {
	ctx, done := context.WithTimeout(o.life, o.opts.Deadlines.Drain)
	defer done()
	o.pausedAt = time.Now()
	if err := o.src.Pause(ctx); err != nil {
		return fmt.Errorf("stop the guest: %w", err)
	}
	o.paused = true
	o.down.Stop = time.Since(o.pausedAt)
	at := time.Now()
	machine, err := o.src.Save()
	if err != nil {
		return fmt.Errorf("save the guest's state: %w", err)
	}
	o.down.Save = time.Since(at)
	blob := &vmmv1.FinalState{Machine: machine, LastRound: lastRound}
	if err := o.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_State{State: blob}}); err != nil {
		return err
	}
	o.take()
	return nil
}

// take starts the reservations' machines.
func (o *Outgoing) take() {
	luns := o.src.LUNs()
	o.takeover = newTakeover(len(luns))
	for i, l := range luns {
		pair, err := pairOf(offerLUN(l), o.welcome.Luns[i])
		if err != nil || pair == nil { // an error was one in negotiate
			continue
		}
		var key pr.Key
		if l.Tracked != nil {
			key = l.Tracked().Key
		}
		m := pr.NewSource(pair, key)
		link := o.link // lose makes o.link nil
		o.takeover.add(i, l, &m, nil, func(key pr.Key) pr.Ledger {
			return o.opts.Journal.For(entry(o.id, l, key, *pair))
		}, func(w *vmmv1.Reservation) error {
			return link.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Reservation{Reservation: w}})
		})
	}
}

// stop waits for READY.
func (o *Outgoing) stop() error {
	return o.wait(o.opts.Deadlines.Ready, func() bool { return o.state == willing })
}

// hand notes the hand-over for each LUN, then commits.
func (o *Outgoing) hand() error {
	o.change(func(s *pr.Source) { s.Receive(pr.Msg{Kind: pr.Ready}); s.Commit() })
	if err := o.wait(o.opts.Deadlines.Ready, func() bool { return o.takeover.all(pr.Commit) }); err != nil {
		return err
	}
	next, err := o.state.step(sends, kindCommit)
	if err != nil {
		return err
	}
	// Whatever becomes of the message, it may have arrived.
	o.state = next
	if err := o.link.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Commit{Commit: &vmmv1.Commit{}}}); err != nil {
		o.lose(err)
	}
	return nil
}

// settle finds out what became of a guest that was handed over.
func (o *Outgoing) settle() error {
	asked := time.Now().Add(o.opts.Deadlines.Running)
	for o.state == handed {
		taken := func() bool { return o.forcing != nil && o.takeover.finished() }
		err := o.wait(o.opts.Deadlines.Ask, func() bool { return o.state != handed || taken() || o.link == nil && !o.asking })
		switch {
		case o.state != handed:
		case taken():
			return o.forced()
		case err != nil && !errors.Is(err, errLate):
			way := "'vmm resume --force' takes it back if the destination is dead, 'vmm stop' gives it up"
			if o.opts.Local {
				way = errShared.Error()
			}
			return fmt.Errorf("%w: %s; %s", ErrHandedOver, o.doubt(), way)
		case o.asking:
		case o.link == nil || time.Now().After(asked):
			o.ask()
			o.progress.HandedOver = o.doubt()
			o.report()
		}
	}
	if o.forcing != nil { // it has become unnecessary, or is too late
		o.forcing <- errors.New("the destination has answered")
		o.forcing = nil
	}
	if o.state == gone {
		return o.leave()
	}
	// The destination never ran it.
	o.change(func(s *pr.Source) { s.Receive(pr.Msg{Kind: pr.Aborted}) })
	return o.resume(fmt.Errorf("the destination gave up: %s", o.reason))
}

// doubt is why nothing is known of a guest that was handed over.
func (o *Outgoing) doubt() string {
	switch {
	case o.reason != "":
		return o.reason
	case o.why != nil:
		return whyLost(o.why).Error()
	}
	return errLate.Error()
}

// ask asks the destination on a connection of its own. The answer comes out of
// o.answers, nil if there is none; an unsuccessful attempt takes at least as
// long as the deadline of one, so that a dead destination is not flooded.
func (o *Outgoing) ask() {
	o.asking = true
	d := o.opts.Deadlines.Ask
	ctx, done := context.WithTimeout(o.ctx, d)
	go func() {
		defer done()
		m, err := o.question(ctx, d)
		if err != nil {
			m = nil
			<-ctx.Done()
		}
		o.answers <- m
	}()
}

func (o *Outgoing) question(ctx context.Context, d time.Duration) (*vmmv1.StreamMessage, error) {
	conn, err := o.open(ctx, preamble{role: roleQuery})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	l := newLink(conn, o.id, d)
	defer l.close()
	if err := l.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Query{Query: &vmmv1.Query{}}}); err != nil {
		return nil, err
	}
	select {
	case m := <-l.in:
		switch kindOf(m) {
		case kindRunning, kindAborted:
			// From here on nobody will ask again.
			_ = l.send(acknowledge())
		case kindUndecided:
			<-ctx.Done() // then ask again
		default:
			return nil, errProtocol("%v in answer to a question", kindOf(m))
		}
		return m, nil
	case <-l.lost:
		return nil, l.err
	}
}

func acknowledge() *vmmv1.StreamMessage {
	return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Acknowledge{Acknowledge: &vmmv1.Acknowledge{}}}
}

// leave ends a migration whose guest runs at the destination: registrations
// that stayed behind here are removed.
func (o *Outgoing) leave() error {
	o.down.Total = time.Since(o.pausedAt)
	if o.link != nil {
		_ = o.send(acknowledge()) // otherwise the destination stops waiting by itself
	}
	o.change(func(s *pr.Source) { s.Receive(pr.Msg{Kind: pr.Running}) })
	o.drainReports(o.takeover.finished)
	return nil
}

// forced ends a migration whose guest the operator has taken back.
func (o *Outgoing) forced() error {
	o.lose(errLink)
	o.state = returned
	err := o.resume(errors.New("the operator states that the destination is dead"))
	var failed error
	if !errors.Is(err, ErrKept) {
		failed = err
	}
	o.forcing <- failed
	o.forcing = nil
	return err
}

// rollBack gives the guest back to this host; cause is why.
func (o *Outgoing) rollBack(cause error) error {
	early := o.takeover == nil
	if o.link != nil && o.state != returned {
		abort := &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Abort{Abort: &vmmv1.Abort{Reason: cause.Error()}}}
		if o.state == offering || o.send(abort) != nil {
			o.lose(errLink)
		} else {
			// A canceled migration waits for this, too: it is short.
			o.deaf = true
			_ = o.wait(o.opts.Deadlines.Ask, func() bool { return o.state != revoking })
		}
	}
	if !early {
		heard := o.state == returned
		o.change(func(s *pr.Source) {
			// COMMIT was never sent, so a machine that was ready to send it
			// may take it for refused.
			if heard || s.HandedOver() {
				s.Receive(pr.Msg{Kind: pr.Aborted})
			} else {
				s.Lost()
			}
		})
	}
	o.state = returned
	if errors.Is(cause, ErrRefused) {
		return cause
	}
	return o.resume(cause)
}

// resume lets the guest run here again, once the reservations are known to be
// what they should.
func (o *Outgoing) resume(cause error) error {
	if o.link != nil {
		_ = o.send(acknowledge())
	}
	o.unthrottle()
	if o.takeover != nil {
		o.drainReports(o.takeover.finished)
		if o.takeover.blocked() {
			return fmt.Errorf("%w: %s (%w)", ErrBlocked, o.takeover.failure(), cause)
		}
		o.takeover.settled()
	}
	if o.paused {
		if err := o.src.Resume(); err != nil {
			return fmt.Errorf("%w: resume: %w (%w)", ErrBlocked, err, cause)
		}
		o.paused = false
	}
	return fmt.Errorf("%w: %w", ErrKept, cause)
}

func (o *Outgoing) unthrottle() {
	if o.throttled > 0 {
		o.throttled = 0
		o.src.Throttle(0)
	}
}

// change has every LUN's machine changed.
func (o *Outgoing) change(f func(*pr.Source)) {
	if o.takeover == nil {
		return
	}
	o.takeover.change(func(x *lunTakeover) { f(x.task.Machine.(*pr.Source)) })
}

// drainReports waits for the machines alone: nothing can interrupt what they
// do then, and each of their commands has its deadline.
func (o *Outgoing) drainReports(until func() bool) {
	for !until() {
		o.takeover.take(<-o.takeover.reports)
	}
}

// send sends a message, if it may be sent now.
func (o *Outgoing) send(m *vmmv1.StreamMessage) error {
	if o.link == nil {
		return fmt.Errorf("%w: %w", errLink, whyLost(o.why))
	}
	next, err := o.state.step(sends, kindOf(m))
	if err != nil {
		return err
	}
	if err := o.link.send(m); err != nil {
		o.lose(err)
		return fmt.Errorf("%w: %w", errLink, whyLost(err))
	}
	o.state = next
	return nil
}

// lose ends the link. After COMMIT the machines go on as they must.
func (o *Outgoing) lose(err error) {
	if o.link == nil {
		return
	}
	o.why = err
	o.hangUp()
	if o.state == handed {
		o.change(func(s *pr.Source) { s.Lost() })
	}
}

func (o *Outgoing) hangUp() {
	if o.link != nil {
		o.link.close()
		o.link = nil
	}
	if o.pages != nil {
		for _, c := range o.pages.channels {
			c.conn.Close()
		}
	}
}

// receive takes a message of the destination.
func (o *Outgoing) receive(m *vmmv1.StreamMessage) error {
	next, err := o.state.step(receives, kindOf(m))
	if err != nil {
		return err
	}
	was := o.state
	o.state = next
	switch b := m.Body.(type) {
	case *vmmv1.StreamMessage_Welcome:
		o.welcome = b.Welcome
	case *vmmv1.StreamMessage_Refused:
		return fmt.Errorf("%w by the destination: %s", ErrRefused, sentence(b.Refused.Reason))
	case *vmmv1.StreamMessage_RoundDone:
		if was == revoking {
			return nil
		}
		if b.RoundDone.Round != uint32(o.rounds) {
			return errProtocol("round %d is complete; this is round %d", b.RoundDone.Round, o.rounds)
		}
		o.acked = b.RoundDone.Round
	case *vmmv1.StreamMessage_Reservation:
		if was == revoking {
			return nil
		}
		return o.takeover.deliver(b.Reservation, func(x *lunTakeover, m pr.Msg) { x.task.Machine.(*pr.Source).Receive(m) })
	case *vmmv1.StreamMessage_Ready:
		o.down.Load = time.Duration(b.Ready.LoadUs) * time.Microsecond
	case *vmmv1.StreamMessage_Running:
		o.down.Start = time.Duration(b.Running.StartUs) * time.Microsecond
		o.landed = b.Running.Luns
	case *vmmv1.StreamMessage_Aborted:
		o.reason = sentence(b.Aborted.Reason)
		if was != revoking && was != handed {
			return fmt.Errorf("the destination gave up: %s", o.reason)
		}
	case *vmmv1.StreamMessage_Undecided:
		o.reason = sentence(b.Undecided.Reason)
	}
	return nil
}

// sentence is a peer's text, bounded.
func sentence(s string) string {
	const most = 1000
	if len(s) > most {
		s = s[:most] + "..."
	}
	return s
}

// poll handles what has arrived without waiting.
func (o *Outgoing) poll() error {
	err := o.wait(0, func() bool { return false })
	if errors.Is(err, errLate) {
		return nil
	}
	return err
}

// wait handles what happens until until is true, d has passed (errLate), or
// something ends the migration. It is the only place where anything is heard.
func (o *Outgoing) wait(d time.Duration, until func() bool) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for !until() {
		if err := o.event(timer.C); err != nil {
			return err
		}
	}
	return nil
}

func (o *Outgoing) event(late <-chan time.Time) error {
	var in chan *vmmv1.StreamMessage
	var lost chan struct{}
	if o.link != nil {
		in, lost = o.link.in, o.link.lost
	}
	var reports chan report
	if o.takeover != nil {
		reports = o.takeover.reports
	}
	ended := o.life
	switch {
	case o.state == handed:
		ended = o.ctx
	case o.deaf:
		ended = context.Background()
	}
	force := o.force
	if o.forcing != nil {
		force = nil
	}
	select {
	case m := <-in:
		if err := o.receive(m); err != nil {
			if o.state == handed { // it has lost its right to be heard here
				o.lose(err)
				return nil
			}
			return err
		}
	case <-lost:
		err := o.link.err
		o.lose(err)
		if o.state == handed {
			return nil
		}
		return fmt.Errorf("%w: %w", errLink, whyLost(err))
	case m := <-o.answers:
		o.asking = false
		if m != nil && o.state == handed {
			return o.receive(m)
		}
	case r := <-reports:
		return o.reported(r)
	case err := <-o.working:
		o.working = nil
		return err
	case <-ended.Done():
		return context.Cause(ended)
	case done := <-force:
		if o.state != handed {
			done <- errors.New("the guest was not handed over: cancel the migration instead")
			return nil
		}
		if o.opts.Local {
			done <- errShared
			return nil
		}
		o.forcing = done
		o.takeover.change(func(x *lunTakeover) {
			x.task.Machine.(*pr.Source).Force()
			x.forced = true
		})
	case <-o.ticker.C:
		o.report()
	case <-late:
		return errLate
	}
	return nil
}

// reported takes what a LUN's machine says.
func (o *Outgoing) reported(r report) error {
	o.takeover.take(r)
	switch {
	case r.again && o.forcing != nil:
		o.forcing <- fmt.Errorf("LUN %s cannot be taken back now: its disk does not answer, or this host's journal cannot be written", r.lun.lun.ID)
		o.forcing = nil
	case r.kind == pr.Abort && o.state != handed:
		return fmt.Errorf("LUN %s: the disk does not say what the guest has, or the journal cannot be written", r.lun.lun.ID)
	case r.finished && o.state != handed && o.state != returned && o.state != revoking:
		return errors.New(r.outcome.Sentence(r.lun.lun.ID))
	}
	return nil
}

func (o *Outgoing) report() {
	if o.opts.Progress == nil {
		return
	}
	p := &o.progress
	if o.pages != nil {
		p.Sent = o.pages.sent.Load()
	}
	now := *p
	if took := time.Since(o.begun.at); !o.begun.at.IsZero() && took > 0 {
		now.Remaining -= min(o.pages.walked.Load()-o.begun.walked, p.Remaining)
		now.Bandwidth = uint64(float64(p.Sent-o.begun.sent) / took.Seconds())
	}
	o.opts.Progress(now)
}

// convergence decides when to stop the guest, and when to slow it down.
type convergence struct {
	limit     time.Duration
	bandwidth float64 // bytes per second
	dirtyRate float64 // bytes per second
	expected  time.Duration
	slow      int // rounds in a row that gained too little
	throttle  int
}

// Throttling begins after the second round in a row that leaves more than
// half of what it sent, as every further one of its kind makes it stronger.
const (
	throttleAfter = 2
	throttleStep  = 20
	throttleMost  = 99
	// A round shorter than this says more about latency than about bandwidth.
	minSample = 1 << 20
)

// fits says that what is left can be sent within the downtime.
func (c *convergence) fits(left uint64) bool {
	c.expected = time.Duration(min(float64(left)/c.bandwidth*float64(time.Second), math.MaxInt64/2))
	return c.expected <= c.limit
}

// after is told of a round: the bytes that were sent, what the guest has
// written meanwhile, and how long it took.
func (c *convergence) after(sent, dirtied uint64, took time.Duration) (stop bool, throttle int) {
	seconds := max(took.Seconds(), 1e-6)
	if sent >= minSample || c.bandwidth == 0 {
		c.bandwidth = max(float64(sent)/seconds, 1)
	}
	c.dirtyRate = float64(dirtied) / seconds
	if c.fits(dirtied) {
		return true, c.throttle
	}
	if dirtied*2 > sent {
		c.slow++
	} else {
		c.slow = 0
	}
	if c.slow >= throttleAfter {
		c.throttle = min(c.throttle+throttleStep, throttleMost)
	}
	return false, c.throttle
}
