package machine

import (
	"time"

	"vmm/device"
	"vmm/kvm"
	"vmm/memory"
	"vmm/pci"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/virtio"
)

// The sizes of the kernel's structures in an IRQChip, in bytes.
const (
	picStateSize    = 16  // struct kvm_pic_state
	ioapicStateSize = 216 // struct kvm_ioapic_state
)

var chipStateSizes = [3]int{picStateSize, picStateSize, ioapicStateSize} // in the order of chipIDs

func chipsMessage(s *chipState) (*vmmv1.IrqchipState, *vmmv1.PitState) {
	var b [3][]byte
	for i := range b {
		b[i] = s.chips[i].State[:chipStateSizes[i]]
	}
	pit := &vmmv1.PitState{Flags: s.pit.Flags}
	for i := range s.pit.Channels {
		c := &s.pit.Channels[i]
		// CountLoadTime is a time of this host's; KVM makes it anew.
		pit.Channels = append(pit.Channels, &vmmv1.PitChannel{
			Count: c.Count, LatchedCount: uint32(c.LatchedCount), CountLatched: uint32(c.CountLatched),
			StatusLatched: uint32(c.StatusLatched), Status: uint32(c.Status), ReadState: uint32(c.ReadState), WriteState: uint32(c.WriteState),
			WriteLatch: uint32(c.WriteLatch), RwMode: uint32(c.RWMode), Mode: uint32(c.Mode), Bcd: uint32(c.BCD), Gate: uint32(c.Gate),
		})
	}
	return &vmmv1.IrqchipState{PicMaster: b[0], PicSlave: b[1], Ioapic: b[2]}, pit
}

func (r *reader) chips(irq *vmmv1.IrqchipState, pit *vmmv1.PitState) (s chipState) {
	for i, b := range [3][]byte{irq.GetPicMaster(), irq.GetPicSlave(), irq.GetIoapic()} {
		s.chips[i].ID = chipIDs[i]
		r.fill(chipIDs[i].String(), s.chips[i].State[:chipStateSizes[i]], b)
	}
	need(r, "PIT", pit)
	s.pit.Flags = pit.GetFlags()
	if n := len(pit.GetChannels()); n != len(s.pit.Channels) {
		r.fail("PIT: %d channels; want %d", n, len(s.pit.Channels))
		return s
	}
	for i, c := range pit.GetChannels() {
		small := func(v uint32) uint8 { return fit[uint8](r, "PIT", v) }
		if c.GetCount() > maxPITCount {
			r.fail("PIT: count %d: it has up to %d", c.GetCount(), maxPITCount)
		}
		s.pit.Channels[i] = kvm.PITChannel{
			Count: c.GetCount(), LatchedCount: fit[uint16](r, "PIT", c.GetLatchedCount()), CountLatched: small(c.GetCountLatched()),
			StatusLatched: small(c.GetStatusLatched()), Status: small(c.GetStatus()), ReadState: small(c.GetReadState()),
			WriteState: small(c.GetWriteState()), WriteLatch: small(c.GetWriteLatch()), RWMode: small(c.GetRwMode()),
			Mode: small(c.GetMode()), BCD: small(c.GetBcd()), Gate: small(c.GetGate()),
		}
	}
	return s
}

const maxPITCount = 1 << 16

// vectorMasked is the only bit of an MSI-X vector's control word (PCI 3.0,
// 6.8.2.9).
const vectorMasked = 1 << 0

func pciMessage(s *pci.State) *vmmv1.PciState {
	m := &vmmv1.PciState{ConfigAddress: s.ConfigAddress}
	for _, f := range s.Functions {
		fm := &vmmv1.PciFunctionState{Slot: uint32(f.Slot), Config: f.Config}
		for _, v := range f.Vectors {
			fm.Vectors = append(fm.Vectors, &vmmv1.MsixVector{
				Address: uint64(v.Message.Address), Data: v.Message.Data, Masked: v.Control&vectorMasked != 0, Pending: v.Pending,
			})
		}
		m.Functions = append(m.Functions, fm)
	}
	return m
}

func (r *reader) pci(m *vmmv1.PciState) pci.State {
	s := pci.State{ConfigAddress: need(r, "PCI", m).GetConfigAddress()}
	for _, fm := range m.GetFunctions() {
		f := pci.FunctionState{Slot: int(fm.GetSlot()), Config: fm.GetConfig()}
		for _, v := range fm.GetVectors() {
			vs := pci.VectorState{
				Message: pci.Message{Address: memory.GPA(v.GetAddress()), Data: v.GetData()}, Pending: v.GetPending(),
			}
			if v.GetMasked() {
				vs.Control = vectorMasked
			}
			f.Vectors = append(f.Vectors, vs)
		}
		s.Functions = append(s.Functions, f)
	}
	return s
}

