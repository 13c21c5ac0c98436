package device

import (
	"sync/atomic"
	"testing"
	"time"
)

type fakeClock struct{ ns atomic.Int64 }

func (c *fakeClock) now() time.Time      { return time.Unix(0, c.ns.Load()) }
func (c *fakeClock) set(t time.Time)     { c.ns.Store(t.UnixNano()) }
func (c *fakeClock) add(d time.Duration) { c.ns.Add(int64(d)) }

// Early afternoon on a Sunday, in the middle of a second.
var someTime = time.Date(2026, time.November, 22, 14, 38, 57, 250e6, time.UTC)

func newRTC(t testing.TB) (*RTC, *line, *fakeClock) {
	l, c := new(line), new(fakeClock)
	r := NewRTC(6<<30, 0, l.set)
	t.Cleanup(r.Close)
	c.set(someTime)
	r.mu.Lock()
	r.now = c.now
	r.seen = someTime.Unix()
	r.mu.Unlock()
	return r, l, c
}

func rtcIn(r *RTC, index byte) byte {
	out(r, 0, index)
	return in(r, 1)
}

func rtcOut(r *RTC, index, v byte) {
	out(r, 0, index)
	out(r, 1, v)
}

// readTime reads the clock as Linux does: UIP first.
func readTime(r *RTC) [8]byte {
	rtcIn(r, rtcA)
	var got [8]byte
	for i, index := range []byte{RTCCentury, rtcYear, rtcMonth, rtcDay, rtcHours, rtcMinutes, rtcSeconds, rtcWeekday} {
		got[i] = rtcIn(r, index)
	}
	return got
}

func TestRTCShowsTheTime(t *testing.T) {
	for _, test := range []struct {
		name string
		b    byte
		time time.Time
		want [8]byte // century, year, month, day, hours, minutes, seconds, weekday
	}{
		{"BCD", rtcB24h, someTime, [8]byte{0x20, 0x26, 0x11, 0x22, 0x14, 0x38, 0x57, 1}},
		{"binary", rtcB24h | rtcBBinary, someTime, [8]byte{20, 26, 11, 22, 14, 38, 57, 1}},
		{"BCD, 12 hours", 0, someTime, [8]byte{0x20, 0x26, 0x11, 0x22, 0x82, 0x38, 0x57, 1}},
		{"12 hours, midnight", 0, time.Date(2000, 2, 29, 0, 0, 0, 0, time.UTC), [8]byte{0x20, 0, 2, 0x29, 0x12, 0, 0, 3}},
		{"12 hours, noon", rtcBBinary, time.Date(1999, 12, 31, 12, 59, 59, 0, time.UTC), [8]byte{19, 99, 12, 31, 0x8c, 59, 59, 6}},
		{"12 hours, 11 at night", 0, time.Date(1999, 12, 31, 23, 0, 0, 0, time.UTC), [8]byte{0x19, 0x99, 0x12, 0x31, 0x91, 0, 0, 6}},
	} {
		r, _, c := newRTC(t)
		c.set(test.time)
		rtcOut(r, rtcB, test.b)
		if got := readTime(r); got != test.want {
			t.Errorf("%s: clock shows %x; want %x", test.name, got, test.want)
		}
		// Writing it back changes nothing.
		before := r.clock()
		for i, index := range []byte{RTCCentury, rtcYear, rtcMonth, rtcDay, rtcHours, rtcMinutes, rtcSeconds} {
			rtcOut(r, index, test.want[i])
		}
		if got := r.clock(); !got.Equal(before) {
			t.Errorf("%s: clock is %v after its own time was written; want %v", test.name, got, before)
		}
	}
}

