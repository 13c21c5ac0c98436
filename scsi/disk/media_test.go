package disk

import (
	"bytes"
	"encoding/binary"
	"os"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"vmm/scsi"
)

// CDBs. FUA and the like are bits of the first argument.
func read10(flags byte, lba uint32, n uint16) []byte {
	return cdb10(scsi.OpRead10, flags, lba, n)
}

func write10(flags byte, lba uint32, n uint16) []byte {
	return cdb10(scsi.OpWrite10, flags, lba, n)
}

func cdb10(op, flags byte, lba uint32, n uint16) []byte {
	cdb := make([]byte, 10)
	cdb[0], cdb[1] = op, flags
	binary.BigEndian.PutUint32(cdb[2:], lba)
	binary.BigEndian.PutUint16(cdb[7:], n)
	return cdb
}

func cdb16(op, flags byte, lba uint64, n uint32) []byte {
	cdb := make([]byte, 16)
	cdb[0], cdb[1] = op, flags
	binary.BigEndian.PutUint64(cdb[2:], lba)
	binary.BigEndian.PutUint32(cdb[10:], n)
	return cdb
}

var (
	synchronizeCache = cdb10(scsi.OpSynchronizeCache10, 0, 0, 0)
	cacheOff         = []byte{0, 0, 0, 0, 0x08, 0x12, 0x00, 23: 0}
	cacheOn          = []byte{0, 0, 0, 0, 0x08, 0x12, 0x04, 23: 0}
	modeSelect       = []byte{scsi.OpModeSelect6, 0x10, 0, 0, 24, 0}
)

// pattern is n bytes that differ from place to place and from seed to seed.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>9*7 + i*3 + seed*31)
	}
	return b
}

func TestReadWrite(t *testing.T) {
	for _, bs := range []uint32{512, 4096} {
		l := newDisk(t, Options{BlockSize: bs})
		n := int(bs)
		for i, test := range []struct {
			write, read []byte
			blocks      int
		}{
			{[]byte{scsi.OpWrite6, 0, 0, 3, 2, 0}, []byte{scsi.OpRead6, 0, 0, 3, 2, 0}, 2},
			{write10(0x18, 5, 3), read10(0x18, 5, 3), 3},
			{[]byte{scsi.OpWrite12, 0x08, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0}, []byte{scsi.OpRead12, 0x10, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0}, 1},
			{cdb16(scsi.OpWrite16, 0, 9, 100), cdb16(scsi.OpRead16, 0, 9, 100), 100},
		} {
			want := pattern(i, test.blocks*n)
			c := do(t, l, test.write, want, 0)
			expect(t, c, "")
			if c.Residual != 0 {
				t.Errorf("% x: residual %d", test.write, c.Residual)
			}
			c = do(t, l, test.read, nil, len(want)+100)
			expect(t, c, "")
			if c.Residual != 100 {
				t.Errorf("% x: residual %d; want 100", test.read, c.Residual)
			}
			if !bytes.Equal(dataIn(c), want) {
				t.Errorf("block size %d, % x: not what was written", bs, test.read)
			}
			// A buffer too short gets what fits.
			if got := dataIn(do(t, l, test.read, nil, 100)); !bytes.Equal(got, want[:100]) {
				t.Errorf("block size %d, % x with 100 bytes: not the start of what was written", bs, test.read)
			}
			expect(t, do(t, l, synchronizeCache, nil, 0), "")
		}
	}
}

