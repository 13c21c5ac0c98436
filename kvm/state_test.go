package kvm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"vmm/kvm"
	"vmm/kvm/kvmtest"
)

// machine is a VM with everything that has state, ready for a guest to be restored into.
type machine struct {
	vm  *kvm.VM
	cpu *kvm.VCPU
}

func newMachine(t *testing.T, s *kvm.System) machine {
	t.Helper()
	vm, err := s.CreateVM()
	must(t, err)
	t.Cleanup(func() { vm.Close() })
	must(t, vm.SetTSSAddr(0xfffbd000))
	must(t, vm.SetIdentityMapAddr(0xfffbc000))
	must(t, vm.CreateIRQChip())
	must(t, vm.CreatePIT2(kvm.PITSpeakerDummy))
	cpu, err := vm.CreateVCPU(0)
	must(t, err)
	t.Cleanup(func() { cpu.Close() })
	cpuid, err := s.SupportedCPUID()
	must(t, err)
	must(t, cpu.SetCPUID(cpuid))
	return machine{vm, cpu}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// get and set are two halves of a piece of state.
func roundTrip[T any](t *testing.T, what string, get func(machine) (T, error), set func(machine, T) error, change func(*T), from, to machine, opts ...cmp.Option) {
	t.Helper()
	want, err := get(from)
	must(t, err)
	change(&want)
	must(t, set(from, want))
	got, err := get(from)
	must(t, err)
	if d := cmp.Diff(want, got, opts...); d != "" {
		t.Errorf("%s differs from what was set (-want +got):\n%s", what, d)
	}
	must(t, set(to, got))
	moved, err := get(to)
	must(t, err)
	if d := cmp.Diff(got, moved, opts...); d != "" {
		t.Errorf("%s differs after it was moved to a new VM (-want +got):\n%s", what, d)
	}
}

// Every kind of state survives get, set into a fresh VM, and get. The order is that of
// a restore.
func TestStateSurvivesMove(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	must(t, s.Require(kvm.Required...))
	from, to := newMachine(t, s), newMachine(t, s)

	roundTrip(t, "CPUID",
		func(m machine) ([]kvm.CPUIDEntry2, error) { return m.cpu.CPUID() },
		func(m machine, l []kvm.CPUIDEntry2) error { return m.cpu.SetCPUID(l) },
		func(l *[]kvm.CPUIDEntry2) {
			for i, leaf := range *l {
				if leaf.Function == 1 {
					(*l)[i].EBX = leaf.EBX & 0x00ffffff // APIC id 0
				}
			}
		}, from, to, cmpopts.IgnoreUnexported(kvm.CPUIDEntry2{}))

	roundTrip(t, "special registers",
		func(m machine) (kvm.Sregs2, error) { return m.cpu.Sregs() },
		func(m machine, r kvm.Sregs2) error { return m.cpu.SetSregs(&r) },
		func(r *kvm.Sregs2) {
			r.LongMode(0x3000)
			r.CR2, r.CR8 = 0x1234_5678_9abc, 3
			r.GDT.Base, r.GDT.Limit = 0x1000, 31
			r.FS.Base = 0x7f00_0000_1000
		}, from, to, cmpopts.IgnoreUnexported(kvm.Sregs2{}, kvm.Segment{}, kvm.Dtable{}))

	roundTrip(t, "registers",
		func(m machine) (kvm.Regs, error) { return m.cpu.Regs() },
		func(m machine, r kvm.Regs) error { return m.cpu.SetRegs(&r) },
		func(r *kvm.Regs) { r.RAX, r.R15, r.RIP, r.RFlags = 1<<63|1, 0xf15, 0xffff_8000_0000_0000, 0x246 }, from, to)

	roundTrip(t, "extended control registers",
		func(m machine) (kvm.XCRs, error) { return m.cpu.XCRs() },
		func(m machine, x kvm.XCRs) error { return m.cpu.SetXCRs(&x) },
		func(x *kvm.XCRs) {
			if x.N > 0 { // else a processor without XSAVE
				x.List[0].Value = 3 // x87 and SSE
			}
		},
		from, to, cmpopts.IgnoreUnexported(kvm.XCRs{}, kvm.XCR{}))

	roundTrip(t, "XSAVE state",
		func(m machine) ([]byte, error) { return m.cpu.XSave() },
		func(m machine, b []byte) error { return m.cpu.SetXSave(b) },
		func(b *[]byte) {
			copy((*b)[160:], "sixteen bytes...")                                                   // XMM0
			binary.LittleEndian.PutUint64((*b)[512:], binary.LittleEndian.Uint64((*b)[512:])|1<<1) // XSTATE_BV: SSE
		}, from, to)

	roundTrip(t, "debug registers",
		func(m machine) (kvm.DebugRegs, error) { return m.cpu.DebugRegs() },
		func(m machine, d kvm.DebugRegs) error { return m.cpu.SetDebugRegs(&d) },
		func(d *kvm.DebugRegs) { d.DB[0], d.DB[3] = 0x1000, 0x3000 }, from, to, cmpopts.IgnoreUnexported(kvm.DebugRegs{}))

	for _, id := range []kvm.ChipID{kvm.ChipPICMaster, kvm.ChipPICSlave, kvm.ChipIOAPIC} {
		roundTrip(t, id.String(),
			func(m machine) (kvm.IRQChip, error) { return m.vm.IRQChip(id) },
			func(m machine, c kvm.IRQChip) error { return m.vm.SetIRQChip(&c) },
			func(c *kvm.IRQChip) {
				if id == kvm.ChipIOAPIC {
					// kvm_ioapic_state: base, ioregsel, id, irr, pad, then the
					// redirection table; its entry 4: vector 0x34, masked.
					binary.LittleEndian.PutUint64(c.State[24+8*4:], 1<<16|0x34)
				} else {
					c.State[2] = 0xa5 // kvm_pic_state.imr
				}
			}, from, to, cmpopts.IgnoreUnexported(kvm.IRQChip{}))
	}

	roundTrip(t, "PIT",
		func(m machine) (kvm.PIT2, error) { return m.vm.PIT2() },
		func(m machine, p kvm.PIT2) error { return m.vm.SetPIT2(&p) },
		func(p *kvm.PIT2) { p.Channels[2].Count, p.Channels[2].Mode = 11932, 3 },
		// The count starts when it is loaded: at the moment of the set.
		from, to, cmpopts.IgnoreUnexported(kvm.PIT2{}, kvm.PITChannel{}), cmpopts.IgnoreFields(kvm.PITChannel{}, "CountLoadTime"))

	roundTrip(t, "local APIC",
		func(m machine) (kvm.LAPIC, error) { return m.cpu.LAPIC() },
		func(m machine, l kvm.LAPIC) error { return m.cpu.SetLAPIC(&l) },
		func(l *kvm.LAPIC) {
			l.Regs[0xf1] |= 1    // enabled
			l.Regs[0x222] = 0x10 // IRR: vector 0x34 waits
		}, from, to, cmpopts.IgnoreUnexported(kvm.LAPIC{}))

	roundTrip(t, "MP state",
		func(m machine) (kvm.MPState, error) { return m.cpu.MPState() },
		func(m machine, st kvm.MPState) error { return m.cpu.SetMPState(st) },
		func(st *kvm.MPState) { *st = kvm.MPHalted }, from, to)

	roundTrip(t, "events",
		func(m machine) (kvm.VCPUEvents, error) { return m.cpu.Events() },
		func(m machine, e kvm.VCPUEvents) error { return m.cpu.SetEvents(&e) },
		func(e *kvm.VCPUEvents) {
			e.NMI.Masked = 1
			e.Interrupt.Shadow = 1
			e.Flags |= kvm.EventsValidShadow
		},
		// AMD's processors know one interrupt shadow, not the two of STI and MOV SS.
		from, to, cmpopts.IgnoreUnexported(kvm.VCPUEvents{}), cmp.FilterPath(
			func(p cmp.Path) bool { return p.Last().String() == ".Shadow" },
			cmp.Comparer(func(a, b uint8) bool { return (a != 0) == (b != 0) })))
}

func TestMSRsSurviveMove(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	from, to := newMachine(t, s), newMachine(t, s)
	indices, err := s.MSRIndices()
	must(t, err)
	const (
		efer      = 0xc0000080
		lstar     = 0xc0000082
		mtrrFixed = 0x250
	)
	// The TSC, Hyper-V's vCPU run time and its reference time.
	running := []uint32{0x10, 0x4000_0010, 0x4000_0020}
	if len(indices) < 10 {
		t.Fatalf("MSRIndices() has %d entries", len(indices))
	}
	indices = append(indices, mtrrFixed)
	must(t, from.cpu.SetMSRs([]kvm.MSREntry{{Index: lstar, Data: 0xffff_ffff_8100_0000}, {Index: mtrrFixed, Data: 0x0606_0606_0606_0606}}))

	want, err := from.cpu.MSRs(indices)
	must(t, err)
	must(t, to.cpu.SetMSRs(want))
	got, err := to.cpu.MSRs(indices)
	must(t, err)
	for i := range want {
		if want[i].Index == lstar && want[i].Data != 0xffff_ffff_8100_0000 {
			t.Errorf("LSTAR = %#x; want what was set", want[i].Data)
		}
		if got[i].Data != want[i].Data && !slices.Contains(running, want[i].Index) {
			t.Errorf("MSR %#x = %#x after the move; want %#x", want[i].Index, got[i].Data, want[i].Data)
		}
	}

	// More than the kernel takes at a time.
	many := make([]uint32, 600)
	for i := range many {
		many[i] = lstar
	}
	entries, err := to.cpu.MSRs(many)
	must(t, err)
	for i, e := range entries {
		if e.Data != 0xffff_ffff_8100_0000 {
			t.Fatalf("entry %d of 600 = %#x; want LSTAR's value", i, e.Data)
		}
	}

	// A short count names the register.
	var msr *kvm.MSRError
	_, err = to.cpu.MSRs([]uint32{efer, 0xdead_0000, efer})
	if !errors.As(err, &msr) || msr.Entry.Index != 0xdead_0000 {
		t.Errorf("MSRs with one that does not exist = %v; want an MSRError that names it", err)
	}
	err = to.cpu.SetMSRs([]kvm.MSREntry{{Index: lstar, Data: 1}, {Index: 0xdead_0000, Data: 5}})
	if !errors.As(err, &msr) || msr.Entry.Index != 0xdead_0000 || msr.Entry.Data != 5 {
		t.Errorf("SetMSRs with one that does not exist = %v; want an MSRError that names it", err)
	}
}

// A host's XSAVE state may be larger than this one's, if nothing is in the excess.
func TestXSaveOfAnotherSize(t *testing.T) {
	m := newMachine(t, kvmtest.NeedKVM(t))
	want, err := m.cpu.XSave()
	must(t, err)
	copy(want[160:], "sixteen bytes...")
	want[512] |= 1 << 1
	longer := append(bytes.Clone(want), make([]byte, 4096)...)
	must(t, m.cpu.SetXSave(longer))
	got, err := m.cpu.XSave()
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("a state with an empty excess is not what is read back")
	}
	longer[len(longer)-1] = 1
	if err := m.cpu.SetXSave(longer); err == nil {
		t.Error("SetXSave drops state without a word")
	}
	must(t, m.cpu.SetXSave(want[:1024])) // a legacy area, a header and half of AVX
}

