package pr

// Dest is the destination's side of a takeover of one LUN: the hook that runs
// after a guest's state is loaded and before its vCPUs do. It trusts the disk
// over the stream and does nothing irreversible before COMMIT.
//
// Before Next says anything, the caller drains this host's unit attentions
// (Port.Drain), and again when it says Finish: Keep and Outcome.Attention say
// what of them the guest must be told. A journal entry that is still there
// when the guest runs is the caller's to erase, with its note that it runs.
//
// Alone, without a source to ask, it is also what restores a snapshot, and
// what takes a guest back from a host that the operator says is dead.
type Dest struct {
	pair *Pair

	phase     destPhase
	then      destPhase // where the look leads
	look      look
	alone     bool
	linked    bool // the source can be asked
	committed bool

	key      Key
	plan     plan
	persist  bool // PTPL_A as read: every command of ours carries it
	noted    bool // the journal has our intent
	may      bool // our nexus may be registered with key by our doing
	proven   bool // S was registered after we were
	sent     bool // PREEMPT was sent, and its answer was an error
	vouched  bool // S has proven itself since
	gone     bool // S has said that it is not registered
	handed   bool // the journal says that S may have given its registration up
	checked  bool // our nexus was seen registered, by its own REGISTER
	tries    uint8
	asks     uint8
	doomed   bool // by then: give up after removing; not doomed: fenced
	fenced   bool // S said so, or the disk did
	finished Outcome
	reason   Reason
}

type plan uint8

const (
	planNothing    plan = iota // no key, or fenced
	planVerify                 // one nexus: only look
	planMove                   // S holds, and sends REGISTER AND MOVE
	planPreempt                // S holds: D registers and preempts
	planUnregister             // S does not hold, or all registrants do: D registers, S unregisters
)

type destPhase uint8

const (
	destHello  destPhase = iota // STATE is due
	destLook                    // reading, then on to then
	destDecide                  // not a phase but a place for a look to lead to, as the next two
	destWitness
	destAct
	destVacant   // REGISTER 0 to 0: is our nexus unregistered? (it does nothing)
	destNote     // intent to the journal
	destRegister // REGISTER 0 to K
	destConfirm  // REGISTER K to K: did the former happen?
	destAskProof // ask S to prove itself
	destProof    // its answer is due
	destTellReady
	destReady   // COMMIT is due
	destAskMove // ask S to send REGISTER AND MOVE
	destMoved   // its answer is due
	destNoteGo  // that the guest's only registration may be ours, to the journal
	destAskGo   // ask S to unregister
	destGone    // its answer is due
	destPreempt // PREEMPT K with K
	destCheck   // REGISTER K to K: is our nexus still registered?
	destRemove  // REGISTER K to 0, until it is not registered
	destErase   // our intent is settled
	destEnd
)

// NewDest is the destination of a migration; the source's STATE comes first.
func NewDest(p *Pair) Dest { return Dest{pair: p, linked: true} }

// NewAlone takes over, without a source's help, what key k on p.Old has: for
// a guest that is restored from a snapshot, or forced to resume.
func NewAlone(p *Pair, k Key) Dest {
	d := Dest{pair: p, alone: true, committed: true, key: k}
	switch {
	case k == 0:
		d.finish(Outcome{Kind: NothingHeld})
	case !p.FullStatus && !p.Same:
		d.finish(Outcome{Kind: FencedMeanwhile, Reason: NoFullStatus, Key: k, Stale: true})
	default:
		d.lookThen(destDecide, true)
	}
	return d
}

// NewFenced takes over nothing: the guest had key k, and was fenced before it
// was saved.
func NewFenced(p *Pair, k Key) Dest {
	d := Dest{pair: p, alone: true, committed: true, key: k}
	d.finish(Outcome{Kind: FencedMeanwhile, Key: k})
	return d
}

// Outcome is the result, once Next says Finish.
func (d *Dest) Outcome() Outcome { return d.finished }

// Pair is what the machine's commands work with.
func (d *Dest) Pair() *Pair { return d.pair }

func (d *Dest) finish(o Outcome) {
	d.finished, d.phase = o, destEnd
}

func (d *Dest) lookThen(then destPhase, caps bool) {
	d.look.start(d.pair, caps)
	d.then, d.phase = then, destLook
}

