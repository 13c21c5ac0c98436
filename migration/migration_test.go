package migration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// Most tests wait: for deadlines, and for a journal to reach its disk.
func TestMain(m *testing.M) {
	for name, value := range map[string]string{"test.parallel": "8", "rapid.checks": "30"} {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	flag.Parse() // the command line has the last word
	os.Exit(m.Run())
}

// A guest that writes while it moves arrives with every page as it was when it
// stopped, holes as holes, over any number of connections.
func TestMigrate(t *testing.T) {
	for _, channels := range []int{1, 3} {
		r := newRig(t, 32<<20)
		r.opts.Channels, r.opts.Downtime = channels, time.Hour
		kernel := bytes.Repeat([]byte("kernel"), 100_000)
		r.src.files = []Attachment{attachment("kernel", kernel), attachment("initrd", nil)}
		for p := uint64(0); p < 6000; p++ { // the rest stays a hole
			if p%7 != 3 {
				r.src.write(p, p+1)
			} else {
				r.src.write(p, 0) // has memory, and is zero
			}
		}
		stop := make(chan struct{})
		wrote := make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					wrote <- n
					return
				default:
					if r.src.write(rand.Uint64N(3000), rand.Uint64N(2)*rand.Uint64()) {
						n++
					}
				}
			}
		}()
		arrived := r.receiving()
		sum, err := r.migrate()
		close(stop)
		n := <-wrote
		if err != nil {
			t.Fatalf("%d channels: %v", channels, err)
		}
		d := (<-arrived).Machine.(*fakeDest)
		var st unix.Stat_t // before reading fills the holes
		if err := unix.Fstat(int(d.ram.File().Fd()), &st); err != nil || st.Blocks > 6000*memory.PageSize/512 {
			t.Errorf("the destination's memory has %d blocks, %v; want no more than the guest's 6000 pages", st.Blocks, err)
		}
		same(t, d.ram, r.src.ram)
		if d.loaded.GetBoot().GetKernel().GetName() != "saved" || !bytes.Equal(d.files[0].Bytes(), kernel) || d.files[1].Len() != 0 {
			t.Errorf("the destination loaded %v and %d bytes of kernel", d.loaded, d.files[0].Len())
		}
		if !d.ran || r.src.g.runs.Load() != 1 || sum.Rounds != 2 || sum.Downtime.Total <= 0 || n == 0 {
			t.Errorf("%d channels: destination ran %v, %d writes during %+v", channels, d.ran, n, sum)
		}
	}
}

// The downtime ends with the guest's start, not with the news of it; and not
// before COMMIT, whatever the destination says.
func TestDowntimeEndsWithTheStart(t *testing.T) {
	total := func(since time.Duration) time.Duration {
		r := newRig(t, 1<<20)
		r.host.since = since
		r.receiving()
		s, err := r.migrate()
		if err != nil {
			t.Fatal(err)
		}
		if s.Downtime.Total < s.Downtime.Stop+s.Downtime.Save+s.Downtime.Pages {
			t.Errorf("downtime %+v of a guest that has been running for %v; want no less than until COMMIT", s.Downtime, since)
		}
		return s.Downtime.Total
	}
	total(0)
	total(time.Hour)
}

// What is rehearsed is what comes: each message goes through, whole.
func TestFillFillsEverything(t *testing.T) {
	bodies := (&vmmv1.StreamMessage{}).ProtoReflect().Descriptor().Oneofs().ByName("body").Fields()
	for i := range bodies.Len() {
		m := &vmmv1.StreamMessage{}
		fill(m.ProtoReflect().Mutable(bodies.Get(i)).Message())
		b, err := proto.Marshal(m)
		again := &vmmv1.StreamMessage{}
		if err == nil {
			err = proto.Unmarshal(b, again)
		}
		if err != nil || !proto.Equal(m, again) || kindOf(again) == 0 {
			t.Errorf("%s is %v when it has been sent, %v; want %v", bodies.Get(i).Name(), again, err, m)
		}
	}
	state := &vmmv1.FinalState{}
	fill(state.ProtoReflect())
	if len(state.GetMachine().GetVcpus()) != 1 || len(state.GetMachine().GetVirtio()) != 1 || len(state.GetMachine().GetVirtio()[0].GetQueues()) != 1 {
		t.Errorf("a state to rehearse with has nothing of its lists: %v", state)
	}
}

