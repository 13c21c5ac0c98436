// Package machine is one virtual machine: it puts the parts together, runs the
// vCPUs, and ends or resets them when the guest or the user asks.
package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"vmm/boot"
	"vmm/device"
	"vmm/internal/sys"
	"vmm/kvm"
	"vmm/memory"
	"vmm/pci"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/virtio"
)

// Machine is a virtual machine. New builds it, Run runs it once, Close frees
// what it holds.
type Machine struct {
	cfg Config

	kernel  boot.File
	initrd  *boot.File // nil without
	ram     *memory.RAM
	handed  *os.File // what ram will be made of; nil: of nothing
	vm      *kvm.VM
	vcpus   []*vcpu
	ports   bus
	mmio    bus
	pci     *pci.Host
	virtio  []*virtio.PCI
	legacy  []resetter
	pm      *device.PM
	rtc     *device.RTC
	cf9     *device.ResetControl
	uarts   [2]*device.UART
	console *Console
	scsi    *virtio.SCSI
	luns    atomic.Pointer[[]*lun] // see units
	plug    plug
	past    past
	// retiring are the LUNs that the guest has no more and that are not closed.
	retiring sync.WaitGroup

	given given // what the guest was given of a processor
	guest guest // what Run begins with
	rests bool  // the devices rest; Run's alone while it runs
	// wallClock are the registers whose writing writes guest memory: Run's
	// first deed for a guest that was loaded.
	wallClock []kvm.MSREntry
	boot      func() (*vmmv1.BootState, error)
	tracked   atomic.Bool // there is a DirtyLog

	// What the vCPUs and the chips were when they were made: a reset returns
	// to it.
	freshVCPUs []vcpuState
	freshChips chipState

	gate     *gate
	events   chan event
	requests chan request
	state    atomic.Int32  // a State
	ended    chan struct{} // closed by end
	end      func()
	ending   string // why it has ended; written by Run before end
	started  atomic.Pointer[time.Time]
	moving   atomic.Bool  // its Departure has paused it
	throttle atomic.Int32 // percent
	slowed   atomic.Bool  // slow runs
	feed     feed
	close    []func() error // in the order of building
}

// resetter is a device that returns to its state after power-on.
type resetter interface{ Reset() }

// An event ends or resets the machine. It is noted where it happens, on a
// vCPU's thread, and acted on by Run.
type event struct {
	kind eventKind
	err  error
}

type eventKind int

const (
	eventPowerOff eventKind = iota
	eventReset
	eventFailed
)

// flushTimeout bounds the wait for the console's reader when the machine ends.
const flushTimeout = 5 * time.Second

// New builds a machine: everything that can be refused is refused here, and
// nothing of the guest runs. The machine that is returned must be closed.
func New(cfg Config) (*Machine, error) { return build(cfg, nil) }

// build builds a machine, for the guest that arrives if there is one.
func build(cfg Config, in *Incoming) (_ *Machine, err error) {
	m := empty(cfg)
	if cfg.Serial != nil {
		m.onClose(cfg.Serial.Close)
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if in != nil {
		m.acceptImages(in) // ours to close from here on
	}
	if err := m.cfg.normalize(); err != nil {
		return nil, err
	}
	makeRoom(m.cfg.CPUs)
	warn := m.cfg.Warn
	m.cfg.Warn = func(line string) {
		m.feed.publish(Event{Kind: EventWarning, Text: line})
		warn(line)
	}
	m.console = NewConsole(m.cfg.Console, func(err error) { m.cfg.Warn(fmt.Sprintf("console output: %v", err)) })
	steps := []func() error{m.openFiles, m.makeMemory, m.tryLoad, m.openLUNs, m.makeVM, m.makeDevices}
	if in != nil {
		m.guest = guestExpected
		steps = []func() error{
			func() error { return m.accept(in) }, m.makeMemory, m.openLUNs, m.makeVM, m.makeDevices,
		}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// makeRoom fits Go's scheduler to so many vCPUs. They sit in KVM_RUN and workers
// in read(2), each of which occupies a P until the scheduler's monitor takes it
// back: there is one for each, so that whoever returns finds one free, and the
// monitor need not hurry. That it cannot be told so costs some processor time.
func makeRoom(vcpus int) {
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), runtime.NumCPU()+2*vcpus+4))
	_ = sys.CalmMonitor()
}

