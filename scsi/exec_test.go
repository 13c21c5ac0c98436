package scsi_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"vmm/scsi"
)

// scripted is a LUN whose answers are a function's.
type scripted struct {
	mu     sync.Mutex
	answer func(c *scsi.Command)
	cdbs   [][]byte // of all commands
}

func (s *scripted) Submit(c *scsi.Command) {
	s.mu.Lock()
	s.cdbs = append(s.cdbs, bytes.Clone(c.CDB))
	s.mu.Unlock()
	s.answer(c)
}

func (*scripted) Reset() error        { return scsi.ErrRejected }
func (*scripted) Limits() scsi.Limits { return scsi.Limits{MaxTransfer: 1 << 20, MaxSegments: 16} }
func (*scripted) Close() error        { return nil }

var (
	testUnitReady  = []byte{scsi.OpTestUnitReady, 0, 0, 0, 0, 0}
	reservedByUs   = scsi.Sense{Key: scsi.UnitAttention, ASC: 0x2a, ASCQ: 0x03}
	preemptedByOne = scsi.Sense{Key: scsi.UnitAttention, ASC: 0x2a, ASCQ: 0x05}
)

func TestExecWaitsForDone(t *testing.T) {
	l := &scripted{answer: func(c *scsi.Command) {
		go func() { c.Scatter([]byte("answer")); c.Finish(6) }()
	}}
	buf := make([]byte, 8)
	c := &scsi.Command{CDB: testUnitReady, DataIn: [][]byte{buf}}
	if err := scsi.Exec(t.Context(), l, c); err != nil || c.Err() != nil {
		t.Fatalf("Exec = %v, command %v", err, c.Err())
	}
	if string(buf[:6]) != "answer" || c.Residual != 2 {
		t.Errorf("data %q, residual %d; want \"answer\", 2", buf, c.Residual)
	}
}

func TestExecEndsWithItsContext(t *testing.T) {
	l := &scripted{answer: func(*scsi.Command) {}} // never
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the operator is tired")
	cancel(why)
	err := scsi.Exec(ctx, l, &scsi.Command{CDB: testUnitReady})
	if want := "TEST UNIT READY: no answer from the logical unit: the operator is tired"; err == nil || err.Error() != want || !errors.Is(err, why) {
		t.Errorf("Exec = %v; want %q", err, want)
	}
}

func TestCommandErr(t *testing.T) {
	prIn := []byte{scsi.OpPersistentReserveIn, 0, 0, 0, 0, 0, 0, 0, 8, 0}
	for _, c := range []struct {
		end  func(c *scsi.Command)
		cdb  []byte
		want string // "" for nil
	}{
		{func(c *scsi.Command) { c.Finish(0) }, prIn, ""},
		{func(c *scsi.Command) { c.Status = scsi.ConditionMet }, prIn, ""},
		{func(c *scsi.Command) { c.Conflict() }, prIn, "PERSISTENT RESERVE IN: RESERVATION CONFLICT"},
		{func(c *scsi.Command) { c.Check(scsi.InvalidOpcode) }, prIn, "PERSISTENT RESERVE IN: CHECK CONDITION, sense 5/20/00"},
		{func(c *scsi.Command) { c.Check(scsi.InvalidFieldInCDB) }, []byte{0x12, 1, 0xb0, 0, 4, 0}, "INQUIRY of VPD page B0h: CHECK CONDITION, sense 5/24/00"},
		{func(c *scsi.Command) { c.Fail(scsi.Aborted) }, []byte{0x12, 0, 0, 0, 4, 0}, "INQUIRY: aborted"},
		{func(c *scsi.Command) { c.Fail(scsi.TransportFailure) }, []byte{0x42}, "command 42h: transport failure"},
	} {
		cmd := &scsi.Command{CDB: c.cdb, Done: func(*scsi.Command) {}}
		c.end(cmd)
		got := ""
		if err := cmd.Err(); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("Err() = %q; want %q", got, c.want)
		}
	}
}

