package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
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
	committed time.Time     // when COMMIT was sent
	lag       time.Duration // of RUNNING behind the guest's start
	progress  Progress      // as of the last round's end
	begun     struct {      // the round under way
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
	go Rehearse()
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
	if err := o.offer(hello); err != nil {
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
		if c, ok := conn.(*net.UnixConn); ok {
			// As much as the host allows (net.core.wmem_max), for fewer turns
			// between the two processes; TCP sees to it itself.
			_ = c.SetWriteBuffer(maxPayload)
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
	return sendAttachments(o.src.Attachments(), o.welcome.GetHave(), func(m *vmmv1.StreamMessage) error {
		if err := o.send(m); err != nil {
			return err
		}
		return o.poll()
	})
}

// sendAttachments has files sent in pieces, except those whose places are listed
// in there: the receiver has them. The data of a message is good until send
// returns. Whether a file is still what it was, the receiver tells by its digest.
func sendAttachments(files []Attachment, there []uint32, send func(*vmmv1.StreamMessage) error) error {
	const chunk = 256 << 10
	buf := make([]byte, chunk)
	for i, a := range files {
		if slices.Contains(there, uint32(i)) {
			continue
		}
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
	o.src.GiveWay(true)
	defer o.src.GiveWay(false)
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
		stop, throttle := c.after(sent, pages*memory.PageSize, took, until(deadline))
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
