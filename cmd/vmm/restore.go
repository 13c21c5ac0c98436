package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

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
	names := &claims{}
	defer func() { err = errors.Join(err, names.Close()) }()
	reception, err := f.expect(c, name, f.luns, names)
	if err != nil {
		return err
	}
	warn := reception.Config.Warn
	signals := catchStop()
	defer signals.release()
	ctx, keep := signals.context(c.Context())
	defer keep()
	got, err := migration.Restore(ctx, f.from, reception, migration.RestoreOptions{
		StateDir: reception.StateDir, Again: f.again, Warn: func(err error) { warn(err.Error()) },
	})
	if errors.Is(err, context.Canceled) {
		return errors.New("ended before the guest ran: the file is as it was")
	}
	if err != nil {
		return err
	}
	keep() // from here on a signal is the guest's power button
	return f.stay(c, signals, names, warn, got)
}