func TestClock(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	from, to := newMachine(t, s), newMachine(t, s)
	const year = uint64(365 * 24 * time.Hour)
	must(t, from.vm.SetClock(kvm.ClockData{Clock: year}))
	before, err := from.vm.Clock()
	must(t, err)
	if before.Clock < year || before.Clock > 2*year {
		t.Errorf("the clock set to a year reads %v", time.Duration(before.Clock))
	}
	if before.Flags&kvm.ClockRealtime != 0 {
		now := uint64(time.Now().UnixNano())
		if before.Realtime > now || before.Realtime < now-uint64(time.Hour) {
			t.Errorf("the clock's real time is %d; now it is %d", before.Realtime, now)
		}
		before.Realtime -= uint64(time.Minute) // as if the move had taken a minute
	}
	must(t, to.vm.SetClock(before))
	after, err := to.vm.Clock()
	must(t, err)
	passed := time.Duration(after.Clock - before.Clock)
	if passed < 0 {
		t.Errorf("the clock went back by %v", -passed)
	}
	if before.Flags&kvm.ClockRealtime != 0 && passed < time.Minute {
		t.Errorf("the clock advanced by %v while a minute of real time passed", passed)
	}
	must(t, to.cpu.KVMClockCtrl()) // a guest without kvm-clock: no error
}