func attachment(name string, data []byte) Attachment {
	return Attachment{Name: name, Size: int64(len(data)), SHA256: sha256.Sum256(data), Data: bytes.NewReader(data)}
}

// What the destination's host has already does not come, and is not spoilt by a
// source that sends it all the same, as one that is older would.
func TestAttachmentThatIsThere(t *testing.T) {
	kernel, initrd := attachment("kernel", bytes.Repeat([]byte("kernel"), 100_000)), attachment("initrd", []byte("initrd"))
	for _, older := range []bool{false, true} {
		r := newRig(t, 1<<20)
		r.src.files, r.host.has = []Attachment{kernel, initrd}, map[int]bool{0: true}
		if !older {
			r.src.files[0].Data = strings.NewReader("") // not to be read
		}
		arrived := r.receiving()
		o := r.outgoing()
		if older {
			r.src.inFiles = func() {
				if o.welcome != nil {
					o.welcome.Have = nil
				}
			}
		}
		if _, err := o.Run(t.Context()); err != nil {
			t.Fatalf("an older source: %v: %v", older, err)
		}
		d := (<-arrived).Machine.(*fakeDest)
		if d.files[0].Len() != 0 || d.files[1].String() != "initrd" {
			t.Errorf("an older source: %v: %d bytes of the kernel that is there, and %q of the initrd", older, d.files[0].Len(), &d.files[1])
		}
	}
}

// slowReader is a file on a slow disk, or behind a slow link.
type slowReader struct {
	io.ReaderAt
	takes time.Duration
}

func (r slowReader) ReadAt(b []byte, at int64) (int, error) {
	time.Sleep(r.takes)
	return r.ReaderAt.ReadAt(b, at)
}

// A kernel and an initrd may take longer than a link may be silent: as long as
// they come, the link is not.
func TestSlowAttachment(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<20)
	idle := 1500 * time.Millisecond
	r.recv.Deadlines.Idle = idle
	a := attachment("initrd", bytes.Repeat([]byte("initrd"), 200_000)) // five messages
	a.Data = slowReader{a.Data, idle / 3}
	r.src.files = []Attachment{a}
	arrived := r.receiving()
	if _, err := r.migrate(); err != nil {
		t.Fatalf("with an attachment that takes %v, where %v of silence are allowed: %v", 5*idle/3, idle, err)
	}
	if d := (<-arrived).Machine.(*fakeDest); int64(d.files[0].Len()) != a.Size {
		t.Errorf("%d bytes of the attachment arrived; want %d", d.files[0].Len(), a.Size)
	}
}

// A page that becomes zero clears what came earlier, and a round is never
// overtaken by an older one.
func TestRoundsReplaceEachOther(t *testing.T) {
	r := newRig(t, 4<<20)
	r.opts.Channels, r.opts.Downtime = 4, time.Nanosecond
	for p := range uint64(1024) {
		r.src.write(p, 1)
	}
	round := uint64(1)
	r.proxy(&proxy{cutAt: -1, onSend: func(k kind) {
		// While the source is being told of a round's end the guest writes
		// the next one's pages; the last round is empty.
		if k != kindRoundDone || round == 40 {
			return
		}
		round++
		for p := range uint64(1024) {
			r.src.write(p, round*(p+round)%3)
		}
	}})
	arrived := r.receiving()
	sum, err := r.migrate()
	if err != nil {
		t.Fatal(err)
	}
	same(t, (<-arrived).Machine.(*fakeDest).ram, r.src.ram)
	if sum.Rounds < 5 {
		t.Errorf("%d rounds; want many", sum.Rounds)
	}
}

