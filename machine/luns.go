package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"vmm/scsi"
	"vmm/scsi/disk"
	"vmm/scsi/sg"
	"vmm/virtio"
)

// openLUNs opens every LUN of the configuration, and asks each for the
// reservation that its guest begins with.
func (m *Machine) openLUNs() error {
	m.onClose(m.closeLUNs)
	var units []*lun
	defer func() { m.luns.Store(&units) }() // also what closeLUNs closes after an error
	for _, c := range m.cfg.LUNs {
		l, err := m.findLUN(c)
		if err != nil {
			return err
		}
		units = append(units, l)
	}
	var asked sync.WaitGroup
	errs := make([]error, len(units))
	for i, l := range units {
		asked.Go(func() { errs[i] = m.meet(context.Background(), l) })
	}
	asked.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// units are the logical units of the guest. The slice is not changed: attaching
// or detaching one makes another.
func (m *Machine) units() []*lun {
	if list := m.luns.Load(); list != nil {
		return *list
	}
	return nil
}

// meet asks a LUN who it is, and for the reservation that its guest begins
// with.
func (m *Machine) meet(ctx context.Context, l *lun) error {
	if err := l.identify(ctx); err != nil {
		return fmt.Errorf("LUN %s: %w", l.cfg.Path, err)
	}
	if want := l.cfg.Identity; want != "" && l.identity.String() != want {
		return fmt.Errorf("LUN %s: it is %s; the guest's is %s", l.cfg.Path, l.identity, want)
	}
	if l.beside() {
		return nil // what the guest has there, the takeover says
	}
	if err := l.learn(ctx); err != nil {
		m.cfg.Warn(fmt.Sprintf("LUN %s: %v", l.cfg.Path, err))
	}
	return nil
}

// findLUN opens one LUN, which it looks for among this host's devices if no
// path is given: where several lead to it, one that nobody else uses.
func (m *Machine) findLUN(c LUNConfig) (*lun, error) {
	if c.Path != "" {
		return m.openLUN(c)
	}
	// First the one by which the guest has it already: there nothing has to move.
	paths, err := sg.Find(c.Identity, c.handed())
	if err != nil {
		return nil, fmt.Errorf("LUN %s: %w", c.ID, err)
	}
	for i, path := range paths {
		c.Path = path
		l, err := m.openLUN(c)
		if err == nil || i == len(paths)-1 || !errors.Is(err, sg.ErrBusy) {
			return l, err
		}
	}
	return nil, fmt.Errorf("LUN %s: no SCSI device of this host is %s; log in to its target or rescan, or name the device with --lun id=%[1]s,path=PATH", c.ID, c.Identity)
}

// passthrough is a logical unit of this host: a *sg.LUN.
type passthrough interface {
	scsi.LUN
	Nexus() sg.Nexus
	Held() []*os.File
	Shared() bool
	Possess(vm string) error
}

// beside says that another process of this host has the LUN too, by the same
// nexus, and that the guest may run there.
func (l *lun) beside() bool {
	p, ok := l.backend.(passthrough)
	return ok && p.Shared()
}

// handed is what lets this process use a LUN by the nexus of another one, from
// which the guest comes; nil: there is none.
func (c *LUNConfig) handed() *sg.Handed {
	if c.Offered == nil {
		return nil
	}
	return &sg.Handed{BootID: c.Offered.BootID, Address: c.Offered.Address, Files: c.Offered.Held}
}

// possess has the LUNs that were handed over say that they are this machine's.
func (m *Machine) possess() {
	for _, l := range m.units() {
		if !l.beside() {
			continue
		}
		if err := l.backend.(passthrough).Possess(m.cfg.Name); err != nil {
			m.cfg.Warn(fmt.Sprintf("LUN %s: %v", l.cfg.Path, err))
		}
	}
}

// openLUN opens one LUN.
func (m *Machine) openLUN(c LUNConfig) (*lun, error) {
	backend, err := m.openBackend(&c)
	if err != nil {
		return nil, err
	}
	return newLUN(backend, c), nil
}

// openBackend opens what a LUN's path names, which decides what kind it is.
func (m *Machine) openBackend(l *LUNConfig) (scsi.LUN, error) {
	info, err := os.Stat(l.Path)
	if err != nil {
		return nil, fmt.Errorf("LUN %s: %w", l.Path, cause(err))
	}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		if l.Initiator != "" {
			return open(disk.Open(l.Path, disk.Options{ReadOnly: l.ReadOnly, Initiator: l.Initiator}))
		}
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("LUN %s: this host has no name: %w; give initiator=NAME", l.Path, err)
		}
		return m.openImage(l, host+":"+m.cfg.Name)
	case mode&os.ModeDevice != 0:
		if l.Initiator != "" {
			return nil, fmt.Errorf("LUN %s: initiator=%s: a device's nexus is that of this host's port; only a software disk can be given another", l.Path, l.Initiator)
		}
		return open(sg.Open(l.Path, sg.Options{VM: m.cfg.Name, RunDir: m.cfg.RunDir, Timeout: l.Timeout, Handed: l.handed()}))
	}
	return nil, fmt.Errorf("LUN %s: neither a device nor a regular file: give a /dev/sgN, a SCSI block device or a disk image", l.Path)
}

