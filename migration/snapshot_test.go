package migration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// snapshot is where a rig's guest is saved.
func (r *rig) snapshot() string { return filepath.Join(filepath.Dir(r.listen.Address), "web1.snap") }

func (r *rig) save() (Saved, error) {
	return Save(context.Background(), r.src, r.snapshot(), SaveOptions{})
}

func (r *rig) mustSave() Saved {
	r.Helper()
	s, err := r.save()
	if err != nil {
		r.Fatalf("Save = %v", err)
	}
	return s
}

func (r *rig) restore(again bool) (*Arrival, error) {
	a, err := Restore(context.Background(), r.snapshot(), r.host, RestoreOptions{StateDir: r.recv.StateDir, Again: again, Warn: r.recv.Warn})
	if a != nil {
		r.Cleanup(func() { a.Machine.(*fakeDest).ram.Close() })
	}
	return a, err
}

// crashed is the end of the guest's process.
func (r *rig) crashed(a *Arrival) {
	r.src.g.stop()
	if err := a.Machine.(*fakeDest).ram.Close(); err != nil {
		r.Error(err)
	}
}

func markOf(t testing.TB, path string) byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b[markAt]
}

// A guest is in the file as it was when it stopped, holes as holes, and runs
// from it once.
func TestSnapshot(t *testing.T) {
	r := newRig(t, 32<<20)
	kernel := bytes.Repeat([]byte("kernel"), 100_000)
	r.src.files = []Attachment{attachment("kernel", kernel), attachment("initrd", nil)}
	for p := uint64(0); p < 6000; p++ { // the rest stays a hole
		if p%7 != 3 {
			r.src.write(p, p+1)
		} else {
			r.src.write(p, 0) // has memory, and is zero
		}
	}
	s := r.mustSave()
	info, err := os.Stat(r.snapshot())
	if err != nil || info.Mode() != 0o600 || uint64(info.Size()) != s.Bytes || s.Path != r.snapshot() {
		t.Errorf("the snapshot is %v, %v; Save = %+v", info, err, s)
	}
	if files, _ := os.ReadDir(filepath.Dir(r.snapshot())); len(files) != 2 { // the journal's directory is the other
		t.Errorf("Save left %v", files)
	}
	if r.src.g.runs.Load() != 0 || !r.src.paused {
		t.Errorf("the guest runs %d times after Save", r.src.g.runs.Load())
	}
	a, err := r.restore(false)
	if err != nil {
		t.Fatalf("Restore = %v", err)
	}
	d := a.Machine.(*fakeDest)
	var st unix.Stat_t // before reading fills the holes
	if err := unix.Fstat(int(d.ram.File().Fd()), &st); err != nil || st.Blocks > 6000*memory.PageSize/512 {
		t.Errorf("the memory has %d blocks, %v; want no more than the guest's 6000 pages", st.Blocks, err)
	}
	same(t, d.ram, r.src.ram)
	if d.loaded.GetBoot().GetKernel().GetName() != "saved" || !bytes.Equal(d.files[0].Bytes(), kernel) || !d.ran || a.ID != s.ID {
		t.Errorf("loaded %v, %d bytes of kernel, ran %v", d.loaded, d.files[0].Len(), d.ran)
	}
	<-a.Answered
	r.crashed(a)
	if _, err := r.restore(false); err == nil || !strings.Contains(err.Error(), "--again") {
		t.Errorf("a second Restore = %v; want it to name --again", err)
	}
	for range 2 {
		a, err = r.restore(true)
		if err != nil {
			t.Fatalf("Restore again = %v", err)
		}
		r.crashed(a)
	}
}

// A file has what the guest has written, and no more.
func TestSnapshotOfASparseGuest(t *testing.T) {
	r := newRig(t, 5<<30)
	for p := range uint64(1024) {
		r.src.write(p*1000, p%4) // every fourth has memory, and is zero
	}
	s := r.mustSave()
	if most := uint64(768*memory.PageSize + 64<<10); s.Bytes > most {
		t.Errorf("a snapshot of 768 pages has %d bytes; want at most %d", s.Bytes, most)
	}
	a, err := r.restore(false)
	if err != nil {
		t.Fatal(err)
	}
	for p := range uint64(1024) {
		gpa := memory.GPA(p * 1000 * memory.PageSize)
		if gpa >= memory.HoleStart {
			gpa += memory.HoleEnd - memory.HoleStart
		}
		b, err := a.Machine.RAM().Slice(gpa, 8)
		if err != nil || binary.LittleEndian.Uint64(b) != p%4 {
			t.Fatalf("page %d begins % x, %v; want %d", p*1000, b, err, p%4)
		}
	}
}

