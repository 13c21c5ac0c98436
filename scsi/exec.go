package scsi

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// Exec submits c to lun and waits until it is done. It sets c.Done. How the
// command ended is in c (see Err); an error of Exec is ctx's.
//
// A command cannot be called back. When ctx ends first, c and the memory it
// names belong to lun until it completes them, so the caller leaves both
// alone for good.
func Exec(ctx context.Context, lun LUN, c *Command) error {
	done := make(chan struct{})
	c.Done = func(*Command) { close(done) }
	lun.Submit(c)
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: no answer from the logical unit: %w", OpName(c.CDB), context.Cause(ctx))
	}
}

// CommandError says how a command ended that was not GOOD.
type CommandError struct {
	Op      string // the command's name, as OpName has it
	Outcome Outcome
	Status  Status // of a Completed command
	Sense   Sense  // of CHECK CONDITION, zero if the sense data could not be read
}

func (e *CommandError) Error() string {
	switch {
	case e.Outcome != Completed:
		return fmt.Sprintf("%s: %s", e.Op, e.Outcome)
	case e.Status == CheckCondition:
		return fmt.Sprintf("%s: %s, sense %s", e.Op, e.Status, e.Sense)
	}
	return fmt.Sprintf("%s: %s", e.Op, e.Status)
}

// Err is nil for a command that completed with GOOD or CONDITION MET, else a
// *CommandError.
func (c *Command) Err() error {
	if c.Outcome == Completed && (c.Status == Good || c.Status == ConditionMet) {
		return nil
	}
	e := &CommandError{Op: OpName(c.CDB), Outcome: c.Outcome, Status: c.Status}
	if s, ok := c.sense(); ok {
		e.Sense = s
	}
	return e
}

// sense is what a CHECK CONDITION said.
func (c *Command) sense() (Sense, bool) {
	if c.Outcome != Completed || c.Status != CheckCondition {
		return Sense{}, false
	}
	return ParseSense(c.Sense[:c.SenseLen])
}

// OpName is the name of a CDB's operation, for messages.
func OpName(cdb []byte) string {
	if len(cdb) == 0 {
		return "empty CDB"
	}
	switch cdb[0] {
	case OpTestUnitReady:
		return "TEST UNIT READY"
	case OpInquiry:
		if len(cdb) > 2 && cdb[1]&1 != 0 {
			return fmt.Sprintf("INQUIRY of VPD page %02Xh", cdb[2])
		}
		return "INQUIRY"
	case OpPersistentReserveIn:
		return "PERSISTENT RESERVE IN"
	case OpPersistentReserveOut:
		return "PERSISTENT RESERVE OUT"
	case OpReadCapacity10:
		return "READ CAPACITY(10)"
	case OpReportLUNs:
		return "REPORT LUNS"
	}
	return fmt.Sprintf("command %02Xh", cdb[0])
}

// Shared is a LUN to which the guest and this process both send commands over
// one I_T nexus. The guest's arrive at Submit; ours go through Ours or Exec.
//
// The target reports a unit attention once per nexus, to whichever command
// comes first (SAM-5 5.14). One that answers a command of ours was meant for
// the guest too, so it is kept and answers the guest's next command.
type Shared struct {
	LUN // where commands go; whoever submits to it directly keeps nothing

	mu   sync.Mutex
	kept []attention // oldest first
	any  atomic.Bool // len(kept) > 0: the guest's path takes no lock without need
}

type attention struct {
	sense [MaxSense]byte
	len   int
}

const (
	// maxKept bounds the unit attentions kept for a guest that sends nothing.
	// The oldest goes first: of many, the last says most about the present.
	maxKept = 16
	// maxRepeats bounds how often Exec answers unit attentions by repeating.
	// A target queues few; more than this is one that never ends.
	maxRepeats = 32
)

// Share makes lun a Shared one. Its Close is lun's.
func Share(lun LUN) *Shared { return &Shared{LUN: lun} }

// Submit is the guest's door.
func (s *Shared) Submit(c *Command) {
	if s.any.Load() && s.answer(c) {
		c.Done(c)
		return
	}
	s.LUN.Submit(c)
}

// answer completes c, all but Done, with the oldest attention kept.
func (s *Shared) answer(c *Command) bool {
	if len(c.CDB) > 0 {
		switch c.CDB[0] {
		case OpInquiry, OpReportLUNs, OpRequestSense:
			// These do not report a unit attention (SPC-5 5.1, SAM-5 5.14).
			return false
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.kept) == 0 {
		return false
	}
	a := &s.kept[0]
	c.Outcome, c.Status = Completed, CheckCondition
	c.Residual = uint32(c.DataLen())
	c.Sense, c.SenseLen = a.sense, a.len
	s.kept = append(s.kept[:0], s.kept[1:]...)
	s.any.Store(len(s.kept) > 0)
	return true
}

// Ours is the LUN as this process's own commands reach it: a unit attention
// that answers one of them is kept for the guest, also one that comes after
// whoever sent the command has given it up.
func (s *Shared) Ours() LUN { return ours{s.LUN, s} }

type ours struct {
	LUN
	shared *Shared
}

// Submit sends a command of ours.
func (o ours) Submit(c *Command) {
	done := c.Done
	c.Done = func(c *Command) {
		c.Done = done
		if a, ok := c.sense(); ok && a.Key == UnitAttention {
			o.shared.Keep(c.Sense[:c.SenseLen])
		}
		done(c)
	}
	o.LUN.Submit(c)
}

// Exec sends a command of ours and waits as the function Exec does. After a
// unit attention the command, which the target has not carried out then, is
// sent again.
func (s *Shared) Exec(ctx context.Context, c *Command) error {
	for range maxRepeats {
		if err := Exec(ctx, s.Ours(), c); err != nil {
			return err
		}
		if a, ok := c.sense(); !ok || a.Key != UnitAttention {
			return nil
		}
	}
	return nil // c says what came last: a unit attention
}

// Raise makes a unit attention of ours the guest's: it answers one of its
// next commands.
func (s *Shared) Raise(a Sense) {
	var b [MaxSense]byte
	s.Keep(b[:a.put(&b)])
}

// Pending are the unit attentions kept that the guest has not been told yet.
func (s *Shared) Pending() (list []Sense) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.kept {
		if a, ok := ParseSense(s.kept[i].sense[:s.kept[i].len]); ok {
			list = append(list, a)
		}
	}
	return list
}

// Keep holds sense data for the guest's next command. A condition that is
// held already is not held twice.
func (s *Shared) Keep(sense []byte) {
	var a attention
	a.len = copy(a.sense[:], sense)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.kept {
		if s.kept[i] == a {
			return
		}
	}
	if len(s.kept) == maxKept {
		s.kept = append(s.kept[:0], s.kept[1:]...)
	}
	s.kept = append(s.kept, a)
	s.any.Store(true)
}