// TestQuickRead: a short READ of what is in the page cache is done when Submit
// returns; no other is, nor one that a COMPARE AND WRITE is in the way of.
func TestQuickRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &memFile{data: pattern(1, 1<<20)}
		l := newMem(t, f, Options{})
		do(t, l, synchronizeCache, nil, 0) // makes a worker
		synctest.Wait()                    // until it is idle again
		for _, test := range []struct {
			name  string
			cdb   []byte
			cold  bool
			taken bool // the blocks are
			quick bool
		}{
			{name: "cached", cdb: read10(0, 8, 8), quick: true},
			{name: "not cached", cdb: read10(0, 8, 8), cold: true},
			{name: "FUA", cdb: read10(0x08, 8, 8)},
			{name: "long", cdb: read10(0, 8, 129)},
			{name: "in the way", cdb: read10(0, 8, 8), taken: true},
			{name: "cached, again", cdb: read10(0, 8, 8), quick: true},
		} {
			n := int(test.cdb[8]) * 512
			c := &scsi.Command{CDB: test.cdb, DataIn: pieces(make([]byte, n))}
			done := false
			c.Done = func(*scsi.Command) { done = true }
			var other worker
			if test.taken {
				l.ranges.lock(&other, 4200, 4300, true)
			}
			f.cold = test.cold
			gate := make(chan struct{}) // no worker ends a command by chance
			l.tasks.run = func(w *worker, c *scsi.Command) {
				<-gate
				l.execute(w, c)
			}
			l.Submit(c)
			if done != test.quick {
				t.Errorf("%s: done when Submit returned: %v; want %v", test.name, done, test.quick)
			}
			close(gate)
			synctest.Wait()
			if done == test.taken {
				t.Errorf("%s: done: %v", test.name, done)
			}
			if test.taken {
				l.ranges.unlock(&other)
				synctest.Wait()
			}
			if !done || !bytes.Equal(dataIn(c), f.data[8*512:8*512+n]) {
				t.Errorf("%s: done: %v, or not what is there", test.name, done)
			}
		}
		l.Close()
	})
}

// TestRead6Of256 is the one length that is not what it says.
func TestRead6Of256(t *testing.T) {
	l := newDisk(t, Options{})
	want := pattern(1, 256*512)
	expect(t, do(t, l, []byte{scsi.OpWrite6, 0, 0, 1, 0, 0}, want, 0), "")
	c := do(t, l, []byte{scsi.OpRead6, 0, 0, 1, 0, 0}, nil, len(want))
	if expect(t, c, ""); !bytes.Equal(dataIn(c), want) {
		t.Error("READ(6) of 256 blocks: not what was written")
	}
}

// TestManySegments has more of them than one system call takes, some empty.
func TestManySegments(t *testing.T) {
	l := newDisk(t, Options{})
	data := pattern(1, 512<<10)
	var out, in [][]byte
	for p := data; len(p) > 0; p = p[128:] {
		out = append(out, p[:128], nil)
		in = append(in, []byte{}, make([]byte, 128))
	}
	c := &scsi.Command{CDB: write10(0, 8, 1024), DataOut: out}
	run(l, c)
	expect(t, c, "")
	c = &scsi.Command{CDB: read10(0, 8, 1024), DataIn: in}
	run(l, c)
	expect(t, c, "")
	if !bytes.Equal(dataIn(c), data) {
		t.Error("not what was written")
	}
}

