package virtio

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vmm/memory"
	"vmm/pci"
	"vmm/virtio/virtiotest"
)

// echo is a device that copies what it reads to what it writes, and tells
// what was done to it.
type echo struct {
	mu     sync.Mutex
	calls  []string
	a      Activation
	config [8]byte

	startErr  error
	failStart error         // passed to Fail inside Start
	stopGate  chan struct{} // where not nil, Stop waits for it to close

	done sync.WaitGroup
	stop atomic.Bool
}

func (d *echo) note(call string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, call)
}

// took answers the calls since the last time.
func (d *echo) took() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := strings.Join(d.calls, " ")
	d.calls = nil
	return s
}

func (d *echo) ID() uint16           { return 0x3f }
func (d *echo) Features() uint64     { return 1<<5 | FeatureIndirectDesc | FeatureEventIdx }
func (d *echo) QueueSizes() []uint16 { return []uint16{16, 64} }

func (d *echo) ReadConfig(off uint32, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(p)
	if off < 8 {
		copy(p, d.config[off:])
	}
}

func (d *echo) WriteConfig(off uint32, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off < 8 {
		copy(d.config[off:], p)
	}
}

func (d *echo) Start(a Activation) error {
	d.note("start")
	d.mu.Lock()
	d.a = a
	d.mu.Unlock()
	if d.failStart != nil {
		a.Fail(d.failStart)
	}
	if d.startErr != nil {
		return d.startErr
	}
	d.run()
	return nil
}

func (d *echo) run() {
	d.stop.Store(false)
	for _, q := range d.a.Queues {
		if q != nil {
			d.done.Go(func() { d.work(q) })
		}
	}
}

func (d *echo) halt() {
	d.stop.Store(true)
	for _, q := range d.a.Queues {
		if q != nil {
			q.Kick()
		}
	}
	d.done.Wait()
}

func (d *echo) work(q *Queue) {
	c := q.NewChain()
	for !d.stop.Load() {
		q.DisableNotify()
		for {
			ok, err := q.Pop(c)
			if err != nil {
				d.a.Fail(err)
				return
			}
			if !ok {
				break
			}
			n := 0
			if len(c.Readable) > 0 && len(c.Writable) > 0 {
				n = copy(c.Writable[0].Data, c.Readable[0].Data)
			}
			q.Push(c, uint32(n))
			q.Interrupt()
		}
		if !q.EnableNotify() {
			q.Wait()
		}
	}
}

func (d *echo) Quiesce(context.Context) error { d.note("quiesce"); d.halt(); return nil }
func (d *echo) Resume()                       { d.note("resume"); d.run() }

func (d *echo) Stop() {
	d.note("stop")
	if d.stopGate != nil {
		<-d.stopGate
	}
	d.halt()
	d.mu.Lock()
	d.a, d.config = Activation{}, [8]byte{}
	d.mu.Unlock()
}

// quiesce makes a device or its transport rest, however long it takes.
func quiesce(t testing.TB, d interface{ Quiesce(context.Context) error }) {
	t.Helper()
	if err := d.Quiesce(context.Background()); err != nil {
		t.Errorf("Quiesce() = %v", err)
	}
}

// guest is a device on a bus, and its driver.
type guest struct {
	mem *virtiotest.Memory
	bus *virtiotest.Bus
	pci *PCI
	drv *virtiotest.Device

	mu   sync.Mutex
	logs []string
}

const slot = 3

