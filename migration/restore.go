package migration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// RestoreOptions say how a guest comes out of a snapshot.
type RestoreOptions struct {
	// StateDir is the directory of this host's journal; it is made.
	StateDir string
	// Again runs a snapshot that was run before.
	Again     bool
	Deadlines Deadlines
	// Warn is told what does not keep the guest from running.
	Warn func(error)
}

// Restore makes a machine from a snapshot and returns when its guest runs.
// Whatever can be refused is, before the file is marked as used. An error that
// wraps ErrBlocked says that it stays marked: a reservation has moved, and the
// guest does not run; any other leaves everything as it was.
func Restore(ctx context.Context, path string, host Host, opts RestoreOptions) (*Arrival, error) {
	opts.Deadlines = opts.Deadlines.withDefaults()
	if opts.Warn == nil {
		opts.Warn = func(error) {}
	}
	intents, err := pr.OpenJournal(opts.StateDir)
	if err != nil {
		return nil, err
	}
	f, id, mark, err := openSnapshot(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if mark == markUsed && !opts.Again {
		return nil, fmt.Errorf("snapshot %s: it has been run already, so its memory and the guest's disks may not agree any more; --again runs it nevertheless", path)
	}
	r := &restoring{
		arrival: &arrival{r: &receiver{host: host, opts: ReceiveOptions{Deadlines: opts.Deadlines, Warn: opts.Warn}, intents: intents}, id: id},
		path:    path, again: opts.Again && mark == markUsed,
	}
	err = r.read(ctx, &snapshotReader{ctx: ctx, r: bufio.NewReaderSize(f, 256<<10)})
	if err == nil {
		if err = r.machine.Load(r.saved); err != nil {
			err = fmt.Errorf("load the guest's state: %w", err)
		}
	}
	var a *Arrival
	if err == nil {
		a, err = r.run(f, mark)
	}
	if err != nil {
		r.tearDown()
		return nil, fmt.Errorf("snapshot %s: %w", path, err)
	}
	return a, nil
}

// restoring is one guest on its way out of a snapshot: an arrival whose source
// is a file.
type restoring struct {
	*arrival
	path   string
	again  bool
	states []saved // by LUN
}

// saved is what a snapshot has of one LUN's reservation.
type saved struct {
	pr.Msg
	attentions []scsi.Sense
}

// read reads the file into a machine. It touches nothing else.
func (r *restoring) read(ctx context.Context, in *snapshotReader) error {
	if err := r.parse(ctx, in); err != nil {
		var p protocolError
		switch {
		case errors.As(err, &p):
			return fmt.Errorf("it is damaged: %s", string(p))
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return errors.New("it is damaged: it ends too early")
		}
		return err
	}
	return nil
}

func (r *restoring) parse(ctx context.Context, in *snapshotReader) error {
	m, err := r.message(in, maxHello, kindHello)
	if err != nil {
		return err
	}
	r.hello = m.GetHello()
	if len(r.hello.Features) > 0 { // none that concern a file are known
		return errProtocol("a snapshot with features %q", r.hello.Features)
	}
	if err := r.prepare(ctx, true); err != nil {
		return err
	}
	for r.saved == nil {
		m, err := r.message(in, maxMessage, kindAttachment, kindState)
		if err != nil {
			return err
		}
		if kindOf(m) == kindAttachment {
			if err := r.attach(m.GetAttachment()); err != nil {
				return err
			}
			continue
		}
		if r.saved = m.GetState().GetMachine(); r.saved == nil || m.GetState().LastRound != 1 {
			return errProtocol("a state with round %d as the last", m.GetState().LastRound)
		}
	}
	if err := r.attached(); err != nil {
		return err
	}
	if err := r.reservations(in); err != nil {
		return err
	}
	p := pageReader{r: in, ram: r.machine.RAM()}
	if round, err := p.next(); err != nil {
		return err
	} else if round != 1 {
		return errProtocol("the end of round %d", round)
	}
	sum := in.sum
	if m, err = r.message(in, maxMessage, kindCommit); err != nil {
		return err
	}
	if want := m.GetCommit().Crc32C; sum != want {
		return errProtocol("its checksum is %08x; %08x was saved", sum, want)
	}
	if n, err := in.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		return errProtocol("something follows its end (%v)", err)
	}
	return nil
}

// message reads a message of one of the kinds that may come here.
func (r *restoring) message(in io.Reader, limit uint32, want ...kind) (*vmmv1.StreamMessage, error) {
	m, err := readMessage(in, limit)
	if err != nil {
		return nil, err
	}
	if ID(padded(m.Id)) != r.id {
		return nil, errProtocol("a message of %x in snapshot %v", m.Id, r.id)
	}
	if k := kindOf(m); !slices.Contains(want, k) {
		return nil, errProtocol("%v where %v is due", k, want)
	}
	return m, nil
}