// Linux sets the clock with updates inhibited and the divider in reset, and
// expects the next second half a second after it lets go.
func TestRTCIsSetAsLinuxDoes(t *testing.T) {
	r, _, c := newRTC(t)
	b, a := rtcIn(r, rtcB), rtcIn(r, rtcA)
	rtcOut(r, rtcB, b|rtcBSet)
	rtcOut(r, rtcA, a|0x70)
	for _, set := range []struct{ index, v byte }{
		{rtcYear, 0x24}, {rtcMonth, 0x02}, {rtcDay, 0x29}, {rtcHours, 0x23}, {rtcMinutes, 0x59}, {rtcSeconds, 0x59}, {RTCCentury, 0x20},
	} {
		rtcOut(r, set.index, set.v)
		c.add(time.Millisecond)
	}
	c.add(time.Hour) // nothing moves meanwhile
	if got, want := readTime(r), [8]byte{0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x59, 1}; got != want {
		t.Errorf("stopped clock shows %x; want %x", got, want)
	}
	rtcOut(r, rtcB, b)
	rtcOut(r, rtcA, a)
	c.add(499 * time.Millisecond)
	if got := rtcIn(r, rtcSeconds); got != 0x59 {
		t.Errorf("seconds 499 ms after the divider ran = %x; want 59", got)
	}
	c.add(2 * time.Millisecond)
	if got, want := readTime(r), [8]byte{0x20, 0x24, 0x03, 0x01, 0, 0, 0, 6}; got != want {
		t.Errorf("clock shows %x; want %x", got, want)
	}
}

// With SET alone the divider runs on: the fraction of the second stays.
func TestRTCSetKeepsTheFraction(t *testing.T) {
	r, _, c := newRTC(t)
	rtcOut(r, rtcB, rtcB24h|rtcBSet)
	c.add(3 * time.Second)
	rtcOut(r, rtcB, rtcB24h)
	if got, want := r.clock(), someTime; !got.Equal(want) {
		t.Errorf("clock that stood still for 3 s is %v; want %v", got, want)
	}
}

func TestRTCNonsenseDates(t *testing.T) {
	r, _, _ := newRTC(t)
	for _, v := range []byte{0, 0xff, 0xa5, 0x7f} {
		for _, b := range []byte{0, rtcB24h, rtcBBinary, rtcB24h | rtcBBinary} {
			rtcOut(r, rtcB, b|rtcBSet)
			for index := range byte(10) {
				rtcOut(r, index, v)
			}
			rtcOut(r, RTCCentury, v)
			rtcOut(r, rtcB, b|rtcBAIE)
			readTime(r)
			r.tick()
			rtcIn(r, rtcC)
		}
	}
}

// UIP is set for 2228 us before each second, and after it was read as clear
// the registers are consistent, however long the guest takes.
func TestRTCUpdateInProgress(t *testing.T) {
	r, _, c := newRTC(t)
	second := time.Date(2026, 12, 31, 23, 59, 59, 0, time.UTC)
	for _, test := range []struct {
		frac time.Duration
		uip  byte
	}{
		{0, 0}, {500 * time.Millisecond, 0}, {time.Second - 2229*time.Microsecond, 0},
		{time.Second - 2228*time.Microsecond, rtcAUIP}, {time.Second - 1, rtcAUIP},
	} {
		c.set(second.Add(test.frac))
		if got := rtcIn(r, rtcA) & rtcAUIP; got != test.uip {
			t.Errorf("UIP %v into the second = %#x; want %#x", test.frac, got, test.uip)
		}
	}
	c.set(second.Add(997 * time.Millisecond))
	if rtcIn(r, rtcA)&rtcAUIP != 0 {
		t.Fatal("UIP 3 ms before the update")
	}
	got := [3]byte{}
	for i, index := range []byte{rtcYear, rtcHours, rtcSeconds} {
		got[i] = rtcIn(r, index)
		c.add(2 * time.Millisecond)
	}
	if want := [3]byte{0x26, 0x23, 0x59}; got != want {
		t.Errorf("year, hour, second read over 4 ms across an update = %x; want %x", got, want)
	}
	c.add(10 * time.Millisecond)
	if got := rtcIn(r, rtcYear); got != 0x27 {
		t.Errorf("year 13 ms into the next = %x; want 27", got)
	}
}

func TestRTCUpdateInterrupt(t *testing.T) {
	r, l, c := newRTC(t)
	c.add(time.Second)
	if got := rtcIn(r, rtcC); got != rtcCUF {
		t.Errorf("C after a second = %#x; want UF alone", got)
	}
	if got := rtcIn(r, rtcC); got != 0 {
		t.Errorf("C read again = %#x; want 0", got)
	}
	rtcOut(r, rtcB, rtcB24h|rtcBUIE)
	r.tick()
	if level, _ := l.get(); level {
		t.Error("interrupt before the second is over")
	}
	c.add(time.Second)
	r.tick()
	if level, _ := l.get(); !level {
		t.Error("no interrupt after a second")
	}
	if got := rtcIn(r, rtcC); got != rtcCIRQ|rtcCUF {
		t.Errorf("C = %#x; want %#x", got, rtcCIRQ|rtcCUF)
	}
	if level, _ := l.get(); level {
		t.Error("line is high after C was read")
	}
	rtcOut(r, rtcB, rtcB24h|rtcBUIE|rtcBSet)
	if got := rtcIn(r, rtcB); got != rtcB24h|rtcBSet {
		t.Errorf("B with SET = %#x; want UIE cleared", got)
	}
}

