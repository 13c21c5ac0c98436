package virtio

import (
	"bytes"
	"sync"
	"testing"
	"time"

	"vmm/memory"
	"vmm/scsi"
	"vmm/scsi/scsitest"
	"vmm/virtio/virtiotest"
)

// FuzzSCSI plays a driver that follows a script: requests of every shape,
// task management, events, configuration writes, and the machine's calls in
// between. The device may fail only where the script broke a rule. Every
// request comes back exactly once, with an answer that makes sense, and no
// byte changes that the driver did not hand over for writing.
func FuzzSCSI(f *testing.F) {
	for _, s := range scsiScripts() {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, script []byte) { playSCSI(t, script) })
}

// Steps of a script. Each takes its operands from the bytes that follow; the
// script ends with its bytes, and what is missing reads as zero.
const (
	stepCommand = iota // queue, target, LUN form, piece, out, in, CDB length, CDB
	stepChain          // queue, pieces, then for each: direction, length
	stepTMF            // function, target, id
	stepControl        // length, room, bytes
	stepEvent          // length
	stepConfig         // offset, length, bytes
	stepAttach         // target
	stepDetach         // target
	stepChanged        // target
	stepHold           // target 1 holds its commands from now on
	stepRelease        // and gives them back
	stepQuiesce        // and resume
	stepReset          //
	stepCount
)

// script is written with the helpers below and read with take.
type script []byte

func (s *script) take() byte {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return b
}

// size reads a length in bytes: up to 127 as such, beyond in units of 64.
func (s *script) size() int {
	b := int(s.take())
	if b >= 128 {
		return (b - 127) * 64
	}
	return b
}

func (s *script) bytes(n int) []byte {
	p := make([]byte, n)
	*s = (*s)[copy(p, *s):]
	return p
}

// scsiScripts has what the ordinary tests do, as scripts.
func scsiScripts() []script {
	command := func(target, piece, out, in byte, cdb ...byte) script {
		return append(script{stepCommand, 0, target, 0, piece, out, in, byte(len(cdb))}, cdb...)
	}
	cdb := func(n int, b ...byte) []byte { return append(b, make([]byte, n-len(b))...) }
	join := func(s ...script) script { return script(bytes.Join(asBytes(s), nil)) }
	block := byte(127 + 8) // 512 bytes
	return []script{
		command(0, 0, 0, 36, 0x12, 0, 0, 0, 36, 0),
		command(0, 7, 0, 96, 0x12, 1, 0x83, 0, 96, 0),
		command(0, 0, 0, 8, cdb(10, 0x25)...),
		command(0, 0, block, 0, rw10(0x2a, 1, 1)...),
		command(0, 13, 0, block, rw10(0x28, 1, 1)...),
		command(0, 0, 0, block, cdb(16, 0x88, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1)...),
		command(0, 0, 0, 96, cdb(12, 0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 96)...),
		command(0, 0, 0, 18, 0x03, 0, 0, 0, 18, 0),
		command(0, 0, 5, 5, 0x28),
		command(9, 0, 0, 0, 0),
		{stepCommand, 0, 0, 1, 0, 0, 0, 1, 0},                                                              // LUN 1
		append(script{stepCommand, 0, 0, 2, 0, 0, 127, 12}, cdb(12, 0xa0, 0, 2, 0, 0, 0, 0, 0, 0, 127)...), // W-LUN
		join(script{stepHold}, command(1, 0, 0, 0, 0), script{stepTMF, tmfAbortTask, 1, 1, stepTMF, tmfQueryTask, 1, 1, stepRelease}),
		join(script{stepHold}, command(1, 0, 0, 0, 0), command(0, 0, 0, 0, 0), script{stepTMF, tmfAbortTaskSet, 1, 0, stepQuiesce}),
		join(script{stepHold}, command(1, 0, 0, 0, 0), script{stepTMF, tmfLogicalUnitReset, 1, 0, stepDetach, 1, stepAttach, 1}),
		{stepTMF, tmfClearACA, 0, 0, stepTMF, tmfITNexusReset, 0, 0, stepTMF, 200, 0, 0},
		append(script{stepControl, 16, 5, scsiANQuery, 0, 0, 0}, 1, 0, 0x40, 0, 0, 0, 0, 0, 0x7e),
		{stepControl, 3, 1}, {stepControl, 24, 0}, {stepControl, 24, 1, 9},
		{stepEvent, 16, stepChanged, 0, stepAttach, 5, stepEvent, 20, stepDetach, 5, stepEvent, 16},
		{stepEvent, 15, stepChanged, 0},
		{stepChain, 2, 2, 0, 50, 1, 108},
		{stepChain, 2, 3, 0, 51, 0, 127, 1, 108},
		{stepChain, 2, 1, 1, 108},
		{stepConfig, 20, 8, 18, 0, 0, 0, 16, 0, 0, 0, stepReset, stepConfig, 24, 1, 6},
		join(script{stepConfig, 20, 1, 252}, script{stepReset}, command(0, 3, 0, 36, 0x12, 0, 0, 0, 36, 0)),
		join(script{stepReset}, command(0, 0, 0, 0, 0), script{stepQuiesce}),
	}
}

