package scsi_test

import (
	"testing"

	"vmm/scsi"
	"vmm/scsi/scsitest"
)

// submit sends cdb, padded as the controller does, and returns the command
// when it has come back. The logical units used here answer in Submit.
func submit(lun scsi.LUN, cdb []byte, in ...[]byte) *scsi.Command {
	c := &scsi.Command{CDB: append(append([]byte(nil), cdb...), make([]byte, 32)...), DataIn: in}
	back := 0
	c.Done = func(*scsi.Command) { back++ }
	lun.Submit(c)
	if back != 1 {
		panic("the command did not come back once")
	}
	return c
}

func verdict(c *scsi.Command) string {
	switch {
	case c.Outcome != scsi.Completed:
		return c.Outcome.String()
	case c.Status == scsi.CheckCondition:
		s, _ := scsi.ParseSense(c.Sense[:c.SenseLen])
		return s.String()
	}
	return c.Status.String()
}

func TestGuardJudgesCommands(t *testing.T) {
	const (
		pass    = "GOOD"
		denied  = "5/20/02"
		protect = "7/27/00"
	)
	for _, test := range []struct {
		name     string
		cdb      []byte
		guarded  string // neither policy set
		readOnly string
		unsafe   string // AllowUnsafe
	}{
		{"TEST UNIT READY", []byte{0x00}, pass, pass, pass},
		{"INQUIRY", []byte{0x12}, pass, pass, pass},
		{"READ(6)", []byte{0x08}, pass, pass, pass},
		{"READ(10)", []byte{0x28}, pass, pass, pass},
		{"READ(12)", []byte{0xa8}, pass, pass, pass},
		{"READ(16)", []byte{0x88}, pass, pass, pass},
		{"READ(32)", []byte{0x7f, 7: 0x18, 9: 0x09}, pass, pass, pass},
		{"READ CAPACITY(16)", []byte{0x9e, 0x10}, pass, pass, pass},
		{"GET LBA STATUS", []byte{0x9e, 0x12}, pass, pass, pass},
		{"SYNCHRONIZE CACHE(10)", []byte{0x35}, pass, pass, pass},
		{"SYNCHRONIZE CACHE(16)", []byte{0x91}, pass, pass, pass},
		{"PERSISTENT RESERVE IN", []byte{0x5e}, pass, pass, pass},
		{"REPORT SUPPORTED OPERATION CODES", []byte{0xa3, 0x0c}, pass, pass, pass},
		{"LOG SENSE", []byte{0x4d}, pass, pass, pass},
		{"MODE SENSE(6)", []byte{0x1a}, pass, pass, pass},
		{"MODE SENSE(10)", []byte{0x5a}, pass, pass, pass},
		{"VERIFY(16)", []byte{0x8f}, pass, pass, pass},
		{"START", []byte{0x1b, 4: 0x01}, pass, pass, pass},

		{"WRITE(6)", []byte{0x0a}, pass, protect, pass},
		{"WRITE(10)", []byte{0x2a}, pass, protect, pass},
		{"WRITE(12)", []byte{0xaa}, pass, protect, pass},
		{"WRITE(16)", []byte{0x8a}, pass, protect, pass},
		{"WRITE(32)", []byte{0x7f, 7: 0x18, 9: 0x0b}, pass, protect, pass},
		{"WRITE AND VERIFY(10)", []byte{0x2e}, pass, protect, pass},
		{"WRITE AND VERIFY(12)", []byte{0xae}, pass, protect, pass},
		{"WRITE AND VERIFY(16)", []byte{0x8e}, pass, protect, pass},
		{"WRITE ATOMIC(16)", []byte{0x9c}, pass, protect, pass},
		{"WRITE SAME(10)", []byte{0x41}, pass, protect, pass},
		{"WRITE SAME(16)", []byte{0x93}, pass, protect, pass},
		{"WRITE LONG(10)", []byte{0x3f}, pass, protect, pass},
		{"WRITE LONG(16)", []byte{0x9f, 0x11}, pass, protect, pass},
		{"COMPARE AND WRITE", []byte{0x89}, pass, protect, pass},
		{"ORWRITE(16)", []byte{0x8b}, pass, protect, pass},
		{"UNMAP", []byte{0x42}, pass, protect, pass},
		{"REASSIGN BLOCKS", []byte{0x07}, pass, protect, pass},
		{"XDWRITEREAD(10)", []byte{0x53}, pass, protect, pass},
		{"ZBC OUT", []byte{0x94}, pass, protect, pass},
		{"MODE SELECT(6)", []byte{0x15}, pass, protect, pass},
		{"MODE SELECT(10)", []byte{0x55}, pass, protect, pass},
		{"LOG SELECT", []byte{0x4c}, pass, protect, pass},
		{"PERSISTENT RESERVE OUT", []byte{0x5f}, pass, protect, pass},
		{"RESERVE(6)", []byte{0x16}, pass, protect, pass},
		{"STOP", []byte{0x1b}, pass, protect, pass},
		{"START with LOEJ", []byte{0x1b, 4: 0x03}, pass, protect, pass},
		{"START to standby", []byte{0x1b, 4: 0x31}, pass, protect, pass},
		{"WRITE BUFFER of data", []byte{0x3b, 0x02}, pass, protect, pass},
		{"WRITE BUFFER to the echo buffer", []byte{0x3b, 0x0a}, pass, protect, pass},
		{"WRITE USING TOKEN", []byte{0x83, 0x11}, pass, protect, pass},
		{"SET TARGET PORT GROUPS", []byte{0xa4, 0x0a}, pass, protect, pass},
		{"SEND DIAGNOSTIC, self-test", []byte{0x1d, 0x04}, pass, protect, pass},
		{"SEND DIAGNOSTIC, background short", []byte{0x1d, 1 << 5}, pass, protect, pass},
		{"reserved opcode", []byte{0x7b}, pass, protect, pass},

		{"FORMAT UNIT", []byte{0x04}, denied, protect, pass},
		{"SANITIZE", []byte{0x48, 0x03}, denied, protect, pass},
		{"FORMAT WITH PRESET", []byte{0x38}, denied, protect, pass},
		{"WRITE BUFFER, microcode", []byte{0x3b, 0x05}, denied, protect, pass},
		{"WRITE BUFFER, microcode with offsets", []byte{0x3b, 0x07}, denied, protect, pass},
		{"WRITE BUFFER, activate deferred", []byte{0x3b, 0x0f}, denied, protect, pass},
		{"WRITE BUFFER, vendor", []byte{0x3b, 0x01}, denied, protect, pass},
		{"WRITE BUFFER, a mode specific in bits 5 to 7", []byte{0x3b, 0xe5}, denied, protect, pass},
		{"SECURITY PROTOCOL OUT", []byte{0xb5}, denied, protect, pass},
		{"EXTENDED COPY(LID1)", []byte{0x83, 0x00}, denied, protect, pass},
		{"EXTENDED COPY(LID4)", []byte{0x83, 0x01}, denied, protect, pass},
		{"COPY", []byte{0x18}, denied, protect, pass},
		{"REMOVE ELEMENT AND TRUNCATE", []byte{0x9e, 0x18}, denied, protect, pass},
		{"MANAGEMENT PROTOCOL OUT", []byte{0xa4, 0x10}, denied, protect, pass},
		{"ACCESS CONTROL OUT", []byte{0x87}, denied, protect, pass},
		{"XCDB", []byte{0x7e}, denied, protect, pass},
		{"vendor-specific, first", []byte{0xc0}, denied, protect, pass},
		{"vendor-specific, last", []byte{0xff}, denied, protect, pass},
		{"SEND DIAGNOSTIC, foreground", []byte{0x1d, 6 << 5}, denied, protect, pass},
		{"SEND DIAGNOSTIC with UNITOFFL", []byte{0x1d, 0x05}, denied, protect, pass},
		{"ATA PASS-THROUGH(32)", []byte{0x7f, 7: 0x18, 8: 0x1f, 9: 0xf0}, denied, protect, pass},
		{"ATA IDENTIFY(16)", []byte{0x85, 4 << 1, 14: 0xec}, pass, pass, pass},
		{"ATA IDENTIFY(12)", []byte{0xa1, 4 << 1, 9: 0xec}, pass, pass, pass},
		{"ATA SMART READ DATA", []byte{0x85, 4 << 1, 4: 0xd0, 14: 0xb0}, pass, pass, pass},
		{"ATA SMART EXECUTE OFF-LINE", []byte{0x85, 3 << 1, 4: 0xd4, 14: 0xb0}, denied, protect, pass},
		{"ATA DOWNLOAD MICROCODE", []byte{0x85, 5 << 1, 14: 0x92}, denied, protect, pass},
		{"ATA SECURITY ERASE UNIT", []byte{0xa1, 5 << 1, 9: 0xf4}, denied, protect, pass},
		{"ATA hard reset", []byte{0x85, 0, 14: 0xec}, denied, protect, pass},
	} {
		for _, policy := range []struct {
			guard scsi.Guard
			want  string
		}{
			{scsi.Guard{}, test.guarded},
			{scsi.Guard{ReadOnly: true}, test.readOnly},
			{scsi.Guard{AllowUnsafe: true}, test.unsafe},
			{scsi.Guard{ReadOnly: true, AllowUnsafe: true}, test.readOnly},
		} {
			g := policy.guard
			g.LUN = scsitest.Null{}
			if got := verdict(submit(&g, test.cdb)); got != policy.want {
				t.Errorf("%s with ReadOnly %v, AllowUnsafe %v = %s; want %s",
					test.name, g.ReadOnly, g.AllowUnsafe, got, policy.want)
			}
		}
	}
}

