package kvm

import (
	"encoding/binary"
	"fmt"

	"vmm/memory"
)

// The methods in this file decode the exit that Run has just returned. They are
// views of struct kvm_run, which the kernel has filled, and valid until the next
// Run or Close. Each is for one exit reason; after another its answer means
// nothing, but is in bounds. They allocate nothing.

func (c *VCPU) u32(offset int) uint32 { return binary.LittleEndian.Uint32(c.run[offset:]) }
func (c *VCPU) u64(offset int) uint64 { return binary.LittleEndian.Uint64(c.run[offset:]) }

// IO is a port I/O exit: Count accesses of Size bytes each to one port. Count is
// above 1 for a string instruction (REP INS, REP OUTS).
type IO struct {
	Out   bool
	Port  uint16
	Size  int // 1, 2 or 4 bytes
	Count int
	Data  []byte // Count*Size bytes: of an OUT the guest's, of an IN for the answer
}

// IO decodes ExitIO. An error means that the kernel described data outside of what it
// shares with us.
func (c *VCPU) IO() (IO, error) {
	io := IO{
		Out:   c.run[runIODirection] == ioDirectionOut,
		Port:  binary.LittleEndian.Uint16(c.run[runIOPort:]),
		Size:  int(c.run[runIOSize]),
		Count: int(c.u32(runIOCount)),
	}
	offset, size := c.u64(runIODataOffset), uint64(io.Size)*uint64(io.Count)
	if offset > uint64(len(c.run)) || size > uint64(len(c.run))-offset {
		return IO{}, fmt.Errorf("kvm: vcpu %d KVM_EXIT_IO port %#x: data at %#x+%#x is outside kvm_run's %#x bytes", c.id, io.Port, offset, size, len(c.run))
	}
	io.Data = c.run[offset:][:size:size]
	return io, nil
}

// MMIO is an access to a guest-physical address without memory.
type MMIO struct {
	Write bool
	Addr  memory.GPA
	Data  []byte // 1 to 8 bytes: of a write the guest's, of a read for the answer
}

// MMIO decodes ExitMMIO.
func (c *VCPU) MMIO() MMIO {
	n := min(c.u32(runMMIOLen), 8) // the kernel never says more
	return MMIO{
		Write: c.run[runMMIOIsWrite] != 0,
		Addr:  memory.GPA(c.u64(runMMIOAddr)),
		Data:  c.run[runMMIOData:][:n:n],
	}
}

// Hypercall is an ExitHypercall: an unusual VMCALL that the kernel leaves to us.
type Hypercall struct {
	Nr   uint64
	Args [6]uint64
}

// Hypercall decodes ExitHypercall.
func (c *VCPU) Hypercall() Hypercall {
	h := Hypercall{Nr: c.u64(runHypercallNr)}
	for i := range h.Args {
		h.Args[i] = c.u64(runHypercallArgs + 8*i)
	}
	return h
}

// SetHypercallResult answers it; the guest finds ret in RAX.
func (c *VCPU) SetHypercallResult(ret uint64) {
	binary.LittleEndian.PutUint64(c.run[runHypercallRet:], ret)
}

// Suberror tells internal errors apart.
type Suberror uint32

func (s Suberror) String() string {
	switch s {
	case SuberrorEmulation:
		return "KVM could not emulate the instruction"
	case SuberrorSimulException:
		return "KVM met two exceptions at once"
	case SuberrorDeliveryEvent:
		return "the processor faulted while KVM delivered an event"
	case SuberrorUnexpectedExit:
		return "the processor left the guest for a reason KVM does not know"
	}
	return fmt.Sprintf("suberror %d", uint32(s))
}

// InternalError is KVM giving up on the vCPU. Data is for KVM's developers.
type InternalError struct {
	Suberror Suberror
	N        int // valid words of Data
	Data     [16]uint64
}

// InternalError decodes ExitInternalError.
func (c *VCPU) InternalError() InternalError {
	e := InternalError{Suberror: Suberror(c.u32(runInternalSuberror))}
	e.N = int(min(c.u32(runInternalNData), uint32(len(e.Data))))
	for i := range e.N {
		e.Data[i] = c.u64(runInternalData + 8*i)
	}
	return e
}

