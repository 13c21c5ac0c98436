package migration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vmm/internal/sys"
	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// guest is what runs on one side or the other. Its runs are counted, so that
// no test can overlook that it runs twice.
type guest struct {
	t    testing.TB
	runs atomic.Int32
}

func (g *guest) run() {
	if n := g.runs.Add(1); n > 1 {
		g.t.Errorf("the guest runs %d times", n)
	}
}

func (g *guest) stop() { g.runs.Add(-1) }

// fakeSource is a machine with real memory and made-up vCPUs.
type fakeSource struct {
	g        *guest
	ram      *memory.RAM
	alias    *sys.Mapping // the guest's own view: the race detector takes it for other memory
	luns     []*LUN
	cpu      string
	files    []Attachment
	stuck    bool // a SCSI command does not come back
	failing  error
	inPause  func()
	inFiles  func()
	inSettle func(context.Context) error
	settles  int
	busy     func() // what the guest does while a round is sent

	mu        sync.Mutex // orders the guest's writes and the dirty log
	dirty     map[uint64]bool
	paused    bool
	pauses    int
	throttles []int
	givesWay  bool
}

func newSource(t testing.TB, size uint64) *fakeSource {
	t.Helper()
	ram := newRAM(t, size)
	alias, err := sys.MapShared(int(ram.File().Fd()), 0, int(size))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { alias.Close() })
	s := &fakeSource{g: &guest{t: t}, ram: ram, alias: alias, cpu: "cpu"}
	t.Cleanup(func() {
		if s.givesWay {
			t.Error("in the end the guest still gives way")
		}
	})
	s.g.run()
	return s
}

func newRAM(t testing.TB, size uint64) *memory.RAM {
	t.Helper()
	ram, err := memory.New(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ram.Close() })
	return ram
}

// write is the guest writing v at the start of a page; false: it stands still.
func (s *fakeSource) write(page, v uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.paused {
		return false
	}
	binary.LittleEndian.PutUint64(s.alias.Bytes()[page*memory.PageSize:], v)
	if s.dirty != nil {
		s.dirty[page] = true
	}
	return true
}

func (s *fakeSource) Config() *vmmv1.MachineConfig {
	return &vmmv1.MachineConfig{Name: "web1", Cpus: 2, MemoryBytes: s.ram.Size()}
}
func (s *fakeSource) Requirements() *vmmv1.Requirements {
	return &vmmv1.Requirements{Hardware: 1, Features: []string{s.cpu}}
}
func (s *fakeSource) RAM() *memory.RAM { return s.ram }
func (s *fakeSource) LUNs() []*LUN     { return s.luns }
func (s *fakeSource) Attachments() []Attachment {
	if s.inFiles != nil {
		s.inFiles()
	}
	return s.files
}

func (s *fakeSource) TrackDirty() (DirtyLog, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dirty = map[uint64]bool{}
	for p := range s.ram.Size() / memory.PageSize {
		s.dirty[p] = true
	}
	return &fakeLog{s: s, taken: map[uint64]bool{}}, nil
}

func (s *fakeSource) Throttle(percent int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.throttles = append(s.throttles, percent)
}

func (s *fakeSource) GiveWay(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.givesWay = on
}

func (s *fakeSource) Settle(ctx context.Context) error {
	s.mu.Lock()
	s.settles++
	s.mu.Unlock()
	if s.inSettle != nil {
		return s.inSettle(ctx)
	}
	return nil
}

