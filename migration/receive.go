package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// ReceiveOptions of a destination.
type ReceiveOptions struct {
	// StateDir is the directory of this host's journal; it is made.
	StateDir  string
	Deadlines Deadlines
	// Progress, if not nil, is told what the source says of its progress.
	Progress func(Progress)
	// Warn is told what the operator should know: why a migration, or a
	// connection before it was one, came to nothing. Several goroutines may
	// call it at a time.
	Warn func(error)
	// GivenUp, if not nil, is called when a migration that began has come to
	// nothing: what Host.Prepare has claimed for its guest is free.
	GivenUp func()
	// Survey, if not nil, describes this host to whoever asks before any
	// migration. It is called once at a time, also while a guest arrives.
	Survey func() *vmmv1.HostSurvey
}

// Arrival is a guest that runs here.
type Arrival struct {
	ID       ID
	Machine  Destination
	LUNs     []LUNOutcome
	Answered <-chan struct{} // closed when no source needs an answer any more

	leave context.CancelFunc
}

// Leave ends the answering, as when the guest has ended. That it ran here stays
// in the journal.
func (a *Arrival) Leave() {
	a.leave()
	<-a.Answered
}

// Receive waits on ln for a guest and returns when it runs here. Migrations
// that come to nothing are told to Warn, and it goes on waiting. It owns ln:
// after a return without an error it keeps answering the source until that
// knows the result, or Deadlines.Answer has passed, or Leave, then closes ln
// and Answered. The end of ctx ends the waiting, and a migration before its
// COMMIT; a guest that is handed over has come in spite of it.
//
// An error is ctx's, ln's, the journal's, or ErrBlocked: a guest came, was
// handed over, and cannot run here.
func Receive(ctx context.Context, ln net.Listener, host Host, opts ReceiveOptions) (*Arrival, error) {
	opts.Deadlines = opts.Deadlines.withDefaults()
	if opts.Warn == nil {
		opts.Warn = func(error) {}
	}
	luns, err := pr.OpenJournal(opts.StateDir)
	if err != nil {
		ln.Close()
		return nil, err
	}
	j, err := openJournal(opts.StateDir)
	if err != nil {
		ln.Close()
		return nil, err
	}
	life, leave := context.WithCancel(context.WithoutCancel(ctx))
	r := &receiver{
		host: host, opts: opts, verdicts: j, intents: luns,
		control: make(chan *hello), data: make(chan dataConn), acked: make(chan ID, 1), failed: make(chan error, 1),
	}
	stop := func() {
		leave()
		ln.Close()
		r.wg.Wait()
	}
	r.wg.Go(func() { r.accept(life, ln) })
	for {
		select {
		case <-ctx.Done():
			stop()
			return nil, context.Cause(ctx)
		case err := <-r.failed:
			stop()
			return nil, err
		case d := <-r.data: // of a migration that is over
			d.conn.Close()
		case <-r.acked:
		case h := <-r.control:
			a := &arrival{r: r, id: h.id, state: listening, handed: h.files}
			arrived, err := a.run(ctx, h)
			if err == nil {
				answered := make(chan struct{})
				arrived.Answered, arrived.leave = answered, leave
				go func() {
					defer close(answered)
					a.linger(life)
					stop()
				}()
				return arrived, nil
			}
			if errors.Is(err, ErrBlocked) {
				stop()
				return nil, err
			}
			opts.Warn(fmt.Errorf("migration %v: %w", h.id, err))
			if opts.GivenUp != nil {
				opts.GivenUp()
			}
		}
	}
}

// receiver greets everybody who connects.
type receiver struct {
	host     Host
	opts     ReceiveOptions
	verdicts *journal
	intents  *pr.Journal
	wg       sync.WaitGroup

	control chan *hello
	data    chan dataConn
	acked   chan ID    // a source knows the result
	failed  chan error // the listener's

	mu         sync.Mutex
	current    ID        // of the migration under way; zero: none
	doubt      string    // what a question about it is answered
	complained time.Time // when complain last spoke

	surveying sync.Mutex // held while the host is looked at
}

// hello is a control connection with its first message.
type hello struct {
	conn  net.Conn
	id    ID
	m     *vmmv1.StreamMessage
	files *fileReader // what came beside it; nil: nothing can have
}

type dataConn struct {
	conn net.Conn
	preamble
}

// maxGreeted bounds the connections that have not said what they are for.
const maxGreeted = 2 * MaxChannels

func (r *receiver) accept(ctx context.Context, ln net.Listener) {
	greeted := make(chan struct{}, maxGreeted)
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				r.failed <- fmt.Errorf("accept a connection: %w", err)
			}
			return
		}
		select {
		case greeted <- struct{}{}:
		default:
			r.complain(ctx, conn, fmt.Errorf("%d others have not said yet what they are for", maxGreeted))
			conn.Close()
			continue
		}
		r.wg.Go(func() {
			defer func() { <-greeted }()
			r.greet(ctx, conn)
		})
	}
}

