package virtio

import (
	"context"
	"encoding/binary"
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"

	"vmm/scsi"
	"vmm/scsi/scsitest"
	"vmm/virtio/virtiotest"
)

// tmf sends a task management function and returns where its answer will be.
func (r *scsiRig) tmf(function uint32, lun [8]byte, id uint64) []virtiotest.Buffer {
	r.t.Helper()
	_, answer := r.sendTMF(function, lun, id)
	return answer
}

func (r *scsiRig) sendTMF(function uint32, lun [8]byte, id uint64) (head uint16, answer []virtiotest.Buffer) {
	r.t.Helper()
	le := binary.LittleEndian
	b := le.AppendUint32(le.AppendUint32(nil, scsiTMF), function)
	b = le.AppendUint64(append(b, lun[:]...), id)
	answer = r.place([]byte{0xa5}, 1, true)
	// In pieces: framing means nothing here either.
	return r.add(0, append(r.place(b, 5, false), answer...)...), answer
}

// doTMF sends a task management function and waits for its answer, which is
// the next to come back.
func (r *scsiRig) doTMF(function uint32, lun [8]byte, id uint64) byte {
	r.t.Helper()
	head, answer := r.sendTMF(function, lun, id)
	if u := r.reap(0); u.Head != head || u.Written != 1 {
		r.t.Errorf("function %d in chain %d: chain %d came back, used length %d; want 1", function, head, u.Head, u.Written)
	}
	return r.fetch(answer)[0]
}

// baitHaste gives a function that does not wait for its commands the chance
// to be answered, which doTMF would notice.
func (r *scsiRig) baitHaste() {
	r.t.Helper()
	for range 5 {
		runtime.Gosched()
		r.doTMF(tmfQueryTask, unit0(0), 99)
	}
}

func TestSCSITaskManagementLooksUpItsLogicalUnit(t *testing.T) {
	r := newSCSIRig(t, 1)
	r.attach(2, scsitest.Null{})
	r.start()
	for _, test := range []struct {
		name     string
		function uint32
		here     byte // of a logical unit that is there
		well     byte // of the REPORT LUNS well-known logical unit
	}{
		{"ABORT TASK", tmfAbortTask, scsiOK, scsiOK},
		{"ABORT TASK SET", tmfAbortTaskSet, scsiOK, scsiOK},
		{"CLEAR ACA", tmfClearACA, scsiFunctionRejected, scsiFunctionRejected},
		{"CLEAR TASK SET", tmfClearTaskSet, scsiFunctionRejected, scsiFunctionRejected},
		{"I_T NEXUS RESET", tmfITNexusReset, scsiFunctionRejected, scsiFunctionRejected},
		{"LOGICAL UNIT RESET", tmfLogicalUnitReset, scsiOK, scsiFunctionRejected},
		{"QUERY TASK", tmfQueryTask, scsiOK, scsiOK},
		{"QUERY TASK SET", tmfQueryTaskSet, scsiOK, scsiOK},
		{"unknown", 8, scsiFunctionRejected, scsiFunctionRejected},
		{"unknown, large", 1 << 31, scsiFunctionRejected, scsiFunctionRejected},
	} {
		for _, at := range []struct {
			name string
			lun  [8]byte
			want byte
		}{
			{"LUN 0", unit0(2), test.here},
			{"W-LUN", [8]byte{0xc1, 1}, test.well},
			{"LUN 1", [8]byte{1, 2, 0x40, 1}, scsiIncorrectLUN},
			{"no target", unit0(9), scsiBadTarget},
			{"no address", [8]byte{9}, scsiBadTarget},
		} {
			if got := r.doTMF(test.function, at.lun, 77); got != at.want {
				t.Errorf("%s on %s = %d; want %d", test.name, at.name, got, at.want)
			}
		}
	}
}

func TestSCSIAsynchronousNotifications(t *testing.T) {
	r := newSCSIRig(t, 1)
	r.attach(2, scsitest.Null{})
	r.start()
	for _, kind := range []byte{scsiANQuery, scsiANSubscribe} {
		for _, test := range []struct {
			lun  [8]byte
			want byte
		}{
			{unit0(2), scsiOK},
			{[8]byte{1, 2, 0x40, 1}, scsiIncorrectLUN},
			{unit0(3), scsiBadTarget},
		} {
			b := make([]byte, 16)
			b[0] = kind
			copy(b[4:], test.lun[:])
			binary.LittleEndian.PutUint32(b[12:], 0x7e)
			answer := r.place([]byte{1, 1, 1, 1, 1}, 2, true)
			r.add(0, append(r.place(b, 7, false), answer...)...)
			u := r.reap(0)
			if got, want := r.fetch(answer), [5]byte{4: test.want}; [5]byte(got) != want || u.Written != 5 {
				t.Errorf("type %d of % x = % x, used length %d; want % x, 5", kind, test.lun, got, u.Written, want)
			}
		}
	}
}

