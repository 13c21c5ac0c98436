package reservations

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"vmm/scsi"
	"vmm/scsi/pr"
	"vmm/tests/lab/lio"
)

// Where the takeover's nexuses are among a unit's: source, destination, the
// third node, and one that only looks.
const (
	atS = iota
	atD
	atO
)

// The keys: the guest's, the third node's, and one that nobody remembers.
const (
	keyK pr.Key = 0xa
	keyO pr.Key = 0xc
	keyZ pr.Key = 0xf
)

// disk is what is registered and reserved. holder is "S", "D", "O" or, where
// typ is none, nothing.
type disk struct {
	s, d, o pr.Key
	typ     pr.Type
	holder  string
	aptpl   bool
}

func (d disk) String() string {
	var b strings.Builder
	for i, k := range []pr.Key{d.s, d.d, d.o} {
		if k == 0 {
			continue
		}
		name := "SDO"[i : i+1]
		fmt.Fprintf(&b, "%s:%x", name, uint64(k))
		if d.holder == name || d.typ.AllRegistrants() {
			b.WriteByte('*')
		}
		b.WriteByte(' ')
	}
	fmt.Fprintf(&b, "type %d", d.typ)
	if d.aptpl {
		b.WriteString(" aptpl")
	}
	return b.String()
}

// set makes the unit what d says. No nexus has a unit attention then.
func (u *unit) set(t testing.TB, d disk) {
	t.Helper()
	u.reset(t)
	for i, k := range []pr.Key{d.s, d.d, d.o} {
		if k == 0 {
			continue
		}
		u.nexus[i].must(t, pr.Out{Action: pr.Register, ServiceKey: k, APTPL: d.aptpl})
	}
	for i, k := range []pr.Key{d.s, d.d, d.o} {
		if d.typ != pr.None && d.holder == u.nexus[i].name {
			u.nexus[i].must(t, pr.Out{Action: pr.Reserve, Key: k, Type: d.typ})
		}
	}
	if got := u.show(t); got != d.String() {
		t.Fatalf("the unit is %s; want %s", got, d)
	}
}

// tap sees every command before it is sent.
type tap struct {
	pr.Sender
	before func(cdb []byte)
}

func (s *tap) Send(ctx context.Context, cdb, list, data []byte) (int, pr.Answer, error) {
	s.before(cdb)
	return s.Sender.Send(ctx, cdb, list, data)
}

// dies is what a hook panics with to end one side as kill -9 would.
type dies struct{}

// migration is one takeover between S and D.
type migration struct {
	t    testing.TB
	unit *unit
	pair pr.Pair

	// before, if set, runs before each command of either side, which have
	// numbers from 1 on. say, if set, sees every message before it is
	// delivered; false cuts the link there.
	before func(n int, side string)
	say    func(pr.Msg) bool

	journal   *pr.Journal
	src       pr.Source
	dst       pr.Dest
	commands  int
	cut       bool
	cancel    bool   // the source is to give up
	dead      string // the side that died
	ran       bool   // the destination's machine has ended: the guest runs there
	committed time.Time
	pause     time.Duration // from COMMIT to the guest's running
	moved     bool          // REGISTER AND MOVE was sent
}

func (u *unit) pair() pr.Pair {
	return pr.Pair{Old: u.nexus[atS].id, New: u.nexus[atD].id, FullStatus: true}
}

func newMigration(t testing.TB, u *unit, move bool) *migration {
	t.Helper()
	j, err := pr.OpenJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m := &migration{t: t, unit: u, pair: u.pair(), journal: j}
	m.pair.Move = move
	return m
}

// port is a side's way to the unit, tapped.
func (m *migration) port(side int) *pr.Port {
	x := m.unit.nexus[side]
	return &pr.Port{Timeout: patience, Sender: &tap{x.Sender, func(cdb []byte) {
		if cdb[0] == scsi.OpPersistentReserveOut && pr.OutAction(cdb[1]) == pr.RegisterAndMove {
			m.moved = true
		}
		m.commands++
		if m.before != nil {
			m.before(m.commands, x.name)
		}
	}}}
}

