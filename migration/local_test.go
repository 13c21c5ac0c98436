package migration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// inode tells files apart, and says how much memory is behind one.
func inode(t testing.TB, f *os.File) (ino uint64, blocks int64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino, st.Blocks
}

// The destination has the memory itself, reservations move as ever, and until
// COMMIT nobody has written a byte.
func TestLocal(t *testing.T) {
	d := reserved(pr.WriteExclusiveRegistrantsOnly)
	r := newRig(t, 32<<20, d)
	r.opts.Local = true
	kernel := bytes.Repeat([]byte("kernel"), 100_000)
	r.src.files = []Attachment{attachment("kernel", kernel)}
	for p := uint64(0); p < 4000; p += 3 {
		r.src.write(p, p+1)
	}
	var before [sha256.Size]byte
	ino, blocks := inode(t, r.src.ram.File())
	sum := func() [sha256.Size]byte { // of what has memory: looking at holes would fill them
		h := sha256.New()
		err := r.src.ram.Extents(0, r.src.ram.Size(), func(gpa memory.GPA, n uint64) error {
			view, err := r.src.ram.Slice(gpa, n)
			h.Write(view)
			return err
		})
		if err != nil {
			t.Error(err)
		}
		return [sha256.Size]byte(h.Sum(nil))
	}
	r.src.inPause = func() { before = sum() }
	arrived := r.receiving()
	s, err := r.migrate()
	if err != nil {
		t.Fatal(err)
	}
	a := <-arrived
	dst := a.Machine.(*fakeDest)
	got, _ := inode(t, dst.ram.File())
	if got != ino || s.Sent != 0 || s.Rounds != 0 || !dst.ran || dst.loaded.GetBoot().GetKernel().GetName() != "saved" || !bytes.Equal(dst.files[0].Bytes(), kernel) {
		t.Errorf("inode %d; want %d; %+v", got, ino, s)
	}
	if after := sum(); after != before || blocks == 0 {
		t.Error("the memory has changed on its way")
	}
	if n, _ := d.holder(); n != nexD || d.key(nexS) != 0 {
		t.Errorf("%v holds; the source's key is %v", n, d.key(nexS))
	}
}

// The source's own files are shown to a destination on the same host, whatever
// else goes along, and to nobody else.
func TestFilesBesideTheOffer(t *testing.T) {
	for _, tt := range []struct {
		name  string
		with  func(*rig)
		shown bool
	}{
		{"unix", func(*rig) {}, true},
		{"local", func(r *rig) { r.opts.Local = true }, true},
		{"tcp", func(r *rig) {
			var err error
			if r.ln, err = Listen(Address{"tcp", "127.0.0.1:0"}, Security{}, nil); err != nil {
				t.Fatal(err)
			}
			r.dial = Address{"tcp", r.ln.Addr().String()}
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file, err := os.CreateTemp(t.TempDir(), "initrd")
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			content := []byte("what a reset loads")
			if _, err := file.Write(content); err != nil {
				t.Fatal(err)
			}
			r := newRig(t, 1<<20, reserved(pr.WriteExclusive))
			tt.with(r)
			r.src.files = []Attachment{attachment("kernel", content), attachment("initrd", content)}
			r.src.files[1].Data = file
			r.host.offered = func(o Offer) {
				if o.Attachments[0].Data != nil {
					t.Errorf("the kernel, which is in no file, was shown as %v", o.Attachments[0].Data)
				}
				their, ok := o.Attachments[1].Data.(*os.File)
				if ok != tt.shown {
					t.Fatalf("the initrd was shown: %v; want %v", ok, tt.shown)
				}
				if !ok {
					return
				}
				want, _ := inode(t, file)
				if got, _ := inode(t, their); got != want {
					t.Errorf("inode %d was shown for the initrd; want %d", got, want)
				}
			}
			arrived := r.receiving()
			if _, err := r.migrate(); err != nil {
				t.Fatal(err)
			}
			dst := (<-arrived).Machine.(*fakeDest)
			if !bytes.Equal(dst.files[1].Bytes(), content) {
				t.Errorf("the initrd arrived as %q; want %q: this destination has said that it has none", dst.files[1].Bytes(), content)
			}
		})
	}
}

