package machine

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
	"vmm/migration"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/disk"
	"vmm/scsi/pr"
)

// Departure is a machine as package migration sees the one that moves away.
type Departure struct {
	*Machine
	units []*lun // the machine's when it departed
	luns  []*migration.LUN
	files []migration.Attachment

	settled bool // the guest may go on with another page cache
}

var _ migration.Source = (*Departure)(nil)

// Names of what goes with the guest (migration.Attachment).
const (
	attachedKernel = "kernel"
	attachedInitrd = "initrd"
)

// Depart finds out what a migration needs to know while the guest runs: what
// its LUNs' reservations are, and what a reset of it loads.
func (m *Machine) Depart(ctx context.Context) (*Departure, error) {
	if s := m.State(); s != StateRunning {
		return nil, fmt.Errorf("the guest is %s: only a running one can migrate or be saved", s)
	}
	d := &Departure{Machine: m, units: m.units()}
	if m.kernel.Data != nil { // else it did not come here with the guest
		kernel, initrd, err := m.Images()
		if err != nil {
			return nil, err
		}
		d.files = append(d.files, migration.Attachment{Name: attachedKernel, Size: kernel.Size, SHA256: kernel.SHA256, Data: kernel.Data})
		if initrd != nil {
			d.files = append(d.files, migration.Attachment{Name: attachedInitrd, Size: initrd.Size, SHA256: initrd.SHA256, Data: initrd.Data})
		}
	}
	var err error
	d.luns, err = scout(ctx, d.units, nil)
	return d, err
}

// Config is what the destination makes its machine of.
func (d *Departure) Config() *vmmv1.MachineConfig { return d.cfg.message(d.units) }

// RAM is the guest's memory.
func (d *Departure) RAM() *memory.RAM { return d.ram }

// LUNs are the guest's logical units.
func (d *Departure) LUNs() []*migration.LUN { return d.luns }

// Attachments are the kernel and the initrd.
func (d *Departure) Attachments() []migration.Attachment { return d.files }

// TrackDirty begins to note which pages are written.
func (d *Departure) TrackDirty() (migration.DirtyLog, error) { return d.Machine.TrackDirty() }

// Pause stops the vCPUs, says since when, and waits until every SCSI command is
// complete. From here on nobody but d resumes the guest.
func (d *Departure) Pause(ctx context.Context) (since time.Time, err error) {
	if err := d.plug.take(ctx); err != nil {
		return since, err
	}
	same := slices.Equal(d.units, d.Machine.units())
	if same {
		d.moving.Store(true) // from here on none is attached or detached
	}
	d.plug.give()
	if !same {
		return since, errors.New("a LUN was attached or detached since the migration began: migrate again")
	}
	// They have to be gone before save reads the local APICs, and the kernel takes
	// milliseconds to let go of them. Meanwhile the guest runs; what its devices
	// have to say it hears where it goes on.
	d.pci.DisconnectInterrupts()
	since = time.Now()
	err = d.Machine.Pause(ctx)
	if err == nil {
		err = d.Quiesce(ctx)
	}
	if err == nil && d.settled {
		err = d.leaveDisks(ctx)
	}
	if err != nil {
		if again := d.Resume(); again != nil && !errors.Is(again, ErrEnded) {
			err = errors.Join(err, again)
		}
	}
	return since, err
}

// Settle implements migration.Source.
func (d *Departure) Settle(ctx context.Context) error {
	d.settled = true
	return d.leaveDisks(ctx)
}

// leaveDisks has disk images as another host must find them. A write-back that
// is not over when ctx is goes on by itself, and changes nothing.
func (d *Departure) leaveDisks(ctx context.Context) error {
	left := make(chan error, len(d.units))
	images := 0
	for _, l := range d.units {
		if image, ok := l.backend.(*disk.LUN); ok {
			images++
			go func() {
				err := image.Leave()
				if err != nil {
					err = fmt.Errorf("LUN %s: %w", l.cfg.ID, err)
				}
				left <- err
			}()
		}
	}
	for range images {
		select {
		case err := <-left:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("the disk images are still being written back: %w", context.Cause(ctx))
		}
	}
	return nil
}

