package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"

	"vmm/internal/sys"
	"vmm/memory"
)

// MSI-X (PCI 3.0, 6.8.2): the capability, the table and the pending bits.
const (
	capMSIX = 0x11

	msixEnable       = 1 << 15
	msixFunctionMask = 1 << 14

	vectorSize    = 16 // address, data, control
	vectorData    = 8
	vectorControl = 12
	vectorMasked  = 1 << 0
)

// MaxVectors is the largest size of an MSI-X table.
const MaxVectors = 2048

// MSIX is a function's MSI-X interrupts. Each vector is an eventfd. While the
// vector is enabled and not masked the kernel turns its signals into the
// vector's message; otherwise they stay in its count, which is thereby the
// pending bit.
type MSIX struct {
	f       *Function
	control uint64 // offset of the control register in configuration space
	events  []*sys.EventFD
	pba     uint64 // offset of the pending bits in the base address register

	enabled atomic.Bool // the enable bit, for readers without f.mu

	// Guarded by f.mu.
	table     []byte
	connected []bool
	message   []Message // as connected
	warned    []bool
}

// AddMSIX gives the function MSI-X with a number of vectors, whose table and
// pending bits take the base address register i.
func (f *Function) AddMSIX(i, vectors int) (*MSIX, error) {
	if vectors < 1 || vectors > MaxVectors || f.msix != nil {
		panic(fmt.Sprintf("pci: MSI-X with %d vectors", vectors))
	}
	// The table in the lower half, the pending bits in the upper one.
	size := max(memory.PageSize, uint64(1)<<bits.Len(uint(2*vectorSize*vectors-1)))
	m := &MSIX{
		f:         f,
		pba:       size / 2,
		table:     make([]byte, vectorSize*vectors),
		connected: make([]bool, vectors),
		message:   make([]Message, vectors),
		warned:    make([]bool, vectors),
	}
	for range vectors {
		e, err := sys.NewEventFD()
		if err != nil {
			m.close()
			return nil, fmt.Errorf("MSI-X vector: %w", err)
		}
		m.events = append(m.events, e)
	}
	f.AddBAR(i, size, false, m)
	body := make([]byte, 10) // control, table, pending bits
	binary.LittleEndian.PutUint16(body, uint16(vectors-1))
	binary.LittleEndian.PutUint32(body[2:], uint32(i))
	binary.LittleEndian.PutUint32(body[6:], uint32(m.pba)|uint32(i))
	const writable = (msixEnable | msixFunctionMask) >> 8
	m.control = 2 + uint64(f.AddCapability(Capability{ID: capMSIX, Body: body, Writable: []byte{0, writable}}))
	m.maskAll()
	f.msix = m
	return m, nil
}

func (m *MSIX) maskAll() {
	clear(m.table)
	for v := range m.events {
		m.table[vectorSize*v+vectorControl] = vectorMasked
	}
}

// Vectors is the number of vectors.
func (m *MSIX) Vectors() int { return len(m.events) }

// Enabled reports whether the guest uses MSI-X. It takes no lock.
func (m *MSIX) Enabled() bool { return m.enabled.Load() }

// Signal raises vector v. A vector that there is not is ignored. It takes no
// lock and does not allocate.
func (m *MSIX) Signal(v uint16) {
	if int(v) < len(m.events) {
		// It can only fail on a closed eventfd, and then the bus is gone.
		_ = m.events[v].Signal()
	}
}

// Unmasked reports whether an interrupt of vector v reaches the guest at once.
func (m *MSIX) Unmasked(v uint16) bool {
	m.f.mu.Lock()
	defer m.f.mu.Unlock()
	return int(v) < len(m.events) && m.unmasked(int(v))
}

// Precondition for the methods from here on, where not said otherwise: f.mu
// is held.

func (m *MSIX) unmasked(v int) bool {
	control := binary.LittleEndian.Uint16(m.f.config[m.control:])
	return control&(msixEnable|msixFunctionMask) == msixEnable && m.table[vectorSize*v+vectorControl]&vectorMasked == 0
}

func (m *MSIX) entry(v int) Message {
	e := m.table[vectorSize*v:]
	return Message{
		Address: memory.GPA(binary.LittleEndian.Uint64(e)),
		Data:    binary.LittleEndian.Uint32(e[vectorData:]),
	}
}

