package device

// What a guest can report by pvpanic (the interface's specification in QEMU's
// docs/specs/pvpanic). Reading the port tells which of them the machine takes.
const (
	pvpanicPanicked    = 1 << 0
	pvpanicCrashLoaded = 1 << 1
)

// PVPanic is the port through which a guest reports its kernel panic. It has
// no state.
type PVPanic struct {
	panicked    func()
	crashLoaded func()
}

// NewPVPanic makes the port. panicked is called when the guest's kernel has
// panicked, crashLoaded when it has and its crash kernel takes over.
func NewPVPanic(panicked, crashLoaded func()) *PVPanic {
	return &PVPanic{panicked: panicked, crashLoaded: crashLoaded}
}

// Read answers the guest's read: the events that it may report.
func (d *PVPanic) Read(off uint64, p []byte) {
	allOnes(p)
	if off == 0 && len(p) > 0 {
		p[0] = pvpanicPanicked | pvpanicCrashLoaded
	}
}

// Write takes the guest's report.
func (d *PVPanic) Write(off uint64, p []byte) {
	if off != 0 || len(p) == 0 {
		return
	}
	if p[0]&pvpanicPanicked != 0 {
		d.panicked()
	}
	if p[0]&pvpanicCrashLoaded != 0 {
		d.crashLoaded()
	}
}
