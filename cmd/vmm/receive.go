package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"vmm/control"
	"vmm/doctor"
	"vmm/machine"
	"vmm/migration"
	vmmv1 "vmm/proto/vmm/v1"
)

type receiveFlags struct {
	listen string
	tls    tlsFlags
	peers  []string
	luns   []string
	foreground
}

func newReceiveCommand() *cobra.Command {
	var f receiveFlags
	c := &cobra.Command{
		Use:   "receive [NAME] --listen ADDRESS [flags]",
		Short: "Wait for a guest that migrates here, and stay with it",
		Long: `Waits for a guest at ADDRESS (tcp://HOST:PORT, HOST:PORT or unix:///PATH), runs it
when it has come, and stays in the foreground as vmm run does. What the guest is
comes with it; NAME is its name here, by default the one that it had.

Each passed-through LUN is looked for on this host by its identity (VPD page 83h);
software disks are opened at the path that they had. --lun id=NAME,path=PATH says
otherwise, and initiator=NAME gives a software disk another nexus. A LUN that is
not the guest's is refused while the guest still runs at its old host.

Whoever may connect may have a guest run here: at other addresses than this host's
own that takes TLS, with the files in --tls-dir, else in ~/.config/vmm/tls, else in
/etc/vmm/tls, unless --insecure says otherwise.

At a unix socket NAME may run on this host already: vmm migrate NAME --local then
makes this process its next one, with the same name, disks and reservations, which is
how the monitor of a running guest is upgraded. Until then NAME is the old process, and
a signal ends the waiting.

While it waits vmm ls and vmm status show NAME as waiting, and vmm stop NAME ends that.
With --detach it waits, and runs the guest, in the background, as vmm run --detach
does; the command returns 0 when it waits.`,
		Example: `  vmm receive web1 --listen tcp://0.0.0.0:4444
  vmm receive --listen unix:///run/vmm/incoming --lun id=data,path=/dev/sg7
  vmm receive web1 --listen unix:///run/vmm/upgrade &
  vmm migrate web1 unix:///run/vmm/upgrade --local`,
		Args: func(_ *cobra.Command, args []string) error {
			switch len(args) {
			case 0:
				return nil
			case 1:
				return validName(args[0])
			}
			return usageError{errors.New("receive wants at most one name for the guest, as in: vmm receive web1 --listen tcp://0.0.0.0:4444")}
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, args []string) error {
			name := ""
			if len(args) == 1 {
				name = args[0]
			}
			if f.detach && name == "" {
				return usageError{errors.New("receive --detach wants a name for the guest, by which it is found, as in: vmm receive web1 --detach --listen tcp://0.0.0.0:4444")}
			}
			if f.leaves(c) {
				return detach(c)
			}
			return f.background.finish(f.run(c, name))
		},
	}
	fs := c.Flags()
	fs.StringVar(&f.listen, "listen", "", "address to wait at")
	f.tls.addFlags(c)
	fs.StringArrayVar(&f.peers, "peer", nil, "name of which the source's certificate must have one (repeatable); default: any certificate of the authority")
	fs.StringArrayVar(&f.luns, "lun", nil, "where a LUN is on this host (repeatable); see above")
	f.foreground.addFlags(fs)
	return c
}

func (f *receiveFlags) run(c *cobra.Command, name string) (err error) {
	bad := func(flag string, err error) error { return usageError{fmt.Errorf("--%s: %w", flag, err)} }
	if f.listen == "" {
		return bad("listen", errors.New("give the address to wait at, as in tcp://0.0.0.0:4444"))
	}
	address, err := migration.ParseAddress(f.listen)
	if err != nil {
		return bad("listen", err)
	}
	if f.stopTimeout < 0 {
		return bad("stop-timeout", fmt.Errorf("%v: give a time of 0 or more", f.stopTimeout))
	}
	cfg := machine.Config{Name: name}
	if cfg.LUNs, err = namedLUNs(f.luns); err != nil {
		return err
	}
	f.tls.settle(c, address)
	security, err := f.tls.security()
	if err != nil {
		return bad("tls-dir", err)
	}
	dir, err := control.DefaultRunDir()
	if err != nil {
		return err
	}
	cfg.RunDir = string(dir)
	state, err := control.StateDir()
	if err != nil {
		return err
	}
	waiting, giveUp := context.WithCancel(c.Context())
	defer giveUp()
	names := &claims{dir: dir, waiting: &control.Waiting{Address: address.String(), Stop: giveUp}, beside: address.Network == "unix"}
	defer func() { err = errors.Join(err, names.Close()) }()
	if name != "" { // else the guest's own, when it comes
		if err := names.await(name); err != nil {
			return err
		}
	}
	if err := f.background.openLog(dir, name); err != nil {
		return err
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
	ln, err := migration.Listen(address, security, f.peers)
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(waiting, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer cancel()
	cfg.Warn(fmt.Sprintf("waiting for a guest at %v", address))
	if err := f.background.ready("%s waits in the background for a guest at %v (pid %d)", name, address, os.Getpid()); err != nil {
		ln.Close()
		return err
	}
	// Once it is here a signal is the guest's power button, and the source may
	// still have to hear that it is.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	tied := context.AfterFunc(ctx, end)
	got, err := migration.Receive(life, ln, reception, migration.ReceiveOptions{
		StateDir: state,
		Warn:     func(err error) { cfg.Warn(err.Error()) },
		GivenUp: func() {
			if err := names.release(); err != nil {
				cfg.Warn(err.Error())
			}
		},
		Survey: func() *vmmv1.HostSurvey { return doctor.Survey(version) },
	})
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return errors.New("ended before a guest came")
		}
		return err
	}
	tied()
	cancel()
	for _, l := range got.LUNs {
		cfg.Warn(l.Sentence)
	}
	arrival := got.Machine.(*machine.Arrival)
	m := arrival.Machine()
	defer func() { err = errors.Join(err, m.Close()) }()
	err = f.supervise(c, names.claim, m, cfg.Warn, arrival.Wait)
	// A guest that is gone needs no answer to whether it runs; the verdict that
	// it did stays in the journal.
	end()
	<-got.Answered
	return err
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