// Everything that can be refused is refused with the guest running, as a
// sentence that names the thing.
func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		with func(*rig)
		want string
	}{
		{"the host", func(r *rig) { r.host.refuse = errors.New("the processor here lacks avx2") }, "avx2"},
		{"memory", func(r *rig) { r.host.size = 2 << 20 }, "memory map"},
		{"a LUN is missing", func(r *rig) { r.host.luns = nil }, "has 1 LUNs, and 0 of them are here"},
		{"another LUN", func(r *rig) { r.host.luns[0].Identity = "naa.5" }, "naa.5 here"},
		{"a copy of the image", func(r *rig) {
			r.src.luns[0].Nonce, r.host.luns[0].Met = []byte{1}, func(n []byte) bool { return n[0] == 2 }
		}, "a copy of it"},
		{"a device for an image", func(r *rig) { r.src.luns[0].Nonce = []byte{1} }, "a copy of it"},
		{"no reservations there", func(r *rig) { r.host.luns[0].Preflight = nil }, "the other does not"},
		{"one nexus for two hosts", func(r *rig) { r.host.luns[0].Nexus = nexS }, "cannot be told apart"},
		{"SPC-2", func(r *rig) { r.src.luns[0].Tracked = func() pr.Tracked { return pr.Tracked{SPC2: true} } }, "RESERVE of SPC-2"},
		{"no journal", func(r *rig) { r.opts.Journal = nil }, "journal"},
		{"leftover", func(r *rig) {
			d := r.host.luns[0].Port.Sender.(*site).d
			d.do(nexD, pr.Out{ServiceKey: 0xdd})
			f, err := r.host.luns[0].Port.Probe(context.Background())
			if err != nil {
				r.Fatal(err)
			}
			r.host.luns[0].Preflight = &f
		}, "registered already"},
		{"nobody listens", func(r *rig) { r.dial = Address{"unix", "/nonexistent/socket"} }, "/nonexistent/socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDisk(pr.Quirks{})
			d.do(nexS, pr.Out{ServiceKey: keyGuest})
			r := newRig(t, 1<<20, d)
			tt.with(r)
			r.receiving()
			_, err := r.migrate()
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Run = %v; want a refusal that says %q", err, tt.want)
			}
			if r.src.pauses != 0 || r.src.g.runs.Load() != 1 {
				t.Errorf("the guest was stopped %d times, runs %d times", r.src.pauses, r.src.g.runs.Load())
			}
			if d := r.host.dest(); d != nil {
				within(t, "closing the refused machine", func() { <-d.closed })
			}
		})
	}
}

// A failure at any step before COMMIT leaves the guest running where it was,
// with its reservation, and nothing of it at the destination.
func TestKept(t *testing.T) {
	for _, tt := range []struct {
		name string
		with func(*rig, *Outgoing)
		want string
	}{
		{"a command does not come back", func(r *rig, _ *Outgoing) { r.src.stuck = true }, "still in flight"},
		{"save", func(r *rig, _ *Outgoing) { r.src.failing = errors.New("KVM_GET_MSRS: 0x1b") }, "0x1b"},
		{"load", func(r *rig, _ *Outgoing) { r.host.loadErr = errors.New("unknown device") }, "unknown device"},
		{"a kernel that has changed", func(r *rig, _ *Outgoing) {
			a := attachment("vmlinuz", []byte("as it was"))
			a.Data = strings.NewReader("as it is ")
			r.src.files = []Attachment{a}
		}, "vmlinuz has digest"},
		{"a kernel that has shrunk", func(r *rig, _ *Outgoing) {
			a := attachment("vmlinuz", []byte("as it was"))
			a.Data = strings.NewReader("as")
			r.src.files = []Attachment{a}
		}, "read vmlinuz"},
		{"canceled while it is stopped", func(r *rig, o *Outgoing) { r.src.inPause = o.Cancel }, "canceled"},
		{"canceled while it is loaded", func(r *rig, o *Outgoing) { r.host.inLoad = o.Cancel }, "canceled"},
		{"canceled at once", func(r *rig, o *Outgoing) { o.Cancel() }, ""},
		{"the destination's path is dead", func(r *rig, _ *Outgoing) { r.src.inPause = func() { r.kill(nexD) } }, "did not answer PERSISTENT RESERVE"},
		{"the source's path is dead", func(r *rig, _ *Outgoing) { r.src.inPause = func() { r.kill(nexS) } }, "the disk does not say"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDisk(pr.Quirks{})
			d.do(nexS, pr.Out{ServiceKey: keyGuest})
			d.do(nexS, pr.Out{Action: pr.Reserve, Key: keyGuest, Type: pr.WriteExclusiveRegistrantsOnly})
			r := newRig(t, 1<<20, d)
			r.opts.Deadlines.Drain = 50 * time.Millisecond
			r.receiving()
			o := r.outgoing()
			tt.with(r, o)
			_, err := o.Run(context.Background())
			if !errors.Is(err, ErrKept) && !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Run = %v; want %q", err, tt.want)
			}
			if r.src.g.runs.Load() != 1 || r.src.paused {
				t.Errorf("the guest runs %d times, source paused: %v", r.src.g.runs.Load(), r.src.paused)
			}
			if n, typ := d.holder(); n != nexS || typ != pr.WriteExclusiveRegistrantsOnly || d.key(nexS) != keyGuest || d.key(nexD) != 0 {
				t.Errorf("holder %v type %v, source %v, destination %v", n, typ, d.key(nexS), d.key(nexD))
			}
		})
	}
}

