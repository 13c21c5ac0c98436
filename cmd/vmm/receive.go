package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"vmm/control"
	"vmm/doctor"
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
	f.tls.settle(c, address)
	security, err := f.tls.security()
	if err != nil {
		return bad("tls-dir", err)
	}
	signals := catchStop()
	defer signals.release()
	names := &claims{waiting: &control.Waiting{Address: address.String(), Stop: signals.stop}, beside: address.Network == "unix"}
	defer func() { err = errors.Join(err, names.Close()) }()
	reception, err := f.expect(c, name, f.luns, names)
	if err != nil {
		return err
	}
	warn := reception.Config.Warn
	ln, err := migration.Listen(address, security, f.peers)
	if err != nil {
		return err
	}
	ctx, keep := signals.context(c.Context())
	defer keep()
	migration.Rehearse()
	warn(fmt.Sprintf("waiting for a guest at %v", address))
	if err := f.background.ready("%s waits in the background for a guest at %v (pid %d)", name, address, os.Getpid()); err != nil {
		ln.Close()
		return err
	}
	got, err := migration.Receive(ctx, ln, reception, migration.ReceiveOptions{
		StateDir: reception.StateDir,
		Warn:     func(err error) { warn(err.Error()) },
		GivenUp: func() {
			if err := names.release(); err != nil {
				warn(err.Error())
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
	keep() // once it is here a signal is the guest's power button
	defer got.Leave()
	return f.stay(c, signals, names, warn, got)
}
