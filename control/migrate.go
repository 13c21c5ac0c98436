package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"

	"vmm/internal/sys"
	"vmm/migration"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// migrations is what a machine's process knows of migrations away from it, to
// a host or into a file: one at a time. A guest that was handed over, or must not run here, stays stopped
// whoever asks; so everybody who would let it run asks here first.
type migrations struct {
	mu      sync.Mutex
	current *outgoing // nil: none
	blocked error     // not nil: the guest must not run here

	plugging int // LUNs that are being attached or detached
	results  [len(migrationResults)]uint64
}

// Phases of a migration, and how one ends, as metrics name them.
const (
	phaseNone       = "none"
	phasePreparing  = "preparing" // the disks are asked, the other host is dialled
	phaseCopying    = "copying"
	phaseHandedOver = "handed_over"
	phaseSaving     = "saving"  // to a file, which is no migration but excludes one
	phaseBlocked    = "blocked" // over, and the guest must not run here
)

var phases = []string{phaseNone, phasePreparing, phaseCopying, phaseHandedOver, phaseSaving, phaseBlocked}

var migrationResults = [...]string{"succeeded", "failed", "blocked"}

// metrics is the phase, how far the migration under way is, and how many ended
// with which of migrationResults.
func (m *migrations) metrics() (phase string, p migration.Progress, results [len(migrationResults)]uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch o := m.current; {
	case m.blocked != nil:
		phase = phaseBlocked
	case o == nil:
		phase = phaseNone
	case o.to == "":
		phase = phaseSaving
	case o.progress.HandedOver != "":
		phase, p = phaseHandedOver, o.progress
	case o.progress.Round == 0:
		phase = phasePreparing
	default:
		phase, p = phaseCopying, o.progress
	}
	return phase, p, m.results
}

// outgoing is a migration under way. migrations.mu guards the first four.
type outgoing struct {
	run      *migration.Outgoing // nil while the disks are asked before it, and of a save
	giveUp   func()
	handed   string             // why nobody knows whether the guest runs at the other host
	progress migration.Progress // the last

	to    string        // an address
	doing string        // what is done to the guest
	ended chan struct{} // closed when the rest is final

	summary migration.Summary
	saved   migration.Saved
	err     error
}

// standing is what there is to say; empty: nothing.
func (m *migrations) standing() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.blocked != nil:
		return m.blocked.Error()
	case m.current == nil:
		return ""
	case m.current.handed != "":
		return fmt.Sprintf("handed over to %s, which has not said that it runs the guest: %s", m.current.to, m.current.handed)
	}
	return m.current.doing
}

// inTheWay is an error while there is a migration.
func (m *migrations) inTheWay() error {
	if s := m.standing(); s != "" {
		return connect.NewError(connect.CodeFailedPrecondition, errors.New(s))
	}
	return nil
}

// force settles a migration whose other host is dead, if the operator says so.
// Without a migration it does nothing.
func (m *migrations) force(dead bool) (forced bool, err error) {
	m.mu.Lock()
	o, blocked, handed := m.current, m.blocked, ""
	if o != nil {
		handed = o.handed
	}
	m.mu.Unlock()
	switch {
	case blocked != nil:
		err = fmt.Errorf("%w; stop it with: vmm stop --force", blocked)
	case o == nil:
		return false, nil
	case handed == "":
		err = errors.New("the guest is " + o.doing + ": vmm migrate --cancel gives that up")
	case !dead:
		err = fmt.Errorf("the guest was handed over to %s and may run there: %s; if that host is dead, and stays dead: vmm resume --force", o.to, handed)
	default:
		if err = o.run.Force(); err == nil {
			return true, nil
		}
	}
	return false, connect.NewError(connect.CodeFailedPrecondition, err)
}

func (s *service) Migrate(ctx context.Context, r *connect.Request[vmmv1.MigrateRequest], out *connect.ServerStream[vmmv1.MigrateResponse]) error {
	steps := make(latest[migration.Progress], 1)
	o, err := s.depart(ctx, r.Msg, steps.put)
	if err != nil {
		return err
	}
	err = steps.follow(ctx, o, func(p migration.Progress) error {
		return out.Send(&vmmv1.MigrateResponse{Body: &vmmv1.MigrateResponse_Progress{Progress: progressMessage(p)}})
	})
	if err != nil {
		return err
	}
	return out.Send(&vmmv1.MigrateResponse{Body: &vmmv1.MigrateResponse_Summary{Summary: summaryMessage(o.summary)}})
}

// latest passes steps on, of which the latest is enough for whoever is slow.
// Its capacity is one.
type latest[P any] chan P

func (l latest[P]) put(p P) {
	select {
	case <-l:
	default:
	}
	l <- p
}

// follow has every step sent until o has ended, and says how.
func (l latest[P]) follow(ctx context.Context, o *outgoing, send func(P) error) error {
	// Whoever connects must not wait for the first step to learn that it began.
	for p := *new(P); ; {
		if err := send(p); err != nil {
			return err // the client has left; it goes on
		}
		select {
		case p = <-l:
			continue
		case <-ctx.Done():
			return failed(context.Cause(ctx))
		case <-o.ended:
		}
		break
	}
	if o.err != nil {
		return connect.NewError(connect.CodeAborted, o.err)
	}
	return nil
}

