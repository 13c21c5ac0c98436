package reservations

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"vmm/scsi"
	"vmm/scsi/pr"
)

var (
	long      = flag.Bool("long", false, "run the takeover's tests with everything in every combination")
	sequences = flag.Int("sequences", 10, "how many random sequences of commands the targets are compared with")
	length    = flag.Int("length", 100, "how many commands a sequence has")
	atMost    = flag.Duration("atmost", 0, "begin no further sequence after this time; 0 is no bound")
	firstSeed = flag.Uint64("seed", 1, "of the first sequence; the others count up")
)

// order is one command from one nexus.
type order struct {
	from int
	name string
	cdb  []byte
	list []byte
	in   int     // bytes of data that it may transfer
	out  *pr.Out // if it is PERSISTENT RESERVE OUT
}

// other commands, by the class that reservations see in them.
var others = []order{
	{name: "TEST UNIT READY", cdb: []byte{scsi.OpTestUnitReady, 5: 0}},
	{name: "INQUIRY", cdb: []byte{scsi.OpInquiry, 4: 36, 5: 0}, in: 36},
	{name: "REPORT LUNS", cdb: []byte{scsi.OpReportLUNs, 9: 16, 11: 0}, in: 16},
	{name: "READ CAPACITY(10)", cdb: []byte{scsi.OpReadCapacity10, 9: 0}, in: 8},
	{name: "READ CAPACITY(16)", cdb: []byte{scsi.OpServiceActionIn16, scsi.SAReadCapacity16, 13: 32, 15: 0}, in: 32},
	{name: "MODE SENSE(6)", cdb: []byte{scsi.OpModeSense6, 2: 0x3f, 4: 192, 5: 0}, in: 192},
	{name: "REPORT TARGET PORT GROUPS", cdb: []byte{scsi.OpMaintenanceIn, scsi.SAReportTargetPortGroups, 9: 64, 11: 0}, in: 64},
	{name: "READ(10)", cdb: []byte{scsi.OpRead10, 8: 1, 9: 0}, in: 512},
	{name: "READ(10)", cdb: []byte{scsi.OpRead10, 8: 1, 9: 0}, in: 512},
	{name: "WRITE(10)", cdb: []byte{scsi.OpWrite10, 8: 1, 9: 0}, list: make([]byte, 512)},
	{name: "WRITE(10)", cdb: []byte{scsi.OpWrite10, 8: 1, 9: 0}, list: make([]byte, 512)},
	{name: "SYNCHRONIZE CACHE(10)", cdb: []byte{scsi.OpSynchronizeCache10, 9: 0}},
}

// keys are all that the nexuses use.
var keys = []pr.Key{0, 0xa, 0xb, 0xc}

// side is a target under comparison, as the reference target stands for it.
type side struct {
	*pr.Target
	ids []pr.Nexus
}

// draw makes the next command: mostly one that means something in the state
// that the reference target is in.
func (s side) draw(r *rand.Rand, abort bool) order {
	from := r.IntN(3)
	one := func(n int) bool { return r.IntN(n) == 0 }
	switch n := r.IntN(100); {
	case n < 26:
		o := others[r.IntN(len(others))]
		o.from = from
		return o
	case n < 34:
		in := pr.In{Action: pr.InAction(r.IntN(4)), Alloc: 4096}
		return order{from: from, name: in.Action.String(), cdb: in.CDB(), in: 4096}
	case n < 36:
		cdb := [][]byte{{scsi.OpReserve6, 5: 0}, {scsi.OpReserve10, 9: 0}}[r.IntN(2)]
		return order{from: from, name: "RESERVE of SPC-2", cdb: cdb}
	case n < 44:
		cdb := [][]byte{{scsi.OpRelease6, 5: 0}, {scsi.OpRelease10, 9: 0}}[r.IntN(2)]
		return order{from: from, name: "RELEASE of SPC-2", cdb: cdb}
	}
	o := pr.Out{Key: s.Key(s.ids[from]), ServiceKey: keys[r.IntN(len(keys))], APTPL: one(4)}
	if one(5) {
		o.Key = keys[r.IntN(len(keys))]
	}
	actions := []pr.OutAction{
		pr.Register, pr.Register, pr.Register, pr.Register, pr.RegisterAndIgnoreExistingKey, pr.RegisterAndIgnoreExistingKey,
		pr.Reserve, pr.Reserve, pr.Reserve, pr.Reserve, pr.Release, pr.Release, pr.Clear,
		pr.Preempt, pr.Preempt, pr.Preempt, pr.RegisterAndMove, pr.RegisterAndMove,
	}
	o.Action = actions[r.IntN(len(actions))]
	if s.Key(s.ids[from]) == 0 && !one(4) { // the unregistered are refused most things
		o.Action, o.ServiceKey = pr.Register, keys[1+r.IntN(len(keys)-1)]
	} else if held := s.Reservation(); o.Action == pr.Reserve && held.Type.Single() && one(2) {
		o.Action = pr.RegisterAndMove
	}
	if o.Action == pr.Preempt && abort && one(2) {
		o.Action = pr.PreemptAndAbort
	}
	if one(200) {
		o.Action = pr.ReplaceLostReservation
	}
	o.Type = s.Reservation().Type
	if o.Type == pr.None || one(3) {
		o.Type = pr.Types[r.IntN(len(pr.Types))]
	}
	if one(40) {
		o.Type = pr.Type(r.IntN(16))
	}
	if one(60) {
		o.Scope = 1
	}
	if o.Action == pr.RegisterAndMove {
		o.MoveTo, o.Unregister = s.ids[r.IntN(3)], one(2)
	}
	cdb, list := o.Encode()
	return order{from: from, name: o.Action.String(), cdb: cdb, list: list, out: &o}
}