func TestTSC(t *testing.T) {
	s := kvmtest.NeedKVM(t)
	m := newMachine(t, s)
	khz, err := m.cpu.TSCKHz()
	must(t, err)
	if khz < 1000 {
		t.Errorf("TSCKHz() = %d; want more than 1 MHz", khz)
	}
	must(t, m.cpu.SetTSCKHz(khz))

	offset, err := m.cpu.TSCOffset()
	if errors.Is(err, kvm.ErrNotSupported) {
		t.Logf("TSCOffset() = %v", err)
		return
	}
	must(t, err)
	tsc := func() uint64 {
		t.Helper()
		e, err := m.cpu.MSRs([]uint32{0x10})
		must(t, err)
		return e[0].Data
	}
	const (
		ahead = 1 << 50 // days: more than this test takes
		near  = 1 << 45 // hours: where the TSC is unstable KVM adjusts the offset whenever it looks
	)
	before := tsc()
	must(t, m.cpu.SetTSCOffset(offset+ahead))
	got, err := m.cpu.TSCOffset()
	must(t, err)
	moved := tsc()-before >= ahead
	switch {
	case got-(offset+ahead)+near < 2*near && moved:
	case got == offset && !moved:
		t.Log("this KVM takes a TSC offset and does not apply it: its guests see the host's TSC")
	default:
		t.Errorf("after SetTSCOffset(%#x) TSCOffset() = %#x and the TSC has moved: %v", offset+ahead, got, moved)
	}
}

func TestTranslateAndNMI(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{IRQChip: true}, nil)
	if gpa, ok, err := g.CPU.Translate(0x12345678); gpa != 0x12345678 || !ok || err != nil {
		t.Errorf("Translate(0x12345678) = %v, %v, %v; want the same address", gpa, ok, err)
	}
	if _, ok, err := g.CPU.Translate(0x4000_0000); ok || err != nil {
		t.Errorf("Translate(1 GiB) = %v, %v; want nothing mapped", ok, err)
	}
	if err := g.CPU.NMI(); err != nil {
		t.Fatal(err)
	}
	events, err := g.CPU.Events()
	must(t, err)
	if events.NMI.Pending == 0 && events.NMI.Injected == 0 {
		t.Errorf("Events() after NMI() = %+v; want an NMI pending", events.NMI)
	}
}
