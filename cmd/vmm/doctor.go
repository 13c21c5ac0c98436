package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"vmm/machine"
)

func newDoctorCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Say whether this host can run guests, and what to mend",
		Long: `Looks at what vmm needs of this host, one line each: ok, warn or fail, and how
to mend it. The exit status is 0 when guests can run here, else 1.`,
		Example: "  vmm doctor\n  vmm doctor -o json",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			found := machine.Examine()
			can := machine.CanRun(found)
			out := c.OutOrStdout()
			if format.json() {
				e := json.NewEncoder(out)
				e.SetIndent("", "  ")
				if err := e.Encode(struct {
					CanRun   bool              `json:"can_run"`
					Findings []machine.Finding `json:"findings"`
				}{can, found}); err != nil {
					return err
				}
			} else {
				for _, f := range found {
					fmt.Fprintf(out, "%-4s  %-16s  %s\n", f.Verdict, f.Name, f.Detail)
					if f.Mend != "" {
						fmt.Fprintf(out, "%24s  %s\n", "", f.Mend)
					}
				}
			}
			if !can {
				return errSilent
			}
			return nil
		},
	}
	format.addFlag(c)
	return c
}