// reservations reads what was saved of the LUNs' reservations, and refuses
// what no takeover could set right.
func (r *restoring) reservations(in io.Reader) error {
	r.states, r.pairs = make([]saved, len(r.luns)), make([]*pr.Pair, len(r.luns))
	for i, l := range r.luns {
		theirs := r.hello.Luns[i]
		if theirs.Reservations {
			m, err := r.message(in, maxMessage, kindReservation)
			if err != nil {
				return err
			}
			w := m.GetReservation()
			s := &r.states[i]
			if s.Msg, err = decodeReservation(w); err == nil {
				s.attentions, err = decodeSenses(w.Attentions)
			}
			if err != nil {
				return err
			}
			if uint64(w.Lun) != uint64(i) || s.Kind != pr.State {
				return errProtocol("step %v of LUN %d where the state of LUN %d is due", w.Step, w.Lun, i)
			}
		}
		var err error
		if r.pairs[i], err = r.pair(l, theirs, &r.states[i]); err != nil {
			return err
		}
	}
	return nil
}

// pair is a LUN's old and new nexus; nil if it has no reservations. The guest
// runs nowhere, so whoever had its nexus has it no more: a nexus that is this
// host's now is the guest's, and need not have been this host's then.
func (r *restoring) pair(l *LUN, theirs *vmmv1.HostLun, s *saved) (*pr.Pair, error) {
	ours := offerLUN(l)
	p, err := joined(theirs, ours, false)
	if p == nil || err != nil {
		return nil, err
	}
	here, err := registered(l)
	if err != nil {
		return nil, err
	}
	same := theirs.BootId != "" && theirs.Address != "" && theirs.BootId == ours.BootId && theirs.Address == ours.Address ||
		p.Old != (pr.Nexus{}) && p.Old == p.New ||
		r.again && s.Key != 0 && here == s.Key // where it ran the last time
	if same {
		p, err = joined(theirs, ours, true)
		if err != nil {
			return nil, err
		}
	}
	p.Move = false // there is nobody to send it
	if here != 0 && !(same && here == s.Key && !s.Fenced) {
		return nil, errors.New(pr.Outcome{Kind: pr.Refused, Reason: pr.LeftoverRegistration, Key: here}.Sentence(l.ID))
	}
	return p, nil
}

// registered is the key of this host's nexus.
func registered(l *LUN) (pr.Key, error) {
	if l.Preflight.FullStatus && l.Nexus != (pr.Nexus{}) {
		v := pr.View{FullStatus: true, Registrations: l.Preflight.Status.Registrations}
		if at := v.With(l.Nexus, 0); at >= 0 {
			return v.Registrations[at].Key, nil
		}
		return 0, nil
	}
	if l.Tracked == nil {
		return 0, nil
	}
	t := l.Tracked()
	if t.Doubt && t.Key == 0 {
		return 0, fmt.Errorf("LUN %s: its disk did not say whether this host is registered with it", l.ID)
	}
	return t.Key, nil
}

// run is what cannot be taken back: the file is marked, the reservations move,
// the guest runs.
func (r *restoring) run(f *os.File, mark byte) (*Arrival, error) {
	if err := setMark(f, markUsed); err != nil {
		return nil, fmt.Errorf("mark it as used: %w", errors.Join(err, setMark(f, mark)))
	}
	r.takeover = newTakeover(len(r.luns))
	for i, l := range r.luns {
		p, s := r.pairs[i], &r.states[i]
		if p == nil {
			continue
		}
		m := pr.NewAlone(p, s.Key)
		if s.Fenced {
			m = pr.NewFenced(p, s.Key)
		}
		own := *p
		own.Old, own.New = p.New, p.Old
		ledger := r.r.intents.For(entry(r.id, l, s.Key, own))
		r.takeover.add(i, l, &m, s.attentions, func(pr.Key) pr.Ledger { return ledger }, func(*vmmv1.Reservation) error {
			return errors.New("a snapshot answers nothing")
		})
	}
	for !r.takeover.finished() {
		// Nothing ends this early: each machine ends by itself.
		r.takeover.take(<-r.takeover.reports)
	}
	if why := r.takeover.failure(); why != "" {
		return nil, r.stuck(f, mark, errors.New(why))
	}
	r.takeover.settled()
	if _, err := r.machine.Run(); err != nil {
		return nil, r.stuck(f, mark, err)
	}
	for _, x := range r.takeover.luns {
		// The registration is the running guest's: no recovery may remove it.
		if err := x.Erase(); err != nil {
			r.r.opts.Warn(err)
		}
	}
	outcomes := r.takeover.outcomes()
	r.takeover.close()
	answered := make(chan struct{})
	close(answered) // nobody asks
	return &Arrival{ID: r.id, Machine: r.machine, LUNs: outcomes, Answered: answered, leave: func() {}}, nil
}

// stuck is the end of a guest that could not be run. Where nothing has moved
// the file is what it was before.
func (r *restoring) stuck(f *os.File, mark byte, why error) error {
	moved := slices.ContainsFunc(r.takeover.luns, func(x *lunTakeover) bool {
		switch x.outcome.Kind {
		case pr.Moved, pr.RegistrationOnly, pr.LeftBehind, pr.Blocked, pr.Undecided:
			return true
		}
		return x.outcome.Stale
	})
	if !moved {
		err := setMark(f, mark)
		if err == nil {
			return why
		}
		why = errors.Join(why, err)
	}
	return fmt.Errorf("%w: %w; it is marked as used, though nothing of the guest has run: --again tries once more", ErrBlocked, why)
}