// ledger is a side's journal: with the pair as its recovery wants it.
func (m *migration) ledger(side int) pr.Ledger {
	pair := m.pair
	if side == atD {
		pair.Old, pair.New = pair.New, pair.Old
	}
	pair.Move = false
	return m.journal.For(pr.Entry{LUN: m.unit.nexus[side].name, Key: keyK, Pair: pair})
}

// side runs one machine until it waits, ends, or dies.
func (m *migration) side(p *pr.Port, machine pr.Machine, l pr.Ledger, tell func(pr.Msg) error, name string) (at pr.StepKind) {
	defer func() {
		if r := recover(); r == (dies{}) {
			m.dead, m.cut, at = name, true, pr.Finish
		} else if r != nil {
			panic(r)
		}
	}()
	if m.dead == name {
		return pr.Finish
	}
	return p.Run(context.Background(), machine, l, tell)
}

// run takes the guest, whose key its tracker has as key, from S to D.
func (m *migration) run(key pr.Key) (src, dst pr.Outcome) {
	m.t.Helper()
	m.src, m.dst = pr.NewSource(&m.pair, key), pr.NewDest(&m.pair)
	s, d := m.port(atS), m.port(atD)
	sLedger, dLedger := m.ledger(atS), m.ledger(atD)
	var toS, toD []pr.Msg
	tell := func(q *[]pr.Msg) func(pr.Msg) error {
		return func(msg pr.Msg) error {
			if m.say != nil && !m.cut {
				m.cut = !m.say(msg)
			}
			if m.cut {
				return errors.New("the link is cut")
			}
			*q = append(*q, msg)
			return nil
		}
	}
	lost := false
	for range 200 {
		if m.cancel {
			m.cancel = false
			m.src.Cancel()
		}
		sAt := m.side(s, &m.src, sLedger, tell(&toD), "S")
		dAt := m.side(d, &m.dst, dLedger, tell(&toS), "D")
		switch {
		case dAt == pr.Finish && m.dead != "D" && !m.ran && m.dst.Outcome().Kind != pr.Refused && m.dst.Outcome().Kind != pr.GivenUp:
			m.ran, m.pause = true, time.Since(m.committed)
			if !m.cut {
				m.src.Receive(pr.Msg{Kind: pr.Running})
			}
		case dAt == pr.Finish && m.dead == "" && !m.ran && !m.cut && sAt != pr.Finish:
			m.src.Receive(pr.Msg{Kind: pr.Aborted})
		case sAt == pr.Finish && dAt == pr.Finish, m.cut && dAt == pr.Finish && m.src.HandedOver() && lost:
			return m.src.Outcome(), m.dst.Outcome()
		case m.cut && !lost:
			lost = true
			m.src.Lost()
			m.dst.Lost()
		case len(toD) > 0:
			if toD[0].Kind == pr.Commit {
				m.committed = time.Now()
			}
			m.dst.Receive(toD[0])
			toD = toD[1:]
		case len(toS) > 0:
			m.src.Receive(toS[0])
			toS = toS[1:]
		case m.src.Readied() && !m.src.HandedOver():
			m.src.Commit()
		}
	}
	m.t.Fatalf("the takeover does not end: source %+v, destination %+v", m.src.Next(), m.dst.Next())
	return
}

// recover settles what the journal has for the dead, as each host does when
// it is back.
func (m *migration) recover() (left []pr.Outcome) {
	m.t.Helper()
	entries, err := m.journal.Entries()
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range entries {
		side := atS
		if e.LUN == "D" {
			side = atD
		}
		r := pr.NewRecovery(&e.Pair, e.Key, e.Handed)
		m.unit.nexus[side].Run(context.Background(), &r, m.journal.For(e), nil)
		if r.Outcome().Kind != pr.NothingHeld {
			left = append(left, r.Outcome())
		}
	}
	return left
}

// quiet checks that the third node was told nothing.
func (u *unit) quiet(t testing.TB) {
	t.Helper()
	if seen := u.nexus[atO].attentions(t); len(seen) > 0 {
		t.Errorf("the third node got unit attentions %v", seen)
	}
}

