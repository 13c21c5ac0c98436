// Package pci is the guest's PCI bus: a host bridge with its two ways into
// configuration space, functions with base address registers and MSI-X, and
// the map from guest addresses to the functions that decode them.
//
// Everything the guest writes is untrusted: a base address register may point
// anywhere, any access may have any size and place. A function decodes only
// inside the bridge's window and where no earlier function does.
//
// Sources: PCI Local Bus Specification 3.0 ("PCI 3.0"), PCI Express Base
// Specification 5.0 ("PCIe 5.0") for ECAM.
package pci

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"vmm/internal/sys"
	"vmm/memory"
)

// Handler answers accesses to a range; off counts from the range's start and
// len(p) is the width in bytes, of any value. Several vCPUs may call it at
// once. Read fills p.
type Handler interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

// Message is a message-signalled interrupt: a write of Data to Address.
type Message struct {
	Address memory.GPA
	Data    uint32
}

func (m Message) String() string { return fmt.Sprintf("%v=%#x", m.Address, m.Data) }

// Interrupts is the way of an interrupt into the guest (KVM_IRQFD and a GSI
// route that leads to the message).
type Interrupts interface {
	// Connect makes each signal of e the message m from now on, a signal
	// that e holds already included. On an e that is connected it replaces
	// the message.
	Connect(e *sys.EventFD, m Message) error

	// Disconnect ends that for all of events; its error is the first one's that
	// has one. When it returns no signal of theirs is on its way, and later ones
	// stay in their counts.
	Disconnect(events ...*sys.EventFD) error
}

// IOEvents turns a guest's write into a signal without an exit
// (KVM_IOEVENTFD, any length, no data match).
type IOEvents interface {
	Add(gpa memory.GPA, e *sys.EventFD) error
	Remove(gpa memory.GPA, e *sys.EventFD) error
}

// Slots is the number of devices on the bus.
const Slots = 32

// Sizes of what the machine puts into its address spaces for the bridge.
const (
	ECAMSize          = 1 << 20 // bytes of memory: bus 0 only
	ConfigAddressPort = 0xcf8   // one port: a dword written here selects a register
	ConfigDataPort    = 0xcfc   // four ports: the register's bytes
	ConfigDataPorts   = 4
)

// HostConfig is what a bridge needs of the machine.
type HostConfig struct {
	// Window is where functions are given addresses and decode them:
	// WindowSize bytes below 4 GiB where there is nothing else.
	Window     memory.GPA
	WindowSize uint64

	Interrupts Interrupts
	IOEvents   IOEvents

	// Warn hears of what went wrong on the host's side, such as an interrupt
	// that the kernel did not route. The guest goes on without it. It is
	// called once for each thing, whatever the guest does, with locks held:
	// it must not call the bus.
	Warn func(error)
}

// Host is the host bridge of bus 0, the only bus. It sits in slot 0 itself.
type Host struct {
	cfg HostConfig

	mu      sync.Mutex // guards what follows; taken before a function's
	slots   [Slots]*Function
	next    memory.GPA // first address of the window that is not assigned
	mapped  atomic.Pointer[[]mapping]
	address atomic.Uint32 // the configuration address register (PCI 3.0, 3.2.2.3.2)

	connected atomic.Bool // interrupts reach the guest
}

// mapping is a base address register that decodes; a Host's are in ascending
// order of address and disjoint.
type mapping struct {
	start, end memory.GPA // end is behind the last byte
	f          *Function
	bar        int
}

// NewHost makes a bus with nothing on it but the bridge.
func NewHost(cfg HostConfig) *Host {
	h := &Host{cfg: cfg, next: cfg.Window}
	h.mapped.Store(new([]mapping))
	h.connected.Store(true)
	// A bridge without registers of its own, known to drivers as such: Red
	// Hat's generic host bridge.
	bridge := NewFunction(ID{Vendor: 0x1b36, Device: 0x0008, Class: 0x060000, SubsystemVendor: 0x1af4, Subsystem: 0x1100})
	if err := h.Add(0, bridge); err != nil {
		panic(err) // the slot is free and the bridge needs no address
	}
	return h
}

