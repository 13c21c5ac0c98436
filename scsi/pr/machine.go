package pr

import "fmt"

// The takeover is two state machines, Dest and Source, that do nothing by
// themselves: Next says what a machine wants done, and the methods Answer,
// Noted, Told, Receive and Lost tell it what became of that. So the same code
// runs on a real LUN (port.go), on the software disk, and inside a search of
// every interleaving (search_test.go). They are values without pointers to
// anything that changes: a copy is a snapshot, and == compares two of them.

// Pair is what the preflight found out about a guest's LUN and the two
// nexuses between which its reservation moves.
type Pair struct {
	Old, New   Nexus // the guest's nexus so far, and the one that it moves to
	Same       bool  // they are one: nothing has to move
	FullStatus bool  // the target answers READ FULL STATUS; Old and New are known
	Move       bool  // the target has REGISTER AND MOVE, and Old can still send it
}

// back is the pair for the way back, which no dead host can help with.
func (p *Pair) back() *Pair {
	return &Pair{Old: p.New, New: p.Old, Same: p.Same, FullStatus: p.FullStatus}
}

// Cmd is a command that a machine wants sent through its own host's nexus:
// PERSISTENT RESERVE IN with service action In, or if Write is set OUT with
// service action Out. REGISTER AND MOVE goes to Pair.New with UNREG one.
type Cmd struct {
	Write           bool
	In              InAction
	Out             OutAction
	Type            Type
	APTPL           bool
	Key, ServiceKey Key
}

func (c Cmd) String() string {
	if !c.Write {
		return c.In.String()
	}
	s := fmt.Sprintf("%v key %x service key %x", c.Out, uint64(c.Key), uint64(c.ServiceKey))
	if c.Out == Preempt {
		s += fmt.Sprintf(" type %d", c.Type)
	}
	if c.APTPL {
		s += " APTPL"
	}
	return s
}

// Result is what a machine may conclude from the answer to a command.
type Result uint8

const (
	Done       Result = iota // GOOD: it happened
	Conflicted               // RESERVATION CONFLICT: it did not happen
	Failed                   // anything else: it may have happened or not
)

func (r Result) String() string { return [...]string{"good", "conflict", "error"}[r] }

// Who holds a reservation, as far as an initiator can see.
type Who uint8

const (
	Nobody Who = iota
	Old        // Pair.Old
	New        // Pair.New
	Other      // some other nexus
	All        // every registered nexus
	Holder     // a nexus with the guest's key; which one cannot be seen
)

func (w Who) String() string {
	return [...]string{"nobody", "S", "D", "another nexus", "all registrants", "a nexus with the key"}[w]
}

// Sight is what a machine makes of what it reads: the LUN's state as it
// matters to one guest with one key.
type Sight struct {
	Generation uint32 // PRgeneration
	Old, New   Key    // registrations of the pair (READ FULL STATUS)
	Third      uint8  // other nexuses that use the guest's key (READ FULL STATUS)
	Count      uint8  // nexuses that use the guest's key (READ KEYS)
	Registered uint8  // nexuses with any key
	Type       Type
	Holder     Who
	Persist    bool // PTPL_A (REPORT CAPABILITIES)
}

// Reply is the answer to a Cmd. Of Sight, those fields count that the
// command reads.
type Reply struct {
	Result Result
	Sight  Sight
}

// merge takes over what a reply to in has read.
func (s *Sight) merge(in InAction, r Sight) {
	switch in {
	case ReadKeys:
		s.Count, s.Registered = r.Count, r.Registered
	case ReadReservation:
		s.Type, s.Holder = r.Type, r.Holder
	case ReadFullStatus:
		persist := s.Persist
		*s = r
		s.Generation, s.Persist = 0, persist
	case ReportCapabilities:
		s.Persist = r.Persist
	}
}

// saturated counts without ever wrapping around.
func saturated(n uint8) uint8 { return min(n, 254) + 1 }

// seeFull is what f says about key k.
func (p *Pair) seeFull(f FullStatus, k Key) Sight {
	s := Sight{Generation: f.Generation}
	for _, r := range f.Registrations {
		s.Registered = saturated(s.Registered)
		who := Other
		switch {
		case r.Nexus.same(p.Old):
			who, s.Old = Old, r.Key
		case r.Nexus.same(p.New):
			who, s.New = New, r.Key
		case r.Key == k:
			s.Third = saturated(s.Third)
		}
		if r.Key == k {
			s.Count = saturated(s.Count)
		}
		if r.Holder {
			s.Type, s.Holder = r.Type, who
			if r.Type.AllRegistrants() {
				s.Holder = All
			}
		}
	}
	return s
}

func (n Nexus) same(m Nexus) bool {
	return n == m || n.TargetPort == m.TargetPort && n.Initiator.Same(m.Initiator)
}

