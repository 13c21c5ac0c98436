package migration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
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
	for _, tt := range []struct {
		name  string
		files []*os.File
		want  string
	}{
		{"nothing", nil, "0 files came"},
		{"two files", []*os.File{memfd(1<<20, sealed), memfd(1<<20, sealed)}, "files came"},
		{"a file that can shrink", []*os.File{memfd(1<<20, unix.F_SEAL_GROW)}, "not sealed"},
		{"too short", []*os.File{memfd(4096, sealed)}, "it has 4096 bytes"},
		{"too long", []*os.File{memfd(2<<20, sealed)}, "it has 2097152 bytes"},
		{"not to be written", []*os.File{memfd(1<<20, sealed|unix.F_SEAL_WRITE)}, "not permitted"},
		{"no memfd", []*os.File{plain}, "seals"},
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
			b, err := appendMessage(nil, &vmmv1.StreamMessage{Id: o.id[:], Body: &vmmv1.StreamMessage_Hello{Hello: hello}})
			if err != nil {
				t.Fatal(err)
			}
			var fds []int
			for _, f := range tt.files {
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