// Resume lets the guest run here after all.
func (d *Departure) Resume() error {
	d.moving.Store(false)
	return d.Machine.Resume()
}

// Save is the state of the paused machine.
func (d *Departure) Save() (*vmmv1.MachineState, error) {
	return d.Machine.Save(context.Background()) // it rests already
}

// scoutTime bounds what a disk may take to say what its reservations are.
const scoutTime = 10 * time.Second

// scout asks all LUNs at once what a takeover must know of them. At a
// destination, identify makes this host's nexus known where the LUN alone can
// tell it; journal entries are made by it.
func scout(ctx context.Context, units []*lun, identify func(*migration.LUN, pr.Key) pr.Ledger) ([]*migration.LUN, error) {
	ctx, cancel := context.WithTimeout(ctx, scoutTime)
	defer cancel()
	luns, errs := make([]*migration.LUN, len(units)), make([]error, len(units))
	var asked sync.WaitGroup
	for i, l := range units {
		asked.Go(func() {
			if luns[i], errs[i] = l.scout(ctx, identify); errs[i] != nil {
				errs[i] = fmt.Errorf("LUN %s (%s): %w", l.cfg.ID, l.cfg.Path, errs[i])
			}
		})
	}
	asked.Wait()
	return luns, errors.Join(errs...)
}