func (s *fakeSource) Pause(ctx context.Context) (since time.Time, err error) {
	since = time.Now()
	if s.inPause != nil {
		s.inPause()
	}
	if s.stuck {
		<-ctx.Done()
		return since, fmt.Errorf("LUN data: command 0x2a is still in flight: %w", ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.givesWay {
		s.g.t.Error("the guest is stopped while it gives way")
	}
	s.paused = true
	s.pauses++
	s.g.stop()
	return since, nil
}

func (s *fakeSource) Save() (*vmmv1.MachineState, error) {
	return &vmmv1.MachineState{Boot: &vmmv1.BootState{Kernel: &vmmv1.Image{Name: "saved"}}}, s.failing
}

func (s *fakeSource) Resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = false
	s.g.run()
	return nil
}

// fakeLog is a dirty log whose pages are in one region.
type fakeLog struct {
	s       *fakeSource
	taken   map[uint64]bool
	visited bool
}

func (l *fakeLog) Collect() (uint64, error) {
	if l.s.busy != nil {
		l.s.busy()
	}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.s.givesWay == l.s.paused {
		l.s.g.t.Errorf("the guest gives way: %v; it is paused: %v", l.s.givesWay, l.s.paused)
	}
	n := len(l.taken)
	for p := range l.s.dirty {
		if !l.taken[p] {
			n++
		}
	}
	for p := range l.s.dirty {
		l.taken[p] = true
	}
	return uint64(n), nil
}

func (l *fakeLog) Visit(fn func(memory.GPA, uint64) error) error {
	visit := fn
	if !l.visited {
		visit = func(gpa memory.GPA, n uint64) error { return l.s.ram.Extents(gpa, n, fn) }
	}
	l.visited = true
	pages := l.s.ram.Size() / memory.PageSize
	for p := uint64(0); p < pages; {
		if !l.taken[p] {
			p++
			continue
		}
		first := p
		for p < pages && l.taken[p] && p-first < 512 {
			delete(l.taken, p)
			p++
		}
		l.s.mu.Lock()
		for q := first; q < p; q++ {
			delete(l.s.dirty, q)
		}
		l.s.mu.Unlock()
		if err := visit(memory.GPA(first*memory.PageSize), (p-first)*memory.PageSize); err != nil {
			return err
		}
	}
	return nil
}

func (l *fakeLog) Close() error { return nil }

// fakeHost makes fakeDests.
type fakeHost struct {
	t       testing.TB
	g       *guest
	refuse  error
	luns    []*LUN
	size    uint64
	inLoad  func()
	inRun   func()
	offered func(Offer)   // in Prepare
	since   time.Duration // that Run says the guest has been running
	loadErr error
	runErr  error
	has     map[int]bool // the attachments that are here already

	mu   sync.Mutex
	last *fakeDest
}

type fakeDest struct {
	h      *fakeHost
	ram    *memory.RAM
	loaded *vmmv1.MachineState
	files  []bytes.Buffer
	ran    bool
	closed chan struct{}
}

func (h *fakeHost) Prepare(_ context.Context, o Offer) (Destination, error) {
	if h.offered != nil {
		h.offered(o)
	}
	if h.refuse != nil {
		return nil, h.refuse
	}
	var ram *memory.RAM
	var err error
	if o.Memory != nil {
		ram, err = memory.Adopt(o.Memory, h.size)
	} else {
		ram, err = memory.New(h.size)
	}
	if err != nil {
		return nil, err
	}
	if view, err := ram.Slice(0, 5); err == nil && o.Memory == nil {
		copy(view, "stale") // what the machine was built with is not the guest's
	}
	d := &fakeDest{h: h, ram: ram, closed: make(chan struct{}), files: make([]bytes.Buffer, len(o.Attachments))}
	h.mu.Lock()
	h.last = d
	h.mu.Unlock()
	return d, nil
}

func (h *fakeHost) dest() *fakeDest {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last
}

func (d *fakeDest) RAM() *memory.RAM { return d.ram }
func (d *fakeDest) LUNs() []*LUN     { return d.h.luns }
func (d *fakeDest) Has(i int) bool   { return d.h.has[i] }
func (d *fakeDest) Attach(i int, data []byte) error {
	d.files[i].Write(data)
	return nil
}
func (d *fakeDest) Load(state *vmmv1.MachineState) error {
	if d.h.inLoad != nil {
		d.h.inLoad()
	}
	d.loaded = state
	return d.h.loadErr
}
func (d *fakeDest) Run() (time.Time, error) {
	if d.h.runErr != nil {
		return time.Time{}, d.h.runErr
	}
	if d.h.inRun != nil {
		d.h.inRun()
	}
	d.ran = true
	d.h.g.run()
	return time.Now().Add(-d.h.since), nil
}
func (d *fakeDest) Close() error {
	close(d.closed)
	return d.ram.Close()
}

// The nexuses of the tests, and the keys.
var (
	nexS = pr.Nexus{Initiator: pr.FC(1), TargetPort: 1}
	nexD = pr.Nexus{Initiator: pr.FC(2), TargetPort: 2}
	nexO = pr.Nexus{Initiator: pr.FC(3), TargetPort: 3}
)

const (
	keyGuest pr.Key = 0xaa
	keyOther pr.Key = 0xcc
)

// disk is a LUN that several hosts share.
type disk struct {
	mu     sync.Mutex
	target *pr.Target
	sent   int
	at     int // before this command of ours, counted from 1, act acts
	act    func(*pr.Target)
	dead   map[pr.Nexus]bool
}

func newDisk(q pr.Quirks) *disk { return &disk{target: pr.NewTarget(q), dead: map[pr.Nexus]bool{}} }

func (d *disk) do(n pr.Nexus, o pr.Out) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.target.Do(n, &o)
}

func (d *disk) key(n pr.Nexus) pr.Key {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.target.Key(n)
}

// holder is the first registration that holds.
func (d *disk) holder() (n pr.Nexus, typ pr.Type) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.target.Status().Registrations {
		if r.Holder {
			return r.Nexus, r.Type
		}
	}
	return pr.Nexus{}, pr.None
}