func (o order) String() string {
	s := fmt.Sprintf("%c: %s", 'A'+o.from, o.name)
	if p := o.out; p != nil {
		s += fmt.Sprintf(" key %x, service key %x, type %d", uint64(p.Key), uint64(p.ServiceKey), p.Type)
		if p.Scope != 0 {
			s += fmt.Sprintf(", scope %d", p.Scope)
		}
		if p.APTPL {
			s += ", APTPL"
		}
		if p.Action == pr.RegisterAndMove {
			s += fmt.Sprintf(", to %v, UNREG %v", p.MoveTo, p.Unregister)
		}
	}
	return s
}

// malformed says that the command has a fault of its own, whatever the
// target's state.
func (o order) malformed() bool {
	p := o.out
	if p == nil {
		return false
	}
	switch p.Action {
	case pr.Reserve, pr.Preempt, pr.PreemptAndAbort, pr.Release:
		return p.Scope != 0 || !p.Type.Valid() || p.Action != pr.Reserve && p.Action != pr.Release && p.ServiceKey == 0
	case pr.RegisterAndMove:
		return p.ServiceKey == 0
	}
	return p.Action == pr.ReplaceLostReservation
}

// exception is a difference that is meant to be: what the reference target
// does not imitate, because it leaves no trace in the target's state.
type exception struct {
	name string
	is   func(s side, o order, want, got pr.Answer) bool
}

func refusal(a pr.Answer) bool { return !a.OK() && a.Sense.Key != scsi.UnitAttention }

var exceptions = []exception{
	// SPC does not say which of two reasons to refuse a command is told.
	{name: "two reasons to refuse", is: func(s side, o order, want, got pr.Answer) bool {
		return (o.malformed() || o.out != nil && o.out.Action == pr.RegisterAndMove && o.out.MoveTo == s.ids[o.from]) &&
			refusal(want) && refusal(got)
	}},
	// SBC-4 table 13: SYNCHRONIZE CACHE conflicts with every Write Exclusive
	// type. LIO lets an unregistered nexus send whatever transfers no data to
	// the device.
	{name: "SYNCHRONIZE CACHE of an unregistered nexus under Write Exclusive", is: func(s side, o order, want, got pr.Answer) bool {
		typ := s.Reservation().Type
		return o.cdb[0] == scsi.OpSynchronizeCache10 && s.Key(s.ids[o.from]) == 0 && got.OK() && want.Status == scsi.ReservationConflict &&
			(typ == pr.WriteExclusive || typ == pr.WriteExclusiveRegistrantsOnly || typ == pr.WriteExclusiveAllRegistrants)
	}},
	// SPC-5 table "commands that are allowed in the presence of various
	// reservations": under Exclusive Access MODE SENSE is the holder's alone.
	// LIO allows it to every registered nexus.
	{name: "MODE SENSE(6) of a registrant under Exclusive Access", is: func(s side, o order, want, got pr.Answer) bool {
		return o.cdb[0] == scsi.OpModeSense6 && s.Key(s.ids[o.from]) != 0 && got.OK() && want.Status == scsi.ReservationConflict &&
			s.Reservation().Type == pr.ExclusiveAccess
	}},
	// SPC-2 5.5.1 lets REPORT LUNS pass; LIO only INQUIRY.
	{name: "REPORT LUNS under another's RESERVE", is: func(s side, o order, want, got pr.Answer) bool {
		return o.cdb[0] == scsi.OpReportLUNs && want.OK() && got.Status == scsi.ReservationConflict && len(s.Status().Registrations) == 0
	}},
}

