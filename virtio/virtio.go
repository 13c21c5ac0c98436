// Package virtio is the virtio 1.3 device side: the split virtqueue, the
// contract between a device and its transport, the PCI transport, and the
// devices, one file each.
//
// The driver is the guest and is not trusted. A driver that breaks the rules
// of a queue or a device puts that device into NEEDS_RESET (virtio 1.3,
// 2.1.2): it stops, says so once, and works again after a reset.
package virtio

import "context"

// Device types (virtio 1.3, 5).
const (
	IDEntropy = 4
	IDSCSI    = 8
)

// Feature bits that belong to no single device (virtio 1.3, 6).
const (
	FeatureIndirectDesc = 1 << 28
	FeatureEventIdx     = 1 << 29
	FeatureVersion1     = 1 << 32
)

// Device is what a transport drives. The transport serialises its calls,
// except ReadConfig and WriteConfig, which may come at any time.
type Device interface {
	// ID is the device type.
	ID() uint16

	// Features is what the device offers beside FeatureVersion1, which the
	// transport requires.
	Features() uint64

	// QueueSizes is the largest size of each queue, each a power of two.
	QueueSizes() []uint16

	// ReadConfig and WriteConfig access the device-specific configuration;
	// bytes beyond it read as zero and ignore writes.
	ReadConfig(off uint32, p []byte)
	WriteConfig(off uint32, p []byte)

	// Start begins work: the driver has set DRIVER_OK, whose vCPU waits. An
	// error means that the device cannot work and needs a reset.
	Start(Activation) error

	// Quiesce stops taking requests from the queues and waits until none is
	// in flight: from then on guest memory is not touched. When ctx is done
	// before that, an error says what is in flight still. Resume goes on where
	// Quiesce stopped, also after an error. Both are only called between Start
	// and Stop.
	Quiesce(ctx context.Context) error
	Resume()

	// Stop ends what Start began, waits for requests in flight, forgets the
	// queues and sets configuration fields the driver wrote to their reset
	// value. It is also called after a failed Start and on a device that is
	// quiesced; on one that is not started it only resets, which takes no
	// time because a vCPU waits.
	Stop()
}

// Activation is what a driver has set up when it sets DRIVER_OK.
type Activation struct {
	Features uint64
	Queues   []*Queue // nil where the driver left a queue disabled

	// Fail puts the device into NEEDS_RESET: the driver broke a rule. It may
	// be called from any goroutine, more than once; the device goes on being
	// quiet until Stop.
	Fail func(error)

	// ConfigChanged tells the driver that the device-specific configuration
	// has changed.
	ConfigChanged func()
}