// What the guest has on the disk it has afterwards, on whatever nexus it goes
// on, and whoever cannot vouch for it makes it fenced.
func TestSnapshotReservations(t *testing.T) {
	for _, q := range pr.Targets {
		for _, typ := range []pr.Type{pr.None, 1, 3, 5, 6, 7, 8} {
			for _, nexus := range []pr.Nexus{nexD, nexS} {
				if nexus == nexS && typ.Single() && typ != 1 {
					continue // nothing moves: one type is as good as another
				}
				t.Run(fmt.Sprintf("%s/%d/%v", q.Name, typ, nexus == nexS), func(t *testing.T) {
					t.Parallel() // it waits for a medium
					snapshotMoves(t, q, typ, nexus)
				})
			}
		}
	}
}

func snapshotMoves(t *testing.T, q pr.Quirks, typ pr.Type, nexus pr.Nexus) {
	d := newDisk(q)
	d.do(nexS, pr.Out{ServiceKey: keyGuest})
	d.do(nexO, pr.Out{ServiceKey: keyOther})
	if typ != pr.None {
		d.do(nexS, pr.Out{Action: pr.Reserve, Key: keyGuest, Type: typ})
	}
	none := newDisk(q)
	r := newRig(t, 1<<20, d, none, newDisk(q))
	r.src.luns[2].Preflight, r.host.luns[2].Preflight = nil, nil
	saved := r.mustSave()
	r.nexus(0, nexus, d)
	a, err := r.restore(false)
	if err != nil {
		t.Fatalf("%s, type %d: %v", q.Name, typ, err)
	}
	if len(saved.LUNs) != 2 || len(a.LUNs) != 2 {
		t.Errorf("%s: saved %v, restored %v; want two LUNs each", q.Name, saved.LUNs, a.LUNs)
	}
	want := pr.Moved
	switch {
	case nexus == nexS:
		want = pr.Kept
	case !r.src.luns[0].Preflight.FullStatus:
		want = pr.FencedMeanwhile
	case typ == pr.None:
		want = pr.RegistrationOnly
	}
	holder, got := d.holder()
	ok := r.settledD["0"].Kind == want && d.key(nexO) == keyOther && got == typ
	if want == pr.FencedMeanwhile {
		ok = ok && d.key(nexD) == 0 && d.key(nexS) == keyGuest
	} else {
		ok = ok && d.key(nexus) == keyGuest && (!typ.Single() || holder == nexus)
	}
	if !ok {
		t.Errorf("%s, type %d, on %v: outcome %+v; source %v, destination %v, %v holds type %d", q.Name, typ, nexus,
			r.settledD["0"], d.key(nexS), d.key(nexD), holder, got)
	}
	if entries, err := mustJournal(t, r.recv.StateDir).Entries(); err != nil || len(entries) > 0 {
		t.Errorf("%s, type %d: the journal has %v, %v; want nothing", q.Name, typ, entries, err)
	}
}

func mustJournal(t testing.TB, dir string) *pr.Journal {
	t.Helper()
	j, err := pr.OpenJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// nexus makes the host that restores reach a disk by n.
func (r *rig) nexus(i int, n pr.Nexus, d *disk) {
	r.Helper()
	l := d.lun(r, fmt.Sprint(i), n)
	l.Settled, l.Identity = r.host.luns[i].Settled, r.host.luns[i].Identity
	l.Tracked = func() pr.Tracked { return pr.Tracked{Key: d.key(n)} }
	r.host.luns[i] = l
}

// Whoever fences the guest while it is in the file has fenced it.
func TestSnapshotFenced(t *testing.T) {
	preempt := func(d *disk) {
		d.do(nexO, pr.Out{Action: pr.Preempt, Key: keyOther, ServiceKey: keyGuest, Type: pr.WriteExclusiveRegistrantsOnly})
	}
	for _, tt := range []struct {
		name          string
		before, after func(*disk)
		nexus         pr.Nexus
	}{
		{"before it is saved", preempt, nil, nexD},
		{"in the file", nil, preempt, nexD},
		{"in the file, and back on its nexus", nil, preempt, nexS},
		{"cleared", nil, func(d *disk) { d.do(nexO, pr.Out{Action: pr.Clear, Key: keyOther}) }, nexD},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := reserved(pr.WriteExclusiveRegistrantsOnly)
			r := newRig(t, 1<<20, d)
			r.src.luns[0].Tracked = func() pr.Tracked { return pr.Tracked{Key: keyGuest} }
			if tt.before != nil {
				tt.before(d)
			}
			s := r.mustSave()
			if tt.after != nil {
				tt.after(d)
			} else if !strings.Contains(s.LUNs[0].Sentence, "has fenced") {
				t.Errorf("Save says %v", s.LUNs)
			}
			r.nexus(0, tt.nexus, d)
			a, err := r.restore(false)
			if err != nil {
				t.Fatal(err)
			}
			if r.settledD["0"].Kind != pr.FencedMeanwhile || !a.Machine.(*fakeDest).ran || d.key(nexS) != 0 || d.key(nexD) != 0 {
				t.Errorf("outcome %+v; source %v, destination %v", r.settledD["0"], d.key(nexS), d.key(nexD))
			}
		})
	}
}