// aptpls is APTPL as the tests have it: on, and with -long off as well.
func aptpls() []bool {
	if *long {
		return []bool{true, false}
	}
	return []bool{true}
}

// holding is the guest with each type, and registered without holding.
func holding(f func(typ pr.Type, aptpl, move bool)) {
	for _, typ := range append([]pr.Type{pr.None}, pr.Types...) {
		for _, aptpl := range aptpls() {
			for _, move := range []bool{false, true} {
				if move && !typ.Single() {
					continue // REGISTER AND MOVE is for one holder
				}
				f(typ, aptpl, move)
			}
		}
	}
}

func holder(typ pr.Type, who string) string {
	if typ == pr.None {
		return ""
	}
	return who
}

// TestTakeover is each row of the table of docs/reservations.md, with and
// without REGISTER AND MOVE and APTPL, and what is on the disk afterwards.
func TestTakeover(t *testing.T) {
	u := need(t, "SDOW")
	type row struct {
		name          string
		before, after disk
		move          bool
		want          pr.OutcomeKind
		why           pr.Reason
	}
	var rows []row
	for _, aptpl := range aptpls() {
		for _, move := range []bool{false, true} {
			add := func(name string, before, after disk, want pr.OutcomeKind, why pr.Reason) {
				before.aptpl, after.aptpl = aptpl, aptpl
				rows = append(rows, row{name, before, after, move, want, why})
			}
			for _, typ := range pr.Types {
				add("the guest holds", disk{s: keyK, o: keyO, typ: typ, holder: "S"}, disk{d: keyK, o: keyO, typ: typ, holder: "D"}, pr.Moved, 0)
				add("another holds", disk{s: keyK, o: keyO, typ: typ, holder: "O"}, disk{d: keyK, o: keyO, typ: typ, holder: "O"},
					map[bool]pr.OutcomeKind{false: pr.RegistrationOnly, true: pr.Moved}[typ.AllRegistrants()], 0)
				add("no key", disk{o: keyO, typ: typ, holder: "O"}, disk{o: keyO, typ: typ, holder: "O"}, pr.NothingHeld, 0)
				add("fenced before", disk{o: keyO, typ: typ, holder: "O"}, disk{o: keyO, typ: typ, holder: "O"}, pr.FencedMeanwhile, 0)
				leftover := disk{s: keyK, d: keyZ, o: keyO, typ: typ, holder: "S"}
				add("D is registered already", leftover, leftover, pr.Refused, pr.LeftoverRegistration)
				leftover.d = keyK
				add("D is registered already, with K", leftover, leftover, pr.Refused, pr.LeftoverRegistration)
				shared := disk{s: keyK, o: keyK, typ: typ, holder: "S"}
				if move || !typ.Single() {
					add("O has K too", shared, disk{d: keyK, o: keyK, typ: typ, holder: "D"}, pr.Moved, 0)
				} else {
					add("O has K too", shared, shared, pr.Refused, pr.KeyShared)
				}
			}
			add("registered", disk{s: keyK, o: keyO}, disk{d: keyK, o: keyO}, pr.RegistrationOnly, 0)
			add("registered alone", disk{s: keyK}, disk{d: keyK}, pr.RegistrationOnly, 0)
			add("registered, O has K too", disk{s: keyK, o: keyK}, disk{d: keyK, o: keyK}, pr.RegistrationOnly, 0)
		}
	}
	var pauses []time.Duration
	for _, r := range rows {
		u.set(t, r.before)
		m := newMigration(t, u, r.move)
		key := r.before.s
		if r.want == pr.FencedMeanwhile {
			key = keyK
		}
		// Without a registration the tracker's key is all that tells a fenced
		// guest from one that never had a key.
		if key == 0 {
			m.pair.FullStatus = true
		}
		src, dst := m.run(key)
		if dst.Kind != r.want || dst.Reason != r.why {
			t.Errorf("%s: %s: %s %s", r.name, r.before, dst.Sentence("D"), src.Sentence("S"))
		}
		if want := map[bool]pr.OutcomeKind{true: pr.HandedOver, false: pr.Kept}[r.want != pr.Refused]; src.Kind != want {
			t.Errorf("%s: %s: %s", r.name, r.before, src.Sentence("S"))
		}
		if got := u.show(t); got != r.after.String() {
			t.Errorf("%s: %s became %s; want %s", r.name, r.before, got, r.after)
		}
		if want := r.move && r.before.typ.Single() && r.before.holder == "S" && r.want == pr.Moved; m.moved != want {
			t.Errorf("%s: %s: REGISTER AND MOVE was used: %v; want %v", r.name, r.before, m.moved, want)
		}
		u.quiet(t)
		pause := "-"
		if m.ran {
			pause = m.pause.Round(100 * time.Microsecond).String()
			pauses = append(pauses, m.pause)
		}
		t.Logf("%-32s %-26s move %-5v → %-26s %s", r.name, r.before, r.move, u.show(t), pause)
	}
	slices.Sort(pauses)
	t.Logf("%d takeovers; from COMMIT to the guest's running: median %v, longest %v", len(rows), pauses[len(pauses)/2].Round(time.Microsecond), pauses[len(pauses)-1].Round(time.Microsecond))
}

