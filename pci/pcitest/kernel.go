// Package pcitest stands in for the kernel behind a PCI host bridge, for
// tests: it remembers which eventfds are interrupts and which addresses are
// doorbells, and is as strict about them as KVM.
package pcitest

import (
	"fmt"
	"sync"

	"vmm/internal/sys"
	"vmm/memory"
	"vmm/pci"
)

// Kernel is a pci.Interrupts and a pci.IOEvents. Its zero value is ready.
type Kernel struct {
	mu        sync.Mutex
	routes    map[*sys.EventFD]pci.Message
	doorbells map[memory.GPA]*sys.EventFD
	fail      error
}

// FailWith makes every later call fail with err; nil ends that.
func (k *Kernel) FailWith(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail = err
}

func (k *Kernel) Connect(e *sys.EventFD, m pci.Message) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	if k.routes == nil {
		k.routes = map[*sys.EventFD]pci.Message{}
	}
	k.routes[e] = m
	return nil
}

func (k *Kernel) Disconnect(events ...*sys.EventFD) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	var err error
	for _, e := range events {
		if _, ok := k.routes[e]; !ok && err == nil {
			err = fmt.Errorf("eventfd %d is not connected", e.FD())
		}
		delete(k.routes, e)
	}
	return err
}

func (k *Kernel) Add(gpa memory.GPA, e *sys.EventFD) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	if _, ok := k.doorbells[gpa]; ok {
		return fmt.Errorf("there is a doorbell at %v", gpa)
	}
	if k.doorbells == nil {
		k.doorbells = map[memory.GPA]*sys.EventFD{}
	}
	k.doorbells[gpa] = e
	return nil
}

func (k *Kernel) Remove(gpa memory.GPA, e *sys.EventFD) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	if k.doorbells[gpa] != e {
		return fmt.Errorf("eventfd %d is no doorbell at %v", e.FD(), gpa)
	}
	delete(k.doorbells, gpa)
	return nil
}

// Doorbell is what a guest's write at gpa signals, or nil.
func (k *Kernel) Doorbell(gpa memory.GPA) *sys.EventFD {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.doorbells[gpa]
}

// Doorbells are the addresses of all doorbells.
func (k *Kernel) Doorbells() map[memory.GPA]*sys.EventFD {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := map[memory.GPA]*sys.EventFD{}
	for gpa, e := range k.doorbells {
		all[gpa] = e
	}
	return all
}

// Interrupt is the eventfd that is connected as m, or nil: to wait for it is
// to be the vCPU that takes the interrupt.
func (k *Kernel) Interrupt(m pci.Message) *sys.EventFD {
	k.mu.Lock()
	defer k.mu.Unlock()
	for e, got := range k.routes {
		if got == m {
			return e
		}
	}
	return nil
}

// Connected is the number of interrupts connected.
func (k *Kernel) Connected() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.routes)
}