func newGuest(t testing.TB, dev Device) *guest {
	t.Helper()
	g := &guest{mem: virtiotest.NewMemory(t, 1<<20), bus: virtiotest.NewBus(t)}
	var err error
	g.pci, err = NewPCI(dev, PCIConfig{RAM: g.mem.RAM, Name: "test", Log: func(err error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.logs = append(g.logs, err.Error())
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.bus.Host.Add(slot, g.pci.Function()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.bus.Host.Close(); err != nil {
			t.Errorf("Host.Close() = %v", err)
		}
		if err := g.pci.Close(); err != nil {
			t.Errorf("PCI.Close() = %v", err)
		}
	})
	if g.drv, err = virtiotest.Probe(g.bus, slot); err != nil {
		t.Fatal(err)
	}
	return g
}

// took answers the messages since the last time.
func (g *guest) took() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := strings.Join(g.logs, "; ")
	g.logs = nil
	return s
}

func (g *guest) start(t testing.TB, features uint64) {
	t.Helper()
	if err := g.drv.Start(g.mem, features); err != nil {
		t.Fatal(err)
	}
}

// wait blocks until queue i has given a request back.
func (g *guest) wait(t testing.TB, i int) virtiotest.Used {
	t.Helper()
	r := g.drv.Rings[i]
	for {
		if u, ok := r.Reap(); ok {
			return u
		}
		if !r.EnableInterrupt() {
			g.drv.Interrupt(i + 1).Wait()
		}
	}
}

func TestPCIIdentity(t *testing.T) {
	for _, test := range []struct {
		dev      Device
		id       uint64
		class    uint64
		typ      uint16
		features uint64
	}{
		{NewRNG(), 0x10441af4, 0xff0000, 4, 1<<32 | 1<<29 | 1<<28},
		{&echo{}, 0x107f1af4, 0xff0000, 0x3f, 1<<32 | 1<<29 | 1<<28 | 1<<5},
	} {
		g := newGuest(t, test.dev)
		if got := g.bus.Config(slot, 0, 4); got != test.id {
			t.Errorf("id %#x; want %#x", got, test.id)
		}
		if got := g.bus.Config(slot, 8, 4); got != test.class<<8|1 {
			t.Errorf("class and revision %#x; want %#x, 1", got, test.class)
		}
		if got := g.bus.Config(slot, 0x2e, 2); got < 0x40 {
			t.Errorf("subsystem %#x; want at least 0x40", got)
		}
		if got := g.drv.Type(); got != test.typ {
			t.Errorf("device type %d; want %d", got, test.typ)
		}
		if got := g.drv.Offered(); got != test.features {
			t.Errorf("features %#x; want %#x", got, test.features)
		}
		g.drv.SetField(virtiotest.DeviceFeatureSelect, 4, 2)
		if got := g.drv.Field(virtiotest.DeviceFeature, 4); got != 0 {
			t.Errorf("features from bit 64 on: %#x; want none", got)
		}
		g.bus.Ports = true
		again, err := virtiotest.Probe(g.bus, slot)
		if err != nil || again.Common != g.drv.Common || again.Notify != g.drv.Notify {
			t.Errorf("through the ports: %+v, %v; want %+v", again, err, g.drv)
		}
	}
}

func TestRequestsThroughRegisters(t *testing.T) {
	for _, features := range []uint64{FeatureVersion1, bothFeatures} {
		g := newGuest(t, &echo{})
		g.start(t, features)
		in, out := g.mem.Alloc(64, 1), g.mem.Alloc(64, 1)
		for i := range 200 {
			queue := i % 2
			r := g.drv.Rings[queue]
			text := fmt.Sprintf("request %d", i)
			copy(g.mem.Bytes(in, 64), text)
			add := r.Add
			if features&FeatureIndirectDesc != 0 && i%3 == 0 {
				add = r.AddIndirect
			}
			head, _ := add(virtiotest.Buffer{GPA: in, Len: uint32(len(text))}, virtiotest.Buffer{GPA: out, Len: 64, Write: true})
			r.Kick()
			if u := g.wait(t, queue); u.Head != head || int(u.Written) != len(text) || string(g.mem.Bytes(out, uint64(u.Written))) != text {
				t.Fatalf("features %#x: request %d came back as %+v, %q", features, i, u, g.mem.Bytes(out, 16))
			}
		}
	}
}

func TestFeatureNegotiation(t *testing.T) {
	for _, test := range []struct {
		name   string
		accept uint64
		high   uint64 // bits 64 to 95
		ok     bool
		log    string
	}{
		{"all", bothFeatures | 1<<5, 0, true, ""},
		{"least", FeatureVersion1, 0, true, ""},
		{"no VERSION_1", FeatureEventIdx, 0, false, "VERSION_1"},
		{"nothing", 0, 0, false, "VERSION_1"},
		{"not offered", FeatureVersion1 | 1<<6, 0, false, "accepts features 0x100000040, offered are 0x130000020"},
		{"not offered, high half", FeatureVersion1 | 1<<40, 0, false, "accepts features"},
		{"beyond bit 63", FeatureVersion1, 1, false, "accepts features"},
		{"zeros beyond bit 63", FeatureVersion1, 0, true, ""},
	} {
		d := &echo{}
		g := newGuest(t, d)
		g.drv.AddStatus(virtiotest.StatusAcknowledge | virtiotest.StatusDriver)
		g.drv.Accept(test.accept)
		g.drv.SetField(virtiotest.DriverFeatureSelect, 4, 2)
		g.drv.SetField(virtiotest.DriverFeature, 4, test.high)
		g.drv.AddStatus(virtiotest.StatusFeaturesOK)
		if got := g.drv.Status()&virtiotest.StatusFeaturesOK != 0; got != test.ok {
			t.Errorf("%s: FEATURES_OK = %v; want %v", test.name, got, test.ok)
		}
		if got := g.took(); test.log == "" && got != "" || !strings.Contains(got, test.log) {
			t.Errorf("%s: log %q; want %q", test.name, got, test.log)
		}
		if test.ok {
			// Settled: a later write is ignored.
			g.drv.Accept(FeatureVersion1 | 1<<7)
			g.drv.AddStatus(virtiotest.StatusDriverOK)
			if d.took(); d.a.Features != test.accept {
				t.Errorf("%s: the device got features %#x; want %#x", test.name, d.a.Features, test.accept)
			}
		} else {
			g.drv.AddStatus(virtiotest.StatusDriverOK)
			if got := g.drv.Status(); got&virtiotest.StatusDriverOK != 0 || d.took() != "" {
				t.Errorf("%s: the device started, status %#x", test.name, got)
			}
		}
	}
}

func TestStatus(t *testing.T) {
	d := &echo{}
	g := newGuest(t, d)
	set := func(v uint8) uint8 {
		g.drv.SetField(virtiotest.DeviceStatus, 1, uint64(v))
		return g.drv.Status()
	}
	g.drv.Accept(FeatureVersion1)
	for _, step := range []struct {
		write, want uint8
		calls       string
	}{
		{1, 1, ""},
		{2, 3, ""}, // bits are added, never taken away
		{7, 3, ""}, // no DRIVER_OK without FEATURES_OK
		{64 | 32 | 16, 3, ""},
		{8, 11, ""},
		{15, 15, "start"},
		{15, 15, ""}, // no second start
		{4, 15, ""},
		{128, 143, ""}, // gave up; it runs on until the reset
		{64, 143, ""},
	} {
		if got := set(step.write); got != step.want {
			t.Errorf("status %#x after writing %#x; want %#x", got, step.write, step.want)
		}
		if got := d.took(); got != step.calls {
			t.Errorf("writing %#x called %q; want %q", step.write, got, step.calls)
		}
	}
	if got := g.took(); !strings.Contains(got, "DRIVER_OK without FEATURES_OK") || !strings.Contains(got, "given up") {
		t.Errorf("log %q", got)
	}
	g.drv.Reset()
	if got := d.took(); got != "stop" {
		t.Errorf("reset called %q; want one stop", got)
	}
	// FAILED before the start: only a reset helps.
	g.drv.Accept(FeatureVersion1)
	set(1 | 2 | 8 | 128)
	if got := set(4); got != 139 || d.took() != "" {
		t.Errorf("status %#x after FAILED and DRIVER_OK; want 0x8b and no start", got)
	}
	// In one write.
	g.drv.Reset()
	d.took()
	g.drv.Accept(FeatureVersion1)
	if got := set(15); got != 15 || d.took() != "start" {
		t.Errorf("status %#x after one write of 0xf; want it, and a start", got)
	}
	g.drv.Reset()
}

func TestResetDoesNotKeepTheVCPU(t *testing.T) {
	gate := make(chan struct{})
	d := &echo{}
	g := newGuest(t, d)
	g.start(t, bothFeatures)
	d.took()
	fail := d.a.Fail
	d.stopGate = gate
	g.drv.SetField(virtiotest.DeviceStatus, 1, 0) // returns although Stop does not
	for range 3 {
		if got := g.drv.Status(); got != 15 {
			t.Errorf("status %#x while the device stops; want what it was, not 0", got)
		}
		// A driver that does not wait changes nothing, and stops nothing twice.
		g.drv.SetField(virtiotest.DeviceStatus, 1, 0)
		g.drv.SetField(virtiotest.DeviceStatus, 1, 1)
		g.drv.SetField(virtiotest.QueueSelect, 2, 0)
		if got := g.drv.Field(virtiotest.QueueSelect, 2); got != 1 {
			t.Errorf("queue_select %d; want 1, as it was", got)
		}
		// Nor does anybody want to hear of a failure now.
		fail(errors.New("in the middle"))
		if got := g.took(); got != "" {
			t.Errorf("log %q during the reset", got)
		}
	}
	// The machine's calls wait, as long as they may.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.pci.Quiesce(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "reset") {
		t.Errorf("Quiesce() = %v during the reset; want a canceled one that says so", err)
	}
	quiesced := make(chan struct{})
	go func() { quiesce(t, g.pci); close(quiesced) }()
	close(gate)
	<-quiesced
	g.drv.Reset()
	if got := g.drv.Status(); got != 0 {
		t.Errorf("status %#x after the reset; want 0", got)
	}
	if got := d.took(); got != "stop stop" { // the second on an idle device
		t.Errorf("calls %q; want no quiesce", got)
	}
	g.start(t, bothFeatures) // and it works again
	g.drv.Rings[0].Add(virtiotest.Buffer{GPA: 0x8000, Len: 1})
	g.drv.Rings[0].Kick()
	g.wait(t, 0)
}