func TestUnmap(t *testing.T) {
	path := image(t, 1<<20)
	l := openDisk(t, path, Options{})
	do(t, l, []byte{scsi.OpRequestSense, 0, 0, 0, 0, 0}, nil, 0)
	if !l.thin {
		t.Skip("the file system of TMPDIR cannot punch holes")
	}
	data := pattern(1, 256<<10)
	expect(t, do(t, l, write10(0, 0, 512), data, 0), "")
	// Blocks 1 to 2, part of a page; 64 to 255; none.
	list := unhex(t, "0036 0030 00*4 0000000000000001 00000002 00*4 0000000000000040 000000c0 00*4 0000000000000000 00000000 00*4")
	c := do(t, l, cdb10(scsi.OpUnmap, 0, 0, uint16(len(list))), list, 0)
	if expect(t, c, ""); c.Residual != 0 {
		t.Errorf("UNMAP: residual %d", c.Residual)
	}
	clear(data[512 : 3*512])
	clear(data[64*512 : 256*512])
	if got := dataIn(do(t, l, read10(0, 0, 512), nil, len(data))); !bytes.Equal(got, data) {
		t.Error("UNMAP: other blocks than those named read as zeros")
	}

	c = do(t, l, cdb16(scsi.OpServiceActionIn16, scsi.SAGetLBAStatus, 0, 4096), nil, 4096)
	expect(t, c, "")
	want := unhex(t, `00000044 00000000 0000000000000000 00000040 00000000
		0000000000000040 000000c0 01000000 0000000000000100 00000100 00000000
		0000000000000200 00000600 01000000`)
	if got := dataIn(c); !bytes.Equal(got, want) {
		t.Errorf("GET LBA STATUS:\n got % x\nwant % x", got, want)
	}
	// Two descriptors of the four, from the middle of the first run on.
	c = do(t, l, cdb16(scsi.OpServiceActionIn16, scsi.SAGetLBAStatus, 0x10, 40), nil, 4096)
	want = unhex(t, "00000024 00000000 0000000000000010 00000030 00000000 0000000000000040 000000c0 01000000")
	if got := dataIn(c); !bytes.Equal(got, want) {
		t.Errorf("GET LBA STATUS:\n got % x\nwant % x", got, want)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != 1<<20 {
		t.Errorf("the file has %d bytes, %v", fi.Size(), err)
	}
}

func TestWriteSame(t *testing.T) {
	for name, noHoles := range map[string]bool{"thin": false, "thick": true} {
		f := &memFile{data: pattern(1, 6<<20), noHoles: noHoles}
		l := newMem(t, f, Options{})
		want := bytes.Clone(f.data)
		block := pattern(9, 512)
		same := func(op, flags byte, lba, n int, out []byte) {
			t.Helper()
			cdb := cdb10(op, flags, uint32(lba), uint16(n))
			if op == scsi.OpWriteSame16 {
				cdb = cdb16(op, flags, uint64(lba), uint32(n))
			}
			c := do(t, l, cdb, out, 0)
			if expect(t, c, ""); c.Residual != 0 {
				t.Errorf("%s: % x: residual %d", name, cdb, c.Residual)
			}
			b := out
			if out == nil {
				b = make([]byte, 512)
			}
			for i := lba; i < lba+n; i++ {
				copy(want[i*512:], b)
			}
			if !bytes.Equal(f.data, want) {
				t.Errorf("%s: % x: the file is not what it should be", name, cdb)
			}
		}
		same(scsi.OpWriteSame10, 0, 1, 1, block)
		same(scsi.OpWriteSame16, 0, 3, 9000, block) // more than one system call
		f.most = 1000                               // the kernel moves less than it was asked
		same(scsi.OpWriteSame16, 0, 5, 300, pattern(4, 512))
		f.most = 0
		same(scsi.OpWriteSame16, 0, 10, 50, make([]byte, 512))
		same(scsi.OpWriteSame16, ndobField, 100, 50, nil)
		if !noHoles {
			same(scsi.OpWriteSame10, unmapField, 200, 50, make([]byte, 512))
			same(scsi.OpWriteSame16, unmapField|ndobField, 300, 50, nil)
			same(scsi.OpWriteSame16, unmapField, 400, 50, block) // does not read as zeros: written
		}
	}
}

func TestVerify(t *testing.T) {
	l := newDisk(t, Options{})
	data := pattern(1, 200*512)
	expect(t, do(t, l, write10(0, 10, 200), data, 0), "")
	for _, cdb := range [][]byte{cdb10(scsi.OpVerify10, 0x02, 10, 200), cdb16(scsi.OpVerify16, 0x02, 10, 200)} {
		c := do(t, l, cdb, data, 0)
		if expect(t, c, ""); c.Residual != 0 {
			t.Errorf("% x: residual %d", cdb, c.Residual)
		}
		for _, at := range []int{0, 511, 512, 64 << 10, len(data) - 1} {
			data[at]++
			c := do(t, l, cdb, data, 0)
			expect(t, c, "e/1d/00")
			if got := binary.BigEndian.Uint32(c.Sense[3:]); c.Sense[0] != 0xf0 || int(got) != at {
				t.Errorf("% x: miscompare at %d is told as %d (% x)", cdb, at, got, c.Sense[:18])
			}
			data[at]--
		}
		cdb[1] = 0 // BYTCHK 00b: no data
		expect(t, do(t, l, cdb, nil, 0), "")
	}
}

func TestCompareAndWrite(t *testing.T) {
	l := newDisk(t, Options{})
	old, next := pattern(1, 4*512), pattern(2, 4*512)
	expect(t, do(t, l, write10(0, 10, 4), old, 0), "")
	caw := cdb16(scsi.OpCompareAndWrite, 0, 10, 4)
	content := func() []byte { return dataIn(do(t, l, read10(0, 10, 4), nil, 4*512)) }

	for _, at := range []int{0, 513, 4*512 - 1} {
		out := append(bytes.Clone(old), next...)
		out[at] ^= 0x80
		c := do(t, l, caw, out, 0)
		expect(t, c, "e/1d/00")
		if got := binary.BigEndian.Uint32(c.Sense[3:]); c.Sense[0] != 0xf0 || int(got) != at {
			t.Errorf("miscompare at %d is told as %d", at, got)
		}
		if !bytes.Equal(content(), old) {
			t.Fatal("COMPARE AND WRITE wrote in spite of a difference")
		}
	}
	c := do(t, l, caw, append(bytes.Clone(old), next...), 0)
	if expect(t, c, ""); c.Residual != 0 {
		t.Errorf("residual %d", c.Residual)
	}
	if !bytes.Equal(content(), next) {
		t.Error("COMPARE AND WRITE did not write")
	}
	expect(t, do(t, l, cdb16(scsi.OpCompareAndWrite, 0, 10, 0), nil, 0), "")
	// As many blocks as page B0h says.
	expect(t, do(t, l, cdb16(scsi.OpCompareAndWrite, 0, 100, 128), pattern(1, 2*128*512), 0), "e/1d/00")
	expect(t, do(t, l, cdb16(scsi.OpCompareAndWrite, 0, 100, 128), make([]byte, 2*128*512), 0), "")
}

// TestCompareAndWriteIsAtomic counts in a block: each increment is a COMPARE
// AND WRITE that is tried until it succeeds, and none gets lost.
func TestCompareAndWriteIsAtomic(t *testing.T) {
	const nexuses, each = 8, 50
	l := newDisk(t, Options{})
	var hosts sync.WaitGroup
	for range nexuses {
		hosts.Go(func() {
			for done := 0; done < each; {
				c := do(t, l, read10(0, 7, 2), nil, 1024)
				old := dataIn(c)
				if len(old) != 1024 {
					t.Errorf("READ: %v", c.Sense[:c.SenseLen])
					return
				}
				// Both blocks are written by one command, so are never seen apart.
				a, b := binary.LittleEndian.Uint64(old), binary.LittleEndian.Uint64(old[512:])
				if a != b {
					t.Errorf("READ between the blocks of a COMPARE AND WRITE: %d and %d", a, b)
					return
				}
				next := bytes.Clone(old)
				binary.LittleEndian.PutUint64(next, a+1)
				binary.LittleEndian.PutUint64(next[512:], a+1)
				if do(t, l, cdb16(scsi.OpCompareAndWrite, 0, 7, 2), append(old, next...), 0).Status == scsi.Good {
					done++
				}
			}
		})
	}
	hosts.Wait()
	got := binary.LittleEndian.Uint64(dataIn(do(t, l, read10(0, 7, 1), nil, 512)))
	if got != nexuses*each {
		t.Errorf("counted to %d; want %d", got, nexuses*each)
	}
}

// TestConcurrentUse has several hosts' worth of everything at once. Each has
// blocks of its own and must find there what it wrote last.
func TestConcurrentUse(t *testing.T) {
	const each = 64
	path := image(t, 1<<20)
	l := openDisk(t, path, Options{})
	l.flusher.sync = func() error { return nil }
	// send repeats a command that a reset got in the way of.
	send := func(cdb, out []byte, in int) *scsi.Command {
		for {
			c := do(t, l, cdb, out, in)
			switch s, _ := scsi.ParseSense(c.Sense[:c.SenseLen]); {
			case c.Outcome == scsi.Completed && c.Status == scsi.Good:
				return c
			case c.Outcome == scsi.ResetOccurred, s.Key == scsi.UnitAttention:
			default:
				t.Errorf("% x: %v, %v, %v", cdb, c.Outcome, c.Status, s)
				return c
			}
		}
	}
	var hosts, disturbance sync.WaitGroup
	over := make(chan struct{})
	disturbance.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-over:
				return
			default:
			}
			if err := l.Reset(); err != nil {
				t.Error(err)
			}
			if _, err := l.Rescan(); err != nil {
				t.Error(err)
			}
			send(modeSelect, [][]byte{cacheOff, cacheOn}[i%2], 0)
		}
	})
	for host := range 6 {
		hosts.Go(func() {
			lba := uint32(host * each)
			want := make([]byte, each*512)
			for i := range 40 {
				switch i % 4 {
				case 0, 1:
					want = pattern(host+i, len(want))
					send(write10(byte(i&2)<<2, lba, each), want, 0)
				case 2:
					block := pattern(i, 512)
					send(cdb10(scsi.OpWriteSame10, 0, lba, each/2), block, 0)
					copy(want, bytes.Repeat(block, each/2))
				case 3:
					send(cdb16(scsi.OpWriteSame16, ndobField, uint64(lba), 3), nil, 0)
					clear(want[:3*512])
				}
				if got := dataIn(send(read10(0, lba, each), nil, len(want))); !bytes.Equal(got, want) {
					t.Errorf("host %d, round %d: not what it wrote", host, i)
					return
				}
			}
		})
	}
	hosts.Wait()
	close(over)
	disturbance.Wait()
}

