package virtio

import (
	"context"
	"encoding/binary"
	"fmt"

	"vmm/scsi"
)

// address is what the eight bytes of a lun field name (virtio 1.3, 5.6.6.1).
type address struct {
	kind   addressKind
	target uint8
	lun    uint16 // 14 bits
}

type addressKind uint8

const (
	nowhere    addressKind = iota // no format that exists
	unit                          // a logical unit of a target
	reportLUNs                    // the REPORT LUNS well-known logical unit
)

// parseAddress reads a lun field: 1, the target, a single-level LUN in two
// bytes, four zeroes; or C1h 01h and six zeroes.
func parseAddress(b [8]byte) address {
	if b == [8]byte{0xc1, 0x01} {
		return address{kind: reportLUNs}
	}
	if b[0] != 1 || b[4] != 0 || b[5] != 0 || b[6] != 0 || b[7] != 0 {
		return address{}
	}
	a := address{kind: unit, target: b[1], lun: uint16(b[2]&0x3f)<<8 | uint16(b[3])}
	switch b[2] >> 6 {
	case 0: // peripheral device addressing (SAM-5 4.7.7.2): what Windows sends
		if b[2] == 0 { // of bus 0
			return a
		}
	case 1: // flat space addressing (SAM-5 4.7.7.3): what Linux and EDK2 send
		return a
	}
	return address{}
}

// unitAddress is how the controller names LUN 0 of a target in a list, in the
// form that Linux uses in its requests.
func unitAddress(target uint8) [8]byte { return [8]byte{1, target, 0x40} }

// eventAddress is how an event names it. Linux takes the second two bytes for
// the number as they are: with flat space addressing LUN 0 would be its 16384.
func eventAddress(target uint8) [8]byte { return [8]byte{1, target} }

// Attach makes lun logical unit 0 of a target that does not exist yet, and
// tells a running driver, which scans for it. The caller goes on owning lun
// and closes it after Detach or Remove, or after the device's last Stop.
func (s *SCSI) Attach(number uint8, lun scsi.LUN) error {
	s.mu.Lock()
	switch {
	case s.leaving[number]:
		s.mu.Unlock()
		return fmt.Errorf("virtio-scsi: target %d is still being detached", number)
	case !s.targets[number].CompareAndSwap(nil, &target{lun: lun, stats: make([]QueueStats, s.cfg.Queues)}):
		s.mu.Unlock()
		return fmt.Errorf("virtio-scsi: target %d has a logical unit already", number)
	}
	s.inventory()
	s.mu.Unlock()
	s.events.send(scsiTransportReset, eventAddress(number), scsiReasonRescan)
	return nil
}

// Detach takes a target away when every command to it has come back; until
// then, and while last runs after that, the driver's further commands get
// status BUSY, which has it send them again. When ctx is done first, or last
// returns an error, the target stays as if nothing had been. told says that a
// driver that runs has been told, or will be with certainty: one that has not
// may take the next logical unit of that number for this one.
func (s *SCSI) Detach(ctx context.Context, number uint8, last func() error) (told bool, err error) {
	t, live, err := s.leave(number, func(t *target) *target { return &target{lun: t.lun, stats: t.stats, busy: true} })
	if err != nil {
		return false, err
	}
	if err = live.drain(ctx, number); err == nil {
		err = last()
	}
	s.mu.Lock()
	s.leaving[number] = false
	if err != nil {
		s.targets[number].Store(t)
		s.mu.Unlock()
		return false, err
	}
	s.targets[number].Store(nil)
	s.inventory()
	s.mu.Unlock()
	return s.events.send(scsiTransportReset, eventAddress(number), scsiReasonRemoved), nil
}