// Whatever keeps a guest from being saved leaves it running, and no file.
func TestSaveKept(t *testing.T) {
	for _, tt := range []struct {
		name    string
		with    func(*rig, context.CancelFunc)
		want    string
		refused bool // without having been stopped
	}{
		{"a file is there", func(r *rig, _ context.CancelFunc) { r.write(r.snapshot(), "precious") }, "--force", true},
		{"a directory is there", func(r *rig, _ context.CancelFunc) { os.Mkdir(r.snapshot(), 0o700) }, "no regular file", true},
		{"SPC-2", func(r *rig, _ context.CancelFunc) {
			r.src.luns[0].Tracked = func() pr.Tracked { return pr.Tracked{SPC2: true} }
		}, "RESERVE of SPC-2", true},
		{"a command does not come back", func(r *rig, _ context.CancelFunc) { r.src.stuck = true }, "still in flight", false},
		{"save", func(r *rig, _ context.CancelFunc) { r.src.failing = errors.New("KVM_GET_MSRS: 0x1b") }, "0x1b", false},
		{"a kernel that has changed", func(r *rig, _ context.CancelFunc) {
			a := attachment("vmlinuz", []byte("as it was"))
			a.Data = strings.NewReader("as it is ")
			r.src.files = []Attachment{a}
		}, "has changed", false},
		{"the disk is dead", func(r *rig, _ context.CancelFunc) { r.src.inPause = func() { r.kill(nexS) } }, "does not say what the guest has", false},
		{"a file comes in between", func(r *rig, _ context.CancelFunc) {
			r.src.inPause = func() { r.write(r.snapshot(), "precious") }
		}, "by now", false},
		{"canceled", func(r *rig, cancel context.CancelFunc) { r.src.inPause = cancel }, "canceled", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := reserved(pr.WriteExclusiveRegistrantsOnly)
			r := newRig(t, 1<<20, d)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			tt.with(r, cancel)
			_, err := Save(ctx, r.src, r.snapshot(), SaveOptions{Deadlines: Deadlines{Drain: 50 * time.Millisecond}})
			if want := map[bool]error{true: ErrRefused, false: ErrKept}[tt.refused]; !errors.Is(err, want) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Save = %v; want %v that says %q", err, want, tt.want)
			}
			if r.src.g.runs.Load() != 1 || tt.refused && r.src.pauses != 0 {
				t.Errorf("the guest runs %d times, was stopped %d times", r.src.g.runs.Load(), r.src.pauses)
			}
			if b, err := os.ReadFile(r.snapshot()); err == nil && string(b) != "precious" {
				t.Errorf("a file of %d bytes is left", len(b))
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(r.snapshot()), ".*.new-*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if n, typ := d.holder(); n != nexS || typ != pr.WriteExclusiveRegistrantsOnly {
				t.Errorf("holder %v, type %v", n, typ)
			}
		})
	}
	r := newRig(t, 1<<20)
	r.write(r.snapshot(), "old")
	if _, err := Save(context.Background(), r.src, r.snapshot(), SaveOptions{Force: true}); err != nil || markOf(t, r.snapshot()) != markComplete {
		t.Errorf("Save over a file with force = %v", err)
	}
	if _, err := Save(context.Background(), r.src, "/nonexistent/web1", SaveOptions{}); !errors.Is(err, ErrRefused) {
		t.Errorf("Save where nothing can be written = %v", err)
	}
}

func (r *rig) write(path, content string) {
	r.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		r.Fatal(err)
	}
}