// TestDurability counts what is brought to the medium when.
func TestDurability(t *testing.T) {
	f := &memFile{data: make([]byte, 512<<20)} // READ(6) reaches as far
	l := newMem(t, f, Options{})
	block := make([]byte, 512)
	for _, test := range []struct {
		name     string
		cdb, out []byte
		syncs    int
	}{
		{"WRITE", write10(0, 0, 1), block, 0},
		{"WRITE, FUA", write10(0x08, 0, 1), block, 1},
		{"WRITE(6), whose LBA has that bit", []byte{scsi.OpWrite6, 0x08, 0, 0, 1, 0}, block, 0},
		{"COMPARE AND WRITE", cdb16(scsi.OpCompareAndWrite, 0, 0, 1), make([]byte, 1024), 0},
		{"COMPARE AND WRITE, FUA", cdb16(scsi.OpCompareAndWrite, 0x08, 0, 1), make([]byte, 1024), 1},
		{"READ", read10(0, 0, 1), nil, 0},
		{"READ, FUA", read10(0x08, 0, 1), nil, 1},
		{"READ(6), whose LBA has that bit", []byte{scsi.OpRead6, 0x08, 0, 0, 1, 0}, nil, 0},
		{"SYNCHRONIZE CACHE(10)", synchronizeCache, nil, 1},
		{"SYNCHRONIZE CACHE(16), IMMED", cdb16(scsi.OpSynchronizeCache16, 0x02, 1, 2), nil, 1},
		{"VERIFY", cdb10(scsi.OpVerify10, 0, 0, 1), nil, 1},
		{"MODE SELECT, as it is", modeSelect, cacheOn, 0},
		{"START STOP UNIT, NO_FLUSH", []byte{scsi.OpStartStopUnit, 0, 0, 0, 4, 0}, nil, 0},
		{"START STOP UNIT, start", []byte{scsi.OpStartStopUnit, 0, 0, 0, 1, 0}, nil, 0},
		{"START STOP UNIT, stop", []byte{scsi.OpStartStopUnit, 0, 0, 0, 0, 0}, nil, 1},
		{"START STOP UNIT, start", []byte{scsi.OpStartStopUnit, 1, 0, 0, 1, 0}, nil, 0},
		{"MODE SELECT, WCE off", modeSelect, cacheOff, 1},
		{"WRITE, WCE off", write10(0, 0, 1), block, 1},
		{"WRITE SAME, WCE off", cdb10(scsi.OpWriteSame10, 0, 0, 8), block, 1},
		{"WRITE SAME of zeros, WCE off", cdb10(scsi.OpWriteSame10, 0, 0, 8), make([]byte, 512), 1},
		{"UNMAP, WCE off", cdb10(scsi.OpUnmap, 0, 0, 8), make([]byte, 8), 1},
		{"MODE SELECT, WCE on", modeSelect, cacheOn, 0},
		{"WRITE, WCE on", write10(0, 0, 1), block, 0},
	} {
		f.syncs = 0
		c := do(t, l, test.cdb, test.out, 512)
		if got := sense(t, c); got != "" {
			t.Errorf("%s: sense %s", test.name, got)
		}
		if f.syncs != test.syncs {
			t.Errorf("%s: %d write-backs; want %d", test.name, f.syncs, test.syncs)
		}
	}

	// A reset brings the default back.
	expect(t, do(t, l, modeSelect, cacheOff, 0), "")
	if got := dataIn(do(t, l, []byte{scsi.OpModeSense6, 8, 8, 0, 7, 0}, nil, 7)); got[6] != 0 {
		t.Errorf("MODE SENSE says WCE %#x; want 0", got[6])
	}
	if err := l.Reset(); err != nil {
		t.Fatal(err)
	}
	do(t, l, make([]byte, 6), nil, 0) // the unit attention
	if got := dataIn(do(t, l, []byte{scsi.OpModeSense6, 8, 8, 0, 7, 0}, nil, 7)); got[6] != wceBit {
		t.Errorf("MODE SENSE after a reset says WCE %#x; want %#x", got[6], wceBit)
	}
}