// TestOneNexus: within one host nothing is sent that could change anything.
func TestOneNexus(t *testing.T) {
	u := need(t, "SDOW")
	for _, typ := range append([]pr.Type{pr.None}, pr.Types...) {
		before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: true}
		u.set(t, before)
		m := newMigration(t, u, true)
		m.pair.New, m.pair.Same = m.pair.Old, true
		generation := u.status(t).Generation
		src, dst := m.run(keyK)
		if got := u.show(t); dst.Kind != pr.Kept || src.Kind != pr.HandedOver || got != before.String() || u.status(t).Generation != generation {
			t.Errorf("%s became %s; %s %s", before, got, dst.Sentence("D"), src.Sentence("S"))
		}
		u.quiet(t)
	}
}

// TestInterference: at every command of the takeover the third node fences
// the guest, or takes away or gives up the reservation. The guest ends with
// what it would have had, had it stayed.
func TestInterference(t *testing.T) {
	u := need(t, "SDOW")
	runs := 0
	for _, act := range []struct {
		name string
		out  pr.Out
		// what S's registration, and the reservation, become by it
		after func(disk) disk
	}{
		{"PREEMPT", pr.Out{Action: pr.Preempt, Key: keyO, ServiceKey: keyK}, func(d disk) disk {
			d.s, d.holder = 0, holder(d.typ, "O")
			return d
		}},
		{"CLEAR", pr.Out{Action: pr.Clear, Key: keyO}, func(d disk) disk { return disk{} }},
		{"RESERVE", pr.Out{Action: pr.Reserve, Key: keyO}, func(d disk) disk {
			if d.typ == pr.None {
				d.typ, d.holder = pr.WriteExclusiveRegistrantsOnly, "O"
			}
			return d
		}},
		{"unregistering", pr.Out{Action: pr.Register, Key: keyO}, func(d disk) disk { d.o = 0; return d }},
	} {
		holding(func(typ pr.Type, aptpl, move bool) {
			if !*long && act.name != "PREEMPT" && typ != pr.None && typ != pr.WriteExclusiveRegistrantsOnly {
				return
			}
			for at := 1; ; at++ {
				before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: aptpl}
				u.set(t, before)
				m := newMigration(t, u, move)
				ran := false // the guest ran on D already
				m.before = func(n int, side string) {
					if n != at {
						return
					}
					ran = m.ran
					o := act.out
					o.Type, o.APTPL = typ, aptpl
					if typ == pr.None {
						o.Type = pr.WriteExclusiveRegistrantsOnly
					}
					u.nexus[atO].do(t, o)
				}
				src, dst := m.run(keyK)
				if m.commands < at {
					break
				}
				runs++
				want := act.after(before)
				want.d, want.s = want.s, 0
				if want.holder == "S" {
					want.holder = "D"
				}
				got := u.show(t)
				ok := got == want.String()
				if act.name == "CLEAR" { // D's REGISTER may set APTPL again
					ok = strings.TrimSuffix(got, " aptpl") == want.String()
				}
				kind := dst.Kind
				fenced := want.d == 0
				if fenced && kind != pr.FencedMeanwhile && !ran || !fenced && kind != pr.Moved && kind != pr.RegistrationOnly || src.Kind != pr.HandedOver || !ok {
					t.Errorf("%s before command %d: %s, move %v, became %s; want %s; %s %s", act.name, at, before, move, got, want, dst.Sentence("D"), src.Sentence("S"))
				}
				u.quiet(t)
			}
		})
	}
	t.Logf("%d takeovers with a third node in between", runs)
}