// What is no whole snapshot, or cannot be run here, is refused in a sentence,
// and changes nothing: neither the file nor a disk.
func TestRestoreRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		with func(r *rig, d *disk, path string)
		want string
	}{
		{"no file", func(_ *rig, _ *disk, path string) { os.Remove(path) }, "no such file"},
		{"a directory", func(_ *rig, _ *disk, path string) { os.Remove(path); os.Mkdir(path, 0o700) }, "directory"},
		{"a pipe", func(_ *rig, _ *disk, path string) { os.Remove(path); unix.Mkfifo(path, 0o600) }, "no regular file"},
		{"an empty file", func(r *rig, _ *disk, path string) { os.Truncate(path, 0) }, "0 bytes are no snapshot"},
		{"another file", func(r *rig, _ *disk, path string) { r.write(path, strings.Repeat("x", 100)) }, "this is no snapshot"},
		{"an unfinished one", func(r *rig, _ *disk, path string) { r.patch(path, markAt, markUnfinished) }, "unfinished"},
		{"a mark of a later version", func(r *rig, _ *disk, path string) { r.patch(path, markAt, 9) }, "mark 9"},
		{"a used one", func(r *rig, _ *disk, path string) { r.patch(path, markAt, markUsed) }, "--again"},
		{"one that somebody else runs", func(r *rig, _ *disk, path string) {
			f, err := os.Open(path)
			if err != nil {
				r.Fatal(err)
			}
			r.Cleanup(func() { f.Close() })
			if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
				r.Fatal(err)
			}
		}, "another process"},
		{"the host", func(r *rig, _ *disk, _ string) { r.host.refuse = errors.New("the processor here lacks avx2") }, "avx2"},
		{"memory", func(r *rig, _ *disk, _ string) { r.host.size = 2 << 20 }, "memory map"},
		{"a LUN is missing", func(r *rig, _ *disk, _ string) { r.host.luns = nil }, "0 of them are here"},
		{"another LUN", func(r *rig, _ *disk, _ string) { r.host.luns[0].Identity = "naa.5" }, "naa.5 here"},
		{"a nexus in use", func(r *rig, d *disk, _ string) {
			d.do(nexD, pr.Out{ServiceKey: 0xdd})
			r.nexus(0, nexD, d)
		}, "registered already"},
		{"its own nexus in use", func(r *rig, d *disk, _ string) {
			d.do(nexS, pr.Out{Key: keyGuest, ServiceKey: 0xdd})
			r.nexus(0, nexS, d)
		}, "registered already"},
		{"load", func(r *rig, _ *disk, _ string) { r.host.loadErr = errors.New("unknown device") }, "unknown device"},
		{"run", func(r *rig, d *disk, _ string) {
			d.do(nexS, pr.Out{Key: keyGuest}) // nothing moves
			r.host.runErr = errors.New("KVM_RUN: no")
		}, "KVM_RUN"},
		{"the disk dies", func(r *rig, _ *disk, _ string) { r.host.inLoad = func() { r.kill(nexD) } }, "did not answer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := reserved(pr.WriteExclusiveRegistrantsOnly)
			r := newRig(t, 1<<20, d)
			r.mustSave()
			tt.with(r, d, r.snapshot())
			before := content(r.snapshot())
			had := [2]pr.Key{d.key(nexS), d.key(nexD)}
			var err error
			within(t, "Restore", func() { _, err = r.restore(false) })
			if err == nil || errors.Is(err, ErrBlocked) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), r.snapshot()) {
				t.Errorf("Restore = %v; want it to say %q and the file", err, tt.want)
			}
			if !bytes.Equal(before, content(r.snapshot())) {
				t.Error("the file has changed")
			}
			if now := [2]pr.Key{d.key(nexS), d.key(nexD)}; now != had || r.src.g.runs.Load() != 0 {
				t.Errorf("keys %v; want %v; the guest runs %d times", now, had, r.src.g.runs.Load())
			}
			if d := r.host.dest(); d != nil {
				within(t, "closing the machine", func() { <-d.closed })
			}
		})
	}
}

// content is what a regular file has.
func content(path string) []byte {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil
	}
	b, _ := os.ReadFile(path)
	return b
}

func (r *rig) patch(path string, at int64, b byte) {
	r.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		r.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{b}, at); err != nil {
		r.Fatal(err)
	}
}

