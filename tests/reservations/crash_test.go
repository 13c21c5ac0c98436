package reservations

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"

	"vmm/scsi/pr"
	"vmm/scsi/sg"
)

// child, in the environment, makes this program a destination's process.
const child = "VMM_TEST_RESERVATIONS"

// destination is what such a process is told.
type destination struct {
	SG, RunDir, Journal string
	Pair                pr.Pair
}

// event is what a destination's process and its parent tell each other, one
// line each in turn: what it is about to do, a message, or that it waits.
type event struct {
	Step  string  `json:",omitempty"`
	Msg   *pr.Msg `json:",omitempty"`
	Await bool    `json:",omitempty"`
}

func TestMain(m *testing.M) {
	if s := os.Getenv(child); s != "" {
		if err := runDestination(s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// runDestination is the destination's side of one takeover: before each step
// it says so and waits for leave to go on.
func runDestination(s string) error {
	raw, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return err
	}
	var to destination
	if err := gob.NewDecoder(bytes.NewReader(raw)).Decode(&to); err != nil {
		return err
	}
	l, err := sg.Open(to.SG, sg.Options{VM: "destination", RunDir: to.RunDir})
	if err != nil {
		return err
	}
	defer l.Close()
	j, err := pr.OpenJournal(to.Journal)
	if err != nil {
		return err
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	ask := func(e event) event {
		var leave event
		if out.Encode(e) != nil || in.Decode(&leave) != nil {
			os.Exit(0) // the parent is gone
		}
		return leave
	}
	back := to.Pair
	back.Old, back.New = back.New, back.Old
	ledger := &told{j.For(pr.Entry{LUN: "D", Path: to.SG, Key: keyK, Pair: back}), func(s string) { ask(event{Step: s}) }}
	port := &pr.Port{Timeout: patience, Sender: &tap{&pr.LUN{LUN: l}, func(cdb []byte) { ask(event{Step: fmt.Sprintf("command % x", cdb)}) }}}
	d := pr.NewDest(&to.Pair)
	for {
		at := port.Run(context.Background(), &d, ledger, func(m pr.Msg) error { ask(event{Msg: &m}); return nil })
		if at == pr.Finish {
			return fmt.Errorf("the destination ends before COMMIT: %s", d.Outcome().Sentence("LUN"))
		}
		if e := ask(event{Await: true}); e.Msg != nil {
			d.Receive(*e.Msg)
		}
	}
}

// told is a ledger that says what it does.
type told struct {
	pr.Ledger
	say func(string)
}

func (l *told) Note(handed bool) error { l.say("journal"); return l.Ledger.Note(handed) }

// TestKill kills the destination's process, with SIGKILL, before and during
// each of its steps up to COMMIT. The source goes on with what it had; the
// destination's host finds in its journal what it must undo.
func TestKill(t *testing.T) {
	u := need(t, "SDOW")
	runs, stale := 0, 0
	types := []pr.Type{pr.WriteExclusiveRegistrantsOnly, pr.ExclusiveAccessAllRegistrants}
	if *long {
		types = append(types, pr.None, pr.WriteExclusive)
	}
	for _, typ := range types {
		for _, during := range []bool{false, true} {
			for at := 1; ; at++ {
				before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: true}
				u.set(t, before)
				m := newMigration(t, u, false)
				dir := t.TempDir()
				var err error
				if m.journal, err = pr.OpenJournal(dir); err != nil {
					t.Fatal(err)
				}
				u.nexus[atD].close(t)
				reached := m.killed(dir, at, during)
				if err := u.nexus[atD].open(t); err != nil {
					t.Fatal(err)
				}
				src := m.src.Outcome()
				want := before
				if src.Stale {
					stale++
					want.d = keyK
				}
				if got := u.show(t); src.Kind != pr.Kept || got != want.String() {
					t.Errorf("killed at step %d, during %v: %s became %s; want %s; %s", at, during, before, got, want, src.Sentence("S"))
				}
				left := m.recover()
				if got := u.show(t); len(left) > 0 || got != before.String() {
					t.Errorf("recovered after step %d, during %v: %s; want %s; left %+v", at, during, got, before, left)
				}
				if entries, err := m.journal.Entries(); err != nil || len(entries) > 0 {
					t.Errorf("after the recovery the journal has %+v, %v", entries, err)
				}
				u.quiet(t)
				runs++
				if !reached {
					break // it waits for COMMIT
				}
			}
		}
	}
	if stale == 0 {
		t.Error("no kill left K on D: there was nothing to recover")
	}
	t.Logf("%d destinations killed, %d of them left K on D for the journal", runs, stale)
}

// killed runs a takeover with the destination in a process of its own, kills
// that at its step at, or where it waits for COMMIT, and lets the source come
// back. It says whether the step was reached.
func (m *migration) killed(dir string, at int, during bool) (reached bool) {
	t := m.t
	t.Helper()
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(destination{m.unit.nexus[atD].device.SG, t.TempDir(), dir, m.pair}); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), child+"="+base64.StdEncoding.EncodeToString(b.Bytes()))
	c.Stderr = os.Stderr
	stdin, err1 := c.StdinPipe()
	stdout, err2 := c.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait() // after the kill: its command, if it is in the kernel, has ended
	defer c.Process.Kill()
	in, out := json.NewDecoder(stdout), json.NewEncoder(stdin)
	m.src = pr.NewSource(&m.pair, keyK)
	port, ledger := m.port(atS), m.ledger(atS)
	var toD []pr.Msg
	source := func() {
		port.Run(context.Background(), &m.src, ledger, func(msg pr.Msg) error { toD = append(toD, msg); return nil })
	}
	source()
	for n := 0; ; {
		var e event
		if err := in.Decode(&e); err != nil {
			if err != io.EOF {
				t.Fatal(err)
			}
			t.Fatal("the destination's process has ended")
		}
		var leave event
		if !e.Await {
			n++
			reached = n == at
		}
		switch {
		case reached:
		case e.Msg != nil:
			m.src.Receive(*e.Msg)
			source()
		case e.Await && len(toD) > 0:
			leave.Msg, toD = &toD[0], toD[1:]
		case e.Await && m.src.Readied():
		case e.Await:
			t.Fatal("both sides wait")
		}
		over := reached || e.Await && leave.Msg == nil
		if !over || during && reached {
			if err := out.Encode(leave); err != nil {
				t.Fatal(err)
			}
		}
		if over {
			c.Process.Kill()
			c.Wait()
			m.src.Lost()
			source()
			return reached
		}
	}
}
