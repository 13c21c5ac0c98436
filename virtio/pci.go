package virtio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"vmm/internal/sys"
	"vmm/memory"
	"vmm/pci"
)

// Device status bits (virtio 1.3, 2.1).
const (
	statusAcknowledge = 1 << 0
	statusDriver      = 1 << 1
	statusDriverOK    = 1 << 2
	statusFeaturesOK  = 1 << 3
	statusNeedsReset  = 1 << 6
	statusFailed      = 1 << 7

	// What a driver can set; NEEDS_RESET is the device's.
	statusDrivers = statusAcknowledge | statusDriver | statusDriverOK | statusFeaturesOK | statusFailed
)

// noVector is a queue or a configuration change without an interrupt
// (virtio 1.3, 4.1.5.1.2).
const noVector = 0xffff

// ISR status bits (virtio 1.3, 4.1.4.5).
const (
	isrQueue  = 1 << 0
	isrConfig = 1 << 1
)

// Vendor and device numbers (virtio 1.3, 4.1.2).
const (
	pciVendor     = 0x1af4
	pciDeviceBase = 0x1040
	pciRevision   = 1
)

// The structures in base address register 0, a page each. MSI-X has register 2.
const (
	registersBAR   = 0
	msixBAR        = 2
	registersSize  = 4 * regionSize
	regionSize     = 0x1000
	commonRegion   = 0 * regionSize
	isrRegion      = 1 * regionSize
	deviceRegion   = 2 * regionSize
	notifyRegion   = 3 * regionSize
	notifyMultiple = 4 // bytes from one queue's notification address to the next
	maxQueues      = regionSize / notifyMultiple
)

// Capabilities that tell where the structures are (virtio 1.3, 4.1.4).
const (
	capVendor = 0x09

	cfgCommon = 1
	cfgNotify = 2
	cfgISR    = 3
	cfgDevice = 4
	cfgAccess = 5
)

// PCIConfig is what the transport of one device needs.
type PCIConfig struct {
	RAM *memory.RAM

	// Name stands before each message to Log, which hears of rules that the
	// driver broke and of a device that cannot start. A guest can cause
	// messages without end, so only so many are passed on.
	Name string
	Log  func(error)
}

// life is what the device is doing, as the transport sees it.
type life uint8

const (
	lifeIdle     life = iota // not started
	lifeRunning              // started
	lifeQuiesced             // started, rests
	lifeLoaded               // state has been loaded; Resume will start it
	lifeBroken               // cannot start, or came so in a state: only a reset helps
)

// session is the time from a Start to the next reset. What a device says
// after its session has ended is not heard. It is not empty, because two
// pointers to empty values may be equal.
type session struct{ _ byte }

// PCI is the modern PCI transport of a device (virtio 1.3, 4.1): registers,
// queues, interrupts. Any vCPU may access the registers at any time. Nothing
// that takes long happens on a vCPU's thread: a reset stops the device on a
// goroutine, and the driver polls the status until it is done, as it must
// (virtio 1.3, 4.1.4.3.2).
type PCI struct {
	dev      Device
	cfg      PCIConfig
	offered  uint64
	function *pci.Function
	msix     *pci.MSIX
	access   int // offset of the configuration access capability
	isr      atomic.Uint32
	log      limiter

	mu   sync.Mutex // guards what follows; not held while the device is called
	idle sync.Cond  // busy became false
	busy bool       // a call to the device is going on; registers ignore writes

	life    life
	session *session // nil when the device has nothing to say

	status            uint8
	generation        uint8
	configVector      uint16
	queueSelect       uint16
	offeredSelect     uint32
	acceptedSelect    uint32
	accepted          uint64
	acceptedUndefined bool // the driver wants features beyond bit 63
	queues            []pciQueue
}

type pciQueue struct {
	max       uint16
	doorbell  *sys.EventFD
	interrupt func()
	vector    atomic.Uint32 // read when a request completes, without mu

	enabled bool
	regs    QueueState // what the driver wrote
	live    *Queue     // from Start to reset
}