func TestRegistersAfterReset(t *testing.T) {
	g := newGuest(t, &echo{})
	fresh := g.common()
	g.start(t, bothFeatures)
	g.drv.SetField(virtiotest.DriverFeatureSelect, 4, 7)
	g.drv.SetField(virtiotest.DeviceFeatureSelect, 4, 7)
	g.drv.Reset()
	if got := g.common(); got != fresh {
		t.Errorf("registers after reset\n% x; want\n% x", got, fresh)
	}
	for i, size := range []uint64{16, 64, 0} {
		g.drv.SetField(virtiotest.QueueSelect, 2, uint64(i))
		if got := g.drv.Field(virtiotest.QueueSize, 2); got != size {
			t.Errorf("queue %d size %d; want %d", i, got, size)
		}
		if got := g.drv.Field(virtiotest.QueueVector, 2); got != virtiotest.NoVector {
			t.Errorf("queue %d vector %#x; want none", i, got)
		}
		if got := g.drv.Field(virtiotest.QueueEnable, 2); got != 0 {
			t.Errorf("queue %d enabled %d", i, got)
		}
	}
}

// common reads the common configuration byte by byte.
func (g *guest) common() (c [commonSize]byte) {
	for i := range c {
		c[i] = byte(g.drv.Field(memory.GPA(i), 1))
	}
	return c
}

func TestCommonConfigAtAnyWidth(t *testing.T) {
	g := newGuest(t, &echo{})
	g.drv.SetField(virtiotest.QueueDesc, 8, 0x123456789abcdef0)
	g.drv.SetField(virtiotest.QueueDriver, 8, 0x1111222233334444)
	if got := g.drv.Field(virtiotest.QueueDesc, 8); got != 0x123456789abcdef0 {
		t.Errorf("queue_desc %#x", got)
	}
	g.bus.Write(g.drv.Common+virtiotest.QueueDevice, 8, 0x5555666677778888) // in one piece
	g.bus.Write(g.drv.Common+virtiotest.QueueDesc+3, 2, 0xffff)             // across the halves
	want := g.common()
	if got := binary.LittleEndian.Uint64(want[0x20:]); got != 0x123456ffffbcdef0 {
		t.Errorf("queue_desc after an odd write: %#x", got)
	}
	if got := binary.LittleEndian.Uint64(want[0x30:]); got != 0x5555666677778888 {
		t.Errorf("queue_device after a write of 8 bytes: %#x", got)
	}
	for _, n := range []int{1, 2, 4, 8} {
		for off := 0; off+n <= 0x40; off++ {
			var w [8]byte
			if off < commonSize {
				copy(w[:n], want[off:])
			}
			if got := g.drv.Field(memory.GPA(off), n); got != binary.LittleEndian.Uint64(w[:]) {
				t.Errorf("%d bytes at %#x = %#x; want % x", n, off, got, w[:n])
			}
		}
	}
	// One write over several fields: each is set, in order.
	g.bus.Write(g.drv.Common+virtiotest.QueueSelect, 4, 8<<16|1) // select 1, size 8
	g.drv.SetField(virtiotest.QueueSelect, 2, 0)
	if got := g.drv.Field(virtiotest.QueueSize, 2); got != 16 {
		t.Errorf("queue 0 size %d; want 16", got)
	}
	g.drv.SetField(virtiotest.QueueSelect, 2, 1)
	if got := g.drv.Field(virtiotest.QueueSize, 2); got != 8 {
		t.Errorf("queue 1 size %d; want 8", got)
	}
	// Beyond the last register of each structure.
	for _, at := range []memory.GPA{g.drv.Common + 0x38, g.drv.Common + 0xffc, g.drv.ISR + 4, g.drv.Config + 0xffc, g.drv.Notify + 0xffc} {
		g.bus.Write(at, 8, ^uint64(0))
		if got := g.bus.Read(at, 4); got != 0 {
			t.Errorf("%v reads %#x; want 0", at, got)
		}
	}
}

func TestQueueRegistersFreezeWhenEnabled(t *testing.T) {
	g := newGuest(t, &echo{})
	g.start(t, bothFeatures)
	for i := range 3 {
		g.drv.SetField(virtiotest.QueueSelect, 2, uint64(i))
		before := g.common()
		g.drv.SetField(virtiotest.QueueSize, 2, 4)
		g.drv.SetField(virtiotest.QueueEnable, 2, 0)
		g.drv.SetField(virtiotest.QueueDesc, 8, 0x1000)
		g.drv.SetField(virtiotest.QueueDriver, 8, 0x1000)
		g.drv.SetField(virtiotest.QueueDevice, 8, 0x1000)
		if got := g.common(); got != before {
			t.Errorf("queue %d: registers changed\n% x; were\n% x", i, got, before)
		}
	}
}