func asBytes(s []script) [][]byte {
	p := make([][]byte, len(s))
	for i := range s {
		p[i] = s[i]
	}
	return p
}

// gate is a logical unit that holds its commands while it is shut.
type gate struct {
	scsi.LUN
	mu   sync.Mutex
	shut bool
	held []*scsi.Command
}

func (g *gate) Submit(c *scsi.Command) {
	g.mu.Lock()
	if g.shut {
		g.held = append(g.held, c)
		g.mu.Unlock()
		return
	}
	g.mu.Unlock()
	g.LUN.Submit(c)
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	g.shut = shut
	held := g.held
	if !shut {
		g.held = nil
	}
	g.mu.Unlock()
	if !shut {
		for _, c := range held {
			g.LUN.Submit(c)
		}
	}
}

// scsiPlay is a script being played.
type scsiPlay struct {
	*scsiRig
	t       *testing.T
	gate    *gate
	broken  bool // the script broke a rule: the device may fail
	sizes   SCSIState
	flying  []int // by queue: requests not yet taken back
	cmds    map[[2]uint16]*scsiCommand
	fences  []fence
	targets map[uint8]bool
}

// fence is memory that must not change.
type fence struct {
	gpa  memory.GPA
	want []byte
}

// lend puts p into guest memory as up to a few dozen buffers between fences.
func (s *scsiPlay) lend(p []byte, piece int, write bool) (bufs []virtiotest.Buffer) {
	if piece == 0 {
		piece = 1 << 20
	}
	piece = max(piece, len(p)/60+1)
	for len(p) > 0 {
		n := min(piece, len(p))
		const width = 8
		gpa := s.mem.Alloc(uint64(n)+2*width, 1)
		all := s.mem.Bytes(gpa, uint64(n)+2*width)
		for i := range all {
			all[i] = 0xf5
		}
		copy(all[width:], p[:n])
		keep := bytes.Clone(all)
		if write {
			s.fences = append(s.fences, fence{gpa, keep[:width]}, fence{gpa + width + memory.GPA(n), keep[width+n:]})
		} else {
			s.fences = append(s.fences, fence{gpa, keep})
		}
		bufs = append(bufs, virtiotest.Buffer{GPA: gpa + width, Len: uint32(n), Write: write})
		p = p[n:]
	}
	return bufs
}

// send makes a request available, unless the queue is full.
func (s *scsiPlay) send(queue int, bufs []virtiotest.Buffer) (head uint16, ok bool) {
	if len(bufs) == 0 {
		return 0, false
	}
	s.catchUp(queue)
	add := s.rings[queue].AddIndirect
	if len(bufs) < 4 {
		add = s.rings[queue].Add
	}
	if head, ok = add(bufs...); ok {
		s.flying[queue]++
		s.rings[queue].Kick()
	}
	return head, ok
}

