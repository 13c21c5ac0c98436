package virtio

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"vmm/scsi"
)

// Feature bits of the SCSI host device (virtio 1.3, 5.6.3). INOUT and T10_PI
// are not offered: no command here moves data both ways, and protection
// information would need backends that check it.
const (
	scsiFeatureHotplug = 1 << 1
	scsiFeatureChange  = 1 << 2
)

// Queues (virtio 1.3, 5.6.2).
const (
	scsiControlQueue = 0
	scsiEventQueue   = 1
	scsiFirstRequest = 2 // and those that follow

	scsiControlSize = 64 // bounds the task management functions under way
	scsiEventSize   = 16 // 5.6.6.3 finds 10 to 15 buffers sufficient
	scsiRequestSize = 256
)

// Configuration space (virtio 1.3, 5.6.4), offsets and size in bytes.
const (
	scsiConfigSenseSize = 20
	scsiConfigCDBSize   = 24
	scsiConfigSize      = 36

	scsiDefaultSenseSize = 96
	scsiDefaultCDBSize   = 32

	// What the driver may write instead. A CDB has 6 to 260 bytes (SPC-5
	// 4.3); no sense data at all is a strange wish but a clear one.
	scsiMinCDBSize   = 6
	scsiMaxCDBSize   = 260
	scsiMaxSenseSize = scsi.MaxSense

	scsiMaxTarget = 255 // one byte of the address; drivers scan up to here
	scsiMaxLUN    = 0   // a target has one logical unit, LUN 0

	// A request is a chain of at most scsiRequestSize descriptors, two of
	// which hold its header and its response.
	scsiMaxSegments = scsiRequestSize - 2
	// Linux takes a max_sectors of 0 for this, EDK2 for an error.
	scsiMaxTransfer = 0xffff * 512 // bytes

	defaultCommandsPerLUN = 128
)

// SCSIConfig is what the driver is told of the controller.
type SCSIConfig struct {
	// Queues is the number of request queues, one per vCPU.
	Queues int
	// Limits is what one command to any logical unit may carry: the least of
	// those that are attached; zero is no limit. The configuration space
	// cannot change under a running driver; a logical unit attached later may
	// have narrower limits, which it tells in its Block Limits page.
	Limits scsi.Limits
	// CommandsPerLUN is how many commands the driver should have in flight
	// to one logical unit; 0 means 128.
	CommandsPerLUN uint32
}

// SCSI is a SCSI host device, the virtio-scsi controller (virtio 1.3, 5.6):
// up to 256 targets, each with one logical unit, LUN 0.
//
// Each request queue has a thread of its own, which starts commands and waits
// for none: they come back on whatever goroutine the logical unit calls Done.
type SCSI struct {
	cfg     SCSIConfig
	targets [scsiMaxTarget + 1]atomic.Pointer[target]

	mu      sync.Mutex // guards what follows; never held while a command is waited for
	sense   uint32     // sense_size as the driver reads it, in bytes
	cdb     uint32     // cdb_size likewise
	leaving [scsiMaxTarget + 1]bool
	live    *scsiSession // between Start and Stop, else nil

	// lunsChanged: the well-known logical unit has a unit attention to report.
	lunsChanged atomic.Bool
	events      eventQueue
}

// target is what a target number stands for; the pointer to it is nil where
// there is none.
type target struct {
	lun  scsi.LUN
	busy bool // commands are put off: Detach waits for those in flight

	stats []QueueStats // by request queue, each guarded by its lock
}

// NewSCSI makes a controller without targets.
func NewSCSI(cfg SCSIConfig) *SCSI {
	if cfg.CommandsPerLUN == 0 {
		cfg.CommandsPerLUN = defaultCommandsPerLUN
	}
	if cfg.Limits.MaxSegments == 0 || cfg.Limits.MaxSegments > scsiMaxSegments {
		cfg.Limits.MaxSegments = scsiMaxSegments
	}
	if cfg.Limits.MaxTransfer == 0 {
		cfg.Limits.MaxTransfer = scsiMaxTransfer
	}
	return &SCSI{cfg: cfg, sense: scsiDefaultSenseSize, cdb: scsiDefaultCDBSize}
}

var _ Device = (*SCSI)(nil)

// ID is the device type of a SCSI host.
func (s *SCSI) ID() uint16 { return IDSCSI }

// Features is what the controller offers.
func (s *SCSI) Features() uint64 {
	return FeatureIndirectDesc | FeatureEventIdx | scsiFeatureHotplug | scsiFeatureChange
}

