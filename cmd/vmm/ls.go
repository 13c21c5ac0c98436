package main

import (
	"encoding/json"
	"fmt"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
)

// listTime is the time that each guest has to appear in the list with more
// than its name.
const listTime = 2 * time.Second

func newLsCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the guests that run",
		Long: `Lists the guests of this user that run on this host. What guests that were
killed have left in the run directory is removed on the way. A guest whose
process does not answer within 2 seconds is listed as "not answering"; one for which
vmm receive waits, as "waiting".`,
		Example: "  vmm ls\n  vmm ls -o json",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			dir, err := control.DefaultRunDir()
			if err != nil {
				return err
			}
			running, err := dir.List()
			if err != nil {
				return err
			}
			list := make([]*vmmv1.StatusResponse, len(running))
			var asked sync.WaitGroup
			for i, r := range running {
				asked.Go(func() {
					list[i] = &vmmv1.StatusResponse{Name: r.Name, State: "not answering", Pid: uint32(max(r.Pid, 0))}
					client, err := dir.DialListed(r)
					if err != nil {
						list[i].State = "ended"
						return
					}
					defer client.Close()
					if s, err := ask(c.Context(), client, listTime, client.Status, &vmmv1.StatusRequest{}); err == nil {
						list[i] = s
					}
				})
			}
			asked.Wait()
			out := c.OutOrStdout()
			if format.json() {
				guests := []json.RawMessage{}
				for _, s := range list {
					b, err := control.MarshalJSON(s)
					if err != nil {
						return err
					}
					guests = append(guests, b)
				}
				return printJSON(out, map[string]any{"guests": guests})
			}
			t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "NAME\tSTATE\tCPUS\tMEMORY\tUPTIME\tPID")
			for _, s := range list {
				cpus, memory, uptime := fmt.Sprint(s.Cpus), sizeText(s.MemoryBytes), uptimeText(s.UptimeSeconds)
				if s.Cpus == 0 { // not known
					cpus, memory, uptime = "-", "-", "-"
				}
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\n", s.Name, s.State, cpus, memory, uptime, s.Pid)
			}
			return t.Flush()
		},
	}
	format.addFlag(c)
	return c
}
