package virtio

import (
	"encoding/binary"
	"testing"

	"vmm/scsi"
	"vmm/scsi/scsitest"
	"vmm/virtio/virtiotest"
)

type scsiEvent struct {
	event  uint32
	lun    [8]byte
	reason uint32
}

// event waits for the next event. Chains of offer come back in order.
func (r *scsiRig) event(bufs []virtiotest.Buffer) scsiEvent {
	r.t.Helper()
	if u := r.reap(1); u.Written != 16 {
		r.t.Errorf("an event's used length is %d; want 16", u.Written)
	}
	p := r.fetch(bufs)
	return scsiEvent{binary.LittleEndian.Uint32(p), [8]byte(p[4:]), binary.LittleEndian.Uint32(p[12:])}
}

// buffer gives the device one buffer for an event.
func (r *scsiRig) buffer() []virtiotest.Buffer {
	bufs := r.place(make([]byte, 20), 7, true)
	r.add(1, bufs...)
	return bufs
}

func TestSCSIEvents(t *testing.T) {
	const both = scsiFeatureHotplug | scsiFeatureChange
	attach := func(r *scsiRig) { r.attach(7, scsitest.Null{}) }
	change := func(r *scsiRig) { r.dev.Changed(7, scsi.CapacityChanged) }
	detach := func(r *scsiRig) { r.dev.Detach(t.Context(), 7, func() error { return nil }) }
	added := scsiEvent{scsiTransportReset, [8]byte{1, 7}, scsiReasonRescan}
	removed := scsiEvent{scsiTransportReset, [8]byte{1, 7}, scsiReasonRemoved}
	changed := scsiEvent{scsiParamChange, [8]byte{1, 7}, 0x092a}
	for _, test := range []struct {
		name     string
		features uint64
		want     []scsiEvent // of attach, change, detach
	}{
		{"both", both, []scsiEvent{added, changed, removed}},
		{"HOTPLUG", scsiFeatureHotplug, []scsiEvent{added, removed}},
		{"CHANGE", scsiFeatureChange, []scsiEvent{changed}},
		{"neither", 0, nil},
	} {
		r := newSCSIRig(t, 1)
		r.lay(bothFeatures | test.features)
		r.start()
		var bufs [][]virtiotest.Buffer
		for range 4 {
			bufs = append(bufs, r.buffer())
		}
		attach(r)
		change(r)
		detach(r)
		for i, want := range test.want {
			if got := r.event(bufs[i]); got != want {
				t.Errorf("%s: event %d = %+v; want %+v", test.name, i, got, want)
			}
		}
		if _, more := r.rings[1].Reap(); more || r.dev.State().EventsMissed {
			t.Errorf("%s: more events came back or were missed", test.name)
		}
		r.dev.Stop()
	}
}

// Events without a buffer are lost, but not that they were: the next buffer
// says so, once.
func TestSCSIMissedEvents(t *testing.T) {
	lost := scsiEvent{event: scsiEventsMissed | scsiNoEvent}
	r := newSCSIRig(t, 1)
	r.attach(1, scsitest.Null{}) // before the start: the driver will scan
	r.start()
	if r.dev.State().EventsMissed {
		t.Error("an event before the start was missed")
	}
	for range 3 {
		r.dev.Changed(1, scsi.CapacityChanged)
		r.dev.Changed(1, scsi.CapacityChanged)
		if !r.dev.State().EventsMissed {
			t.Error("events without a buffer were not missed")
		}
		if got := r.event(r.buffer()); got != lost {
			t.Errorf("after lost events = %+v; want %+v", got, lost)
		}
		if r.dev.State().EventsMissed {
			t.Error("events are missed after they were reported")
		}
		// An event that finds a buffer is itself again.
		next := r.buffer()
		r.dev.Changed(1, scsi.CapacityChanged)
		if got := r.event(next); got.event != scsiParamChange {
			t.Errorf("the next event = %+v; want %d", got, scsiParamChange)
		}
	}

	// While the device is quiesced it touches no memory: the event is lost,
	// the buffers that lie there tell when it goes on.
	b := r.buffer()
	quiesce(t, r.dev)
	r.dev.Changed(1, scsi.CapacityChanged)
	if _, ok := r.rings[1].Reap(); ok || !r.dev.State().EventsMissed {
		t.Error("a quiesced device used an event buffer")
	}
	r.dev.Resume()
	if got := r.event(b); got != lost {
		t.Errorf("after Resume = %+v; want %+v", got, lost)
	}

	// A reset forgets it, a migration does not.
	r.dev.Changed(1, scsi.CapacityChanged)
	quiesce(t, r.dev)
	state := r.dev.State()
	if want := (SCSIState{SenseSize: 96, CDBSize: 32, EventsMissed: true}); state != want {
		t.Errorf("State() = %+v; want %+v", state, want)
	}
	if err := r.dev.Restore(state); err == nil {
		t.Error("Restore into a started device succeeded")
	}
	r.dev.Stop()
	if r.dev.State().EventsMissed {
		t.Error("a reset did not forget missed events")
	}
	to := newSCSIRig(t, 1)
	if err := to.dev.Restore(state); err != nil {
		t.Fatal(err)
	}
	b = to.buffer()
	to.start()
	if got := to.event(b); got != lost {
		t.Errorf("at the destination = %+v; want %+v", got, lost)
	}
}

// A driver may leave queues alone; boot firmware uses one.
func TestSCSIWorksWithOneQueue(t *testing.T) {
	r := newSCSIRig(t, 3)
	for _, i := range []int{0, 1, 3, 4} {
		r.act.Queues[i] = nil
	}
	r.start()
	r.attach(0, scsitest.NewDisk(1))
	r.dev.Changed(0, scsi.CapacityChanged)
	if a := r.do(&scsiCommand{lun: unit0(0), cdb: []byte{0}}); a.String() != "GOOD" {
		t.Errorf("TEST UNIT READY = %v; want GOOD", a)
	}
	quiesce(t, r.dev)
	r.dev.Resume()
	if err := r.remove(0); err != nil {
		t.Error(err)
	}
}
