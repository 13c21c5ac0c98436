package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"vmm/control"
	"vmm/machine"
	"vmm/scsi/sg"
)

// completeGuest offers the names of the guests that run or are waited for.
func completeGuest(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return runningNames(typed), cobra.ShellCompDirectiveNoFileComp
}

// runningNames are the guests that run or are waited for, and whose names begin
// with prefix.
func runningNames(prefix string) []string {
	dir, err := control.DefaultRunDir()
	if err != nil {
		return nil
	}
	running, err := dir.List()
	if err != nil {
		return nil
	}
	var names []string
	for _, r := range running {
		if strings.HasPrefix(r.Name, prefix) {
			names = append(names, r.Name)
		}
	}
	return slices.Compact(names) // one that runs may be waited for, too
}

// Flags whose values are files, and those whose values are directories, in
// every command that has them.
var (
	fileFlags      = map[string][]string{"kernel": nil, "initrd": nil, "serial": nil, "from": nil, "config": {"yaml", "yml"}}
	directoryFlags = map[string]bool{"tls-dir": true}
	valueFlags     = map[string]cobra.CompletionFunc{
		"output": cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp),
		"cpu": cobra.FixedCompletions([]string{string(machine.CPUHost), string(machine.CPUv2), string(machine.CPUv3)},
			cobra.ShellCompDirectiveNoFileComp),
		"lun": completeLUN,
	}
)

// completeFlags says how the flags of c and of all below it complete. A flag
// that nobody has said anything about has a value of the user's own, which is
// no file.
func completeFlags(c *cobra.Command) {
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if _, known := c.GetFlagCompletionFunc(f.Name); known {
			return
		}
		// An error would say that the flag is not there, or known.
		switch extensions, file := fileFlags[f.Name]; {
		case valueFlags[f.Name] != nil:
			_ = c.RegisterFlagCompletionFunc(f.Name, valueFlags[f.Name])
		case file:
			_ = c.MarkFlagFilename(f.Name, extensions...)
		case directoryFlags[f.Name]:
			_ = c.MarkFlagDirname(f.Name)
		default:
			_ = c.RegisterFlagCompletionFunc(f.Name, cobra.NoFileCompletions)
		}
	})
	for _, sub := range c.Commands() {
		completeFlags(sub)
	}
}

// completeLUN offers this host's SCSI disks, by what they are.
func completeLUN(_ *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	before, last := "", typed
	if i := strings.LastIndexByte(typed, ','); i >= 0 {
		before, last = typed[:i+1], typed[i+1:]
	}
	var offer []string
	add := func(option, help string) {
		if strings.HasPrefix(option, last) {
			offer = append(offer, cobra.CompletionWithDesc(before+option, help))
		}
	}
	if strings.HasPrefix(last, "path=") {
		units, _ := sg.List() // what cannot be listed is not offered
		for _, u := range units {
			add("path="+u.Node, u.Vendor+" "+u.Product+" "+u.Name)
		}
		if len(offer) == 0 {
			return nil, cobra.ShellCompDirectiveDefault // a disk image
		}
		return offer, cobra.ShellCompDirectiveNoFileComp
	}
	add("id=", "name in messages and commands")
	add("path=", "device or disk image")
	add("target=", "SCSI target, 0 to 255")
	add("initiator=", "nexus of a disk image")
	add("timeout=", "of one passed-through command")
	add("readonly", "refuse writes")
	add("allow=unsafe", "pass commands that can brick the device for others")
	return offer, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
