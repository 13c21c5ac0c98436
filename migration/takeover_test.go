package migration

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// What the guest has on the disk it has afterwards, from its new nexus.
func TestReservationsMove(t *testing.T) {
	for _, q := range pr.Targets {
		for _, typ := range []pr.Type{pr.None, 1, 3, 5, 6, 7, 8} {
			d := newDisk(q)
			d.do(nexS, pr.Out{ServiceKey: keyGuest})
			d.do(nexO, pr.Out{ServiceKey: keyOther})
			if typ != pr.None {
				d.do(nexS, pr.Out{Action: pr.Reserve, Key: keyGuest, Type: typ})
			}
			none := newDisk(q)                         // a LUN that the guest has no key on
			r := newRig(t, 1<<20, d, none, newDisk(q)) // and one without reservations at all
			r.src.luns[2].Preflight, r.host.luns[2].Preflight = nil, nil
			arrived := r.receiving()
			sum, err := r.migrate()
			if err != nil {
				t.Fatalf("%s, type %d: %v", q.Name, typ, err)
			}
			want := pr.Moved
			if typ == pr.None {
				want = pr.RegistrationOnly
			}
			holder, got := d.holder()
			if r.settledD["0"].Kind != want || d.key(nexS) != 0 || d.key(nexD) != keyGuest || got != typ || typ.Single() && holder != nexD || d.key(nexO) != keyOther {
				t.Errorf("%s, type %d: outcome %+v; source %v, destination %v, %v holds type %d", q.Name, typ, r.settledD["0"], d.key(nexS), d.key(nexD), holder, got)
			}
			if r.settledD["1"].Kind != pr.NothingHeld || len(r.settledD) != 2 || len(r.settledS) != 0 {
				t.Errorf("%s: the destination's outcomes %v, the source's %v", q.Name, r.settledD, r.settledS)
			}
			if len(sum.LUNs) != 2 || !strings.Contains(sum.LUNs[0].Sentence, keyGuest.String()) || len(sum.Left) != 2 {
				t.Errorf("%s: summary %+v", q.Name, sum)
			}
			<-(<-arrived).Answered
			for _, dir := range []*pr.Journal{r.opts.Journal, r.intents()} {
				if e, err := dir.Entries(); err != nil || len(e) != 0 {
					t.Errorf("%s, type %d: a journal still has %+v, %v", q.Name, typ, e, err)
				}
			}
		}
	}
}

func (r *rig) intents() *pr.Journal {
	j, err := pr.OpenJournal(r.recv.StateDir)
	if err != nil {
		r.Fatal(err)
	}
	return j
}

// A third node preempts the guest's key before each of our commands: the guest
// is fenced wherever it runs, is told so, and is registered nowhere.
func TestThirdNodePreempts(t *testing.T) {
	for _, q := range pr.Targets {
		for _, typ := range []pr.Type{pr.None, pr.WriteExclusiveRegistrantsOnly} {
			t.Run(fmt.Sprintf("%s/type %d", q.Name, typ), func(t *testing.T) {
				t.Parallel()
				at := 1
				for preempted(t, q, typ, at) {
					at++
				}
				if at <= 8 {
					t.Errorf("only %d commands of ours", at-1)
				}
			})
		}
	}
}

// preempted says whether the migration had that many commands.
func preempted(t *testing.T, q pr.Quirks, typ pr.Type, at int) (fenced bool) {
	d := newDisk(q)
	d.do(nexS, pr.Out{ServiceKey: keyGuest})
	d.do(nexO, pr.Out{ServiceKey: keyOther})
	if typ != pr.None {
		d.do(nexS, pr.Out{Action: pr.Reserve, Key: keyGuest, Type: typ})
	}
	r := newRig(t, 1<<20, d)
	var told []scsi.Sense
	r.host.luns[0].Settled = func(o pr.Outcome, s []scsi.Sense) { r.settled(r.settledD, "0", o); told = s }
	d.at, d.act = at, func(tg *pr.Target) {
		fenced = true
		tg.Do(nexO, &pr.Out{Action: pr.Preempt, Key: keyOther, ServiceKey: keyGuest, Type: pr.WriteExclusiveRegistrantsOnly})
	}
	r.receiving()
	_, err := r.migrate()
	d.mu.Lock()
	defer d.mu.Unlock()
	if !fenced {
		return false
	}
	if err != nil && !errors.Is(err, ErrKept) || r.src.g.runs.Load() != 1 {
		t.Errorf("fenced before command %d: %v; the guest runs %d times", at, err, r.src.g.runs.Load())
	}
	if a, b := d.target.Key(nexS), d.target.Key(nexD); a != 0 || b != 0 || d.target.Key(nexO) != keyOther {
		t.Errorf("fenced before command %d: source has %v, destination %v; %+v", at, a, b, r.settledD)
	}
	for _, reg := range d.target.Status().Registrations {
		if typ != pr.None && reg.Nexus == nexO && !reg.Holder {
			t.Errorf("fenced before command %d: the fencer lost its reservation", at)
		}
	}
	if o := r.settledD["0"]; o.Kind == pr.FencedMeanwhile && !slices.Contains(told, pr.RegistrationsPreempted) {
		t.Errorf("fenced before command %d: the guest is told %v", at, told)
	}
	return true
}