// Remove takes a target away at once. The driver is told (see Detach), and its
// further commands find no target; back is closed when those in flight have
// come back, and until then the number is not free.
func (s *SCSI) Remove(number uint8) (told bool, back <-chan struct{}, err error) {
	_, live, err := s.leave(number, func(*target) *target { return nil })
	if err != nil {
		return false, nil, err
	}
	told = s.events.send(scsiTransportReset, eventAddress(number), scsiReasonRemoved)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = live.drain(context.Background(), number) // which is never done
		s.mu.Lock()
		s.leaving[number] = false
		s.mu.Unlock()
	}()
	return told, done, nil
}

// leave puts what becomes of a target in its place, so that no further command
// reaches its logical unit. The session is the one whose commands have.
func (s *SCSI) leave(number uint8, become func(*target) *target) (*target, *scsiSession, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.targets[number].Load()
	switch {
	case s.leaving[number]:
		return nil, nil, fmt.Errorf("virtio-scsi: target %d is being detached already", number)
	case t == nil:
		return nil, nil, fmt.Errorf("virtio-scsi: there is no target %d", number)
	}
	next := become(t)
	s.targets[number].Store(next)
	s.leaving[number] = true
	if next == nil {
		s.inventory()
	}
	return t, s.live, nil
}

// inventory notes that the list of logical units is another one. mu is held.
//
// The unit attention for that (SPC-5 6.33) is due at every logical unit of the
// SCSI target device whose inventory changed. A target here has one, which has
// just come or gone; so what remains is the well-known logical unit, whose
// inventory is that of the whole device.
func (s *SCSI) inventory() {
	if s.live != nil { // a driver that starts scans anyway
		s.lunsChanged.Store(true)
	}
}

// drain waits for commands to a target, and for task management of it.
func (l *scsiSession) drain(ctx context.Context, number uint8) error {
	if l == nil {
		return nil
	}
	match := func(r *request) bool { return r.to.kind == unit && r.to.target == number }
	for _, q := range l.queues() {
		if !q.await(ctx, q.mark(), match) {
			return fmt.Errorf("virtio-scsi: %s: %w", l.inFlight(match), context.Cause(ctx))
		}
	}
	return nil
}

// Changed tells a running driver that parameters of a target's logical unit
// have changed: what is the additional sense code of the unit attention that
// says the same, for example scsi.CapacityChanged.
func (s *SCSI) Changed(number uint8, what scsi.Sense) {
	s.events.send(scsiParamChange, eventAddress(number), uint32(what.ASC)|uint32(what.ASCQ)<<8)
}

// dispatch gives a command to whoever answers it.
func (s *SCSI) dispatch(to address, r *request) {
	c := &r.cmd
	switch to.kind {
	case reportLUNs:
		s.wellKnown(c)
		return
	case unit:
		t := s.targets[to.target].Load()
		switch {
		case t == nil:
			break
		case c.CDB[0] == scsi.OpReportLUNs:
			// Of the target, whichever logical unit is asked. The backend's
			// answer would be that of another bus.
			answerREPORTLUNS(c, [][8]byte{{}}, nil)
			return
		case to.lun > scsiMaxLUN:
			noSuchLUN(c)
			return
		case t.busy:
			r.stats = &t.stats[r.queue.index]
			c.Busy()
			return
		default:
			r.stats = &t.stats[r.queue.index]
			t.lun.Submit(c)
			return
		}
	}
	c.Fail(scsi.BadTarget)
}

// wellKnown is the REPORT LUNS well-known logical unit, which lists what the
// whole device has, by the addresses to use here. Its commands are those that
// SPC-5 8.2 requires.
func (s *SCSI) wellKnown(c *scsi.Command) {
	attention := scsi.Sense{Key: scsi.NoSense}
	// INQUIRY neither reports a unit attention nor ends it (SAM-5 5.14).
	if c.CDB[0] != scsi.OpInquiry && s.lunsChanged.Load() && s.lunsChanged.Swap(false) {
		attention = scsi.ReportedLUNsChanged
	}
	switch c.CDB[0] {
	case scsi.OpReportLUNs:
		var units [][8]byte
		for number := range s.targets {
			if s.targets[number].Load() != nil {
				units = append(units, unitAddress(uint8(number)))
			}
		}
		answerREPORTLUNS(c, units, [][8]byte{{0xc1, 0x01}})
	case scsi.OpInquiry:
		answerINQUIRY(c, 0x1e) // connected, well-known logical unit
	case scsi.OpRequestSense:
		answerREQUESTSENSE(c, attention)
	default:
		switch {
		case attention.Key != scsi.NoSense:
			c.Check(attention)
		case c.CDB[0] == scsi.OpTestUnitReady:
			c.Finish(0)
		default:
			c.Check(scsi.InvalidOpcode)
		}
	}
}