// NewPCI makes the transport of dev.
func NewPCI(dev Device, cfg PCIConfig) (*PCI, error) {
	sizes := dev.QueueSizes()
	if len(sizes) > maxQueues {
		return nil, fmt.Errorf("%s: %d queues; there is room for %d", cfg.Name, len(sizes), maxQueues)
	}
	t := &PCI{dev: dev, cfg: cfg, offered: dev.Features() | FeatureVersion1, queues: make([]pciQueue, len(sizes))}
	t.idle.L = &t.mu
	t.function = pci.NewFunction(pci.ID{
		Vendor:          pciVendor,
		Device:          pciDeviceBase + dev.ID(),
		Revision:        pciRevision,
		Class:           pciClass(dev.ID()),
		SubsystemVendor: pciVendor,
		Subsystem:       0x40 + dev.ID(), // at least 40h (virtio 1.3, 4.1.2.1)
	})
	t.function.OnReset(t.reset)
	t.function.AddBAR(registersBAR, registersSize, true, t)
	for i := range t.queues {
		q := &t.queues[i]
		q.max = sizes[i]
		q.interrupt = func() { t.interrupt(uint16(q.vector.Load())) }
		var err error
		if q.doorbell, err = sys.NewEventFD(); err != nil {
			t.closeDoorbells()
			return nil, fmt.Errorf("%s: doorbell of queue %d: %w", cfg.Name, i, err)
		}
		t.function.AddDoorbell(registersBAR, uint64(notifyRegion+notifyMultiple*i), q.doorbell)
	}
	t.addCapability(cfgCommon, commonRegion, commonSize, nil, nil)
	t.addCapability(cfgISR, isrRegion, 1, nil, nil)
	t.addCapability(cfgDevice, deviceRegion, regionSize, nil, nil)
	t.addCapability(cfgNotify, notifyRegion, uint32(notifyMultiple*len(t.queues)), binary.LittleEndian.AppendUint32(nil, notifyMultiple), nil)
	// Register, offset, length and data are the driver's.
	t.access = t.addCapability(cfgAccess, 0, 0, make([]byte, 4), []byte{
		4 - 2: 0xff,
		8 - 2: 0xff, 0xff, 0xff, 0xff,
		0xff, 0xff, 0xff, 0xff,
		0xff, 0xff, 0xff, 0xff,
	})
	var err error
	if t.msix, err = t.function.AddMSIX(msixBAR, len(t.queues)+1); err != nil {
		t.closeDoorbells()
		return nil, fmt.Errorf("%s: %w", cfg.Name, err)
	}
	t.clear()
	return t, nil
}

// pciClass is the class code under which an operating system files a device
// type; drivers do not look at it.
func pciClass(id uint16) uint32 {
	if id == IDSCSI {
		return 0x010000 // SCSI storage
	}
	return 0xff0000 // no class
}

// addCapability appends a virtio capability (virtio 1.3, 4.1.4) with what
// follows its common part.
func (t *PCI) addCapability(kind uint8, offset, length uint32, more, writable []byte) int {
	body := []byte{uint8(16 + len(more)), kind, registersBAR, 0, 0, 0}
	body = binary.LittleEndian.AppendUint32(body, offset)
	body = binary.LittleEndian.AppendUint32(body, length)
	c := pci.Capability{ID: capVendor, Body: append(body, more...), Writable: writable}
	if kind == cfgAccess {
		c.HookLen, c.BeforeRead, c.AfterWrite = 4, t.accessRead, t.accessWrite
	}
	return t.function.AddCapability(c)
}

// Device is what the transport drives.
func (t *PCI) Device() Device { return t.dev }

// Function is the device as the bus sees it.
func (t *PCI) Function() *pci.Function { return t.function }

// accessWindow answers where the driver points the configuration access
// capability, and whether that is in the registers, aligned, and of an allowed
// width (virtio 1.3, 4.1.4.9).
func (t *PCI) accessWindow() (off uint64, n int, ok bool) {
	var c [16]byte
	t.function.CapabilityBytes(t.access, c[:])
	off = uint64(binary.LittleEndian.Uint32(c[8:]))
	length := binary.LittleEndian.Uint32(c[12:])
	ok = c[4] == registersBAR && (length == 1 || length == 2 || length == 4) && off%uint64(length) == 0 && off+uint64(length) <= registersSize
	return off, int(length), ok
}

