package machine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"testing"
	"time"

	"vmm/memory"
	"vmm/migration"
)

// sumOf is that of all memory.
func sumOf(ram *memory.RAM) [sha256.Size]byte {
	h := sha256.New()
	for _, r := range ram.Regions() {
		h.Write(bytes.Clone(r.Bytes))
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// watched tells when the guest is about to run at its destination.
type watched struct {
	*Reception
	beforeRun func(*memory.RAM)
}

type watchedArrival struct {
	migration.Destination
	w watched
}

func (w watched) Prepare(ctx context.Context, o migration.Offer) (migration.Destination, error) {
	d, err := w.Reception.Prepare(ctx, o)
	if err != nil {
		return nil, err
	}
	return watchedArrival{d, w}, nil
}

func (a watchedArrival) Run() (time.Time, error) {
	a.w.beforeRun(a.RAM())
	return a.Destination.Run()
}

// stopped is a source that tells when its guest stands.
type stopped struct {
	*Departure
	then func(*memory.RAM)
}

func (s stopped) Pause(ctx context.Context) (time.Time, error) {
	since, err := s.Departure.Pause(ctx)
	s.then(s.RAM())
	return since, err
}

// A real guest goes on in another machine on the very same memory, which nobody
// has written to between its stop and its start: neither a machine that is
// built and loaded, nor one that is saved, does.
func TestGuestMigratesWithItsMemory(t *testing.T) {
	m, out := newMachine(t, counts(), func(c *Config) { c.Name = "web1" })
	stop := run(t, m)
	out.waitFor("0123456789")
	console := newConsole()
	var before, after [sha256.Size]byte
	host := watched{
		&Reception{Config: Config{Console: console, RunDir: t.TempDir(), Warn: func(s string) { t.Logf("destination: %s", s) }}, StateDir: t.TempDir()},
		func(ram *memory.RAM) { after = sumOf(ram) },
	}
	dial, arrived := receiving(t, host, host.StateDir)
	d, err := m.Depart(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o, err := migration.NewOutgoing(stopped{d, func(ram *memory.RAM) { before = sumOf(ram) }}, migration.Options{Dial: dial, Local: true})
	if err != nil {
		t.Fatal(err)
	}
	s, err := o.Run(t.Context())
	if err != nil {
		t.Fatalf("migration = %v", err)
	}
	if s.Sent != 0 || before != after {
		t.Errorf("%d bytes of memory were sent; its checksum is %x when the guest stops, %x before it runs", s.Sent, before, after)
	}
	arrived()
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Errorf("the source's Run() = %v; want nil", err)
	}
	if err := m.Close(); err != nil { // the memory is the other's now
		t.Error(err)
	}
	console.waitFor("0123456789")
	was, is := out.String(), console.String()
	if last, first := was[len(was)-1], is[0]; (last-'0'+1)%10 != first-'0' {
		t.Errorf("the guest wrote %q last at the source and %q first at the destination", last, first)
	}
}