// seeKeys is what READ KEYS says about key k.
func seeKeys(keys Keys, k Key) Sight {
	s := Sight{Generation: keys.Generation}
	for _, key := range keys.Keys {
		s.Registered = saturated(s.Registered)
		if key == k {
			s.Count = saturated(s.Count)
		}
	}
	return s
}

// seeReservation is what READ RESERVATION says about key k.
func seeReservation(r Reservation, k Key) Sight {
	s := Sight{Generation: r.Generation, Type: r.Type}
	switch {
	case r.Type == None:
	case r.Type.AllRegistrants():
		s.Holder = All
	case r.Key == k:
		s.Holder = Holder
	default:
		s.Holder = Other
	}
	return s
}

// StepKind says what a Step asks for.
type StepKind uint8

const (
	Await  StepKind = iota // a message, or Lost
	Do                     // send Cmd, then call Answer
	Note                   // write the intent to this host's journal and fsync it, then call Noted
	Erase                  // the journal's entry may go; then call Noted
	Tell                   // send Msg to the other side, then call Told
	Finish                 // nothing more to do: Outcome has the result
)

// Step is what a machine wants done next.
type Step struct {
	Kind   StepKind
	Handed bool // with Note: the other host may have given the guest's registration up
	Cmd    Cmd
	Msg    Msg
}

// MsgKind is a message's meaning. Those of the migration as a whole (Ready,
// Commit, Abort, Running, Aborted) are sent once for all LUNs: a machine is
// told when that happens.
type MsgKind uint8

const (
	NoMessage MsgKind = iota

	// From the source.
	State  // what S has: Key, Type, Persist, Fenced
	Proved // S's REGISTER K to K: Result
	Gave   // REGISTER AND MOVE, or S's unregistering: Result
	Commit
	Abort

	// From the destination.
	AskProof
	AskMove
	AskUnregister
	Ready
	Running
	Aborted
)

func (k MsgKind) String() string {
	return [...]string{
		"nothing", "STATE", "PROVED", "GAVE", "COMMIT", "ABORT",
		"PROVE", "MOVE", "UNREGISTER", "READY", "RUNNING", "ABORTED",
	}[k]
}

// Msg is what the two sides tell each other about one LUN.
type Msg struct {
	Kind    MsgKind
	Result  Result
	Type    Type
	Persist bool // the APTPL that every command of this takeover carries
	Fenced  bool
	Key     Key
}

// OutcomeKind is how a takeover ended for one LUN.
type OutcomeKind uint8

const (
	Undecided        OutcomeKind = iota
	Moved                        // registration and reservation are where the guest runs
	RegistrationOnly             // so is the registration; the guest holds no reservation
	FencedMeanwhile              // the guest was fenced and is not registered
	NothingHeld                  // the guest was not registered
	Kept                         // S has what it had: one nexus (Reason: what could not be read), or a migration that failed
	LeftBehind                   // the guest is registered, the reservation is still on its old nexus
	Refused                      // nothing was done: Reason
	GivenUp                      // the destination has undone what it did: Reason
	Blocked                      // the guest must not run here: Reason
	HandedOver                   // said by the source: the guest runs on its destination
)

// Reason says why a takeover was refused or given up.
type Reason uint8

const (
	NoReason Reason = iota
	LinkLost
	LeftoverRegistration
	KeyShared
	JournalFailed
	DiskFailed
	ProofFailed
	NoFullStatus
	HeldBySPC2
)

// Outcome is a takeover's result for one LUN.
type Outcome struct {
	Kind   OutcomeKind
	Reason Reason
	Key    Key
	Type   Type // of the guest's reservation
	// Persist is PTPL_A as read by a takeover on one nexus.
	Persist bool
	// Stale says that the guest's other nexus may still be registered with
	// Key: inert, and removed by its host.
	Stale bool
}