// What a disk image has in the page cache is brought to it while the guest runs,
// and what the guest writes meanwhile counts before it is stopped.
func TestSettle(t *testing.T) {
	r := newRig(t, 1<<20)
	r.src.inSettle = func(context.Context) error {
		if r.src.paused {
			t.Error("the guest stands while its images are written back")
		}
		for p := range uint64(200) {
			r.src.write(p, p+7)
		}
		return nil
	}
	arrived := r.receiving()
	s, err := r.migrate()
	if err != nil {
		t.Fatal(err)
	}
	<-arrived
	if r.src.settles != 1 || s.Rounds < 2 {
		t.Errorf("the images were written back %d times, %d rounds; want once, and what was written meanwhile to be sent", r.src.settles, s.Rounds)
	}

	r = newRig(t, 1<<20)
	r.opts.Local = true
	arrived = r.receiving()
	if _, err := r.migrate(); err != nil || r.src.settles != 0 {
		t.Errorf("within one host: %v; the images were written back %d times, and the cache is the same", err, r.src.settles)
	}
	<-arrived

	for _, tt := range []struct {
		name string
		with func(*rig, *Outgoing)
		want string
	}{
		{"a write-back that fails", func(r *rig, _ *Outgoing) {
			r.src.inSettle = func(context.Context) error { return errors.New("LUN data: no space left") }
		}, "no space left"},
		{"canceled", func(r *rig, o *Outgoing) {
			r.src.inSettle = func(ctx context.Context) error { o.Cancel(); <-ctx.Done(); return ctx.Err() }
		}, "canceled"},
		{"too slow", func(r *rig, o *Outgoing) {
			o.opts.Timeout = 200 * time.Millisecond
			r.src.inSettle = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		}, "written back within 200ms"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 1<<20)
			r.receiving()
			o := r.outgoing()
			tt.with(r, o)
			_, err := o.Run(context.Background())
			if !errors.Is(err, ErrKept) || !strings.Contains(err.Error(), tt.want) || r.src.pauses != 0 {
				t.Errorf("Run = %v; the guest stood still %d times; want %q, and it never to have", err, r.src.pauses, tt.want)
			}
		})
	}
}

func (r *rig) kill(n pr.Nexus) {
	d := r.src.luns[0].Port.Sender.(*site).d
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead[n] = true
}

// A guest that writes faster than the link either is slowed down until it
// converges, or runs on when the time is up.
func TestConvergence(t *testing.T) {
	const mib, never = 1 << 20, time.Duration(math.MaxInt64)
	type step struct {
		sent, dirtied uint64
		took, left    time.Duration
		stop          bool
		throttle      int
	}
	for name, steps := range map[string][]step{
		"throttled": {
			{1000 * mib, 800 * mib, time.Second, never, false, 0},
			{800 * mib, 700 * mib, time.Second, never, false, 20},
			{700 * mib, 600 * mib, time.Second, never, false, 40},
			{600 * mib, 200 * mib, time.Second, never, false, 40}, // it works
			{200 * mib, 180 * mib, time.Second, never, false, 40},
			{180 * mib, 170 * mib, time.Second, never, false, 60},
			{170 * mib, 160 * mib, time.Second, never, false, 80},
			{160 * mib, 150 * mib, time.Second, never, false, 99},
			{150 * mib, 140 * mib, time.Second, never, false, 99},
			{140 * mib, 13 * mib, time.Second, never, false, 99}, // 93 of 100 ms
			{13 * mib, 7 * mib, 93 * time.Millisecond, never, true, 99},
		},
		"less than an eighth": {{1000 * mib, 12 * mib, time.Second, never, true, 0}},
		"more than an eighth": {{1000 * mib, 13 * mib, time.Second, never, false, 0}, {13 * mib, mib, 13 * time.Millisecond, never, true, 0}},
		"a round that gains little": {
			{150 * mib, 76 * mib, time.Second, never, false, 0},
			{76 * mib, 39 * mib, 500 * time.Millisecond, never, false, 20},
			{39 * mib, 14 * mib, 250 * time.Millisecond, never, false, 20},
			{14 * mib, 8 * mib, 90 * time.Millisecond, never, true, 20},
		},
		"no more than three": {
			{1000 * mib, 90 * mib, time.Second, never, false, 0},
			{90 * mib, 45 * mib, 90 * time.Millisecond, never, false, 0},
			{45 * mib, 22 * mib, 45 * time.Millisecond, never, false, 0},
			{44 * mib, 22 * mib, 44 * time.Millisecond, never, true, 0},
		},
		"no time for one": {{1000 * mib, 90 * mib, time.Second, 200 * time.Millisecond, true, 0}},
		"time for one":    {{1000 * mib, 90 * mib, time.Second, 300 * time.Millisecond, false, 0}},
	} {
		c := convergence{limit: 100 * time.Millisecond}
		for i, x := range steps {
			stop, throttle := c.after(x.sent, x.dirtied, x.took, x.left)
			if stop != x.stop || throttle != x.throttle {
				t.Errorf("%s, round %d: after = %v, %d; want %v, %d", name, i+1, stop, throttle, x.stop, x.throttle)
			}
		}
	}
	// A short round does not change what is known of the bandwidth.
	c := convergence{limit: 100 * time.Millisecond, bandwidth: 140 * mib}
	if c.after(4096, 0, time.Second, never); c.bandwidth != 140*mib {
		t.Errorf("bandwidth %v; want %v", c.bandwidth, 140*mib)
	}
}