// greet reads what a connection is for and hands it on. Whoever connects has
// shown nothing yet: what it sends is bounded in size and time.
func (r *receiver) greet(ctx context.Context, conn net.Conn) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	handed := false
	defer func() {
		stop()
		if !handed {
			conn.Close()
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(r.opts.Deadlines.Connect)); err != nil {
		return
	}
	p, err := readPreamble(conn)
	if err != nil {
		if !errors.Is(err, io.EOF) { // it left without a word, as who looks whether a port is open
			r.complain(ctx, conn, r.late(err, "said what it is for"))
		}
		return
	}
	switch p.role {
	case roleData:
		if !r.underWay(p.id) || conn.SetDeadline(time.Time{}) != nil {
			return
		}
		select {
		case r.data <- dataConn{conn, p}:
			handed = true
		case <-ctx.Done():
		}
	case roleControl:
		in, files := io.Reader(conn), (*fileReader)(nil)
		if u, ok := conn.(*net.UnixConn); ok {
			files = &fileReader{conn: u}
			in = files
		}
		defer func() {
			if !handed {
				files.close()
			}
		}()
		m, err := readMessage(in, maxHello)
		if err == nil && (kindOf(m) != kindHello || ID(padded(m.Id)) != p.id || p.id == (ID{})) {
			err = errProtocol("%v as the first message", kindOf(m))
		}
		if err != nil {
			r.complain(ctx, conn, r.late(err, "offered its guest"))
			return
		}
		// What was said about a migration once stays true.
		if v, _, err := r.verdicts.verdict(p.id); err != nil || v != verdictNone {
			r.refuse(conn, p.id, fmt.Sprintf("migration %v was decided here before", p.id))
			return
		}
		if !r.begin(p.id) {
			r.refuse(conn, p.id, "this destination is busy with another migration")
			return
		}
		if conn.SetDeadline(time.Time{}) != nil {
			r.end()
			return
		}
		select {
		case r.control <- &hello{conn, p.id, m, files}:
			handed = true
		case <-ctx.Done():
		}
	case roleQuery:
		r.answer(ctx, conn, p.id)
	case roleSurvey:
		r.describe(conn)
	}
}

// late says what a connection had not done by the deadline of its beginning,
// if that is what err is.
func (r *receiver) late(err error, done string) error {
	if isTimeout(err) {
		return fmt.Errorf("it had not %s after %v", done, r.opts.Deadlines.Connect)
	}
	return whyLost(err)
}

// complaintGap bounds what whoever reaches the address can have us say.
const complaintGap = time.Second

// complain tells why a connection came to nothing, unless it has just told of
// another one, or this side ends them all.
func (r *receiver) complain(ctx context.Context, conn net.Conn, why error) {
	r.mu.Lock()
	now := time.Now()
	speak := now.Sub(r.complained) >= complaintGap && ctx.Err() == nil
	if speak {
		r.complained = now
	}
	r.mu.Unlock()
	if !speak {
		return
	}
	from := ""
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		from = " from " + a.String()
	}
	r.opts.Warn(fmt.Errorf("a connection%s came to nothing: %w", from, why))
}

func (r *receiver) begin(id ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current != (ID{}) {
		return false
	}
	r.current, r.doubt = id, "the destination has not decided yet"
	return true
}

func (r *receiver) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = ID{}
}

func (r *receiver) underWay(id ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current == id && id != (ID{})
}

func (r *receiver) refuse(conn net.Conn, id ID, why string) {
	b, err := appendMessage(nil, &vmmv1.StreamMessage{Id: id[:], Body: &vmmv1.StreamMessage_Refused{Refused: &vmmv1.Refused{Reason: why}}})
	if err == nil {
		_, _ = conn.Write(b)
	}
}

// answer tells a source what became of its migration.
func (r *receiver) answer(ctx context.Context, conn net.Conn, id ID) {
	if conn.SetDeadline(time.Time{}) != nil {
		return
	}
	l := newLink(conn, id, r.opts.Deadlines.Ask)
	defer l.close()
	late := time.NewTimer(r.opts.Deadlines.Connect)
	defer late.Stop()
	for {
		select {
		case m := <-l.in:
			switch kindOf(m) {
			case kindQuery:
				if l.send(r.result(id)) != nil {
					return
				}
			case kindAcknowledge:
				if r.verdicts.forget(id) == nil {
					select {
					case r.acked <- id:
					case <-ctx.Done():
					case <-late.C:
					}
				}
				return
			default:
				return
			}
		case <-l.lost:
			return
		case <-late.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// result is the answer to a question about id.
func (r *receiver) result(id ID) *vmmv1.StreamMessage {
	v, why, err := r.verdicts.verdict(id)
	switch {
	case err != nil:
		return undecided(err.Error())
	case v == verdictRunning:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Running{Running: &vmmv1.Running{}}}
	case v == verdictAborted:
		return abortedBecause(why)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == id {
		return undecided(r.doubt)
	}
	return undecided("the destination's host knows nothing of this migration; its process may have died with it")
}

func undecided(why string) *vmmv1.StreamMessage {
	return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Undecided{Undecided: &vmmv1.Undecided{Reason: why}}}
}

func abortedBecause(why string) *vmmv1.StreamMessage {
	return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Aborted{Aborted: &vmmv1.Aborted{Reason: why}}}
}
