package virtio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"vmm/scsi"
)

// Control requests (virtio 1.3, 5.6.6.2): types, task management functions,
// and layouts in bytes.
const (
	scsiTMF         = 0
	scsiANQuery     = 1
	scsiANSubscribe = 2

	tmfAbortTask        = 0
	tmfAbortTaskSet     = 1
	tmfClearACA         = 2
	tmfClearTaskSet     = 3
	tmfITNexusReset     = 4
	tmfLogicalUnitReset = 5
	tmfQueryTask        = 6
	tmfQueryTaskSet     = 7

	tmfRequestSize  = 24 // type, subtype, lun, id
	tmfResponseSize = 1
	anRequestSize   = 16 // type, lun, event_requested
	anResponseSize  = 5  // event_actual, response
)

// handleControl begins what came on the control queue.
func (l *scsiSession) handleControl(r *request) error {
	b := r.header[:tmfRequestSize]
	n := gather(b, r.chain.Readable)
	room := length(r.chain.Writable)
	if n < 4 {
		return fmt.Errorf("a request of %d bytes has no type", n)
	}
	le := binary.LittleEndian
	need, answer := tmfRequestSize, tmfResponseSize
	kind := le.Uint32(b)
	switch kind {
	case scsiTMF:
	case scsiANQuery, scsiANSubscribe:
		need, answer = anRequestSize, anResponseSize
	default:
		return fmt.Errorf("a request has type %d, whose layout nobody knows", kind)
	}
	if n < need || room < answer {
		return fmt.Errorf("a request of type %d is %d bytes with a response of %d, the driver sent %d and left room for %d",
			kind, need, answer, n, room)
	}
	if kind != scsiTMF {
		to := parseAddress([8]byte(b[4:]))
		r.queue.enter(to, 0)
		// No backend reports the events of MMC-6 6.6, so none is supported.
		_, code := l.controller.find(to)
		r.reply([]byte{0, 0, 0, 0, code})
		return nil
	}
	to := parseAddress([8]byte(b[8:]))
	id := le.Uint64(b[16:])
	r.queue.enter(to, id)
	l.manage(r, le.Uint32(b[4:]), to, id)
	return nil
}

// reply answers a control request.
func (r *request) reply(answer []byte) {
	scatter(r.chain.Writable, answer)
	r.queue.leave(r, len(answer))
}

// find looks up a logical unit. The code says why there is none; it is
// FUNCTION COMPLETE for one that exists but does nothing: the well-known one,
// and one that is being detached.
func (s *SCSI) find(to address) (lun scsi.LUN, code byte) {
	switch to.kind {
	case reportLUNs:
		return nil, scsiOK
	case unit:
		t := s.targets[to.target].Load()
		switch {
		case t == nil:
			return nil, scsiBadTarget
		case to.lun > scsiMaxLUN:
			return nil, scsiIncorrectLUN
		case t.busy:
			return nil, scsiOK
		}
		return t.lun, scsiOK
	}
	return nil, scsiBadTarget
}

// manage performs a task management function (SAM-5 7). Commands are not
// aborted: user space cannot call back what it gave to the kernel, and the
// driver reuses a command's memory once it hears that the command has ended.
// So a function that ends commands is answered when they have come back, by a
// goroutine of its own where that takes time; the queue's size bounds those.
func (l *scsiSession) manage(r *request, function uint32, to address, id uint64) {
	sameUnit := func(x *request) bool { return x.to == to }
	sameTask := func(x *request) bool { return x.to == to && x.id == id }

	lun, code := l.controller.find(to)
	switch function {
	case tmfAbortTask, tmfAbortTaskSet:
		match := sameTask
		if function == tmfAbortTaskSet {
			match = sameUnit
		}
		// Of a target that has gone, commands may still be in flight: whatever
		// the answer is, it waits for them.
		l.whenBack(match, func() { r.reply([]byte{code}) })
		return
	case tmfLogicalUnitReset:
		if lun == nil {
			if code == scsiOK {
				code = scsiFunctionRejected
			}
			break
		}
		go func() {
			marks := l.marks()
			switch err := lun.Reset(); {
			case errors.Is(err, scsi.ErrRejected):
				code = scsiFunctionRejected
			case err != nil:
				code = scsiFailure
			default:
				l.await(marks, sameUnit)
			}
			r.reply([]byte{code})
		}()
		return
	case tmfQueryTask, tmfQueryTaskSet:
		match := sameTask
		if function == tmfQueryTaskSet {
			match = sameUnit
		}
		if code == scsiOK && l.has(match) {
			code = scsiFunctionSucceeded
		}
	case tmfClearACA, tmfClearTaskSet, tmfITNexusReset:
		// There is no ACA condition to clear. The other two reach beyond this
		// guest's commands, to other initiators' and to state of the nexus
		// that the host shares; to do half and report success would be a lie.
		fallthrough
	default:
		if code == scsiOK {
			code = scsiFunctionRejected
		}
	}
	r.reply([]byte{code})
}

// has reports whether a command that match selects is in flight.
func (l *scsiSession) has(match func(*request) bool) bool {
	for _, q := range l.requests {
		if q.has(match) {
			return true
		}
	}
	return false
}

// marks names the commands that have come so far.
func (l *scsiSession) marks() []uint64 {
	marks := make([]uint64, len(l.requests))
	for i, q := range l.requests {
		marks[i] = q.mark()
	}
	return marks
}

// await returns when the commands up to marks that match selects have come
// back. Commands that arrive meanwhile do not prolong it.
func (l *scsiSession) await(marks []uint64, match func(*request) bool) {
	for i, q := range l.requests {
		q.await(context.Background(), marks[i], match)
	}
}

// whenBack calls f when the commands that match selects have come back: at once
// if there are none.
func (l *scsiSession) whenBack(match func(*request) bool, f func()) {
	if !l.has(match) {
		f()
		return
	}
	marks := l.marks()
	go func() {
		l.await(marks, match)
		f()
	}()
}