func TestBadQueuesNeedAReset(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*virtiotest.Device)
		want   string
	}{
		{"size 3", func(d *virtiotest.Device) { d.SetField(virtiotest.QueueSize, 2, 3) }, "queue 0: virtqueue of 3 descriptors"},
		{"size 0", func(d *virtiotest.Device) { d.SetField(virtiotest.QueueSize, 2, 0) }, "queue 0: virtqueue of 0"},
		{"too large", func(d *virtiotest.Device) { d.SetField(virtiotest.QueueSize, 2, 32) }, "the device offers 16"},
		{"no memory there", func(d *virtiotest.Device) { d.SetField(virtiotest.QueueDevice, 8, 1<<40) }, "device area"},
		{"unaligned", func(d *virtiotest.Device) { d.SetField(virtiotest.QueueDesc, 8, 8) }, "not 16-byte aligned"},
	} {
		d := &echo{}
		g := newGuest(t, d)
		if err := g.drv.Negotiate(bothFeatures); err != nil {
			t.Fatal(err)
		}
		g.drv.EnableMSIX()
		g.drv.SetField(virtiotest.ConfigVector, 2, 0)
		g.drv.SetField(virtiotest.QueueSelect, 2, 0)
		g.drv.SetField(virtiotest.QueueDesc, 8, 0x1000)
		g.drv.SetField(virtiotest.QueueDriver, 8, 0x2000)
		g.drv.SetField(virtiotest.QueueDevice, 8, 0x3000)
		test.change(g.drv)
		g.drv.SetField(virtiotest.QueueEnable, 2, 1)
		g.drv.AddStatus(virtiotest.StatusDriverOK)
		if got := g.drv.Status(); got != 15|64 {
			t.Errorf("%s: status %#x; want NEEDS_RESET", test.name, got)
		}
		if got := d.took(); got != "" {
			t.Errorf("%s: the device was called: %s", test.name, got)
		}
		if got := g.took(); !strings.Contains(got, "test: the device needs a reset: ") || !strings.Contains(got, test.want) {
			t.Errorf("%s: log %q; want %q", test.name, got, test.want)
		}
		if n := g.drv.Interrupt(0).Drain(); n != 1 {
			t.Errorf("%s: %d configuration interrupts; want 1", test.name, n)
		}
		g.start(t, bothFeatures) // a reset helps
	}
}

func TestFailedStart(t *testing.T) {
	for _, d := range []*echo{{startErr: errors.New("no disk")}, {failStart: errors.New("no disk")}, {startErr: errors.New("no disk"), failStart: errors.New("no disk")}} {
		g := newGuest(t, d)
		if err := g.drv.Start(g.mem, bothFeatures); err == nil || g.drv.Status() != 15|64 {
			t.Errorf("Start() = %v, status %#x; want NEEDS_RESET", err, g.drv.Status())
		}
		if got := g.took(); strings.Count(got, "no disk") != 1 {
			t.Errorf("log %q; want the cause, once", got)
		}
		g.drv.Reset()
		if got := d.took(); !strings.HasSuffix(got, "start stop") {
			t.Errorf("calls %q; want a stop after the failed start", got)
		}
		d.startErr, d.failStart = nil, nil
		g.start(t, bothFeatures)
	}
}

func TestABrokenRuleNeedsAReset(t *testing.T) {
	d := &echo{}
	g := newGuest(t, d)
	g.start(t, bothFeatures)
	fail, changed := d.a.Fail, d.a.ConfigChanged
	g.drv.Rings[1].Add(virtiotest.Buffer{GPA: 1 << 40, Len: 1})
	g.drv.Rings[1].Kick()
	if n, _ := g.drv.Interrupt(0).Wait(); n != 1 {
		t.Errorf("%d configuration interrupts; want 1", n)
	}
	if got := g.drv.Status(); got != 15|64 {
		t.Errorf("status %#x; want NEEDS_RESET", got)
	}
	if got := g.took(); !strings.Contains(got, "1 bytes at guest address 0x10000000000 are not all RAM") {
		t.Errorf("log %q", got)
	}
	fail(errors.New("again"))
	if got := g.took(); got != "" || g.drv.Interrupt(0).Drain() != 0 {
		t.Errorf("a second failure was told: %q", got)
	}
	g.drv.Reset()
	// The old session is over.
	fail(errors.New("late"))
	changed()
	if got := g.took(); got != "" || g.drv.Status() != 0 || g.bus.Read(g.drv.ISR, 1) != 0 {
		t.Errorf("a failure after the reset was heard: %q, status %#x", got, g.drv.Status())
	}
	g.start(t, bothFeatures)
	fail(errors.New("later"))
	if got := g.drv.Status(); got != 15 {
		t.Errorf("a failure of the session before broke this one: status %#x", got)
	}
}

func TestVectors(t *testing.T) {
	g := newGuest(t, &echo{})
	for _, test := range []struct{ write, want uint64 }{{0, 0}, {2, 2}, {3, 0xffff}, {0xfffe, 0xffff}, {1, 1}, {0xffff, 0xffff}} {
		g.drv.SetField(virtiotest.ConfigVector, 2, test.write)
		if got := g.drv.Field(virtiotest.ConfigVector, 2); got != test.want {
			t.Errorf("configuration vector %#x after %#x; want %#x", got, test.write, test.want)
		}
		g.drv.SetField(virtiotest.QueueVector, 2, test.write)
		if got := g.drv.Field(virtiotest.QueueVector, 2); got != test.want {
			t.Errorf("queue vector %#x after %#x; want %#x", got, test.write, test.want)
		}
	}
	g.drv.SetField(virtiotest.QueueSelect, 2, 9) // no such queue
	g.drv.SetField(virtiotest.QueueVector, 2, 1)
	if got := g.drv.Field(virtiotest.QueueVector, 2); got != 0xffff {
		t.Errorf("vector %#x of a queue that there is not; want none", got)
	}
}