// TestRollback: the source gives up, and the link breaks, at every step before
// COMMIT. Nothing has changed then, for anybody.
func TestRollback(t *testing.T) {
	u := need(t, "SDOW")
	runs := 0
	for _, how := range []string{"the source gives up", "the link breaks"} {
		holding(func(typ pr.Type, aptpl, move bool) {
			before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: aptpl}
			for at := 1; ; at++ {
				u.set(t, before)
				m := newMigration(t, u, move)
				n, committed, reached := 0, false, false
				m.say = func(msg pr.Msg) bool {
					n++
					committed = committed || msg.Kind == pr.Commit
					if n != at || committed {
						return true
					}
					reached = true
					if how == "the link breaks" {
						return false
					}
					m.cancel = true
					return true
				}
				src, dst := m.run(keyK)
				if !reached {
					break
				}
				runs++
				if got := u.show(t); src.Kind != pr.Kept || dst.Kind != pr.GivenUp || got != before.String() {
					t.Errorf("%s at message %d: %s, move %v, became %s; %s %s", how, at, before, move, got, dst.Sentence("D"), src.Sentence("S"))
				}
				if left := m.recover(); len(left) > 0 {
					t.Errorf("%s at message %d: left for the journal: %+v", how, at, left)
				}
				u.quiet(t)
			}
		})
	}
	t.Logf("%d takeovers that came back", runs)
}

// TestSourceLost: after COMMIT the link breaks at each message, or S's host
// crashes before each of its commands. D goes on with what it can, and S's
// host cleans up when it is back.
func TestSourceLost(t *testing.T) {
	u := need(t, "SDOW")
	runs := 0
	for _, how := range []string{"the link breaks", "S crashes"} {
		holding(func(typ pr.Type, aptpl, move bool) {
			before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: aptpl}
			after := disk{d: keyK, o: keyO, typ: typ, holder: holder(typ, "D"), aptpl: aptpl}
			for at := 1; ; at++ {
				u.set(t, before)
				m := newMigration(t, u, move)
				n, committed := 0, false
				if how == "S crashes" {
					m.before = func(_ int, side string) {
						if side == "S" && (m.src.HandedOver() || m.ran) {
							if n++; n == at {
								panic(dies{})
							}
						}
					}
				} else {
					m.say = func(msg pr.Msg) bool {
						if committed {
							n++
						}
						committed = committed || msg.Kind == pr.Commit
						return n < at
					}
				}
				_, dst := m.run(keyK)
				if n < at {
					break
				}
				runs++
				want := after
				if dst.Stale {
					want.s = keyK
				}
				kind := pr.Moved
				if typ == pr.None {
					kind = pr.RegistrationOnly
				}
				if got := u.show(t); dst.Kind != kind || got != want.String() {
					t.Errorf("%s at %d after COMMIT: %s, move %v, became %s; want %s; %s", how, at, before, move, got, want, dst.Sentence("D"))
				}
				if err := m.ledger(atD).Erase(); err != nil { // the guest runs
					t.Fatal(err)
				}
				left := m.recover()
				if got := u.show(t); len(left) > 0 || got != after.String() {
					t.Errorf("S's host is back: %s; want %s; left %+v", got, after, left)
				}
				u.quiet(t)
			}
		})
	}
	t.Logf("%d takeovers whose source was lost after COMMIT", runs)
}