// Next is what the machine wants done. Asking again changes nothing.
func (d *Dest) Next() Step {
	tell := func(k MsgKind) Step { return Step{Kind: Tell, Msg: Msg{Kind: k, Key: d.key, Persist: d.persist}} }
	switch d.phase {
	case destLook:
		return d.look.cmd(d.key)
	case destNote, destNoteGo:
		// After COMMIT S may still carry out what it was asked for, however
		// late: then ours is the only registration.
		return Step{Kind: Note, Handed: d.committed && !d.alone}
	case destVacant:
		return register(0, 0, d.persist)
	case destRegister:
		return register(0, d.key, d.persist)
	case destConfirm, destCheck:
		return register(d.key, d.key, d.persist)
	case destAskProof:
		return tell(AskProof)
	case destTellReady:
		return tell(Ready)
	case destAskMove:
		return tell(AskMove)
	case destAskGo:
		return tell(AskUnregister)
	case destPreempt:
		return preempt(d.key, d.look.see.Type)
	case destRemove:
		return register(d.key, 0, d.persist)
	case destErase:
		return Step{Kind: Erase}
	case destEnd:
		return Step{Kind: Finish}
	}
	return Step{Kind: Await}
}

// Noted says whether the journal was written. An entry that could not be
// erased is harmless: settling it again finds nothing to do.
func (d *Dest) Noted(ok bool) {
	switch {
	case d.phase == destErase:
		d.noted = false
		d.removed()
	case d.phase == destNoteGo && ok:
		d.handed, d.phase = true, destAskGo
	case d.phase == destNoteGo:
		d.arrived(true)
	case ok:
		d.noted, d.phase = true, destRegister
	case d.committed && !d.alone:
		d.leave() // REGISTER AND MOVE failed, and there is no other way
	default:
		d.finish(Outcome{Kind: Refused, Reason: JournalFailed, Key: d.key})
	}
}

// Told says that a message was handed to the link.
func (d *Dest) Told() {
	switch d.phase {
	case destAskProof:
		d.phase = destProof
	case destTellReady:
		d.phase = destReady
	case destAskMove:
		d.phase = destMoved
	case destAskGo:
		d.phase = destGone
	}
}

// Lost says that the source cannot be asked any more: the link is down or a
// deadline has passed. Before COMMIT the takeover is given up.
func (d *Dest) Lost() { d.giveUp(LinkLost) }

func (d *Dest) giveUp(why Reason) {
	d.linked = false
	if d.committed {
		switch d.phase {
		case destAskMove, destMoved, destNoteGo, destAskGo, destGone, destAskProof, destProof:
			d.lookThen(destAct, false)
		}
		return
	}
	switch d.phase {
	case destEnd:
		return
	case destRemove, destErase: // fenced, and about to say so
		d.doomed, d.reason = true, why
		return
	}
	d.doomed, d.reason = true, why
	d.remove()
}

// remove takes our registration away, if there may be one. Whether that ends
// in giving up or in going on without a registration is doomed's to say.
func (d *Dest) remove() {
	d.tries = 0
	switch {
	case d.may:
		d.phase = destRemove
	case d.noted:
		d.phase = destErase
	default:
		d.removed()
	}
}

// removed goes on after remove.
func (d *Dest) removed() {
	switch {
	case d.doomed && d.reason == LeftoverRegistration:
		d.finish(Outcome{Kind: Refused, Reason: d.reason, Key: d.key})
	case d.doomed:
		d.finish(Outcome{Kind: GivenUp, Reason: d.reason, Key: d.key, Stale: d.may})
	case d.committed:
		d.finish(Outcome{Kind: FencedMeanwhile, Key: d.key})
	default:
		d.plan, d.fenced, d.phase = planNothing, true, destTellReady
	}
}

// Receive takes a message of the source.
func (d *Dest) Receive(m Msg) {
	switch {
	case m.Kind == Abort:
		d.giveUp(LinkLost)
	case m.Kind == State && d.phase == destHello:
		d.key, d.fenced = m.Key, m.Fenced
		if d.pair.Same {
			// There is nothing to prepare, and S has just read the disk by this
			// very nexus. A unit attention that answered us before COMMIT would
			// be lost for the guest, should it stay where it is.
			if d.key != 0 {
				d.plan = planVerify
			}
			d.phase = destTellReady
			return
		}
		d.lookThen(destDecide, true)
	case m.Kind == Proved && d.phase == destProof:
		d.proof(m.Result)
	case m.Kind == Commit && d.phase == destReady:
		d.committed = true
		if d.plan == planNothing {
			kind := NothingHeld
			if d.fenced {
				kind = FencedMeanwhile
			}
			d.finish(Outcome{Kind: kind, Key: d.key})
			return
		}
		d.start()
	case m.Kind == Gave && d.phase == destMoved:
		d.lookThen(destAct, false) // whatever it says: the disk knows better
	case m.Kind == Gave && d.phase == destGone:
		d.gone = m.Result != Failed // a conflict: it is not registered with K
		d.lookThen(destAct, false)
	}
}