func TestInterruptStatus(t *testing.T) {
	d := &echo{}
	g := newGuest(t, d)
	g.start(t, FeatureVersion1)
	// With MSI-X only the configuration bit is set (virtio 1.3, 4.1.4.5.1).
	g.drv.Rings[0].Add(virtiotest.Buffer{GPA: 0x8000, Len: 1})
	g.drv.Rings[0].Kick()
	g.wait(t, 0)
	d.a.ConfigChanged()
	if got := g.bus.Read(g.drv.ISR, 1); got != isrConfig {
		t.Errorf("interrupt status %#x; want the configuration's", got)
	}
	if got := g.bus.Read(g.drv.ISR, 1); got != 0 {
		t.Errorf("interrupt status %#x after it was read; want 0", got)
	}
	if got := g.drv.Field(virtiotest.ConfigGeneration, 1); got != 1 {
		t.Errorf("configuration generation %d; want 1", got)
	}
	if n := g.drv.Interrupt(0).Drain(); n != 1 {
		t.Errorf("%d configuration interrupts; want 1", n)
	}
	// Without it a driver can poll.
	g.bus.SetConfig(slot, g.drv.MSIX+2, 2, 0)
	g.drv.Rings[0].Add(virtiotest.Buffer{GPA: 0x8000, Len: 1})
	g.drv.Rings[0].Kick()
	for g.bus.Read(g.drv.ISR, 1)&isrQueue == 0 {
		runtime.Gosched()
	}
}

func TestConfigurationAccess(t *testing.T) {
	d := &echo{}
	g := newGuest(t, d)
	g.start(t, bothFeatures)
	access := func(bar, off, n uint64) {
		g.bus.SetConfig(slot, g.drv.Access+4, 1, bar)
		g.bus.SetConfig(slot, g.drv.Access+8, 4, off)
		g.bus.SetConfig(slot, g.drv.Access+12, 4, n)
	}
	data := g.drv.Access + 16
	access(0, commonRegion+virtiotest.NumQueues, 2)
	if got := g.bus.Config(slot, data, 4); got != 2 {
		t.Errorf("num_queues through the capability = %#x; want 2", got)
	}
	access(0, deviceRegion+4, 4)
	g.bus.SetConfig(slot, data, 4, 0xcafe)
	if got := g.bus.Read(g.drv.Config+4, 4); got != 0xcafe {
		t.Errorf("device configuration %#x; want 0xcafe", got)
	}
	// A notification without the kernel's help.
	access(0, notifyRegion+notifyMultiple, 2)
	g.drv.Rings[1].Notify = func() { g.bus.SetConfig(slot, data, 2, 1) }
	g.drv.Rings[1].Add(virtiotest.Buffer{GPA: 0x8000, Len: 1})
	if !g.drv.Rings[1].Kick() {
		t.Error("the queue wants no notification")
	}
	g.wait(t, 1)
	// What is not allowed does nothing: the data stays what was written.
	for _, bad := range [][3]uint64{{1, 0, 4}, {2, 0, 4}, {0, 0, 0}, {0, 0, 3}, {0, 0, 8}, {0, 2, 4}, {0, registersSize, 4}, {0, 0xfffffffc, 4}, {0, 0, 0xffffffff}} {
		access(bad[0], bad[1], bad[2])
		g.bus.SetConfig(slot, data, 4, 0x5a5a5a5a)
		if got := g.bus.Config(slot, data, 4); got != 0x5a5a5a5a {
			t.Errorf("access to register %d, %#x, %d bytes read %#x", bad[0], bad[1], bad[2], got)
		}
	}
	// The device is reset this way, too.
	access(0, virtiotest.DeviceStatus, 1)
	g.bus.SetConfig(slot, data, 1, 0)
	for g.bus.Config(slot, data, 1) != 0 {
		runtime.Gosched()
	}
}

func TestNotificationWithoutTheKernel(t *testing.T) {
	g := newGuest(t, &echo{})
	g.start(t, bothFeatures)
	for _, i := range []int{0, 1} {
		g.drv.Rings[i].Notify = func() {
			g.bus.Host.Window().Write(uint64(g.drv.Notify-virtiotest.Window)+uint64(4*i), []byte{0, 0})
		}
		g.drv.Rings[i].Add(virtiotest.Buffer{GPA: 0x8000, Len: 1})
		g.drv.Rings[i].Kick()
		g.wait(t, i)
	}
}

func TestBusReset(t *testing.T) {
	d := &echo{}
	g := newGuest(t, d)
	g.start(t, bothFeatures)
	d.took()
	g.bus.Host.Reset()
	if got := d.took(); got != "stop" || g.drv.Status() != 0 {
		t.Errorf("calls %q, status %#x after a reset of the bus; want stop, 0", got, g.drv.Status())
	}
	g.start(t, bothFeatures)
}

// A guest moves to another machine between a request and its interrupt.
func TestMigration(t *testing.T) {
	for _, features := range []uint64{FeatureVersion1, bothFeatures} {
		d1, d2 := &echo{}, &echo{}
		src, dst := newGuest(t, d1), newGuest(t, d2)
		src.start(t, features)
		request := func(g *guest) {
			g.drv.Rings[1].Add(virtiotest.Buffer{GPA: 0x8000, Len: 4}, virtiotest.Buffer{GPA: 0x9000, Len: 4, Write: true})
			g.drv.Rings[1].Kick()
		}
		for range 100 {
			request(src)
			src.wait(t, 1)
		}
		if _, err := src.pci.State(); err == nil {
			t.Error("State() of a running device succeeded")
		}
		quiesce(t, src.pci)
		quiesce(t, src.pci) // once is enough
		src.bus.Host.DisconnectInterrupts()
		request(src) // the last thing the guest did: nobody has seen it
		copy(src.mem.Bytes(0x8000, 4), "last")
		ts, err := src.pci.State()
		if err != nil {
			t.Fatal(err)
		}
		bs, err := src.bus.Host.State()
		if err != nil {
			t.Fatal(err)
		}

		copy(dst.mem.Bytes(0, 1<<20), src.mem.Bytes(0, 1<<20))
		takeDirty(dst.mem.RAM)
		if err := dst.bus.Host.SetState(bs); err != nil {
			t.Fatal(err)
		}
		if err := dst.pci.SetState(ts); err != nil {
			t.Fatal(err)
		}
		if ts2, err := dst.pci.State(); err != nil || !reflect.DeepEqual(ts, ts2) {
			t.Errorf("state after the move %+v, %v; want %+v", ts2, err, ts)
		}
		if got := d2.took(); got != "" {
			t.Errorf("the device was called before Resume: %s", got)
		}
		if dirty := takeDirty(dst.mem.RAM); dirty != nil {
			t.Errorf("pages %v were written before Resume", dirty)
		}
		if err := dst.pci.SetState(ts); err == nil {
			t.Error("a second SetState succeeded")
		}
		// The guest goes on with what it knows, on the new machine's bus.
		dst.drv.Rings, dst.drv.Features = src.drv.Rings, src.drv.Features
		moved := dst.mem.Bytes(0x9000, 4)
		clear(moved)
		dst.bus.Host.ConnectInterrupts()
		dst.pci.Resume()
		for v := range 3 {
			// Every vector comes once, besides what the request causes.
			if n, _ := dst.drv.Interrupt(v).Wait(); n == 0 {
				t.Errorf("vector %d was not raised", v)
			}
		}
		for memory.Load16(dst.mem.Bytes(dst.drv.Rings[1].Used+2, 2)) != 101 {
			runtime.Gosched()
		}
		if string(moved) != "last" {
			t.Errorf("the request of before the move answered %q", moved)
		}
		if s := dst.drv.Status(); s != 15 {
			t.Errorf("status %#x after the move; want 0xf", s)
		}
		quiesce(t, dst.pci)
		if ts3, err := dst.pci.State(); err != nil || ts3.Queues[1].Queue.UsedIndex != 101 {
			t.Errorf("state %+v, %v after one more request; want used index 101", ts3, err)
		}
		dst.pci.Resume()

		// The migration failed after all: the source runs on.
		src.bus.Host.ConnectInterrupts()
		src.pci.Resume()
		src.wait(t, 1)
		if got := d1.took(); got != "stop start quiesce resume" {
			t.Errorf("source's calls %q", got)
		}
		if got := d2.took(); got != "start quiesce resume" {
			t.Errorf("destination's calls %q", got)
		}
	}
}

