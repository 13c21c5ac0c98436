package pr

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"vmm/scsi"
)

// site is one host's way to a shared reference target. hook, if set, runs
// before each command and may answer in its place.
type site struct {
	target *Target
	nexus  Nexus
	hook   func(cdb []byte) *Answer
	sent   []string
}

func (s *site) Send(ctx context.Context, cdb, list, data []byte) (int, Answer, error) {
	if err := ctx.Err(); err != nil {
		return 0, Answer{}, err
	}
	switch cdb[0] {
	case scsi.OpPersistentReserveIn:
		s.sent = append(s.sent, InAction(cdb[1]).String())
	case scsi.OpPersistentReserveOut:
		s.sent = append(s.sent, OutAction(cdb[1]).String())
	}
	if s.hook != nil {
		if a := s.hook(cdb); a != nil {
			return 0, *a, nil
		}
	}
	if cdb[0] == scsi.OpMaintenanceIn {
		data[1] = 3 // supported
		return len(data), good, nil
	}
	b, a := s.target.Execute(s.nexus, cdb, list)
	return copy(data, b), a, nil
}

// pairOf is a takeover's two ends over one reference target.
type pairOf struct {
	*testing.T
	target   *Target
	pair     *Pair
	src, dst *site
	s        Source
	d        Dest
	sPort    Port
	dPort    Port
	journal  *Journal
}

