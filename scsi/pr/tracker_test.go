package pr

import (
	"testing"

	"pgregory.net/rapid"

	"vmm/scsi"
)

func TestTracker(t *testing.T) {
	type step struct {
		out      Out
		answered bool
		status   scsi.Status
	}
	good := func(o Out) step { return step{o, true, scsi.Good} }
	for _, tt := range []struct {
		name  string
		steps []step
		want  Tracked
	}{
		{"register and reserve", []step{
			good(Out{Action: Register, ServiceKey: keyA, APTPL: true}),
			good(Out{Action: Reserve, Key: keyA, Type: WriteExclusiveRegistrantsOnly}),
		}, Tracked{Key: keyA, Type: WriteExclusiveRegistrantsOnly, Persist: true}},
		{"refused commands", []step{
			{Out{Action: Register, ServiceKey: keyA}, true, scsi.ReservationConflict},
			{Out{Action: Reserve, Key: keyB, Type: WriteExclusive}, true, scsi.ReservationConflict},
		}, Tracked{}},
		{"a rebooted guest", []step{good(Out{Action: Reserve, Key: keyA, Type: WriteExclusive})}, Tracked{Key: keyA, Type: WriteExclusive}},
		{"do nothing", []step{
			good(Out{Action: RegisterAndIgnoreExistingKey, Key: keyB, ServiceKey: keyA, APTPL: true}),
			good(Out{Action: Register}),
		}, Tracked{Key: keyA, Persist: true}},
		{"an error that may have worked", []step{
			{Out{Action: Register, ServiceKey: keyA}, true, scsi.CheckCondition},
		}, Tracked{Key: keyA, Doubt: true}},
		{"no answer", []step{
			good(Out{Action: Register, ServiceKey: keyA}),
			{Out{Action: Register, Key: keyA}, false, 0},
		}, Tracked{Key: keyA, Doubt: true}},
		{"release and clear", []step{
			good(Out{Action: Reserve, Key: keyA, Type: WriteExclusive}),
			good(Out{Action: Release, Key: keyA, Type: WriteExclusive}),
		}, Tracked{Key: keyA}},
		{"RELEASE is GOOD with a wrong key, where it releases nothing", []step{
			good(Out{Action: Register, ServiceKey: keyA}),
			good(Out{Action: Release, Key: keyB, Type: WriteExclusive}),
		}, Tracked{Key: keyA}},
		{"clear", []step{
			good(Out{Action: Reserve, Key: keyA, Type: WriteExclusive}),
			good(Out{Action: Clear, Key: keyA}),
		}, Tracked{}},
		{"unregister", []step{
			good(Out{Action: Reserve, Key: keyA, Type: WriteExclusive}),
			good(Out{Action: Register, Key: keyA}),
		}, Tracked{}},
		{"preempt", []step{good(Out{Action: Preempt, Key: keyA, ServiceKey: keyB, Type: WriteExclusive})}, Tracked{Key: keyA, Doubt: true}},
		{"moved away", []step{
			good(Out{Action: Reserve, Key: keyA, Type: WriteExclusive}),
			good(Out{Action: RegisterAndMove, Key: keyA, ServiceKey: keyB, Unregister: true, MoveTo: nexB}),
		}, Tracked{}},
	} {
		var tr Tracker
		for _, s := range tt.steps {
			cdb, list := s.out.Encode()
			if !Concerns(cdb[0]) {
				t.Errorf("%s: PERSISTENT RESERVE OUT is not tracked", tt.name)
			}
			if r := tr.Before(cdb, list); r != nil {
				t.Errorf("%s: refused: %v", tt.name, r)
			}
			tr.After(cdb, list, s.answered, s.status)
		}
		if got := tr.State(); got != tt.want {
			t.Errorf("%s: %+v; want %+v", tt.name, got, tt.want)
		}
	}
}