// catchUp takes back what is there.
func (s *scsiPlay) catchUp(queue int) {
	for {
		u, ok := s.rings[queue].Reap() // panics at what was not in flight
		if !ok {
			return
		}
		s.flying[queue]--
		if c := s.cmds[[2]uint16{uint16(queue), u.Head}]; c != nil {
			delete(s.cmds, [2]uint16{uint16(queue), u.Head})
			a := s.answer(c, u)
			if a.code > scsiFailure || int(a.residual) > len(c.out)+c.in || int(a.written) > 12+c.sense+c.in || int(a.written) < 12+c.sense {
				s.t.Errorf("% x on % x: response %d, residual %d of %d+%d, used length %d", c.cdb, c.lun, a.code, a.residual, len(c.out), c.in, a.written)
			}
		}
	}
}

// settle lets everything come back, or the device fail.
func (s *scsiPlay) settle() {
	s.gate.set(false)
	for queue, ring := range s.rings {
		for queue != scsiEventQueue && !s.hasFailed() {
			s.catchUp(queue)
			if s.flying[queue] == 0 {
				break
			}
			if ring.EnableInterrupt() {
				continue
			}
			select {
			case <-s.irq[queue]:
			case err := <-s.failed:
				s.failed <- err
			case <-time.After(time.Minute):
				s.t.Fatalf("queue %d: %d requests never came back", queue, s.flying[queue])
			}
		}
	}
}

func (s *scsiPlay) hasFailed() bool {
	select {
	case err := <-s.failed:
		if !s.broken {
			s.t.Fatalf("the device failed though the driver kept the rules: %v", err)
		}
		s.failed <- err
		return true
	default:
		return false
	}
}

// begin sets up fresh rings and starts the device. Sizes that are out of
// bounds are refused.
func (s *scsiPlay) begin() {
	s.lay(scsiTestFeatures)
	s.failed = make(chan error, 1)
	failed := s.failed
	s.act.Fail = func(err error) { failed <- err }
	s.broken = false
	s.flying = make([]int, len(s.rings))
	clear(s.cmds)
	s.sizes = s.dev.State()
	err := s.dev.Start(s.act)
	if bad := checkSizes(s.sizes.SenseSize, s.sizes.CDBSize) != nil; bad != (err != nil) {
		s.t.Fatalf("Start with sense_size %d and cdb_size %d = %v", s.sizes.SenseSize, s.sizes.CDBSize, err)
	}
	if err != nil {
		s.dev.Stop()
		s.sizes = s.dev.State()
		if err := s.dev.Start(s.act); err != nil {
			s.t.Fatal(err)
		}
	}
	// What the rings are made of is the driver's, the device area apart.
	for _, ring := range s.rings {
		s.fences = append(s.fences, fence{ring.Avail - 2, []byte{0, 0}})
	}
}

func playSCSI(t *testing.T, code []byte) {
	s := &scsiPlay{
		scsiRig: newSCSIRig(t, 2),
		t:       t,
		gate:    &gate{LUN: scsitest.NewDisk(16)},
		cmds:    map[[2]uint16]*scsiCommand{},
		targets: map[uint8]bool{0: true, 1: true},
	}
	disk := scsitest.NewDisk(16)
	s.attach(0, disk)
	s.attach(1, s.gate)
	s.begin()
	defer s.gate.set(false)
	in := script(code)
	for steps, resets := 0, 0; len(in) > 0 && steps < 200; steps++ {
		s.step(t, &in, &resets, disk)
	}
	s.settle()
	s.hasFailed()
	s.dev.Stop()
	for queue := range s.rings {
		s.catchUp(queue)
	}
	for _, f := range s.fences {
		if got := s.mem.Bytes(f.gpa, uint64(len(f.want))); !bytes.Equal(got, f.want) {
			t.Fatalf("the device wrote where it must not: %v holds % x; want % x", f.gpa, got, f.want)
		}
	}
}

