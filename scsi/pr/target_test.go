package pr

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"vmm/scsi"
)

// Three nexuses on one logical unit, and their keys.
var (
	nexA, nexB, nexC = Nexus{FC(0xa), 1}, Nexus{FC(0xb), 1}, Nexus{SAS(0xc), 2}
	keyA, keyB, keyC = Key(0xaa), Key(0xbb), Key(0xcc)
)

// show is a target's state in a line: registrations with a star for holders,
// type, generation, PTPL_A; then the pending unit attentions.
func show(t *Target) string {
	var b strings.Builder
	for _, p := range t.ports {
		name := map[Nexus]string{nexA: "A", nexB: "B", nexC: "C"}[p.Nexus]
		if p.key != 0 {
			fmt.Fprintf(&b, "%s:%x", name, uint64(p.key))
			if t.holds(t.port(p.Nexus)) {
				b.WriteByte('*')
			}
			b.WriteByte(' ')
		}
	}
	fmt.Fprintf(&b, "type %d gen %d", t.typ, t.gen)
	if t.persist {
		b.WriteString(" aptpl")
	}
	for _, p := range t.ports {
		for _, s := range p.pending {
			if s != (scsi.Sense{}) {
				fmt.Fprintf(&b, " ua %s:%02x%02x", map[Nexus]string{nexA: "A", nexB: "B", nexC: "C"}[p.Nexus], s.ASC, s.ASCQ)
			}
		}
	}
	return b.String()
}

// run sends "NEXUS action key sark type" lines; each may end in "= status".
func run(t *testing.T, tg *Target, script string) {
	t.Helper()
	for line := range strings.SplitSeq(script, "\n") {
		if strings.TrimSpace(line) == "" {
			continue
		}
		command, want, checked := strings.Cut(line, "=")
		var from, action string
		var o Out
		if _, err := fmt.Sscanf(command, "%s %s %x %x %d", &from, &action, &o.Key, &o.ServiceKey, &o.Type); err != nil {
			t.Fatalf("script line %q: %v", line, err)
		}
		o.APTPL = strings.HasSuffix(action, "+")
		actions := map[string]OutAction{
			"register": Register, "ignore": RegisterAndIgnoreExistingKey, "reserve": Reserve, "release": Release,
			"clear": Clear, "preempt": Preempt, "abort": PreemptAndAbort, "move": RegisterAndMove, "movekeep": RegisterAndMove,
			"replace": ReplaceLostReservation,
		}
		var ok bool
		if o.Action, ok = actions[strings.TrimSuffix(action, "+")]; !ok {
			t.Fatalf("script line %q: no such action", line)
		}
		nexus := map[string]Nexus{"A": nexA, "B": nexB, "C": nexC}
		if o.Action == RegisterAndMove { // to the nexus that the type column numbers
			o.MoveTo = []Nexus{nexA, nexB, nexC}[o.Type]
			o.Type, o.Unregister = 0, !strings.HasPrefix(action, "movekeep")
		}
		before := show(tg)
		cdb, list := o.Encode()
		_, a := tg.Execute(nexus[from], cdb, list)
		for a.Sense.Key == scsi.UnitAttention {
			_, a = tg.Execute(nexus[from], cdb, list)
		}
		got := strings.TrimSpace(a.String())
		if want := strings.TrimSpace(want); checked && got != want || !checked && !a.OK() {
			t.Errorf("%s: %s; before: %s", line, got, before)
		}
		if !a.OK() && !strings.Contains(before, "ua") && show(tg) != before {
			t.Errorf("%s: refused, yet %q became %q", line, before, show(tg))
		}
	}
}

