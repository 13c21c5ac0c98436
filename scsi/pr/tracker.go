package pr

import "vmm/scsi"

// Tracker follows one guest's reservation on one LUN, from the commands that
// the guest sends and the status that comes back. What it believes is where a
// takeover begins; the disk has the last word.
//
// Its methods are not safe for concurrent use: the caller orders them as the
// commands complete.
type Tracker struct {
	st Tracked
}

// Tracked is what a tracker believes.
type Tracked struct {
	Key     Key  // 0: not registered
	Type    Type // of the reservation that the guest holds; None
	Persist bool // the last APTPL that the guest sent
	// SPC2 says that the guest holds the LUN by RESERVE of SPC-2, which
	// nothing can move to another nexus.
	SPC2 bool
	// Doubt says that a command's effect could not be told from its answer:
	// read the disk before believing the rest.
	Doubt bool
}

// Concerns is the one test that every other command pays for: whether a
// command with this operation code has to pass through the tracker.
func Concerns(opcode byte) bool {
	switch opcode {
	case scsi.OpPersistentReserveIn, scsi.OpPersistentReserveOut,
		scsi.OpReserve6, scsi.OpReserve10, scsi.OpRelease6, scsi.OpRelease10:
		return true
	}
	return false
}

// State is what the tracker believes now.
func (t *Tracker) State() Tracked { return t.st }

// Learn sets what was read from the disk, when a LUN is opened and after a
// takeover.
func (t *Tracker) Learn(s Tracked) { t.st = s }

// LoseNexus is a reset or loss of the nexus: SPC-2 reservations end with it.
func (t *Tracker) LoseNexus() { t.st.SPC2 = false }

// Before looks at a command that Concerns, ahead of sending it. A Refusal is
// the answer to give in place of the target's: REPORT CAPABILITIES shows the
// guest neither SIP_C nor ATP_C, because a registration that was made for
// other ports could not follow the guest, and a target without them answers
// the two bits like this (SPC-5 6.16.3).
func (t *Tracker) Before(cdb, list []byte) *Refusal {
	if len(cdb) < CDBLen || cdb[0] != scsi.OpPersistentReserveOut || len(list) < basicListLen {
		return nil
	}
	switch OutAction(cdb[1] & 0x1f) {
	case Register, RegisterAndIgnoreExistingKey:
		if list[20]&0x0c != 0 {
			return refuse(scsi.InvalidFieldInList, "SPEC_I_PT and ALL_TG_PT cannot follow a guest to another host")
		}
	}
	return nil
}

// MaskIn changes the first n bytes of PERSISTENT RESERVE IN parameter data,
// in place, to what the guest may see.
func MaskIn(cdb, data []byte, n int) {
	if len(cdb) < 2 || cdb[0] != scsi.OpPersistentReserveIn || InAction(cdb[1]&0x1f) != ReportCapabilities {
		return
	}
	if min(n, len(data)) > 2 {
		data[2] &^= 0x0c // SIP_C, ATP_C
	}
}

// After takes note of a command that Concerns, once it is complete. answered
// says that the target answered at all: otherwise nobody knows whether the
// command took effect.
func (t *Tracker) After(cdb, list []byte, answered bool, status scsi.Status) {
	if len(cdb) == 0 {
		return
	}
	switch cdb[0] {
	case scsi.OpReserve6, scsi.OpReserve10, scsi.OpRelease6, scsi.OpRelease10:
		reserve := cdb[0] == scsi.OpReserve6 || cdb[0] == scsi.OpReserve10
		switch {
		case answered && status == scsi.Good:
			// With a registration it does nothing (compatible reservation handling).
			t.st.SPC2 = reserve && t.st.Key == 0
		case !answered && reserve:
			t.st.SPC2 = true // perhaps: the safe side is not to migrate
		}
		return
	case scsi.OpPersistentReserveOut:
	default:
		return
	}
	if answered && status == scsi.ReservationConflict {
		return // refused: nothing has changed
	}
	o, err := ParseOut(cdb, list)
	if err != nil {
		return // nothing that a target accepts
	}
	if !answered || status != scsi.Good {
		// An error is no evidence: LIO has been seen to register and then
		// answer NOT READY, because it could not store APTPL.
		t.st.Doubt = true
		if t.st.Key == 0 && (o.Action == Register || o.Action == RegisterAndIgnoreExistingKey) {
			t.st.Key = o.ServiceKey
		}
		return
	}
	s := &t.st
	// GOOD says that the RESERVATION KEY is the guest's registration: a guest
	// that was rebooted in place need not register again. These three may be
	// GOOD with any key; RELEASE on LIO, where it has nothing to release.
	switch o.Action {
	case RegisterAndIgnoreExistingKey, ReplaceLostReservation, Release:
	default:
		if o.Key != 0 {
			s.Key = o.Key
		}
	}
	switch o.Action {
	case Register, RegisterAndIgnoreExistingKey:
		if o.Key == 0 && o.ServiceKey == 0 && o.Action == Register {
			return // "do nothing", and no word about APTPL
		}
		s.Key, s.Persist = o.ServiceKey, o.APTPL
		if s.Key == 0 {
			s.Type = None
		}
	case Reserve:
		s.Type = o.Type
	case Release:
		// GOOD also for a type that others hold; then there is nothing to forget.
		s.Type = None
	case Clear:
		s.Key, s.Type = 0, None
	case Preempt, PreemptAndAbort:
		// Whether this took a reservation over, and whether it removed the
		// guest's own registration, depends on what others hold and on the
		// target.
		s.Doubt = true
	case RegisterAndMove:
		s.Type, s.Persist = None, o.APTPL
		if o.Unregister {
			s.Key = 0
		}
	case ReplaceLostReservation:
		s.Key, s.Type = o.ServiceKey, o.Type
	}
}