// bench is the two targets that are compared, and what was counted.
type bench struct {
	*unit
	side
	generation uint32 // LIO's when the reference target's was zero
	compared   int
	attention  int
	tally      map[string]*[3]int // by command: GOOD, RESERVATION CONFLICT, CHECK CONDITION
	excepted   map[int]int        // by exception
	// spoiled is who has sent REGISTER AND MOVE without UNREG. LIO then keeps
	// the reservation's type as the scope of the sender's registration, and if
	// the reservation ever comes back to that by REGISTER AND MOVE, its holder
	// can neither repeat RESERVE nor RELEASE it. So it is not moved back.
	spoiled [3]bool
}

// begin puts both sides into the same state.
func (b *bench) begin(t *testing.T) {
	b.reset(t)
	b.spoiled = [3]bool{}
	b.Target = pr.NewTarget(pr.Targets[1])
	b.generation = b.status(t).Generation
}

// step sends one command to both and compares the answers, then what they
// have become.
func (b *bench) step(o order) error {
	move := o.out != nil && o.out.Action == pr.RegisterAndMove
	if move && b.spoiled[slices.Index(b.ids, o.out.MoveTo)] {
		return nil
	}
	before := b.Clone()
	data := make([]byte, o.in)
	got, err := b.nexus[o.from].send(o.cdb, o.list, data)
	if err != nil {
		return fmt.Errorf("%v: %w", o, err)
	}
	want, wantAnswer := b.Execute(b.ids[o.from], o.cdb, o.list)
	b.compared++
	for i := range b.spoiled {
		b.spoiled[i] = (b.spoiled[i] || move && i == o.from && got.OK() && !o.out.Unregister) && b.Key(b.ids[i]) != 0
	}
	if b.tally[o.name] == nil {
		b.tally[o.name] = new([3]int)
	}
	switch {
	case got.OK():
		b.tally[o.name][0]++
	case got.Status == scsi.ReservationConflict:
		b.tally[o.name][1]++
	case got.Sense.Key == scsi.UnitAttention:
		b.attention++
	default:
		b.tally[o.name][2]++
	}
	if got != wantAnswer {
		s := side{before, b.ids}
		i := slices.IndexFunc(exceptions, func(e exception) bool { return e.is(s, o, wantAnswer, got) })
		if i < 0 {
			return fmt.Errorf("%v: LIO answers %v; want %v", o, got, wantAnswer)
		}
		b.excepted[i]++
	}
	if o.cdb[0] == scsi.OpPersistentReserveIn && got.OK() {
		if err := b.same(pr.InAction(o.cdb[1]), data, want); err != nil {
			return fmt.Errorf("%v: %w", o, err)
		}
	}
	// What the others see, asked through a nexus that never registers and so
	// has no unit attentions.
	watcher := len(b.nexus) - 1
	for a := pr.ReadKeys; a <= pr.ReadFullStatus; a++ {
		data := make([]byte, 4096)
		cdb := pr.In{Action: a, Alloc: 4096}.CDB()
		got, err := b.nexus[watcher].send(cdb, nil, data)
		if err != nil {
			return fmt.Errorf("after %v: %v: %w", o, a, err)
		}
		want, wantAnswer := b.Execute(b.ids[watcher], cdb, nil)
		b.compared++
		if got != wantAnswer {
			return fmt.Errorf("after %v: %v: LIO answers %v; want %v", o, a, got, wantAnswer)
		}
		if !got.OK() {
			continue
		}
		if err := b.same(a, data, want); err != nil {
			return fmt.Errorf("after %v: %w", o, err)
		}
	}
	return nil
}