func TestTarget(t *testing.T) {
	three := "A register 0 aa 0\nB register 0 bb 0\nC register 0 cc 0\n"
	for _, tt := range []struct{ name, script, want string }{
		{"register, change, unregister", `
			A register+ 0 aa 0
			A register aa ab 0
			A register aa ac 0 = RESERVATION CONFLICT
			B register bb bb 0 = RESERVATION CONFLICT
			B register 0 0 0
			B ignore 77 bb 0
			B ignore 77 0 0
			B ignore 77 0 0`, "A:ab type 0 gen 4"},
		{"reserve", three + `
			A reserve aa 0 5
			A reserve aa 0 5
			A reserve aa 0 1 = RESERVATION CONFLICT
			B reserve bb 0 5 = RESERVATION CONFLICT
			A reserve aa 0 2 = CHECK CONDITION 5/24/00
			B reserve aa 0 5 = RESERVATION CONFLICT`, "A:aa* B:bb C:cc type 5 gen 3"},
		{"all registrants reserve", three + `
			A reserve aa 0 7
			B reserve bb 0 7
			B reserve bb 0 8 = RESERVATION CONFLICT`, "A:aa* B:bb* C:cc* type 7 gen 3"},
		{"release", three + `
			A reserve aa 0 5
			B release bb 0 5
			A release aa 0 6 = CHECK CONDITION 5/26/04
			A release aa 0 5`, "A:aa B:bb C:cc type 0 gen 3 ua B:2a04 ua C:2a04"},
		{"release of type 1 is silent", three + "A reserve aa 0 1\nA release aa 0 1", "A:aa B:bb C:cc type 0 gen 3"},
		{"release by any registrant", three + "A reserve aa 0 8\nC release cc 0 8", "A:aa B:bb C:cc type 0 gen 3 ua A:2a04 ua B:2a04"},
		{"the holder unregisters", three + "A reserve aa 0 6\nA register aa 0 0", "B:bb C:cc type 0 gen 4 ua B:2a04 ua C:2a04"},
		{"the holder of type 3 unregisters", three + "A reserve aa 0 3\nA register aa 0 0", "B:bb C:cc type 0 gen 4"},
		{"one of all registrants unregisters", three + "A reserve aa 0 7\nA register aa 0 0", "B:bb* C:cc* type 7 gen 4"},
		{"the last of all registrants", "A register 0 aa 0\nA reserve aa 0 7\nA register aa 0 0", "type 0 gen 2"},
		{"the holder changes its key", three + "A reserve aa 0 1\nA register aa ab 0", "A:ab* B:bb C:cc type 1 gen 4"},
		{"clear", three + "A reserve aa 0 1\nB clear bb 0 0\nA clear aa 0 0 = RESERVATION CONFLICT", "type 0 gen 4 ua C:2a03"},
		{"preempt the holder", three + "A reserve aa 0 5\nB preempt bb aa 5", "B:bb* C:cc type 5 gen 4 ua A:2a05"},
		{"preempt with another type", three + "A reserve aa 0 5\nB preempt bb aa 1", "B:bb* C:cc type 1 gen 4 ua A:2a05 ua C:2a04"},
		{"preempt a registrant", three + "A reserve aa 0 5\nB preempt bb cc 0", "A:aa* B:bb type 5 gen 4 ua C:2a05"},
		{"preempt nobody", three + "B preempt bb dd 1 = RESERVATION CONFLICT", "A:aa B:bb C:cc type 0 gen 3"},
		{"preempt key 0", three + "A reserve aa 0 5\nB preempt bb 0 5 = CHECK CONDITION 5/26/00", "A:aa* B:bb C:cc type 5 gen 3"},
		{"preempt oneself as holder", three + "A reserve aa 0 5\nA abort aa aa 6", "A:aa* B:bb C:cc type 6 gen 4 ua B:2a04 ua C:2a04"},
		{"preempt oneself without a reservation", three + "A preempt aa aa 1", "B:bb C:cc type 0 gen 4"},
		{"preempt a shared key", `
			A register 0 aa 0
			B register 0 aa 0
			C register 0 cc 0
			A reserve aa 0 5
			B preempt aa aa 5`, "B:aa* C:cc type 5 gen 4 ua A:2a05"},
		{"preempt a registrant of all", three + "A reserve aa 0 7\nB preempt bb aa 1", "B:bb* C:cc* type 7 gen 4 ua A:2a05"},
		{"preempt all registrants", three + "A reserve aa 0 7\nB preempt bb 0 1", "B:bb* type 1 gen 4 ua A:2a05 ua C:2a05"},
		{"a holder is preempted by key 0 of nobody", "A register 0 aa 0\nA preempt aa 0 1 = CHECK CONDITION 5/26/00", "A:aa type 0 gen 1"},
		{"move", "A register+ 0 aa 0\nA reserve aa 0 5\nA move aa bb 1", "B:bb* type 5 gen 2"},
		{"move keeps the sender", "A register 0 aa 0\nA reserve aa 0 5\nA movekeep+ aa bb 1", "A:aa B:bb* type 5 gen 2 aptpl"},
		{"move to oneself", "A register 0 aa 0\nA reserve aa 0 5\nA move aa aa 0 = CHECK CONDITION 5/26/00", "A:aa* type 5 gen 1"},
		{"move of nothing", "A register 0 aa 0\nA move aa aa 1 = CHECK CONDITION 5/24/00", "A:aa type 0 gen 1"},
		{"move by a bystander", three + "A reserve aa 0 5\nB move bb bb 2 = RESERVATION CONFLICT", "A:aa* B:bb C:cc type 5 gen 3"},
		{"move of all registrants", three + "A reserve aa 0 7\nA move aa aa 1 = RESERVATION CONFLICT", "A:aa* B:bb* C:cc* type 7 gen 3"},
		{"replace lost", "A replace 0 aa 1 = CHECK CONDITION 5/24/00", "type 0 gen 0"},
		{"a reservation forbids before a field is looked at", `
			A register 0 aa 0
			C register 0 cc 0
			A reserve aa 0 5
			B preempt 0 0 2 = RESERVATION CONFLICT
			B replace 0 bb 1 = RESERVATION CONFLICT
			C reserve cc 0 2 = RESERVATION CONFLICT
			C move cc 0 2 = RESERVATION CONFLICT`, "A:aa* C:cc type 5 gen 2"},
		{"unregistered", `
			A reserve aa 0 1 = RESERVATION CONFLICT
			A release 0 0 1 = RESERVATION CONFLICT
			A clear 0 0 0 = RESERVATION CONFLICT
			A preempt 0 0 1 = RESERVATION CONFLICT
			A move 0 aa 1 = RESERVATION CONFLICT`, "type 0 gen 0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tg := NewTarget(Quirks{})
			run(t, tg, strings.ReplaceAll(tt.script, "\t", ""))
			if got := show(tg); got != tt.want {
				t.Errorf("%s; want %s", got, tt.want)
			}
		})
	}
}