func virtioMessage(s *virtio.PCIState) *vmmv1.VirtioPciState {
	m := &vmmv1.VirtioPciState{
		Status: uint32(s.Status), Isr: uint32(s.ISR), Generation: uint32(s.Generation), ConfigVector: uint32(s.ConfigVector),
		QueueSelect: uint32(s.QueueSelect), OfferedSelect: s.OfferedSelect, AcceptedSelect: s.AcceptedSelect,
		Accepted: s.Accepted, AcceptedUndefined: s.AcceptedUndefined,
	}
	for i := range s.Queues {
		q := &s.Queues[i]
		m.Queues = append(m.Queues, &vmmv1.VirtqueueState{
			Enabled: q.Enabled, Vector: uint32(q.Vector), Size: uint32(q.Queue.Size),
			Desc: uint64(q.Queue.Desc), Avail: uint64(q.Queue.Avail), Used: uint64(q.Queue.Used),
			LastAvail: uint32(q.Queue.LastAvail), UsedIndex: uint32(q.Queue.UsedIndex),
			SignalledUsed: uint32(q.Queue.SignalledUsed), SignalledValid: q.Queue.SignalledValid,
		})
	}
	return m
}

func (r *reader) virtio(m *vmmv1.VirtioPciState) virtio.PCIState {
	s := virtio.PCIState{
		Status: fit[uint8](r, "status", m.GetStatus()), ISR: fit[uint8](r, "ISR", m.GetIsr()),
		Generation: fit[uint8](r, "generation", m.GetGeneration()), ConfigVector: fit[uint16](r, "vector", m.GetConfigVector()),
		QueueSelect: fit[uint16](r, "queue_select", m.GetQueueSelect()), OfferedSelect: m.GetOfferedSelect(),
		AcceptedSelect: m.GetAcceptedSelect(), Accepted: m.GetAccepted(), AcceptedUndefined: m.GetAcceptedUndefined(),
	}
	for _, q := range m.GetQueues() {
		s.Queues = append(s.Queues, virtio.PCIQueueState{
			Enabled: q.GetEnabled(), Vector: fit[uint16](r, "queue's vector", q.GetVector()),
			Queue: virtio.QueueState{
				Size: fit[uint16](r, "queue size", q.GetSize()),
				Desc: memory.GPA(q.GetDesc()), Avail: memory.GPA(q.GetAvail()), Used: memory.GPA(q.GetUsed()),
				LastAvail: fit[uint16](r, "available index", q.GetLastAvail()), UsedIndex: fit[uint16](r, "used index", q.GetUsedIndex()),
				SignalledUsed: fit[uint16](r, "used index", q.GetSignalledUsed()), SignalledValid: q.GetSignalledValid(),
			},
		})
	}
	return s
}

func uartMessage(s device.UARTState) *vmmv1.UartState {
	return &vmmv1.UartState{
		Ier: uint32(s.IER), Fcr: uint32(s.FCR), Lcr: uint32(s.LCR), Mcr: uint32(s.MCR), Scr: uint32(s.SCR),
		Dll: uint32(s.DLL), Dlm: uint32(s.DLM), MsrDelta: uint32(s.MSRDelta), Overrun: s.Overrun, Thri: s.THRI,
		Fifo: s.FIFO, Queue: s.Queue,
	}
}

func (r *reader) uart(m *vmmv1.UartState) device.UARTState {
	small := func(v uint32) uint8 { return fit[uint8](r, "UART", v) }
	return device.UARTState{
		IER: small(m.GetIer()), FCR: small(m.GetFcr()), LCR: small(m.GetLcr()), MCR: small(m.GetMcr()), SCR: small(m.GetScr()),
		DLL: small(m.GetDll()), DLM: small(m.GetDlm()), MSRDelta: small(m.GetMsrDelta()), Overrun: m.GetOverrun(), THRI: m.GetThri(),
		FIFO: m.GetFifo(), Queue: m.GetQueue(),
	}
}

func pmMessage(s device.PMState) *vmmv1.PmState {
	return &vmmv1.PmState{Status: uint32(s.Status), Enable: uint32(s.Enable), Control: uint32(s.Control), Timer: s.Timer}
}

func (r *reader) pm(m *vmmv1.PmState) device.PMState {
	small := func(v uint32) uint16 { return fit[uint16](r, "ACPI PM", v) }
	need(r, "ACPI PM", m)
	return device.PMState{Status: small(m.GetStatus()), Enable: small(m.GetEnable()), Control: small(m.GetControl()), Timer: m.GetTimer()}
}

func rtcMessage(s device.RTCState) *vmmv1.RtcState {
	return &vmmv1.RtcState{Index: uint32(s.Index), Flags: uint32(s.Flags), Ram: s.RAM[:], OffsetNs: int64(s.Offset), Seen: s.Seen}
}

func (r *reader) rtc(m *vmmv1.RtcState) device.RTCState {
	s := device.RTCState{
		Index: fit[uint8](r, "RTC", m.GetIndex()), Flags: fit[uint8](r, "RTC", m.GetFlags()),
		Offset: time.Duration(m.GetOffsetNs()), Seen: m.GetSeen(),
	}
	r.fill("RTC memory", s.RAM[:], need(r, "RTC", m).GetRam())
	return s
}