// noSuchLUN answers for a logical unit that a target does not have (SAM-5
// 4.7.4): the two commands that are always answered, and a refusal.
func noSuchLUN(c *scsi.Command) {
	switch c.CDB[0] {
	case scsi.OpInquiry:
		answerINQUIRY(c, 0x7f) // not capable of having a device there
	case scsi.OpRequestSense:
		answerREQUESTSENSE(c, scsi.LUNNotSupported)
	default:
		c.Check(scsi.LUNNotSupported)
	}
}

// reply finishes c with as much of data as the allocation length allows
// (SPC-5 4.2.5.6) and the driver left room for.
func reply(c *scsi.Command, data []byte, allocation uint32) {
	if uint64(allocation) < uint64(len(data)) {
		data = data[:allocation]
	}
	c.Finish(c.Scatter(data))
}

// answerREPORTLUNS is REPORT LUNS (SPC-5 6.33) where there are these logical
// units and these well-known ones.
func answerREPORTLUNS(c *scsi.Command, units, wellKnown [][8]byte) {
	var list [][8]byte
	switch c.CDB[2] { // SELECT REPORT
	case 0:
		list = units
	case 1:
		list = wellKnown
	case 2:
		list = append(units[:len(units):len(units)], wellKnown...)
	default:
		c.Check(scsi.InvalidFieldInCDB)
		return
	}
	data := make([]byte, 8, 8+8*len(list))
	binary.BigEndian.PutUint32(data, uint32(8*len(list)))
	for i := range list {
		data = append(data, list[i][:]...)
	}
	reply(c, data, binary.BigEndian.Uint32(c.CDB[6:]))
}

// answerINQUIRY is INQUIRY (SPC-5 6.7) with a peripheral qualifier and device
// type behind which there is nothing else to describe.
func answerINQUIRY(c *scsi.Command, peripheral byte) {
	var data []byte
	evpd, page := c.CDB[1]&1 != 0, c.CDB[2]
	switch {
	case evpd && page == 0: // Supported VPD Pages: this one
		data = []byte{peripheral, 0, 0, 1, 0}
	case evpd || page != 0:
		c.Check(scsi.InvalidFieldInCDB)
		return
	default:
		data = make([]byte, 36)
		data[0] = peripheral
		data[2] = 0x07 // SPC-5
		data[3] = 0x02 // response data format
		data[4] = byte(len(data) - 5)
		copy(data[8:], "vmm     ")
		copy(data[16:], "virtio-scsi     ")
		copy(data[32:], "1   ")
	}
	reply(c, data, uint32(binary.BigEndian.Uint16(c.CDB[3:])))
}

// answerREQUESTSENSE is REQUEST SENSE (SPC-5 6.39): sense as parameter data.
func answerREQUESTSENSE(c *scsi.Command, sense scsi.Sense) {
	data := make([]byte, scsi.FixedSenseLen)
	if c.CDB[1]&1 != 0 { // DESC
		data = data[:8]
		data[0], data[1], data[2], data[3] = 0x72, byte(sense.Key), sense.ASC, sense.ASCQ
	} else {
		data[0], data[2] = 0x70, byte(sense.Key)
		data[7] = scsi.FixedSenseLen - 8
		data[12], data[13] = sense.ASC, sense.ASCQ
	}
	reply(c, data, uint32(c.CDB[4]))
}
