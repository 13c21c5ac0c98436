package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
)

func newStatusCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:   "status NAME",
		Short: "Say what a guest is and does",
		Long: `Says in which state a guest is, what it was given, and which LUNs it has. No disk
is asked: vmm pr show NAME does that.`,
		Example:           "  vmm status web1\n  vmm status web1 -o json",
		Args:              oneGuest,
		ValidArgsFunction: completeGuest,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := dial(args[0])
			if err != nil {
				return err
			}
			defer client.Close()
			s, err := ask(c.Context(), client, askTime, client.Status, &vmmv1.StatusRequest{})
			if err != nil {
				return err
			}
			out := c.OutOrStdout()
			if format.json() {
				return printMessage(out, s)
			}
			t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
			fmt.Fprintf(t, "name\t%s\nstate\t%s\n", s.Name, s.State)
			if s.State != control.StateWaiting {
				fmt.Fprintf(t, "vCPUs\t%d, %s\nmemory\t%s\nuptime\t%s\n", s.Cpus, s.CpuModel, sizeText(s.MemoryBytes), uptimeText(s.UptimeSeconds))
			}
			fmt.Fprintf(t, "pid\t%d\nversion\t%s\n", s.Pid, s.Version)
			if s.Migration != "" {
				fmt.Fprintf(t, "migration\t%s\n", s.Migration)
			}
			for _, l := range s.Luns {
				mode := ""
				if l.Readonly {
					mode = ", read-only"
				}
				fmt.Fprintf(t, "LUN %s\ttarget %d, %s %s (%s)%s\n", l.Id, l.Target, l.Kind, l.Path, l.Identity, mode)
			}
			return t.Flush()
		},
	}
	format.addFlag(c)
	return c
}