func TestMigrationOfABrokenDevice(t *testing.T) {
	src, dst := newGuest(t, &echo{}), newGuest(t, &echo{})
	src.start(t, bothFeatures)
	src.drv.Rings[0].Add(virtiotest.Buffer{GPA: 1 << 40, Len: 1})
	src.drv.Rings[0].Kick()
	src.drv.Interrupt(0).Wait()
	quiesce(t, src.pci)
	s, err := src.pci.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := dst.pci.SetState(s); err != nil {
		t.Fatal(err)
	}
	dst.pci.Resume()
	if got := dst.drv.Status(); got != 15|64 {
		t.Errorf("status %#x after the move; want NEEDS_RESET", got)
	}
	dst.start(t, bothFeatures) // which a reset ends
}

// After a move every queue is kicked, whatever its device does at the start.
func TestQueuesAreKickedAfterAMove(t *testing.T) {
	src, dst := newGuest(t, &echo{}), newGuest(t, &echo{startErr: errors.New("nobody looks")})
	src.start(t, bothFeatures)
	quiesce(t, src.pci)
	s, err := src.pci.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := dst.pci.SetState(s); err != nil {
		t.Fatal(err)
	}
	dst.pci.Resume()
	for i := range dst.pci.queues {
		if !dst.pci.queues[i].doorbell.Pending() {
			t.Errorf("queue %d was not kicked", i)
		}
	}
}

// A device that the guest has not started, or is just setting up, moves too.
func TestMigrationDuringSetup(t *testing.T) {
	src, dst := newGuest(t, &echo{}), newGuest(t, &echo{})
	if err := src.drv.Negotiate(bothFeatures); err != nil {
		t.Fatal(err)
	}
	if _, err := src.drv.SetupQueue(1, src.mem, 8, virtiotest.NoVector); err != nil {
		t.Fatal(err)
	}
	src.drv.SetField(virtiotest.DeviceFeatureSelect, 4, 9)
	s, err := src.pci.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := dst.pci.SetState(s); err != nil {
		t.Fatal(err)
	}
	if got, want := dst.common(), src.common(); got != want {
		t.Errorf("registers\n% x; want\n% x", got, want)
	}
	dst.pci.Resume()
	dst.drv.AddStatus(virtiotest.StatusDriverOK)
	if got := dst.drv.Status(); got != 15 {
		t.Errorf("status %#x; want 0xf", got)
	}
}

func TestSetStateRefusesWhatCannotBe(t *testing.T) {
	src := newGuest(t, &echo{})
	src.start(t, bothFeatures)
	quiesce(t, src.pci)
	good, err := src.pci.State()
	if err != nil {
		t.Fatal(err)
	}
	dst := newGuest(t, &echo{})
	before, _ := dst.pci.State()
	for _, test := range []struct {
		name   string
		change func(*PCIState)
		want   string
	}{
		{"a queue missing", func(s *PCIState) { s.Queues = s.Queues[:1] }, "1 queues; this device has 2"},
		{"unknown status", func(s *PCIState) { s.Status |= 16 }, "unknown bits"},
		{"unknown interrupt status", func(s *PCIState) { s.ISR = 4 }, "unknown bits"},
		{"DRIVER_OK alone", func(s *PCIState) { s.Status = 4 }, "without FEATURES_OK"},
		{"NEEDS_RESET alone", func(s *PCIState) { s.Status = 64 }, "without DRIVER_OK"},
		{"a feature from the future", func(s *PCIState) { s.Accepted |= 1 << 40 }, "features 0x10000000000, which this device does not offer"},
		{"features beyond bit 63", func(s *PCIState) { s.AcceptedUndefined = true }, "does not offer"},
		{"no VERSION_1", func(s *PCIState) { s.Accepted &^= FeatureVersion1 }, "without VERSION_1"},
		{"configuration vector", func(s *PCIState) { s.ConfigVector = 3 }, "vector 3; this device has 3"},
		{"queue vector", func(s *PCIState) { s.Queues[1].Vector = 0xfffe }, "vector 65534"},
		{"queue size", func(s *PCIState) { s.Queues[1].Queue.Size = 128 }, "queue 1: virtqueue of 128"},
		{"queue address", func(s *PCIState) { s.Queues[0].Queue.Used = 1 << 20 }, "queue 0: virtqueue device area"},
		{"a request in flight", func(s *PCIState) { s.Queues[0].Queue.LastAvail++ }, "1 requests in flight"},
	} {
		s := good
		s.Queues = slices.Clone(good.Queues)
		test.change(&s)
		if err := dst.pci.SetState(s); err == nil || !strings.Contains(err.Error(), "test: state: ") || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: SetState = %v; want %q", test.name, err, test.want)
		}
		if after, _ := dst.pci.State(); !reflect.DeepEqual(before, after) {
			t.Errorf("%s: a refused state changed something", test.name)
		}
	}
	if err := dst.pci.SetState(good); err != nil {
		t.Errorf("SetState of the unchanged state = %v", err)
	}
}

