package device

import (
	"sync"
	"time"
)

// RTCPorts is the number of I/O ports of the RTC: index and data.
const RTCPorts = 2

// RTCCentury is the index of the century. The FADT tells the guest.
const RTCCentury = 0x32

// Registers of the MC146818 by index.
const (
	rtcSeconds  = 0
	rtcMinutes  = 2
	rtcHours    = 4
	rtcWeekday  = 6 // 1 is Sunday
	rtcDay      = 7
	rtcMonth    = 8
	rtcYear     = 9
	rtcA        = 10
	rtcB        = 11
	rtcC        = 12
	rtcD        = 13
	rtcSize     = 128 // clock and battery-backed memory
	rtcAlarmOff = 1   // from seconds, minutes and hours to their alarm
)

const (
	rtcAUIP     = 1 << 7
	rtcADivider = 6 << 4 // both bits set: the divider chain is held in reset

	rtcBSet    = 1 << 7
	rtcBAIE    = 1 << 5
	rtcBUIE    = 1 << 4
	rtcBBinary = 1 << 2
	rtcB24h    = 1 << 1

	rtcCIRQ = 1 << 7
	rtcCAF  = 1 << 5
	rtcCUF  = 1 << 4

	rtcDValid = 1 << 7 // the battery is fine
)

const (
	// An update is announced 244 us before it begins and takes 1984 us; the
	// new second is there when it ends.
	rtcUpdate = 2228 * time.Microsecond

	// With UIP clear the chip promises 244 us of stable registers. The exits
	// of a guest that reads them one by one can take longer, so for the guest
	// the clock stands still that much longer after UIP was read as clear.
	rtcStable = 10 * time.Millisecond
)

// RTC is an MC146818 real-time clock with 114 bytes of memory behind it. It
// shows the host's UTC, plus whatever the guest has set it apart.
//
// The alarm and the update-ended interrupt work. The periodic interrupt and
// the square wave do not exist: their enable bits read as 0.
type RTC struct {
	irq func(level bool)
	now func() time.Time // tests replace it

	mu     sync.Mutex
	index  byte
	ram    [rtcSize]byte // the time only while the clock is stopped; B in its place
	offset time.Duration // the guest's time minus the host's
	flags  byte          // of register C, rtcCIRQ excepted
	seen   int64         // the guest's second, in Unix time, up to which flags is right
	latch  time.Time     // the guest's time when UIP was last read as clear
	timer  *time.Timer   // runs while an interrupt is enabled
	line   bool
	closed bool
}

// NewRTC makes a clock that drives irq, with the amount of RAM below and above
// 4 GiB, in bytes, where a BIOS leaves it. Close ends its timer.
func NewRTC(lowRAM, highRAM uint64, irq func(level bool)) *RTC {
	r := &RTC{irq: irq, now: time.Now}
	r.ram[rtcA] = 0x26 // divider for a 32,768 Hz crystal
	r.ram[rtcB] = rtcB24h
	r.seen = r.clock().Unix()
	store := func(index int, bytes int, v uint64) {
		for i := range bytes {
			r.ram[index+i] = byte(v >> (8 * i))
		}
	}
	const kib, chunk = 1 << 10, 64 << 10
	store(0x15, 2, 640) // base memory in KiB
	extended := min(sub(lowRAM, 1<<20)/kib, 0xffff)
	store(0x17, 2, extended)                    // from 1 MiB, in KiB
	store(0x30, 2, extended)                    // the same, as found by the BIOS
	store(0x34, 2, sub(lowRAM, 16<<20)/chunk)   // from 16 MiB, in 64 KiB
	store(0x5b, 3, min(highRAM/chunk, 1<<24-1)) // from 4 GiB, in 64 KiB
	return r
}

// sub is a-b, or 0 where that is negative.
func sub(a, b uint64) uint64 { return a - min(a, b) }

// Reset does what the chip's reset line does: interrupts off, time and memory
// untouched.
func (r *RTC) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.index = 0
	r.flags = 0
	r.setB(r.ram[rtcB] &^ (rtcBAIE | rtcBUIE))
	r.update()
}

// Close ends the timer; no interrupt comes after it.
func (r *RTC) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.arm()
}

// Read answers the guest's read of len(p) ports at off.
func (r *RTC) Read(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	allOnes(p) // the index register cannot be read
	if i := 1 - off; i < uint64(len(p)) {
		p[i] = r.read(r.index)
	}
}