// A function that ends commands is answered when they have come back, and
// then all of them are in the used ring already.
func TestSCSIAbortsWaitForTheirCommands(t *testing.T) {
	for _, test := range []struct {
		name     string
		function uint32
		waits    []int // which of the commands below it must wait for
	}{
		{"ABORT TASK", tmfAbortTask, []int{1}},
		{"ABORT TASK SET", tmfAbortTaskSet, []int{0, 1, 2}},
	} {
		r := newSCSIRig(t, 2)
		mine, other := scsitest.NewHeld(8), scsitest.NewHeld(8)
		r.attach(0, mine)
		r.attach(1, other)
		r.start()
		// Two commands on one queue, one on the other, and one of the same
		// name to another logical unit.
		var held []*scsi.Command
		for i, where := range []struct {
			queue  int
			target uint8
			id     uint64
		}{{2, 0, 10}, {2, 0, 11}, {3, 0, 12}, {3, 1, 11}} {
			r.submit(where.queue, &scsiCommand{lun: unit0(where.target), id: where.id, cdb: []byte{0}})
			if i < 3 {
				held = append(held, <-mine.Commands)
			} else {
				held = append(held, <-other.Commands)
			}
		}
		// The address may be written in another form.
		answer := r.tmf(test.function, [8]byte{1, 0, 0, 0}, 11)
		// The control queue goes on working meanwhile; its answers show that
		// the device has seen the function before.
		if got := r.doTMF(tmfQueryTask, unit0(0), 11); got != scsiFunctionSucceeded {
			t.Errorf("%s: QUERY TASK meanwhile = %d; want %d", test.name, got, scsiFunctionSucceeded)
		}
		// A command that comes later is not waited for.
		r.submit(2, &scsiCommand{lun: unit0(0), id: 13, cdb: []byte{0}})
		later := <-mine.Commands

		for n, i := range test.waits {
			if got := r.fetch(answer)[0]; got != 0xa5 {
				t.Errorf("%s was answered %d with %d of its commands in flight", test.name, got, len(test.waits)-n)
			}
			held[i].Fail(scsi.Aborted)
			if n < len(test.waits)-1 {
				r.baitHaste()
			}
		}
		r.reap(0)
		back := r.act.Queues[2].State().UsedIndex + r.act.Queues[3].State().UsedIndex
		if got := r.fetch(answer)[0]; got != scsiOK || int(back) != len(test.waits) {
			t.Errorf("%s = %d with %d commands back; want %d with %d", test.name, got, back, scsiOK, len(test.waits))
		}
		for i, c := range append(held, later) {
			if done := i < 4 && slices.Contains(test.waits, i); !done {
				c.Finish(0)
			}
		}
		r.dev.Stop()
	}
}

func TestSCSIQueriesSeeCommandsInFlight(t *testing.T) {
	r := newSCSIRig(t, 2)
	held := scsitest.NewHeld(1)
	r.attach(0, held)
	r.attach(1, held)
	r.start()
	ask := func(when string, task, wrongID, set, otherSet byte) {
		t.Helper()
		for _, q := range []struct {
			name     string
			function uint32
			lun      [8]byte
			id       uint64
			want     byte
		}{
			{"QUERY TASK", tmfQueryTask, unit0(0), 5, task},
			{"QUERY TASK of another command", tmfQueryTask, unit0(0), 6, wrongID},
			{"QUERY TASK SET", tmfQueryTaskSet, unit0(0), 0, set},
			{"QUERY TASK SET of another unit", tmfQueryTaskSet, unit0(1), 0, otherSet},
		} {
			if got := r.doTMF(q.function, q.lun, q.id); got != q.want {
				t.Errorf("%s: %s = %d; want %d", when, q.name, got, q.want)
			}
		}
	}
	ask("before", scsiOK, scsiOK, scsiOK, scsiOK)
	r.submit(3, &scsiCommand{lun: unit0(0), id: 5, cdb: []byte{0}})
	c := <-held.Commands
	ask("in flight", scsiFunctionSucceeded, scsiOK, scsiFunctionSucceeded, scsiOK)
	c.Finish(0)
	r.reap(3)
	r.doTMF(tmfAbortTask, unit0(0), 5) // answered when the command has left
	ask("after", scsiOK, scsiOK, scsiOK, scsiOK)
}