// vCPUs that do whatever they like, among them resets, while requests run.
func TestManyVCPUsAtOnce(t *testing.T) {
	g := newGuest(t, &echo{})
	var wg sync.WaitGroup
	for cpu := range 3 {
		wg.Go(func() {
			for i := range 300 {
				switch (i + cpu) % 6 {
				case 0:
					g.drv.SetField(virtiotest.DeviceStatus, 1, 0)
				case 1:
					g.drv.Accept(bothFeatures)
					g.drv.SetField(virtiotest.DeviceStatus, 1, 15)
				case 2:
					g.drv.SetField(virtiotest.QueueSelect, 2, uint64(i%3))
					g.drv.SetField(virtiotest.QueueDesc, 8, 0x1000)
					g.drv.SetField(virtiotest.QueueDriver, 8, 0x2000)
					g.drv.SetField(virtiotest.QueueDevice, 8, 0x3000)
					g.drv.SetField(virtiotest.QueueEnable, 2, 1)
				case 3:
					g.common()
				case 4:
					g.bus.Write(g.drv.Notify+memory.GPA(4*(i%2)), 2, 0)
				case 5:
					g.bus.SetConfig(slot, g.drv.MSIX+2, 2, uint64(i)<<14)
				}
			}
		})
	}
	wg.Wait()
	g.start(t, bothFeatures)
	g.drv.Rings[0].Add(virtiotest.Buffer{GPA: 0x8000, Len: 1})
	g.drv.Rings[0].Kick()
	g.wait(t, 0)
}

func TestLogIsLimited(t *testing.T) {
	var l limiter
	now := time.Unix(1000, 0)
	passed := 0
	for range 1000 {
		if _, ok := l.allow(now); ok {
			passed++
		}
	}
	if passed != limiterBurst {
		t.Errorf("%d messages of a burst passed; want %d", passed, limiterBurst)
	}
	now = now.Add(limiterEvery)
	if dropped, ok := l.allow(now); !ok || dropped != 1000-limiterBurst {
		t.Errorf("after a while: %v, %d dropped; want %d", ok, dropped, 1000-limiterBurst)
	}
	if _, ok := l.allow(now); ok {
		t.Error("a second message passed at once")
	}

	g := newGuest(t, &echo{})
	for range 100 {
		g.drv.AddStatus(virtiotest.StatusFeaturesOK)
	}
	if n := len(g.logs); n != limiterBurst {
		t.Errorf("%d messages; want %d", n, limiterBurst)
	}
}

func TestRNG(t *testing.T) {
	g := newGuest(t, NewRNG())
	g.start(t, bothFeatures)
	buf := g.mem.Alloc(128<<10, 4096)
	used := func(bufs ...virtiotest.Buffer) virtiotest.Used {
		g.drv.Rings[0].Add(bufs...)
		g.drv.Rings[0].Kick()
		return g.wait(t, 0)
	}
	first := make([]byte, 64)
	for i := range 3 {
		clear(g.mem.Bytes(buf, 128))
		if u := used(virtiotest.Buffer{GPA: buf, Len: 64, Write: true}); u.Written != 64 {
			t.Errorf("wrote %d bytes; want 64", u.Written)
		}
		got := g.mem.Bytes(buf, 64)
		if bytes.Equal(got, first) || bytes.Equal(got, make([]byte, 64)) {
			t.Errorf("request %d: % x is not random", i, got)
		}
		if !bytes.Equal(g.mem.Bytes(buf+64, 64), make([]byte, 64)) {
			t.Error("wrote beyond the buffer")
		}
		copy(first, got)
	}
	// One request cannot ask for any amount, and several buffers are one request.
	if u := used(virtiotest.Buffer{GPA: buf, Len: 100, Write: true}, virtiotest.Buffer{GPA: buf + 4096, Len: 100 << 10, Write: true}); u.Written != rngMost {
		t.Errorf("wrote %d bytes; want %d", u.Written, rngMost)
	}
	if got := g.mem.Bytes(buf+4096+rngMost-100, 64); !bytes.Equal(got, make([]byte, 64)) {
		t.Errorf("wrote beyond its bound: % x", got)
	}
	quiesce(t, g.pci)
	g.drv.Rings[0].Add(virtiotest.Buffer{GPA: buf, Len: 1, Write: true})
	g.drv.Rings[0].Kick()
	g.pci.Resume()
	g.wait(t, 0)

	g.drv.Rings[0].Add(virtiotest.Buffer{GPA: buf, Len: 1})
	g.drv.Rings[0].Kick()
	g.drv.Interrupt(0).Wait()
	if got := g.drv.Status(); got != 15|64 || !strings.Contains(g.took(), "device-readable") {
		t.Errorf("status %#x after a readable buffer; want NEEDS_RESET", got)
	}
	g.start(t, FeatureVersion1)
	if u := used(virtiotest.Buffer{GPA: buf, Len: 1, Write: true}); u.Written != 1 {
		t.Errorf("wrote %d bytes after a reset; want 1", u.Written)
	}
	// A driver that enables no queue starts it all the same.
	g.drv.Reset()
	if err := g.drv.Negotiate(bothFeatures); err != nil {
		t.Fatal(err)
	}
	g.drv.AddStatus(virtiotest.StatusDriverOK)
	quiesce(t, g.pci)
	g.pci.Resume()
	if got := g.drv.Status(); got != 15 {
		t.Errorf("status %#x without a queue; want 0xf", got)
	}
}

// One request from the driver's doorbell over the worker's thread to the
// interrupt that wakes the driver.
func BenchmarkRoundTrip(b *testing.B) {
	g := newGuest(b, &echo{})
	g.start(b, bothFeatures)
	r := g.drv.Rings[0]
	b.ReportAllocs()
	for b.Loop() {
		r.Add(virtiotest.Buffer{GPA: 0x8000, Len: 16}, virtiotest.Buffer{GPA: 0x9000, Len: 16, Write: true})
		r.Kick()
		g.wait(b, 0)
	}
}

