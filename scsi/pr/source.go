package pr

// Source is the source's side of a takeover of one LUN, from stopped vCPUs to
// the end, or back: its rollback, and the operator's forced resume. Until
// COMMIT it changes nothing on the disk, and it never registers the guest's
// key anew: a migration that fails finds S as it was, or as others left it.
type Source struct {
	pair *Pair
	home *Pair // the way back

	phase    sourcePhase
	then     sourcePhase // where the look leads
	look     look
	taking   Dest // the forced resume: a takeover in the other direction
	linked   bool // the destination can be told
	key      Key
	persist  bool
	fenced   bool
	readied  bool // READY came
	handed   bool // COMMIT was sent
	gave     bool // our registration was given up on the destination's request
	clean    bool // the destination says that it left nothing
	noted    bool // our journal says that we hand the guest over
	tries    uint8
	finished Outcome
}

type sourcePhase uint8

const (
	sourceLook  sourcePhase = iota // reading, then on to then
	sourceTruth                    // not a phase but a place for a look to lead to, as the next three
	sourceBack
	sourceForce
	sourceSweep
	sourceSelf // REGISTER K to K: are we registered? (no READ FULL STATUS)
	sourceTellState
	sourceServe // the destination's requests, READY, or the end of it
	sourceProve // REGISTER K to K on its request
	sourceTellProof
	sourceNote   // that we hand the guest over, to the journal
	sourceTellGo // COMMIT
	sourceMove   // REGISTER AND MOVE on its request
	sourceGo     // REGISTER K to 0 on its request
	sourceTellGave
	sourceTellAbort
	sourceAborted // the destination's ABORTED is due
	sourceOwn     // rollback without READ FULL STATUS: REGISTER K to K
	sourceDrop    // rollback: PREEMPT what the destination left
	sourceTake    // the forced resume's takeover
	sourceRemove  // the guest runs elsewhere: REGISTER K to 0
	sourceErase
	sourceEnd
)

// NewSource is the source of a migration whose guest is stopped and whose
// commands are all complete. tracked is the key that the tracker believes in:
// without READ FULL STATUS the disk cannot tell which key is this nexus's.
func NewSource(p *Pair, tracked Key) Source {
	s := Source{pair: p, home: p.back(), linked: true, key: tracked}
	if !p.FullStatus && tracked == 0 {
		s.phase = sourceTellState
		return s
	}
	s.lookThen(sourceTruth, true)
	return s
}

// Outcome is the result, once Next says Finish.
func (s *Source) Outcome() Outcome { return s.finished }

// Pair is what the machine's next command works with: the way back, while a
// forced resume takes over.
func (s *Source) Pair() *Pair {
	if s.phase == sourceTake {
		return s.home
	}
	return s.pair
}

// HandedOver says that COMMIT was sent: from now on only ABORTED from the
// destination, or the operator, lets the guest run here again.
func (s *Source) HandedOver() bool { return s.handed }

// Readied says that the destination has sent READY.
func (s *Source) Readied() bool { return s.readied }

// finish ends the machine. The journal's entry goes first: where the guest
// runs here again, no recovery may touch its registration.
func (s *Source) finish(o Outcome) {
	s.finished, s.phase = o, sourceEnd
	if s.noted {
		s.phase = sourceErase
	}
}

func (s *Source) lookThen(then sourcePhase, caps bool) {
	s.look.start(s.pair, caps)
	s.then, s.phase = then, sourceLook
}

// Next is what the machine wants done. Asking again changes nothing.
func (s *Source) Next() Step {
	tell := func(m Msg) Step {
		m.Key = s.key
		return Step{Kind: Tell, Msg: m}
	}
	switch s.phase {
	case sourceLook:
		return s.look.cmd(s.key)
	case sourceSelf, sourceProve, sourceOwn:
		return register(s.key, s.key, s.persist)
	case sourceTellState:
		return tell(Msg{Kind: State, Type: s.look.see.Type, Persist: s.persist, Fenced: s.fenced})
	case sourceTellProof:
		return tell(Msg{Kind: Proved, Result: Result(s.tries)})
	case sourceTellGave:
		return tell(Msg{Kind: Gave, Result: Result(s.tries)})
	case sourceNote:
		return Step{Kind: Note}
	case sourceTellGo:
		return tell(Msg{Kind: Commit})
	case sourceMove:
		return Step{Kind: Do, Cmd: Cmd{Write: true, Out: RegisterAndMove, Key: s.key, ServiceKey: s.key, APTPL: s.persist}}
	case sourceGo, sourceRemove:
		return register(s.key, 0, s.persist)
	case sourceTellAbort:
		return tell(Msg{Kind: Abort})
	case sourceDrop:
		return preempt(s.key, s.look.see.Type)
	case sourceTake:
		if st := s.taking.Next(); st.Kind != Finish {
			return st
		}
	case sourceErase:
		return Step{Kind: Erase}
	case sourceEnd:
		return Step{Kind: Finish}
	}
	return Step{Kind: Await}
}