// What fails before COMMIT leaves the source with its memory, whatever the
// destination had mapped; what is refused is refused as ever.
func TestLocalKept(t *testing.T) {
	for _, tt := range []struct {
		name string
		with func(*rig, *Outgoing)
		want string
	}{
		{"refused", func(r *rig, _ *Outgoing) { r.host.refuse = errors.New("the processor here lacks avx2") }, "avx2"},
		{"another size", func(r *rig, _ *Outgoing) { r.host.size = 2 << 20 }, "and the guest"},
		{"load", func(r *rig, _ *Outgoing) { r.host.loadErr = errors.New("unknown device") }, "unknown device"},
		{"canceled while it is loaded", func(r *rig, o *Outgoing) { r.host.inLoad = o.Cancel }, "canceled"},
		{"save", func(r *rig, _ *Outgoing) { r.src.failing = errors.New("KVM_GET_MSRS: 0x1b") }, "0x1b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 1<<20, reserved(pr.WriteExclusive))
			r.opts.Local = true
			r.src.write(7, 42)
			r.receiving()
			o := r.outgoing()
			tt.with(r, o)
			_, err := o.Run(context.Background())
			if !errors.Is(err, ErrKept) && !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Run = %v; want %q", err, tt.want)
			}
			if d := r.host.dest(); d != nil {
				within(t, "closing the destination", func() { <-d.closed })
			}
			view, err := r.src.ram.Slice(7*memory.PageSize, 8)
			if err != nil || binary.LittleEndian.Uint64(view) != 42 || r.src.g.runs.Load() != 1 {
				t.Errorf("the guest's page is % x, %v; it runs %d times", view, err, r.src.g.runs.Load())
			}
			if _, blocks := inode(t, r.src.ram.File()); blocks != memory.PageSize/512 {
				t.Errorf("the memory has %d blocks; want one page", blocks)
			}
		})
	}
}

// oneNexus makes the destination's LUNs those of the source's own nexus, and
// gives each a file that keeps others off. gone says, once the caller has
// closed the files, whether nobody has them any more.
func (r *rig) oneNexus(disks ...*disk) (held []*os.File, gone func() bool) {
	r.Helper()
	var ends []*os.File
	pipe := func() *os.File {
		end, w, err := os.Pipe()
		if err != nil {
			r.Fatal(err)
		}
		r.Cleanup(func() { end.Close(); w.Close() })
		ends, held = append(ends, end), append(held, w)
		return w
	}
	r.host.luns = nil
	for i, d := range disks {
		id := fmt.Sprint(i)
		l := d.lun(r, id, nexS)
		l.Tracked, l.Nexus = nil, pr.Nexus{} // the source says which it is
		r.host.luns = append(r.host.luns, l)
		r.src.luns[i].Held = []*os.File{pipe(), pipe()}
		for _, l := range []*LUN{l, r.src.luns[i]} {
			l.Port.Sender.(*site).sent()
		}
	}
	r.opts.Local, r.opts.Name = true, pipe()
	return held, func() bool {
		for _, w := range held {
			w.Close()
		}
		for _, end := range ends {
			// A pipe ends when the last copy of its other end is closed.
			if err := end.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
				r.Fatal(err)
			}
			if _, err := end.Read(make([]byte, 1)); err != io.EOF {
				return false
			}
		}
		return true
	}
}

