package disk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// named is the nexus of an initiator name.
func named(t testing.TB, name string) pr.Nexus {
	t.Helper()
	n, err := pr.NamedNexus(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fastDir is a directory in memory if there is such a file system: every
// change of a reservation is synced three times.
func fastDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "disk-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// nexuses opens an image of 64 KiB in dir for each of names; their power-on
// unit attentions are gone.
func nexuses(t testing.TB, dir string, names ...string) []*LUN {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	var luns []*LUN
	for _, name := range names {
		l := openDisk(t, path, Options{Initiator: name})
		l.takeAttention()
		luns = append(luns, l)
	}
	return luns
}

// status is how a command ended, in a word: "", "conflict", or its sense.
func status(t tb, c *scsi.Command) string {
	t.Helper()
	if c.Outcome == scsi.Completed && c.Status == scsi.ReservationConflict && c.SenseLen == 0 {
		return "conflict"
	}
	return sense(t, c)
}

func out(t tb, l *LUN, o pr.Out) string {
	t.Helper()
	cdb, list := o.Encode()
	return status(t, do(t, l, cdb, list, 0))
}

var (
	testUnitReady = make([]byte, 6)
	write1        = write10(0, 0, 1)
	read1         = read10(0, 0, 1)
	reserve6      = []byte{scsi.OpReserve6, 0, 0, 0, 0, 0}
	release10     = []byte{scsi.OpRelease10, 0, 0, 0, 0, 0, 0, 0, 0, 0}
)

// TestReservations goes through every service action, from three nexuses.
func TestReservations(t *testing.T) {
	luns := nexuses(t, fastDir(t), "a", "b", "c")
	const a, b, c = 0, 1, 2
	const weRO, ea = pr.WriteExclusiveRegistrantsOnly, pr.ExclusiveAccess
	list := func(o pr.Out) []byte { _, list := o.Encode(); return list }
	cdb := func(o pr.Out) []byte { cdb, _ := o.Encode(); return cdb }
	reset := []byte("reset")

	for i, step := range []struct {
		who  int
		cdb  []byte
		list []byte
		want string
		data string // what comes in, hexadecimal, if it is looked at
	}{
		{who: a, cdb: pr.In{Action: pr.ReportCapabilities, Alloc: 8}.CDB(), data: "00 08 1d 80 ea 01 00 00"},
		{who: a, cdb: pr.In{Action: pr.ReadKeys, Alloc: 64}.CDB(), data: "00000000 00000000"},
		{who: a, cdb: cdb(pr.Out{Action: pr.Reserve, Type: weRO}), list: list(pr.Out{}), want: "conflict"},
		{who: a, cdb: cdb(pr.Out{Action: pr.Register}), list: list(pr.Out{ServiceKey: 0xa, APTPL: true})},
		{who: a, cdb: cdb(pr.Out{Action: pr.Register}), list: list(pr.Out{Key: 9, ServiceKey: 0xa}), want: "conflict"},
		{who: b, cdb: cdb(pr.Out{Action: pr.RegisterAndIgnoreExistingKey}), list: list(pr.Out{Key: 9, ServiceKey: 0xb, APTPL: true})},
		{who: a, cdb: pr.In{Action: pr.ReportCapabilities, Alloc: 8}.CDB(), data: "00 08 1d 81 ea 01 00 00"},
		{who: c, cdb: pr.In{Action: pr.ReadKeys, Alloc: 64}.CDB(), data: "00000002 00000010 000000000000000a 000000000000000b"},
		{who: a, cdb: cdb(pr.Out{Action: pr.Reserve, Type: weRO}), list: list(pr.Out{Key: 0xa})},
		{who: c, cdb: pr.In{Action: pr.ReadReservation, Alloc: 64}.CDB(), data: "00000002 00000010 000000000000000a 00000000 00 05 0000"},
		{who: b, cdb: cdb(pr.Out{Action: pr.Reserve, Type: ea}), list: list(pr.Out{Key: 0xb}), want: "conflict"},
		{who: b, cdb: write1, list: make([]byte, 512)},
		{who: c, cdb: write1, list: make([]byte, 512), want: "conflict"},
		{who: c, cdb: read1, data: strings.Repeat("00", 512)},
		{who: c, cdb: cdb10(scsi.OpSynchronizeCache10, 0, 0, 0), want: "conflict"},
		{who: c, cdb: testUnitReady},
		{who: c, cdb: reserve6, want: "conflict"},
		{who: c, cdb: []byte{0xff, 0, 0, 0, 0, 0}, want: "5/20/00"},
		{who: c, cdb: []byte{scsi.OpPersistentReserveOut, 0x1f, 0, 0, 0, 0, 0, 0, 24, 0}, list: list(pr.Out{}), want: "5/24/00"},
		{who: a, cdb: cdb(pr.Out{Action: pr.Release, Type: ea}), list: list(pr.Out{Key: 0xa}), want: "5/26/04"},
		{who: a, cdb: cdb(pr.Out{Action: pr.Release, Type: weRO}), list: list(pr.Out{Key: 0xa})},
		{who: b, cdb: testUnitReady, want: "6/2a/04"},
		{who: b, cdb: testUnitReady},
		{who: c, cdb: write1, list: make([]byte, 512)},

		{who: a, cdb: cdb(pr.Out{Action: pr.Reserve, Type: ea}), list: list(pr.Out{Key: 0xa})},
		{who: b, cdb: read1, want: "conflict"},
		{who: b, cdb: []byte{scsi.OpInquiry, 0, 0, 0, 4, 0}, data: "00 00 07 12"},
		{who: b, cdb: cdb(pr.Out{Action: pr.Preempt, Type: ea}), list: list(pr.Out{Key: 0xb, ServiceKey: 0xa})},
		// REQUEST SENSE tells a unit attention as data, and ends it.
		{who: a, cdb: []byte{scsi.OpRequestSense, 1, 0, 0, 8, 0}, data: "72 06 2a 05 00000000"},
		{who: a, cdb: testUnitReady},
		{who: a, cdb: read1, want: "conflict"},
		{who: a, cdb: cdb(pr.Out{Action: pr.Register}), list: list(pr.Out{ServiceKey: 0xa})},
		{who: a, cdb: cdb(pr.Out{Action: pr.PreemptAndAbort, Type: weRO}), list: list(pr.Out{Key: 0xa, ServiceKey: 0xb})},
		{who: b, cdb: pr.In{Action: pr.ReadKeys, Alloc: 64}.CDB(), want: "6/2a/05"},
		{who: b, cdb: write1, list: make([]byte, 512), want: "conflict"},

		{who: a, cdb: cdb(pr.Out{Action: pr.RegisterAndMove, MoveTo: named(t, "c")}), list: list(pr.Out{Action: pr.RegisterAndMove, Key: 0xa, ServiceKey: 0xc, Unregister: true, MoveTo: named(t, "c")}), want: "len"},
		{who: a, cdb: write1, list: make([]byte, 512), want: "conflict"},
		{who: c, cdb: write1, list: make([]byte, 512)},
		{who: c, cdb: cdb(pr.Out{Action: pr.Clear}), list: list(pr.Out{Key: 0xc})},
		{who: a, cdb: write1, list: make([]byte, 512)},

		{who: b, cdb: reserve6},
		{who: a, cdb: testUnitReady, want: "conflict"},
		{who: a, cdb: pr.In{Action: pr.ReadKeys, Alloc: 64}.CDB(), want: "conflict"},
		{who: a, cdb: []byte{scsi.OpInquiry, 0, 0, 0, 4, 0}},
		{who: a, cdb: release10}, // does nothing
		{who: a, cdb: testUnitReady, want: "conflict"},
		{who: a, cdb: reset},
		{who: a, cdb: testUnitReady, want: "6/29/03"},
		{who: b, cdb: testUnitReady, want: "6/29/03"},
		{who: c, cdb: write1, list: make([]byte, 512), want: "6/29/03"},
		{who: a, cdb: write1, list: make([]byte, 512)},
		{who: b, cdb: reserve6},
		{who: b, cdb: release10},
		{who: a, cdb: write1, list: make([]byte, 512)},

		{who: a, cdb: cdb(pr.Out{Action: pr.Register}), list: list(pr.Out{})[:20], want: "5/1a/00"},
	} {
		l := luns[step.who]
		if &step.cdb[0] == &reset[0] {
			if err := l.Reset(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if step.want == "len" { // REGISTER AND MOVE has a list of its own length
			step.cdb[8], step.want = byte(len(step.list)), ""
		}
		data := unhex(t, step.data)
		c := do(t, l, step.cdb, step.list, len(data))
		if got := status(t, c); got != step.want || len(data) > 0 && !bytes.Equal(dataIn(c), data) {
			t.Fatalf("step %d, % x from %c: %q, % x; want %q, % x", i, step.cdb, 'a'+step.who, got, dataIn(c), step.want, data)
		}
	}
}

// TestAgainstReferenceTarget compares three nexuses of a disk with three of
// the pure target: status, sense and data of every command.
func TestAgainstReferenceTarget(t *testing.T) {
	dir, n := fastDir(t), 0
	names := []string{"a", "b", "c"}
	var ids []pr.Nexus
	for _, name := range names {
		ids = append(ids, named(t, name))
	}
	rapid.Check(t, func(rt *rapid.T) {
		n++
		sub := filepath.Join(dir, fmt.Sprint(n))
		if err := os.Mkdir(sub, 0o700); err != nil {
			rt.Fatal(err)
		}
		path := filepath.Join(sub, "disk.img")
		if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(sub)
		model := pr.NewTarget(pr.Quirks{})
		luns := make([]*LUN, len(names))
		own := make([]string, len(names)) // the attention that is the LUN's own, and comes first
		start := func(i int) {
			l, err := Open(path, Options{Initiator: names[i]})
			if err != nil {
				rt.Fatal(err)
			}
			luns[i], own[i] = l, "6/29/00"
			model.LoseNexus(ids[i])
		}
		for i := range names {
			start(i)
			defer func() { luns[i].Close() }()
		}
		key := rapid.SampledFrom([]pr.Key{0, 1, 1, 2, 3})
		typ := rapid.SampledFrom([]pr.Type{1, 3, 5, 6, 7, 8, 5, 7, 0, 2})
		who := rapid.IntRange(0, len(names)-1)

		send := func(i int, cdb, list []byte, in int) {
			rt.Helper()
			c := do(rt, luns[i], cdb, list, in)
			var wantData []byte
			want := own[i]
			if own[i] = ""; want == "" {
				data, a := model.Execute(ids[i], cdb, list)
				wantData = data
				switch a.Status {
				case scsi.ReservationConflict:
					want = "conflict"
				case scsi.CheckCondition:
					want = a.Sense.String()
				}
			}
			got := status(rt, c)
			if got != want {
				rt.Fatalf("% x [% x] from %s: %q; want %q", cdb, list, names[i], got, want)
			}
			if cdb[0] == scsi.OpPersistentReserveIn && !bytes.Equal(dataIn(c), wantData) {
				rt.Fatalf("% x from %s: % x; want % x", cdb, names[i], dataIn(c), wantData)
			}
		}
		prOut := func(rt *rapid.T) {
			o := pr.Out{
				Action: rapid.SampledFrom([]pr.OutAction{0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 6, 7}).Draw(rt, "action"),
				Type:   typ.Draw(rt, "type"), Key: key.Draw(rt, "key"), ServiceKey: key.Draw(rt, "service key"),
				APTPL: rapid.Bool().Draw(rt, "aptpl"),
			}
			i := who.Draw(rt, "who")
			if rapid.Bool().Draw(rt, "right key") {
				o.Key = model.Key(ids[i])
			}
			switch {
			case o.Action == pr.RegisterAndMove:
				o.MoveTo, o.Unregister = ids[who.Draw(rt, "to")], rapid.Bool().Draw(rt, "unreg")
			case o.Action == pr.Register && rapid.IntRange(0, 9).Draw(rt, "ports") == 0:
				o.SpecifyPorts, o.Ports = true, []pr.TransportID{ids[who.Draw(rt, "port")].Initiator}
			}
			cdb, list := o.Encode()
			if rapid.IntRange(0, 19).Draw(rt, "cut") == 0 {
				list = list[:len(list)-4]
			}
			send(i, cdb, list, 0)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"":           func(*rapid.T) {},
			"PR OUT":     prOut,
			"PR OUT too": prOut,
			"PR IN": func(rt *rapid.T) {
				in := pr.In{Action: pr.InAction(rapid.IntRange(0, 3).Draw(rt, "action")), Alloc: uint16(rapid.SampledFrom([]int{0, 8, 11, 4096}).Draw(rt, "length"))}
				send(who.Draw(rt, "who"), in.CDB(), nil, 4096)
			},
			"command": func(rt *rapid.T) {
				cdb := rapid.SampledFrom([][]byte{
					testUnitReady, write1, read1, cdb10(scsi.OpReadCapacity10, 0, 0, 0),
					{scsi.OpModeSense6, 0, 0x3f, 0, 255, 0}, {scsi.OpStartStopUnit, 0, 0, 0, 1, 0},
					{scsi.OpPreventAllowRemoval, 0, 0, 0, 0, 0}, {scsi.OpPreventAllowRemoval, 0, 0, 0, 1, 0},
					cdb10(scsi.OpSynchronizeCache10, 0, 0, 0), cdb16(scsi.OpCompareAndWrite, 0, 8, 1),
					cdb16(scsi.OpServiceActionIn16, scsi.SAReadCapacity16, 0, 32),
					{scsi.OpMaintenanceIn, scsi.SAReportSupportedTMFs, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0},
				}).Draw(rt, "cdb")
				var data []byte
				switch cdb[0] {
				case scsi.OpWrite10, scsi.OpCompareAndWrite:
					data = make([]byte, 1024)
				}
				send(who.Draw(rt, "who"), cdb, data, map[bool]int{true: 0, false: 512}[data != nil])
			},
			"SPC-2": func(rt *rapid.T) {
				cdb := rapid.SampledFrom([][]byte{reserve6, release10}).Draw(rt, "cdb")
				send(who.Draw(rt, "who"), cdb, nil, 0)
			},
			"reset": func(rt *rapid.T) {
				i := who.Draw(rt, "who")
				if err := luns[i].Reset(); err != nil {
					rt.Fatal(err)
				}
				for j, id := range ids {
					model.LoseNexus(id)
					if j != i {
						model.Attention(id, pr.DeviceReset)
					}
				}
				if own[i] == "" { // a power-on covers a later reset
					own[i] = "6/29/03"
				}
			},
			"open again": func(rt *rapid.T) {
				// Of a nexus that is not registered nothing is kept.
				if i := who.Draw(rt, "who"); model.Key(ids[i]) != 0 {
					luns[i].Close()
					start(i)
				}
			},
		})
	})
}

// TestCompareAndWriteBetweenNexuses counts in a block, with plain writes to
// another that must stay in step with those of its own nexus.
func TestCompareAndWriteBetweenNexuses(t *testing.T) {
	const each = 100
	luns := nexuses(t, fastDir(t), "a", "b", "c")
	var hosts sync.WaitGroup
	for _, l := range luns {
		hosts.Go(func() {
			for done := 0; done < each; {
				old := dataIn(do(t, l, read10(0, 7, 1), nil, 512))
				next := bytes.Clone(old)
				binary.LittleEndian.PutUint64(next, binary.LittleEndian.Uint64(old)+1)
				c := do(t, l, cdb16(scsi.OpCompareAndWrite, 0, 7, 1), append(old, next...), 0)
				if c.Status == scsi.Good {
					done++
				} else if got := sense(t, c); got != miscompare.String() {
					t.Errorf("COMPARE AND WRITE: %s", got)
					return
				}
			}
		})
	}
	hosts.Wait()
	got := binary.LittleEndian.Uint64(dataIn(do(t, luns[0], read10(0, 7, 1), nil, 512)))
	if got != uint64(len(luns))*each {
		t.Errorf("counted to %d; want %d", got, len(luns)*each)
	}
}

// TestDamagedReservations: nobody is taken for permitted because nobody can
// tell.
func TestDamagedReservations(t *testing.T) {
	dir := fastDir(t)
	luns := nexuses(t, dir, "a", "b")
	if got := out(t, luns[0], pr.Out{Action: pr.Register, ServiceKey: 1}); got != "" {
		t.Fatal(got)
	}
	if err := os.WriteFile(filepath.Join(dir, "disk.img.pr"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, cdb := range [][]byte{write1, testUnitReady, reserve6, pr.In{Action: pr.ReadKeys}.CDB()} {
		// b reads the state anew, for it was changed since.
		if got := sense(t, do(t, luns[1], cdb, make([]byte, 512), 0)); got != scsi.InternalTargetFailed.String() {
			t.Errorf("% x with a damaged state: %q; want %v", cdb, got, scsi.InternalTargetFailed)
		}
	}
	expect(t, do(t, luns[1], []byte{scsi.OpInquiry, 0, 0, 0, 4, 0}, nil, 4), "")
	if _, err := Open(filepath.Join(dir, "disk.img"), Options{Initiator: "c"}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("Open with a damaged state = %v; want an error that says so", err)
	}
}