// Noted says whether the journal was written.
func (s *Source) Noted(ok bool) {
	switch {
	case s.phase == sourceTake:
		s.taking.Noted(ok)
		s.taken()
	case s.phase == sourceErase:
		s.noted, s.phase = false, sourceEnd
	case ok:
		s.noted, s.handed, s.phase = true, true, sourceTellGo
	default:
		s.Cancel()
	}
}

// Told says that a message was handed to the link.
func (s *Source) Told() {
	switch s.phase {
	case sourceTellState, sourceTellProof, sourceTellGave, sourceTellGo:
		s.tries, s.phase = 0, sourceServe
	case sourceTellAbort:
		s.phase = sourceAborted
	}
}

// Commit hands the guest over. It is called once every LUN's machine, and the
// rest of the migration, is ready.
func (s *Source) Commit() {
	switch {
	case s.phase != sourceServe || !s.readied || s.handed:
	case s.key == 0 || s.pair.Same:
		// Nothing of ours stays behind: and one nexus's registration is the
		// running guest's, which no recovery may remove.
		s.handed, s.phase = true, sourceTellGo
	default:
		s.phase = sourceNote
	}
}

// Cancel gives the migration up, which is possible until COMMIT.
func (s *Source) Cancel() {
	if s.handed || s.phase == sourceEnd || s.phase == sourceAborted {
		return
	}
	if s.linked {
		s.phase = sourceTellAbort
		return
	}
	s.back()
}

// Lost says that the destination cannot be heard any more. Before COMMIT the
// guest comes back; after it the machine waits for what the destination or
// the operator says.
func (s *Source) Lost() {
	s.linked = false
	switch {
	case s.phase == sourceEnd || s.phase == sourceTake || s.phase == sourceErase || s.phase == sourceRemove:
	case s.handed:
		switch s.phase {
		case sourceTellGo, sourceTellProof, sourceTellGave:
			s.phase = sourceServe
		}
	case s.phase == sourceLook && (s.then == sourceBack || s.then == sourceSweep):
	case s.phase == sourceDrop || s.phase == sourceOwn:
	default:
		s.back()
	}
}

// back begins the rollback: the guest will run here, with what the disk says.
func (s *Source) back() {
	s.tries = 0
	switch {
	case s.key == 0:
		s.ran()
	case s.pair.FullStatus || s.pair.Same:
		s.lookThen(sourceBack, false)
	default:
		s.phase = sourceOwn
	}
}

// Receive takes a message of the destination.
func (s *Source) Receive(m Msg) {
	switch {
	case m.Kind == Aborted && s.phase != sourceEnd:
		s.handed, s.clean = false, true
		s.linked = false
		s.back()
	case m.Kind == Running && s.handed:
		s.handed = false
		s.tries = 0
		if s.key == 0 || s.pair.Same {
			s.handedOver(Outcome{Key: s.key})
			return
		}
		s.lookThen(sourceSweep, false)
	case s.phase != sourceServe:
	case m.Kind == AskProof:
		s.persist, s.phase = m.Persist, sourceProve
	case m.Kind == Ready:
		s.readied = true
	case m.Kind == AskMove && s.handed:
		s.persist, s.phase = m.Persist, sourceMove
	case m.Kind == AskUnregister && s.handed:
		// From here on the guest's key may be at the destination only.
		s.gave = true
		s.persist, s.phase = m.Persist, sourceGo
	}
}

// Force makes the guest run here although it was handed over: the operator
// states that the destination is dead.
func (s *Source) Force() {
	if !s.handed || s.phase != sourceServe {
		return
	}
	s.linked = false
	if s.key == 0 || s.pair.Same || !s.pair.FullStatus {
		s.handed = false
		s.back()
		return
	}
	s.lookThen(sourceForce, false)
}