// Unit attentions that the guest has not seen travel with it.
func TestAttentionsTravel(t *testing.T) {
	d := reserved(pr.WriteExclusiveRegistrantsOnly)
	r := newRig(t, 1<<20, d)
	var told []scsi.Sense
	r.host.luns[0].Settled = func(_ pr.Outcome, s []scsi.Sense) { told = s }
	r.src.inPause = func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.target.Attention(nexS, scsi.CapacityChanged)
		d.target.Attention(nexS, scsi.PowerOnOccurred)
	}
	r.receiving()
	if _, err := r.migrate(); err != nil {
		t.Fatal(err)
	}
	if len(told) != 1 || told[0] != scsi.CapacityChanged {
		t.Errorf("the guest is told %v; want %v alone", told, scsi.CapacityChanged)
	}
}

// Two processes on one host that share a nexus change nothing on the disk.
func TestOneNexus(t *testing.T) {
	d := reserved(pr.WriteExclusive)
	r := newRig(t, 1<<20, d)
	n := r.host.luns[0]
	n.BootID, n.Address, n.Nexus = r.src.luns[0].BootID, r.src.luns[0].Address, pr.Nexus{}
	n.Port.Sender.(*site).nexus = nexS
	before := d.target.Status().Generation
	r.receiving()
	if _, err := r.migrate(); err != nil {
		t.Fatal(err)
	}
	if o := r.settledD["0"]; o.Kind != pr.Kept || d.key(nexS) != keyGuest || d.target.Status().Generation != before {
		t.Errorf("outcome %+v, key %v, PRgeneration %d; want %d", o, d.key(nexS), d.target.Status().Generation, before)
	}
}

// All LUNs go at the same time: each command is answered only when one of
// every LUN was sent.
func TestLUNsGoTogether(t *testing.T) {
	const n = 6
	var disks []*disk
	for range n {
		disks = append(disks, reserved(pr.WriteExclusiveRegistrantsOnly))
	}
	r := newRig(t, 1<<20, disks...)
	in, out := make(chan struct{}), make(chan struct{})
	go func() {
		for range n {
			<-in
		}
		close(out)
	}()
	for _, d := range disks {
		d.at, d.act = 1, func(*pr.Target) { in <- struct{}{}; <-out }
	}
	r.opts.Deadlines.Ready, r.recv.Deadlines.Ready = time.Minute, time.Minute
	r.receiving()
	within(t, "the migration", func() {
		if _, err := r.migrate(); err != nil {
			t.Error(err)
		}
	})
	for i, d := range disks {
		if d.key(nexD) != keyGuest || d.key(nexS) != 0 {
			t.Errorf("LUN %d: source %v, destination %v", i, d.key(nexS), d.key(nexD))
		}
	}
}

func TestReservationsOnTheWire(t *testing.T) {
	for k := pr.State; k <= pr.AskUnregister; k++ {
		if steps[k] == 0 {
			continue
		}
		for _, res := range []pr.Result{pr.Done, pr.Conflicted, pr.Failed} {
			m := pr.Msg{Kind: k, Result: res, Type: 5, Persist: true, Fenced: true, Key: 1<<63 | 7}
			w := encodeReservation(3, m)
			if got, err := decodeReservation(w); err != nil || got != m || w.Lun != 3 {
				t.Errorf("decode(encode(%+v)) = %+v, %v", m, got, err)
			}
		}
	}
	for _, w := range []*vmmv1.Reservation{
		{}, {Step: 1}, {Step: 99, Result: 1}, {Step: 1, Result: 99}, {Step: 1, Result: 1, Type: 16},
	} {
		if m, err := decodeReservation(w); err == nil {
			t.Errorf("decode(%v) = %+v; want an error", w, m)
		}
	}
	senses := []scsi.Sense{scsi.CapacityChanged, pr.RegistrationsPreempted}
	if got, err := decodeSenses(encodeSenses(senses)); err != nil || fmt.Sprint(got) != fmt.Sprint(senses) {
		t.Errorf("senses: %v, %v", got, err)
	}
	for _, w := range [][]uint32{{0x05_2a_03}, {0x01_06_2a_03}, make([]uint32, maxAttentions+1)} {
		if got, err := decodeSenses(w); err == nil {
			t.Errorf("decodeSenses(%#x) = %v; want an error", w, got)
		}
	}
}