// QueueSizes is control queue, event queue, request queues.
func (s *SCSI) QueueSizes() []uint16 {
	sizes := make([]uint16, scsiFirstRequest+s.cfg.Queues)
	sizes[scsiControlQueue] = scsiControlSize
	sizes[scsiEventQueue] = scsiEventSize
	for i := range s.cfg.Queues {
		sizes[scsiFirstRequest+i] = scsiRequestSize
	}
	return sizes
}

// ReadConfig reads the configuration space.
func (s *SCSI) ReadConfig(off uint32, p []byte) {
	clear(p)
	var c [scsiConfigSize]byte
	le := binary.LittleEndian
	le.PutUint32(c[0:], uint32(s.cfg.Queues))
	le.PutUint32(c[4:], s.cfg.Limits.MaxSegments)
	le.PutUint32(c[8:], s.cfg.Limits.MaxTransfer/512)
	le.PutUint32(c[12:], s.cfg.CommandsPerLUN)
	le.PutUint32(c[16:], eventSize)
	s.mu.Lock()
	le.PutUint32(c[scsiConfigSenseSize:], s.sense)
	le.PutUint32(c[scsiConfigCDBSize:], s.cdb)
	s.mu.Unlock()
	le.PutUint16(c[28:], 0) // max_channel
	le.PutUint16(c[30:], scsiMaxTarget)
	le.PutUint32(c[32:], scsiMaxLUN)
	if off < scsiConfigSize {
		copy(p, c[off:])
	}
}

// WriteConfig lets the driver choose sense_size and cdb_size. Any bytes may
// be written one by one, so values are judged by Start; from then on they
// stay, because the requests in flight are laid out by them.
func (s *SCSI) WriteConfig(off uint32, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live != nil {
		return
	}
	var c [8]byte // both fields, one after the other
	binary.LittleEndian.PutUint32(c[0:], s.sense)
	binary.LittleEndian.PutUint32(c[4:], s.cdb)
	for i, b := range p {
		if at := uint64(off) + uint64(i); at >= scsiConfigSenseSize && at < scsiConfigSenseSize+8 {
			c[at-scsiConfigSenseSize] = b
		}
	}
	s.sense = binary.LittleEndian.Uint32(c[0:])
	s.cdb = binary.LittleEndian.Uint32(c[4:])
}

// checkSizes says whether requests can be laid out by what the driver wrote.
func checkSizes(sense, cdb uint32) error {
	if cdb < scsiMinCDBSize || cdb > scsiMaxCDBSize {
		return fmt.Errorf("virtio-scsi: the driver set cdb_size to %d: it must be %d to %d", cdb, scsiMinCDBSize, scsiMaxCDBSize)
	}
	if sense > scsiMaxSenseSize {
		return fmt.Errorf("virtio-scsi: the driver set sense_size to %d: it must be at most %d", sense, scsiMaxSenseSize)
	}
	return nil
}

// SCSIState is what a migration carries of the controller beside its queues
// and its configuration. It is not trusted: Start checks it.
type SCSIState struct {
	SenseSize    uint32 // bytes, as the driver set it
	CDBSize      uint32 // bytes, as the driver set it
	EventsMissed bool   // the driver has yet to be told that events were lost
	LUNsChanged  bool   // a unit attention of the well-known logical unit is pending
}

// State is the controller as plain values. The device rests.
func (s *SCSI) State() SCSIState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return SCSIState{SenseSize: s.sense, CDBSize: s.cdb, EventsMissed: s.events.isMissed(), LUNsChanged: s.lunsChanged.Load()}
}

// Restore sets what State reported. The device is not started.
func (s *SCSI) Restore(state SCSIState) error {
	// A driver that has not started the device may have written any sizes, so
	// it is Start that judges them, as it would have at the source.
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live != nil {
		return fmt.Errorf("virtio-scsi: state cannot be restored into a device that works")
	}
	s.sense, s.cdb = state.SenseSize, state.CDBSize
	s.events.setMissed(state.EventsMissed)
	s.lunsChanged.Store(state.LUNsChanged)
	return nil
}