// same compares parameter data. The order of the registrations is the
// target's own.
func (b *bench) same(a pr.InAction, got, want []byte) error {
	var x, y any
	var err1, err2 error
	switch a {
	case pr.ReadKeys:
		var k, l pr.Keys
		k, err1 = pr.ParseKeys(got)
		l, err2 = pr.ParseKeys(want)
		k.Generation -= b.generation
		slices.Sort(k.Keys)
		slices.Sort(l.Keys)
		x, y = k, l
	case pr.ReadReservation:
		var r, s pr.Reservation
		r, err1 = pr.ParseReservation(got)
		s, err2 = pr.ParseReservation(want)
		r.Generation -= b.generation
		x, y = r, s
	case pr.ReportCapabilities:
		var c, d pr.Capabilities
		c, err1 = pr.ParseCapabilities(got)
		d, err2 = pr.ParseCapabilities(want)
		d.AllowCommands = 1 // LIO says a little about what it allows; the reference target says nothing
		x, y = c, d
	case pr.ReadFullStatus:
		var f, g pr.FullStatus
		f, err1 = pr.ParseFullStatus(got)
		g, err2 = pr.ParseFullStatus(want)
		f.Generation -= b.generation
		for _, r := range [][]pr.Registration{f.Registrations, g.Registrations} {
			slices.SortFunc(r, func(a, b pr.Registration) int {
				return cmp.Or(cmp.Compare(a.Nexus.TargetPort, b.Nexus.TargetPort), cmp.Compare(a.Nexus.Initiator, b.Nexus.Initiator))
			})
		}
		x, y = f, g
	}
	if err1 != nil || err2 != nil {
		return fmt.Errorf("%v: LIO: %v, ours: %v", a, err1, err2)
	}
	if diff := gocmp.Diff(y, x); diff != "" {
		return fmt.Errorf("%v: LIO (+) and the reference target (-) differ:\n%s", a, diff)
	}
	return nil
}

// replay runs a sequence from the beginning.
func (b *bench) replay(t *testing.T, orders []order) error {
	b.begin(t)
	for _, o := range orders {
		if err := b.step(o); err != nil {
			return err
		}
	}
	return nil
}

// shrink leaves out of a sequence that fails all that it fails without.
func (b *bench) shrink(t *testing.T, orders []order) ([]order, error) {
	err := b.replay(t, orders)
	for n := len(orders) / 2; n > 0; n /= 2 {
		for i := 0; i+n <= len(orders); {
			fewer := slices.Delete(slices.Clone(orders), i, i+n)
			if e := b.replay(t, fewer); e != nil {
				orders, err = fewer, e
			} else {
				i += n
			}
		}
	}
	return orders, err
}

// TestReference: the reference target with LIO's quirks answers every command
// as LIO does: status, sense data, unit attentions, READ KEYS, READ
// RESERVATION, REPORT CAPABILITIES, READ FULL STATUS, PRgeneration.
func TestReference(t *testing.T) {
	compare(t, need(t, "ABCW"), false)
}

// compare runs the sequences on u, with PREEMPT AND ABORT in them or not.
func compare(t *testing.T, u *unit, abort bool) {
	b := &bench{unit: u, tally: map[string]*[3]int{}, excepted: map[int]int{}}
	for _, n := range u.nexus {
		b.ids = append(b.ids, n.id)
	}
	began, failures := time.Now(), 0
	ran := 0
	for n := range *sequences {
		if *atMost != 0 && time.Since(began) > *atMost {
			break
		}
		ran++
		seed := *firstSeed + uint64(n)
		r := rand.New(rand.NewPCG(seed, 0))
		b.begin(t)
		var sent []order
		for range *length {
			o := b.draw(r, abort)
			sent = append(sent, o)
			err := b.step(o)
			if err == nil {
				continue
			}
			t.Errorf("sequence of seed %d, command %d: %v", seed, len(sent), err)
			sent, err = b.shrink(t, sent)
			var lines strings.Builder
			for _, o := range sent {
				fmt.Fprintf(&lines, "\n    %v", o)
			}
			t.Errorf("as short as it gets:%s\n%v", lines.String(), err)
			if failures++; failures == 5 {
				t.FailNow()
			}
			break
		}
	}
	t.Logf("%d sequences of %d commands: %d answers compared, %d unit attentions among them, %v",
		ran, *length, b.compared, b.attention, time.Since(began).Round(time.Millisecond))
	for _, name := range slices.Sorted(maps.Keys(b.tally)) {
		n := b.tally[name]
		t.Logf("%6d good, %5d conflicts, %4d refused: %s", n[0], n[1], n[2], name)
		if ran >= 10 && n[0] == 0 && name != pr.ReplaceLostReservation.String() {
			t.Errorf("no %s was GOOD: this comparison shows nothing about it", name)
		}
	}
	for i, e := range exceptions {
		t.Logf("%6d times: %s", b.excepted[i], e.name)
	}
}