// Sentence says to an operator what happened to lun and, where it is due,
// what to do.
func (o Outcome) Sentence(lun string) string {
	s := lun + ": "
	switch o.Kind {
	case Moved:
		s += fmt.Sprintf("the guest's key %v and its %v reservation are on this host", o.Key, o.Type)
	case RegistrationOnly:
		s += fmt.Sprintf("the guest's key %v is registered on this host; it holds no reservation", o.Key)
	case FencedMeanwhile:
		if o.Reason != NoReason {
			s += "in doubt the guest counts as fenced and runs without a registration: " + o.Reason.String()
			break
		}
		s += "another node fenced the guest; it runs without a registration, as it would have on its old host"
	case NothingHeld:
		s += "the guest has no registration; nothing had to move"
	case Kept:
		s += fmt.Sprintf("the guest keeps its key %v where it is", o.Key)
		if o.Reason != NoReason {
			s += "; what reservation it holds could not be read: " + o.Reason.String()
		}
	case LeftBehind:
		s += fmt.Sprintf("the guest's key %v is registered on this host, but its %v reservation stayed on its old nexus; "+
			"let the guest's cluster software reserve again, or clear the old nexus with 'vmm pr' on its host", o.Key, o.Type)
	case Refused:
		s += "the guest's reservation cannot be moved: " + o.Reason.String()
	case GivenUp:
		s += "the destination gave up and took nothing: " + o.Reason.String()
	case Blocked:
		s += "the guest is kept stopped, for it may have been fenced and its key cannot be removed: " + o.Reason.String()
	case HandedOver:
		s += "the guest runs on its new host"
	default:
		s += "undecided"
	}
	switch {
	case o.Stale && o.Kind == HandedOver && o.Type != None:
		s += fmt.Sprintf("; this host's nexus still holds its %v reservation with key %v", o.Type, o.Key)
	case o.Stale && o.Kind == HandedOver:
		s += fmt.Sprintf("; this host's nexus may still show key %v: 'vmm pr recover' removes it", o.Key)
	case o.Stale:
		s += fmt.Sprintf("; its other nexus may still show key %v: that is inert, and its host removes it "+
			"(or 'vmm pr recover' there does; after a snapshot, 'vmm pr unregister')", o.Key)
	}
	return s + "."
}

func (r Reason) String() string {
	switch r {
	case NoReason:
		return "no reason given"
	case LinkLost:
		return "the other host did not answer in time"
	case LeftoverRegistration:
		return "the destination's nexus is registered already, and not by us; see 'vmm pr show', and clear it there first"
	case KeyShared:
		return "another nexus uses the guest's key, and the target has no REGISTER AND MOVE, so nothing can take the reservation without taking that nexus's registration too; give each node a key of its own"
	case JournalFailed:
		return "this host's journal cannot be written; see VMM_STATE_DIR"
	case DiskFailed:
		return "the disk did not answer PERSISTENT RESERVE commands"
	case ProofFailed:
		return "the source could not prove that it is still registered"
	case NoFullStatus:
		return "the target has no READ FULL STATUS, so nobody can vouch for the old nexus"
	case HeldBySPC2:
		return "the guest has reserved the disk with RESERVE of SPC-2, which nothing can hand to another nexus"
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// How often a machine repeats what was answered with an error, before it
// takes the disk for dead.
const (
	maxTries   = 3
	maxRemoves = 8
)

// maxMoved is how often another node's commands may spoil one look.
const maxMoved = 16

// look is a machine's reading of the LUN, one command at a time: with READ
// FULL STATUS a single one, else READ RESERVATION and READ KEYS, between
// which others may act. In that order: who is seen to hold with the guest's
// key is then counted, or has given the key up. In the other order a third
// nexus that takes key and reservation in between would be taken for S. And
// with one PRgeneration in both, or it is done again: a third nexus that had
// the guest's key only for the first would be, too.
type look struct {
	gen   uint32 // PRgeneration with READ RESERVATION
	see   Sight
	in    InAction // the command that is due
	caps  bool     // REPORT CAPABILITIES too
	tries uint8
	moved uint8 // how often the state changed between two reads
}

// start begins a look.
func (l *look) start(p *Pair, caps bool) {
	l.in, l.caps, l.tries, l.moved = ReadReservation, caps, 0, 0
	if p.FullStatus {
		l.in = ReadFullStatus
	}
}

func (l *look) cmd(k Key) Step { return Step{Kind: Do, Cmd: Cmd{In: l.in, Key: k}} }

// answer takes the reply to a command: whether the look is over, and whether
// it has failed.
func (l *look) answer(r Reply) (over, failed bool) {
	if r.Result != Done {
		l.tries++
		return l.tries == maxTries, l.tries == maxTries
	}
	l.see.merge(l.in, r.Sight)
	switch {
	case l.in == ReadReservation:
		l.in, l.gen = ReadKeys, r.Sight.Generation
		return false, false
	case l.in == ReadKeys && l.gen != r.Sight.Generation:
		// Others may be as busy as they like: that is no failure of the disk.
		l.in, l.gen = ReadReservation, 0
		l.moved++
		return l.moved == maxMoved, l.moved == maxMoved
	case l.in != ReportCapabilities && l.caps:
		l.in = ReportCapabilities
		l.gen, l.tries, l.moved = 0, 0, 0
		return false, false
	}
	l.gen, l.tries, l.moved = 0, 0, 0
	return true, false
}

func register(from, to Key, persist bool) Step {
	return Step{Kind: Do, Cmd: Cmd{Write: true, Out: Register, Key: from, ServiceKey: to, APTPL: persist}}
}

func preempt(k Key, t Type) Step {
	return Step{Kind: Do, Cmd: Cmd{Write: true, Out: Preempt, Key: k, ServiceKey: k, Type: t}}
}
