package pci

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"

	"vmm/internal/sys"
	"vmm/memory"
)

// Registers of the type 0 header (PCI 3.0, 6.1) and their bits.
const (
	regVendor          = 0x00
	regDevice          = 0x02
	regCommand         = 0x04
	regStatus          = 0x06
	regRevision        = 0x08
	regClass           = 0x09 // three bytes
	regCacheLine       = 0x0c
	regLatency         = 0x0d
	regBAR             = 0x10 // six dwords
	regSubsystemVendor = 0x2c
	regSubsystem       = 0x2e
	regCapabilities    = 0x34
	regInterruptLine   = 0x3c
	headerSize         = 0x40

	commandMemory      = 1 << 1
	commandMaster      = 1 << 2
	commandParity      = 1 << 6
	commandSERR        = 1 << 8
	commandNoINTx      = 1 << 10
	statusCapabilities = 1 << 4

	barWide = 2 << 1 // 64 bits, the next register has the upper half
)

// configSize is the size of configuration space in bytes. The rest of what
// ECAM gives a function reads as zero: no extended capabilities (PCIe 5.0,
// 7.6.1).
const configSize = 256

// ID is what a function says it is.
type ID struct {
	Vendor, Device             uint16
	Revision                   uint8
	Class                      uint32 // class, subclass, programming interface: 24 bits
	SubsystemVendor, Subsystem uint16
}

// Function is the only function of a device. It is built with the Add methods
// and then put onto a bus, once. It has no interrupt pin: MSI-X only.
type Function struct {
	host *Host // nil until Host.Add

	mu      sync.Mutex // guards what follows, and the MSI-X table
	config  [configSize]byte
	mask    [configSize]byte // bits that the guest can write
	initial [configSize]byte // what a reset returns to

	// Fixed once the function is on a bus.
	bars    [6]bar
	lastCap int // offset of the last capability, 0 without
	freeCap int // offset of the next
	hooks   []hook
	msix    *MSIX
	onReset func()
}

type bar struct {
	size      uint64 // bytes, a power of two; 0: there is no such register
	wide      bool
	handler   Handler
	doorbells []doorbell
}

type doorbell struct {
	off   uint64
	event *sys.EventFD

	added, warned bool // guarded by the host's mu
}

type hook struct {
	off, end   uint64
	beforeRead func()
	afterWrite func()
}

// NewFunction makes a function that has an identity and nothing else.
func NewFunction(id ID) *Function {
	f := &Function{freeCap: headerSize, onReset: func() {}}
	c := f.config[:]
	binary.LittleEndian.PutUint16(c[regVendor:], id.Vendor)
	binary.LittleEndian.PutUint16(c[regDevice:], id.Device)
	c[regRevision] = id.Revision
	c[regClass], c[regClass+1], c[regClass+2] = byte(id.Class), byte(id.Class>>8), byte(id.Class>>16)
	binary.LittleEndian.PutUint16(c[regSubsystemVendor:], id.SubsystemVendor)
	binary.LittleEndian.PutUint16(c[regSubsystem:], id.Subsystem)
	// I/O decoding is not writable: there are no I/O registers.
	binary.LittleEndian.PutUint16(f.mask[regCommand:], commandMemory|commandMaster|commandParity|commandSERR|commandNoINTx)
	f.mask[regCacheLine], f.mask[regLatency], f.mask[regInterruptLine] = 0xff, 0xff, 0xff // scratch
	return f
}

// AddBAR gives the function a memory base address register of size bytes, a
// power of two of at least a page. A wide one takes 64 bits and so the number
// behind i, too. Handler answers the accesses to it.
//
// A wrong argument here, or to the other Add methods, is a mistake of the
// program, no matter what a guest does: they panic.
func (f *Function) AddBAR(i int, size uint64, wide bool, h Handler) {
	last := i
	if wide {
		last++
	}
	if i < 0 || last >= len(f.bars) || f.bars[i].size != 0 || i > 0 && f.bars[i-1].wide || wide && f.bars[last].size != 0 ||
		size < memory.PageSize || size > 1<<31 || bits.OnesCount64(size) != 1 {
		panic(fmt.Sprintf("pci: base address register %d of %d bytes", i, size))
	}
	f.bars[i] = bar{size: size, wide: wide, handler: h}
	at := regBAR + 4*i
	binary.LittleEndian.PutUint32(f.mask[at:], uint32(-size))
	if wide {
		f.config[at] |= barWide
		binary.LittleEndian.PutUint32(f.mask[at+4:], 0xffffffff)
	}
}

// AddDoorbell makes a guest's write at off in base address register i, of any
// width and value, signal e without an exit. The register's handler must do
// the same for a write that does reach it.
func (f *Function) AddDoorbell(i int, off uint64, e *sys.EventFD) {
	b := &f.bars[i]
	if off >= b.size {
		panic(fmt.Sprintf("pci: doorbell at %#x in base address register %d of %d bytes", off, i, b.size))
	}
	b.doorbells = append(b.doorbells, doorbell{off: off, event: e})
}

// Capability is an entry of the capability list (PCI 3.0, 6.7).
type Capability struct {
	ID       byte
	Body     []byte // behind the two bytes of ID and next
	Writable []byte // mask of the bits in Body that the guest can write; nil: none

	// BeforeRead and AfterWrite, where not nil, are called without locks
	// before each read and after each write of the last HookLen bytes of Body
	// or a part of them.
	BeforeRead, AfterWrite func()
	HookLen                int
}

