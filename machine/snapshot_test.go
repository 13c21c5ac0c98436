package machine

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vmm/migration"
	"vmm/scsi/pr"
)

// A guest with a software disk is saved and goes on where it was, in another
// machine, on its old nexus or another one, with its reservation; not one
// instruction of it is executed in between.
func TestGuestIsSaved(t *testing.T) {
	for _, initiator := range []string{"", "host2"} {
		image := filepath.Join(t.TempDir(), "disk.img")
		if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		state, runDir := t.TempDir(), t.TempDir()
		m, out := newMachine(t, counts(), func(c *Config) {
			c.Name, c.RunDir = "web1", runDir
			c.LUNs = []LUNConfig{{ID: "data", Path: image, Target: 0, Initiator: "host1"}}
		})
		const key = 0x1122334455667788
		reserve(t, m, key)
		stop := run(t, m)
		out.waitFor("0123456789")
		d, err := m.Depart(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "web1.snap")
		if _, err := migration.Save(t.Context(), d, file, migration.SaveOptions{}); err != nil {
			t.Fatalf("Save() = %v", err)
		}
		if err := m.Resume(); !errors.Is(err, ErrMoving) {
			t.Errorf("Resume() of a saved guest = %v; want %v", err, ErrMoving)
		}
		if err := m.Stop(); err != nil {
			t.Error(err)
		}
		if err := errors.Join(stop(), m.Close()); err != nil {
			t.Error(err)
		}

		console := newConsole()
		r := &Reception{
			Config:   Config{Console: console, RunDir: runDir, Warn: func(s string) { t.Logf("restore: %s", s) }},
			StateDir: state,
		}
		if initiator != "" {
			r.Config.LUNs = []LUNConfig{{ID: "data", Path: image, Initiator: initiator}}
		}
		got, err := migration.Restore(t.Context(), file, r, migration.RestoreOptions{StateDir: state})
		if err != nil {
			t.Fatalf("Restore() = %v", err)
		}
		a := got.Machine.(*Arrival)
		console.waitFor("0123456789")
		was, is := out.String(), console.String()
		if last, first := was[len(was)-1], is[0]; (last-'0'+1)%10 != first-'0' {
			t.Errorf("the guest wrote %q last before and %q first afterwards", last, first)
		}
		want := "are on this host"
		if initiator == "" {
			want = "keeps its key"
		}
		if len(got.LUNs) != 1 || !strings.Contains(got.LUNs[0].Sentence, want) {
			t.Errorf("outcomes %v; want %q", got.LUNs, want)
		}
		now, err := a.Machine().Reservation(t.Context(), "data")
		if err != nil {
			t.Fatal(err)
		}
		if len(now.Registrations) != 1 || now.Own != 0 || now.Held.Type != pr.WriteExclusive || now.Held.Key != key || now.Guest.Key != key || now.Guest.Type != pr.WriteExclusive {
			t.Errorf("initiator %q: the LUN has %+v; want key %x and Write Exclusive on the machine's nexus alone", initiator, now, key)
		}
		if err := a.Machine().Stop(); err != nil {
			t.Error(err)
		}
		if err := errors.Join(a.Wait(), a.Close()); err != nil {
			t.Error(err)
		}
	}
}