// openImage opens a software disk by the nexus called name. A guest that comes
// from another process of this host under the name that it has there finds its
// nexus in use, by itself: then it takes a second one, from which it comes back
// to the first the next time. If it ends on the second one, and leaves its
// registration there, it begins there. Neither is anybody's while a guest of
// that name has the other.
func (m *Machine) openImage(l *LUNConfig, name string) (scsi.LUN, error) {
	second := name + "#2"
	o := disk.Options{ReadOnly: l.ReadOnly, Initiator: name}
	d, err := disk.Open(l.Path, o)
	switch {
	case l.Offered != nil && errors.Is(err, disk.ErrInUse):
		o.Initiator = second
		return open(disk.Open(l.Path, o))
	case err != nil || l.Offered != nil:
		return open(d, err)
	}
	taken, err := d.Seated(second)
	if taken {
		err = fmt.Errorf("disk: %s: %w as initiator %s, by another guest of this name; stop it first, or give this one another name", l.Path, disk.ErrInUse, second)
	}
	here, there := false, false
	if err == nil && m.guest == guestBoots {
		here, err = d.Registered(name)
	}
	if err == nil && m.guest == guestBoots && !here {
		there, err = d.Registered(second)
	}
	if err == nil && !there {
		return d, nil
	}
	if err = errors.Join(err, d.Close()); err != nil {
		return nil, err
	}
	o.Initiator = second
	return open(disk.Open(l.Path, o))
}

// open makes of a backend that could not be opened none at all, rather than
// an interface around nil.
func open[L scsi.LUN](l L, err error) (scsi.LUN, error) {
	if err != nil {
		return nil, err
	}
	return l, nil
}

// limits is what a command to any of the LUNs may carry.
func limits(luns []*lun) scsi.Limits {
	var least scsi.Limits
	narrow := func(a, b uint32) uint32 {
		if a == 0 || b == 0 {
			return max(a, b)
		}
		return min(a, b)
	}
	for _, l := range luns {
		own := l.Limits()
		least.MaxTransfer = narrow(least.MaxTransfer, own.MaxTransfer)
		least.MaxSegments = narrow(least.MaxSegments, own.MaxSegments)
	}
	return least
}

// makeVirtio puts the virtio devices on the bus.
func (m *Machine) makeVirtio() error {
	m.scsi = virtio.NewSCSI(virtio.SCSIConfig{Queues: m.cfg.CPUs, Limits: limits(m.units())})
	for _, l := range m.units() {
		if err := m.scsi.Attach(uint8(l.cfg.Target), l); err != nil {
			return err
		}
	}
	for i, d := range []struct {
		name   string
		device virtio.Device
	}{{"virtio-scsi", m.scsi}, {"virtio-rng", virtio.NewRNG()}} {
		t, err := virtio.NewPCI(d.device, virtio.PCIConfig{RAM: m.ram, Name: d.name, Log: func(err error) { m.cfg.Warn(err.Error()) }})
		if err != nil {
			return err
		}
		m.virtio = append(m.virtio, t)
		if err := m.pci.Add(i+1, t.Function()); err != nil {
			return err
		}
	}
	return nil
}