func (t *PCI) accessRead() {
	if off, n, ok := t.accessWindow(); ok {
		var data [4]byte
		t.Read(off, data[:n])
		t.function.SetCapabilityBytes(t.access+16, data[:n])
	}
}

func (t *PCI) accessWrite() {
	if off, n, ok := t.accessWindow(); ok {
		var data [4]byte
		t.function.CapabilityBytes(t.access+16, data[:n])
		t.Write(off, data[:n])
	}
}

// Read answers a guest's access to the structures.
func (t *PCI) Read(off uint64, p []byte) {
	clear(p)
	region, at := off&^(regionSize-1), off%regionSize
	p = p[:min(uint64(len(p)), regionSize-at)]
	switch region {
	case commonRegion:
		t.mu.Lock()
		defer t.mu.Unlock()
		if at < commonSize {
			common := t.common()
			copy(p, common[at:])
		}
	case isrRegion:
		if at == 0 && len(p) > 0 {
			p[0] = uint8(t.isr.Swap(0)) // a read clears it
		}
	case deviceRegion:
		t.dev.ReadConfig(uint32(at), p)
	}
}

// Write answers a guest's access to the structures.
func (t *PCI) Write(off uint64, p []byte) {
	region, at := off&^(regionSize-1), off%regionSize
	p = p[:min(uint64(len(p)), regionSize-at)]
	switch region {
	case commonRegion:
		t.writeCommon(at, p)
	case deviceRegion:
		t.dev.WriteConfig(uint32(at), p)
	case notifyRegion:
		// Only where the kernel does not do it: before the doorbell is
		// registered, or through the access capability.
		if i := at / notifyMultiple; i < uint64(len(t.queues)) {
			_ = t.queues[i].doorbell.Signal()
		}
	}
}

// The common configuration structure (virtio 1.3, 4.1.4.3): offsets.
const (
	commonOfferedSelect  = 0x00
	commonOffered        = 0x04
	commonAcceptedSelect = 0x08
	commonAccepted       = 0x0c
	commonConfigVector   = 0x10
	commonNumQueues      = 0x12
	commonStatus         = 0x14
	commonGeneration     = 0x15
	commonQueueSelect    = 0x16
	commonQueueSize      = 0x18
	commonQueueVector    = 0x1a
	commonQueueEnable    = 0x1c
	commonQueueNotifyOff = 0x1e
	commonQueueDesc      = 0x20
	commonQueueDriver    = 0x28
	commonQueueDevice    = 0x30
	commonSize           = 0x38 // what follows belongs to features that are not offered
)

// commonFields are the fields that the driver writes, in ascending order.
var commonFields = [...]struct {
	off, size uint64
	set       func(*PCI, uint64)
}{
	{commonOfferedSelect, 4, func(t *PCI, v uint64) { t.offeredSelect = uint32(v) }},
	{commonAcceptedSelect, 4, func(t *PCI, v uint64) { t.acceptedSelect = uint32(v) }},
	{commonAccepted, 4, (*PCI).setAccepted},
	{commonConfigVector, 2, func(t *PCI, v uint64) { t.configVector = t.vector(v) }},
	{commonStatus, 1, (*PCI).setStatus},
	{commonQueueSelect, 2, func(t *PCI, v uint64) { t.queueSelect = uint16(v) }},
	{commonQueueSize, 2, queueField(func(q *pciQueue, v uint64) { q.regs.Size = uint16(v) })},
	{commonQueueVector, 2, func(t *PCI, v uint64) {
		if q := t.selected(); q != nil {
			q.vector.Store(uint32(t.vector(v)))
		}
	}},
	// Writing 0 is not allowed and does nothing (virtio 1.3, 4.1.4.3.2).
	{commonQueueEnable, 2, queueField(func(q *pciQueue, v uint64) { q.enabled = v == 1 })},
	{commonQueueDesc, 8, queueField(func(q *pciQueue, v uint64) { q.regs.Desc = memory.GPA(v) })},
	{commonQueueDriver, 8, queueField(func(q *pciQueue, v uint64) { q.regs.Avail = memory.GPA(v) })},
	{commonQueueDevice, 8, queueField(func(q *pciQueue, v uint64) { q.regs.Used = memory.GPA(v) })},
}

