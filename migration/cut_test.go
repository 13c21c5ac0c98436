package migration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"vmm/scsi/pr"
)

// shortly is deadlines for links that say nothing: a side that a loaded
// machine keeps past one gives up, which these tests allow.
var shortly = Deadlines{
	Connect: 300 * time.Millisecond, Idle: 150 * time.Millisecond, Drain: time.Second, Ready: 150 * time.Millisecond,
	Ask: 50 * time.Millisecond, Running: 100 * time.Millisecond, Answer: time.Minute,
}

func reserved(typ pr.Type) *disk {
	d := newDisk(pr.Quirks{})
	d.do(nexS, pr.Out{ServiceKey: keyGuest})
	d.do(nexO, pr.Out{ServiceKey: keyOther})
	if typ != pr.None {
		d.do(nexS, pr.Out{Action: pr.Reserve, Key: keyGuest, Type: typ})
	}
	return d
}

// The link is cut at every message, by a reset or by silence, for good or for
// a moment. The guest never runs twice; it runs nowhere only if the source
// says that it handed it over; where it runs it has its reservation, and its
// other nexus has nothing.
func TestLinkCutAtEveryMessage(t *testing.T) {
	types := []pr.Type{pr.WriteExclusiveRegistrantsOnly, pr.WriteExclusiveAllRegistrants}
	for _, typ := range types {
		// What is said if nothing is cut.
		r := newRig(t, 1<<20, reserved(typ))
		p := &proxy{cutAt: -1}
		r.proxy(p)
		arrived := r.receiving()
		if _, err := r.migrate(); err != nil {
			t.Fatal(err)
		}
		<-(<-arrived).Answered
		for _, k := range []kind{kindHello, kindWelcome, kindRoundDone, kindState, kindReservation, kindReady, kindCommit, kindRunning, kindAcknowledge} {
			if !slices.Contains(p.seen, k) {
				t.Errorf("type %v: no %v in %v", typ, k, p.seen)
			}
		}
		for at := range p.seen {
			for _, drop := range []bool{false, true} {
				if drop && typ != types[0] {
					continue
				}
				for _, dead := range []bool{false, true} {
					name := fmt.Sprintf("%v/%d-%v/drop=%v/dead=%v", typ, at, p.seen[at], drop, dead)
					t.Run(name, func(t *testing.T) {
						t.Parallel()
						cut(t, typ, &proxy{cutAt: at, drop: drop, dead: dead})
					})
				}
			}
		}
	}
}

func cut(t *testing.T, typ pr.Type, p *proxy) {
	d := reserved(typ)
	r := newRig(t, 1<<20, d)
	r.opts.Deadlines, r.recv.Deadlines = shortly, shortly
	r.proxy(p)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r.opts.Progress = func(p2 Progress) {
		if p2.HandedOver != "" && p.dead {
			cancel() // nothing more will be heard
		}
	}
	arrived := r.receiving()
	var err error
	within(t, "the migration", func() { _, err = r.outgoing().Run(ctx) })
	var a *Arrival
	select {
	case a = <-arrived:
	default:
		if err == nil || errors.Is(err, ErrHandedOver) {
			// The destination ends by itself, too, one way or the other: it
			// had COMMIT, or its deadline passes.
			if dst := r.host.dest(); dst != nil {
				within(t, "the destination", func() {
					select {
					case a = <-arrived:
					case <-dst.closed:
					}
				})
			}
		}
	}
	ran := a != nil
	switch {
	case err == nil && !ran:
		t.Errorf("the source is done, and the destination does not run the guest")
	case err != nil && !errors.Is(err, ErrHandedOver) && ran:
		t.Errorf("the destination runs the guest, and the source says %v", err)
	case errors.Is(err, ErrHandedOver) && !p.dead:
		t.Errorf("the link came back, and the source still does not know: %v", err)
	}
	runs := r.src.g.runs.Load()
	if want := int32(1); runs != want && !(runs == 0 && errors.Is(err, ErrHandedOver)) {
		t.Errorf("the guest runs %d times; source: %v", runs, err)
	}
	if t.Failed() || runs == 0 {
		return
	}
	here, there := nexS, nexD
	if ran {
		here, there = nexD, nexS
	}
	if !ran {
		if dst := r.host.dest(); dst != nil { // which cleans up by itself
			within(t, "the destination's rollback", func() { <-dst.closed })
		}
	}
	holder, got := d.holder()
	left := d.key(there) != 0
	if ran && p.dead && typ.AllRegistrants() {
		left = false // S was never asked to unregister, or never heard RUNNING: inert, and in its journal
	}
	if d.key(here) != keyGuest || left || got != typ || typ.Single() && holder != here {
		t.Errorf("destination runs: %v; source has %v, destination %v; %v holds, type %v", ran, d.key(nexS), d.key(nexD), holder, got)
	}
	if d.key(nexO) != keyOther {
		t.Errorf("the bystander's key is %v", d.key(nexO))
	}
}

