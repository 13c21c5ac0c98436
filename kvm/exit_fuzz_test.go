package kvm

import (
	"testing"

	"vmm/memory"
)

// Whatever kvm_run holds, a view of it stays inside.
func FuzzExitDecoders(f *testing.F) {
	f.Add([]byte{})
	io := make([]byte, runSize)
	io[runIODirection], io[runIOSize], io[runIOCount] = ioDirectionOut, 2, 6
	io[runIODataOffset+1] = 0x10
	f.Add(io)
	huge := make([]byte, runSize)
	for i := range huge {
		huge[i] = 0xff
	}
	f.Add(huge)
	emulation := make([]byte, runSize)
	emulation[runInternalSuberror], emulation[runInternalNData] = byte(SuberrorEmulation), 4
	emulation[runInternalData], emulation[runInternalData+8] = emulationHasInstruction, 15
	f.Add(emulation)

	f.Fuzz(func(t *testing.T, run []byte) {
		c := &VCPU{run: make([]byte, 3*PageSize)}
		copy(c.run, run)
		io, err := c.IO()
		if (err == nil) != (io.Data != nil) && io.Size*io.Count != 0 {
			t.Errorf("IO() = %+v, %v; want data or an error", io, err)
		}
		if err == nil && len(io.Data) != io.Size*io.Count {
			t.Errorf("IO() = %+v; want Count*Size bytes of data", io)
		}
		if m := c.MMIO(); len(m.Data) > 8 {
			t.Errorf("MMIO() = %+v; want up to 8 bytes of data", m)
		}
		e := c.InternalError()
		if e.N > len(e.Data) || len(e.Instruction()) > 15 {
			t.Errorf("InternalError() = %+v; its counts are out of range", e)
		}
		c.Hypercall()
		c.SetHypercallResult(1)
		c.SystemEvent()
		c.FailEntry()
		c.UnknownReason()
		// A vCPU that cannot tell its registers is still explained.
		c.closed = true
		for r := range ExitReason(64) {
			if c.Explain(r, func(memory.GPA, []byte) error { return nil }) == nil {
				t.Errorf("Explain(%v) = nil", r)
			}
		}
	})
}