// Start begins to work on the queues that the driver has set up.
func (s *SCSI) Start(a Activation) error {
	if len(a.Queues) != scsiFirstRequest+s.cfg.Queues {
		return fmt.Errorf("virtio-scsi: %d queues were set up of %d", len(a.Queues), scsiFirstRequest+s.cfg.Queues)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := checkSizes(s.sense, s.cdb); err != nil {
		return err
	}
	live := &scsiSession{
		controller: s,
		fail:       a.Fail,
		headerSize: scsiHeaderSize + int(s.cdb),
		cdbSize:    max(int(s.cdb), scsiDefaultCDBSize),
		senseSize:  int(s.sense),
	}
	// The driver may leave any queue alone: boot firmware uses one.
	if q := a.Queues[scsiControlQueue]; q != nil {
		live.control = newRequestQueue(live, q, "control queue", -1, live.handleControl)
	}
	for i, q := range a.Queues[scsiFirstRequest:] {
		if q != nil {
			live.requests = append(live.requests, newRequestQueue(live, q, fmt.Sprintf("request queue %d", i), i, live.handleCommand))
		}
	}
	live.event = a.Queues[scsiEventQueue]
	live.features = a.Features
	s.live = live
	live.resume()
	return nil
}

// Quiesce stops taking requests and waits for those in flight, as long as ctx
// allows.
func (s *SCSI) Quiesce(ctx context.Context) error { return s.session().quiesce(ctx) }

// Resume goes on where Quiesce stopped.
func (s *SCSI) Resume() { s.session().resume() }

// Stop ends the work and sets sense_size and cdb_size to their reset values.
// Targets stay attached.
func (s *SCSI) Stop() {
	live := s.session()
	if live != nil {
		_ = live.quiesce(context.Background()) // which is never done
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live = nil
	s.sense, s.cdb = scsiDefaultSenseSize, scsiDefaultCDBSize
	s.events.forget()
	s.lunsChanged.Store(false)
}

func (s *SCSI) session() *scsiSession {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live
}

// scsiSession is the controller's work between Start and Stop.
type scsiSession struct {
	controller *SCSI
	fail       func(error)
	features   uint64
	headerSize int // bytes of a command's header, its CDB included
	cdbSize    int // bytes of a CDB as logical units see it: zeroes behind a shorter one
	senseSize  int // bytes

	control  *requestQueue // nil if the driver does not use it
	event    *Queue        // likewise
	requests []*requestQueue

	halted  atomic.Bool // by Quiesce
	failed  atomic.Bool // by the driver
	workers sync.WaitGroup
}

// halting tells a worker to leave.
func (l *scsiSession) halting() bool { return l.halted.Load() || l.failed.Load() }

// broke puts the device into NEEDS_RESET. Requests in flight still come back;
// no further one is taken.
func (l *scsiSession) broke(err error) {
	if l.failed.CompareAndSwap(false, true) {
		l.fail(fmt.Errorf("virtio-scsi: %w", err))
	}
}

// queues is the control queue and the request queues, as far as they are used.
func (l *scsiSession) queues() []*requestQueue {
	if l.control == nil {
		return l.requests
	}
	return append([]*requestQueue{l.control}, l.requests...)
}

func (l *scsiSession) resume() {
	l.halted.Store(false)
	for _, q := range l.queues() {
		l.work(q.Queue, q.take)
	}
	events := &l.controller.events
	events.start(l)
	if l.event != nil {
		l.work(l.event, events.take)
	}
}

// quiesce ends the workers first, then waits for what they have begun. Stop
// after Quiesce comes here twice; the second time there is nothing to do. An
// error says which command had not come back when ctx was done.
func (l *scsiSession) quiesce(ctx context.Context) error {
	l.halted.Store(true)
	l.controller.events.rest()
	for _, q := range l.queues() {
		q.wake() // a worker that waits for a free request
		q.Kick()
	}
	if l.event != nil {
		l.event.Kick()
	}
	l.workers.Wait()
	for _, q := range l.queues() {
		if !q.await(ctx, q.mark(), func(*request) bool { return true }) {
			return fmt.Errorf("virtio-scsi: %s: %w", l.inFlight(func(*request) bool { return true }), context.Cause(ctx))
		}
	}
	return nil
}

// inFlight describes the commands that match selects and have not come back.
func (l *scsiSession) inFlight(match func(*request) bool) string {
	n := 0
	var first string
	for _, q := range l.queues() {
		q.mu.Lock()
		for i := range q.requests {
			if r := &q.requests[i]; r.arrival != 0 && match(r) {
				if n++; n == 1 {
					first = fmt.Sprintf("target %d, operation code %#02x", r.to.target, r.cmd.CDB[0])
					if q == l.control {
						first = fmt.Sprintf("target %d, a task management function", r.to.target)
					}
				}
			}
		}
		q.mu.Unlock()
	}
	if n == 0 {
		return "the last command came back too late"
	}
	return fmt.Sprintf("commands still in flight: %d, one of them for %s", n, first)
}

// work runs a queue's worker. take does what there is to do and reports
// whether to come again at once. The worker sleeps in read(2), so it has an
// OS thread of its own.
func (l *scsiSession) work(q *Queue, take func() (again bool, err error)) {
	l.workers.Add(1)
	go func() {
		defer l.workers.Done()
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for !l.halting() {
			again, err := take()
			if err == nil && !again {
				err = q.Wait()
			}
			if err != nil {
				l.broke(err)
			}
		}
	}()
}