func (l *lun) scout(ctx context.Context, identify func(*migration.LUN, pr.Key) pr.Ledger) (*migration.LUN, error) {
	select {
	case <-l.turn:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() {
		l.port.Seen = l.port.Seen[:0] // the guest has them
		l.turn <- struct{}{}
	}()
	if l.gone {
		return nil, ErrNoLUN
	}
	x := &migration.LUN{
		ID: l.cfg.ID, Identity: l.identity.String(), Path: l.cfg.Path,
		// The takeover's commands go past the guest's door: it is migration
		// that decides which unit attentions are the guest's.
		Port:    &pr.Port{Sender: &pr.LUN{LUN: l.backend}},
		Tracked: l.tracked.state,
		Settled: l.settled,
		Pending: l.shared.Pending,
	}
	switch b := l.backend.(type) {
	case passthrough:
		x.BootID, x.Address, x.Held = b.Nexus().BootID, b.Nexus().Address.String(), b.Held()
		if l.beside() {
			// The guest runs on this very nexus, elsewhere: what the source has
			// found out is so here too, and asking could cost the guest a unit
			// attention.
			x.Preflight, l.self = l.cfg.Offered.Preflight, l.cfg.Offered.Nexus
			x.Nexus = l.self
			return x, nil
		}
	case *disk.LUN:
		l.self = b.Nexus()
		x.Nonce, x.Met = b.Nonce(), b.Met
	}
	p, err := l.port.Probe(ctx)
	if pr.Unsupported(err) {
		return x, nil
	}
	if err != nil {
		return nil, fmt.Errorf("its reservations could not be read: %w", err)
	}
	x.Preflight, l.persist = &p, p.Persist
	if guest := l.tracked.state(); l.self == (pr.Nexus{}) && p.FullStatus && !guest.Doubt {
		v := pr.View{FullStatus: true, Registrations: p.Status.Registrations}
		if at := v.With(l.self, guest.Key); at >= 0 {
			l.self = v.Registrations[at].Nexus
		}
	}
	if identify != nil && p.FullStatus && l.self == (pr.Nexus{}) {
		l.self, err = l.port.Identify(ctx, func(k pr.Key) pr.Ledger { return identify(x, k) })
		if errors.Is(err, pr.ErrLeftover) {
			return nil, errors.New(pr.LeftoverRegistration.String())
		}
		if err != nil {
			return nil, fmt.Errorf("this host's nexus could not be found out: %w", err)
		}
	}
	x.Nexus = l.self
	return x, nil
}

// settled is told how the takeover ended, before the guest runs.
func (l *lun) settled(o pr.Outcome, attentions []scsi.Sense) {
	for _, a := range attentions {
		l.shared.Raise(a)
	}
	l.tracked.moved(o.Kind)
	switch o.Kind {
	case pr.Moved:
		l.tracked.learn(pr.Tracked{Key: o.Key, Type: o.Type, Persist: l.persist})
	case pr.RegistrationOnly, pr.LeftBehind:
		l.tracked.learn(pr.Tracked{Key: o.Key, Persist: l.persist})
	case pr.FencedMeanwhile, pr.NothingHeld:
		l.tracked.learn(pr.Tracked{})
	case pr.Kept:
		// What is known is still so, but where this process has just come to
		// the nexus: then it begins with what the takeover has read.
		if l.beside() {
			l.tracked.learn(pr.Tracked{Key: o.Key, Type: o.Type, Persist: o.Persist, Doubt: o.Reason != pr.NoReason})
		}
	default:
		l.tracked.learn(pr.Tracked{Doubt: true})
	}
}

// message is c as it travels, with the LUNs that the guest has.
func (c *Config) message(luns []*lun) *vmmv1.MachineConfig {
	m := &vmmv1.MachineConfig{
		Name: c.Name, Cpus: uint32(c.CPUs), MemoryBytes: c.Memory, CpuModel: string(c.CPU),
		Kernel: c.Kernel, Initrd: c.Initrd, Cmdline: c.Cmdline, NoReboot: c.NoReboot,
	}
	for _, unit := range luns {
		l := &unit.cfg
		_, passed := unit.backend.(passthrough)
		path := l.Path
		if abs, err := filepath.Abs(path); err == nil {
			path = abs // who opens it has another working directory
		}
		m.Luns = append(m.Luns, &vmmv1.LunConfig{
			Id: l.ID, Path: path, Target: uint32(l.Target), TimeoutMs: uint64(l.Timeout / time.Millisecond),
			Readonly: l.ReadOnly, AllowUnsafe: l.Unsafe, Initiator: l.Initiator, Passthrough: passed,
		})
	}
	return m
}

// lunConfig is l on this host. New checks it.
func lunConfig(l *vmmv1.LunConfig) LUNConfig {
	return LUNConfig{
		ID: l.GetId(), Path: l.GetPath(), Target: int(min(l.GetTarget(), MaxTargets)), Timeout: time.Duration(min(l.GetTimeoutMs(), 1<<40)) * time.Millisecond,
		ReadOnly: l.GetReadonly(), Unsafe: l.GetAllowUnsafe(), Initiator: l.GetInitiator(),
	}
}

// Reception makes machines for guests that arrive. It implements
// migration.Host.
type Reception struct {
	// Config has what is this host's to say: Name (empty: the guest's own),
	// Console, RunDir, Warn. LUNs are those, by their ID, that are not
	// to be looked for.
	Config Config
	// StateDir is the directory of this host's journal.
	StateDir string
	// Serial, if not nil, makes the machine's second serial port, once for each
	// guest that begins to arrive.
	Serial func() (io.ReadWriteCloser, error)
	// Claim, if not nil, is asked whether a guest may have its name here. lock,
	// if not nil, is that by which a process of this host, where the guest runs,
	// may have the name (migration.Offer.Name).
	Claim func(name string, lock *os.File) error
	// Arrived, if not nil, is called when the guest runs, before its source
	// hears of it.
	Arrived func()
}

var _ migration.Host = (*Reception)(nil)

// Prepare implements migration.Host.
func (r *Reception) Prepare(ctx context.Context, offer migration.Offer) (_ migration.Destination, err error) {
	cfg, err := r.config(offer)
	if err != nil {
		return nil, err
	}
	if r.Claim != nil {
		if err := r.Claim(cfg.Name, offer.Name); err != nil {
			return nil, err
		}
	}
	a := &Arrival{here: offer.Memory != nil, arrived: r.Arrived, done: make(chan struct{})}
	in := Incoming{Requirements: offer.Requirements, Memory: offer.Memory}
	for _, f := range offer.Attachments {
		image, err := a.expect(ctx, f, cfg, offer.Saved)
		if err != nil {
			a.drop()
			return nil, err
		}
		switch f.Name {
		case attachedKernel:
			in.Kernel = image
		case attachedInitrd:
			in.Initrd = image
		default:
			a.drop()
			return nil, fmt.Errorf("the source sends a file called %q, which this version does not know", f.Name)
		}
	}
	if r.Serial != nil {
		if cfg.Serial, err = r.Serial(); err != nil {
			a.drop()
			return nil, err
		}
	}
	// The machine closes the files and the port from here on.
	if a.m, err = NewIncoming(cfg, in); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.m.Close())
		}
	}()
	journal, err := pr.OpenJournal(r.StateDir)
	if err != nil {
		return nil, err
	}
	a.luns, err = scout(ctx, a.m.units(), func(l *migration.LUN, k pr.Key) pr.Ledger {
		return journal.For(pr.Entry{LUN: l.Identity, Path: l.Path, Via: l.Address + " probe", Migration: offer.ID.String(), Key: k})
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// config is the machine that the offer asks for, on this host. The offer is
// not trusted; New checks what is not checked here.
func (r *Reception) config(offer migration.Offer) (Config, error) {
	o, cfg := offer.Config, r.Config
	if cfg.Name == "" {
		cfg.Name = o.GetName()
	}
	cfg.CPUs, cfg.Memory, cfg.CPU = int(min(o.GetCpus(), MaxCPUs+1)), o.GetMemoryBytes(), CPUModel(o.GetCpuModel())
	cfg.Kernel, cfg.Initrd, cfg.Cmdline, cfg.NoReboot = o.GetKernel(), o.GetInitrd(), o.GetCmdline(), o.GetNoReboot()
	mine := map[string]LUNConfig{}
	for _, l := range r.Config.LUNs {
		mine[l.ID] = l
	}
	offered := map[string]*migration.OfferedLUN{}
	for i := range offer.LUNs {
		offered[offer.LUNs[i].ID] = &offer.LUNs[i]
	}
	cfg.LUNs = nil
	for _, l := range o.GetLuns() {
		c := lunConfig(l)
		if known := offered[c.ID]; known != nil {
			c.Identity = known.Identity
			if offer.Memory != nil {
				c.Offered = known
			}
		}
		if l.GetPassthrough() {
			c.Path = "" // looked for by its identity
		} else if !offer.Saved {
			c.Initiator = "" // the source's nexus is not ours
		}
		if l, given := mine[c.ID]; given {
			delete(mine, c.ID)
			c.Path = l.Path
			if l.Initiator != "" {
				c.Initiator = l.Initiator
			}
		}
		cfg.LUNs = append(cfg.LUNs, c)
	}
	for id := range mine {
		return cfg, fmt.Errorf("--lun id=%s: the guest that comes has no LUN of that id", id)
	}
	return cfg, nil
}

// Arrival is a machine that a guest moves into. It implements
// migration.Destination.
type Arrival struct {
	m       *Machine
	here    bool // the guest was on this host before
	luns    []*migration.LUN
	files   []*attached
	arrived func()        // nil: nobody wants to know that it runs
	done    chan struct{} // closed when Run's guest has ended
	err     error         // how
}

var _ migration.Destination = (*Arrival)(nil)

// attached is a file that goes with the guest: this host's own, or kept in
// memory, as nobody has said where else.
type attached struct {
	file *os.File
	have bool  // it is this host's, and complete
	at   int64 // bytes that have come
}

// expect finds a file where the guest's first host had it, or makes room for it.
// More than the guest's memory would never have booted.
func (a *Arrival) expect(ctx context.Context, f migration.Attachment, cfg Config, saved bool) (*Image, error) {
	if f.Size <= 0 || uint64(f.Size) > cfg.Memory {
		return nil, fmt.Errorf("the source sends a %s of %d bytes for a guest with %d bytes of memory", f.Name, f.Size, cfg.Memory)
	}
	name := cfg.Kernel
	if f.Name == attachedInitrd {
		name = cfg.Initrd
	}
	var file *os.File
	if !saved { // a snapshot has the file right here
		file = find(ctx, name, f)
	}
	have := file != nil
	if !have {
		var err error
		if file, err = sys.MemFD("vmm-"+f.Name, f.Size); err != nil {
			return nil, err
		}
	}
	a.files = append(a.files, &attached{file: file, have: have})
	return &Image{Name: name, Size: f.Size, SHA256: f.SHA256, Data: file}, nil
}

// find opens the file at path if it is the one that is offered, or returns nil;
// at the end of ctx, too, as the path may lead to a server that does not answer.
func find(ctx context.Context, path string, want migration.Attachment) *os.File {
	found := make(chan *os.File, 1)
	go func() { found <- same(ctx, path, want) }()
	select {
	case f := <-found:
		return f
	case <-ctx.Done():
		go func() {
			if f := <-found; f != nil {
				f.Close()
			}
		}()
		return nil
	}
}

// same is find without a bound in time. The path comes from a peer: nothing but
// a regular file of that size is read.
func same(ctx context.Context, path string, want migration.Attachment) *os.File {
	if !filepath.IsAbs(path) {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil
	}
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Size() == want.Size {
		if theirs, ok := want.Data.(*os.File); ok && readsSame(theirs, info) {
			return f
		}
		hash, in := sha256.New(), io.NewSectionReader(f, 0, want.Size)
		for err == nil && ctx.Err() == nil {
			const piece = 4 << 20
			_, err = io.CopyN(hash, in, piece)
		}
		if errors.Is(err, io.EOF) && [sha256.Size]byte(hash.Sum(nil)) == want.SHA256 {
			return f
		}
	}
	f.Close()
	return nil
}

// readsSame says that a peer's file is the one of which info is, and open for
// reading: a peer that could not read a file gets none of it into its guest by
// naming it.
func readsSame(theirs *os.File, info os.FileInfo) bool {
	mode, err := unix.FcntlInt(theirs.Fd(), unix.F_GETFL, 0)
	if err != nil || mode&unix.O_PATH != 0 || mode&unix.O_ACCMODE == unix.O_WRONLY {
		return false
	}
	their, err := theirs.Stat()
	return err == nil && os.SameFile(their, info)
}

// drop closes the files of a machine that was not built.
func (a *Arrival) drop() {
	for _, f := range a.files {
		f.file.Close()
	}
}

// Machine is the machine itself.
func (a *Arrival) Machine() *Machine { return a.m }

// RAM is the guest's memory.
func (a *Arrival) RAM() *memory.RAM { return a.m.ram }

// LUNs are in the order of the offer.
func (a *Arrival) LUNs() []*migration.LUN { return a.luns }

// Has implements migration.Destination.
func (a *Arrival) Has(i int) bool { return a.files[i].have }

// Attach implements migration.Destination.
func (a *Arrival) Attach(i int, data []byte) error {
	f := a.files[i]
	if _, err := f.file.WriteAt(data, f.at); err != nil {
		return err
	}
	f.at += int64(len(data))
	return nil
}

// Load implements migration.Destination. That the files are those of the
// offer, migration has seen to.
func (a *Arrival) Load(s *vmmv1.MachineState) error {
	for _, l := range a.m.units() {
		if d, ok := l.backend.(*disk.LUN); ok && !a.here {
			if err := d.Arrive(); err != nil {
				return fmt.Errorf("LUN %s: %w", l.cfg.ID, err)
			}
		}
	}
	return a.m.Load(s)
}

// Run implements migration.Destination: it returns when the guest runs. Wait
// returns when it has ended.
func (a *Arrival) Run() (time.Time, error) {
	events, cancel := a.m.Events()
	defer cancel()
	go func() {
		defer close(a.done)
		a.err = a.m.Run(context.Background())
	}()
	for e := range events {
		if e.Kind != EventState {
			continue
		}
		switch e.State {
		case StateRunning:
			a.m.possess()
			if a.arrived != nil {
				a.arrived()
			}
			return *a.m.started.Load(), nil
		case StateEnded:
			<-a.done
			return time.Time{}, a.err
		}
	}
	<-a.done
	return time.Time{}, a.err
}

// Wait returns when the guest has ended, with what Machine.Run says.
func (a *Arrival) Wait() error {
	<-a.done
	return a.err
}

// Close frees a machine that never ran.
func (a *Arrival) Close() error { return a.m.Close() }
