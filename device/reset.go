package device

import "sync"

// Reset requests come by port CF9, which the FADT names, and by the keyboard
// controller's command port, which older software tries.

const (
	cf9SysRst = 1 << 1 // hard instead of soft: the same here
	cf9RstCPU = 1 << 2 // the reset happens when this becomes 1
	cf9Full   = 1 << 3 // power cycle: the same here

	// ResetValue is what the guest writes to port CF9 to reset the machine.
	// The FADT tells it.
	ResetValue = cf9SysRst | cf9RstCPU
)

// ResetControl is the chip set's reset control register, one port.
type ResetControl struct {
	reset func()

	mu  sync.Mutex
	reg byte
}

// NewResetControl makes the register; reset is called when the guest asks for
// it.
func NewResetControl(reset func()) *ResetControl { return &ResetControl{reset: reset} }

// Reset puts the register into its state after power-on.
func (d *ResetControl) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reg = 0
}

// Read answers the guest's read of len(p) ports at off.
func (d *ResetControl) Read(off uint64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	allOnes(p)
	if off == 0 && len(p) > 0 {
		p[0] = d.reg
	}
}

// Write does the guest's write of len(p) ports at off.
func (d *ResetControl) Write(off uint64, p []byte) {
	if off == 0 && len(p) > 0 && d.write(p[0]) {
		d.reset()
	}
}

func (d *ResetControl) write(v byte) (reset bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	reset = v&^d.reg&cf9RstCPU != 0
	d.reg = v & (cf9SysRst | cf9RstCPU | cf9Full)
	return reset
}

// State is the register's value.
func (d *ResetControl) State() byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.reg
}

// SetState sets the register's value; it resets nothing.
func (d *ResetControl) SetState(v byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reg = v & (cf9SysRst | cf9RstCPU | cf9Full)
}

// KeyboardReset is the one command of a keyboard controller that this machine
// has, FE: pulse the reset line. Its port, 64, reads as if nothing were there,
// and the FADT says that there is no keyboard controller. It has no state.
type KeyboardReset struct{ reset func() }

// NewKeyboardReset makes the port; reset is called when the guest asks for it.
func NewKeyboardReset(reset func()) *KeyboardReset { return &KeyboardReset{reset: reset} }

// Read answers the guest's read: nobody there.
func (d *KeyboardReset) Read(_ uint64, p []byte) { allOnes(p) }

// Write does the guest's write of len(p) ports at off.
func (d *KeyboardReset) Write(off uint64, p []byte) {
	if off == 0 && len(p) > 0 && p[0] == 0xfe {
		d.reset()
	}
}
