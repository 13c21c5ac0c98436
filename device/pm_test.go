package device

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"
)

type fakeUptime struct{ ns atomic.Int64 }

func (c *fakeUptime) now() time.Duration { return time.Duration(c.ns.Load()) }

func newPM(t *testing.T) (d *PM, l *line, off *int, clock *fakeUptime) {
	l, off, clock = new(line), new(int), new(fakeUptime)
	d = NewPM(l.set, func() { *off++ })
	d.uptime = clock.now
	return d, l, off, clock
}

func in16(d handler, off uint64) uint16 {
	var p [2]byte
	d.Read(off, p[:])
	return binary.LittleEndian.Uint16(p[:])
}

func in32(d handler, off uint64) uint32 {
	var p [4]byte
	d.Read(off, p[:])
	return binary.LittleEndian.Uint32(p[:])
}

func out16(d handler, off uint64, v uint16) { d.Write(off, binary.LittleEndian.AppendUint16(nil, v)) }

func TestPMPowerButton(t *testing.T) {
	d, l, _, _ := newPM(t)
	d.PressPowerButton()
	if level, _ := l.get(); level {
		t.Error("SCI while the event is not enabled")
	}
	out16(d, PMEvent+2, 0xffff)
	if got := in16(d, PMEvent+2); got != pm1Enable {
		t.Errorf("PM1 enable = %#x; want %#x", got, pm1Enable)
	}
	if level, _ := l.get(); !level {
		t.Error("no SCI for a pressed button")
	}
	if got := in16(d, PMEvent); got != pm1PWRBTN {
		t.Errorf("PM1 status = %#x; want %#x", got, pm1PWRBTN)
	}
	out16(d, PMEvent, ^uint16(pm1PWRBTN))
	if in16(d, PMEvent) != pm1PWRBTN {
		t.Error("writing zero to the status bit cleared it")
	}
	d.Write(PMEvent+1, []byte{pm1PWRBTN >> 8}) // a byte is enough
	if in16(d, PMEvent) != 0 {
		t.Error("writing one to the status bit did not clear it")
	}
	if level, _ := l.get(); level {
		t.Error("SCI after the event was cleared")
	}
}

func TestPMSleep(t *testing.T) {
	for _, test := range []struct {
		name   string
		writes func(d *PM)
		offs   int
	}{
		{"S5", func(d *PM) { out16(d, PMControl, SleepTypeS5<<10|pm1SlpEn) }, 1},
		{"S5 in two writes, as ACPICA does", func(d *PM) {
			out16(d, PMControl, SleepTypeS5<<10)
			out16(d, PMControl, SleepTypeS5<<10|pm1SlpEn)
		}, 1},
		{"S5 by the high byte", func(d *PM) { d.Write(PMControl+1, []byte{(SleepTypeS5<<10 | pm1SlpEn) >> 8}) }, 1},
		{"S5 by four bytes from the enable register", func(d *PM) { d.Write(PMEvent+2, []byte{0, 0, 0, 0x34}) }, 1},
		{"S3", func(d *PM) { out16(d, PMControl, 1<<10|pm1SlpEn) }, 0},
		{"no SLP_EN", func(d *PM) { out16(d, PMControl, SleepTypeS5<<10) }, 0},
		{"bit 13 of another register", func(d *PM) { out16(d, PMEvent+2, SleepTypeS5<<10|pm1SlpEn) }, 0},
	} {
		d, _, offs, _ := newPM(t)
		test.writes(d)
		if *offs != test.offs {
			t.Errorf("%s: %d poweroffs; want %d", test.name, *offs, test.offs)
		}
		if got := in16(d, PMControl); got&pm1SCIEn == 0 || got&pm1SlpEn != 0 {
			t.Errorf("%s: PM1 control = %#x; want SCI_EN set and SLP_EN clear", test.name, got)
		}
	}
}

func TestPMTimer(t *testing.T) {
	d, _, _, clock := newPM(t)
	for _, test := range []struct {
		uptime time.Duration
		want   uint32
	}{
		{0, 0}, {time.Second, PMTimerHz}, {time.Millisecond, 3579}, {280 * time.Nanosecond, 1},
		{1200 * time.Second, uint32(1200 * PMTimerHz % (1 << 32))},
		{100 * 365 * 24 * time.Hour, uint32(100 * 365 * 24 * 3600 * PMTimerHz % (1 << 32))},
	} {
		clock.ns.Store(int64(test.uptime))
		if got := in32(d, PMTimer); got != test.want {
			t.Errorf("timer at %v = %#x; want %#x", test.uptime, got, test.want)
		}
	}
}

// TMR_STS is set when bit 31 changes, and stays until it is cleared.
func TestPMTimerCarry(t *testing.T) {
	d, l, _, clock := newPM(t)
	out16(d, PMEvent+2, pm1TMR)
	half := time.Duration((1<<31)*uint64(time.Second)/PMTimerHz) + 1
	for i, want := range []uint16{0, pm1TMR, pm1TMR} {
		clock.ns.Store(int64(half) * int64(i))
		if got := in16(d, PMEvent); got != want {
			t.Errorf("PM1 status %d half rounds after the start = %#x; want %#x", i, got, want)
		}
	}
	out16(d, PMEvent, pm1TMR)
	if got := in16(d, PMEvent); got != 0 {
		t.Errorf("PM1 status after TMR_STS was cleared = %#x; want 0", got)
	}
	if _, rises := l.get(); rises != 0 {
		t.Errorf("the timer interrupted %d times; want 0", rises)
	}
}

func TestPMOddAccess(t *testing.T) {
	d, _, _, clock := newPM(t)
	clock.ns.Store(int64(time.Second)) // 0x00369e99
	for _, test := range []struct {
		off   uint64
		width int
		want  []byte
	}{
		{PMControl, 4, []byte{1, 0, 0xff, 0xff}}, {PMTimer + 1, 2, []byte{0x9e, 0x36}},
		{PMTimer + 3, 4, []byte{0, 0xff, 0xff, 0xff}}, {PMPorts, 1, []byte{0xff}}, {^uint64(0), 1, []byte{0xff}},
	} {
		got := make([]byte, test.width)
		d.Read(test.off, got)
		if string(got) != string(test.want) {
			t.Errorf("Read(%d, %d bytes) = % x; want % x", test.off, test.width, got, test.want)
		}
		d.Write(test.off, got)
	}
}

func TestPMStateMoves(t *testing.T) {
	d, _, _, clock := newPM(t)
	clock.ns.Store(int64(700 * time.Second)) // past a carry
	out16(d, PMEvent+2, pm1PWRBTN)
	out16(d, PMControl, SleepTypeS5<<10|pm1BMRld)
	d.PressPowerButton()
	s := d.State()

	to, l, offs, clock2 := newPM(t)
	clock2.ns.Store(int64(time.Hour))
	if err := to.SetState(s); err != nil {
		t.Fatal(err)
	}
	if got := to.State(); got != s {
		t.Errorf("state after the move = %+v; want %+v", got, s)
	}
	if level, _ := l.get(); !level {
		t.Error("SCI is low after the move with a pressed button")
	}
	clock2.ns.Add(int64(time.Second))
	if got, want := in32(to, PMTimer), uint32(701*PMTimerHz%(1<<32)); got != want {
		t.Errorf("timer a second after the move = %d; want %d", got, want)
	}
	if *offs != 0 {
		t.Error("loading a state powered off")
	}
	to.Reset()
	if level, _ := l.get(); level || in16(to, PMEvent) != 0 || in16(to, PMEvent+2) != 0 {
		t.Error("an event survived the reset")
	}
}
