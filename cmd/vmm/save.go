package main

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
)

func newSaveCommand() *cobra.Command {
	var format outputFormat
	force := false
	c := &cobra.Command{
		Use:   "save NAME FILE",
		Short: "Write a running guest to a file, and end it here",
		Long: `Stops a running guest and writes it to FILE, memory, devices and what it has of
SCSI reservations, then ends it; vmm run --from FILE goes on with it. Whatever fails
before FILE is complete, Ctrl-C included, leaves the guest running and no file.

The guest's registrations stay on its disks as they are. A cluster that does not hear
from it may fence it meanwhile: it is fenced then, as if it had been running.
Disks are not in FILE: nobody may write to them before the guest goes on.`,
		Example: "  vmm save web1 /var/lib/vmm/web1.snap\n  vmm run web1 --from /var/lib/vmm/web1.snap",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 || args[1] == "" {
				return usageError{errors.New("save wants a guest and a file, as in: vmm save web1 web1.snap")}
			}
			return validName(args[0])
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault // a file
			}
			return completeGuest(c, args, typed)
		},
		RunE: func(c *cobra.Command, args []string) error {
			client, err := dial(args[0])
			if err != nil {
				return err
			}
			defer client.Close()
			return save(c, client, &vmmv1.SaveRequest{Path: absolute(args[1]), Force: force}, format)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace FILE if it is there")
	format.addFlag(c)
	return c
}

// save asks the guest's process and follows what it says.
func save(c *cobra.Command, client *control.Client, request *vmmv1.SaveRequest, format outputFormat) error {
	ended, err := client.WhenEnded()
	if err != nil {
		return err
	}
	defer ended.Close()
	defer cancelOnSignal(client)()
	steps, err := client.Save(c.Context(), connect.NewRequest(request))
	if err != nil {
		return client.Explain(err)
	}
	defer steps.Close()
	show := newShower(c, format)
	var summary *vmmv1.SaveSummary
	for steps.Receive() {
		m := steps.Msg()
		summary = m.GetSummary()
		if err := show.saving(client.Name(), m); err != nil {
			return err
		}
	}
	err = steps.Err()
	if err != nil && !diedOf(err, ended) {
		show.end()
		return client.Explain(err)
	}
	if err != nil || summary == nil {
		show.end()
		return fmt.Errorf("guest %s: its process ended while it was being saved; vmm run --from %s says whether the file is complete", client.Name(), request.Path)
	}
	gone(c, client, ended)
	return nil
}

// saving shows one step of a save, the summary too.
func (s *shower) saving(name string, m *vmmv1.SaveResponse) error {
	if s.json {
		return s.line(m)
	}
	if p := m.GetProgress(); p != nil && s.bar != nil {
		s.draw(amount(p.WrittenBytes) + " of " + amount(p.TotalBytes))
	}
	if r := m.GetSummary(); r != nil {
		s.end()
		fmt.Fprintf(s.out, "%s is in %s: %s in %.1f s\n", name, r.Path, amount(r.Bytes), float64(r.TotalUs)/1e6)
		for _, l := range r.Luns {
			fmt.Fprintf(s.out, "  %s\n", folded(l.Sentence, cellsOf(s.out), 2))
		}
	}
	return nil
}

// cancelOnSignal has a signal give up what moves the guest, until stop is
// called; its end is still waited for, and told.
func cancelOnSignal(client *control.Client) (stop func()) {
	signals := catchStop()
	over := make(chan struct{})
	go func() {
		select {
		case <-signals:
			_, _ = ask(context.Background(), client, askTime, client.CancelMigration, &vmmv1.CancelMigrationRequest{}) // else it has just ended
		case <-over:
		}
	}()
	return func() {
		signals.release()
		close(over)
	}
}