// site is one nexus's way to a disk.
type site struct {
	d     *disk
	nexus pr.Nexus
	// Of d.mu:
	cdbs   []byte      // the operation codes that came this way
	raised *scsi.Sense // a unit attention that answers the next command
}

// sent are the operation codes of the commands that went this way since it was
// asked last.
func (s *site) sent() []byte {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	all := s.cdbs
	s.cdbs = nil
	return all
}

// raise makes a unit attention pending.
func (s *site) raise(a scsi.Sense) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	s.raised = &a
}

func (s *site) Send(ctx context.Context, cdb, list, data []byte) (int, pr.Answer, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, pr.Answer{}, err
	}
	s.cdbs = append(s.cdbs, cdb[0])
	if s.d.dead[s.nexus] {
		return 0, pr.Answer{}, errors.New("no path to the disk")
	}
	if a := s.raised; a != nil {
		s.raised = nil
		return 0, pr.Answer{Status: scsi.CheckCondition, Sense: *a}, nil
	}
	if s.d.sent++; s.d.sent == s.d.at {
		s.d.act(s.d.target)
	}
	if cdb[0] == scsi.OpMaintenanceIn {
		data[1] = 1 // not supported: no REGISTER AND MOVE
		if !s.d.target.Quirks.NoMove {
			data[1] = 3
		}
		return len(data), pr.Answer{Status: scsi.Good}, nil
	}
	b, a := s.d.target.Execute(s.nexus, cdb, list)
	return copy(data, b), a, nil
}

func (d *disk) lun(t testing.TB, id string, n pr.Nexus) *LUN {
	t.Helper()
	l := &LUN{
		ID: id, Identity: "naa.600140500000000" + id, Path: "/dev/sg1", Nexus: n,
		BootID: fmt.Sprintf("boot %d", n.TargetPort), Address: fmt.Sprintf("%d:0:0:0", n.TargetPort),
		Port: &pr.Port{Sender: &site{d: d, nexus: n}},
	}
	f, err := l.Port.Probe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	l.Preflight = &f
	if n == nexS {
		l.Tracked = func() pr.Tracked { return pr.Tracked{Key: d.key(n)} }
	}
	return l
}

// rig is a migration's two ends on one host.
type rig struct {
	testing.TB
	src      *fakeSource
	host     *fakeHost
	listen   Address
	ln       net.Listener // nil: on listen
	dial     Address      // the listener, or a proxy before it
	security Security
	opts     Options
	recv     ReceiveOptions
	giveUp   context.CancelFunc // what Receive waits by; of receiving
	settledS map[string]pr.Outcome
	settledD map[string]pr.Outcome
	mu       sync.Mutex
}

func newRig(t testing.TB, size uint64, disks ...*disk) *rig {
	t.Helper()
	dir := t.TempDir()
	src := newSource(t, size)
	r := &rig{TB: t, src: src, host: &fakeHost{t: t, g: src.g, size: size}, settledS: map[string]pr.Outcome{}, settledD: map[string]pr.Outcome{}}
	r.listen = Address{"unix", filepath.Join(dir, "sock")}
	r.dial = r.listen
	j, err := pr.OpenJournal(filepath.Join(dir, "source"))
	if err != nil {
		t.Fatal(err)
	}
	r.opts.Journal = j
	r.recv.StateDir = filepath.Join(dir, "destination")
	r.recv.Warn = func(err error) { t.Logf("destination: %v", err) }
	for i, d := range disks {
		id := fmt.Sprint(i)
		s, n := d.lun(t, id, nexS), d.lun(t, id, nexD)
		s.Settled = func(o pr.Outcome, _ []scsi.Sense) { r.settled(r.settledS, id, o) }
		n.Settled = func(o pr.Outcome, _ []scsi.Sense) { r.settled(r.settledD, id, o) }
		r.src.luns = append(r.src.luns, s)
		r.host.luns = append(r.host.luns, n)
	}
	for _, d := range disks {
		d.sent = 0
	}
	return r
}

func (r *rig) settled(m map[string]pr.Outcome, id string, o pr.Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m[id] = o
}