// TestForce: D dies before each of its and S's commands after COMMIT, the
// operator forces S to resume, then D's host comes back and cleans up.
func TestForce(t *testing.T) {
	u := need(t, "SDOW")
	runs, left := 0, 0
	holding(func(typ pr.Type, aptpl, move bool) {
		before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: aptpl}
		for at := 1; ; at++ {
			u.set(t, before)
			m := newMigration(t, u, move)
			n := 0
			m.before = func(_ int, side string) {
				if m.src.HandedOver() && !m.ran && side == "D" && m.dead == "" {
					if n++; n == at {
						panic(dies{})
					}
				}
			}
			m.run(keyK)
			if m.dead == "" {
				break
			}
			runs++
			m.src.Force()
			if at := m.side(m.port(atS), &m.src, m.ledger(atS), nil, "S"); at != pr.Finish {
				t.Fatalf("the forced resume ends at step %d", at)
			}
			o := m.src.Outcome()
			want := before
			if o.Stale {
				want.d = keyK
			}
			if got := u.show(t); got != want.String() || o.Kind != pr.Kept && o.Kind != pr.Moved && o.Kind != pr.RegistrationOnly {
				t.Errorf("D dies at its command %d after COMMIT: %s, move %v, became %s; want %s; %s", at, before, move, got, want, o.Sentence("S"))
			}
			if err := m.ledger(atS).Erase(); err != nil { // the guest runs
				t.Fatal(err)
			}
			settled := m.recover()
			want = before
			if len(settled) > 0 { // S may have given its registration up: reported, not removed
				left++
				want.d = keyK
			}
			if got := u.show(t); got != want.String() || len(settled) > 0 && settled[0].Kind != pr.LeftBehind {
				t.Errorf("D's host is back: %s; want %s; %+v", got, want, settled)
			}
			u.quiet(t)
		}
	})
	t.Logf("%d forced resumes; D's host left K to the operator in %d", runs, left)
}

// TestSnapshot: a guest is restored on D while S's registration is all that is
// left of it, undisturbed and fenced before each command.
func TestSnapshot(t *testing.T) {
	u := need(t, "SDOW")
	runs := 0
	for _, typ := range append([]pr.Type{pr.None}, pr.Types...) {
		for _, aptpl := range aptpls() {
			for at := 0; ; at++ {
				before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: aptpl}
				u.set(t, before)
				m := newMigration(t, u, false)
				m.before = func(n int, _ string) {
					if n == at {
						o := pr.Out{Action: pr.Preempt, Key: keyO, ServiceKey: keyK, Type: typ}
						if typ == pr.None {
							o.Type = pr.WriteExclusive
						}
						u.nexus[atO].must(t, o)
					}
				}
				d := pr.NewAlone(&m.pair, keyK)
				m.side(m.port(atD), &d, m.ledger(atD), nil, "D")
				if m.commands < at {
					break
				}
				runs++
				o := d.Outcome()
				want := disk{d: keyK, o: keyO, typ: typ, holder: holder(typ, "D"), aptpl: aptpl}
				kind := pr.Moved
				if !typ.Single() { // nobody is there who would unregister S
					want.s = keyK
				}
				if typ == pr.None {
					kind = pr.RegistrationOnly
				}
				if at > 0 {
					want.s, want.d, want.holder, kind = 0, 0, holder(typ, "O"), pr.FencedMeanwhile
				}
				if got := u.show(t); got != want.String() || o.Kind != kind || o.Stale != (want.s != 0) {
					t.Errorf("fenced before command %d: %s became %s; want %s; %s", at, before, got, want, o.Sentence("D"))
				}
				u.quiet(t)
			}
		}
	}
	t.Logf("%d restored snapshots", runs)
}