func TestTrackerSPC2(t *testing.T) {
	var tr Tracker
	tr.After([]byte{scsi.OpReserve6, 0, 0, 0, 0, 0}, nil, true, scsi.Good)
	if !tr.State().SPC2 {
		t.Error("RESERVE was not noticed")
	}
	tr.After([]byte{scsi.OpReserve10}, nil, true, scsi.ReservationConflict)
	if !tr.State().SPC2 {
		t.Error("a refused RESERVE ended the reservation")
	}
	tr.LoseNexus()
	if tr.State().SPC2 {
		t.Error("a reset did not end it")
	}
	tr.After([]byte{scsi.OpReserve10}, nil, true, scsi.Good)
	tr.After([]byte{scsi.OpRelease10}, nil, true, scsi.Good)
	if tr.State().SPC2 {
		t.Error("RELEASE was not noticed")
	}
	if Concerns(scsi.OpRead10) || Concerns(scsi.OpWrite16) || Concerns(scsi.OpTestUnitReady) {
		t.Error("ordinary commands are tracked")
	}
}

func TestMask(t *testing.T) {
	cdb := In{ReportCapabilities, 8}.CDB()
	data := Capabilities{CompatibleSPC2: true, SpecifyPorts: true, AllTargetPorts: true, Persist: true}.Append(nil)
	MaskIn(cdb, data, len(data))
	c, err := ParseCapabilities(data)
	if err != nil || c.SpecifyPorts || c.AllTargetPorts || !c.CompatibleSPC2 || !c.Persist {
		t.Errorf("masked to %+v, %v", c, err)
	}
	for n := range 4 { // a short transfer leaves what was not transferred alone
		data := []byte{0, 8, 0xff, 0xff}
		MaskIn(cdb, data[:n], 8)
		if n < 3 && data[2] != 0xff {
			t.Errorf("%d bytes: changed a byte beyond", n)
		}
	}
	other := []byte{0, 0, 0xff}
	MaskIn(In{ReadKeys, 8}.CDB(), other, 3)
	if other[2] != 0xff {
		t.Error("READ KEYS was masked")
	}
	var tr Tracker
	for _, o := range []Out{
		{Action: Register, ServiceKey: keyA, AllTargetPorts: true},
		{Action: RegisterAndIgnoreExistingKey, ServiceKey: keyA, AllTargetPorts: true},
		{Action: Register, ServiceKey: keyA, SpecifyPorts: true, Ports: []TransportID{FC(1)}},
	} {
		r := tr.Before(o.Encode())
		if r == nil || r.Sense != scsi.InvalidFieldInList {
			t.Errorf("%+v: %v; want %v", o, r, scsi.InvalidFieldInList)
		}
	}
}

// Unless it says that it is in doubt, or somebody else interfered, the tracker
// believes what the disk says; and it takes no notice of what was refused.
func TestTrackerFollowsTheDisk(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tg := NewTarget(rapid.SampledFrom(Targets).Draw(t, "target"))
		var tr Tracker
		keys := rapid.SampledFrom([]Key{0, keyA, keyB})
		for range rapid.IntRange(1, 30).Draw(t, "commands") {
			o := Out{
				Action: OutAction(rapid.IntRange(0, 8).Draw(t, "action")), Type: Type(rapid.IntRange(0, 8).Draw(t, "type")),
				Key: keys.Draw(t, "key"), ServiceKey: keys.Draw(t, "service key"), APTPL: rapid.Bool().Draw(t, "aptpl"),
			}
			if o.Action == RegisterAndMove {
				o.MoveTo = nexB
			}
			cdb, list := o.Encode()
			_, a := tg.Execute(nexA, cdb, list)
			before := tr.State()
			tr.After(cdb, list, true, a.Status)
			if a == conflict && tr.State() != before {
				t.Fatalf("%+v: %+v became %+v by a conflict", o, before, tr.State())
			}
			if o.Action == RegisterAndMove && a.OK() {
				return // B holds from here on
			}
			got := tr.State()
			if a.Status == scsi.CheckCondition || got.Doubt {
				got.Key, got.Type = tg.Key(nexA), None // as the disk is read
				if i := tg.port(nexA); tg.holds(i) {
					got.Type = tg.typ
				}
				got.Doubt = false
				tr.Learn(got)
			}
			want := Tracked{Key: tg.Key(nexA), Persist: got.Persist}
			if tg.holds(tg.port(nexA)) {
				want.Type = tg.typ
			}
			if got != want {
				t.Fatalf("%+v (%v): the tracker has %+v; the disk %+v", o, a, got, want)
			}
		}
	})
}
