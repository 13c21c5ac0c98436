package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"vmm/control"
	"vmm/machine"
	"vmm/migration"
)

// expect makes this process ready for a guest that comes from elsewhere: under
// name or, if that is empty, under the guest's own when it is known. The caller
// closes names, also after an error.
func (f *foreground) expect(c *cobra.Command, name string, luns []string, names *claims) (_ *machine.Reception, err error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	cfg := machine.Config{Name: name}
	if cfg.LUNs, err = namedLUNs(luns); err != nil {
		return nil, err
	}
	dir, err := control.DefaultRunDir()
	if err != nil {
		return nil, err
	}
	cfg.RunDir = string(dir)
	state, err := control.StateDir()
	if err != nil {
		return nil, err
	}
	names.dir = dir
	switch {
	case name == "":
	case names.waiting != nil:
		err = names.await(name)
	default:
		err = names.take(name, nil)
	}
	if err != nil {
		return nil, err
	}
	if err := f.background.openLog(dir, name); err != nil {
		return nil, err
	}
	f.attach(c, &cfg)
	settle(c.Context(), dir, cfg.Warn)
	reception := &machine.Reception{Config: cfg, StateDir: state, Claim: names.take, Arrived: func() {
		if err := names.arrived(); err != nil {
			cfg.Warn(err.Error())
		}
	}}
	if f.serial != "" {
		reception.Serial = f.port
	}
	return reception, nil
}

// stay stays with a guest that has come.
func (f *foreground) stay(c *cobra.Command, signals stopSignals, names *claims, warn func(string), got *migration.Arrival) (err error) {
	for _, l := range got.LUNs {
		warn(l.Sentence)
	}
	arrival := got.Machine.(*machine.Arrival)
	m := arrival.Machine()
	defer func() { err = errors.Join(err, m.Close()) }()
	return f.supervise(c, signals, names.claim, m, warn, arrival.Wait)
}

// namedLUNs are those LUNs of a guest that comes from elsewhere which are not
// to be looked for.
func namedLUNs(flags []string) (luns []machine.LUNConfig, err error) {
	for _, s := range flags {
		l, err := machine.ParseLUN(s)
		if err == nil && l.ID == "" {
			err = fmt.Errorf("LUN %q: id=NAME must say which of the guest's LUNs is meant", s)
		}
		if err != nil {
			return nil, usageError{fmt.Errorf("--lun: %w", err)}
		}
		luns = append(luns, l)
	}
	return luns, nil
}

// claims are the names of a guest that is still to come: the one under which
// this process is reached while it waits, and, while a guest arrives, the
// guest's.
type claims struct {
	dir     control.RunDir
	waiting *control.Waiting // nil: nobody waits, the guest is in a file
	beside  bool             // the guest may run here, in another process

	mu       sync.Mutex
	incoming *control.Claim
	server   *control.Server // on incoming
	name     string
	claim    *control.Claim
}

// await makes this process the one that waits for the guest called name, and
// reachable as that.
func (n *claims) await(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.awaitLocked(name)
}

func (n *claims) awaitLocked(name string) (err error) {
	if n.incoming, err = n.dir.Await(name, n.beside); err != nil {
		return err
	}
	n.waiting.Name = name
	n.server = control.NewWaitingServer(n.incoming, *n.waiting, version)
	go n.server.Serve() // until arrived, or the end of the process
	return nil
}

// take claims the name of a guest that begins to arrive: from the process where
// it runs, if that is on this host and hands its lock over.
func (n *claims) take(name string, lock *os.File) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.claim != nil && n.name == name {
		return nil
	}
	if n.incoming == nil && n.waiting != nil {
		if err := n.awaitLocked(name); err != nil {
			return err
		}
	}
	claim, err := n.dir.Claim(name)
	if errors.Is(err, control.ErrRunning) && lock != nil {
		claim, err = n.dir.Inherit(name, lock)
	}
	if err != nil {
		return err
	}
	if n.claim != nil {
		err = n.claim.Close()
	}
	n.name, n.claim = name, claim
	return err
}

// release gives up the name of a guest that did not arrive.
func (n *claims) release() (err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.claim != nil {
		err = n.claim.Close()
		n.claim = nil
	}
	return err
}

// arrived ends the waiting: the guest is reached by its own name, and here.
func (n *claims) arrived() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	err := n.endWaiting()
	if n.claim != nil {
		err = errors.Join(err, n.claim.Take())
	}
	return err
}

func (n *claims) endWaiting() error {
	if n.incoming == nil {
		return nil
	}
	err := n.incoming.Close()
	n.incoming = nil
	go closeServer(n.server) // the guest's own does not wait for that
	return err
}

// Close gives up all names.
func (n *claims) Close() error {
	n.mu.Lock()
	if n.incoming != nil {
		closeServer(n.server) // who asked for the end learns that it has come
	}
	err := n.endWaiting()
	n.mu.Unlock()
	return errors.Join(err, n.release())
}

// closeServer lets the last answers be taken. A client that does not take its
// own is left behind.
func closeServer(s *control.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	_ = s.Close(ctx)
}