// Answer takes the reply to the command that Next gave.
func (s *Source) Answer(r Reply) {
	switch s.phase {
	case sourceTake:
		s.taking.Answer(r)
		s.taken()
	case sourceLook:
		over, failed := s.look.answer(r)
		if over {
			s.looked(failed)
		}
	case sourceSelf:
		switch {
		case r.Result == Done:
			s.phase = sourceTellState
		case r.Result == Conflicted:
			s.key, s.fenced, s.phase = 0, true, sourceTellState
		case s.tries+1 < maxTries:
			s.tries++
		default:
			s.Cancel()
		}
	case sourceProve, sourceMove, sourceGo:
		// REGISTER K to K, and K to 0 after an error, may be repeated: they
		// say in the end what is so. REGISTER AND MOVE is settled by reading.
		if r.Result == Failed && s.phase != sourceMove && s.tries+1 < maxTries {
			s.tries++
			return
		}
		s.tries = uint8(r.Result)
		if s.phase == sourceProve {
			s.phase = sourceTellProof
		} else {
			s.phase = sourceTellGave
		}
		if !s.linked {
			s.phase = sourceServe
			if !s.handed {
				s.back()
			}
		}
	case sourceOwn:
		switch {
		case r.Result == Failed && s.tries < maxTries:
			s.tries++
		case r.Result == Conflicted:
			s.finish(Outcome{Kind: FencedMeanwhile, Key: s.key})
		default:
			s.ran()
		}
	case sourceDrop:
		// Whatever it says: the disk knows better, and it is not repeated.
		s.clean = true
		s.lookThen(sourceBack, false)
	case sourceRemove:
		if r.Result == Failed && s.tries < maxRemoves {
			s.tries++
			return
		}
		s.handedOver(Outcome{Key: s.key, Stale: r.Result == Failed})
	}
}

// looked goes on where the look was to lead; failed says that the disk could
// not be read.
func (s *Source) looked(failed bool) {
	see := &s.look.see
	switch s.then {
	case sourceTruth:
		s.persist = see.Persist
		switch {
		case failed:
			s.Cancel()
		case !s.pair.FullStatus && s.pair.Same:
			// The guest stays on this nexus with whatever it has there: nothing
			// is sent to find out more.
			if see.Count == 0 {
				s.key, s.fenced = 0, true
			}
			s.phase = sourceTellState
		case !s.pair.FullStatus:
			s.tries, s.phase = 0, sourceSelf
		default:
			s.fenced = s.key != 0 && see.Old == 0
			s.key = see.Old
			s.phase = sourceTellState
		}
	case sourceBack:
		switch {
		case failed:
			s.ran() // what the guest had, it has; it will meet the disk's errors itself
		case s.pair.FullStatus && see.Old != s.key, !s.pair.FullStatus && see.Count == 0:
			s.finish(Outcome{Kind: FencedMeanwhile, Key: s.key})
		case !s.clean && see.New == s.key && see.Holder == Old && see.Type.Single() && see.Third == 0:
			s.phase = sourceDrop
		default:
			s.finish(Outcome{Kind: Kept, Key: s.key, Type: see.Type, Stale: see.New == s.key})
		}
	case sourceForce:
		switch {
		case failed: // nothing is known: the operator may try again
			s.phase = sourceServe
		case see.Old == s.key:
			s.handed = false
			s.lookThen(sourceBack, false)
		case see.New == s.key && (see.Holder == New || s.gave):
			// A bare key on D would prove nothing: D may have registered it
			// after the guest was fenced, and died before it could know.
			s.handed = false
			s.taking = NewAlone(s.home, s.key)
			s.phase = sourceTake
		default:
			s.handed = false
			s.finish(Outcome{Kind: FencedMeanwhile, Key: s.key})
		}
	case sourceSweep:
		// What is left of us is inert, unless a reservation rests on it.
		left := see.Old == s.key
		if !s.pair.FullStatus {
			left = !s.gave && see.Count > 1
		}
		holds := see.Type.Single() && (see.Holder == Old || see.Holder == Holder) ||
			see.Type.AllRegistrants() && see.Registered == 1
		switch {
		case failed:
			s.handedOver(Outcome{Key: s.key, Stale: true})
		case left && holds:
			s.handedOver(Outcome{Key: s.key, Type: see.Type, Stale: true})
		case left:
			s.phase = sourceRemove
		default:
			s.handedOver(Outcome{Key: s.key})
		}
	}
}