func TestSCSILogicalUnitReset(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
		want byte
	}{
		{"done", nil, scsiOK},
		{"rejected", scsi.ErrRejected, scsiFunctionRejected},
		{"failed", errors.New("no"), scsiFailure},
	} {
		r := newSCSIRig(t, 1)
		held := scsitest.NewHeld(2)
		r.attach(0, held)
		r.attach(1, scsitest.Null{})
		r.start()
		r.submit(2, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
		c := <-held.Commands
		answer := r.tmf(tmfLogicalUnitReset, unit0(0), 0)
		reset := <-held.Resets
		// While it is under way, control and request queue go on.
		if got := r.doTMF(tmfQueryTaskSet, unit0(0), 0); got != scsiFunctionSucceeded {
			t.Errorf("%s: QUERY TASK SET meanwhile = %d; want %d", test.name, got, scsiFunctionSucceeded)
		}
		if a := r.do(&scsiCommand{lun: unit0(1), cdb: []byte{0}}); a.String() != "GOOD" {
			t.Errorf("%s: a command to another unit meanwhile = %v; want GOOD", test.name, a)
		}
		reset <- test.err
		if test.err == nil {
			// The commands of the unit come first.
			r.baitHaste()
			if got := r.fetch(answer)[0]; got != 0xa5 {
				t.Errorf("%s was answered %d with a command in flight", test.name, got)
			}
			c.Fail(scsi.ResetOccurred)
			r.reap(0)
		} else {
			r.reap(0)
			c.Finish(0)
		}
		if got := r.fetch(answer)[0]; got != test.want {
			t.Errorf("LOGICAL UNIT RESET that is %s = %d; want %d", test.name, got, test.want)
		}
		r.dev.Stop()
	}
}