// A short CDB is judged as if zeroes followed, and none makes the guard fail.
func TestGuardJudgesShortCDBs(t *testing.T) {
	g := &scsi.Guard{LUN: scsitest.Null{}}
	for op := range 256 {
		for n := 1; n <= 16; n++ {
			short := make([]byte, n)
			short[0] = byte(op)
			c := &scsi.Command{CDB: short, Done: func(*scsi.Command) {}}
			g.Submit(c)
			if got, want := verdict(c), verdict(submit(g, short)); got != want {
				t.Errorf("opcode %02x in %d bytes = %s; want %s", op, n, got, want)
			}
		}
	}
	c := &scsi.Command{Done: func(*scsi.Command) {}}
	g.Submit(c)
	if got := verdict(c); got != "GOOD" {
		t.Errorf("empty CDB = %s; want it passed on", got)
	}
}

func TestReadOnlyShowsInModeSense(t *testing.T) {
	for _, test := range []struct {
		name     string
		cdb      []byte
		pieces   []int // lengths of the buffers
		readOnly bool
		at       int // the device-specific parameter
		want     byte
	}{
		{"MODE SENSE(6)", []byte{0x1a, 4: 255}, []int{255}, true, 2, 0x80},
		{"MODE SENSE(6), writable", []byte{0x1a, 4: 255}, []int{255}, false, 2, 0},
		{"MODE SENSE(6) in single bytes", []byte{0x1a, 4: 4}, []int{1, 1, 1, 1}, true, 2, 0x80},
		{"MODE SENSE(6), 3 bytes", []byte{0x1a, 4: 3}, []int{255}, true, 2, 0x80},
		{"MODE SENSE(6), 2 bytes", []byte{0x1a, 4: 2}, []int{255}, true, 2, 0},
		{"MODE SENSE(10)", []byte{0x5a, 8: 255}, []int{255}, true, 3, 0x80},
		{"MODE SENSE(10) split", []byte{0x5a, 8: 255}, []int{2, 253}, true, 3, 0x80},
	} {
		g := &scsi.Guard{LUN: scsitest.NewDisk(1), ReadOnly: test.readOnly}
		var in [][]byte
		for _, n := range test.pieces {
			in = append(in, make([]byte, n))
		}
		c := submit(g, test.cdb, in...)
		var whole []byte
		for _, b := range in {
			whole = append(whole, b...)
		}
		if verdict(c) != "GOOD" || whole[test.at] != test.want {
			t.Errorf("%s = %s, device-specific parameter %#x; want GOOD, %#x", test.name, verdict(c), whole[test.at], test.want)
		}
	}
	// A failing one is left alone.
	held := scsitest.NewHeld(1)
	g := &scsi.Guard{LUN: held, ReadOnly: true}
	buf := make([]byte, 8)
	c := &scsi.Command{CDB: make([]byte, 16), DataIn: [][]byte{buf}}
	c.CDB[0] = scsi.OpModeSense6
	called := 0
	c.Done = func(*scsi.Command) { called++ }
	g.Submit(c)
	(<-held.Commands).Check(scsi.InvalidFieldInCDB)
	c.Done(c) // the submitter's own again
	if called != 2 || buf[2] != 0 {
		t.Errorf("after a refused MODE SENSE Done was called %d times, parameter %#x; want 2 with the test's own call, 0", called, buf[2])
	}
}

func TestGuardDoesNotAllocate(t *testing.T) {
	g := &scsi.Guard{LUN: scsitest.Null{}}
	c := &scsi.Command{CDB: make([]byte, 32), Done: func(*scsi.Command) {}}
	for _, op := range []byte{scsi.OpRead10, scsi.OpWrite16, scsi.OpServiceActionIn16, scsi.OpFormatUnit} {
		c.CDB[0] = op
		if n := testing.AllocsPerRun(100, func() { g.Submit(c) }); n != 0 {
			t.Errorf("opcode %02x: %v allocations; want 0", op, n)
		}
	}
}

func BenchmarkGuard(b *testing.B) {
	for _, bench := range []struct {
		name string
		lun  scsi.LUN
	}{
		{"without", scsitest.Null{}},
		{"with", &scsi.Guard{LUN: scsitest.Null{}}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			c := &scsi.Command{CDB: make([]byte, 32), Done: func(*scsi.Command) {}}
			c.CDB[0] = scsi.OpRead10
			b.ReportAllocs()
			for b.Loop() {
				bench.lun.Submit(c)
			}
		})
	}
}
