package virtiotest

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"testing"

	"vmm/internal/sys"
	"vmm/memory"
	"vmm/pci"
	"vmm/pci/pcitest"
)

// Bus is a PCI bus as a guest reaches it, with a stand-in for the kernel.
type Bus struct {
	Host   *pci.Host
	Kernel *pcitest.Kernel

	// Ports makes configuration accesses go through the two ports instead of
	// ECAM.
	Ports bool
}

// Where the bus decodes addresses.
const (
	Window     memory.GPA = 0xc0000000
	WindowSize            = 16 << 20
)

// NewBus makes an empty bus. Close it before the devices that were added.
func NewBus(tb testing.TB) *Bus {
	k := new(pcitest.Kernel)
	return &Bus{Kernel: k, Host: pci.NewHost(pci.HostConfig{
		Window: Window, WindowSize: WindowSize, Interrupts: k, IOEvents: k,
		Warn: func(err error) { tb.Errorf("the bus warns: %v", err) },
	})}
}

// Config reads n bytes, up to 8, of a slot's configuration space.
func (b *Bus) Config(slot, reg, n int) uint64 {
	var p [8]byte
	b.config(slot, reg).Read(p[:n])
	return binary.LittleEndian.Uint64(p[:])
}

// SetConfig writes n bytes of it.
func (b *Bus) SetConfig(slot, reg, n int, v uint64) {
	var p [8]byte
	binary.LittleEndian.PutUint64(p[:], v)
	b.config(slot, reg).Write(p[:n])
}

type access struct {
	h   pci.Handler
	off uint64
}

func (a access) Read(p []byte)  { a.h.Read(a.off, p) }
func (a access) Write(p []byte) { a.h.Write(a.off, p) }

func (b *Bus) config(slot, reg int) access {
	if !b.Ports {
		return access{b.Host.ECAM(), uint64(slot<<15 | reg)}
	}
	var address [4]byte
	binary.LittleEndian.PutUint32(address[:], uint32(1<<31|slot<<11|reg&0xfc))
	b.Host.ConfigAddress().Write(0, address[:])
	return access{b.Host.ConfigData(), uint64(reg & 3)}
}

// Read reads n bytes, up to 8, at an address of the window.
func (b *Bus) Read(gpa memory.GPA, n int) uint64 {
	var p [8]byte
	b.Host.Window().Read(uint64(gpa-Window), p[:n])
	return binary.LittleEndian.Uint64(p[:])
}

// Write writes n bytes there. A doorbell swallows the write, as in KVM.
func (b *Bus) Write(gpa memory.GPA, n int, v uint64) {
	if e := b.Kernel.Doorbell(gpa); e != nil {
		e.Signal()
		return
	}
	var p [8]byte
	binary.LittleEndian.PutUint64(p[:], v)
	b.Host.Window().Write(uint64(gpa-Window), p[:n])
}

// Device status bits (virtio 1.3, 2.1).
const (
	StatusAcknowledge = 1
	StatusDriver      = 2
	StatusDriverOK    = 4
	StatusFeaturesOK  = 8
	StatusNeedsReset  = 64
	StatusFailed      = 128
)

// NoVector is no interrupt (virtio 1.3, 4.1.5.1.2).
const NoVector = 0xffff

// Offsets in the common configuration structure (virtio 1.3, 4.1.4.3).
const (
	DeviceFeatureSelect = 0x00
	DeviceFeature       = 0x04
	DriverFeatureSelect = 0x08
	DriverFeature       = 0x0c
	ConfigVector        = 0x10
	NumQueues           = 0x12
	DeviceStatus        = 0x14
	ConfigGeneration    = 0x15
	QueueSelect         = 0x16
	QueueSize           = 0x18
	QueueVector         = 0x1a
	QueueEnable         = 0x1c
	QueueNotifyOff      = 0x1e
	QueueDesc           = 0x20
	QueueDriver         = 0x28
	QueueDevice         = 0x30
)

// Device is a driver of one virtio device.
type Device struct {
	Bus  *Bus
	Slot int

	// The structures' addresses, as the capabilities tell.
	Common, ISR, Config, Notify memory.GPA
	NotifyMultiplier            uint32

	// Access is the offset of the configuration access capability.
	Access int

	// MSIX is the offset of the MSI-X capability, Table the address of its
	// table, Pending that of the pending bits, Vectors their number.
	MSIX           int
	Table, Pending memory.GPA
	Vectors        int

	Features uint64  // as negotiated
	Rings    []*Ring // by queue; nil where none was set up
}