// A guest stays on its nexus: what keeps others off goes with it, nothing is
// sent there by the destination before the guest is its own, nothing at all
// that changes the reservation, and every unit attention reaches the guest.
func TestLocalOnOneNexus(t *testing.T) {
	capacity, reset := scsi.Sense{Key: scsi.UnitAttention, ASC: 0x2a, ASCQ: 0x09}, scsi.Sense{Key: scsi.UnitAttention, ASC: 0x29}
	mode := scsi.Sense{Key: scsi.UnitAttention, ASC: 0x2a, ASCQ: 0x01}
	for _, kept := range []bool{false, true} {
		a, b := reserved(pr.WriteExclusiveRegistrantsOnly), newDisk(pr.Quirks{})
		r := newRig(t, 1<<20, a, b)
		held, gone := r.oneNexus(a, b)
		source, destination := r.src.luns[0].Port.Sender.(*site), r.host.luns[0].Port.Sender.(*site)
		var told []scsi.Sense
		settled := func(_ pr.Outcome, list []scsi.Sense) { told = append(told, list...) }
		r.host.luns[0].Settled = settled
		r.src.luns[0].Settled = settled
		r.src.luns[0].Pending = func() []scsi.Sense { return []scsi.Sense{mode} }
		generation := func() uint32 {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.target.Status().Generation
		}
		before := generation()
		r.host.offered = func(o Offer) {
			got := []*os.File{o.LUNs[0].Held[0], o.LUNs[0].Held[1], o.LUNs[1].Held[0], o.LUNs[1].Held[1], o.Name}
			for i, f := range got {
				x, err := f.Stat()
				y, err2 := held[i].Stat()
				if err != nil || err2 != nil || !os.SameFile(x, y) {
					t.Errorf("file %d of the offer is another one: %v, %v", i, err, err2)
				}
			}
			if l := o.LUNs[0]; l.BootID != r.src.luns[0].BootID || l.Address != r.src.luns[0].Address || l.Nexus != nexS || l.Preflight == nil || !l.Preflight.FullStatus {
				t.Errorf("the offer has LUN %+v", l)
			}
		}
		r.src.inPause = func() { source.raise(reset) }
		o := r.outgoing()
		if kept {
			r.host.inLoad = o.Cancel
		} else {
			r.host.inLoad = func() { destination.raise(capacity) }
		}
		arrived := r.receiving()
		s, err := o.Run(context.Background())
		if kept {
			if !errors.Is(err, ErrKept) || len(destination.sent()) > 0 {
				t.Errorf("Run = %v; the destination has sent %x; want nothing", err, destination.sent())
			}
			if want := []scsi.Sense{reset}; !slices.Equal(told, want) { // what is pending still is
				t.Errorf("the guest is told %v; want %v", told, want)
			}
		} else {
			if err != nil {
				t.Fatal(err)
			}
			<-arrived
			if !strings.Contains(s.LUNs[0].Sentence, "keeps its key") {
				t.Errorf("outcomes %v", s.LUNs)
			}
			if want := []scsi.Sense{mode, reset, capacity}; !slices.Equal(told, want) {
				t.Errorf("the guest is told %v; want %v", told, want)
			}
		}
		for _, side := range []*site{source, destination} {
			if sent := side.sent(); slices.Contains(sent, scsi.OpPersistentReserveOut) || slices.Contains(sent, scsi.OpTestUnitReady) {
				t.Errorf("%x was sent; want PERSISTENT RESERVE IN alone", sent)
			}
		}
		if n, typ := a.holder(); n != nexS || typ != pr.WriteExclusiveRegistrantsOnly || a.key(nexS) != keyGuest || generation() != before {
			t.Errorf("%v holds, type %v; PRgeneration went from %d to %d", n, typ, before, generation())
		}
		if !gone() {
			t.Error("the destination still has what its host did not keep")
		}
	}
}

