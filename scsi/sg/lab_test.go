package sg

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/scsi"
	"vmm/tests/lab/lio"
)

// The tests in this file run where root may load the kernel's SCSI target and
// scsi_debug, as in a host of tests/lab. Each runs twice: as root, whose
// commands take the block node, and in a child process as nobody, whose
// commands take the sg node.

const (
	requireLIO = "VMM_TEST_REQUIRE_LIO" // 1: a skip is a failure
	inChild    = "VMM_TEST_SG"          // the devices, in a child's environment
)

// bench is what the tests run on.
type bench struct {
	A, B  lio.Device // two nexuses of one LUN of the kernel's target, 32 MiB
	Debug lio.Device // a disk of scsi_debug, 8 MiB
	root  bool
}

var labs struct {
	once  sync.Once
	b     bench
	lun   *lio.LUN
	debug *lio.Debug
	err   error
}

func TestMain(m *testing.M) {
	code := m.Run()
	var err error
	if labs.lun != nil {
		err = labs.lun.Close()
	}
	if labs.debug != nil {
		err = errors.Join(err, labs.debug.Close())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// lab makes the devices, once.
func lab(t testing.TB) bench {
	t.Helper()
	if s := os.Getenv(inChild); s != "" {
		var b bench
		if err := json.Unmarshal([]byte(s), &b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	labs.once.Do(func() {
		if os.Getuid() != 0 {
			labs.err = errors.New("making SCSI devices needs root")
			return
		}
		labs.err = lio.Load()
	})
	if labs.err != nil {
		if os.Getenv(requireLIO) == "1" {
			t.Fatal(labs.err)
		}
		t.Skip(labs.err)
	}
	if labs.lun == nil {
		var err error
		ctx := context.Background() // longer than this test
		if labs.lun, err = lio.Create(ctx, lio.Config{Name: "sgtest", Size: 32 << 20, Serial: "sg-test-serial", Nexuses: 2}); err != nil {
			t.Fatal(err)
		}
		if labs.debug, err = lio.LoadDebug(ctx, "dev_size_mb=8"); err != nil {
			t.Fatal(err)
		}
		labs.b = bench{A: labs.lun.Nexuses[0].Device, B: labs.lun.Nexuses[1].Device, Debug: labs.debug.Devices[0], root: true}
	}
	return labs.b
}

// bothWays runs f as root and, in a child, as nobody. Before either, root runs
// prepare.
func bothWays(t *testing.T, prepare func(), f func(t *testing.T, b bench)) {
	b := lab(t)
	if !b.root {
		f(t, b)
		return
	}
	name := t.Name()
	t.Run("block node", func(t *testing.T) {
		prepare()
		f(t, b)
	})
	t.Run("sg node", func(t *testing.T) {
		prepare()
		const nobody = 65534
		tmp := t.TempDir()
		for _, path := range []string{tmp, b.A.SG, b.A.Block, b.B.SG, b.B.Block, b.Debug.SG, b.Debug.Block} {
			if err := os.Chown(path, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
		for dir := tmp; dir != "/" && dir != "."; dir = filepath.Dir(dir) {
			if st, err := os.Stat(dir); err == nil && st.Mode()&0o001 == 0 {
				os.Chmod(dir, st.Mode()|0o011)
			}
		}
		devices, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		c := exec.Command("/proc/self/exe", "-test.run=^"+name+"$", "-test.v")
		c.Env = append(os.Environ(), inChild+"="+string(devices), "TMPDIR="+tmp)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := c.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: "+name)) {
			t.Fatalf("as nobody: %v\n%s", err, out)
		}
	})
}

// open opens a LUN and checks that it goes the way it should.
func (b bench) open(t testing.TB, path string) *LUN {
	t.Helper()
	l, err := Open(path, Options{VM: "lab", RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	sg := strings.HasPrefix(l.via, "/dev/sg")
	if sg == b.root {
		t.Fatalf("%s as root %v", l, b.root)
	}
	return l
}

// requests is how many commands the kernel has sent to a device.
func requests(t testing.TB, d lio.Device) int {
	t.Helper()
	b, err := os.ReadFile(d.Sys() + "/iorequest_cnt")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// in is a command that reads n bytes.
func in(n int, cdb ...byte) *scsi.Command {
	return &scsi.Command{CDB: cdb, DataIn: [][]byte{make([]byte, n)}}
}

// got is what c received.
func got(c *scsi.Command) []byte {
	b := bytes.Join(c.DataIn, nil)
	return b[:len(b)-int(c.Residual)]
}

func read10(lba, blocks int) []byte {
	cdb := []byte{scsi.OpRead10, 9: 0}
	binary.BigEndian.PutUint32(cdb[2:], uint32(lba))
	binary.BigEndian.PutUint16(cdb[7:], uint16(blocks))
	return cdb
}

func write10(lba, blocks int) []byte {
	cdb := read10(lba, blocks)
	cdb[0] = scsi.OpWrite10
	return cdb
}

func TestLabAnswersAreTheDevices(t *testing.T) {
	bothWays(t, func() {}, func(t *testing.T, b bench) {
		for _, d := range []lio.Device{b.A, b.Debug} {
			l := b.open(t, d.SG)
			for _, cdb := range [][]byte{
				{scsi.OpInquiry, 0, 0, 0, 96, 0},
				{scsi.OpInquiry, 1, 0x00, 0, 96, 0},
				{scsi.OpInquiry, 1, 0x80, 0, 96, 0},
				{scsi.OpInquiry, 1, 0x83, 4, 0, 0},
				{scsi.OpInquiry, 1, 0xb1, 0, 96, 0},
				{scsi.OpInquiry, 1, 0x77, 0, 96, 0}, // no such page
				{scsi.OpReadCapacity10, 9: 0},
				{scsi.OpServiceActionIn16, scsi.SAReadCapacity16, 13: 32, 15: 0},
				{scsi.OpModeSense6, 0, 0x3f, 0, 192, 0},
				{scsi.OpReportLUNs, 8: 1, 11: 0},
				{scsi.OpPersistentReserveIn, 0, 7: 1, 9: 0},
				{scsi.OpPersistentReserveIn, 2, 7: 1, 9: 0},
				{scsi.OpMaintenanceIn, scsi.SAReportSupportedOpcodes, 8: 16, 11: 0},
				{scsi.OpRead10, 8: 1, 9: 0},
				{scsi.OpReadBuffer, 9: 0}, // perhaps not supported
			} {
				c := in(4096, cdb...)
				exec1(t, l, c)
				args := []string{"-b", "-r", "4096", d.SG}
				for _, v := range cdb {
					args = append(args, fmt.Sprintf("%02x", v))
				}
				want, err := exec.Command("sg_raw", args...).Output()
				switch {
				case c.Err() != nil && err == nil:
					t.Errorf("%s: % x: %v; sg_raw succeeds", d.SG, cdb, c.Err())
				case c.Err() == nil && err != nil:
					t.Errorf("%s: % x: %d bytes; sg_raw: %v", d.SG, cdb, len(got(c)), err)
				case c.Err() == nil && (len(want) == 0 || !bytes.HasPrefix(want, got(c)) || len(want) != len(got(c)) && len(want) != 4096):
					t.Errorf("%s: % x:\n% x\nsg_raw:\n% x", d.SG, cdb, got(c), want)
				}
			}
		}
	})
}

func TestLabIdentity(t *testing.T) {
	bothWays(t, func() {}, func(t *testing.T, b bench) {
		a, other, debug := b.open(t, b.A.SG), b.open(t, b.B.Block), b.open(t, b.Debug.SG)
		id := a.Identity()
		if id.Serial != "sg-test-serial" || id.Vendor != "LIO-ORG" || !strings.HasPrefix(id.String(), "naa.6001405") {
			t.Errorf("identity %+v", id)
		}
		if !id.Same(other.Identity()) || id.Same(debug.Identity()) {
			t.Errorf("%s, %s and %s: the first two are one LUN", id, other.Identity(), debug.Identity())
		}
		if n := a.Nexus(); n.Address.String() != b.A.HCTL || n == other.Nexus() || len(n.BootID) != 36 {
			t.Errorf("nexus %+v; want %s", n, b.A.HCTL)
		}
		// The kernel reads the same designators.
		wwid, err := os.ReadFile(b.A.Sys() + "/wwid")
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(wwid)); got != id.String() {
			t.Errorf("name %s; the kernel says %s", id, got)
		}
	})
}

func TestLabLimits(t *testing.T) {
	bothWays(t, func() {}, func(t *testing.T, b bench) {
		l := b.open(t, b.A.SG)
		if want := (scsi.Limits{MaxTransfer: 1 << 20, MaxSegments: 256}); l.Limits() != want {
			t.Fatalf("limits %+v; want %+v", l.Limits(), want)
		}
		page := in(64, scsi.OpInquiry, 1, 0xb0, 0, 64, 0)
		exec1(t, l, page)
		raw, err := exec.Command("sg_raw", "-b", "-r", "64", b.A.SG, "12", "01", "b0", "00", "40", "00").Output()
		if err != nil {
			t.Fatal(err)
		}
		if n := binary.BigEndian.Uint32(raw[8:]); n <= 2048 {
			t.Fatalf("the target's MAXIMUM TRANSFER LENGTH is %d: nothing to clamp", n)
		}
		binary.BigEndian.PutUint32(raw[8:], 2048)
		binary.BigEndian.PutUint32(raw[12:], min(2048, binary.BigEndian.Uint32(raw[12:])))
		if !bytes.Equal(got(page), raw) {
			t.Errorf("page B0h\n% x; want\n% x", got(page), raw)
		}

		// As much as there may be, out of and into memory that lies well, ill,
		// and in more pieces than there are segments.
		m, err := sys.MapAnonymous(4 << 20)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		mem := m.Bytes()
		aligned := [][]byte{mem[:1<<20]}
		shifted := [][]byte{mem[1<<20+512:][:1<<20]}
		var pieces [][]byte
		for i := range 512 {
			pieces = append(pieces, mem[(2<<20)+4096*i+1024:][:2048])
		}
		odd := [][]byte{mem[7:][:512], mem[601:][:1<<20-512]} // no adapter's alignment
		for seed, bufs := range map[byte][2][][]byte{
			1: {aligned, shifted}, 2: {shifted, pieces}, 3: {pieces, odd}, 4: {odd, aligned}, 5: {pieces, pieces},
		} {
			want := make([]byte, 1<<20)
			for i := range want {
				want[i] = byte(i) ^ byte(i>>8) ^ byte(i>>16) ^ seed
			}
			clear(mem)
			w := &scsi.Command{CDB: write10(0, 2048), DataOut: bufs[0]}
			rest := want
			for _, p := range w.DataOut {
				rest = rest[copy(p, rest):]
			}
			exec1(t, l, w)
			clear(mem)
			r := &scsi.Command{CDB: read10(0, 2048), DataIn: bufs[1]}
			exec1(t, l, r)
			if w.Err() != nil || r.Err() != nil || r.Residual != 0 || !bytes.Equal(got(r), want) {
				t.Errorf("1 MiB from %d pieces to %d: write %v, read %v, residual %d, data equal %v",
					len(w.DataOut), len(r.DataIn), w.Err(), r.Err(), r.Residual, bytes.Equal(got(r), want))
			}
		}

		before := requests(t, b.A)
		c := in(1<<20+512, read10(0, 2049)...)
		exec1(t, l, c)
		if s, _ := scsi.ParseSense(c.Sense[:c.SenseLen]); s != scsi.InvalidFieldInCDB {
			t.Errorf("1 MiB and a block: %v; want 5/24/00", c.Err())
		}
		if n := requests(t, b.A) - before; n != 0 {
			t.Errorf("1 MiB and a block: %d commands were sent", n)
		}
	})
}

// prOut is a PERSISTENT RESERVE OUT.
func prOut(action, typ byte, key, newKey uint64) *scsi.Command {
	p := make([]byte, 24)
	binary.BigEndian.PutUint64(p, key)
	binary.BigEndian.PutUint64(p[8:], newKey)
	return &scsi.Command{CDB: []byte{scsi.OpPersistentReserveOut, action, typ, 8: 24, 9: 0}, DataOut: [][]byte{p}}
}

func TestLabReservations(t *testing.T) {
	bothWays(t, func() {}, func(t *testing.T, b bench) {
		a := b.open(t, b.A.SG)
		const key = 0x123456789
		for _, c := range []*scsi.Command{prOut(0, 0, 0, key), prOut(1, 3, key, 0)} { // REGISTER, RESERVE Exclusive Access
			if exec1(t, a, c); c.Err() != nil {
				t.Fatal(c.Err())
			}
		}
		// Opening sends nothing that this stops.
		other := b.open(t, b.B.SG)
		if !other.Identity().Same(a.Identity()) {
			t.Errorf("identity under a reservation: %s", other.Identity())
		}
		c := in(512, read10(0, 1)...)
		exec1(t, other, c)
		if c.Outcome != scsi.Completed || c.Status != scsi.ReservationConflict || c.SenseLen != 0 {
			t.Errorf("read without a registration: %v, %v, %d bytes of sense; want RESERVATION CONFLICT", c.Outcome, c.Status, c.SenseLen)
		}
		keys := in(24, scsi.OpPersistentReserveIn, 0, 0, 0, 0, 0, 0, 0, 24, 0)
		if exec1(t, other, keys); keys.Err() != nil || binary.BigEndian.Uint64(got(keys)[8:]) != key {
			t.Errorf("READ KEYS: %v, % x; want key %#x", keys.Err(), got(keys), key)
		}
		if c := in(512, read10(0, 1)...); true {
			if exec1(t, a, c); c.Err() != nil {
				t.Errorf("the holder's read: %v", c.Err())
			}
		}
		if c := prOut(3, 0, key, 0); true { // CLEAR
			if exec1(t, a, c); c.Err() != nil {
				t.Errorf("CLEAR: %v", c.Err())
			}
		}
	})
}

// storm sends signals to every thread of this process until the test ends.
// Go installs all its handlers with SA_RESTART.
func storm(t *testing.T) {
	stop := make(chan struct{})
	var stopped sync.WaitGroup
	stopped.Add(1)
	go func() {
		defer stopped.Done()
		for {
			tasks, _ := os.ReadDir("/proc/self/task")
			for _, e := range tasks {
				select {
				case <-stop:
					return
				default:
				}
				tid, _ := strconv.Atoi(e.Name())
				if tid != unix.Gettid() {
					unix.Tgkill(os.Getpid(), tid, unix.SIGURG)
				}
			}
		}
	}()
	t.Cleanup(func() { close(stop); stopped.Wait() })
}

// TestLabSentOnce counts the commands that the kernel sent while signals rain.
func TestLabSentOnce(t *testing.T) {
	bothWays(t, func() { labs.debug.Set("ndelay", "5000000") }, func(t *testing.T, b bench) {
		l := b.open(t, b.Debug.SG)
		exec1(t, l, in(0, 0, 0, 0, 0, 0, 0)) // takes a unit attention out of the way
		storm(t)
		const n, depth = 400, 8
		before := requests(t, b.Debug)
		free := make(chan *scsi.Command, depth)
		for i := range depth {
			cdb := read10(i, 1)
			if i%2 == 1 {
				cdb = write10(i, 1)
			}
			c := &scsi.Command{CDB: cdb, Done: func(c *scsi.Command) { free <- c }}
			if i%2 == 1 {
				c.DataOut = [][]byte{make([]byte, 512)}
			} else {
				c.DataIn = [][]byte{make([]byte, 512)}
			}
			free <- c
		}
		for range n {
			c := <-free
			if c.Err() != nil {
				t.Fatal(c.Err())
			}
			l.Submit(c)
		}
		for range depth {
			if c := <-free; c.Err() != nil {
				t.Fatal(c.Err())
			}
		}
		if got := requests(t, b.Debug) - before; got != n {
			t.Errorf("%d commands were sent as %d", n, got)
		}
		if !b.root {
			return
		}
		// That the storm is one: the way not taken, SG_IO on the sg node.
		fd, err := unix.Open(b.Debug.SG, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		s, err := newSlots(1)
		if err != nil {
			t.Fatal(err)
		}
		defer s.m.Close()
		m := s.at(0)
		buf := make([]byte, 512)
		before = requests(t, b.Debug)
		for range 50 {
			m.prepare()
			m.hdr.cmdLen, m.hdr.timeout = uint8(copy(m.cdb[:], read10(0, 1))), 30000
			m.hdr.direction, m.hdr.dxferLen = dxferFromDev, 512
			m.setOne(buf)
			if e := sgIO(fd, &m.hdr); e != 0 {
				t.Fatal(e)
			}
		}
		got := requests(t, b.Debug) - before
		t.Logf("SG_IO on the sg node: 50 commands were sent as %d", got)
		if got <= 50 {
			t.Error("the storm shows nothing: SG_IO on the sg node should repeat commands")
		}
	})
}

func TestLabSlowCommandsDelayNoOther(t *testing.T) {
	// In jiffies of 4 ms: 12 s. INQUIRY answers at once.
	bothWays(t, func() { labs.debug.Set("delay", "3000") }, func(t *testing.T, b bench) {
		l := b.open(t, b.Debug.SG)
		var slow atomic.Int32
		var all sync.WaitGroup
		const n = 40
		cs := make([]scsi.Command, n)
		for i := range cs {
			cs[i] = scsi.Command{CDB: read10(i, 1), DataIn: [][]byte{make([]byte, 512)}}
			cs[i].Done = func(*scsi.Command) { slow.Add(1); all.Done() }
			all.Add(1)
			l.Submit(&cs[i])
		}
		for range 50 {
			c := in(36, scsi.OpInquiry, 0, 0, 0, 36, 0)
			if exec1(t, l, c); c.Err() != nil {
				t.Fatal(c.Err())
			}
		}
		if n := slow.Load(); n != 0 {
			t.Errorf("%d commands of 12 s ended before 50 that take no time", n)
		}
		all.Wait()
		for i := range cs {
			// One meets the unit attention of a device that nobody has used.
			if s, _ := scsi.ParseSense(cs[i].Sense[:cs[i].SenseLen]); cs[i].Err() != nil && s.Key != scsi.UnitAttention {
				t.Errorf("slow command %d: %v", i, cs[i].Err())
			}
		}
	})
}

func TestLabMediumError(t *testing.T) {
	bothWays(t, func() {
		labs.debug.Set("delay", "0")
		labs.debug.Inject(lio.OptMediumError, 0)
	}, func(t *testing.T, b bench) {
		if b.root {
			t.Cleanup(func() { labs.debug.Inject(0, 0) })
		}
		l := b.open(t, b.Debug.SG)
		exec1(t, l, in(0, 0, 0, 0, 0, 0, 0))
		c := in(8*512, read10(0x1234-4, 8)...)
		exec1(t, l, c)
		want := scsi.Sense{Key: scsi.MediumError, ASC: 0x11}
		if s, ok := scsi.ParseSense(c.Sense[:c.SenseLen]); c.Status != scsi.CheckCondition || !ok || s != want {
			t.Fatalf("%v; want CHECK CONDITION, sense %v", c.Err(), want)
		}
		if lba := binary.BigEndian.Uint32(c.Sense[3:]); c.Sense[0] != 0xf0 || lba != 0x1234 {
			t.Errorf("sense % x; want the failing block, 0x1234, in it", c.Sense[:c.SenseLen])
		}
		// What the kernel itself says, unprepared by us.
		fd, err := unix.Open(b.Debug.SG, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		s, err := newSlots(1)
		if err != nil {
			t.Fatal(err)
		}
		defer s.m.Close()
		m := s.at(0)
		m.prepare()
		m.hdr.cmdLen, m.hdr.timeout, m.hdr.mxSenseLen = uint8(copy(m.cdb[:], c.CDB)), 30000, mxSense
		m.hdr.direction, m.hdr.dxferLen = dxferFromDev, 8*512
		m.setOne(make([]byte, 8*512))
		if e := sgIO(fd, &m.hdr); e != 0 {
			t.Fatal(e)
		}
		if !bytes.Equal(m.sense[:m.hdr.senseLen], c.Sense[:c.SenseLen]) || uint32(m.hdr.resid) != c.Residual {
			t.Errorf("sense % x, residual %d; the kernel says % x, %d", c.Sense[:c.SenseLen], c.Residual, m.sense[:m.hdr.senseLen], m.hdr.resid)
		}
	})
}

func TestLabReset(t *testing.T) {
	bothWays(t, func() { labs.debug.Set("delay", "1000") }, func(t *testing.T, b bench) {
		l := b.open(t, b.Debug.SG)
		if !b.root {
			if err := l.Reset(); err != scsi.ErrRejected {
				t.Errorf("Reset() = %v; want ErrRejected", err)
			}
			return
		}
		exec1(t, l, in(0, 0, 0, 0, 0, 0, 0))
		done := make(chan struct{})
		slow := &scsi.Command{CDB: read10(0, 1), DataIn: [][]byte{make([]byte, 512)}, Done: func(*scsi.Command) { close(done) }}
		before := requests(t, b.Debug)
		l.Submit(slow)
		for requests(t, b.Debug) == before { // until the device has it
		}
		if err := l.Reset(); err != nil {
			t.Fatalf("Reset() = %v", err)
		}
		<-done // one way or another
		c := in(0, 0, 0, 0, 0, 0, 0)
		exec1(t, l, c)
		if s, _ := scsi.ParseSense(c.Sense[:c.SenseLen]); s.Key != scsi.UnitAttention || s.ASC != 0x29 {
			t.Errorf("after the reset: %v; want unit attention 29h", c.Err())
		}
		labs.debug.Set("delay", "0")
		c = in(512, read10(0, 1)...)
		if exec1(t, l, c); c.Err() != nil {
			t.Errorf("read after the reset: %v", c.Err())
		}
		// LIO's loopback knows the function, too.
		target := b.open(t, b.A.SG)
		if err := target.Reset(); err != nil {
			t.Errorf("Reset() of LIO's LUN = %v", err)
		}
	})
}

func TestLabLock(t *testing.T) {
	b := lab(t)
	run := t.TempDir()
	o := Options{VM: "first", RunDir: run}
	first, err := Open(b.A.SG, o)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(b.A.Block, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{b.A.SG, b.A.Block, link} {
		_, err := Open(path, Options{VM: "second", RunDir: run})
		if want := "LUN " + path + ": in use by this VM, first, already: the same LUN is given twice"; !errors.Is(err, ErrBusy) || err.Error() != want {
			t.Errorf("Open(%s) = %v; want %q", path, err, want)
		}
	}
	// Without the lock file there is the block node.
	_, err = Open(b.A.SG, Options{VM: "second", RunDir: t.TempDir()})
	if want := "another program has " + b.A.Block; !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), want) {
		t.Errorf("Open with another run directory = %v; want %q", err, want)
	}
	// The other nexus is another guest's business.
	other, err := Open(b.B.SG, Options{VM: "second", RunDir: run})
	if err != nil {
		t.Errorf("Open of the other nexus = %v", err)
	} else {
		other.Close()
	}
	first.Close()
	if again, err := Open(b.A.Block, o); err != nil {
		t.Errorf("Open after Close = %v", err)
	} else {
		again.Close()
	}
}

// A logical unit passes from one holder to another without a moment at which a
// third one gets it: the lock, and the block node.
func TestLabHandedOver(t *testing.T) {
	b := lab(t)
	run := t.TempDir()
	third := func(when string) {
		t.Helper()
		for _, dir := range []string{run, t.TempDir()} { // by the lock, by the block node
			if l, err := Open(b.A.SG, Options{VM: "third", RunDir: dir}); !errors.Is(err, ErrBusy) {
				t.Errorf("%s: a third Open = %v, %v; want ErrBusy", when, l, err)
				if err == nil {
					l.Close()
				}
			}
		}
	}
	old, err := Open(b.A.SG, Options{VM: "web1", RunDir: run})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { old.Close() }()
	for range 3 {
		handed := &Handed{old.Nexus().BootID, old.Nexus().Address.String(), old.Held()}
		if len(handed.Files) != MaxHeld {
			t.Fatalf("Held() = %d files; want %d", len(handed.Files), MaxHeld)
		}
		if other, err := Open(b.B.SG, Options{VM: "web1", RunDir: run, Handed: handed}); err != nil || other.Shared() {
			t.Errorf("Open of another nexus = %v, shared; want one of its own", err)
		} else {
			other.Close()
		}
		if l, err := Open(b.A.SG, Options{VM: "web1", RunDir: run, Handed: &Handed{handed.BootID, handed.Address, []*os.File{handed.Files[0], handed.Files[0]}}}); err == nil || !strings.Contains(err.Error(), "something else than "+b.A.Block) {
			t.Errorf("Open with a lock for the node = %v, %v", l, err)
		}
		next, err := Open(b.A.SG, Options{VM: "web1", RunDir: run, Handed: handed})
		if err != nil {
			t.Fatal(err)
		}
		if !next.Shared() || old.Shared() {
			t.Errorf("Shared() = %v at the new holder, %v at the old one", next.Shared(), old.Shared())
		}
		third("both hold it")
		if err := old.Close(); err != nil {
			t.Error(err)
		}
		old = next
		third("the old one has gone")
		if err := old.Possess("web2"); err != nil {
			t.Error(err)
		}
	}
	old.Close()
	if l, err := Open(b.A.SG, Options{VM: "third", RunDir: run}); err != nil {
		t.Errorf("Open of what all have closed = %v", err)
	} else {
		l.Close()
	}
}

func TestLabDisksInUseAreRefused(t *testing.T) {
	b := lab(t)
	labs.debug.Set("delay", "0")
	// One partition from block 64 on.
	mbr := make([]byte, 512)
	mbr[510], mbr[511] = 0x55, 0xaa
	mbr[446+4] = 0x83
	binary.LittleEndian.PutUint32(mbr[446+8:], 64)
	binary.LittleEndian.PutUint32(mbr[446+12:], 8192)
	if err := os.WriteFile(b.Debug.Block, mbr, 0); err != nil {
		t.Fatal(err)
	}
	reread := func() {
		if out, err := exec.Command("blockdev", "--rereadpt", b.Debug.Block).CombinedOutput(); err != nil {
			t.Fatalf("blockdev: %v %s", err, out)
		}
	}
	reread()
	defer func() {
		os.WriteFile(b.Debug.Block, make([]byte, 512), 0)
		reread()
	}()
	part := b.Debug.Block + "1"
	o := Options{VM: "x", RunDir: t.TempDir()}
	if _, err := Open(part, o); err == nil || !strings.Contains(err.Error(), "it is a partition: give the whole disk, "+b.Debug.Block) {
		t.Errorf("Open of a partition = %v", err)
	}
	l, err := Open(b.Debug.SG, o)
	if err != nil {
		t.Fatalf("Open of a disk with an unused partition = %v", err)
	}
	l.Close()
	if out, err := exec.Command("mke2fs", part).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v %s", err, out)
	}
	on := t.TempDir()
	if err := unix.Mount(part, on, "ext2", 0, ""); err != nil {
		// The lab's kernel may have no ext2; anything that holds the disk will do.
		t.Fatalf("mount: %v", err)
	}
	_, err = Open(b.Debug.SG, o)
	if want := fmt.Sprintf("LUN %s: in use: %s is mounted on %s", b.Debug.SG, part, on); !errors.Is(err, ErrBusy) || err.Error() != want {
		t.Errorf("Open of a mounted disk = %v; want %q", err, want)
	}
	if err := unix.Unmount(on, 0); err != nil {
		t.Fatal(err)
	}
}

// TestLabWithoutDiskDriver takes the block node away: there is only the sg
// node then, for root, too.
func TestLabWithoutDiskDriver(t *testing.T) {
	b := lab(t)
	bind := func(how string) {
		if err := os.WriteFile("/sys/bus/scsi/drivers/sd/"+how, []byte(b.B.HCTL), 0); err != nil {
			t.Fatal(err)
		}
	}
	bind("unbind")
	defer func() {
		bind("bind")
		var err error
		if labs.b.B, err = lio.WaitDevice(context.Background(), b.B.HCTL); err != nil {
			t.Fatal(err)
		}
	}()
	l, err := Open(b.B.SG, Options{VM: "x", RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l.via != b.B.SG {
		t.Errorf("commands go by %s; want %s", l.via, b.B.SG)
	}
	if n := l.Limits(); n.MaxTransfer == 0 || n.MaxTransfer > 1<<20 || n.MaxSegments != 256 {
		t.Errorf("limits %+v", n)
	}
	blocks := func() uint32 {
		c := in(64, scsi.OpInquiry, 1, 0xb0, 0, 64, 0)
		if exec1(t, l, c); c.Err() != nil {
			t.Fatal(c.Err())
		}
		return binary.BigEndian.Uint32(got(c)[8:])
	}
	if n := blocks(); n != l.Limits().MaxTransfer/4096 {
		t.Errorf("MAXIMUM TRANSFER LENGTH %d before the block size is known", n)
	}
	c := in(8, scsi.OpReadCapacity10, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	if exec1(t, l, c); c.Err() != nil {
		t.Fatal(c.Err())
	}
	if n := blocks(); n != l.Limits().MaxTransfer/512 {
		t.Errorf("MAXIMUM TRANSFER LENGTH %d after the guest has read the capacity", n)
	}
	c = in(int(l.Limits().MaxTransfer), read10(0, int(l.Limits().MaxTransfer/512))...)
	if exec1(t, l, c); c.Err() != nil || c.Residual != 0 {
		t.Errorf("largest read: %v, residual %d", c.Err(), c.Residual)
	}
}

// TestLabDeviceGone removes a device under an open LUN.
func TestLabDeviceGone(t *testing.T) {
	lab(t)
	for _, sd := range []bool{true, false} {
		n, err := labs.lun.AddNexus(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !sd {
			if err := os.WriteFile("/sys/bus/scsi/drivers/sd/unbind", []byte(n.HCTL), 0); err != nil {
				t.Fatal(err)
			}
		}
		l, err := Open(n.SG, Options{VM: "x", RunDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		if err := labs.lun.RemoveNexus(n); err != nil {
			t.Fatal(err)
		}
		c := in(512, read10(0, 1)...)
		exec1(t, l, c)
		if c.Outcome != scsi.BadTarget {
			t.Errorf("%s: outcome %v; want bad target", l, c.Outcome)
		}
		if err := l.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
}

// TestLabProbeSendsNothing: whether this process may send anything is asked
// without sending anything.
func TestLabProbeSendsNothing(t *testing.T) {
	bothWays(t, func() {}, func(t *testing.T, b bench) {
		fd, err := unix.Open(b.A.Block, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		s, err := newSlots(1)
		if err != nil {
			t.Fatal(err)
		}
		defer s.m.Close()
		before := requests(t, b.A)
		m := s.at(0)
		m.prepare()
		if got := mayPassAnything(fd, m); got != b.root {
			t.Errorf("mayPassAnything = %v as root %v", got, b.root)
		}
		if n := requests(t, b.A) - before; n != 0 {
			t.Errorf("%d commands were sent", n)
		}
		l := b.open(t, b.A.SG)
		if n := requests(t, b.A) - before; n < 4 || n > 5 {
			t.Errorf("Open of %s sent %d commands; want INQUIRY and three or four VPD pages", l, n)
		}
	})
}

func TestLabPermission(t *testing.T) {
	bothWays(t, func() {}, func(t *testing.T, b bench) {
		if b.root {
			return
		}
		// The parent has given us the nodes; take them from ourselves.
		for _, c := range []struct{ node, want string }{
			{b.A.SG, "open " + b.A.SG + ": permission denied: run as root, or as a member of group "},
			{b.A.Block, "open " + b.A.Block + ": permission denied: run as root, or as a member of group "},
		} {
			if err := os.Chmod(c.node, 0); err != nil {
				t.Fatal(err)
			}
			l, err := Open(b.A.SG, Options{VM: "x", RunDir: t.TempDir()})
			if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("without access to %s: %v, %v; want %q", c.node, l, err, c.want)
			}
			if err := os.Chmod(c.node, 0o660); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestLabExclusiveSgNode(t *testing.T) {
	bothWays(t, func() {}, func(t *testing.T, b bench) {
		fd, err := unix.Open(b.B.SG, unix.O_RDWR|unix.O_EXCL|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		l, err := Open(b.B.SG, Options{VM: "x", RunDir: t.TempDir()})
		if b.root {
			if err != nil { // goes by the block node
				t.Fatal(err)
			}
			l.Close()
		} else if want := "in use: another program has " + b.B.SG + " open exclusively"; !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), want) {
			t.Errorf("Open = %v, %v; want %q", l, err, want)
		}
	})
}

func BenchmarkLabRead(b *testing.B) {
	lab := lab(b)
	if lab.root {
		labs.debug.Set("delay", "0")
	}
	for _, d := range []lio.Device{lab.A, lab.Debug} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s/depth=%d", filepath.Base(filepath.Dir(d.Sys())), depth), func(b *testing.B) {
				l := lab.open(b, d.SG)
				exec1(b, l, in(0, 0, 0, 0, 0, 0, 0))
				m, err := sys.MapAnonymous(4096 * depth)
				if err != nil {
					b.Fatal(err)
				}
				// As the controller does it: a thread that sleeps on an eventfd.
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				ended, err := sys.NewEventFD()
				if err != nil {
					b.Fatal(err)
				}
				defer ended.Close()
				var mu sync.Mutex
				var free []*scsi.Command
				for buf := range slices.Chunk(m.Bytes(), 4096) {
					free = append(free, &scsi.Command{CDB: read10(0, 8), DataIn: [][]byte{buf}, Done: func(c *scsi.Command) {
						mu.Lock()
						free = append(free, c)
						mu.Unlock()
						ended.Signal()
					}})
				}
				take := func() *scsi.Command {
					for {
						mu.Lock()
						if n := len(free); n > 0 {
							c := free[n-1]
							free = free[:n-1]
							mu.Unlock()
							if c.Err() != nil {
								b.Fatal(c.Err())
							}
							return c
						}
						mu.Unlock()
						ended.Wait()
					}
				}
				b.ReportAllocs()
				for b.Loop() {
					l.Submit(take())
				}
				for range depth {
					take()
				}
				b.ReportMetric(float64(len(l.workers)), "workers")
			})
		}
		// The measure: one thread that calls the kernel itself.
		b.Run(filepath.Base(filepath.Dir(d.Sys()))+"/bare", func(b *testing.B) {
			fd, err := unix.Open(d.Block, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(fd)
			s, err := newSlots(1)
			if err != nil {
				b.Fatal(err)
			}
			defer s.m.Close()
			data, err := sys.MapAnonymous(4096)
			if err != nil {
				b.Fatal(err)
			}
			defer data.Close()
			m := s.at(0)
			m.prepare()
			m.hdr.cmdLen, m.hdr.timeout = uint8(copy(m.cdb[:], read10(0, 8))), 30000
			m.hdr.direction, m.hdr.dxferLen = dxferFromDev, 4096
			m.setOne(data.Bytes())
			for b.Loop() {
				if e := sgIO(fd, &m.hdr); e != 0 || m.hdr.status != 0 {
					b.Fatal(e, m.hdr.status)
				}
			}
		})
	}
}