// Probe finds the virtio device in a slot: it reads the capability list and
// the addresses that firmware assigned.
func Probe(b *Bus, slot int) (*Device, error) {
	d := &Device{Bus: b, Slot: slot}
	if vendor := b.Config(slot, 0, 2); vendor != 0x1af4 {
		return nil, fmt.Errorf("slot %d: vendor %#x", slot, vendor)
	}
	if id := b.Config(slot, 2, 2); id < 0x1040 || id > 0x107f {
		return nil, fmt.Errorf("slot %d: device %#x is no modern virtio device", slot, id)
	}
	if b.Config(slot, 6, 2)&0x10 == 0 {
		return nil, fmt.Errorf("slot %d: no capabilities", slot)
	}
	seen := 0
	for at := int(b.Config(slot, 0x34, 1)); at != 0; at = int(b.Config(slot, at+1, 1)) {
		if seen++; seen > 48 {
			return nil, fmt.Errorf("slot %d: the capability list is a loop", slot)
		}
		switch b.Config(slot, at, 1) {
		case 0x09:
			place := d.bar(int(b.Config(slot, at+4, 1))) + memory.GPA(b.Config(slot, at+8, 4))
			switch b.Config(slot, at+3, 1) {
			case 1:
				d.Common = place
			case 2:
				d.Notify, d.NotifyMultiplier = place, uint32(b.Config(slot, at+16, 4))
			case 3:
				d.ISR = place
			case 4:
				d.Config = place
			case 5:
				d.Access = at
			}
		case 0x11:
			d.MSIX = at
			d.Vectors = int(b.Config(slot, at+2, 2)&0x7ff) + 1
			table, pba := b.Config(slot, at+4, 4), b.Config(slot, at+8, 4)
			d.Table = d.bar(int(table&7)) + memory.GPA(table&^7)
			d.Pending = d.bar(int(pba&7)) + memory.GPA(pba&^7)
		}
	}
	if d.Common == 0 || d.Notify == 0 || d.ISR == 0 || d.Config == 0 || d.Access == 0 || d.MSIX == 0 {
		return nil, fmt.Errorf("slot %d: a capability is missing: %+v", slot, *d)
	}
	d.Rings = make([]*Ring, d.Field(NumQueues, 2))
	return d, nil
}

func (d *Device) bar(i int) memory.GPA {
	v := d.Bus.Config(d.Slot, 0x10+4*i, 4)
	gpa := memory.GPA(v &^ 0xf)
	if v&6 == 4 {
		gpa |= memory.GPA(d.Bus.Config(d.Slot, 0x14+4*i, 4)) << 32
	}
	return gpa
}

// Type is the device type.
func (d *Device) Type() uint16 { return uint16(d.Bus.Config(d.Slot, 2, 2)) - 0x1040 }

// Field reads a field of n bytes of the common configuration.
func (d *Device) Field(off memory.GPA, n int) uint64 { return d.Bus.Read(d.Common+off, n) }

// SetField writes one, of 8 bytes in two halves.
func (d *Device) SetField(off memory.GPA, n int, v uint64) {
	if n == 8 {
		d.Bus.Write(d.Common+off, 4, v&0xffffffff)
		d.Bus.Write(d.Common+off+4, 4, v>>32)
		return
	}
	d.Bus.Write(d.Common+off, n, v)
}

// Status reads the device status.
func (d *Device) Status() uint8 { return uint8(d.Field(DeviceStatus, 1)) }

// AddStatus sets bits of it.
func (d *Device) AddStatus(bits uint8) { d.SetField(DeviceStatus, 1, uint64(d.Status()|bits)) }

// Reset resets the device and waits until it is done.
func (d *Device) Reset() {
	d.SetField(DeviceStatus, 1, 0)
	for d.Status() != 0 {
		runtime.Gosched() // polling is what the specification asks for (4.1.4.3.2)
	}
	clear(d.Rings)
	d.Features = 0
}