// What targets in the field do differently, each against what was measured
// or read about it.
func TestQuirks(t *testing.T) {
	quirk := map[string]Quirks{}
	for _, q := range Targets {
		quirk[q.Name] = q
	}
	for _, tt := range []struct{ target, script, want string }{
		{"LIO", "A register 0 aa 0\nA preempt aa aa 0 = CHECK CONDITION 5/24/00\nA preempt aa aa 1", "type 0 gen 2"},
		{"LIO", "A register 0 aa 0\nB register 0 aa 0\nA reserve aa 0 7\nB preempt aa aa 1", "B:aa* type 1 gen 3 ua A:2a05"},
		{"LIO", "A reserve aa 0 1 = CHECK CONDITION 2/08/00\nA register+ 0 aa 0\nA clear aa 0 0", "type 0 gen 2"},
		{"LIO", "A move 0 aa 1 = CHECK CONDITION 2/08/00\nB register 0 bb 0\nB reserve bb 0 1\nA release 0 0 1 = RESERVATION CONFLICT", "B:bb* type 1 gen 1"},
		{"LIO", "A register 0 aa 0\nA release bb 0 1\nA reserve aa 0 1\nA release bb 0 1 = RESERVATION CONFLICT", "A:aa* type 1 gen 1"},
		{"LIO", "A register 0 aa 0\nA register+ aa 0 0", "type 0 gen 1 aptpl"},
		// The holder of an all-registrants reservation is who reserved, then
		// who registered first: its key takes the reservation over.
		{"LIO", "B register 0 bb 0\nA register 0 aa 0\nC register 0 cc 0\nC reserve cc 0 7\nC register cc 0 0\nA preempt aa bb 5", "A:aa* type 5 gen 4 ua B:2a05"},
		{"LIO", "B register 0 bb 0\nA register 0 aa 0\nB reserve bb 0 7\nA preempt aa aa 5", "B:bb* A:aa* type 7 gen 3"},
		{"3PAR", "A register 0 aa 0\nA preempt aa aa 0", "A:aa type 0 gen 2"},
		{"SCST", "A register 0 aa 0\nA preempt aa aa 0", "A:aa type 0 gen 2"},
		{"SCST", "A register 0 aa 0\nB register 0 bb 0\nB reserve bb 0 1\nA preempt aa aa 0", "B:bb* type 1 gen 3"},
		{"tgtd", "A register 0 aa 0\nB register 0 bb 0\nA preempt aa bb 0", "A:aa type 0 gen 3 ua B:2a03"},
		{"tgtd", "A register+ 0 aa 0 = CHECK CONDITION 5/26/00\nA abort 0 aa 0 = CHECK CONDITION 5/24/00", "type 0 gen 0"},
	} {
		tg := NewTarget(quirk[tt.target])
		run(t, tg, tt.script)
		if got := show(tg); got != tt.want {
			t.Errorf("%s: %s\n%s; want %s", tt.target, tt.script, got, tt.want)
		}
	}
	if _, a := NewTarget(quirk["tgtd"]).Execute(nexA, In{ReadFullStatus, 100}.CDB(), nil); a != check(scsi.InvalidFieldInCDB) {
		t.Errorf("tgtd answers READ FULL STATUS with %v", a)
	}
	lio := NewTarget(quirk["LIO"])
	run(t, lio, "A register 0 aa 0\nB register 0 bb 0\nA reserve aa 0 5")
	reserve, tur := []byte{scsi.OpReserve6}, []byte{scsi.OpTestUnitReady}
	for n, want := range map[Nexus]Answer{nexA: good, nexB: conflict} {
		if _, a := lio.Execute(n, reserve, nil); a != want {
			t.Errorf("LIO: RESERVE(6) from %v under type 5: %v; want %v", n, a, want)
		}
	}
	lio.Attention(nexA, scsi.PowerOnOccurred)
	lio.Attention(nexA, RegistrationsPreempted)
	for i, want := range []Answer{check(scsi.PowerOnOccurred), good} {
		if _, a := lio.Execute(nexA, tur, nil); a != want {
			t.Errorf("LIO: command %d with two unit attentions pending: %v; want %v", i, a, want)
		}
	}
	merged := NewTarget(quirk["3PAR"])
	one, two := Nexus{FC(1), 1}, Nexus{FC(1), 2}
	merged.Do(one, &Out{ServiceKey: keyA})
	merged.Do(two, &Out{ServiceKey: keyB})
	if got := merged.Key(one); got != keyB {
		t.Errorf("3PAR: the other path has %v; want %v", got, keyB)
	}
}