// Add puts f into a slot and does what firmware would: it assigns addresses
// to f's base address registers and enables their decoding. A reset returns f
// to this state.
func (h *Host) Add(slot int, f *Function) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if slot < 0 || slot >= Slots {
		return fmt.Errorf("pci slot %d: there are %d", slot, Slots)
	}
	if h.slots[slot] != nil {
		return fmt.Errorf("pci slot %d is taken", slot)
	}
	next := h.next
	f.mu.Lock()
	for i := range f.bars {
		b := &f.bars[i]
		if b.size == 0 {
			continue
		}
		start := (next + memory.GPA(b.size) - 1) &^ (memory.GPA(b.size) - 1)
		if end := h.cfg.Window + memory.GPA(h.cfg.WindowSize); start < next || start >= end || uint64(end-start) < b.size {
			f.mu.Unlock()
			return fmt.Errorf("pci slot %d: no room for %d bytes of base address register %d in the window of %d bytes at %v",
				slot, b.size, i, h.cfg.WindowSize, h.cfg.Window)
		}
		f.setBAR(i, start)
		next = start + memory.GPA(b.size)
	}
	if f.hasBARs() {
		f.config[regCommand] |= commandMemory
	}
	f.initial = f.config
	f.host = h
	f.mu.Unlock()
	h.next = next
	h.slots[slot] = f
	h.remap()
	return nil
}

// remap works out anew which base address registers decode and moves the
// doorbells along. The outcome depends on the registers only, not on the
// order in which they were written: where two overlap the one in the lower
// slot, then of the lower number, wins. Precondition: h.mu is held.
func (h *Host) remap() {
	var now []mapping
	for _, f := range h.slots {
		if f == nil {
			continue
		}
		f.mu.Lock()
		for i := range f.bars {
			start, ok := f.decodes(i)
			if !ok || !h.inWindow(start, f.bars[i].size) {
				continue
			}
			m := mapping{start, start + memory.GPA(f.bars[i].size), f, i}
			if !slices.ContainsFunc(now, func(o mapping) bool { return m.start < o.end && o.start < m.end }) {
				now = append(now, m)
			}
		}
		f.mu.Unlock()
	}
	slices.SortFunc(now, func(a, b mapping) int { return cmp.Compare(a.start, b.start) })
	old := *h.mapped.Load()
	// Without its event a doorbell still works, by way of an exit and the
	// function's handler, so none is lost between these steps.
	h.doorbells(old, now, h.removeDoorbell)
	h.mapped.Store(&now)
	h.doorbells(now, old, h.addDoorbell)
}

func (h *Host) inWindow(start memory.GPA, size uint64) bool {
	off := uint64(start - h.cfg.Window) // wraps around below the window: too large
	return off < h.cfg.WindowSize && size <= h.cfg.WindowSize-off
}

// doorbells does something to those of the mappings that are not in except.
func (h *Host) doorbells(mappings, except []mapping, do func(memory.GPA, *doorbell)) {
	for _, m := range mappings {
		if slices.Contains(except, m) {
			continue
		}
		bells := m.f.bars[m.bar].doorbells
		for i := range bells {
			do(m.start+memory.GPA(bells[i].off), &bells[i])
		}
	}
}

func (h *Host) addDoorbell(gpa memory.GPA, d *doorbell) {
	err := h.cfg.IOEvents.Add(gpa, d.event)
	d.added = err == nil
	if err != nil && !d.warned { // once, however often the guest moves it
		d.warned = true
		h.cfg.Warn(fmt.Errorf("pci: doorbell at %v works, but slowly: %w", gpa, err))
	}
}

func (h *Host) removeDoorbell(gpa memory.GPA, d *doorbell) {
	if !d.added {
		return
	}
	d.added = false
	if err := h.cfg.IOEvents.Remove(gpa, d.event); err != nil {
		h.cfg.Warn(fmt.Errorf("pci: doorbell at %v stays in the kernel: %w", gpa, err))
	}
}

// Window answers accesses to the window, at offsets from its start.
func (h *Host) Window() Handler { return window{h} }

type window struct{ h *Host }

func (w window) Read(off uint64, p []byte) {
	if handler, at := w.h.lookup(off, len(p)); handler != nil {
		handler.Read(at, p)
		return
	}
	ones(p)
}

