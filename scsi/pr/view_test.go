package pr

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"vmm/scsi"
)

// Whatever the target can tell, the view says who is registered, who holds,
// and which registration is ours; and looking changes nothing.
func TestView(t *testing.T) {
	for _, q := range Targets {
		tg := NewTarget(q)
		x := &site{target: tg, nexus: nexA}
		p := &Port{Sender: x}
		do := func(n Nexus, o Out) {
			t.Helper()
			if a := tg.Do(n, &o); !a.OK() {
				t.Fatalf("%+v: %v", o, a)
			}
		}
		view := func() View {
			t.Helper()
			v, err := p.View(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		if v := view(); len(v.Registrations) != 0 || v.Held.Type != None || v.With(nexA, keyA) != -1 {
			t.Errorf("%s: an empty target shows %+v", q.Name, v)
		}
		do(nexB, Out{Action: Register, ServiceKey: keyB})
		do(nexA, Out{Action: Register, ServiceKey: keyA})
		do(nexA, Out{Action: Reserve, Key: keyA, Type: WriteExclusiveRegistrantsOnly})
		before := tg.Clone()
		v := view()
		var keys []Key
		for _, r := range v.Registrations {
			keys = append(keys, r.Key)
		}
		if want := []Key{keyA, keyB}; !cmp.Equal(keys, want) && !cmp.Equal(keys, []Key{keyB, keyA}) {
			t.Errorf("%s: keys %v; want %v", q.Name, keys, want)
		}
		if v.FullStatus == q.NoFullStatus || v.Generation != 2 || v.Held.Type != WriteExclusiveRegistrantsOnly || v.Held.Key != keyA {
			t.Errorf("%s: %+v", q.Name, v)
		}
		at := v.With(Nexus{}, keyA)
		if at < 0 || v.Registrations[at].Key != keyA || v.FullStatus && v.Registrations[at].Nexus != nexA {
			t.Errorf("%s: ours is %d of %+v", q.Name, at, v.Registrations)
		}
		if v.FullStatus && v.With(nexC, keyA) != -1 {
			t.Errorf("%s: a nexus that is not registered is found", q.Name)
		}
		if !before.equal(tg) {
			t.Errorf("%s: looking changed the target", q.Name)
		}

		do(nexB, Out{Action: Register, Key: keyB, ServiceKey: keyA})
		v = view()
		if got := v.With(Nexus{}, keyA); got != -1 {
			t.Errorf("%s: %d is ours by a key that two nexuses have", q.Name, got)
		}
		if got := v.With(nexB, 0); v.FullStatus && v.Registrations[got].Nexus != nexB {
			t.Errorf("%s: %d is not nexus B", q.Name, got)
		}
	}
}

// OwnKey finds the nexus's own key among others, and leaves keys, holder and
// APTPL as they are.
func TestOwnKey(t *testing.T) {
	for _, q := range Targets {
		for _, test := range []struct {
			name  string
			keys  map[Nexus]Key
			holds bool
			want  Key
		}{
			{"nobody", nil, false, 0},
			{"others", map[Nexus]Key{nexB: keyB, nexC: keyC}, false, 0},
			{"alone", map[Nexus]Key{nexA: keyA}, false, keyA},
			{"holder among others", map[Nexus]Key{nexA: keyA, nexB: keyB, nexC: keyC}, true, keyA},
			{"a shared key", map[Nexus]Key{nexA: keyB, nexB: keyB}, false, keyB},
		} {
			tg := NewTarget(q)
			for _, n := range []Nexus{nexC, nexB, nexA} {
				tg.port(n)
				if k := test.keys[n]; k != 0 {
					tg.Do(n, &Out{Action: Register, ServiceKey: k, APTPL: !q.NoPersist})
				}
			}
			if test.holds {
				tg.Do(nexA, &Out{Action: Reserve, Key: keyA, Type: ExclusiveAccess})
			}
			before := tg.Clone()
			p := &Port{Sender: &site{target: tg, nexus: nexA}}
			v, err := p.View(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got, err := p.OwnKey(t.Context(), v)
			if err != nil || got != test.want {
				t.Errorf("%s: %s: OwnKey() = %v, %v; want %v", q.Name, test.name, got, err, test.want)
			}
			before.gen = tg.gen
			if !before.equal(tg) {
				t.Errorf("%s: %s: OwnKey changed the target", q.Name, test.name)
			}
		}
	}
}

// Unregister takes this nexus's key and no other's.
func TestUnregister(t *testing.T) {
	for _, q := range Targets {
		tg := NewTarget(q)
		tg.Do(nexA, &Out{Action: Register, ServiceKey: keyA})
		tg.Do(nexB, &Out{Action: Register, ServiceKey: keyB})
		p := &Port{Sender: &site{target: tg, nexus: nexA}}
		for _, step := range []struct {
			key  Key
			done bool
			left Key // of nexus A
		}{{keyB, false, keyA}, {keyA, true, 0}, {keyA, false, 0}} {
			v := tg.View()
			done, err := p.Unregister(t.Context(), v, step.key)
			if done != step.done || err != nil || tg.Key(nexA) != step.left || tg.Key(nexB) != keyB {
				t.Errorf("%s: Unregister(%v) = %v, %v; A has %v, B %v", q.Name, step.key, done, err, tg.Key(nexA), tg.Key(nexB))
			}
			registered, err := p.Registered(t.Context(), tg.View())
			if registered != (step.left != 0) || err != nil {
				t.Errorf("%s: Registered() = %v, %v with key %v", q.Name, registered, err, step.left)
			}
		}
	}
}

func TestViewOfDiskWithoutReservations(t *testing.T) {
	x := &site{target: NewTarget(Quirks{}), nexus: nexA, hook: func([]byte) *Answer { a := check(scsi.InvalidOpcode); return &a }}
	_, err := (&Port{Sender: x}).View(t.Context())
	if !Unsupported(err) || !strings.Contains(err.Error(), "READ RESERVATION: CHECK CONDITION") {
		t.Errorf("View() = %v; want that it is unsupported", err)
	}
	x.hook = func([]byte) *Answer { a := check(scsi.InternalTargetFailed); return &a }
	if _, err := (&Port{Sender: x}).View(t.Context()); err == nil || Unsupported(err) {
		t.Errorf("View() = %v; want an error that says nothing about support", err)
	}
}