func TestRegisterOtherPorts(t *testing.T) {
	tg := NewTarget(Quirks{})
	o := Out{ServiceKey: keyA, SpecifyPorts: true, Ports: []TransportID{nexB.Initiator}}
	if a := tg.Do(nexA, &o); !a.OK() || show(tg) != "A:aa B:aa type 0 gen 1" {
		t.Errorf("SPEC_I_PT: %v, %s", a, show(tg))
	}
	o.Key = keyA
	if a := tg.Do(nexA, &o); a != check(scsi.InvalidFieldInList) {
		t.Errorf("SPEC_I_PT of a registered nexus: %v", a)
	}
	o.Key = 0
	if a := tg.Do(Nexus{FC(9), 1}, &o); a != conflict {
		t.Errorf("SPEC_I_PT of a port that is registered: %v", a)
	}
}

func TestPowerCycle(t *testing.T) {
	tg := NewTarget(Quirks{})
	run(t, tg, "A register+ 0 aa 0\nA reserve aa 0 1")
	tg.PowerCycle()
	if got, want := show(tg), "A:aa* type 1 gen 0 aptpl ua A:2900"; got != want {
		t.Errorf("with APTPL: %s; want %s", got, want)
	}
	run(t, tg, "A register aa aa 0")
	tg.PowerCycle()
	if got, want := show(tg), "type 0 gen 0 ua A:2900"; got != want {
		t.Errorf("without: %s; want %s", got, want)
	}
}

func TestUnitAttentions(t *testing.T) {
	tg := NewTarget(Quirks{})
	tg.Attention(nexA, scsi.PowerOnOccurred)
	tg.Attention(nexA, scsi.PowerOnOccurred)
	tg.Attention(nexA, NexusLoss)
	tur, inquiry := []byte{scsi.OpTestUnitReady, 0, 0, 0, 0, 0}, []byte{scsi.OpInquiry, 0, 0, 0, 36, 0}
	for i, want := range []Answer{good, check(scsi.PowerOnOccurred), check(NexusLoss), good} {
		cdb := tur
		if i == 0 {
			cdb = inquiry // neither answered with it nor clearing it
		}
		if _, got := tg.Execute(nexA, cdb, nil); got != want {
			t.Errorf("command %d: %v; want %v", i, got, want)
		}
	}
	if _, got := tg.Execute(nexB, tur, nil); got != good {
		t.Errorf("another nexus: %v", got)
	}
}