// TestAttentionIsKeptForTheGuest is DESIGN's rule: a unit attention that
// answers a command of ours is for the guest's next command.
func TestAttentionIsKeptForTheGuest(t *testing.T) {
	pending := []scsi.Sense{reservedByUs, preemptedByOne}
	l := &scripted{answer: func(c *scsi.Command) {
		if len(pending) > 0 {
			s := pending[0]
			pending = pending[1:]
			c.Check(s)
			return
		}
		c.Finish(0)
	}}
	s := scsi.Share(l)
	ours := &scsi.Command{CDB: testUnitReady}
	if err := s.Exec(t.Context(), ours); err != nil || ours.Err() != nil {
		t.Fatalf("our command: %v, %v", err, ours.Err())
	}
	if n := len(l.cdbs); n != 3 {
		t.Errorf("our command was sent %d times; want 3", n)
	}
	guest := func(op byte) *scsi.Command {
		c := &scsi.Command{CDB: []byte{op, 0, 0, 0, 0, 0}, DataIn: [][]byte{make([]byte, 4)}}
		if err := scsi.Exec(t.Context(), s, c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, op := range []byte{scsi.OpInquiry, scsi.OpReportLUNs, scsi.OpRequestSense} {
		if c := guest(op); c.Err() != nil {
			t.Errorf("command %02x: %v; want success, it reports no attention", op, c.Err())
		}
	}
	sent := len(l.cdbs)
	if got := s.Pending(); !slices.Equal(got, []scsi.Sense{reservedByUs, preemptedByOne}) {
		t.Errorf("Pending() = %v", got)
	}
	for _, want := range []scsi.Sense{reservedByUs, preemptedByOne} {
		c := guest(scsi.OpRead6)
		if got, _ := scsi.ParseSense(c.Sense[:c.SenseLen]); c.Status != scsi.CheckCondition || got != want || c.Residual != 4 || c.SenseLen != scsi.FixedSenseLen {
			t.Errorf("the guest's command: %v, residual %d; want sense %v, 4", c.Err(), c.Residual, want)
		}
	}
	if len(l.cdbs) != sent {
		t.Error("a command answered with a kept attention was sent, too")
	}
	if c := guest(scsi.OpRead6); c.Err() != nil {
		t.Errorf("the guest's next command: %v; want success", c.Err())
	}
	if got := s.Pending(); got != nil {
		t.Errorf("Pending() = %v; want none", got)
	}
}

// A command of ours that nobody waits for any more may still come back with
// what the guest must be told.
func TestAttentionIsKeptAfterOurCommandWasGivenUp(t *testing.T) {
	var late *scsi.Command
	l := &scripted{answer: func(c *scsi.Command) { late = c }}
	s := scsi.Share(l)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Exec(ctx, &scsi.Command{CDB: testUnitReady}); !errors.Is(err, context.Canceled) {
		t.Fatalf("Exec = %v; want context.Canceled", err)
	}
	late.Check(preemptedByOne)
	guest := &scsi.Command{CDB: testUnitReady, Done: func(*scsi.Command) {}}
	s.Submit(guest)
	if got, _ := scsi.ParseSense(guest.Sense[:guest.SenseLen]); got != preemptedByOne {
		t.Errorf("the guest's next command: %v; want %v", guest.Err(), preemptedByOne)
	}
}

func TestKeptAttentionsAreFewAndDifferent(t *testing.T) {
	l := &scripted{answer: func(c *scsi.Command) { c.Finish(0) }}
	s := scsi.Share(l)
	sense := func(code byte) []byte { return []byte{0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, 0, 0, 0, 0, 0} }
	s.Keep(sense(0x29))
	for i := range 40 {
		s.Keep(sense(byte(i)))
		s.Keep(sense(byte(i)))
	}
	var got []byte
	for {
		c := &scsi.Command{CDB: testUnitReady}
		if err := scsi.Exec(t.Context(), s, c); err != nil {
			t.Fatal(err)
		}
		if c.Err() == nil {
			break
		}
		got = append(got, c.Sense[12])
	}
	if len(got) == 0 || len(got) > 32 || got[len(got)-1] != 39 {
		t.Errorf("the guest was told %d; want the last few, ending in 39", got)
	}
	for i := 1; i < len(got); i++ {
		if got[i] != got[i-1]+1 {
			t.Errorf("the guest was told %d: a repetition or a gap", got)
		}
	}
}

func TestExecGivesUpOnEndlessAttentions(t *testing.T) {
	l := &scripted{answer: func(c *scsi.Command) { c.Check(scsi.PowerOnOccurred) }}
	s := scsi.Share(l)
	c := &scsi.Command{CDB: testUnitReady}
	if err := s.Exec(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if got, _ := scsi.ParseSense(c.Sense[:c.SenseLen]); got != scsi.PowerOnOccurred {
		t.Errorf("ended with %v; want the unit attention", c.Err())
	}
}

func TestSharedAddsNoAllocation(t *testing.T) {
	l := &nullLUN{}
	s := scsi.Share(l)
	c := &scsi.Command{CDB: testUnitReady, Done: func(*scsi.Command) {}}
	if n := testing.AllocsPerRun(100, func() { s.Submit(c) }); n != 0 {
		t.Errorf("Submit allocates %v times; want 0", n)
	}
}

type nullLUN struct{ scripted }

func (*nullLUN) Submit(c *scsi.Command) { c.Finish(0) }