// queueField makes a setter for the selected queue, which works until the
// queue is enabled or the device started.
func queueField(set func(*pciQueue, uint64)) func(*PCI, uint64) {
	return func(t *PCI, v uint64) {
		if q := t.selected(); q != nil && !q.enabled && t.status&statusDriverOK == 0 {
			set(q, v)
		}
	}
}

// selected is the queue that queue_select names, or nil. Precondition for
// this and what follows up to setStatus: t.mu is held.
func (t *PCI) selected() *pciQueue {
	if int(t.queueSelect) < len(t.queues) {
		return &t.queues[t.queueSelect]
	}
	return nil
}

// vector is what a vector register reads after v was written: v, or no
// vector if there is no such one (virtio 1.3, 4.1.5.1.2.1).
func (t *PCI) vector(v uint64) uint16 {
	if v >= uint64(t.msix.Vectors()) {
		return noVector
	}
	return uint16(v)
}

// common is the structure as it reads now.
func (t *PCI) common() (c [commonSize]byte) {
	le := binary.LittleEndian
	half := func(features uint64, sel uint32) uint32 {
		if sel > 1 {
			return 0
		}
		return uint32(features >> (32 * sel))
	}
	le.PutUint32(c[commonOfferedSelect:], t.offeredSelect)
	le.PutUint32(c[commonOffered:], half(t.offered, t.offeredSelect))
	le.PutUint32(c[commonAcceptedSelect:], t.acceptedSelect)
	le.PutUint32(c[commonAccepted:], half(t.accepted, t.acceptedSelect))
	le.PutUint16(c[commonConfigVector:], t.configVector)
	le.PutUint16(c[commonNumQueues:], uint16(len(t.queues)))
	c[commonStatus] = t.status
	c[commonGeneration] = t.generation
	le.PutUint16(c[commonQueueSelect:], t.queueSelect)
	le.PutUint16(c[commonQueueVector:], noVector)
	if q := t.selected(); q != nil { // otherwise a size of 0: no such queue
		le.PutUint16(c[commonQueueSize:], q.regs.Size)
		le.PutUint16(c[commonQueueVector:], uint16(q.vector.Load()))
		if q.enabled {
			c[commonQueueEnable] = 1
		}
		le.PutUint16(c[commonQueueNotifyOff:], t.queueSelect)
		le.PutUint64(c[commonQueueDesc:], uint64(q.regs.Desc))
		le.PutUint64(c[commonQueueDriver:], uint64(q.regs.Avail))
		le.PutUint64(c[commonQueueDevice:], uint64(q.regs.Used))
	}
	return c
}

// writeCommon sets every field that a write touches, in order. Drivers write
// one field, or half of a 64-bit one, at a time (virtio 1.3, 4.1.3.1); a write
// of another shape changes the bytes it names.
func (t *PCI) writeCommon(off uint64, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range commonFields {
		f := &commonFields[i]
		if off >= f.off+f.size || f.off >= off+uint64(len(p)) {
			continue
		}
		if t.busy {
			return // the driver does not wait for a reset to be done
		}
		common := t.common()
		copy(common[off:], p)
		var v [8]byte
		copy(v[:f.size], common[f.off:])
		f.set(t, binary.LittleEndian.Uint64(v[:]))
	}
}

func (t *PCI) setAccepted(v uint64) {
	switch {
	case t.status&statusFeaturesOK != 0: // settled (virtio 1.3, 3.1.1)
	case t.acceptedSelect > 1:
		t.acceptedUndefined = t.acceptedUndefined || v != 0
	default:
		shift := 32 * t.acceptedSelect
		t.accepted = t.accepted&^(0xffffffff<<shift) | v<<shift
	}
}