// The tables of SPC-5 5.14.1 and SBC-4 4.17 for commands of others.
func TestConflicts(t *testing.T) {
	commands := map[string][]byte{
		"INQUIRY":                  {scsi.OpInquiry},
		"TEST UNIT READY":          {scsi.OpTestUnitReady},
		"PERSISTENT RESERVE IN":    In{ReadKeys, 8}.CDB(),
		"READ CAPACITY(16)":        {scsi.OpServiceActionIn16, scsi.SAReadCapacity16},
		"GET LBA STATUS":           {scsi.OpServiceActionIn16, scsi.SAGetLBAStatus},
		"READ(10)":                 {scsi.OpRead10},
		"MODE SENSE(6)":            {scsi.OpModeSense6},
		"WRITE(16)":                {scsi.OpWrite16},
		"UNMAP":                    {scsi.OpUnmap},
		"SYNCHRONIZE CACHE(10)":    {scsi.OpSynchronizeCache10},
		"REPORT TARGET PORT GRPS":  {scsi.OpMaintenanceIn, scsi.SAReportTargetPortGroups},
		"START":                    {scsi.OpStartStopUnit, 0, 0, 0, 1, 0},
		"STOP":                     {scsi.OpStartStopUnit, 0, 0, 0, 0, 0},
		"unknown vendor's command": {0xc1},
		"cut off":                  {scsi.OpStartStopUnit},
	}
	free := []string{"INQUIRY", "TEST UNIT READY", "PERSISTENT RESERVE IN", "READ CAPACITY(16)", "REPORT TARGET PORT GRPS", "START"}
	read := append([]string{"GET LBA STATUS", "READ(10)", "MODE SENSE(6)"}, free...)
	everything := make([]string, 0, len(commands))
	for name := range commands {
		everything = append(everything, name)
	}
	for _, tt := range []struct {
		typ          Type
		registered   []string // what a registrant that does not hold may send
		unregistered []string
	}{
		{None, everything, everything},
		{WriteExclusive, read, read},
		{ExclusiveAccess, free, free},
		{WriteExclusiveRegistrantsOnly, everything, read},
		{ExclusiveAccessRegistrantsOnly, everything, free},
		{WriteExclusiveAllRegistrants, everything, read},
		{ExclusiveAccessAllRegistrants, everything, free},
	} {
		tg := NewTarget(Quirks{})
		run(t, tg, "A register 0 aa 0\nB register 0 bb 0")
		if tt.typ != None {
			run(t, tg, fmt.Sprintf("A reserve aa 0 %d", tt.typ))
		}
		for who, allowed := range map[Nexus][]string{nexA: everything, nexB: tt.registered, nexC: tt.unregistered} {
			got := map[string]bool{}
			want := map[string]bool{}
			for _, name := range allowed {
				want[name] = true
			}
			for name, cdb := range commands {
				if _, a := tg.Execute(who, cdb, nil); a.OK() {
					got[name] = true
				} else if a != conflict {
					t.Errorf("%v: %s: %v", tt.typ, name, a)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%v: %v may send %s", tt.typ, who, diff)
			}
		}
	}
	lio := NewTarget(Quirks{CapacityReserved: true})
	run(t, lio, "A register 0 aa 0\nA reserve aa 0 3")
	if _, a := lio.Execute(nexB, commands["READ CAPACITY(16)"], nil); a != conflict {
		t.Errorf("LIO: READ CAPACITY(16) under Exclusive Access: %v", a)
	}
}

func TestReserveUnit(t *testing.T) {
	tur, read := []byte{scsi.OpTestUnitReady}, []byte{scsi.OpRead10}
	reserve, release := []byte{scsi.OpReserve6}, []byte{scsi.OpRelease10}
	register, list := Out{ServiceKey: keyA}.Encode()
	tg := NewTarget(Quirks{})
	send := func(who Nexus, cdb []byte, want Answer) {
		t.Helper()
		if _, got := tg.Execute(who, cdb, list); got != want {
			t.Errorf("% x from %v: %v; want %v", cdb, who, got, want)
		}
	}
	send(nexA, reserve, good)
	send(nexA, reserve, good)
	send(nexA, read, good)
	send(nexB, reserve, conflict)
	send(nexB, release, good) // does nothing
	send(nexB, tur, conflict)
	send(nexB, []byte{scsi.OpInquiry}, good)
	send(nexB, register, conflict)
	send(nexB, In{ReadKeys, 8}.CDB(), conflict)
	send(nexA, register, conflict) // SPC-2 5.5.1: not even its own
	send(nexA, release, good)
	send(nexB, register, good)
	send(nexA, reserve, conflict)
	send(nexB, reserve, conflict) // registered, but there is no reservation
	run(t, tg, "B reserve aa 0 1")
	send(nexB, reserve, good) // compatible reservation handling
	send(nexB, release, good)
	tg.Quirks.NoSPC2Compatible = true
	send(nexB, reserve, conflict)
	tg = NewTarget(Quirks{})
	send(nexA, reserve, good)
	tg.LoseNexus(nexB)
	send(nexB, read, conflict)
	tg.LoseNexus(nexA)
	send(nexB, read, good)
}

// Whatever the commands: a refused one changes nothing, only RESERVE, RELEASE
// and refused ones leave PRgeneration alone, what the PERSISTENT RESERVE IN
// commands say agrees, a reservation has a registered holder, and the sender
// is never the one who gets a unit attention.
func TestTargetProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := rapid.SampledFrom(Targets).Draw(t, "target")
		tg := NewTarget(q)
		nexuses := []Nexus{nexA, nexB, nexC}
		keys := rapid.SampledFrom([]Key{0, keyA, keyB, keyC})
		for range rapid.IntRange(1, 40).Draw(t, "commands") {
			who := rapid.SampledFrom(nexuses).Draw(t, "nexus")
			o := Out{
				Action: OutAction(rapid.IntRange(0, 8).Draw(t, "action")), Type: Type(rapid.IntRange(0, 8).Draw(t, "type")),
				Key: keys.Draw(t, "key"), ServiceKey: keys.Draw(t, "service key"), APTPL: rapid.Bool().Draw(t, "aptpl"),
			}
			if o.Action == RegisterAndMove {
				o.MoveTo, o.Unregister = rapid.SampledFrom(nexuses).Draw(t, "to"), rapid.Bool().Draw(t, "unreg")
			}
			for n := range nexuses {
				tg.ports[tg.port(nexuses[n])].pending = [4]scsi.Sense{}
			}
			before := tg.Clone()
			cdb, list := o.Encode()
			_, a := tg.Execute(who, cdb, list)
			changed := cmp.Diff(before.ports, tg.ports, cmp.AllowUnexported(port{})) != "" || before.typ != tg.typ ||
				before.holder != tg.holder || before.persist != tg.persist
			switch {
			case !a.OK() && (changed || tg.gen != before.gen):
				t.Fatalf("%+v was refused (%v), yet %s became %s", o, a, show(before), show(tg))
			case a.OK() && o.ServiceKey == 0 && q.UnregisterQuiet && (o.Action == Register || o.Action == RegisterAndIgnoreExistingKey):
			case a.OK() && o.Action != Reserve && o.Action != Release && changed && tg.gen != before.gen+1:
				t.Fatalf("%+v: generation %d became %d", o, before.gen, tg.gen)
			case (o.Action == Reserve || o.Action == Release) && tg.gen != before.gen:
				t.Fatalf("%+v changed the generation", o)
			}
			if s, pending := tg.Pending(who); pending {
				t.Fatalf("%+v: its sender got %v", o, s)
			}
			if tg.typ.Single() && tg.ports[tg.holder].key == 0 || tg.typ.AllRegistrants() && !tg.registered() {
				t.Fatalf("%+v: reserved without a registered holder: %s", o, show(tg))
			}
			data, _ := tg.Execute(who, In{ReadKeys, 8192}.CDB(), nil)
			k, err := ParseKeys(data)
			if err != nil {
				t.Fatal(err)
			}
			data, _ = tg.Execute(who, In{ReadReservation, 8192}.CDB(), nil)
			r, err := ParseReservation(data)
			if err != nil {
				t.Fatal(err)
			}
			f := tg.Status()
			var fromFull []Key
			for _, reg := range f.Registrations {
				fromFull = append(fromFull, reg.Key)
				if reg.Holder && (reg.Type != r.Type || r.Key != 0 && reg.Key != r.Key) {
					t.Fatalf("READ FULL STATUS %+v, READ RESERVATION %+v", reg, r)
				}
			}
			if diff := cmp.Diff(fromFull, k.Keys); diff != "" {
				t.Fatalf("READ KEYS and READ FULL STATUS differ: %s", diff)
			}
		}
	})
}
