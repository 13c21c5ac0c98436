package main

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"vmm/control"
	"vmm/machine"
	"vmm/migration"
)

// fromFlags are those of vmm run that say where a saved guest is.
type fromFlags struct {
	from  string
	again bool
}

func (f *fromFlags) addFlags(c *cobra.Command) {
	c.Flags().StringVar(&f.from, "from", "", "go on with the guest that vmm save wrote to this file; see above")
	c.Flags().BoolVar(&f.again, "again", false, "with --from: also if the file has been run before; the guest's disks may not fit its memory any more")
}

// ofBoot are the flags of vmm run that a saved guest brings with it.
var ofBoot = []string{"config", "kernel", "initrd", "cmdline", "cpus", "memory", "cpu", "no-reboot"}

// check refuses flags that do not go together.
func (f *fromFlags) check(c *cobra.Command) error {
	if f.from == "" {
		if f.again {
			return usageError{errors.New("--again: it belongs to --from")}
		}
		return nil
	}
	for _, name := range ofBoot {
		if c.Flags().Changed(name) {
			return usageError{fmt.Errorf("--%s: a guest --from a file has its own", name)}
		}
	}
	return nil
}

// restore runs a saved guest and stays with it.
func (f *runFlags) restore(c *cobra.Command, name string) (err error) {
	cfg := machine.Config{Name: name}
	if cfg.LUNs, err = namedLUNs(f.luns); err != nil {
		return err
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
	names := &claims{dir: dir}
	defer func() { err = errors.Join(err, names.Close()) }()
	if name != "" { // else the guest's own, which the file has
		if err := names.take(name, nil); err != nil {
			return err
		}
	}
	if err := f.background.openLog(dir, name); err != nil {
		return err
	}
	f.attach(c, &cfg)
	settle(c.Context(), dir, cfg.Warn)
	reception := &machine.Reception{Config: cfg, StateDir: state, Claim: names.take}
	if f.serial != "" {
		reception.Serial = f.port
	}
	ctx, cancel := signal.NotifyContext(c.Context(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer cancel()
	got, err := migration.Restore(ctx, f.from, reception, migration.RestoreOptions{
		StateDir: state, Again: f.again, Warn: func(err error) { cfg.Warn(err.Error()) },
	})
	if errors.Is(err, context.Canceled) {
		return errors.New("ended before the guest ran: the file is as it was")
	}
	if err != nil {
		return err
	}
	cancel() // from here on a signal is the guest's power button
	for _, l := range got.LUNs {
		cfg.Warn(l.Sentence)
	}
	arrival := got.Machine.(*machine.Arrival)
	m := arrival.Machine()
	defer func() { err = errors.Join(err, m.Close()) }()
	return f.supervise(c, names.claim, m, cfg.Warn, arrival.Wait)
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