// However a local migration ends, what its host has not kept is closed.
func TestHandedFilesAreClosed(t *testing.T) {
	for _, tt := range []struct {
		name string
		with func(*rig)
	}{
		{"refused by the host", func(r *rig) { r.host.refuse = errors.New("no") }},
		{"another memory map", func(r *rig) { r.host.size = 2 << 20 }},
		{"a LUN is missing", func(r *rig) { r.host.luns = nil }},
		{"loaded in vain", func(r *rig) { r.host.loadErr = errors.New("no") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := reserved(pr.WriteExclusive)
			r := newRig(t, 1<<20, d)
			_, gone := r.oneNexus(d)
			tt.with(r)
			r.receiving()
			if s, err := r.migrate(); err == nil {
				t.Errorf("Run = %+v; want an error", s)
			}
			if !gone() {
				t.Error("the destination still has a file")
			}
		})
	}
	t.Run("too many LUNs", func(t *testing.T) {
		r := newRig(t, 1<<20)
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for i := range 127 {
			r.src.luns = append(r.src.luns, &LUN{ID: fmt.Sprint(i), Held: []*os.File{f, f}})
		}
		r.opts.Local = true
		r.receiving()
		if _, err := r.migrate(); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "255 files would go to the other process") {
			t.Errorf("Run = %v; want a refusal that counts the files", err)
		}
		r.src.luns = r.src.luns[:126]
		if _, err := r.migrate(); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "has 126 LUNs, and 0 of them are here") {
			t.Errorf("Run with all that fit = %v; want the destination's refusal", err)
		}
	})
	t.Run("closed meanwhile", func(t *testing.T) {
		d := reserved(pr.WriteExclusive)
		r := newRig(t, 1<<20, d)
		held, _ := r.oneNexus(d)
		held[1].Close()
		r.receiving()
		if _, err := r.migrate(); !errors.Is(err, ErrKept) || !strings.Contains(err.Error(), "use of closed file") || r.src.g.runs.Load() != 1 {
			t.Errorf("Run = %v; want the guest to run on", err)
		}
	})
}

// A guest whose memory is shared is not taken back by force.
func TestLocalForce(t *testing.T) {
	r := newRig(t, 1<<20)
	r.opts.Local = true
	r.opts.Deadlines = shortly
	r.host.runErr = errors.New("KVM_RUN: no") // after COMMIT
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	handed := make(chan struct{}, 100)
	r.opts.Progress = func(p Progress) {
		if p.HandedOver != "" {
			select {
			case handed <- struct{}{}:
			default:
			}
		}
	}
	r.receiving()
	o := r.outgoing()
	done := make(chan error, 1)
	go func() {
		_, err := o.Run(ctx)
		done <- err
	}()
	within(t, "the hand-over", func() { <-handed })
	if err := o.Force(); !errors.Is(err, errShared) {
		t.Errorf("Force = %v; want %v", err, errShared)
	}
	cancel()
	if err := <-done; !errors.Is(err, ErrHandedOver) || !strings.Contains(err.Error(), "cannot be taken back") || r.src.g.runs.Load() != 0 {
		t.Errorf("Run = %v; the guest runs %d times", err, r.src.g.runs.Load())
	}
}