func (s *scsiPlay) step(t *testing.T, in *script, resets *int, disk scsi.LUN) {
	switch in.take() % stepCount {
	case stepCommand:
		queue := 2 + int(in.take()%2)
		c := &scsiCommand{id: 1, cdbN: int(s.sizes.CDBSize), sense: int(s.sizes.SenseSize)}
		target := in.take()
		switch form := in.take(); form {
		case 0:
			c.lun = unit0(target)
		case 1:
			c.lun = [8]byte{1, target, 0x40, 1}
		case 2:
			c.lun = [8]byte{0xc1, 1}
		default:
			c.lun = [8]byte(in.bytes(8))
		}
		piece := in.size()
		c.out = bytes.Repeat([]byte{target}, in.size())
		c.in = in.size()
		c.cdb = in.bytes(int(in.take()) % (c.cdbN + 1))
		c.attr = lastByte(c.cdb)
		bufs := s.lend(append(c.header(), c.out...), piece, false)
		c.response = s.lend(make([]byte, 12+c.sense+c.in), piece, true)
		if head, ok := s.send(queue, append(bufs, c.response...)); ok {
			s.cmds[[2]uint16{uint16(queue), head}] = c
		}
	case stepChain:
		s.broken = true
		queue := int(in.take()) % len(s.rings)
		var bufs []virtiotest.Buffer
		for range in.take() % 20 {
			write := in.take()&1 != 0
			n := in.size()
			bufs = append(bufs, s.lend(in.bytes(n), 0, write)...)
		}
		s.send(queue, bufs)
	case stepTMF:
		b := make([]byte, 24)
		b[4], b[8], b[9], b[10], b[16] = in.take(), 1, in.take(), 0x40, in.take()
		s.send(scsiControlQueue, append(s.lend(b, 11, false), s.lend([]byte{0}, 0, true)...))
	case stepControl:
		s.broken = true
		n, room := in.size(), in.size()
		s.send(scsiControlQueue, append(s.lend(in.bytes(n), 0, false), s.lend(make([]byte, room), 0, true)...))
	case stepEvent:
		n := in.size()
		bufs := s.lend(make([]byte, n), 5, true)
		s.broken = s.broken || n < eventSize || len(bufs) > scsiEventSize
		s.send(scsiEventQueue, bufs)
	case stepConfig:
		off := uint32(in.take())
		p := in.bytes(int(in.take()))
		s.dev.WriteConfig(off, p)
		s.dev.ReadConfig(off, p)
	case stepAttach:
		target := in.take()
		lun := disk
		if target == 1 {
			lun = s.gate
		}
		if err := s.dev.Attach(target, lun); (err == nil) == s.targets[target] {
			t.Errorf("Attach(%d) = %v; a target is there: %v", target, err, s.targets[target])
		}
		s.targets[target] = true
	case stepDetach:
		target := in.take()
		s.gate.set(false)
		var err error
		if target&1 == 0 {
			_, err = s.dev.Detach(t.Context(), target, func() error { return nil })
		} else {
			err = s.remove(target)
		}
		if (err == nil) != s.targets[target] {
			t.Errorf("Detach(%d) = %v; a target is there: %v", target, err, s.targets[target])
		}
		s.targets[target] = false
	case stepChanged:
		s.dev.Changed(in.take(), scsi.CapacityChanged)
	case stepHold:
		s.gate.set(true)
	case stepRelease:
		s.gate.set(false)
	case stepQuiesce:
		s.gate.set(false)
		quiesce(s.t, s.dev)
		for i, q := range s.act.Queues {
			if st := q.State(); st.LastAvail != st.UsedIndex && !s.hasFailed() {
				t.Errorf("queue %d of a quiesced device: taken %d, answered %d", i, st.LastAvail, st.UsedIndex)
			}
		}
		s.dev.Resume()
	case stepReset:
		if *resets++; *resets > 3 {
			return
		}
		s.settle()
		s.dev.Stop()
		// What the script writes now, before the start, counts.
		if len(*in) > 0 && (*in)[0] == stepConfig {
			s.step(t, in, resets, disk)
		}
		s.begin()
	}
}

func lastByte(p []byte) byte {
	if len(p) == 0 {
		return 0
	}
	return p[len(p)-1]
}
