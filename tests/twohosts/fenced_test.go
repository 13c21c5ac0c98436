package twohosts

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// A third node preempts the guest's key while a message of the migration is on
// its way: wherever the guest goes on, it is fenced as it would have been, and
// registered nowhere.
func TestTwoHostsFenced(t *testing.T) {
	p := startPair(t)
	v := boot(p.one)
	const other = "0xabc"
	for _, test := range []struct {
		name   string
		kind   byte
		answer bool // the message goes to the source
	}{
		{"while memory is copied", msgProgress, false},
		{"when the guest has stopped", msgState, false},
		{"when the source has read the reservation", msgReservation, false},
		{"when the destination has registered", msgReservation, true},
		{"when both have proven", msgReady, true},
		{"when the guest is handed over", msgCommit, false},
		{"when it runs at its destination", msgRunning, true},
	} {
		ok := t.Run(test.name, func(t *testing.T) {
			from, to := v.at, p.two
			if from == p.two {
				to = p.one
			}
			v.reserve(5)
			p.wantReserved(from, 5)
			w := receive(to, "--insecure")
			held := p.net.at(test.kind, (to == p.two) != test.answer)
			m := migrate(from, to, "--insecure")
			held.wait(t, m)
			began := time.Now()
			p.one.sh(fmt.Sprintf("sg_persist -n -o -G -S %s %s && sg_persist -n -o -P -K %[1]s -S %[3]s -T 5 %[2]s", other, p.third.SG, guestKey))
			t.Logf("the message waited for %.1f s", time.Since(began).Seconds())
			held.release(true)
			if status := m.wait(); status != 0 {
				t.Fatalf("vmm migrate ended with %d; want 0: a fenced guest may move\n%s", status, m.stderr)
			}
			v.wait()
			says := m.summary().Luns[0].Sentence
			if fenced := strings.Contains(says, "another node fenced the guest"); fenced != (test.kind != msgRunning) {
				t.Errorf("the summary says %q", says)
			}
			t.Logf("%s", says)
			w.agent, v = v.agent, w
			v.dial()
			if status := p.one.sh("sg_persist -n -i -s " + p.third.SG); strings.Count(status, "Key=") != 1 || !strings.Contains(status, "Key="+other) {
				t.Errorf("READ FULL STATUS shows\n%s\nwant the third node's registration alone", status)
			}
			// What the guest meets: at most one unit attention, then conflicts.
			if out := v.in("fill -offset 16777216 -size 4096 /dev/sda 2>&1; fill -offset 16777216 -size 4096 /dev/sda 2>&1 || echo REFUSED"); !strings.HasSuffix(out, "REFUSED") {
				t.Errorf("the fenced guest writes: %s", out)
			}
			if out := v.in("sg_persist -n -o -G -K " + guestKey + " -S " + guestKey + " /dev/sda 2>&1 || echo REFUSED"); !strings.HasSuffix(out, "REFUSED") {
				t.Errorf("the fenced guest is still registered: %s", out)
			}
			// The third node lets everybody in again.
			p.one.sh("sg_persist -n -o -C -K " + other + " " + p.third.SG)
			v.in("sg_turs /dev/sda || sg_turs /dev/sda || sg_turs /dev/sda")
		})
		if !ok {
			t.Fatal("the guest is where nobody knows")
		}
	}
	v.poweroff()
}