// Write does the guest's write of len(p) ports at off.
func (r *RTC) Write(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, v := range p {
		switch off + uint64(i) {
		case 0:
			r.index = v % rtcSize // bit 7 masks NMIs, of which there are none
		case 1:
			r.write(r.index, v)
		}
	}
}

// stopped: the registers hold the time that the guest is setting.
func (r *RTC) stopped() bool {
	return r.ram[rtcB]&rtcBSet != 0 || r.ram[rtcA]&rtcADivider == rtcADivider
}

func (r *RTC) clock() time.Time { return r.now().Add(r.offset).UTC() }

func isTime(index byte) bool {
	switch index {
	case rtcSeconds, rtcMinutes, rtcHours, rtcWeekday, rtcDay, rtcMonth, rtcYear, RTCCentury:
		return true
	}
	return false
}

func (r *RTC) read(index byte) byte {
	switch {
	case isTime(index):
		if r.stopped() {
			return r.ram[index]
		}
		t := r.clock()
		if age := t.Sub(r.latch); age >= 0 && age < rtcStable {
			t = r.latch
		}
		return r.encode(t)[index]
	case index == rtcA:
		a := r.ram[rtcA]
		if r.stopped() {
			return a
		}
		t := r.clock()
		if time.Duration(t.Nanosecond()) >= time.Second-rtcUpdate {
			r.latch = time.Time{}
			return a | rtcAUIP
		}
		r.latch = t
		return a
	case index == rtcC:
		r.refresh()
		c := r.flags
		if r.line {
			c |= rtcCIRQ
		}
		r.flags = 0
		r.update()
		return c
	case index == rtcD:
		return rtcDValid
	}
	return r.ram[index]
}

func (r *RTC) write(index, v byte) {
	switch {
	case isTime(index):
		r.refresh()
		if r.stopped() {
			r.ram[index] = v
			break
		}
		t := r.clock()
		regs := r.encode(t)
		regs[index] = v
		r.set(regs, time.Duration(t.Nanosecond()))
	case index == rtcA:
		r.refresh()
		was, held := r.stopped(), r.ram[rtcA]&rtcADivider == rtcADivider
		if !was {
			r.hold()
		}
		r.ram[rtcA] = v &^ rtcAUIP
		if !r.stopped() && was {
			frac := time.Duration(r.clock().Nanosecond())
			if held {
				frac = time.Second / 2 // the first update comes half a second after the reset
			}
			r.set(r.ram, frac)
		}
	case index == rtcB:
		r.refresh()
		r.setB(v)
	case index == rtcC, index == rtcD: // read-only
	default:
		r.refresh() // an alarm may be about to change
		r.ram[index] = v
	}
	r.update()
}

func (r *RTC) setB(v byte) {
	was := r.stopped()
	if !was {
		r.hold()
	}
	if v&rtcBSet != 0 {
		v &^= rtcBUIE // setting the time ends update interrupts
	}
	r.ram[rtcB] = v & (rtcBSet | rtcBAIE | rtcBUIE | rtcBBinary | rtcB24h)
	if was && !r.stopped() {
		r.set(r.ram, time.Duration(r.clock().Nanosecond()))
	}
}

// hold puts the current time into the registers, where the guest finds it
// should the clock stop.
func (r *RTC) hold() { r.ram = r.encode(r.clock()) }

// encode returns the registers with t in them.
func (r *RTC) encode(t time.Time) [rtcSize]byte {
	regs, b := r.ram, r.ram[rtcB]
	put := func(index byte, v int) {
		if b&rtcBBinary == 0 {
			v = v/10<<4 | v%10
		}
		regs[index] = byte(v)
	}
	put(rtcSeconds, t.Second())
	put(rtcMinutes, t.Minute())
	if b&rtcB24h != 0 {
		put(rtcHours, t.Hour())
	} else {
		put(rtcHours, (t.Hour()+11)%12+1)
		if t.Hour() >= 12 {
			regs[rtcHours] |= 1 << 7
		}
	}
	put(rtcWeekday, int(t.Weekday())+1)
	put(rtcDay, t.Day())
	put(rtcMonth, int(t.Month()))
	put(rtcYear, t.Year()%100)
	put(RTCCentury, t.Year()/100)
	return regs
}