// setStatus is a write to the status register: 0 resets, otherwise bits are
// added. A bit that the driver may not set yet does not stick, which is how a
// driver hears of it.
func (t *PCI) setStatus(v uint64) {
	if v == 0 {
		t.startReset()
		return
	}
	added := uint8(v) & statusDrivers &^ t.status
	if added&statusFeaturesOK != 0 {
		unknown := t.accepted &^ t.offered
		switch {
		case t.status&statusDriverOK != 0: // too late; t.accepted is in use
			added &^= statusFeaturesOK
		case t.accepted&FeatureVersion1 == 0:
			added &^= statusFeaturesOK
			t.say(errors.New("the driver does not accept VERSION_1: it is too old"))
		case unknown != 0 || t.acceptedUndefined:
			added &^= statusFeaturesOK
			t.say(fmt.Errorf("the driver accepts features %#x, offered are %#x", t.accepted, t.offered))
		}
	}
	starts := added&statusDriverOK != 0
	if starts && (t.status|added)&statusFeaturesOK == 0 {
		added &^= statusDriverOK
		starts = false
		t.say(errors.New("the driver sets DRIVER_OK without FEATURES_OK"))
	}
	if added&statusFailed != 0 {
		t.say(errors.New("the driver has given up on the device"))
	}
	if starts && (t.status|added)&(statusFailed|statusNeedsReset) != 0 {
		added &^= statusDriverOK
		starts = false
	}
	t.status |= added
	if starts {
		t.start()
	}
}

// call calls the device, without t.mu. Precondition: t.mu is held, not t.busy.
func (t *PCI) call(f func()) {
	t.busy = true
	t.mu.Unlock()
	f()
	t.mu.Lock()
	t.busy = false
	t.idle.Broadcast()
}

// build makes the live queues of what the registers say.
func (t *PCI) build(features uint64, enabled func(int) bool, state func(int) QueueState) ([]*Queue, error) {
	queues := make([]*Queue, len(t.queues))
	for i := range queues {
		if !enabled(i) {
			continue
		}
		q := &t.queues[i]
		var err error
		queues[i], err = NewQueue(QueueConfig{
			RAM: t.cfg.RAM, Features: features, MaxSize: q.max, Doorbell: q.doorbell, Interrupt: q.interrupt,
		}, state(i))
		if err != nil {
			return nil, fmt.Errorf("queue %d: %w", i, err)
		}
	}
	return queues, nil
}

// start starts the device with the queues that the driver has set up.
func (t *PCI) start() {
	queues, err := t.build(t.accepted,
		func(i int) bool { return t.queues[i].enabled },
		func(i int) QueueState { return t.queues[i].regs })
	if err != nil {
		t.life, t.session = lifeBroken, new(session)
		s := t.session
		t.call(func() { t.fail(s, err) })
		return
	}
	for i := range t.queues {
		t.queues[i].live = queues[i]
	}
	t.startDevice()
}

// startDevice starts the device with the live queues.
func (t *PCI) startDevice() {
	s := new(session)
	t.session = s
	a := Activation{
		Features:      t.accepted,
		Queues:        make([]*Queue, len(t.queues)),
		Fail:          func(err error) { t.fail(s, err) },
		ConfigChanged: func() { t.configChanged(s) },
	}
	for i := range t.queues {
		a.Queues[i] = t.queues[i].live
	}
	t.life = lifeRunning
	var err error
	t.call(func() {
		if err = t.dev.Start(a); err != nil {
			t.fail(s, err)
		}
	})
	if err != nil {
		t.life = lifeBroken
	}
}

// startReset begins what a driver's write of 0 asks for. The status keeps its
// value, which is not 0 when there is something to stop, until the device has
// stopped.
func (t *PCI) startReset() {
	t.session = nil
	if t.life == lifeIdle {
		t.call(t.dev.Stop) // nothing runs: it only forgets
		t.clear()
		return
	}
	t.busy = true
	go func() {
		t.dev.Stop()
		t.mu.Lock()
		defer t.mu.Unlock()
		t.clear()
		t.busy = false
		t.idle.Broadcast()
	}()
}

