package machine

import (
	"fmt"
	"slices"
	"sync"

	"vmm/internal/sys"
	"vmm/kvm"
	"vmm/memory"
	"vmm/pci"
)

// maxMSIs bounds the routes: KVM takes 4096 entries, pins included.
const maxMSIs = 2048

// interrupts leads eventfds to the guest's vCPUs: each connected one has a GSI
// of its own, whose route is the vector's message.
type interrupts struct {
	vm *kvm.VM

	mu     sync.Mutex
	routes []msiRoute // index i is GSI kvm.FirstMSI+i
}

type msiRoute struct {
	event   *sys.EventFD // nil: the GSI is free
	message pci.Message
}

var _ pci.Interrupts = (*interrupts)(nil)

// Connect implements pci.Interrupts.
func (r *interrupts) Connect(e *sys.EventFD, m pci.Message) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := r.find(e)
	assigned := i >= 0
	if !assigned {
		if i = r.find(nil); i < 0 {
			if len(r.routes) == maxMSIs {
				return fmt.Errorf("all %d interrupt routes are in use", maxMSIs)
			}
			i = len(r.routes)
			r.routes = append(r.routes, msiRoute{})
		}
	}
	before := r.routes[i]
	r.routes[i] = msiRoute{e, m}
	err := r.load()
	if err == nil && !assigned {
		err = r.vm.AssignIRQFD(e.FD(), kvm.FirstMSI+kvm.GSI(i))
	}
	if err != nil {
		r.routes[i] = before
	}
	return err
}

// disconnectAtOnce bounds the system calls that Disconnect makes at a time, as each
// takes one of Go's Ps from who else needs it.
const disconnectAtOnce = 4

// Disconnect implements pci.Interrupts. KVM waits for each eventfd until nobody
// uses it any more, which takes milliseconds, but hardly longer for several.
func (r *interrupts) Disconnect(events ...*sys.EventFD) (err error) {
	// Held to the end: until then late signals find their way by the route.
	r.mu.Lock()
	defer r.mu.Unlock()
	for some := range slices.Chunk(events, disconnectAtOnce) {
		errs := make([]error, len(some))
		var others sync.WaitGroup
		for n, e := range some[1:] {
			others.Go(func() { errs[n+1] = r.deassign(e) })
		}
		errs[0] = r.deassign(some[0])
		others.Wait()
		for i, e := range some { // the routes stay in the kernel's table until the next load
			if at := r.find(e); at >= 0 {
				r.routes[at] = msiRoute{}
			}
			if err == nil {
				err = errs[i]
			}
		}
	}
	return err
}

func (r *interrupts) deassign(e *sys.EventFD) error {
	i := r.find(e)
	if i < 0 {
		return nil
	}
	return r.vm.DeassignIRQFD(e.FD(), kvm.FirstMSI+kvm.GSI(i))
}

func (r *interrupts) find(e *sys.EventFD) int {
	return slices.IndexFunc(r.routes, func(x msiRoute) bool { return x.event == e })
}

// load gives KVM the whole table, in which the pins' routes must not be
// missing.
func (r *interrupts) load() error {
	table := kvm.ChipRoutes()
	for i, x := range r.routes {
		if x.event != nil {
			table = append(table, kvm.MSIRoute(kvm.FirstMSI+kvm.GSI(i), kvm.MSI{Addr: x.message.Address, Data: x.message.Data}))
		}
	}
	return r.vm.SetGSIRouting(table)
}

// ioEvents turns notifications into signals inside the kernel.
type ioEvents struct{ vm *kvm.VM }

var _ pci.IOEvents = ioEvents{}

// Add implements pci.IOEvents.
func (x ioEvents) Add(gpa memory.GPA, e *sys.EventFD) error {
	return x.vm.AssignIOEvent(kvm.IOEvent{FD: e.FD(), Addr: gpa})
}

// Remove implements pci.IOEvents.
func (x ioEvents) Remove(gpa memory.GPA, e *sys.EventFD) error {
	return x.vm.DeassignIOEvent(kvm.IOEvent{FD: e.FD(), Addr: gpa})
}