// empty is a machine without parts.
func empty(cfg Config) *Machine {
	m := &Machine{cfg: cfg, events: make(chan event, 1), requests: make(chan request), plug: make(plug, 1), ended: make(chan struct{})}
	m.end = sync.OnceFunc(func() {
		m.enterState(StateEnded, m.ending)
		m.feed.end()
		close(m.ended)
	})
	m.enterState(StateStarting, "")
	return m
}

func (m *Machine) onClose(f func() error) { m.close = append(m.close, f) }

func (m *Machine) openFiles() error {
	if m.cfg.Kernel == "" {
		return errors.New("no kernel: give the path of a bzImage or an ELF kernel")
	}
	open := func(what, path string) (boot.File, error) {
		f, err := os.Open(path)
		if err != nil {
			return boot.File{}, fmt.Errorf("%s %s: %w", what, path, cause(err))
		}
		m.onClose(f.Close)
		info, err := f.Stat()
		if err != nil {
			return boot.File{}, fmt.Errorf("%s %s: %w", what, path, cause(err))
		}
		if !info.Mode().IsRegular() {
			return boot.File{}, fmt.Errorf("%s %s: not a regular file", what, path)
		}
		return boot.File{Name: path, Data: f, Size: info.Size()}, nil
	}
	var err error
	if m.kernel, err = open("kernel", m.cfg.Kernel); err != nil {
		return err
	}
	if m.cfg.Initrd != "" {
		f, err := open("initrd", m.cfg.Initrd)
		if err != nil {
			return err
		}
		m.initrd = &f
	}
	m.boot = sync.OnceValues(m.hashImages)
	return nil
}

// cause drops the operation and the path from an error of package os, which
// the caller names better.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

func (m *Machine) makeMemory() (err error) {
	if file := m.handed; file != nil {
		m.handed = nil
		m.ram, err = memory.Adopt(file, m.cfg.Memory)
	} else {
		m.ram, err = memory.New(m.cfg.Memory)
	}
	if err != nil {
		return err
	}
	m.onClose(m.ram.Close)
	return nil
}

