package device

import (
	"math/bits"
	"sync"
	"time"
)

// The ACPI power management block: its registers by offset and their sizes in
// bytes (ACPI 6.5, 4.8.3). The FADT tells the guest.
const (
	PMEvent       = 0 // PM1a status, and enable at half of the size
	PMEventSize   = 4
	PMControl     = 4 // PM1a control
	PMControlSize = 2
	PMTimer       = 8 // free-running, 32 bits
	PMTimerSize   = 4
	PMPorts       = 12

	// SleepTypeS5 is the SLP_TYP by which this machine powers off. The DSDT's
	// \_S5 object tells the guest.
	SleepTypeS5 = 5

	// PMTimerHz is the frequency of the PM timer.
	PMTimerHz = 3579545
)

const (
	pm1TMR    = 1 << 0
	pm1GBL    = 1 << 5
	pm1PWRBTN = 1 << 8
	pm1SLPBTN = 1 << 9
	pm1RTC    = 1 << 10

	pm1Status = pm1TMR | pm1GBL | pm1PWRBTN // write one to clear
	pm1Enable = pm1GBL | pm1PWRBTN | pm1SLPBTN | pm1RTC

	pm1SCIEn  = 1 << 0
	pm1BMRld  = 1 << 1
	pm1SlpTyp = 7 << 10
	pm1SlpEn  = 1 << 13
)

// PM is the ACPI fixed hardware: the PM1a registers, the power button and the
// PM timer. Its timer does not interrupt (TMR_EN reads as 0): the carry is
// there to be polled in TMR_STS. The events of a sleep button and of the RTC
// can be enabled, as drivers do without asking, and never come.
type PM struct {
	sci      func(level bool)
	poweroff func()
	uptime   func() time.Duration // monotonic; tests replace it

	mu      sync.Mutex
	status  uint16
	enable  uint16
	control uint16
	base    uint64 // the timer, not cut to 32 bits, at uptime 0
	carries uint64 // how often bit 31 had changed when TMR_STS was last cleared
	line    bool
}

// NewPM makes the block. sci is the level of the SCI line; poweroff is called
// each time the guest asks for S5.
func NewPM(sci func(level bool), poweroff func()) *PM {
	start := time.Now()
	return &PM{sci: sci, poweroff: poweroff, uptime: func() time.Duration { return time.Since(start) }}
}

// Reset puts all into the state after power-on, except the timer, which runs
// on.
func (d *PM) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status, d.enable, d.control = 0, 0, 0
	d.carries = d.ticks() >> 31
	d.update()
}

// PressPowerButton is what the machine's owner does to ask the guest to shut
// down.
func (d *PM) PressPowerButton() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status |= pm1PWRBTN
	d.update()
}

// ticks is the timer, not cut to 32 bits.
func (d *PM) ticks() uint64 {
	hi, lo := bits.Mul64(uint64(d.uptime()), PMTimerHz)
	n, _ := bits.Div64(hi, lo, uint64(time.Second)) // hi < PMTimerHz
	return d.base + n
}

func (d *PM) update() {
	if level := d.status&d.enable != 0; level != d.line {
		d.line = level
		d.sci(level)
	}
}

// Read answers the guest's read of len(p) ports at off.
func (d *PM) Read(off uint64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	// All bytes of one access are of one instant.
	ticks := d.ticks()
	if ticks>>31 != d.carries {
		d.status |= pm1TMR
	}
	regs := [PMPorts]byte{
		0: byte(d.status), 1: byte(d.status >> 8),
		2: byte(d.enable), 3: byte(d.enable >> 8),
		4: byte(d.control) | pm1SCIEn, 5: byte(d.control >> 8),
		6: 0xff, 7: 0xff,
		8: byte(ticks), 9: byte(ticks >> 8), 10: byte(ticks >> 16), 11: byte(ticks >> 24),
	}
	allOnes(p)
	if off < PMPorts {
		copy(p, regs[off:])
	}
}

// Write does the guest's write of len(p) ports at off.
func (d *PM) Write(off uint64, p []byte) {
	if d.write(off, p) {
		d.poweroff()
	}
}

// write reports whether the guest wants to be powered off.
func (d *PM) write(off uint64, p []byte) (s5 bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, b := range p {
		v, mask := uint16(b), uint16(0xff)
		reg := off + uint64(i)
		if reg&1 != 0 {
			v, mask = v<<8, mask<<8
		}
		switch reg &^ 1 {
		case PMEvent:
			if v&pm1TMR != 0 {
				d.carries = d.ticks() >> 31
			}
			d.status &^= v
		case PMEvent + PMEventSize/2:
			d.enable = (d.enable&^mask | v) & pm1Enable
		case PMControl:
			// SCI_EN is not the guest's to change: there is no SMI to go back
			// to. SLP_EN reads as 0.
			d.control = (d.control&^mask | v) & (pm1BMRld | pm1SlpTyp)
			s5 = s5 || v&pm1SlpEn != 0 && d.control&pm1SlpTyp == SleepTypeS5<<10
		}
	}
	d.update()
	return s5
}

// PMState is the block's state. Timer is the PM timer when it was taken, not
// cut to 32 bits; it runs on from there.
type PMState struct {
	Status, Enable, Control uint16
	Timer                   uint64
}

// State copies the state.
func (d *PM) State() PMState {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := PMState{Status: d.status, Enable: d.enable, Control: d.control, Timer: d.ticks()}
	if s.Timer>>31 != d.carries {
		s.Status |= pm1TMR
	}
	return s
}

// SetState replaces the state.
func (d *PM) SetState(s PMState) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status, d.enable, d.control = s.Status&pm1Status, s.Enable&pm1Enable, s.Control&(pm1BMRld|pm1SlpTyp)
	d.base = 0
	d.base = s.Timer - d.ticks() // may wrap around, and back in ticks
	d.carries = s.Timer >> 31
	d.line = d.status&d.enable != 0
	d.sci(d.line)
	return nil
}