// proof takes S's answer to AskProof.
func (d *Dest) proof(r Result) {
	switch {
	case d.committed: // after a PREEMPT that was answered with an error
		d.vouched, d.gone = r == Done, r == Conflicted
		d.lookThen(destAct, false)
	case r == Done:
		d.proven, d.phase = true, destTellReady
	case r == Conflicted:
		d.remove() // fenced
	default:
		d.doomed, d.reason = true, ProofFailed
		d.remove()
	}
}

// start begins what follows COMMIT.
func (d *Dest) start() {
	if d.pair.FullStatus || d.pair.Same {
		d.lookThen(destAct, d.pair.Same)
		return
	}
	d.look.tries = 0
	d.phase = destCheck
}

// Answer takes the reply to the command that Next gave.
func (d *Dest) Answer(r Reply) {
	switch d.phase {
	case destLook:
		over, failed := d.look.answer(r)
		if failed {
			d.blind()
		} else if over {
			d.looked()
		}
	case destVacant:
		switch d.tries++; {
		case r.Result == Done:
			d.nothing()
		case r.Result == Conflicted:
			d.doomed, d.reason = true, LeftoverRegistration
			d.remove()
		case d.tries >= maxTries:
			d.doomed, d.reason = true, DiskFailed
			d.remove()
		}
	case destRegister:
		switch {
		case r.Result == Done:
			d.registered()
		case r.Result == Failed:
			d.may, d.phase = true, destConfirm
		case d.may: // a late answer to an earlier try
			d.phase = destConfirm
		case d.committed: // REGISTER AND MOVE came through after all, or a leftover
			d.lookThen(destAct, false)
		default:
			d.doomed, d.reason = true, LeftoverRegistration
			d.remove()
		}
	case destConfirm:
		d.tries++
		switch {
		case r.Result == Done:
			d.registered()
		case d.tries >= maxTries && d.committed && !d.alone:
			d.remove() // in doubt, fenced
		case d.tries >= maxTries:
			d.doomed, d.reason = true, DiskFailed
			d.remove()
		case r.Result == Conflicted:
			d.phase = destRegister
		}
	case destPreempt:
		d.sent = r.Result == Failed
		d.gone = d.gone || r.Result == Done // what has K from now on is not S
		d.vouched, d.checked = false, false
		d.tries++
		d.start()
	case destCheck:
		switch {
		case r.Result == Done:
			d.checked = true
			d.lookThen(destAct, false)
		case r.Result == Conflicted: // not registered any more
			d.may = false
			d.remove()
		default:
			if d.look.tries++; d.look.tries >= maxTries {
				d.blind()
			}
		}
	case destRemove:
		switch {
		case r.Result != Failed:
			d.may = false
			if d.noted {
				d.phase = destErase
			} else {
				d.removed()
			}
		case d.tries < maxRemoves:
			d.tries++
		case d.committed:
			d.finish(Outcome{Kind: Blocked, Reason: DiskFailed, Key: d.key, Type: d.look.see.Type, Stale: true})
		default: // the journal keeps our intent
			d.doomed = true
			d.finish(Outcome{Kind: GivenUp, Reason: DiskFailed, Key: d.key, Stale: true})
		}
	}
}

// registered goes on after REGISTER of our nexus.
func (d *Dest) registered() {
	d.may, d.tries = true, 0
	if d.committed { // alone, or REGISTER AND MOVE failed: who vouches for S?
		d.lookThen(destWitness, false)
		return
	}
	d.phase = destAskProof
}

// looked goes on where the look was to lead.
func (d *Dest) looked() {
	switch d.then {
	case destDecide:
		d.decide()
	case destWitness:
		// S was registered after we were, so a fence from now on hits both.
		// Or S's REGISTER AND MOVE came through, which proves it as well.
		if s := d.look.see; s.Old == d.key || s.New == d.key && s.Holder == New {
			d.proven = true
			d.act()
			return
		}
		d.remove() // fenced
	case destAct:
		d.act()
	}
}

// blind goes on after a look that failed.
func (d *Dest) blind() {
	switch {
	case !d.committed, d.alone && !d.proven:
		d.doomed, d.reason = true, DiskFailed
		d.remove()
	case d.pair.Same:
		// What the guest had, it has; it will meet the disk's errors itself.
		d.finish(Outcome{Kind: Kept, Key: d.key, Reason: DiskFailed})
	case d.proven:
		// A fence since the proof has hit our registration too, so running
		// with it is safe; what became of S's cannot be seen.
		d.leave()
	case d.may:
		d.remove()
	default:
		d.finish(Outcome{Kind: FencedMeanwhile, Reason: DiskFailed, Key: d.key, Stale: true})
	}
}

// leave ends the takeover with the reservation where it was.
func (d *Dest) leave() {
	o := Outcome{Kind: LeftBehind, Key: d.key, Type: d.look.see.Type, Stale: true}
	if !d.may { // REGISTER AND MOVE failed, and we cannot register
		o.Kind, o.Reason = FencedMeanwhile, JournalFailed
	}
	d.finish(o)
}