// A source that hands over what is no memory of the size that it says, or not
// sealed, or nothing, is refused.
func TestHostileMemory(t *testing.T) {
	memfd := func(size int64, seals int) *os.File {
		f, err := sys.MemFD("test", size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	plain, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if err := plain.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	const sealed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	held := func(n ...uint32) func(*vmmv1.Hello) {
		return func(h *vmmv1.Hello) {
			for _, n := range n {
				h.Luns = append(h.Luns, &vmmv1.HostLun{Held: n})
			}
		}
	}
	for _, tt := range []struct {
		name  string
		files []*os.File
		want  string
		hello func(*vmmv1.Hello)
	}{
		{"nothing", nil, "1 files came beside the offer, where 2 are due", nil},
		{"two files", []*os.File{memfd(1<<20, sealed), memfd(1<<20, sealed)}, "3 files came beside the offer, where 2 are due", nil},
		{"a LUN's file is missing", []*os.File{memfd(1<<20, sealed)}, "2 files came beside the offer, where 4 are due", held(2)},
		{"the name's lock is missing", []*os.File{memfd(1<<20, sealed)}, "2 files came beside the offer, where 3 are due", func(h *vmmv1.Hello) { h.Name = true }},
		{"the kernel is missing", []*os.File{memfd(1<<20, sealed)}, "2 files came beside the offer, where 3 are due", func(h *vmmv1.Hello) {
			h.Attachments = []*vmmv1.Attachment{{Name: "kernel", Sha256: make([]byte, sha256.Size), Beside: true}}
		}},
		{"more than there can be", []*os.File{memfd(1<<20, sealed)}, "where 17179869182 are due", held(math.MaxUint32, math.MaxUint32, math.MaxUint32, math.MaxUint32)},
		{"the memory behind a LUN's file", []*os.File{plain, memfd(1<<20, sealed)}, "seals", held(1)},
		{"a file that can shrink", []*os.File{memfd(1<<20, unix.F_SEAL_GROW)}, "not sealed", nil},
		{"too short", []*os.File{memfd(4096, sealed)}, "it has 4096 bytes", nil},
		{"too long", []*os.File{memfd(2<<20, sealed)}, "it has 2097152 bytes", nil},
		{"not to be written", []*os.File{memfd(1<<20, sealed|unix.F_SEAL_WRITE)}, "not permitted", nil},
		{"no memfd", []*os.File{plain}, "seals", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 1<<20)
			r.receiving()
			o := r.outgoing()
			conn, err := o.open(t.Context(), preamble{role: roleControl})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			hello := offerOf(r.src, 0)
			hello.Features = []string{featureLocal}
			if tt.hello != nil {
				tt.hello(hello)
			}
			hello.Luns = append(hello.Luns, &vmmv1.HostLun{Held: 1})
			b, err := appendMessage(nil, &vmmv1.StreamMessage{Id: o.id[:], Body: &vmmv1.StreamMessage_Hello{Hello: hello}})
			if err != nil {
				t.Fatal(err)
			}
			end, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer end.Close()
			var fds []int
			for _, f := range append(tt.files, w) { // that of one more LUN
				fds = append(fds, int(f.Fd()))
			}
			oob := unix.UnixRights(fds...)
			if _, _, err := conn.(*net.UnixConn).WriteMsgUnix(b, oob, nil); err != nil {
				t.Fatal(err)
			}
			m, err := readMessage(conn, maxMessage)
			if err != nil {
				t.Fatal(err)
			}
			if why := m.GetRefused().GetReason(); !strings.Contains(why, tt.want) {
				t.Errorf("the destination answers %v; want a refusal that says %q", m, tt.want)
			}
			w.Close()
			if _, err := end.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the destination still has a file: %v", err)
			}
		})
	}
}

// Neither downtime nor total time grow with the memory.
func TestLocalTimeIsTheSameForAnySize(t *testing.T) {
	best := map[uint64]Summary{}
	for range 5 {
		for _, size := range []uint64{64 << 20, 4 << 30} {
			r := newRig(t, size)
			r.opts.Local = true
			for p := uint64(0); p < size/memory.PageSize; p += size / memory.PageSize / 1024 {
				r.src.write(p, p+1)
			}
			arrived := r.receiving()
			s, err := r.migrate()
			if err != nil {
				t.Fatal(err)
			}
			<-arrived
			if old, ok := best[size]; !ok || s.Total < old.Total {
				best[size] = s
			}
		}
	}
	small, large := best[64<<20], best[4<<30]
	t.Logf("64 MiB: %v, downtime %v; 4 GiB: %v, downtime %v", small.Total, small.Downtime.Total, large.Total, large.Downtime.Total)
	// 64 times the memory: copying or visiting it would show.
	if large.Total > 8*small.Total || large.Downtime.Total > 8*small.Downtime.Total {
		t.Errorf("4 GiB take %v, downtime %v; 64 MiB take %v, downtime %v", large.Total, large.Downtime.Total, small.Total, small.Downtime.Total)
	}
}