// FuzzPCIConfig makes any accesses to configuration space, by both ways, and
// to everything that the registers decode. The input is a list of accesses of
// eight bytes: kind and width, where (16 bits), a value (32 bits), repeat.
func FuzzPCIConfig(f *testing.F) {
	const (
		viaECAM = iota
		viaPorts
		configAddress
		common
		device
		notify
		interrupt
		msix
		anywhere
		kinds
	)
	type op struct {
		kind, width int
		write       bool
		where       uint16
		value       uint32
	}
	encode := func(ops ...op) (b []byte) {
		for _, o := range ops {
			k := byte(o.kind) | byte(o.width)<<4
			if o.write {
				k |= 0x80
			}
			b = append(b, k, byte(o.where), byte(o.where>>8))
			b = binary.LittleEndian.AppendUint32(b, o.value)
			b = append(b, 0)
		}
		return b
	}
	w := func(kind, width int, where uint16, value uint32) op { return op{kind, width, true, where, value} }
	// Seeds: what ordinary tests do. Width is the logarithm.
	drv := newGuest(f, &echo{}).drv
	reg := func(at int) uint16 { return uint16(slot<<8 | at) }
	start := []op{
		w(common, 0, 0x14, 3), w(common, 2, 0x08, 1), w(common, 2, 0x0c, 1), w(common, 0, 0x14, 11),
		w(msix, 2, 0, 0xfee00000), w(msix, 2, 8, 0x40), w(msix, 2, 12, 0), w(viaECAM, 1, reg(drv.MSIX+2), 0x8000),
		w(common, 1, 0x10, 0), w(common, 1, 0x1a, 1), w(common, 2, 0x20, 0x1000), w(common, 2, 0x28, 0x2000), w(common, 2, 0x30, 0x3000),
		w(common, 1, 0x1c, 1), w(common, 0, 0x14, 15), w(notify, 1, 0, 0), w(interrupt, 0, 0, 0),
	}
	f.Add(encode(start...))
	f.Add(encode(append(slices.Clone(start), w(common, 0, 0x14, 0), w(common, 0, 0x14, 1), op{kind: common, width: 0, where: 0x14})...))
	f.Add(encode(append(slices.Clone(start), w(common, 2, 0x20, 0xfffffff0), w(common, 2, 0x24, 0xffffffff))...))
	f.Add(encode(w(viaECAM, 2, reg(4), 0), w(viaECAM, 2, reg(0x10), 0xffffffff), op{kind: viaECAM, width: 2, where: reg(0x10)}, // sizing
		w(viaECAM, 2, reg(0x10), 0xc0080000), w(viaECAM, 2, reg(4), 6)))
	f.Add(encode(w(configAddress, 2, 0, 1<<31|slot<<11|4), w(viaPorts, 0, 4, 0), w(configAddress, 1, 0, 0), op{kind: viaPorts, width: 3, where: 7}))
	f.Add(encode(w(viaECAM, 0, reg(drv.Access+4), 0), w(viaECAM, 2, reg(drv.Access+8), 0x14), w(viaECAM, 2, reg(drv.Access+12), 1), op{kind: viaECAM, width: 2, where: reg(drv.Access + 16)}))
	f.Add(encode(w(anywhere, 3, 0, 0xc0003ffc), op{kind: anywhere, width: 3, value: 0xc0003ffc}, w(device, 3, 0xffc, 1), w(interrupt, 3, 0xfff, 1)))

	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 8*200 {
			return
		}
		d := &echo{}
		g := newGuest(t, d)
		readOnly := g.readOnly()
		for ; len(input) >= 8; input = input[8:] {
			kind, n, write := int(input[0]&0xf)%kinds, 1<<(input[0]>>4&3), input[0]&0x80 != 0
			where := int(binary.LittleEndian.Uint16(input[1:]))
			var p [8]byte
			copy(p[:], input[3:7])
			copy(p[4:], input[3:7])
			var h pci.Handler
			var off uint64
			switch kind {
			case viaECAM: // slot in the high byte; a few beyond the last
				h, off = g.bus.Host.ECAM(), uint64(where>>8)<<15|uint64(where&0xff)
			case viaPorts:
				h, off = g.bus.Host.ConfigData(), uint64(where&7)
			case configAddress:
				h, off = g.bus.Host.ConfigAddress(), uint64(where&7)
			case common:
				h, off = g.pci, commonRegion+uint64(where&0x3f)
			case device:
				h, off = g.pci, deviceRegion+uint64(where&0xfff)
			case notify:
				h, off = g.pci, notifyRegion+uint64(where&0xfff)
			case interrupt:
				h, off = g.pci, isrRegion+uint64(where&0xfff)
			case msix:
				h, off = g.bus.Host.Window(), uint64(g.drv.Table-virtiotest.Window)+uint64(where&0xfff)
			case anywhere:
				h, off = g.bus.Host.Window(), uint64(binary.LittleEndian.Uint32(p[:]))-uint64(virtiotest.Window)+uint64(where)
			}
			if write {
				h.Write(off, p[:n])
			} else {
				h.Read(off, p[:n])
			}
		}
		if got := g.readOnly(); got != readOnly {
			t.Error("a read-only register changed")
		}
		for gpa := range g.bus.Kernel.Doorbells() {
			if gpa < virtiotest.Window || gpa >= virtiotest.Window+virtiotest.WindowSize {
				t.Errorf("a doorbell at %v, outside the window", gpa)
			}
		}
		// Whatever happened, it moves, and a reset makes it work.
		quiesce(t, g.pci)
		g.bus.Host.DisconnectInterrupts()
		bs, err := g.bus.Host.State()
		if err != nil {
			t.Fatal(err)
		}
		ts, err := g.pci.State()
		if err != nil {
			t.Fatal(err)
		}
		g2 := newGuest(t, &echo{})
		if err := g2.bus.Host.SetState(bs); err != nil {
			t.Fatalf("the state of the bus does not load: %v", err)
		}
		if err := g2.pci.SetState(ts); err != nil {
			t.Fatalf("the state of the device does not load: %v", err)
		}
		g2.bus.Host.Reset()
		g2.bus.Host.ConnectInterrupts()
		g2.start(t, bothFeatures)
	})
}

// readOnly is some of what a guest cannot change in configuration space.
func (g *guest) readOnly() (regs [5]uint64) {
	g.bus.Ports = false
	for i, at := range []int{0x00, 0x08, 0x2c, 0x34, 0x3d} {
		regs[i] = g.bus.Config(slot, at, []int{4, 4, 4, 1, 1}[i])
	}
	return regs
}