// A host that fails after the reservation has moved says so, and can try again:
// the guest goes on with what it has.
func TestRestoreTriedAgain(t *testing.T) {
	d := reserved(pr.WriteExclusiveRegistrantsOnly)
	r := newRig(t, 1<<20, d)
	r.mustSave()
	r.host.runErr = errors.New("KVM_RUN: no")
	if _, err := r.restore(false); !errors.Is(err, ErrBlocked) || !strings.Contains(err.Error(), "--again") {
		t.Errorf("Restore = %v; want ErrBlocked that names --again", err)
	}
	if markOf(t, r.snapshot()) != markUsed || d.key(nexD) != keyGuest {
		t.Errorf("mark %d, the destination's key is %v", markOf(t, r.snapshot()), d.key(nexD))
	}
	r.host.runErr = nil
	r.nexus(0, nexD, d)
	if _, err := r.restore(false); err == nil || !strings.Contains(err.Error(), "--again") {
		t.Errorf("Restore of a used snapshot = %v", err)
	}
	if _, err := r.restore(true); err != nil {
		t.Fatalf("Restore again = %v", err)
	}
	if n, typ := d.holder(); r.settledD["0"].Kind != pr.Kept || n != nexD || typ != pr.WriteExclusiveRegistrantsOnly || d.key(nexS) != 0 {
		t.Errorf("outcome %+v, %v holds %v, the old nexus has %v", r.settledD["0"], n, typ, d.key(nexS))
	}
}

// A byte that is changed or missing anywhere is found before anything is
// touched.
func TestDamagedSnapshots(t *testing.T) {
	r := newRig(t, 64<<10)
	r.src.files = []Attachment{attachment("kernel", []byte("kernel"))}
	for p := range uint64(8) {
		r.src.write(p, p)
	}
	r.mustSave()
	whole, err := os.ReadFile(r.snapshot())
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, b []byte) {
		t.Helper()
		r.write(r.snapshot(), string(b))
		if a, err := r.restore(false); err == nil {
			t.Errorf("%s: the guest runs", what)
			r.crashed(a)
		} else if after, _ := os.ReadFile(r.snapshot()); !bytes.Equal(after, b) {
			t.Errorf("%s: the file has changed", what)
		}
	}
	for range 60 {
		at := preambleLen + rand.IntN(len(whole)-preambleLen)
		try(fmt.Sprintf("cut at %d of %d", at, len(whole)), whole[:at])
		flipped := slices.Clone(whole)
		flipped[at] ^= 1 << rand.IntN(8)
		try(fmt.Sprintf("byte %d of %d is %#x instead of %#x", at, len(whole), flipped[at], whole[at]), flipped)
	}
	try("a byte more", append(slices.Clone(whole), 0))
	other := slices.Clone(whole)
	other[20]++
	try("another id", other)
	r.write(r.snapshot(), string(whole))
	if _, err := r.restore(false); err != nil {
		t.Errorf("the whole one: %v", err)
	}
}

// FuzzSnapshot: whatever a file has, with a checksum that fits, is an error or
// a guest that runs once; memory grows no faster than the file.
func FuzzSnapshot(f *testing.F) {
	d := reserved(pr.WriteExclusiveRegistrantsOnly)
	r := newRig(f, 64<<10, d)
	r.src.files = []Attachment{attachment("kernel", []byte("kernel"))}
	for p := range uint64(5) {
		r.src.write(p, p%2)
	}
	r.mustSave()
	whole, err := os.ReadFile(r.snapshot())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:preambleLen+9])
	f.Add(whole[:len(whole)-20])
	r.host.size = 64 << 10
	r.recv.Warn = func(error) {}
	f.Fuzz(func(t *testing.T, b []byte) {
		// The last message's checksum is made right, so that more gets past it.
		b = slices.Clone(b)
		tail, err := appendMessage(nil, &vmmv1.StreamMessage{Id: make([]byte, len(ID{})), Body: &vmmv1.StreamMessage_Commit{Commit: &vmmv1.Commit{Crc32C: 1}}})
		if err != nil {
			t.Fatal(err)
		}
		if end := len(b) - len(tail); end > preambleLen {
			binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[preambleLen:end], castagnoli))
		}
		path := filepath.Join(t.TempDir(), "snap")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		r.src.g.runs.Store(0)
		d.target = reserved(pr.WriteExclusiveRegistrantsOnly).target
		a, err := Restore(context.Background(), path, r.host, RestoreOptions{StateDir: r.recv.StateDir, Warn: r.recv.Warn})
		if (a == nil) == (err == nil) {
			t.Fatalf("Restore = %v, %v", a, err)
		}
		if a == nil {
			if n := r.src.g.runs.Load(); n != 0 {
				t.Fatalf("the guest runs %d times after %v", n, err)
			}
			return
		}
		defer a.Machine.Close()
		written := uint64(0)
		if err := a.Machine.RAM().Extents(0, a.Machine.RAM().Size(), func(_ memory.GPA, n uint64) error { written += n; return nil }); err != nil {
			t.Fatal(err)
		}
		if written > uint64(len(b)) {
			t.Fatalf("%d bytes of memory from a file of %d", written, len(b))
		}
	})
}