// TestPreflight: what is found out about LIO while the guest runs.
func TestPreflight(t *testing.T) {
	u := need(t, "SDOW")
	ctx := context.Background()
	u.set(t, disk{s: keyK, o: keyO, typ: pr.WriteExclusiveRegistrantsOnly, holder: "S", aptpl: true})
	f, err := u.nexus[atD].Probe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("REGISTER AND MOVE is reported: %v", f.Move) // since Linux 6.2
	if !f.FullStatus || !f.Persist || len(f.Status.Registrations) != 2 || f.Held.Type != pr.WriteExclusiveRegistrantsOnly {
		t.Errorf("Probe = %+v", f)
	}
	pair := u.pair()
	if why := f.Refuse(&pair, pr.Tracked{Key: keyK}); why != pr.NoReason {
		t.Errorf("refused: %v", why)
	}
	// A nexus that is registered finds itself without being touched.
	if _, err := u.nexus[atS].Identify(ctx, func(pr.Key) pr.Ledger { return noLedger{} }); !errors.Is(err, pr.ErrLeftover) {
		t.Errorf("Identify of a registered nexus = %v; want ErrLeftover", err)
	}
	// Under RESERVE of SPC-2 not even its holder is answered.
	u.reset(t)
	if a, err := u.nexus[atS].send([]byte{scsi.OpReserve6, 5: 0}, nil, nil); err != nil || !a.OK() {
		t.Fatal(a, err)
	}
	if _, err := u.nexus[atS].Probe(ctx); err == nil || !strings.Contains(err.Error(), scsi.ReservationConflict.String()) {
		t.Errorf("Probe under RESERVE = %v; want a conflict", err)
	}
	if why := (&pr.Preflight{}).Refuse(&pair, pr.Tracked{SPC2: true}); why != pr.HeldBySPC2 {
		t.Errorf("Refuse = %v; want %v", why, pr.HeldBySPC2)
	}
	u.reset(t)
}

// TestErrorThatHappened: from each command of the takeover on, the target
// cannot store its registrations. It carries REGISTER out all the same, and
// answers NOT READY.
func TestErrorThatHappened(t *testing.T) {
	u := need(t, "SDOW")
	lost := pr.Answer{Status: scsi.CheckCondition, Sense: scsi.Sense{Key: scsi.NotReady, ASC: 0x08}}
	moved, kept := 0, 0
	holding(func(typ pr.Type, aptpl, move bool) {
		before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: aptpl}
		after := disk{d: keyK, o: keyO, typ: typ, holder: holder(typ, "D"), aptpl: aptpl}
		for at := 1; ; at++ {
			u.set(t, before)
			m := newMigration(t, u, move)
			var restore func() error
			m.before = func(n int, _ string) {
				if n != at {
					return
				}
				var err error
				if restore, err = lio.BreakDatabase(); err != nil {
					t.Fatal(err)
				}
				if a := u.nexus[atO].do(t, pr.Out{Action: pr.Register, Key: keyO, ServiceKey: keyO, APTPL: aptpl}); a != lost {
					t.Errorf("REGISTER without a database: %v; want %v", a, lost)
				}
			}
			src, dst := m.run(keyK)
			if restore == nil {
				break
			}
			if err := restore(); err != nil {
				t.Fatal(err)
			}
			want := before
			switch {
			case src.Kind == pr.HandedOver && (dst.Kind == pr.Moved || dst.Kind == pr.RegistrationOnly && typ == pr.None):
				want = after
				moved++
			case src.Kind == pr.Kept && dst.Kind == pr.GivenUp && !m.ran:
				kept++
			default:
				t.Errorf("from command %d on: %s, move %v: %s %s", at, before, move, dst.Sentence("D"), src.Sentence("S"))
			}
			if dst.Stale {
				want.s = keyK
			}
			if got := u.show(t); got != want.String() {
				t.Errorf("from command %d on: %s, move %v, became %s; want %s; %s %s", at, before, move, got, want, dst.Sentence("D"), src.Sentence("S"))
			}
			u.quiet(t)
		}
	})
	if moved == 0 || kept == 0 {
		t.Errorf("%d moved, %d kept; want some of both", moved, kept)
	}
	t.Logf("%d takeovers moved, %d kept, with registrations that were answered with an error", moved, kept)
}
