package machine

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func states(t *testing.T, events <-chan Event, want ...string) {
	t.Helper()
	for _, w := range want {
		e, ok := <-events
		got := string(e.Kind)
		if e.Kind == EventState {
			got = e.State.String()
		}
		if !ok || got != w {
			t.Fatalf("event %+v, open %v; want %s", e, ok, w)
		}
		if e.Time.IsZero() {
			t.Errorf("event %+v has no time", e)
		}
	}
}

func TestEventsTellTheMachinesLife(t *testing.T) {
	m, _ := newMachine(t, countBoots(), nil)
	events, cancel := m.Events()
	defer cancel()
	states(t, events, "starting")
	if err := m.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	states(t, events, "running", "reset", "reset", "ended")
	if _, open := <-events; open {
		t.Error("the channel is open after the machine's end")
	}
	late, _ := m.Events()
	states(t, late, "ended")
	if _, open := <-late; open {
		t.Error("a late subscriber's channel stays open")
	}
}

func TestEventsOfPauseAndWarnings(t *testing.T) {
	m, _, done := start(t, t.Context())
	events, cancel := m.Events()
	states(t, events, "running")
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	states(t, events, "paused")
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	states(t, events, "running")
	cancel()
	cancel()
	if _, open := <-events; open {
		t.Error("a cancelled subscription's channel is open")
	}
	if err := m.Stop(); err != nil {
		t.Fatal(err)
	}
	<-done
}

// Nobody waits for a subscriber that does not read, and it learns what it
// missed.
func TestSlowSubscriberMissesEvents(t *testing.T) {
	var m Machine
	m.feed.publish(Event{Kind: EventState})
	slow, cancel := m.Events()
	defer cancel()
	const n = 1000
	for range n {
		m.feed.publish(Event{Kind: EventWarning})
	}
	for range maxPending {
		<-slow
	}
	m.feed.publish(Event{Kind: EventReset})
	// The first was the state; the rest is what there was no room for.
	if e := <-slow; e.Kind != EventMissed || e.Missed != n-(maxPending-1) {
		t.Errorf("event %+v; want that %d were missed", e, n-(maxPending-1))
	}
	if e := <-slow; e.Kind != EventReset {
		t.Errorf("event %+v; want the reset", e)
	}
}

// What a machine says of itself makes sense in another directory, too.
func TestInfo(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := errors.Join(os.WriteFile("disk.img", nil, 0o600), os.Truncate("disk.img", 1<<20)); err != nil {
		t.Fatal(err)
	}
	m, _ := newMachine(t, asm{}.poweroff(), func(c *Config) {
		c.CPUs = 2
		c.LUNs = []LUNConfig{{ID: "root", Path: "disk.img", Target: 3, ReadOnly: true}}
	})
	i := m.Info()
	if i.Name != "test" || i.State != StateStarting || i.CPUs != 2 || i.Memory != 16<<20 || i.CPU != CPUHost || !i.Started.IsZero() {
		t.Errorf("Info() = %+v", i)
	}
	if len(i.LUNs) != 1 {
		t.Fatalf("LUNs %+v; want one", i.LUNs)
	}
	if l := i.LUNs[0]; l.ID != "root" || l.Path != filepath.Join(dir, "disk.img") || l.Target != 3 || !l.ReadOnly || l.Passthrough || l.Identity == "" {
		t.Errorf("LUN %+v", l)
	}
	if _, err := m.Reservation(t.Context(), "root"); err != nil {
		t.Errorf("Reservation(root) = %v", err)
	}
	if _, err := m.Reservation(t.Context(), "swap"); err == nil || !strings.Contains(err.Error(), `no LUN "swap"`) {
		t.Errorf("Reservation(swap) = %v", err)
	}
	if err := m.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if i := m.Info(); i.State != StateEnded || i.Started.IsZero() {
		t.Errorf("after Run: Info() = %+v", i)
	}
}
