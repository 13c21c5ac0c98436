package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

// version is this release; see CHANGELOG.md.
const version = "0.1.0-dev"

func newVersionCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Long:    "Prints the version of this program and that of Go that it was built with.",
		Args:    cobra.NoArgs,
		Example: "  vmm version\n  vmm version -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			if format.json() {
				return printJSON(c.OutOrStdout(), struct {
					Version string `json:"version"`
					Go      string `json:"go"`
				}{version, runtime.Version()})
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "vmm %s (%s)\n", version, runtime.Version())
			return err
		},
	}
	format.addFlag(c)
	return c
}

// outputFormat is the value of -o.
type outputFormat string

func (f *outputFormat) addFlag(c *cobra.Command) {
	*f = "text"
	c.Flags().VarP(f, "output", "o", "output format: text or json")
}

func (f *outputFormat) json() bool     { return *f == "json" }
func (f *outputFormat) String() string { return string(*f) }
func (f *outputFormat) Type() string   { return "FORMAT" }

func (f *outputFormat) Set(s string) error {
	if s != "text" && s != "json" {
		return fmt.Errorf("give text or json")
	}
	*f = outputFormat(s)
	return nil
}