// update connects or disconnects the vectors from first up to end, as the
// registers say now.
func (m *MSIX) update(first, end int) {
	h := m.f.host
	if h == nil {
		return
	}
	h.disconnect(m.unwanted(first, end))
	for v := first; v < end; v++ {
		message := m.entry(v)
		if !m.wanted(v) || m.connected[v] && m.message[v] == message {
			continue
		}
		if err := h.cfg.Interrupts.Connect(m.events[v], message); err != nil {
			if !m.warned[v] { // once, however often the guest unmasks it
				m.warned[v] = true
				h.cfg.Warn(fmt.Errorf("pci: MSI-X vector %d as %v: %w", v, message, err))
			}
			continue
		}
		m.connected[v], m.message[v] = true, message
	}
}

func (m *MSIX) updateAll() { m.update(0, len(m.events)) }

func (m *MSIX) wanted(v int) bool { return m.unmasked(v) && m.f.host.connected.Load() }

// unwanted takes back which of the vectors are connected and must not be: the
// caller disconnects them.
func (m *MSIX) unwanted(first, end int) (events []*sys.EventFD) {
	for v := first; v < end; v++ {
		if m.connected[v] && !m.wanted(v) {
			m.connected[v] = false
			events = append(events, m.events[v])
		}
	}
	return events
}

func (m *MSIX) controlWritten() {
	on := binary.LittleEndian.Uint16(m.f.config[m.control:])&msixEnable != 0
	if h := m.f.host; on && !m.enabled.Load() && h != nil && h.connected.Load() {
		// Signals from before were no messages. Where interrupts are held back
		// they may be.
		for _, e := range m.events {
			e.Drain()
		}
	}
	m.enabled.Store(on)
	m.updateAll()
}

// Read answers an access to the base address register; it takes f.mu itself.
func (m *MSIX) Read(off uint64, p []byte) {
	clear(p)
	m.f.mu.Lock()
	defer m.f.mu.Unlock()
	if off < uint64(len(m.table)) {
		copy(p, m.table[off:])
	}
	for i := range p {
		if at := off + uint64(i); at >= m.pba {
			p[i] = m.pendingByte(at - m.pba)
		}
	}
}

// pendingByte is byte i of the pending bits.
func (m *MSIX) pendingByte(i uint64) (b byte) {
	for bit := range uint64(8) {
		// A signal of a connected vector is on its way, not pending.
		if v := 8*i + bit; v < uint64(len(m.events)) && !m.connected[v] && m.events[v].Pending() {
			b |= 1 << bit
		}
	}
	return b
}

// Write answers an access to the base address register; it takes f.mu itself.
// The pending bits are read-only.
func (m *MSIX) Write(off uint64, p []byte) {
	m.f.mu.Lock()
	defer m.f.mu.Unlock()
	for i, b := range p {
		at := off + uint64(i)
		if at >= uint64(len(m.table)) {
			break
		}
		switch in := at % vectorSize; {
		case in == vectorControl:
			b &= vectorMasked
		case in > vectorControl:
			b = 0 // reserved
		}
		m.table[at] = b
	}
	first := off / vectorSize
	last := (off + uint64(len(p)) - 1) / vectorSize
	if end := min(last+1, uint64(len(m.events))); len(p) > 0 && first < end {
		m.update(int(first), int(end))
	}
}

func (m *MSIX) reset() {
	m.maskAll()
	m.enabled.Store(false)
	m.updateAll()
	for _, e := range m.events {
		e.Drain()
	}
}

func (m *MSIX) state() []VectorState {
	s := make([]VectorState, len(m.events))
	for v := range s {
		s[v] = VectorState{
			Message: m.entry(v),
			Control: binary.LittleEndian.Uint32(m.table[vectorSize*v+vectorControl:]),
			Pending: m.events[v].Pending(),
		}
	}
	return s
}

func (m *MSIX) setState(s []VectorState) {
	for v, vs := range s {
		e := m.table[vectorSize*v:]
		binary.LittleEndian.PutUint64(e, uint64(vs.Message.Address))
		binary.LittleEndian.PutUint32(e[vectorData:], vs.Message.Data)
		binary.LittleEndian.PutUint32(e[vectorControl:], vs.Control&vectorMasked)
	}
	m.enabled.Store(binary.LittleEndian.Uint16(m.f.config[m.control:])&msixEnable != 0)
	m.updateAll() // disconnects
	for v, vs := range s {
		m.events[v].Drain()
		if vs.Pending {
			m.Signal(uint16(v))
		}
	}
}

func (m *MSIX) close() error {
	var errs []error
	for _, e := range m.events {
		errs = append(errs, e.Close())
	}
	return errors.Join(errs...)
}