// handedOver ends the machine where the guest runs on its destination. What
// is left of ours stays in the journal.
func (s *Source) handedOver(o Outcome) {
	o.Kind = HandedOver
	s.noted = s.noted && !o.Stale
	s.finish(o)
}

// taken ends the forced resume when its takeover has.
func (s *Source) taken() {
	if s.taking.Next().Kind != Finish {
		return
	}
	switch o := s.taking.Outcome(); o.Kind {
	case GivenUp, Refused: // nothing was done: the operator may try again
		s.handed, s.phase = true, sourceServe
	default:
		s.finish(o)
	}
}

// ran ends the rollback without a word from the disk, or with nothing to ask.
func (s *Source) ran() {
	o := Outcome{Kind: Kept, Key: s.key}
	if s.key == 0 {
		o.Kind = NothingHeld
		if s.fenced {
			o.Kind = FencedMeanwhile
		}
	}
	s.finish(o)
}

// Recovery settles what a host's journal holds after a crash: a registration
// of ours with key k is removed, unless a reservation rests on it.
type Recovery struct {
	pair     *Pair // Old is this host's nexus, New the other one
	look     look
	key      Key
	handed   bool // the other host may have given its registration up
	phase    recoveryPhase
	tries    uint8
	finished Outcome
}

type recoveryPhase uint8

const (
	recoveryLook recoveryPhase = iota
	recoveryRemove
	recoveryErase
	recoveryEnd
)

// NewRecovery settles key k on p.Old, which is this host's nexus. handed is
// what the journal's last entry says: then this registration stays, for it
// may be the only one that the guest has.
func NewRecovery(p *Pair, k Key, handed bool) Recovery {
	r := Recovery{pair: p, key: k, handed: handed}
	r.look.start(p, true)
	if p.Same { // the guest's, wherever on this host it runs
		r.finished, r.phase = Outcome{Kind: Kept, Key: k}, recoveryEnd
	}
	return r
}

// Outcome is NothingHeld if the registration is gone, LeftBehind if a
// reservation rests on it.
func (r *Recovery) Outcome() Outcome { return r.finished }

// Pair is what the machine's commands work with.
func (r *Recovery) Pair() *Pair { return r.pair }

// Next is what the machine wants done.
func (r *Recovery) Next() Step {
	switch r.phase {
	case recoveryLook:
		return r.look.cmd(r.key)
	case recoveryRemove:
		return register(r.key, 0, r.look.see.Persist)
	case recoveryErase:
		return Step{Kind: Erase}
	}
	return Step{Kind: Finish}
}

// Noted says whether the journal was written.
func (r *Recovery) Noted(bool) { r.phase = recoveryEnd }

// Answer takes the reply to the command that Next gave.
func (r *Recovery) Answer(rep Reply) {
	see := &r.look.see
	stay := Outcome{Kind: LeftBehind, Key: r.key, Stale: true}
	switch r.phase {
	case recoveryLook:
		over, failed := r.look.answer(rep)
		if !over {
			return
		}
		stay.Type = see.Type
		rests := see.Type.Single() && (see.Holder == Old || see.Holder == Holder) ||
			see.Type.AllRegistrants() && see.Registered == 1 ||
			r.handed // whatever the other nexus shows now: it may be about to be given up
		switch {
		case failed:
			stay.Reason = DiskFailed
			r.finished, r.phase = stay, recoveryEnd
		case r.pair.FullStatus && see.Old != r.key, !r.pair.FullStatus && see.Count == 0:
			r.finished, r.phase = Outcome{Kind: NothingHeld, Key: r.key}, recoveryErase
		case rests:
			r.finished, r.phase = stay, recoveryEnd
		default:
			r.phase = recoveryRemove
		}
	case recoveryRemove:
		if rep.Result == Failed {
			if r.tries++; r.tries < maxRemoves {
				return
			}
			stay.Reason = DiskFailed
			r.finished, r.phase = stay, recoveryEnd
			return
		}
		r.finished, r.phase = Outcome{Kind: NothingHeld, Key: r.key}, recoveryErase
	}
}