func (m *Machine) makeVM() error {
	system, err := kvm.Open(kvm.DefaultPath)
	if err != nil {
		return err
	}
	m.onClose(system.Close)
	if err := system.Require(kvm.Required...); err != nil {
		return err
	}
	if m.vm, err = system.CreateVM(); err != nil {
		return err
	}
	m.onClose(m.vm.Close)
	for _, step := range []func() error{
		func() error { return m.vm.SetTSSAddr(boot.TSS) },
		func() error { return m.vm.SetIdentityMapAddr(boot.IdentityMap) },
		m.vm.CreateIRQChip,
		func() error { return m.vm.CreatePIT2(kvm.PITSpeakerDummy) },
		func() error { return m.vm.SetGSIRouting(kvm.ChipRoutes()) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	for i, r := range m.ram.Regions() {
		if err := m.vm.SetMemory(kvm.Slot(i), r.GPA, r.Bytes, 0); err != nil {
			return err
		}
	}
	if m.freshChips, err = saveChips(m.vm); err != nil {
		return err
	}
	return m.createVCPUs(system)
}

// createVCPUs makes the vCPUs and keeps their first state.
func (m *Machine) createVCPUs(system *kvm.System) error {
	if m.guest != guestExpected {
		cpuid, err := offeredCPUID(system, m.cfg.CPU)
		if err != nil {
			return err
		}
		for id := range m.cfg.CPUs {
			m.given.cpuid = append(m.given.cpuid, forVCPU(cpuid, id, m.cfg.CPUs))
		}
	}
	for id := range m.cfg.CPUs {
		cpu, err := m.vm.CreateVCPU(id)
		if err != nil {
			return err
		}
		m.onClose(cpu.Close)
		if err := m.give(system, cpu); err != nil {
			return err
		}
		fresh, err := saveVCPU(cpu, m.given.msrs)
		if err != nil {
			return err
		}
		firmware(fresh.MSRs)
		if err := cpu.SetMSRs(fresh.MSRs); err != nil {
			return err
		}
		m.vcpus = append(m.vcpus, &vcpu{m: m, cpu: cpu})
		m.freshVCPUs = append(m.freshVCPUs, fresh)
	}
	m.gate = newGate(len(m.vcpus), func() {
		for _, v := range m.vcpus {
			if err := v.cpu.Kick(); err != nil {
				m.cfg.Warn(err.Error())
			}
		}
	})
	return nil
}

// irqLine drives a pin of the PICs and the IOAPIC.
func (m *Machine) irqLine(gsi kvm.GSI) func(bool) {
	return func(high bool) {
		if err := m.vm.IRQLine(gsi, high); err != nil {
			m.cfg.Warn(err.Error())
		}
	}
}

func (m *Machine) makeDevices() error {
	m.pci = pci.NewHost(pci.HostConfig{
		Window:     boot.PCIWindow,
		WindowSize: boot.PCIWindowSize,
		Interrupts: &interrupts{vm: m.vm},
		IOEvents:   ioEvents{m.vm},
		Warn:       func(err error) { m.cfg.Warn(err.Error()) },
	})
	m.onClose(m.closeBus)

	legacy := func(port uint64, size uint64, d interface {
		handler
		resetter
	}) {
		m.ports.add(port, size, d)
		m.legacy = append(m.legacy, d)
	}
	outputs := [2]io.Writer{m.console, io.Discard}
	if m.cfg.Serial != nil {
		outputs[1] = m.cfg.Serial
	}
	com := [2]struct {
		port uint64
		irq  kvm.GSI
	}{{boot.PortCOM1, boot.IRQCOM1}, {boot.PortCOM2, boot.IRQCOM2}}
	for i := range m.uarts {
		m.uarts[i] = device.NewUART(outputs[i], m.irqLine(com[i].irq))
		legacy(com[i].port, device.UARTPorts, m.uarts[i])
	}
	if m.cfg.Serial != nil {
		go m.feedSerial()
	}

	m.pm = device.NewPM(m.irqLine(boot.IRQSCI), func() { m.post(event{kind: eventPowerOff}) })
	legacy(boot.PortPM, device.PMPorts, m.pm)
	reset := func() { m.post(event{kind: eventReset}) }
	m.cf9 = device.NewResetControl(reset)
	legacy(boot.PortReset, 1, m.cf9)
	m.ports.add(boot.PortKeyboard, 1, device.NewKeyboardReset(reset))

	regions := m.ram.Regions()
	var high uint64
	if len(regions) > 1 {
		high = uint64(len(regions[1].Bytes))
	}
	m.rtc = device.NewRTC(uint64(len(regions[0].Bytes)), high, m.irqLine(boot.IRQRTC))
	m.onClose(func() error { m.rtc.Close(); return nil })
	legacy(boot.PortRTC, device.RTCPorts, m.rtc)
	m.ports.add(boot.PortPVPanic, 1, device.NewPVPanic(
		func() { m.fail(errors.New("the guest's kernel panicked (pvpanic); its last words are on the console")) },
		func() { m.cfg.Warn("the guest's kernel panicked and started its crash kernel") }))

	m.ports.add(boot.PortPCIAddress, 1, m.pci.ConfigAddress())
	m.ports.add(boot.PortPCIData, pci.ConfigDataPorts, m.pci.ConfigData())
	m.mmio.add(uint64(boot.ECAM), boot.ECAMSize, m.pci.ECAM())
	m.mmio.add(uint64(boot.PCIWindow), boot.PCIWindowSize, m.pci.Window())
	return m.makeVirtio()
}

// closeBus stops the devices, takes their doorbells and interrupts back from
// the kernel, then closes them.
func (m *Machine) closeBus() error {
	m.pci.Reset()
	errs := []error{m.pci.Close()}
	for _, t := range m.virtio {
		errs = append(errs, t.Close())
	}
	return errors.Join(errs...)
}

// feedSerial passes what arrives at the second serial port on, until it is
// closed.
func (m *Machine) feedSerial() {
	buf := make([]byte, 4096)
	for {
		n, err := m.cfg.Serial.Read(buf)
		if n > 0 {
			m.uarts[1].Input(context.Background(), buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// post notes an event and closes the gate: no vCPU runs another instruction.
// The first event counts; others are its echoes.
func (m *Machine) post(e event) {
	select {
	case m.events <- e:
	default:
	}
	m.gate.close()
}

// fail ends the machine with an error.
func (m *Machine) fail(err error) { m.post(event{eventFailed, err}) }

// load puts kernel, initrd and tables into memory.
func (m *Machine) load() (boot.Entry, error) {
	if m.kernel.Data == nil {
		return boot.Entry{}, errors.New("the guest came here without its kernel's image: end it and start it anew")
	}
	return boot.Load(m.ram, boot.Config{Kernel: m.kernel, Initrd: m.initrd, Cmdline: m.cfg.Cmdline, CPUs: m.cfg.CPUs})
}

// tryLoad finds out early whether the kernel can be loaded.
func (m *Machine) tryLoad() error {
	_, err := m.load()
	return err
}

// enter makes chips and vCPUs new, loads the kernel and stands the first vCPU
// at its first instruction; the others wait for it to start them. The vCPUs
// stand still.
func (m *Machine) enter() error {
	if err := restoreChips(m.vm, &m.freshChips); err != nil {
		return err
	}
	for i, v := range m.vcpus {
		if err := restoreVCPU(v.cpu, &m.freshVCPUs[i]); err != nil {
			return err
		}
	}
	entry, err := m.load()
	if err != nil {
		return err
	}
	first := m.vcpus[0].cpu
	sregs := m.freshVCPUs[0].Sregs
	var regs kvm.Regs
	entry.Set(&regs, &sregs)
	if err := first.SetSregs(&sregs); err != nil {
		return err
	}
	return first.SetRegs(&regs)
}

// reset makes everything but memory and LUNs what it was after New, and enters
// the kernel again. The vCPUs stand still.
func (m *Machine) reset() error {
	m.pci.Reset() // waits for what the devices have in flight
	m.past.forget()
	for _, d := range m.legacy {
		d.Reset()
	}
	return m.enter()
}

// Run runs the guest until it powers off (nil), fails (an error that says
// how), is stopped (nil) or ctx is done (its error). It boots the guest, or
// goes on with the one that was loaded. A guest's reset starts it again, unless
// the configuration says NoReboot.
func (m *Machine) Run(ctx context.Context) (err error) {
	var threads sync.WaitGroup
	for _, v := range m.vcpus {
		threads.Go(v.run)
	}
	defer func() {
		m.ending = "the guest powered off"
		if err != nil {
			m.ending = err.Error()
		}
		m.end()
		m.gate.end()
		threads.Wait()
		m.flush()
		m.console.Close()
	}()
	if err := m.begin(); err != nil {
		return err
	}
	now := time.Now()
	m.started.Store(&now)
	m.enterState(StateRunning, "")
	m.gate.release()
	return m.serve(ctx)
}

// flush waits for what the guest has written to reach its readers, within
// reason.
func (m *Machine) flush() {
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	for _, u := range m.uarts {
		if err := u.Close(ctx); err != nil {
			m.cfg.Warn(err.Error())
		}
	}
}

// PowerButton asks the guest to shut down. A guest that does not listen is not
// stopped by it.
func (m *Machine) PowerButton() { m.pm.PressPowerButton() }

// Close frees what the machine holds: the LUNs, when their commands have come
// back, and their locks, the VM, the memory. Run has returned or was never
// called. A second Close does nothing.
func (m *Machine) Close() error {
	m.end()
	if m.console != nil {
		m.console.Close()
	}
	var errs []error
	for len(m.close) > 0 {
		last := len(m.close) - 1
		errs = append(errs, m.close[last]())
		m.close = m.close[:last]
	}
	return errors.Join(errs...)
}
