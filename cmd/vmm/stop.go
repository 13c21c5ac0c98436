package main

import (
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
)

// endTime is the time that a guest's process has, once the guest has ended, to
// close its disks.
const endTime = 30 * time.Second

func newStopCommand() *cobra.Command {
	var (
		format  outputFormat
		timeout time.Duration
		force   bool
	)
	c := &cobra.Command{
		Use:   "stop NAME",
		Short: "Shut a guest down, if need be by force",
		Long: `Presses the guest's power button and waits until it has shut down; after --timeout
it is ended by force, as if its power cord had been pulled. Returns when the
guest's process has given its disks and its name free. Interrupted, it leaves the
guest to its shutdown, without force. The guest's reservations stay on the disks.

Where vmm receive waits for a guest of that name, the waiting ends; one that is just
arriving runs on at its old host.`,
		Example:           "  vmm stop web1\n  vmm stop web1 --timeout 2m\n  vmm stop web1 --force",
		Args:              oneGuest,
		ValidArgsFunction: completeGuest,
		RunE: func(c *cobra.Command, args []string) error {
			if timeout < 0 || timeout > math.MaxUint32*time.Millisecond {
				return usageError{fmt.Errorf("--timeout: %v: give a time from 0 to 49 days", timeout)}
			}
			dir, err := control.DefaultRunDir()
			if err != nil {
				return err
			}
			client, err := dir.Dial(args[0])
			if err != nil {
				return err
			}
			defer client.Close()
			ended, err := client.WhenEnded()
			if err != nil {
				return err
			}
			defer ended.Close()
			ms := uint32(timeout.Milliseconds())
			r, err := ask(c.Context(), client, timeout+askTime, client.Stop, &vmmv1.StopRequest{TimeoutMs: &ms, Force: force})
			if err != nil {
				return err
			}
			if !ended.Wait(endTime) {
				return fmt.Errorf("guest %s has ended, but its process is still closing its disks", args[0])
			}
			if format.json() {
				return printJSON(c.OutOrStdout(), struct {
					Name   string `json:"name"`
					Forced bool   `json:"forced"`
				}{args[0], r.Forced})
			}
			how := "has powered off"
			switch {
			case client.Awaited():
				how = "is not waited for any more"
			case force:
				how = "was ended by force"
			case r.Forced:
				how = fmt.Sprintf("did not power off within %v and was ended by force", timeout)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s %s\n", args[0], how)
			return err
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", control.DefaultStopTimeout, "time between the power button and force")
	c.Flags().BoolVar(&force, "force", false, "end the guest at once, without the power button")
	format.addFlag(c)
	return c
}