func TestTimeout(t *testing.T) {
	r := newRig(t, 8<<20)
	r.opts.Downtime, r.opts.Timeout = time.Nanosecond, time.Second
	v := uint64(0)
	r.src.busy = func() {
		for v++; r.src.write(v%2048, v) && v%1500 != 0; v++ {
		}
	}
	r.receiving()
	_, err := r.migrate()
	if !errors.Is(err, ErrKept) || !strings.Contains(err.Error(), "faster than it can be sent") {
		t.Errorf("Run = %v", err)
	}
	r.src.mu.Lock()
	defer r.src.mu.Unlock()
	if n := len(r.src.throttles); n == 0 || r.src.throttles[n-1] != 0 || r.src.pauses != 0 {
		t.Errorf("throttled to %v, stopped %d times; want throttling that ends with 0", r.src.throttles, r.src.pauses)
	}
}

func TestMaxBandwidth(t *testing.T) {
	var l limiter
	now := time.Unix(100, 0)
	if d := l.take(1<<30, now); d != 0 {
		t.Errorf("without a limit: wait %v", d)
	}
	l.set(1 << 20)
	for i, want := range []time.Duration{time.Second, 2 * time.Second} {
		if d := l.take(1<<20, now); d != want {
			t.Errorf("MiB %d at 1 MiB/s: wait %v; want %v", i+1, d, want)
		}
	}
	if d := l.take(1<<19, now.Add(time.Minute)); d != time.Second/2 {
		t.Errorf("after a pause: wait %v; want no more than its own time", d)
	}
	// A canceled migration does not wait for the line.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.wait(ctx, 1<<40); !errors.Is(err, context.Canceled) {
		t.Errorf("wait = %v", err)
	}
}

// A report in the middle of a round says how far the round is, and what the
// link carries; between rounds it says what the last one measured.
func TestProgressOfARound(t *testing.T) {
	var got Progress
	o := &Outgoing{pages: new(pump), opts: Options{Progress: func(p Progress) { got = p }}}
	o.progress = Progress{Round: 2, Remaining: 100 * memory.PageSize, Bandwidth: 7}
	o.pages.walked.Store(500 * memory.PageSize)
	o.begun.walked = 460 * memory.PageSize
	o.pages.sent.Store(3_000_000)
	o.begun.sent = 1_000_000
	o.report()
	if got.Round != 2 || got.Remaining != 100*memory.PageSize || got.Bandwidth != 7 || got.Sent != 3_000_000 {
		t.Errorf("between rounds: %+v", got)
	}
	o.begun.at = time.Now().Add(-2 * time.Second)
	o.report()
	if got.Round != 2 || got.Remaining != 60*memory.PageSize || got.Bandwidth == 0 || got.Bandwidth > 1_000_000 || got.Sent != 3_000_000 {
		t.Errorf("in a round of which 40 of 100 pages are sent, after 2 s and 2 MB: %+v", got)
	}
	o.pages.walked.Store(1000 * memory.PageSize) // some of it twice
	if o.report(); got.Remaining != 0 {
		t.Errorf("%d bytes remain; want 0", got.Remaining)
	}
}