func TestModeSelectForms(t *testing.T) {
	l := memDisk(t, Options{})
	for _, test := range []struct {
		name, cdb, list string
	}{
		{"nothing", "15 10 00 00 00 00", ""},
		{"no pages", "15 10 00 00 04 00", "00*4"},
		{"a descriptor as it is", "15 10 00 00 0c 00", "00*3 08 00000800 00000200"},
		{"a descriptor of the present capacity", "15 10 00 00 0c 00", "00*3 08 00000000 00000200"},
		{"a descriptor of all ones", "15 10 00 00 0c 00", "00*3 08 ffffffff 00000200"},
		{"what MODE SENSE(6) says", "15 10 00 00 2c 00", "00 00 10 08 00000800 00000200 88 12 04 00*17 8a 0a 02 10 00*4 ffff 0000"},
		{"what MODE SENSE(10) says, long", "55 10 00*5 0038 00", "00*3 10 01 00 0010 0000000000000800 00000000 00000200 08 12 04 00*17 0a 0a 02 10 00*4 ffff 0000"},
	} {
		list := unhex(t, test.list)
		if got := sense(t, do(t, l, unhex(t, test.cdb), list, 0)); got != "" {
			t.Errorf("%s: sense %s", test.name, got)
		}
	}
}

func TestFaults(t *testing.T) {
	f := &memFile{data: make([]byte, 1<<20)}
	l := newMem(t, f, Options{})
	at := func(lba int64, err error) func(int64) error {
		return func(off int64) error {
			if off >= lba*512 {
				return err
			}
			return nil
		}
	}
	unmapList := unhex(t, "0016 0010 00*4 0000000000000004 00000010 00*4")
	for _, test := range []struct {
		name                string
		read, write         func(int64) error
		sync                error
		cdb, out            []byte
		want                string
		info                int // the logical block; -1 for none
		residual            int
		nextSynchronization string
	}{
		{name: "READ", read: at(6, unix.EIO), cdb: read10(0, 4, 8), want: "3/11/00", info: 6, residual: 4096 - 1024},
		{name: "READ, other error", read: at(6, unix.ESTALE), cdb: read10(0, 4, 8), want: "4/44/00", info: -1, residual: 4096 - 1024},
		{name: "VERIFY", read: at(4, unix.EIO), cdb: cdb10(scsi.OpVerify10, 0, 4, 8), want: "3/11/00", info: 4, residual: 4096},
		{name: "WRITE", write: at(4, unix.EIO), cdb: write10(0, 4, 8), out: make([]byte, 4096), want: "3/0c/00", info: 4, residual: 8192},
		{name: "WRITE, no space", write: at(0, unix.ENOSPC), cdb: write10(0, 4, 8), out: make([]byte, 4096), want: "7/27/07", info: -1, residual: 8192},
		{name: "WRITE, no quota", write: at(0, unix.EDQUOT), cdb: write10(0, 4, 8), out: make([]byte, 4096), want: "7/27/07", info: -1, residual: 8192},
		{name: "WRITE, read-only by now", write: at(0, unix.EROFS), cdb: write10(0, 4, 8), out: make([]byte, 4096), want: "7/27/00", info: -1, residual: 8192},
		{name: "WRITE SAME", write: at(0, unix.EIO), cdb: cdb10(scsi.OpWriteSame10, 0, 4, 8), out: pattern(1, 512), want: "3/0c/00", info: 4, residual: 4096},
		{name: "WRITE SAME of zeros", write: at(0, unix.ENOSPC), cdb: cdb10(scsi.OpWriteSame10, 0, 4, 8), out: make([]byte, 512), want: "7/27/07", info: -1, residual: 4096},
		{name: "UNMAP", write: at(0, unix.EIO), cdb: cdb10(scsi.OpUnmap, 0, 0, 24), out: unmapList, want: "3/0c/00", info: -1, residual: 4096 + 24},
		{name: "COMPARE AND WRITE, compare", read: at(0, unix.EIO), cdb: cdb16(scsi.OpCompareAndWrite, 0, 4, 1), out: make([]byte, 1024), want: "3/11/00", info: 4, residual: 4096 + 1024},
		{name: "COMPARE AND WRITE, write", write: at(0, unix.EIO), cdb: cdb16(scsi.OpCompareAndWrite, 0, 4, 1), out: make([]byte, 1024), want: "3/0c/00", info: 4, residual: 4096 + 1024},
		{name: "SYNCHRONIZE CACHE", sync: unix.EIO, cdb: synchronizeCache, want: "3/0c/00", info: -1, residual: 4096},
		{name: "SYNCHRONIZE CACHE, no space", sync: unix.ENOSPC, cdb: synchronizeCache, want: "7/27/07", info: -1, residual: 4096},
		{name: "WCE off", sync: unix.EIO, cdb: modeSelect, out: cacheOff, want: "3/0c/00", info: -1, residual: 4096 + 24},
		{name: "WCE on", cdb: modeSelect, out: cacheOn, info: -1, residual: 4096},

		// Whoever else is told of a failed write-back: SYNCHRONIZE CACHE is too.
		{name: "WRITE, FUA", sync: unix.EIO, cdb: write10(0x08, 4, 8), out: make([]byte, 4096), want: "3/0c/00", info: -1, residual: 8192, nextSynchronization: "3/0c/00"},
		{name: "READ, FUA", sync: unix.EIO, cdb: read10(0x08, 4, 8), want: "3/0c/00", info: -1, residual: 4096, nextSynchronization: "3/0c/00"},
		{name: "VERIFY, write-back", sync: unix.EIO, cdb: cdb10(scsi.OpVerify10, 0, 4, 8), want: "3/0c/00", info: -1, residual: 4096, nextSynchronization: "3/0c/00"},
	} {
		f.onRead, f.onWrite = test.read, test.write
		if test.sync != nil {
			f.onSync = func() error { return test.sync }
		}
		c := do(t, l, test.cdb, test.out, 4096)
		f.onRead, f.onWrite, f.onSync = nil, nil, nil
		if got := sense(t, c); got != test.want {
			t.Errorf("%s: sense %q; want %q", test.name, got, test.want)
		}
		info := -1
		if c.SenseLen > 0 && c.Sense[0]&0x80 != 0 {
			info = int(binary.BigEndian.Uint32(c.Sense[3:]))
		}
		if info != test.info || int(c.Residual) != test.residual {
			t.Errorf("%s: block %d, residual %d; want %d, %d", test.name, info, c.Residual, test.info, test.residual)
		}
		if got := sense(t, do(t, l, synchronizeCache, nil, 0)); got != test.nextSynchronization {
			t.Errorf("%s: the next SYNCHRONIZE CACHE: %q; want %q", test.name, got, test.nextSynchronization)
		}
		expect(t, do(t, l, synchronizeCache, nil, 0), "")
	}
}