// clear sets every register to its value after a reset.
func (t *PCI) clear() {
	t.life, t.session = lifeIdle, nil
	t.status, t.generation, t.configVector = 0, 0, noVector
	t.queueSelect, t.offeredSelect, t.acceptedSelect = 0, 0, 0
	t.accepted, t.acceptedUndefined = 0, false
	t.isr.Store(0)
	for i := range t.queues {
		q := &t.queues[i]
		q.enabled, q.live, q.regs = false, nil, QueueState{Size: q.max}
		q.vector.Store(noVector)
	}
}

// say passes a message on, unless there were many. It does not need t.mu.
func (t *PCI) say(err error) {
	dropped, ok := t.log.allow(time.Now())
	switch {
	case !ok:
	case dropped > 0:
		t.cfg.Log(fmt.Errorf("%s: %w (and %d messages that were dropped)", t.cfg.Name, err, dropped))
	default:
		t.cfg.Log(fmt.Errorf("%s: %w", t.cfg.Name, err))
	}
}

// interrupt raises a queue's vector.
func (t *PCI) interrupt(vector uint16) {
	if !t.msix.Enabled() {
		t.isr.Or(isrQueue) // for a driver that polls; there is no pin
		return
	}
	t.msix.Signal(vector)
}

// fail puts the device into NEEDS_RESET, once a session.
func (t *PCI) fail(s *session, err error) {
	t.mu.Lock()
	if t.session != s || t.status&statusNeedsReset != 0 {
		t.mu.Unlock()
		return
	}
	t.status |= statusNeedsReset
	t.mu.Unlock()
	t.say(fmt.Errorf("the device needs a reset: %w", err))
	t.configChanged(s) // DRIVER_OK is set (virtio 1.3, 2.1.2)
}

// configChanged tells the driver to look at the configuration and the status.
func (t *PCI) configChanged(s *session) {
	t.mu.Lock()
	if t.session != s {
		t.mu.Unlock()
		return
	}
	t.generation++
	vector := t.configVector
	t.mu.Unlock()
	t.isr.Or(isrConfig)
	t.msix.Signal(vector)
}

// lock takes t.mu when no call to the device is going on.
func (t *PCI) lock() { t.lockWithin(context.Background()) }

// lockWithin does so unless ctx is done before; it reports whether it has.
func (t *PCI) lockWithin(ctx context.Context) bool {
	stop := context.AfterFunc(ctx, func() {
		t.mu.Lock() // nobody is between looking and waiting
		defer t.mu.Unlock()
		t.idle.Broadcast()
	})
	defer stop()
	t.mu.Lock()
	for t.busy {
		if ctx.Err() != nil {
			t.mu.Unlock()
			return false
		}
		t.idle.Wait()
	}
	return true
}

// reset is a reset of the bus. The vCPUs stand still.
func (t *PCI) reset() {
	t.lock()
	defer t.mu.Unlock()
	t.session = nil
	t.call(t.dev.Stop)
	t.clear()
}

// Close stops the device and closes the queues' doorbells. The bus is closed
// before, so that the kernel does not hold them.
func (t *PCI) Close() error {
	t.reset()
	return t.closeDoorbells()
}

func (t *PCI) closeDoorbells() error {
	var errs []error
	for i := range t.queues {
		if e := t.queues[i].doorbell; e != nil {
			errs = append(errs, e.Close())
		}
	}
	return errors.Join(errs...)
}

// limiter lets a burst of messages pass, then few, and counts the rest.
type limiter struct {
	mu      sync.Mutex
	next    time.Time // when the burst's oldest message is forgotten
	dropped int
}

const (
	limiterBurst = 8
	limiterEvery = 10 * time.Second
)

// allow reports whether a message may pass now, and how many before did not.
func (l *limiter) allow(now time.Time) (dropped int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A message takes the next of a row of places, limiterEvery apart; the
	// row has limiterBurst places, the first of them now.
	next := l.next
	if next.Before(now) {
		next = now
	}
	if next.Sub(now) > (limiterBurst-1)*limiterEvery {
		l.dropped++
		return 0, false
	}
	l.next = next.Add(limiterEvery)
	dropped, l.dropped = l.dropped, 0
	return dropped, true
}