// Offered reads the features that the device offers.
func (d *Device) Offered() (features uint64) {
	for i := range uint64(2) {
		d.SetField(DeviceFeatureSelect, 4, i)
		features |= d.Field(DeviceFeature, 4) << (32 * i)
	}
	return features
}

// Accept writes the features that the driver wants.
func (d *Device) Accept(features uint64) {
	for i := range uint64(2) {
		d.SetField(DriverFeatureSelect, 4, i)
		d.SetField(DriverFeature, 4, features>>(32*i)&0xffffffff)
	}
}

// Negotiate accepts those of the wanted features that are offered.
func (d *Device) Negotiate(want uint64) error {
	d.AddStatus(StatusAcknowledge)
	d.AddStatus(StatusDriver)
	d.Features = d.Offered() & want
	d.Accept(d.Features)
	d.AddStatus(StatusFeaturesOK)
	if d.Status()&StatusFeaturesOK == 0 {
		return fmt.Errorf("the device refuses features %#x of %#x", d.Features, d.Offered())
	}
	return nil
}

// Message is the interrupt that EnableMSIX programs for a vector.
func (d *Device) Message(vector int) pci.Message {
	return pci.Message{Address: 0xfee00000, Data: uint32(d.Slot<<16 | vector)}
}

// EnableMSIX programs and unmasks every vector.
func (d *Device) EnableMSIX() {
	d.Bus.SetConfig(d.Slot, d.MSIX+2, 2, 0xc000)
	for v := range d.Vectors {
		m, at := d.Message(v), d.Table+memory.GPA(16*v)
		d.Bus.Write(at, 4, uint64(m.Address)&0xffffffff)
		d.Bus.Write(at+4, 4, uint64(m.Address>>32))
		d.Bus.Write(at+8, 4, uint64(m.Data))
		d.Bus.Write(at+12, 4, 0)
	}
	d.Bus.SetConfig(d.Slot, d.MSIX+2, 2, 0x8000)
}

// Interrupt is what a vCPU waits for to take interrupts of a vector, or nil if
// the vector is masked.
func (d *Device) Interrupt(vector int) *sys.EventFD { return d.Bus.Kernel.Interrupt(d.Message(vector)) }

// SetupQueue gives queue i a ring of size descriptors, 0 meaning as many as
// the device offers, and a vector, and enables it.
func (d *Device) SetupQueue(i int, m *Memory, size, vector uint16) (*Ring, error) {
	d.SetField(QueueSelect, 2, uint64(i))
	most := uint16(d.Field(QueueSize, 2))
	if most == 0 {
		return nil, fmt.Errorf("there is no queue %d", i)
	}
	if size == 0 {
		size = most
	}
	r := NewRing(m, size, d.Features)
	d.SetField(QueueSize, 2, uint64(size))
	d.SetField(QueueDesc, 8, uint64(r.Desc))
	d.SetField(QueueDriver, 8, uint64(r.Avail))
	d.SetField(QueueDevice, 8, uint64(r.Used))
	d.SetField(QueueVector, 2, uint64(vector))
	if got := d.Field(QueueVector, 2); got != uint64(vector) {
		return nil, fmt.Errorf("queue %d: vector %#x was refused, it reads %#x", i, vector, got)
	}
	doorbell := d.Notify + memory.GPA(d.Field(QueueNotifyOff, 2))*memory.GPA(d.NotifyMultiplier)
	r.Notify = func() { d.Bus.Write(doorbell, 2, uint64(i)) }
	d.SetField(QueueEnable, 2, 1)
	d.Rings[i] = r
	return r, nil
}

// Start takes a device from reset to DRIVER_OK: the wanted features, vector 0
// for the configuration, and every queue as large as offered with vector i+1.
func (d *Device) Start(m *Memory, want uint64) error {
	d.Reset()
	if err := d.Negotiate(want); err != nil {
		return err
	}
	d.EnableMSIX()
	d.SetField(ConfigVector, 2, 0)
	for i := range d.Rings {
		if _, err := d.SetupQueue(i, m, 0, uint16(i+1)); err != nil {
			return err
		}
	}
	d.AddStatus(StatusDriverOK)
	if s := d.Status(); s&(StatusDriverOK|StatusNeedsReset) != StatusDriverOK {
		return fmt.Errorf("the device did not start: status %#x", s)
	}
	return nil
}
