package machine

import (
	"testing"

	"vmm/scsi/pr"
)

func TestMetrics(t *testing.T) {
	m, out := newMachine(t, asm{}.print("hello").forever(), func(c *Config) {
		c.CPUs = 2
		c.LUNs = []LUNConfig{{ID: "data", Path: diskImage(t), Target: 3, Initiator: "host1:test"}}
	})
	run(t, m)
	out.waitFor("hello")
	reserve(t, m, 0xaa)
	m.units()[0].settled(pr.Outcome{Kind: pr.Kept}, nil)
	pause(t, m)
	x := m.Metrics()
	if len(x.Exits) != 2 || x.Exits[0]["io"] < 5 || x.Exits[0]["intr"] == 0 || x.Exits[1]["io"] != 0 || x.Exits[0]["other"] != 0 {
		t.Errorf("exits %v; want 5 and more of the first vCPU's to ports, and a signal", x.Exits)
	}
	if len(x.LUNs) != 1 || x.LUNs[0].ID != "data" || len(x.LUNs[0].Queues) != 2 {
		t.Fatalf("LUNs %+v; want data, with two queues", x.LUNs)
	}
	l := x.LUNs[0]
	for _, action := range []string{"register", "reserve"} {
		if got := l.Reservations[ReservationCommand{action, "good"}]; got != 1 {
			t.Errorf("%s: %d were good; want 1 of %v", action, got, l.Reservations)
		}
	}
	if got := l.Takeovers; len(got) != 1 || got["kept"] != 1 {
		t.Errorf("takeovers %v; want one, kept", got)
	}
}

// A guest decides how often a counter counts, not how many there are.
func TestReservationCommandsAreBounded(t *testing.T) {
	backend := newTargetLUN(pr.Quirks{})
	l := newLUN(backend, LUNConfig{})
	for action := range 256 {
		_ = guestOut(t, l, pr.Out{Action: pr.OutAction(action), Key: 1})
	}
	if got := len(l.tracked.outs); got == 0 || got > 11*4 {
		t.Errorf("%d counters: %v", got, l.tracked.outs)
	}
}