// Who gives up waiting when the guest is handed over has the guest. The source
// whose link is lost at that moment hears of it all the same: it asks.
func TestGivenUpTooLate(t *testing.T) {
	r := newRig(t, 1<<20, reserved(pr.WriteExclusiveRegistrantsOnly))
	r.opts.Deadlines, r.recv.Deadlines = shortly, shortly
	p := &proxy{cutAt: -1}
	r.proxy(p)
	r.host.inRun = func() {
		r.giveUp()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.cutAt = len(p.seen) // RUNNING
	}
	arrived := r.receiving()
	var err error
	within(t, "the migration", func() { _, err = r.migrate() })
	if err != nil {
		t.Errorf("Run = %v; want the guest to be gone", err)
	}
	within(t, "the destination", func() {
		a := <-arrived
		if a == nil {
			t.Fatal("no guest has arrived")
		}
		<-a.Answered
	})
	if runs := r.src.g.runs.Load(); runs != 1 {
		t.Errorf("the guest runs %d times", runs)
	}
	if p.mu.Lock(); !p.cut {
		t.Error("nothing was cut")
	}
	p.mu.Unlock()
}

// The operator says that the destination is dead. The guest comes back with
// its reservation, if the disk still has it.
func TestForce(t *testing.T) {
	for _, tt := range []struct {
		name   string
		fenced bool
		want   pr.OutcomeKind
	}{{"nothing happened there", false, pr.Kept}, {"it was fenced meanwhile", true, pr.FencedMeanwhile}} {
		d := reserved(pr.WriteExclusiveRegistrantsOnly)
		r := newRig(t, 1<<20, d)
		r.opts.Deadlines = Deadlines{Ready: time.Minute, Ask: shortly.Ask, Running: shortly.Running}
		r.recv.Deadlines = Deadlines{Ready: time.Minute, Ask: shortly.Ask} // it waits for COMMIT as the dead do
		p := &proxy{cutAt: -1, drop: true, dead: true}
		p.onSend = func(k kind) {
			if k == kindReady { // COMMIT, and all that follows, is lost
				p.mu.Lock()
				p.cutAt = len(p.seen)
				p.mu.Unlock()
			}
		}
		r.proxy(p)
		handedOver := make(chan struct{}, 100)
		r.opts.Progress = func(p Progress) {
			if p.HandedOver != "" {
				select {
				case handedOver <- struct{}{}:
				default:
				}
			}
		}
		r.receiving()
		o := r.outgoing()
		done := make(chan error)
		go func() {
			_, err := o.Run(context.Background())
			done <- err
		}()
		within(t, "the hand-over", func() { <-handedOver })
		o.Cancel() // too late
		if tt.fenced {
			d.do(nexO, pr.Out{Action: pr.Preempt, Key: keyOther, ServiceKey: keyGuest, Type: pr.WriteExclusiveRegistrantsOnly})
		}
		if runs := r.src.g.runs.Load(); runs != 0 {
			t.Errorf("handed over, and the guest runs %d times", runs)
		}
		if err := o.Force(); err != nil {
			t.Errorf("%s: Force = %v", tt.name, err)
		}
		if err := <-done; !errors.Is(err, ErrKept) {
			t.Errorf("%s: Run = %v", tt.name, err)
		}
		if got := r.settledS["0"].Kind; got != tt.want || r.src.g.runs.Load() != 1 {
			t.Errorf("%s: outcome %v; want %v; the guest runs %d times", tt.name, got, tt.want, r.src.g.runs.Load())
		}
		if key := d.key(nexS); (key == keyGuest) == tt.fenced {
			t.Errorf("%s: the source's key is %v", tt.name, key)
		}
		if err := o.Force(); err == nil {
			t.Error("Force after the end succeeded")
		}
	}
}

// Force is for a guest that was handed over.
func TestForceTooEarly(t *testing.T) {
	r := newRig(t, 1<<20)
	o := r.outgoing()
	forced := make(chan error, 1)
	begun := make(chan struct{})
	r.src.busy = sync.OnceFunc(func() {
		go func() {
			close(begun)
			forced <- o.Force()
		}()
		<-begun
	})
	arrived := r.receiving()
	if _, err := o.Run(context.Background()); err != nil {
		t.Error(err)
	}
	if err := <-forced; err == nil {
		t.Error("a guest that was not handed over was taken back")
	}
	<-arrived
}

// A destination that was given the guest and cannot run it says so; the source
// keeps it stopped.
func TestBlocked(t *testing.T) {
	r := newRig(t, 1<<20)
	// A source that asks on a new connection finds nobody any more: it has time
	// to hear this one to its end.
	r.opts.Deadlines = Deadlines{Ask: shortly.Ask}
	r.host.runErr = errors.New("KVM_RUN: no")
	ctx, cancel := context.WithCancel(context.Background())
	var reason string
	r.opts.Progress = func(p Progress) {
		// On a loaded machine a question may go unanswered first.
		if reason = p.HandedOver; reason == "KVM_RUN: no" {
			cancel()
		}
	}
	arrived := r.receiving()
	_, err := r.outgoing().Run(ctx)
	if !errors.Is(err, ErrHandedOver) || reason != "KVM_RUN: no" || <-arrived != nil || r.src.g.runs.Load() != 0 {
		t.Errorf("Run = %v, because %q; the guest runs %d times", err, reason, r.src.g.runs.Load())
	}
}