// receiving starts the destination. arrived gives Receive's result, once; it
// ends with the test.
func (r *rig) receiving() (arrived <-chan *Arrival) {
	r.Helper()
	ln := r.ln
	if ln == nil {
		var err error
		if ln, err = Listen(r.listen, Security{}, nil); err != nil {
			r.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.giveUp = cancel
	ch := make(chan *Arrival, 1)
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		a, err := Receive(ctx, ln, r.host, r.recv)
		if err != nil && ctx.Err() == nil {
			r.Logf("Receive: %v", err)
		}
		ch <- a
		if a != nil {
			r.Cleanup(func() { a.Machine.(*fakeDest).ram.Close() })
			select {
			case <-a.Answered:
			case <-over:
				a.Leave()
			}
		}
	}()
	r.Cleanup(func() {
		cancel()
		close(over)
		<-done
	})
	return ch
}

func (r *rig) outgoing() *Outgoing {
	r.Helper()
	if r.opts.Dial == nil {
		dial, err := Dialer(r.dial, r.security, "")
		if err != nil {
			r.Fatal(err)
		}
		r.opts.Dial = dial
	}
	o, err := NewOutgoing(r.src, r.opts)
	if err != nil {
		r.Fatal(err)
	}
	return o
}

func (r *rig) migrate() (Summary, error) { return r.outgoing().Run(context.Background()) }

// same checks that two memories are equal.
func same(t testing.TB, got, want *memory.RAM) {
	t.Helper()
	for i, reg := range want.Regions() {
		if !bytes.Equal(got.Regions()[i].Bytes, reg.Bytes) {
			for p := 0; p < len(reg.Bytes); p += memory.PageSize {
				if a, b := got.Regions()[i].Bytes[p:p+8], reg.Bytes[p:p+8]; !bytes.Equal(a, b) {
					t.Fatalf("page %d begins % x at the destination, % x at the source", p/memory.PageSize, a, b)
				}
			}
			t.Fatal("memories differ")
		}
	}
}

// proxy stands between the two sides and sees every message of the control
// connection. At message cutAt, counted from 0, it cuts: by closing
// everything, or by forwarding nothing more.
type proxy struct {
	t      testing.TB
	ln     net.Listener
	to     Address
	cutAt  int // -1: never
	drop   bool
	dead   bool       // nothing gets through afterwards, not even a new connection
	onSend func(kind) // before the message goes on; both directions call it, at once

	mu    sync.Mutex
	conns []net.Conn
	seen  []kind
	cut   bool
	wg    sync.WaitGroup
}

func (r *rig) proxy(p *proxy) {
	r.Helper()
	r.dial = Address{"unix", filepath.Join(r.TempDir(), "proxy")}
	ln, err := Listen(r.dial, Security{}, nil)
	if err != nil {
		r.Fatal(err)
	}
	p.t, p.ln, p.to = r, ln, r.listen
	p.wg.Go(p.serve)
	r.Cleanup(func() {
		ln.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
}

func (p *proxy) serve() {
	for {
		near, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.connect(near) })
	}
}

func (p *proxy) connect(near net.Conn) {
	defer near.Close()
	pre, err := readPreamble(near)
	if err != nil {
		return
	}
	far, err := net.Dial(p.to.Network, p.to.Address)
	if err != nil {
		return
	}
	defer far.Close()
	p.mu.Lock()
	if p.cut && p.dead {
		p.mu.Unlock()
		return
	}
	p.conns = append(p.conns, near, far)
	p.mu.Unlock()
	if _, err := far.Write(pre.bytes()); err != nil {
		return
	}
	var wg sync.WaitGroup
	relay := func(to, from net.Conn) {
		wg.Go(func() {
			if pre.role == roleControl {
				p.messages(to, from)
			} else {
				p.bytes(to, from, pre.role)
			}
			if !p.drop || pre.role == roleQuery {
				to.Close()
				from.Close()
			}
		})
	}
	relay(far, near)
	relay(near, far)
	wg.Wait()
	if p.silent() && pre.role != roleQuery {
		// Both ends stay open, and nothing comes.
		_, _ = io.Copy(io.Discard, near)
	}
}

func (p *proxy) silent() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cut && p.drop
}

func (p *proxy) bytes(to, from net.Conn, r role) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if p.silent() && r != roleQuery {
			discard(from)
			return
		}
		if _, werr := to.Write(b[:n]); err != nil || werr != nil {
			return
		}
	}
}

// discard reads and forgets.
func discard(from net.Conn) { _, _ = io.Copy(io.Discard, from) }

func (p *proxy) messages(to, from net.Conn) {
	for {
		m, err := readMessage(from, maxMessage)
		if err != nil {
			return
		}
		p.mu.Lock()
		if !p.cut && len(p.seen) == p.cutAt {
			p.cut = true
			if !p.drop {
				for _, c := range p.conns {
					c.Close()
				}
			}
		}
		cut := p.cut
		if !cut {
			p.seen = append(p.seen, kindOf(m))
		}
		p.mu.Unlock()
		if cut {
			if p.drop {
				discard(from)
			}
			return
		}
		if p.onSend != nil {
			p.onSend(kindOf(m))
		}
		b, err := appendMessage(nil, m)
		if err != nil {
			p.t.Errorf("proxy: %v", err)
			return
		}
		if _, err := to.Write(b); err != nil {
			return
		}
	}
}

// within fails the test if f takes longer than anything here should.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(60 * time.Second):
		t.Fatalf("%s takes longer than a minute", what)
	}
}