// AddCapability appends c to the list and answers its offset in
// configuration space.
func (f *Function) AddCapability(c Capability) int {
	at := f.freeCap
	end := at + 2 + len(c.Body)
	if end > configSize {
		panic("pci: no room for another capability")
	}
	f.config[at] = c.ID
	copy(f.config[at+2:], c.Body)
	copy(f.mask[at+2:end], c.Writable)
	if f.lastCap == 0 {
		f.config[regCapabilities] = byte(at)
		f.config[regStatus] |= statusCapabilities
	} else {
		f.config[f.lastCap+1] = byte(at)
	}
	f.lastCap = at
	f.freeCap = (end + 3) &^ 3
	if c.HookLen > 0 {
		f.hooks = append(f.hooks, hook{uint64(end - c.HookLen), uint64(end), c.BeforeRead, c.AfterWrite})
	}
	return at
}

// OnReset registers what a reset of the bus does to the device behind f.
func (f *Function) OnReset(do func()) { f.onReset = do }

func (f *Function) hasBARs() bool {
	for i := range f.bars {
		if f.bars[i].size != 0 {
			return true
		}
	}
	return false
}

// setBAR writes an address into register i. Precondition: f.mu is held.
func (f *Function) setBAR(i int, start memory.GPA) {
	at := f.config[regBAR+4*i:]
	binary.LittleEndian.PutUint32(at, uint32(start)|uint32(at[0]&0xf))
	if f.bars[i].wide {
		binary.LittleEndian.PutUint32(at[4:], uint32(start>>32))
	}
}

// decodes answers the address in register i, if there is such a register and
// memory decoding is enabled. Precondition: f.mu is held.
func (f *Function) decodes(i int) (memory.GPA, bool) {
	if f.bars[i].size == 0 || f.config[regCommand]&commandMemory == 0 {
		return 0, false
	}
	at := f.config[regBAR+4*i:]
	start := memory.GPA(binary.LittleEndian.Uint32(at) &^ 0xf)
	if f.bars[i].wide {
		start |= memory.GPA(binary.LittleEndian.Uint32(at[4:])) << 32
	}
	return start, true
}

// overlap reports whether an access of n bytes at off touches [start, end).
func overlap(off uint64, n int, start, end uint64) bool {
	return off < end && start < off+uint64(n)
}

// ReadConfig reads configuration space, as the guest does. Off is below 4096.
func (f *Function) ReadConfig(off uint64, p []byte) {
	for _, h := range f.hooks {
		if h.beforeRead != nil && overlap(off, len(p), h.off, h.end) {
			h.beforeRead()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range p {
		switch at := off + uint64(i); {
		case at < configSize:
			p[i] = f.config[at]
		case at < 4096:
			p[i] = 0
		default:
			p[i] = 0xff // the next function, which is none
		}
	}
}

// WriteConfig writes configuration space, as the guest does. It reports
// whether what the function decodes may have changed.
func (f *Function) WriteConfig(off uint64, p []byte) (remap bool) {
	f.mu.Lock()
	for i, b := range p {
		if at := off + uint64(i); at < configSize {
			f.config[at] = f.config[at]&^f.mask[at] | b&f.mask[at]
		}
	}
	if f.msix != nil && overlap(off, len(p), f.msix.control, f.msix.control+2) {
		f.msix.controlWritten()
	}
	f.mu.Unlock()
	for _, h := range f.hooks {
		if h.afterWrite != nil && overlap(off, len(p), h.off, h.end) {
			h.afterWrite()
		}
	}
	return f.hasBARs() && (overlap(off, len(p), regCommand, regCommand+1) || overlap(off, len(p), regBAR, regBAR+4*6))
}

// CapabilityBytes copies n bytes of configuration space at off, which a hook
// looks at, and SetCapabilityBytes replaces them whatever the mask says. No
// hook runs.
func (f *Function) CapabilityBytes(off int, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(p, f.config[off:])
}

// SetCapabilityBytes is the counterpart of CapabilityBytes.
func (f *Function) SetCapabilityBytes(off int, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.config[off:], p)
}

func (f *Function) reset() {
	f.mu.Lock()
	f.config = f.initial
	if f.msix != nil {
		f.msix.reset()
	}
	f.mu.Unlock()
	f.onReset()
}

func (f *Function) state(slot int) FunctionState {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := FunctionState{Slot: slot, Config: f.config[:]}
	s.Config = append([]byte(nil), s.Config...)
	if f.msix != nil {
		s.Vectors = f.msix.state()
	}
	return s
}

func (f *Function) check(s FunctionState) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(s.Config) != configSize {
		return fmt.Errorf("%d bytes of configuration space; want %d", len(s.Config), configSize)
	}
	for i, b := range s.Config {
		if (b^f.config[i])&^f.mask[i] != 0 {
			return fmt.Errorf("byte %#x of configuration space is %#02x, here %#02x: a different device", i, b, f.config[i])
		}
	}
	vectors := 0
	if f.msix != nil {
		vectors = f.msix.Vectors()
	}
	if len(s.Vectors) != vectors {
		return fmt.Errorf("%d MSI-X vectors; this device has %d", len(s.Vectors), vectors)
	}
	return nil
}

// setState applies what check accepted.
func (f *Function) setState(s FunctionState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.config[:], s.Config)
	if f.msix != nil {
		f.msix.setState(s.Vectors)
	}
}