// The interrupt comes by itself, from the host's clock.
func TestRTCTicksByItself(t *testing.T) {
	rang := make(chan bool, 1)
	r := NewRTC(1<<30, 0, func(level bool) {
		if level {
			rang <- true
		}
	})
	defer r.Close()
	rtcOut(r, rtcB, rtcB24h|rtcBUIE)
	<-rang
	if got := rtcIn(r, rtcC); got != rtcCIRQ|rtcCUF {
		t.Errorf("C = %#x; want %#x", got, rtcCIRQ|rtcCUF)
	}
	now := time.Now().UTC()
	if got := number(rtcB24h, int(rtcIn(r, rtcHours))); got != now.Hour() && got != (now.Hour()+23)%24 {
		t.Errorf("hour = %d; want %d", got, now.Hour())
	}
}

func TestRTCAlarm(t *testing.T) {
	for _, test := range []struct {
		name    string
		b       byte
		h, m, s byte
		after   time.Duration // the first alarm
	}{
		{"exact", rtcB24h, 0x14, 0x39, 0x02, 5 * time.Second},
		{"exact, 12 hours", 0, 0x82, 0x39, 0x02, 5 * time.Second},
		{"each minute", rtcB24h, 0xff, 0xc0, 0x00, 3 * time.Second},
		{"each second", rtcB24h, 0xff, 0xff, 0xff, time.Second},
		{"binary", rtcB24h | rtcBBinary, 14, 39, 0, 3 * time.Second},
		{"tomorrow", rtcB24h, 0x14, 0x38, 0x57, 24 * time.Hour},
	} {
		r, l, c := newRTC(t)
		rtcOut(r, rtcB, test.b|rtcBAIE)
		rtcOut(r, rtcHours+1, test.h)
		rtcOut(r, rtcMinutes+1, test.m)
		rtcOut(r, rtcSeconds+1, test.s)
		c.add(test.after - time.Second)
		r.tick()
		if level, _ := l.get(); level {
			t.Errorf("%s: alarm a second early", test.name)
		}
		c.add(time.Second)
		r.tick()
		if level, _ := l.get(); !level {
			t.Errorf("%s: no alarm", test.name)
		}
		if got := rtcIn(r, rtcC); got != rtcCIRQ|rtcCAF|rtcCUF {
			t.Errorf("%s: C = %#x; want %#x", test.name, got, rtcCIRQ|rtcCAF|rtcCUF)
		}
	}
}

// What is skipped on the way to the alarm is never a second that it is set to.
func TestRTCAlarmSkipsNone(t *testing.T) {
	r, _, _ := newRTC(t)
	for _, alarm := range [][3]byte{{14, 38, 57}, {0, 0, 0}, {23, 59, 59}, {0xff, 5, 0}, {7, 0xff, 30}, {0xff, 0xff, 59}, {24, 0, 0}, {0xc0, 60, 0xff}} {
		r.ram[rtcB] = rtcB24h | rtcBBinary
		r.ram[rtcHours+1], r.ram[rtcMinutes+1], r.ram[rtcSeconds+1] = alarm[0], alarm[1], alarm[2]
		for second, next := 0, 0; second < 24*3600; second++ {
			h, m, s := second/3600, second/60%60, second%60
			want := (alarm[0] >= 0xc0 || h == int(alarm[0])) && (alarm[1] >= 0xc0 || m == int(alarm[1])) && (alarm[2] >= 0xc0 || s == int(alarm[2]))
			wait := r.alarmIn(second)
			if (wait == 0) != want || want && second < next {
				t.Fatalf("alarm %v: alarmIn(%02d:%02d:%02d) = %d, skipped up to %d; want a match %v", alarm, h, m, s, wait, next, want)
			}
			next = max(next, second+wait)
		}
	}
}