// depart begins a migration.
func (s *service) depart(ctx context.Context, r *vmmv1.MigrateRequest, progress func(migration.Progress)) (*outgoing, error) {
	opts, err := options(r)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o := &outgoing{giveUp: cancel, to: r.Address, doing: "migrating to " + r.Address, ended: make(chan struct{})}
	if err := s.migration.begin(o); err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	opts.Progress = func(p migration.Progress) {
		s.migration.mu.Lock()
		o.handed, o.progress = p.HandedOver, p
		s.migration.mu.Unlock()
		progress(p)
	}
	// Disks may take their time; whoever asks for the status meanwhile is not
	// to wait for them.
	source, err := s.machine.Depart(ctx)
	if err != nil {
		s.migration.end(o)
		return nil, failed(err)
	}
	if opts.Local {
		opts.Name = s.claim.Share()
	}
	run, err := migration.NewOutgoing(source, opts)
	if err != nil {
		s.claim.Keep()
		s.migration.end(o)
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	s.migration.mu.Lock()
	o.run, o.giveUp = run, run.Cancel
	s.migration.mu.Unlock()
	if ctx.Err() != nil { // given up just before
		run.Cancel()
	}
	s.outlive(context.Background(), o, func(life context.Context) {
		o.summary, o.err = run.Run(life)
		if o.err != nil && !errors.Is(o.err, migration.ErrHandedOver) { // then it may run there
			s.claim.Keep()
		}
	})
	return o, nil
}

// outlive does what moves the guest: it outlives its client, and ends with the
// machine, as the machine does with its success.
func (s *service) outlive(ctx context.Context, o *outgoing, do func(context.Context)) {
	life, end := context.WithCancel(ctx)
	go func() {
		select {
		case <-s.machine.Ended():
			end()
		case <-o.ended:
		}
	}()
	go func() {
		defer end()
		do(life)
		if o.err == nil {
			// What is left is to free the guest's memory. Where the guest has
			// gone may be the next process.
			_ = sys.GiveWay()
		}
		s.migration.end(o)
		if o.err == nil {
			_ = s.machine.Stop() // it may have ended by itself
		}
	}()
}

// begin makes o the migration under way.
func (m *migrations) begin(o *outgoing) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.current != nil || m.blocked != nil {
		return errors.New("there is a migration already; see vmm status")
	}
	if m.plugging > 0 {
		return errPlugging
	}
	m.current = o
	return nil
}

// end is what o's end leaves.
func (m *migrations) end(o *outgoing) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current = nil
	if errors.Is(o.err, migration.ErrBlocked) || errors.Is(o.err, migration.ErrHandedOver) {
		m.blocked = o.err
	}
	switch {
	case o.to == "": // a save
	case o.summary.ID != (migration.Summary{}).ID && o.err == nil:
		m.results[0]++
	case m.blocked == nil:
		m.results[1]++
	default:
		m.results[2]++
	}
	close(o.ended)
}

// options of a migration, as a client asks for them.
func options(r *vmmv1.MigrateRequest) (migration.Options, error) {
	o := migration.Options{
		Channels:     int(min(r.Channels, migration.MaxChannels+1)),
		Downtime:     time.Duration(min(r.DowntimeMs, 1<<40)) * time.Millisecond,
		MaxBandwidth: r.MaxBandwidth,
		Timeout:      time.Duration(min(r.TimeoutMs, 1<<40)) * time.Millisecond,
	}
	address, err := migration.ParseAddress(r.Address)
	if err != nil {
		return o, err
	}
	if o.Local = r.Local; o.Local && address.Network != "unix" {
		return o, fmt.Errorf("address %v: memory can be handed over by a unix socket alone, unix:///PATH", address)
	}
	security := migration.Security{Insecure: r.Insecure}
	if r.TlsDir != "" {
		if security.TLS, err = migration.LoadCertificates(r.TlsDir); err != nil {
			return o, err
		}
	}
	if o.Dial, err = migration.Dialer(address, security, r.Peer); err != nil {
		return o, err
	}
	dir, err := StateDir()
	if err != nil {
		return o, err
	}
	o.Journal, err = pr.OpenJournal(dir)
	return o, err
}

func (s *service) CancelMigration(context.Context, *connect.Request[vmmv1.CancelMigrationRequest]) (*connect.Response[vmmv1.CancelMigrationResponse], error) {
	s.migration.mu.Lock()
	defer s.migration.mu.Unlock()
	o := s.migration.current
	if o == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the guest is neither migrating nor being saved"))
	}
	o.giveUp()
	return connect.NewResponse(&vmmv1.CancelMigrationResponse{}), nil
}

func progressMessage(p migration.Progress) *vmmv1.MigrationProgress {
	return &vmmv1.MigrationProgress{
		Round: uint32(p.Round), RemainingBytes: p.Remaining, SentBytes: p.Sent, DirtyRate: p.DirtyRate, Bandwidth: p.Bandwidth,
		ExpectedDowntimeMs: uint64(p.Expected.Milliseconds()), Throttle: uint32(p.Throttle), HandedOver: p.HandedOver,
	}
}

func summaryMessage(s migration.Summary) *vmmv1.MigrationSummary {
	d := s.Downtime
	return &vmmv1.MigrationSummary{
		Id: s.ID.String(), Rounds: uint32(s.Rounds), SentBytes: s.Sent, TotalUs: micros(s.Total),
		Downtime: &vmmv1.MigrationDowntime{
			TotalUs: micros(d.Total), StopUs: micros(d.Stop), SaveUs: micros(d.Save), PagesUs: micros(d.Pages),
			LoadUs: micros(d.Load), TakeoverUs: micros(d.Takeover), StartUs: micros(d.Start),
		},
		Luns: lunMessages(s.LUNs), Left: lunMessages(s.Left),
	}
}

func micros(d time.Duration) uint64 { return uint64(max(d, 0).Microseconds()) }

func lunMessages(list []migration.LUNOutcome) (out []*vmmv1.MigratedLun) {
	for _, l := range list {
		out = append(out, &vmmv1.MigratedLun{Id: l.ID, Sentence: l.Sentence, TakeoverUs: micros(l.Takeover)})
	}
	return out
}