// held says that S holds a reservation with one holder, as far as the last
// look can tell.
func (d *Dest) held() bool {
	s := &d.look.see
	return s.Type.Single() && (s.Holder == Old || s.Holder == Holder)
}

// shared says that a nexus other than the pair uses the key; ours says
// how many of the pair are registered with it.
func (d *Dest) shared(ours uint8) bool {
	if d.pair.FullStatus {
		return d.look.see.Third > 0
	}
	return d.look.see.Count > ours
}

// decide makes the plan from the first look.
func (d *Dest) decide() {
	s := &d.look.see
	d.persist = s.Persist
	switch {
	case d.pair.Same: // alone: it goes on where it was saved
		d.plan = planVerify
		d.act()
		return
	case d.pair.FullStatus && s.New != 0:
		d.doomed, d.reason = true, LeftoverRegistration
		d.remove()
		return
	case d.key == 0, d.pair.FullStatus && s.Old != d.key, s.Count == 0:
		// No key, or fenced. Then our nexus must not be registered with
		// anything: the guest would run with it.
		d.fenced = d.fenced || d.key != 0
		if d.pair.FullStatus {
			d.nothing()
		} else {
			d.phase = destVacant
		}
		return
	case !d.held():
		d.plan = planUnregister
	case d.pair.Move && d.pair.FullStatus:
		d.plan, d.phase = planMove, destTellReady
		return
	case d.shared(1) && !d.alone:
		d.finish(Outcome{Kind: Refused, Reason: KeyShared, Key: d.key, Type: s.Type})
		return
	default:
		d.plan = planPreempt
	}
	d.phase = destNote
}

// nothing goes on with nothing to move.
func (d *Dest) nothing() {
	if d.alone {
		d.finish(Outcome{Kind: FencedMeanwhile, Key: d.key})
		return
	}
	d.plan, d.phase = planNothing, destTellReady
}

// act is the last part: it looks at what is on the disk, takes the next step
// towards (D, K, T) alone, and is called again after it.
func (d *Dest) act() {
	s := &d.look.see
	if d.pair.Same {
		d.verify()
		return
	}
	var own, old bool // registered with K: our nexus, S
	if d.pair.FullStatus {
		own, old = s.New == d.key, s.Old == d.key
	} else {
		own, old = d.checked && s.Count > 0, s.Count > 1 && !d.gone
	}
	switch {
	case !own && old && d.plan == planMove && !d.proven:
		if d.held() && d.linked && d.asks < maxTries {
			d.asks++
			d.phase = destAskMove
			return
		}
		d.phase = destNote // then REGISTER, and let READ FULL STATUS prove S
	case !own:
		d.remove() // fenced, or in doubt
	case !old:
		d.arrived(false)
	case d.held() && (d.pair.FullStatus || d.plan == planPreempt):
		// Without READ FULL STATUS only the plan knows that it was S which
		// held before COMMIT: else a third nexus with K would be robbed.
		switch {
		case d.shared(2) || d.tries >= maxTries:
			d.leave()
		case d.sent && !d.pair.FullStatus && !d.vouched:
			// It may have worked, and the other K be a third nexus's by now.
			if !d.linked || d.asks >= maxTries {
				d.leave()
				return
			}
			d.asks++
			d.phase = destAskProof
		default:
			d.phase = destPreempt
		}
	case d.linked && d.asks < maxTries:
		d.asks++
		d.phase = destAskGo
		if !d.handed {
			d.phase = destNoteGo
		}
	default:
		d.arrived(true)
	}
}

// verify ends the takeover of a guest that stays on its nexus, with what the
// disk says that it has there.
func (d *Dest) verify() {
	s := &d.look.see
	if d.pair.FullStatus && s.Old != d.key || s.Count == 0 {
		d.finish(Outcome{Kind: FencedMeanwhile, Key: d.key})
		return
	}
	o := Outcome{Kind: Kept, Key: d.key, Persist: s.Persist}
	switch {
	case s.Holder == Old, s.Holder == All, s.Holder == Holder && s.Count == 1:
		o.Type = s.Type
	case s.Holder == Holder:
		o.Reason = NoFullStatus // which of those with this key holds?
	}
	d.finish(o)
}

// arrived ends the takeover with our nexus registered and, unless stale, the
// old one not.
func (d *Dest) arrived(stale bool) {
	s := &d.look.see
	o := Outcome{Kind: RegistrationOnly, Key: d.key, Type: s.Type, Stale: stale}
	if s.Holder == New || s.Holder == All || s.Holder == Holder {
		o.Kind = Moved
	}
	d.finish(o)
}
