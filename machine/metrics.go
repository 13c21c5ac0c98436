package machine

import (
	"fmt"
	"maps"

	"vmm/scsi"
	"vmm/scsi/pr"
	"vmm/virtio"
)

// Metrics is what has been counted so far. All numbers only grow, but for
// those of a LUN that is detached.
type Metrics struct {
	Exits []map[string]uint64 // returns from KVM_RUN, by vCPU and reason
	LUNs  []LUNMetrics
}

// LUNMetrics is one logical unit's part.
type LUNMetrics struct {
	ID     string
	Queues []virtio.QueueStats
	// Reservations are the guest's commands that may change its reservation.
	Reservations map[ReservationCommand]uint64
	// Takeovers are the migrations of its reservation, by how they ended here.
	Takeovers map[string]uint64
}

// ReservationCommand is a kind of reservation command and what became of it.
type ReservationCommand struct {
	Action string // that of PERSISTENT RESERVE OUT; spc2_reserve, spc2_release
	Result string // good, conflict, check_condition, other
}

var exitNames = [exitKinds]string{exitIO: "io", exitMMIO: "mmio", exitIntr: "intr", exitOther: "other"}

// Metrics reads the counters. It stops nobody and asks no disk.
func (m *Machine) Metrics() Metrics {
	var x Metrics
	for _, v := range m.vcpus {
		exits := map[string]uint64{}
		for kind, name := range exitNames {
			exits[name] = v.exits[kind].Load()
		}
		x.Exits = append(x.Exits, exits)
	}
	for _, l := range m.units() {
		lm := LUNMetrics{ID: l.cfg.ID, Queues: m.scsi.Stats(uint8(l.cfg.Target))}
		l.tracked.mu.Lock()
		lm.Reservations, lm.Takeovers = maps.Clone(l.tracked.outs), maps.Clone(l.tracked.moves)
		l.tracked.mu.Unlock()
		x.LUNs = append(x.LUNs, lm)
	}
	return x
}

// counted counts a reservation command's answer. The lock is held. What the
// guest sends decides between names, it makes none.
func (t *tracked) counted(c *scsi.Command) {
	r := ReservationCommand{Action: "other", Result: "other"}
	actions := [...]string{"register", "reserve", "release", "clear", "preempt", "preempt_and_abort", "register_and_ignore", "register_and_move"}
	switch c.CDB[0] {
	case scsi.OpReserve6, scsi.OpReserve10:
		r.Action = "spc2_reserve"
	case scsi.OpRelease6, scsi.OpRelease10:
		r.Action = "spc2_release"
	default:
		if n := int(c.CDB[1] & 0x1f); n < len(actions) {
			r.Action = actions[n]
		}
	}
	if c.Outcome == scsi.Completed {
		switch c.Status {
		case scsi.Good:
			r.Result = "good"
		case scsi.ReservationConflict:
			r.Result = "conflict"
		case scsi.CheckCondition:
			r.Result = "check_condition"
		}
	}
	if t.outs == nil {
		t.outs = map[ReservationCommand]uint64{}
	}
	t.outs[r]++
}

// moved counts how a takeover ended.
func (t *tracked) moved(k pr.OutcomeKind) {
	name, ok := map[pr.OutcomeKind]string{
		pr.Moved: "moved", pr.RegistrationOnly: "registration_only", pr.FencedMeanwhile: "fenced", pr.NothingHeld: "nothing_held", pr.Kept: "kept",
		pr.LeftBehind: "left_behind", pr.Refused: "refused", pr.GivenUp: "given_up", pr.Blocked: "blocked", pr.HandedOver: "handed_over",
	}[k]
	if !ok {
		name = fmt.Sprintf("outcome_%d", k)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.moves == nil {
		t.moves = map[string]uint64{}
	}
	t.moves[name]++
}