func (w window) Write(off uint64, p []byte) {
	if handler, at := w.h.lookup(off, len(p)); handler != nil {
		handler.Write(at, p)
	}
}

// lookup finds the base address register that decodes all of an access. It
// takes no lock.
func (h *Host) lookup(off uint64, n int) (Handler, uint64) {
	gpa := h.cfg.Window + memory.GPA(off)
	mapped := *h.mapped.Load()
	i, found := slices.BinarySearchFunc(mapped, gpa, func(m mapping, gpa memory.GPA) int { return cmp.Compare(m.start, gpa) })
	if !found {
		i-- // the last that starts below gpa
	}
	if i < 0 || gpa >= mapped[i].end || uint64(mapped[i].end-gpa) < uint64(n) {
		return nil, 0
	}
	return mapped[i].f.bars[mapped[i].bar].handler, uint64(gpa - mapped[i].start)
}

// ones is what a PC reads where nobody answers.
func ones(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}

// ECAM answers accesses to memory-mapped configuration space, ECAMSize bytes
// (PCIe 5.0, 7.2.2).
func (h *Host) ECAM() Handler { return ecam{h} }

type ecam struct{ h *Host }

func (e ecam) Read(off uint64, p []byte)  { e.h.readConfig(off, p) }
func (e ecam) Write(off uint64, p []byte) { e.h.writeConfig(off, p) }

// find answers the function that has the configuration space at off, an ECAM
// offset, and off within it. Only functions 0 of bus 0 are there.
func (h *Host) find(off uint64) (*Function, uint64) {
	slot, function := off>>15, off>>12&7
	if slot >= Slots || function != 0 {
		return nil, 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.slots[slot], off & 0xfff
}

func (h *Host) readConfig(off uint64, p []byte) {
	if f, reg := h.find(off); f != nil {
		f.ReadConfig(reg, p)
		return
	}
	ones(p)
}

func (h *Host) writeConfig(off uint64, p []byte) {
	f, reg := h.find(off)
	if f == nil {
		return
	}
	if f.WriteConfig(reg, p) {
		h.mu.Lock()
		h.remap()
		h.mu.Unlock()
	}
}

// ConfigAddress answers accesses to the port ConfigAddressPort. Only those of
// a whole dword count (PCI 3.0, 3.2.2.3.2).
func (h *Host) ConfigAddress() Handler { return configAddress{h} }

type configAddress struct{ h *Host }

func (a configAddress) Read(off uint64, p []byte) {
	if off != 0 || len(p) != 4 {
		ones(p)
		return
	}
	binary.LittleEndian.PutUint32(p, a.h.address.Load())
}

func (a configAddress) Write(off uint64, p []byte) {
	if off == 0 && len(p) == 4 {
		a.h.address.Store(binary.LittleEndian.Uint32(p) & configAddressMask)
	}
}

// The address register: enable, bus, device and function, register.
const (
	configAddressEnable = 1 << 31
	configAddressMask   = configAddressEnable | 0xfffffc
)

// ConfigData answers accesses to the ports from ConfigDataPort on.
func (h *Host) ConfigData() Handler { return configData{h} }

type configData struct{ h *Host }

func (d configData) Read(off uint64, p []byte) {
	ones(p)
	if at, p, ok := d.register(off, p); ok {
		d.h.readConfig(at, p)
	}
}

func (d configData) Write(off uint64, p []byte) {
	if at, p, ok := d.register(off, p); ok {
		d.h.writeConfig(at, p)
	}
}

// register answers the ECAM offset that an access means and the part of p that
// falls into the four ports.
func (d configData) register(off uint64, p []byte) (uint64, []byte, bool) {
	address := uint64(d.h.address.Load())
	if address&configAddressEnable == 0 || off >= ConfigDataPorts || address>>16&0xff != 0 {
		return 0, nil, false
	}
	p = p[:min(len(p), int(ConfigDataPorts-off))]
	return address&0xff00<<4 | address&0xfc + off, p, true
}

// ConnectInterrupts lets the interrupts of all functions reach the guest, as
// they do from the start. Those that came while they did not come now.
func (h *Host) ConnectInterrupts() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.connected.Store(true)
	for _, f := range h.slots {
		if f != nil && f.msix != nil {
			f.mu.Lock()
			f.msix.updateAll()
			f.mu.Unlock()
		}
	}
}