// field is one register of regs as a number.
func field(regs *[rtcSize]byte, index byte) int {
	v := int(regs[index])
	if index == rtcHours || index == rtcHours+rtcAlarmOff {
		if regs[rtcB]&rtcB24h == 0 {
			pm := v >> 7 * 12
			return number(regs[rtcB], v&0x7f)%12 + pm
		}
	}
	return number(regs[rtcB], v)
}

func number(b byte, v int) int {
	if b&rtcBBinary == 0 {
		return v>>4*10 + v&0xf
	}
	return v
}

// set makes the clock run from the time in regs plus frac. A date that does
// not exist is the one that its excess leads to. The weekday follows from the
// date.
func (r *RTC) set(regs [rtcSize]byte, frac time.Duration) {
	t := time.Date(
		field(&regs, RTCCentury)*100+field(&regs, rtcYear), time.Month(field(&regs, rtcMonth)), field(&regs, rtcDay),
		field(&regs, rtcHours), field(&regs, rtcMinutes), field(&regs, rtcSeconds), int(frac), time.UTC)
	r.offset = t.Sub(r.now())
	r.latch = time.Time{}
	r.seen = t.Unix()
}

// refresh sets the flags of the updates since it was last called.
func (r *RTC) refresh() {
	if r.stopped() {
		return
	}
	t := r.clock()
	now := t.Unix()
	if now == r.seen {
		return
	}
	r.flags |= rtcCUF
	const day = 24 * 60 * 60
	for s := max(r.seen+1, now-day+1); s <= now; {
		wait := r.alarmIn(int((s%day + day) % day))
		if wait == 0 {
			r.flags |= rtcCAF
			break
		}
		s += int64(wait)
	}
	r.seen = now
}

// alarmIn is 0 if the alarm is set to a second of the day, and else after how
// many seconds it is worth asking again. An alarm byte of C0 or more matches
// always.
func (r *RTC) alarmIn(second int) int {
	for _, part := range [...]struct {
		index       byte
		value, wait int
	}{
		{rtcHours, second / 3600, 3600 - second%3600},
		{rtcMinutes, second / 60 % 60, 60 - second%60},
		{rtcSeconds, second % 60, 1},
	} {
		index := part.index + rtcAlarmOff
		if r.ram[index] < 0xc0 && field(&r.ram, index) != part.value {
			return part.wait
		}
	}
	return 0
}

// update drives the line and the timer to what the registers say.
func (r *RTC) update() {
	// The enable bits of B are where C has the flags.
	if level := r.flags&r.ram[rtcB]&(rtcBAIE|rtcBUIE) != 0; level != r.line {
		r.line = level
		r.irq(level)
	}
	r.arm()
}

// arm lets the timer run to the next second if that can bring an interrupt.
func (r *RTC) arm() {
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
	if r.closed || r.line || r.stopped() || r.ram[rtcB]&(rtcBAIE|rtcBUIE) == 0 {
		return
	}
	r.timer = time.AfterFunc(time.Second-time.Duration(r.clock().Nanosecond()), r.tick)
}

func (r *RTC) tick() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.refresh()
	r.update()
}

// RTCState is the clock's state. RAM holds the memory, the alarm and register
// B, and the time only while the guest is setting it.
type RTCState struct {
	Index  byte
	Flags  byte
	RAM    [rtcSize]byte
	Offset time.Duration // the guest's time minus UTC
	Seen   int64         // the second up to which Flags is right, in the guest's Unix time
}

// State copies the state.
func (r *RTC) State() RTCState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return RTCState{Index: r.index, Flags: r.flags, RAM: r.ram, Offset: r.offset, Seen: r.seen}
}

// SetState replaces the state.
func (r *RTC) SetState(s RTCState) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.index, r.flags, r.ram = s.Index%rtcSize, s.Flags&(rtcCAF|rtcCUF), s.RAM
	r.ram[rtcA] &^= rtcAUIP
	r.ram[rtcB] &= rtcBSet | rtcBAIE | rtcBUIE | rtcBBinary | rtcB24h
	r.offset, r.seen, r.latch = s.Offset, s.Seen, time.Time{}
	r.line = r.flags&r.ram[rtcB] != 0
	r.irq(r.line)
	r.arm()
	return nil
}