func TestRTCMemory(t *testing.T) {
	for _, test := range []struct {
		low, high uint64
		want      map[byte]byte
	}{
		{256 << 20, 0, map[byte]byte{0x15: 0x80, 0x16: 2, 0x17: 0xff, 0x18: 0xff, 0x30: 0xff, 0x31: 0xff, 0x34: 0x00, 0x35: 0x0f, 0x5b: 0}},
		{3 << 30, 2 << 30, map[byte]byte{0x34: 0, 0x35: 0xbf, 0x5b: 0, 0x5c: 0x80, 0x5d: 0}},
		{2 << 20, 0, map[byte]byte{0x17: 0, 0x18: 4, 0x34: 0, 0x35: 0}},
		{512 << 10, 0, map[byte]byte{0x17: 0, 0x18: 0}},
	} {
		r := NewRTC(test.low, test.high, func(bool) {})
		for index, want := range test.want {
			if got := rtcIn(r, index); got != want {
				t.Errorf("RAM %#x+%#x: byte %#x = %#x; want %#x", test.low, test.high, index, got, want)
			}
		}
		rtcOut(r, 0x7f, 0x5a)
		rtcOut(r, rtcC, 0xff)
		rtcOut(r, rtcD, 0)
		check(t, "memory", rtcIn(r, 0x7f), 0x5a)
		check(t, "memory by an index with the NMI mask", rtcIn(r, 0xff), 0x5a)
		check(t, "D", rtcIn(r, rtcD), rtcDValid)
		check(t, "index register", in(r, 0), 0xff)
		r.Reset()
		check(t, "memory after a reset", rtcIn(r, 0x7f), 0x5a)
	}
}

func TestRTCStateMoves(t *testing.T) {
	r, _, c := newRTC(t)
	rtcOut(r, rtcB, rtcB24h|rtcBUIE)
	rtcOut(r, rtcHours, 0x03) // 11 hours and 38 minutes behind
	rtcOut(r, rtcMinutes, 0x00)
	rtcOut(r, 0x40, 0x5a)
	c.add(time.Second)
	r.tick()
	s := r.State()

	to, l, _ := newRTC(t)
	if err := to.SetState(s); err != nil {
		t.Fatal(err)
	}
	if got := to.State(); got != s {
		t.Errorf("state after the move = %+v; want %+v", got, s)
	}
	if level, _ := l.get(); !level {
		t.Error("line is low after the move with a pending interrupt")
	}
	check(t, "C", rtcIn(to, rtcC), rtcCIRQ|rtcCUF)
	if got, want := readTime(to), [8]byte{0x20, 0x26, 0x11, 0x22, 0x03, 0x00, 0x57, 1}; got != want {
		t.Errorf("clock after the move shows %x; want %x", got, want)
	}
	check(t, "memory", rtcIn(to, 0x40), 0x5a)

	// Half-way through being set, it moves too.
	rtcOut(r, rtcB, rtcB24h|rtcBSet)
	rtcOut(r, rtcYear, 0x99)
	to.SetState(r.State())
	rtcOut(to, rtcB, rtcB24h)
	check(t, "year set across the move", rtcIn(to, rtcYear), 0x99)
}

// FuzzRTC lets a guest do anything to the clock while time goes in any steps.
func FuzzRTC(f *testing.F) {
	f.Add([]byte{rtcB, rtcBSet, 0, 0xff, rtcB, 2, 0xc0, 9})
	f.Add([]byte{rtcA, 0x70, rtcB, rtcBAIE, 1, 0xc0, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, ops []byte) {
		r, l, c := newRTC(t)
		for len(ops) >= 2 {
			op, v := ops[0], ops[1]
			ops = ops[2:]
			switch {
			case op == 0xff:
				if err := r.SetState(r.State()); err != nil {
					t.Fatalf("SetState(State()) = %v", err)
				}
			case op >= 0xf0:
				var p [4]byte
				r.Read(uint64(v%3), p[:1<<(op%3)])
				r.Write(uint64(v%3), p[:1<<(op%3)])
			case op >= 0x80:
				c.add(time.Duration(int8(v)) << (op & 0x3f))
				r.tick()
			default:
				rtcOut(r, op, v)
			}
			rtcIn(r, op)
			rtcIn(r, rtcA)
			pending := r.flags&r.ram[rtcB]&(rtcBAIE|rtcBUIE) != 0
			if level, _ := l.get(); level != pending {
				t.Fatalf("after %#x %#x: line %v, flags %#x, B %#x", op, v, level, r.flags, r.ram[rtcB])
			}
		}
		r.Close() // also the timer
	})
}