// TestShortTransfers: the kernel may move less than it was asked to.
func TestShortTransfers(t *testing.T) {
	f := &memFile{data: make([]byte, 1<<20), most: 777}
	l := newMem(t, f, Options{})
	data := pattern(3, 64*512)
	expect(t, do(t, l, write10(0, 5, 64), data, 0), "")
	if !bytes.Equal(f.data[5*512:69*512], data) {
		t.Error("not all was written")
	}
	if got := dataIn(do(t, l, read10(0, 5, 64), nil, len(data))); !bytes.Equal(got, data) {
		t.Error("not all was read")
	}
}

// TestShrunkFile: somebody has cut the file off under a running guest.
func TestShrunkFile(t *testing.T) {
	path := image(t, 1<<20)
	l := openDisk(t, path, Options{})
	do(t, l, []byte{scsi.OpRequestSense, 0, 0, 0, 0, 0}, nil, 0)
	if err := os.Truncate(path, 6*512); err != nil {
		t.Fatal(err)
	}
	c := do(t, l, read10(0, 4, 4), nil, 2048)
	expect(t, c, "3/11/00")
	if got := binary.BigEndian.Uint32(c.Sense[3:]); got != 6 || c.Residual != 1024 {
		t.Errorf("block %d, residual %d; want 6, 1024", got, c.Residual)
	}
}
