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
	for i := range m.cfg.LUNs {
		backend, err := m.findLUN(&m.cfg.LUNs[i])
		if err != nil {
			return err
		}
		m.onClose(backend.Close)
		m.luns = append(m.luns, newLUN(backend, &m.cfg.LUNs[i]))
	}
	var asked sync.WaitGroup
	errs := make([]error, len(m.luns))
	for i, l := range m.luns {
		asked.Go(func() {
			if errs[i] = l.identify(); errs[i] != nil {
				return
			}
			if want := m.cfg.LUNs[i].Identity; want != "" && l.identity.String() != want {
				errs[i] = fmt.Errorf("it is %s; the guest's is %s", l.identity, want)
			} else {
				if err := l.learn(context.Background()); err != nil {
					m.cfg.Warn(fmt.Sprintf("LUN %s: %v", m.cfg.LUNs[i].Path, err))
				}
			}
		})
	}
	asked.Wait()
	for i, err := range errs {
		if err != nil {
			return fmt.Errorf("LUN %s: %w", m.cfg.LUNs[i].Path, err)
		}
	}
	return nil
}

// findLUN opens one LUN, which it looks for among this host's devices if no
// path is given: where several lead to it, one that nobody else uses.
func (m *Machine) findLUN(l *LUNConfig) (scsi.LUN, error) {
	if l.Path != "" {
		return m.openLUN(l)
	}
	paths, err := sg.Find(l.Identity)
	if err != nil {
		return nil, fmt.Errorf("LUN %s: %w", l.ID, err)
	}
	for i, path := range paths {
		l.Path = path
		lun, err := m.openLUN(l)
		if err == nil || i == len(paths)-1 || !errors.Is(err, sg.ErrBusy) {
			return lun, err
		}
	}
	return nil, fmt.Errorf("LUN %s: no SCSI device of this host is %s; log in to its target or rescan, or name the device with --lun id=%[1]s,path=PATH", l.ID, l.Identity)
}

// openLUN opens one LUN: what its path names decides which kind it is.
func (m *Machine) openLUN(l *LUNConfig) (scsi.LUN, error) {
	info, err := os.Stat(l.Path)
	if err != nil {
		return nil, fmt.Errorf("LUN %s: %w", l.Path, cause(err))
	}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		initiator := l.Initiator
		if initiator == "" {
			host, err := os.Hostname()
			if err != nil {
				return nil, fmt.Errorf("LUN %s: this host has no name: %w; give initiator=NAME", l.Path, err)
			}
			initiator = host + ":" + m.cfg.Name
		}
		return open(disk.Open(l.Path, disk.Options{ReadOnly: l.ReadOnly, Initiator: initiator}))
	case mode&os.ModeDevice != 0:
		if l.Initiator != "" {
			return nil, fmt.Errorf("LUN %s: initiator=%s: a device's nexus is that of this host's port; only a software disk can be given another", l.Path, l.Initiator)
		}
		return open(sg.Open(l.Path, sg.Options{VM: m.cfg.Name, RunDir: m.cfg.RunDir, Timeout: l.Timeout}))
	}
	return nil, fmt.Errorf("LUN %s: neither a device nor a regular file: give a /dev/sgN, a SCSI block device or a disk image", l.Path)
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
	m.scsi = virtio.NewSCSI(virtio.SCSIConfig{Queues: m.cfg.CPUs, Limits: limits(m.luns)})
	for i, lun := range m.luns {
		if err := m.scsi.Attach(uint8(m.cfg.LUNs[i].Target), lun); err != nil {
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