// Instruction is the bytes of the instruction that could not be emulated, if the
// kernel has recorded them: up to 15.
func (e *InternalError) Instruction() []byte {
	// struct emulation_failure overlays Data: flags, a size byte, 15 bytes.
	if e.Suberror != SuberrorEmulation || e.N < 3 || e.Data[0]&emulationHasInstruction == 0 {
		return nil
	}
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], e.Data[1])
	binary.LittleEndian.PutUint64(b[8:], e.Data[2])
	return b[1:][:min(b[0], 15)]
}

// SystemEventType tells system events apart.
type SystemEventType uint32

// SystemEvent decodes ExitSystemEvent: the type and the first word of its data.
func (c *VCPU) SystemEvent() (SystemEventType, uint64) {
	var data uint64
	if c.u32(runSystemEventNData) > 0 {
		data = c.u64(runSystemEventData)
	}
	return SystemEventType(c.u32(runSystemEventType)), data
}

// FailEntry decodes ExitFailEntry: the processor's reason for not entering the guest
// and the host processor that said so.
func (c *VCPU) FailEntry() (reason uint64, cpu uint32) {
	return c.u64(runFailReason), c.u32(runFailCPU)
}

// UnknownReason decodes ExitUnknown.
func (c *VCPU) UnknownReason() uint64 { return c.u64(runHWReason) }

// Explain makes a fatal exit into an error for the user: what it was, and where
// the guest stood: RIP and the bytes there, read through the vCPU's page tables
// with readGPA. What cannot be found out is left out.
func (c *VCPU) Explain(reason ExitReason, readGPA func(memory.GPA, []byte) error) error {
	what := reason.String()
	var instruction []byte
	switch reason {
	case ExitShutdown:
		what += " (triple fault)"
		if c.atReset() {
			// AMD's processors leave the guest's state undefined, so KVM resets it.
			return fmt.Errorf("vcpu %d stopped with %s; this host's processor does not keep where", c.id, what)
		}
	case ExitInternalError:
		e := c.InternalError()
		what += fmt.Sprintf(" (%v)", e.Suberror)
		if instruction = e.Instruction(); instruction == nil {
			what += fmt.Sprintf(" data %#x", e.Data[:e.N])
		}
	case ExitFailEntry:
		r, cpu := c.FailEntry()
		what += fmt.Sprintf(" (the processor refuses to enter the guest: hardware reason %#x on host CPU %d)", r, cpu)
	case ExitUnknown:
		what += fmt.Sprintf(" (hardware reason %#x)", c.UnknownReason())
	case ExitSystemEvent:
		t, data := c.SystemEvent()
		what += fmt.Sprintf(" (type %d, data %#x)", t, data)
	case ExitMMIO:
		m := c.MMIO()
		what += fmt.Sprintf(" (%v+%d)", m.Addr, len(m.Data))
	}
	return fmt.Errorf("vcpu %d stopped with %s%s", c.id, what, c.where(instruction, readGPA))
}

// atReset tells whether the vCPU stands at the first instruction after a reset.
func (c *VCPU) atReset() bool {
	regs, err := c.Regs()
	if err != nil {
		return false
	}
	s, err := c.Sregs()
	return err == nil && regs.RIP == 0xfff0 && s.CS.Base == 0xffff0000
}

func (c *VCPU) where(instruction []byte, readGPA func(memory.GPA, []byte) error) string {
	regs, err := c.Regs()
	if err != nil {
		return ""
	}
	where := fmt.Sprintf(" at rip %#x", regs.RIP)
	rip := regs.RIP
	if s, err := c.Sregs(); err == nil && s.CS.L == 0 {
		where += fmt.Sprintf(" (cs %#x base %#x)", s.CS.Selector, s.CS.Base)
		rip += s.CS.Base // in 64-bit code the base does not count
	}
	if instruction == nil && readGPA != nil {
		instruction = c.readVirtual(rip, 15, readGPA)
	}
	if len(instruction) > 0 {
		where += fmt.Sprintf(", bytes there: % x", instruction)
	}
	return where
}

// readVirtual reads up to n bytes, as far as pages are mapped.
func (c *VCPU) readVirtual(virtual uint64, n int, readGPA func(memory.GPA, []byte) error) []byte {
	var got []byte
	for n > 0 {
		physical, ok, err := c.Translate(virtual)
		if err != nil || !ok {
			break
		}
		part := make([]byte, min(n, PageSize-int(virtual%PageSize)))
		if readGPA(physical, part) != nil {
			break
		}
		got, n, virtual = append(got, part...), n-len(part), virtual+uint64(len(part))
	}
	return got
}