// DisconnectInterrupts holds the interrupts of all functions back. When it
// returns none is on its way in the kernel, so once the vCPUs stand the local
// APICs' state is final, and what came since stays pending.
func (h *Host) DisconnectInterrupts() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.connected.Store(false)
	var events []*sys.EventFD
	for _, f := range h.slots {
		if f != nil && f.msix != nil {
			f.mu.Lock() // until all are disconnected, as the guest sees its vectors
			defer f.mu.Unlock()
			events = append(events, f.msix.unwanted(0, len(f.msix.events))...)
		}
	}
	h.disconnect(events)
}

func (h *Host) disconnect(events []*sys.EventFD) {
	if len(events) == 0 {
		return
	}
	if err := h.cfg.Interrupts.Disconnect(events...); err != nil {
		h.cfg.Warn(fmt.Errorf("pci: MSI-X vectors off: %w", err))
	}
}

// Reset returns every function to the state in which Add left it and calls
// what OnReset registered. The vCPUs stand still.
func (h *Host) Reset() {
	h.mu.Lock()
	slots := h.slots
	h.mu.Unlock()
	h.address.Store(0)
	for _, f := range slots {
		if f != nil {
			f.reset()
		}
	}
	h.mu.Lock()
	h.remap()
	h.mu.Unlock()
}

// Close takes every doorbell and interrupt back from the kernel and closes
// the interrupts' eventfds. The devices are stopped and the vCPUs gone.
func (h *Host) Close() error {
	h.DisconnectInterrupts()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.doorbells(*h.mapped.Swap(new([]mapping)), nil, h.removeDoorbell)
	var errs []error
	for i, f := range h.slots {
		if f != nil && f.msix != nil {
			errs = append(errs, f.msix.close())
		}
		h.slots[i] = nil
	}
	return errors.Join(errs...)
}

// State is the bus as plain values for migration.
type State struct {
	ConfigAddress uint32
	Functions     []FunctionState // in ascending order of slot, the bridge's included
}

// FunctionState is one function.
type FunctionState struct {
	Slot    int
	Config  []byte // configuration space, 256 bytes
	Vectors []VectorState
}

// VectorState is one entry of an MSI-X table, and its pending bit.
type VectorState struct {
	Message Message
	Control uint32 // bit 0: masked
	Pending bool   // an interrupt waits to be delivered
}

// State reads the bus. The vCPUs and the devices stand still and the
// interrupts are disconnected: it fails if they are not, because an interrupt
// in the kernel would be missing in the state.
func (h *Host) State() (State, error) {
	if h.connected.Load() {
		return State{}, errors.New("pci state: interrupts are connected, and may be on their way")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s := State{ConfigAddress: h.address.Load()}
	for slot, f := range h.slots {
		if f != nil {
			s.Functions = append(s.Functions, f.state(slot))
		}
	}
	return s, nil
}

// SetState makes the bus what s says. s is not trusted: it must describe the
// same functions, down to the last read-only bit. On an error nothing has
// changed. It leaves the interrupts disconnected, pending ones included.
func (h *Host) SetState(s State) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var mine []int
	for slot, f := range h.slots {
		if f != nil {
			mine = append(mine, slot)
		}
	}
	if theirs := slotsOf(s); !slices.Equal(mine, theirs) {
		return fmt.Errorf("pci state: functions in slots %v; this machine has %v", theirs, mine)
	}
	for _, fs := range s.Functions {
		if err := h.slots[fs.Slot].check(fs); err != nil {
			return fmt.Errorf("pci state: slot %d: %w", fs.Slot, err)
		}
	}
	h.connected.Store(false)
	h.address.Store(s.ConfigAddress & configAddressMask)
	for _, fs := range s.Functions {
		h.slots[fs.Slot].setState(fs)
	}
	h.remap()
	return nil
}

func slotsOf(s State) []int {
	var slots []int
	for _, f := range s.Functions {
		slots = append(slots, f.Slot)
	}
	return slots
}