func newPair(t *testing.T, q Quirks, mod func(*Pair)) *pairOf {
	t.Helper()
	j, err := OpenJournal(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	tg := NewTarget(q)
	p := &Pair{Old: nexA, New: nexB, FullStatus: !q.NoFullStatus}
	if mod != nil {
		mod(p)
	}
	x := &pairOf{T: t, target: tg, journal: j}
	x.src, x.dst = &site{target: tg, nexus: p.Old}, &site{target: tg, nexus: p.New}
	for _, n := range []Nexus{nexA, nexB, nexC} {
		tg.port(n)
	}
	x.pair, x.sPort, x.dPort = p, Port{Sender: x.src}, Port{Sender: x.dst}
	return x
}

// migrate runs both machines to their end; step, if not nil, sees every
// message before it is delivered, and false cuts the link there.
func (x *pairOf) migrate(step func(Msg) bool) (src, dst Outcome) {
	x.Helper()
	ctx := context.Background()
	x.s, x.d = NewSource(x.pair, x.target.Key(x.src.nexus)), NewDest(x.pair)
	entry := Entry{LUN: "naa.1", Key: x.target.Key(x.src.nexus), Pair: *x.pair.back()}
	var toS, toD []Msg
	cut := false
	tell := func(q *[]Msg) func(Msg) error {
		return func(m Msg) error {
			if !cut && step != nil && !step(m) {
				cut = true
			}
			if cut {
				return errors.New("the link is cut")
			}
			*q = append(*q, m)
			return nil
		}
	}
	running := false
	for range 200 {
		sAt := x.sPort.Run(ctx, &x.s, x.journal.For(Entry{LUN: "naa.1 source", Key: entry.Key, Pair: *x.pair}), tell(&toD))
		dAt := x.dPort.Run(ctx, &x.d, x.journal.For(entry), tell(&toS))
		switch {
		case dAt == Finish && !running && !cut:
			running = true
			if o := x.d.Outcome().Kind; o == Refused || o == GivenUp {
				x.s.Receive(Msg{Kind: Aborted})
			} else {
				x.s.Receive(Msg{Kind: Running})
			}
		case sAt == Finish && dAt == Finish, cut && dAt == Finish && x.s.HandedOver():
			return x.s.Outcome(), x.d.Outcome()
		case len(toD) > 0:
			x.d.Receive(toD[0])
			toD = toD[1:]
		case len(toS) > 0:
			x.s.Receive(toS[0])
			toS = toS[1:]
		case cut:
			x.s.Lost()
			x.d.Lost()
		case x.s.Readied() && !x.s.HandedOver():
			x.s.Commit()
		}
	}
	x.Fatalf("the takeover does not end: source %+v, destination %+v", x.s.Next(), x.d.Next())
	return
}

// Each row of the table in the design, on every kind of target, through the
// whole stack down to the bytes of CDBs and parameter data.
func TestTakeover(t *testing.T) {
	for _, q := range Targets {
		for _, move := range []bool{false, true} {
			if move && q.NoMove {
				continue
			}
			for _, tt := range []struct {
				name, script, after string
				want                OutcomeKind
			}{
				{"no key", "C register 0 cc 0", "C:cc type 0", NothingHeld},
				{"registered", "A register 0 aa 0\nC register 0 cc 0", "B:aa C:cc type 0", RegistrationOnly},
				{"another holds", "A register 0 aa 0\nC register 0 cc 0\nC reserve cc 0 5", "B:aa C:cc* type 5", RegistrationOnly},
				{"type 1", "A register 0 aa 0\nC register 0 cc 0\nA reserve aa 0 1", "B:aa* C:cc type 1", Moved},
				{"type 3", "A register 0 aa 0\nC register 0 cc 0\nA reserve aa 0 3", "B:aa* C:cc type 3", Moved},
				{"type 5", "A register 0 aa 0\nC register 0 cc 0\nA reserve aa 0 5", "B:aa* C:cc type 5", Moved},
				{"type 6", "A register 0 aa 0\nC register 0 cc 0\nA reserve aa 0 6", "B:aa* C:cc type 6", Moved},
				{"type 7", "A register 0 aa 0\nC register 0 cc 0\nA reserve aa 0 7", "B:aa* C:cc* type 7", Moved},
				{"type 8", "A register 0 aa 0\nC register 0 cc 0\nA reserve aa 0 8", "B:aa* C:cc* type 8", Moved},
			} {
				t.Run(fmt.Sprintf("%s/%s/move=%v", q.Name, tt.name, move), func(t *testing.T) {
					x := newPair(t, q, func(p *Pair) { p.Move = move })
					run(t, x.target, tt.script)
					if !q.NoPersist {
						x.target.persist = true
					}
					before := x.target.persist
					for _, n := range []Nexus{nexA, nexB} { // fresh nexuses have something to say first
						x.target.Attention(n, scsi.PowerOnOccurred)
					}
					src, dst := x.migrate(nil)
					if dst.Kind != tt.want || src.Kind != HandedOver {
						t.Errorf("destination: %s source: %s", dst.Sentence("LUN"), src.Sentence("LUN"))
					}
					got, _, _ := strings.Cut(show(x.target), " gen")
					if got != tt.after || x.target.persist != before {
						t.Errorf("after: %s, APTPL %v; want %s, %v", got, x.target.persist, tt.after, before)
					}
					if s, ok := x.target.Pending(nexC); ok {
						t.Errorf("the bystander got unit attention %v", s)
					}
					if e, err := x.journal.Entries(); err != nil || len(e) > 0 && tt.want != NothingHeld && e[0].LUN == "naa.1 source" {
						t.Errorf("the source's journal still has %+v, %v", e, err)
					}
					moved := strings.Contains(strings.Join(x.src.sent, ","), RegisterAndMove.String())
					if want := move && Type(x.target.typ).Single() && tt.want == Moved; moved != want {
						t.Errorf("REGISTER AND MOVE was used: %v; want %v", moved, want)
					}
				})
			}
		}
	}
}

// A fence at any moment of the takeover leaves the guest fenced, whoever runs
// it, and takes nothing from the node that fenced.
// On one nexus the destination sends nothing before COMMIT and no PERSISTENT
// RESERVE OUT at all, and ends with what the disk says that the guest has.
func TestTakeoverOnOneNexus(t *testing.T) {
	const other Key = 0x77
	registered := func(x *pairOf) { x.target.Do(nexA, &Out{ServiceKey: keyA, APTPL: !x.target.Quirks.NoPersist}) }
	reserved := func(typ Type) func(*pairOf) {
		return func(x *pairOf) {
			registered(x)
			x.target.Do(nexA, &Out{Action: Reserve, Key: keyA, Type: typ})
		}
	}
	for _, q := range Targets {
		persist := !q.NoPersist
		for _, tt := range []struct {
			name  string
			begin func(*pairOf)
			stop  func(*pairOf) // when the guest has stopped, and S has read
			want  Outcome
		}{
			{"no key", nil, nil, Outcome{Kind: NothingHeld}},
			{"registered", registered, nil, Outcome{Kind: Kept, Key: keyA, Persist: persist}},
			{"holds", reserved(WriteExclusiveRegistrantsOnly), nil, Outcome{Kind: Kept, Key: keyA, Type: WriteExclusiveRegistrantsOnly, Persist: persist}},
			{"all hold", reserved(ExclusiveAccessAllRegistrants), nil, Outcome{Kind: Kept, Key: keyA, Type: ExclusiveAccessAllRegistrants, Persist: persist}},
			{"another holds", func(x *pairOf) {
				registered(x)
				x.target.Do(nexC, &Out{ServiceKey: other, APTPL: persist})
				x.target.Do(nexC, &Out{Action: Reserve, Key: other, Type: WriteExclusiveRegistrantsOnly})
			}, nil, Outcome{Kind: Kept, Key: keyA, Persist: persist}},
			{"fenced meanwhile", reserved(WriteExclusive), func(x *pairOf) {
				x.target.Do(nexC, &Out{ServiceKey: other, APTPL: persist})
				x.target.Do(nexC, &Out{Action: Preempt, Key: other, ServiceKey: keyA, Type: WriteExclusive})
			}, Outcome{Kind: FencedMeanwhile, Key: keyA}},
			{"the disk is dead", reserved(WriteExclusive), func(x *pairOf) {
				x.dst.hook = func([]byte) *Answer {
					return &Answer{Status: scsi.CheckCondition, Sense: scsi.Sense{Key: scsi.NotReady, ASC: 4}}
				}
			}, Outcome{Kind: Kept, Key: keyA, Reason: DiskFailed}},
		} {
			x := newPair(t, q, func(p *Pair) { p.New, p.Same = p.Old, true })
			if tt.begin != nil {
				tt.begin(x)
			}
			generation := x.target.Status().Generation
			_, got := x.migrate(func(m Msg) bool {
				switch m.Kind {
				case State:
					if tt.stop != nil {
						tt.stop(x)
						generation = x.target.Status().Generation
					}
				case Ready, Commit:
					if len(x.dst.sent) > 0 {
						t.Errorf("%s, %s: before COMMIT the destination sends %v", q.Name, tt.name, x.dst.sent)
					}
				}
				return true
			})
			if got != tt.want {
				t.Errorf("%s, %s: outcome %+v; want %+v", q.Name, tt.name, got, tt.want)
			}
			if now := x.target.Status().Generation; now != generation {
				t.Errorf("%s, %s: PRgeneration went from %d to %d", q.Name, tt.name, generation, now)
			}
			for _, sent := range append(x.src.sent, x.dst.sent...) {
				if !strings.HasPrefix(sent, "READ") && !strings.HasPrefix(sent, "REPORT") {
					t.Errorf("%s, %s: %s was sent", q.Name, tt.name, sent)
				}
			}
		}
	}
}

func TestTakeoverFenced(t *testing.T) {
	for _, q := range Targets {
		for _, typ := range []Type{WriteExclusiveRegistrantsOnly, None} {
			fences := 0
			for at := 1; ; at++ {
				x := newPair(t, q, nil)
				run(t, x.target, "A register 0 aa 0\nC register 0 cc 0")
				if typ != None {
					run(t, x.target, "A reserve aa 0 5")
				}
				commands := 0
				fence := func([]byte) *Answer {
					if commands++; commands == at {
						fences++
						x.target.Do(nexC, &Out{Action: Preempt, Key: keyC, ServiceKey: keyA, Type: WriteExclusiveRegistrantsOnly})
					}
					return nil
				}
				x.src.hook, x.dst.hook = fence, fence
				src, dst := x.migrate(nil)
				if commands < at {
					break
				}
				if a, b := x.target.Key(nexA), x.target.Key(nexB); a != 0 || b != 0 {
					t.Errorf("%s, type %d, fenced before command %d: S has %v, D has %v; %s %s", q.Name, typ, at, a, b, src.Sentence("S"), dst.Sentence("D"))
				}
				if typ != None && !x.target.holds(x.target.port(nexC)) {
					t.Errorf("%s, type %d, fenced before command %d: the fencer lost its reservation: %s", q.Name, typ, at, show(x.target))
				}
			}
			if fences < 8 {
				t.Errorf("%s: only %d fences", q.Name, fences)
			}
		}
	}
}

// The link is cut at each message: before COMMIT the source keeps everything
// and the destination leaves nothing; after it the destination has it all.
func TestTakeoverLinkCut(t *testing.T) {
	for _, q := range Targets {
		for cutAt := 0; ; cutAt++ {
			x := newPair(t, q, nil)
			run(t, x.target, "A register 0 aa 0\nC register 0 cc 0\nA reserve aa 0 5")
			n, committed, cut := 0, false, false
			src, dst := x.migrate(func(m Msg) bool {
				if n++; n > cutAt {
					cut = true
					return false
				}
				committed = committed || m.Kind == Commit
				return true
			})
			got, _, _ := strings.Cut(show(x.target), " gen")
			want := "A:aa* C:cc type 5"
			if committed {
				want = "B:aa* C:cc type 5"
			}
			if got != want {
				t.Errorf("%s: link cut at message %d: %s; want %s; %s %s", q.Name, cutAt+1, got, want, src.Sentence("S"), dst.Sentence("D"))
			}
			if !cut {
				break
			}
		}
	}
}

func TestForce(t *testing.T) {
	ctx := context.Background()
	for _, tt := range []struct {
		name, disk, after string
		gave              bool
		want              OutcomeKind
	}{
		{"nothing was moved", "A register 0 aa 0\nA reserve aa 0 5", "A:aa* type 5", false, Kept},
		{"D holds", "B register 0 aa 0\nB reserve aa 0 5", "A:aa* type 5", false, Moved},
		{"D shows the key, and S gave its own up", "B register 0 aa 0", "A:aa B:aa type 0", true, RegistrationOnly},
		{"D shows the key, which proves nothing", "B register 0 aa 0", "B:aa type 0", false, FencedMeanwhile},
		{"nobody has the key", "C register 0 cc 0", "C:cc type 0", true, FencedMeanwhile},
	} {
		x := newPair(t, Quirks{}, nil)
		run(t, x.target, tt.disk)
		s := NewSource(x.pair, keyA)
		s.key, s.phase, s.handed, s.gave = keyA, sourceServe, true, tt.gave
		s.Force()
		x.sPort.Run(ctx, &s, x.journal.For(Entry{LUN: "l", Key: keyA, Pair: *x.pair}), nil)
		got, _, _ := strings.Cut(show(x.target), " gen")
		if o := s.Outcome(); o.Kind != tt.want || got != tt.after {
			t.Errorf("%s: %s disk %s; want %s", tt.name, o.Sentence("LUN"), got, tt.after)
		}
	}
}

func TestRecoveryAndIdentify(t *testing.T) {
	ctx := context.Background()
	for _, tt := range []struct {
		disk, after string
		handed      bool
		want        OutcomeKind
	}{
		{"A register+ 0 aa 0\nC register+ 0 cc 0", "C:cc type 0 gen 3 aptpl", false, NothingHeld},
		{"A register 0 aa 0\nA reserve aa 0 5", "A:aa* type 5 gen 1", false, LeftBehind},
		{"A register 0 aa 0\nA reserve aa 0 7", "A:aa* type 7 gen 1", false, LeftBehind},
		{"A register 0 aa 0", "A:aa type 0 gen 1", true, LeftBehind},
		{"A register 0 ab 0", "A:ab type 0 gen 1", false, NothingHeld},
	} {
		x := newPair(t, Quirks{}, nil)
		run(t, x.target, tt.disk)
		entry := Entry{LUN: "naa.5000", Path: "/dev/sg1", Migration: "m", Key: keyA, Pair: *x.pair, Handed: tt.handed}
		if err := x.journal.Write(entry); err != nil {
			t.Fatal(err)
		}
		entries, err := x.journal.Entries()
		if diff := cmp.Diff([]Entry{entry}, entries); err != nil || diff != "" {
			t.Fatalf("journal: %v, %s", err, diff)
		}
		r := NewRecovery(&entries[0].Pair, entries[0].Key, entries[0].Handed)
		x.sPort.Run(ctx, &r, x.journal.For(entry), nil)
		if got := show(x.target); got != tt.after || r.Outcome().Kind != tt.want {
			t.Errorf("%s: %s, %s; want %s", tt.disk, got, r.Outcome().Sentence("LUN"), tt.after)
		}
		entries, err = x.journal.Entries()
		if err != nil || len(entries) != map[OutcomeKind]int{NothingHeld: 0, LeftBehind: 1}[tt.want] {
			t.Errorf("%s: afterwards the journal has %v, %v", tt.disk, entries, err)
		}
	}

	x := newPair(t, Quirks{}, nil)
	run(t, x.target, "C register+ 0 cc 0")
	ledger := x.journal.For(Entry{LUN: "l"})
	n, err := x.sPort.Identify(ctx, func(Key) Ledger { return ledger })
	if err != nil || n != nexA || show(x.target) != "C:cc type 0 gen 3 aptpl" {
		t.Errorf("Identify = %v, %v; disk %s", n, err, show(x.target))
	}
	run(t, x.target, "A register 0 aa 0")
	if _, err := x.sPort.Identify(ctx, func(Key) Ledger { return ledger }); !errors.Is(err, ErrLeftover) || x.target.Key(nexA) != keyA {
		t.Errorf("Identify of a registered nexus: %v", err)
	}
	f, err := x.sPort.Probe(ctx)
	if err != nil || !f.FullStatus || !f.Move || len(f.Keys.Keys) != 2 || f.Held.Type != None {
		t.Errorf("Probe = %+v, %v", f, err)
	}
}

func TestPreflight(t *testing.T) {
	ctx := context.Background()
	for _, tt := range []struct {
		target Quirks
		disk   string
		move   bool
		guest  Tracked
		want   Reason
	}{
		{Quirks{}, "A register 0 aa 0\nA reserve aa 0 5\nC register 0 cc 0", false, Tracked{Key: keyA}, NoReason},
		{Quirks{}, "A register 0 aa 0\nB register 0 bb 0", false, Tracked{Key: keyA}, LeftoverRegistration},
		{Quirks{}, "B register 0 aa 0", false, Tracked{}, LeftoverRegistration},
		{Quirks{}, "A register 0 aa 0\nA reserve aa 0 5\nC register 0 aa 0", false, Tracked{Key: keyA}, KeyShared},
		{Quirks{}, "A register 0 aa 0\nA reserve aa 0 5\nC register 0 aa 0", true, Tracked{Key: keyA}, NoReason},
		{Quirks{}, "A register 0 aa 0\nA reserve aa 0 7\nC register 0 aa 0", false, Tracked{Key: keyA}, NoReason},
		{Quirks{}, "A register 0 aa 0\nC register 0 aa 0\nC reserve aa 0 5", false, Tracked{Key: keyA}, NoReason},
		{Quirks{NoFullStatus: true}, "A register 0 aa 0\nA reserve aa 0 5\nC register 0 aa 0", true, Tracked{Key: keyA}, KeyShared},
		{Quirks{NoFullStatus: true}, "C register 0 cc 0", false, Tracked{}, NoReason},
		{Quirks{}, "C register 0 cc 0", false, Tracked{SPC2: true}, HeldBySPC2},
	} {
		x := newPair(t, tt.target, nil)
		run(t, x.target, tt.disk)
		f, err := x.sPort.Probe(ctx)
		f.Move = tt.move
		if got := f.Refuse(x.pair, tt.guest); err != nil || got != tt.want {
			t.Errorf("%q, %+v: %v, %v; want %v", tt.disk, tt.guest, got, err, tt.want)
		}
		if tt.want == NoReason || tt.want == HeldBySPC2 {
			continue
		}
		// The machines refuse what the preflight does, and change nothing.
		x.pair.Move = tt.move && !tt.target.NoMove
		before := show(x.target)
		if src, dst := x.migrate(nil); dst.Kind != Refused || dst.Reason != tt.want || src.Kind != Kept && src.Kind != NothingHeld {
			t.Errorf("%q: %s %s", tt.disk, src.Sentence("S"), dst.Sentence("D"))
		}
		if got, was := show(x.target), before; got != was && !tt.target.NoFullStatus {
			t.Errorf("%q: %s became %s", tt.disk, was, got)
		}
	}
}

func TestJournalDamaged(t *testing.T) {
	dir := t.TempDir()
	j, err := OpenJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, lun := range []string{"naa.1", "naa.2"} {
		if err := j.Write(Entry{LUN: lun, Key: keyA, Pair: Pair{Old: nexA, New: nexC, FullStatus: true}}); err != nil {
			t.Fatal(err)
		}
	}
	path := j.file(Entry{LUN: "naa.1"})
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-4] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	entries, err := j.Entries()
	if err == nil || !strings.Contains(err.Error(), path) || len(entries) != 1 || entries[0].LUN != "naa.2" {
		t.Errorf("Entries = %v, %v; want naa.2 and an error that names %s", entries, err, path)
	}
	if err := errors.Join(j.Erase(Entry{LUN: "naa.2"}), j.Erase(Entry{LUN: "naa.2"})); err != nil {
		t.Errorf("Erase: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(filepath.Join(dir, "file", "journal")); err == nil {
		t.Error("a journal beneath a file was opened")
	}
}

func TestPort(t *testing.T) {
	ctx := context.Background()
	x := newPair(t, Quirks{}, nil)
	for _, s := range []scsi.Sense{scsi.PowerOnOccurred, NexusLoss, RegistrationsPreempted, scsi.CapacityChanged} {
		x.target.Attention(nexA, s)
	}
	if err := x.sPort.Drain(ctx); err != nil || len(x.sPort.Seen) != 4 {
		t.Errorf("Drain: %v, %v", x.sPort.Seen, err)
	}
	if got := Keep(x.sPort.Seen, false); len(got) != 2 || got[0] != RegistrationsPreempted || got[1] != scsi.CapacityChanged {
		t.Errorf("Keep = %v", got)
	}
	if got := Keep(x.sPort.Seen, true); len(got) != 1 || got[0] != scsi.CapacityChanged {
		t.Errorf("Keep of what we caused = %v", got)
	}
	busy := 3
	x.src.hook = func([]byte) *Answer {
		if busy--; busy >= 0 {
			return &Answer{Status: scsi.BusyStatus}
		}
		return nil
	}
	if _, err := x.sPort.Keys(ctx); err != nil {
		t.Errorf("after BUSY: %v", err)
	}
	x.src.hook = func([]byte) *Answer { a := check(scsi.PowerOnOccurred); return &a }
	if r := x.sPort.Do(ctx, x.pair, Cmd{In: ReadFullStatus}); r.Result != Failed {
		t.Errorf("unit attentions without end: %v", r)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if r := x.sPort.Do(canceled, x.pair, Cmd{Write: true}); r.Result != Failed {
		t.Errorf("past the deadline: %v", r)
	}
	// More registrations than fit the first buffer.
	x.src.hook = nil
	for i := range 700 {
		x.target.Do(Nexus{FC(uint64(100 + i)), 9}, &Out{ServiceKey: Key(i + 1)})
	}
	k, err := x.sPort.Keys(ctx)
	if err != nil || len(k.Keys) != 700 || k.Truncated {
		t.Errorf("Keys = %d keys, truncated %v, %v", len(k.Keys), k.Truncated, err)
	}
	f, err := x.sPort.FullStatus(ctx)
	if err != nil || len(f.Registrations) != 700 {
		t.Errorf("FullStatus = %d registrations, %v", len(f.Registrations), err)
	}
}

// pipe is a scsi.LUN that answers from a reference target.
type pipe struct{ site }

func (p *pipe) Submit(c *scsi.Command) {
	list := make([]byte, c.DataLen())
	list = list[:c.Gather(list)]
	data, a := p.target.Execute(p.nexus, c.CDB, list)
	switch a.Status {
	case scsi.Good:
		c.Finish(max(c.Scatter(data), len(list)))
	case scsi.ReservationConflict:
		c.Conflict()
	default:
		c.Check(a.Sense)
	}
}
func (p *pipe) Reset() error        { return scsi.ErrRejected }
func (p *pipe) Limits() scsi.Limits { return scsi.Limits{} }
func (p *pipe) Close() error        { return nil }

func TestLUN(t *testing.T) {
	ctx := context.Background()
	tg := NewTarget(Quirks{})
	tg.Attention(nexA, scsi.PowerOnOccurred)
	p := Port{Sender: &LUN{LUN: &pipe{site{target: tg, nexus: nexA}}}}
	pair := &Pair{Old: nexA, New: nexB, FullStatus: true}
	if r := p.Do(ctx, pair, Cmd{Write: true, Out: Register, ServiceKey: keyA}); r.Result != Done {
		t.Errorf("REGISTER: %v", r)
	}
	if r := p.Do(ctx, pair, Cmd{Write: true, Out: Register, ServiceKey: keyB}); r.Result != Conflicted {
		t.Errorf("REGISTER again: %v", r)
	}
	if r := p.Do(ctx, pair, Cmd{Write: true, Out: ReplaceLostReservation, Key: keyA}); r.Result != Failed {
		t.Errorf("REPLACE LOST RESERVATION: %v", r)
	}
	if r := p.Do(ctx, pair, Cmd{In: ReadFullStatus, Key: keyA}); r.Result != Done || r.Sight.Old != keyA {
		t.Errorf("READ FULL STATUS: %+v", r)
	}
	if len(p.Seen) != 1 || p.Seen[0] != scsi.PowerOnOccurred {
		t.Errorf("unit attentions: %v", p.Seen)
	}
}

// slow is a scsi.LUN that holds commands back until it is told.
type slow struct {
	pipe
	held chan *scsi.Command
}

func (s *slow) Submit(c *scsi.Command) { s.held <- c }

// A command that was given up is not overtaken by another.
func TestLUNStuck(t *testing.T) {
	tg := NewTarget(Quirks{})
	dev := &slow{pipe{site{target: tg, nexus: nexA}}, make(chan *scsi.Command, 2)}
	l := &LUN{LUN: dev}
	register, list := Out{Action: Register, ServiceKey: keyA}.Encode()
	ctx, cancel := context.WithCancel(context.Background())
	gaveUp := make(chan error)
	go func() {
		_, _, err := l.Send(ctx, register, list, nil)
		gaveUp <- err
	}()
	stuck := <-dev.held
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("Send = %v; want %v", err, context.Canceled)
	}
	if _, _, err := l.Send(ctx, register, list, nil); err == nil || len(dev.held) != 0 {
		t.Errorf("a second command was sent, or not refused: %v", err)
	}
	dev.pipe.Submit(stuck)
	go func() { dev.pipe.Submit(<-dev.held) }()
	if _, a, err := l.Send(context.Background(), register, list, nil); err != nil || a != conflict {
		t.Errorf("Send = %v, %v; want %v: the first one has registered", a, err, conflict)
	}
}

func TestSentences(t *testing.T) {
	for k := Undecided; k <= HandedOver; k++ {
		for r := NoReason; r <= HeldBySPC2; r++ {
			s := Outcome{Kind: k, Reason: r, Key: keyA, Type: WriteExclusive, Stale: true}.Sentence("data")
			if !strings.HasPrefix(s, "data: ") || !strings.HasSuffix(s, ".") || strings.Contains(s, "reason 1") || strings.Contains(s, "%!") {
				t.Errorf("outcome %d, reason %d: %s", k, r, s)
			}
		}
	}
}
