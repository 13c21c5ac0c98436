package twohosts

import (
	"strings"
	"testing"
	"time"

	"vmm/tests/guest"
)

// Where the guest is in the end.
type end int

const (
	kept   end = iota // it runs on where it was: vmm migrate says so
	doubt             // it stands still where it was, which says that it was handed over
	nobody            // its process was killed, and no other has it
	moved             // it runs at the destination
)

// What is done when a message is held up in the cable.
type blow int

const (
	cut                   blow = iota // the link; the message is lost
	killSource                        // kill -9; the message arrives
	killDestination                   // kill -9; the message comes too late
	cutAndKillDestination             // the message is lost
)

// Two hosts whose link is cut, without a reset, or whose processes are killed
// while a message of the protocol is on its way. (Package migration's tests do
// it at every message, in one process.) One guest goes through all of them.
func TestTwoHostsBroken(t *testing.T) {
	p := startPair(t)
	const typ = 5
	v := boot(p.one)
	v.reserve(typ)
	v.churn()
	for _, test := range []struct {
		name   string
		kind   byte
		answer bool // the message goes to the source
		blow   blow
		end    end
		// What ends the doubt, and where the guest is then.
		settle func(m *process)
		then   end
	}{
		{name: "cut while memory is copied", kind: msgProgress, blow: cut, end: kept},
		{name: "cut before the state arrives", kind: msgState, blow: cut, end: kept},
		{name: "cut before READY arrives", kind: msgReady, answer: true, blow: cut, end: kept},
		{name: "cut before COMMIT arrives", kind: msgCommit, blow: cut, end: doubt, settle: func(*process) { p.net.mend() }, then: kept},
		{name: "the destination is killed when the state arrives", kind: msgState, blow: killDestination, end: kept},
		{name: "the destination is killed when it has registered", kind: msgReservation, answer: true, blow: killDestination, end: kept},
		{name: "the destination is killed when COMMIT arrives", kind: msgCommit, blow: killDestination, end: doubt, settle: p.force, then: kept},
		{name: "the destination runs the guest, is cut off and killed", kind: msgRunning, answer: true, blow: cutAndKillDestination, end: doubt, settle: p.force, then: kept},
		{name: "cut before RUNNING arrives", kind: msgRunning, answer: true, blow: cut, end: doubt, settle: func(*process) { p.net.mend() }, then: moved},
		{name: "the source is killed after COMMIT", kind: msgCommit, blow: killSource, end: moved},
		{name: "the source is killed while memory is copied", kind: msgProgress, blow: killSource, end: nobody},
	} {
		ok := t.Run(test.name, func(t *testing.T) {
			from, to := v.at, p.two
			if from == p.two {
				to = p.one
			}
			p.wantReserved(from, typ)
			before := v.churned()
			stop := p.intruder()
			w := receive(to, "--insecure")
			held := p.net.at(test.kind, (to == p.two) != test.answer)
			m := migrate(from, to, "--insecure")
			held.wait(t, m)
			began := time.Now()
			switch test.blow {
			case cut:
				p.net.cut()
				held.release(false)
			case killSource:
				v.strike()
				held.release(true)
				v.wait()
			case killDestination:
				w.strike()
				held.release(true)
				w.wait()
			case cutAndKillDestination:
				p.net.cut()
				held.release(false)
				w.kill()
			}
			where := test.end
			if where == doubt {
				m.await(m.stdout, `"handed_over":"[^"]`)
				if says := from.sh("/share/vmm status web1"); !strings.Contains(says, "handed over to") || !strings.Contains(says, "paused") {
					t.Errorf("vmm status says\n%s\nwant a paused guest that was handed over", says)
				}
				t.Logf("after %.1f s: handed over", time.Since(began).Seconds())
				if out, err := from.try("/share/vmm resume web1"); err == nil {
					t.Errorf("a guest that was handed over can be resumed: %s", out)
				}
				test.settle(m)
				p.net.mend()
				where = test.then
			}
			switch where {
			case kept:
				if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), "the guest runs on here") {
					t.Errorf("vmm migrate ended with %d, %q; want 1, and to hear that the guest runs on here", status, m.stderr)
				}
				if test.blow == cut {
					w.await(w.stderr, "vmm: migration ") // it has given up, too
					p.net.mend()
					w.kill()
				}
			case moved:
				if test.blow != killSource {
					if status := m.wait(); status != 0 {
						t.Errorf("vmm migrate ended with %d\n%s", status, m.stderr)
					}
					v.wait()
				}
				w.await(w.stderr, "LUN|data") // what became of the reservation
				w.agent, v = v.agent, w
				v.dial()
			case nobody:
				w.await(w.stderr, "vmm: migration ")
				w.kill()
			}
			t.Logf("after %.1f s: %s%s", time.Since(began).Seconds(), m.stderr, w.stderr)
			for _, h := range []*host{p.one, p.two} {
				t.Logf("host %s: vmm pr recover: %s", h.name, h.sh("/share/vmm pr recover"))
				out, err := h.try("/share/vmm status web1")
				if runs := err == nil && strings.Contains(out, "running"); runs != (where != nobody && h == v.at) {
					t.Errorf("host %s: vmm status says %v\n%s\nwant the guest to run on host %s alone", h.name, err, out, v.at.name)
				}
			}
			p.wantReserved(v.at, typ)
			if test.blow == cutAndKillDestination {
				// The guest has run at both, one after the other: what it wrote at the
				// destination it has not written here.
				v.ask(v.agent.StopChurn)
				v.churn()
				before = guest.Churned{}
			}
			if where != nobody {
				v.churnsOn(before)
			}
			stop()
		})
		if !ok {
			t.Fatal("the guest is where nobody knows")
		}
	}
}

// force states that the destination is dead.
func (p *pair) force(*process) {
	p.one.sh("/share/vmm resume web1 --force")
}
