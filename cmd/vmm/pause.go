package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
)

// pauseTime is the time that the vCPUs have to stand.
const pauseTime = 15 * time.Second

func newPauseCommand() *cobra.Command {
	return newStateCommand(&cobra.Command{
		Use:   "pause NAME",
		Short: "Stop a guest's vCPUs where they are",
		Long: `Stops a guest's vCPUs, and returns when all stand. Commands that its disks have
are finished. A guest that is paused already stays so. Its reservations stay, and
a cluster may fence it meanwhile.`,
		Example: "  vmm pause web1\n  vmm resume web1",
	}, func(ctx context.Context, c *control.Client) error {
		_, err := ask(ctx, c, pauseTime, c.Pause, &vmmv1.PauseRequest{})
		return err
	})
}

func newResumeCommand() *cobra.Command {
	force := false
	c := newStateCommand(&cobra.Command{
		Use:   "resume NAME",
		Short: "Let a paused guest run on",
		Long: `Lets the vCPUs of a paused guest run on. One that was fenced while it was paused
finds out at its next command to the disk. A guest that runs is left alone.

A guest that was handed over to a host which does not answer stays stopped here.
--force states that the other host is dead, and stays dead: the guest runs here
again, unless its reservations say that it ran there.`,
		Example: "  vmm resume web1",
	}, func(ctx context.Context, c *control.Client) error {
		_, err := ask(ctx, c, askTime, c.Resume, &vmmv1.ResumeRequest{Force: force})
		return err
	})
	c.Flags().BoolVar(&force, "force", false, "the host which the guest was handed over to is dead")
	return c
}

// newStateCommand completes a command that changes the state of one guest and
// says which it is in then.
func newStateCommand(c *cobra.Command, change func(context.Context, *control.Client) error) *cobra.Command {
	var format outputFormat
	c.Args, c.ValidArgsFunction = oneGuest, completeGuest
	c.RunE = func(c *cobra.Command, args []string) error {
		client, err := dial(args[0])
		if err != nil {
			return err
		}
		defer client.Close()
		if err := change(c.Context(), client); err != nil {
			return err
		}
		s, err := ask(c.Context(), client, askTime, client.Status, &vmmv1.StatusRequest{})
		if err != nil {
			return err
		}
		if format.json() {
			return printJSON(c.OutOrStdout(), struct {
				Name  string `json:"name"`
				State string `json:"state"`
			}{s.Name, s.State})
		}
		_, err = fmt.Fprintf(c.OutOrStdout(), "%s is %s\n", s.Name, s.State)
		return err
	}
	format.addFlag(c)
	return c
}