// A slow command delays no other, on its queue or another, and answers come
// back in whatever order the commands end.
func TestSCSISlowCommandsDelayNoOther(t *testing.T) {
	r := newSCSIRig(t, 2)
	slow := scsitest.NewHeld(2)
	r.attach(0, slow)
	r.attach(1, scsitest.NewDisk(8))
	r.start()
	first := r.submit(2, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
	second := r.submit(2, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
	for range 20 {
		if a := r.do(&scsiCommand{lun: unit0(1), cdb: rw10(scsi.OpRead10, 0, 1), in: 512}); a.String() != "GOOD" {
			t.Fatalf("READ(10) behind slow commands = %v; want GOOD", a)
		}
	}
	c1, c2 := <-slow.Commands, <-slow.Commands
	c2.Finish(0)
	if u := r.reap(2); u.Head != second.head {
		t.Errorf("chain %d came back first; want %d", u.Head, second.head)
	}
	c1.Finish(0)
	if u := r.reap(2); u.Head != first.head {
		t.Errorf("chain %d came back last; want %d", u.Head, first.head)
	}
}

// The bound on functions under way is the control queue's size; nothing is
// lost when it is reached.
func TestSCSIManyAbortsAtOnce(t *testing.T) {
	r := newSCSIRig(t, 1)
	held := scsitest.NewHeld(1)
	r.attach(0, held)
	r.start()
	r.submit(2, &scsiCommand{lun: unit0(0), id: 9, cdb: []byte{0}})
	c := <-held.Commands
	n := 0
	for ; r.rings[0].Free() > 1; n++ {
		r.tmf(tmfAbortTask, unit0(0), 9)
	}
	if r.doTMF(tmfQueryTask, unit0(1), 9) != scsiBadTarget {
		t.Error("the control queue does not answer behind waiting functions")
	}
	c.Fail(scsi.Aborted)
	for range n {
		r.reap(0)
	}
}

// Remove's target is gone at once: new commands do not find it, and a function
// for the old ones still waits for them.
func TestSCSIRemoveWaitsForCommands(t *testing.T) {
	r := newSCSIRig(t, 1)
	held := scsitest.NewHeld(2)
	r.attach(4, held)
	r.start()
	old := r.submit(2, &scsiCommand{lun: unit0(4), id: 1, cdb: []byte{0}})
	c := <-held.Commands
	r.add(1, virtiotest.Buffer{GPA: r.mem.Alloc(16, 4), Len: 16, Write: true})

	told, gone, err := r.dev.Remove(4)
	if err != nil || !told {
		t.Fatalf("Remove(4) = %v, %v; want that the driver is told", told, err)
	}
	r.reap(1)
	if a := r.do(&scsiCommand{lun: unit0(4), cdb: []byte{0}}); a.code != scsiBadTarget {
		t.Errorf("a command to a target that was removed = %v; want response %d", a, scsiBadTarget)
	}
	answer := r.tmf(tmfAbortTask, unit0(4), 1)
	r.doTMF(tmfQueryTask, unit0(4), 1)
	if got := r.fetch(answer)[0]; got != 0xa5 {
		t.Errorf("ABORT TASK was answered %d with its command in flight", got)
	}
	if err := r.dev.Attach(4, held); err == nil {
		t.Error("Attach(4) succeeded while commands to the former target 4 are in flight")
	}
	if _, err := r.dev.Detach(t.Context(), 4, agree); err == nil {
		t.Error("Detach(4) succeeded after Remove(4)")
	}
	select {
	case <-gone:
		t.Error("Remove's commands are back with one in flight")
	default:
	}
	c.Finish(0)
	r.reap(0)
	if got := r.fetch(answer)[0]; got != scsiBadTarget {
		t.Errorf("ABORT TASK = %d; want %d", got, scsiBadTarget)
	}
	if a := r.answer(old, r.reap(2)); a.String() != "GOOD" {
		t.Errorf("the command = %v; want GOOD", a)
	}
	<-gone
	if _, _, err := r.dev.Remove(4); err == nil {
		t.Error("Remove(4) succeeded twice")
	}
	r.attach(4, held)
	if err := r.dev.Attach(4, held); err == nil {
		t.Error("Attach(4) succeeded twice")
	}
}

func agree() error { return nil }

// Detach waits for the commands first and puts new ones off; the target goes
// when the last has come back and last agrees, or stays.
func TestSCSIDetach(t *testing.T) {
	late, refused := errors.New("too late"), errors.New("refused")
	for _, test := range []struct {
		name string
		back bool  // the command comes back in time
		last error // what last says
		want error
	}{
		{"in time", true, nil, nil},
		{"too late", false, nil, late},
		{"refused", true, refused, refused},
	} {
		r := newSCSIRig(t, 1)
		held := scsitest.NewHeld(2)
		r.attach(4, held)
		r.attach(5, scsitest.Null{})
		r.start()
		old := r.submit(2, &scsiCommand{lun: unit0(4), id: 1, cdb: []byte{0}})
		c := <-held.Commands
		ctx, cancel := context.WithCancelCause(t.Context())
		type result struct {
			told bool
			err  error
		}
		done, asked := make(chan result), false
		go func() {
			told, err := r.dev.Detach(ctx, 4, func() error {
				asked = true
				return test.last
			})
			done <- result{told, err}
		}()
		for !r.isLeaving(4) {
			runtime.Gosched()
		}
		if a := r.do(&scsiCommand{lun: unit0(4), cdb: []byte{0}}); a.String() != "BUSY" {
			t.Errorf("%s: a command to a target that is being detached = %v; want BUSY", test.name, a)
		}
		if got := r.doTMF(tmfLogicalUnitReset, unit0(4), 0); got != scsiFunctionRejected {
			t.Errorf("%s: LOGICAL UNIT RESET = %d; want %d", test.name, got, scsiFunctionRejected)
		}
		if a := r.do(&scsiCommand{lun: unit0(5), cdb: []byte{0}}); a.String() != "GOOD" {
			t.Errorf("%s: a command to another target = %v; want GOOD", test.name, a)
		}
		if err := r.dev.Attach(4, held); err == nil {
			t.Errorf("%s: Attach(4) succeeded while target 4 is being detached", test.name)
		}
		if _, _, err := r.dev.Remove(4); err == nil {
			t.Errorf("%s: Remove(4) succeeded while target 4 is being detached", test.name)
		}
		if test.back {
			c.Finish(0)
			if a := r.answer(old, r.reap(2)); a.String() != "GOOD" {
				t.Errorf("%s: the command in flight = %v; want GOOD", test.name, a)
			}
		} else {
			cancel(late)
		}
		got := <-done
		cancel(nil)
		if !errors.Is(got.err, test.want) || asked != test.back || got.told {
			t.Errorf("%s: Detach(4) = %v, %v, asked: %v; want %v, not told for want of a buffer", test.name, got.told, got.err, asked, test.want)
		}
		if test.want == late && !strings.Contains(got.err.Error(), "commands still in flight: 1, one of them for target 4, operation code 0x00") {
			t.Errorf("%s: Detach(4) = %v; want what is in flight", test.name, got.err)
		}
		if missed := r.dev.State().EventsMissed; missed != (test.want == nil) {
			t.Errorf("%s: events were missed: %v", test.name, missed)
		}
		if test.want == nil {
			if a := r.do(&scsiCommand{lun: unit0(4), cdb: []byte{0}}); a.code != scsiBadTarget {
				t.Errorf("%s: a command after it = %v; want response %d", test.name, a, scsiBadTarget)
			}
			continue
		}
		// As if nothing had been.
		cmd := r.submit(2, &scsiCommand{lun: unit0(4), id: 2, cdb: []byte{0}})
		(<-held.Commands).Finish(0)
		if a := r.answer(cmd, r.reap(2)); a.String() != "GOOD" {
			t.Errorf("%s: the next command = %v; want GOOD", test.name, a)
		}
		if !test.back {
			c.Finish(0)
			r.reap(2)
		}
	}
}

func (r *scsiRig) isLeaving(number uint8) bool {
	r.dev.mu.Lock()
	defer r.dev.mu.Unlock()
	return r.dev.leaving[number]
}

// A change of the list of logical units is a unit attention of the well-known
// one, which reports it once; a target that stays has none.
func TestSCSIReportedLUNsChanged(t *testing.T) {
	wellKnown := [8]byte{0xc1, 0x01}
	tur := func(to [8]byte) *scsiCommand { return &scsiCommand{lun: to, cdb: make([]byte, 6)} }
	list := &scsiCommand{lun: wellKnown, cdb: []byte{scsi.OpReportLUNs, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0}, in: 64}
	inquiry := &scsiCommand{lun: wellKnown, cdb: []byte{scsi.OpInquiry, 0, 0, 0, 36, 0}, in: 36}
	sense := &scsiCommand{lun: wellKnown, cdb: []byte{scsi.OpRequestSense, 0, 0, 0, 18, 0}, in: 18}
	r := newSCSIRig(t, 1)
	r.attach(0, scsitest.Null{}) // before the start: nobody had seen another list
	r.start()
	if a := r.do(tur(wellKnown)); a.String() != "GOOD" {
		t.Errorf("before a change: TEST UNIT READY = %v; want GOOD", a)
	}
	const attention = "6/3f/0e"
	for name, change := range map[string]func() error{
		"attach": func() error { return r.dev.Attach(3, scsitest.Null{}) },
		"detach": func() error {
			_, err := r.dev.Detach(t.Context(), 0, agree)
			return errors.Join(err, r.dev.Attach(0, scsitest.Null{}))
		},
		"remove": func() error { return errors.Join(r.remove(0), r.dev.Attach(0, scsitest.Null{})) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if a := r.do(inquiry); a.String() != "GOOD" {
			t.Errorf("%s: INQUIRY = %v; want GOOD", name, a)
		}
		if a := r.do(tur(unit0(0))); a.String() != "GOOD" {
			t.Errorf("%s: TEST UNIT READY of a target = %v; want GOOD", name, a)
		}
		if a := r.do(tur(wellKnown)); a.String() != attention {
			t.Errorf("%s: TEST UNIT READY = %v; want %s", name, a, attention)
		}
		if a := r.do(tur(wellKnown)); a.String() != "GOOD" {
			t.Errorf("%s: the next TEST UNIT READY = %v; want GOOD", name, a)
		}
	}
	// REPORT LUNS is carried out and ends it; REQUEST SENSE has it as data.
	if err := r.remove(3); err != nil {
		t.Fatal(err)
	}
	if a := r.do(list); a.String() != "GOOD" {
		t.Errorf("REPORT LUNS = %v; want GOOD", a)
	}
	if a := r.do(tur(wellKnown)); a.String() != "GOOD" {
		t.Errorf("TEST UNIT READY after REPORT LUNS = %v; want GOOD", a)
	}
	r.attach(3, scsitest.Null{})
	if a := r.do(sense); a.String() != "GOOD" || a.data[2] != 6 || a.data[12] != 0x3f || a.data[13] != 0x0e {
		t.Errorf("REQUEST SENSE = %v, % x; want 6/3f/0e", a, a.data)
	}
	// A migration takes it along, a reset ends it.
	if err := r.remove(3); err != nil {
		t.Fatal(err)
	}
	quiesce(t, r.dev)
	state := r.dev.State()
	r.dev.Stop()
	if !state.LUNsChanged || r.dev.State().LUNsChanged {
		t.Errorf("State() = %+v, then %+v after a reset; want the attention in the first alone", state, r.dev.State())
	}
	to := newSCSIRig(t, 1)
	if err := to.dev.Restore(state); err != nil {
		t.Fatal(err)
	}
	to.start()
	if a := to.do(tur(wellKnown)); a.String() != attention {
		t.Errorf("at the destination: TEST UNIT READY = %v; want %s", a, attention)
	}
}
