package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"vmm/control"
	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
)

// plugTime is what a guest's process may need beyond the time that a command
// gives it: to settle the journal, and to meet a new disk.
const plugTime = 45 * time.Second

func newLunCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "lun",
		Short: "List the LUNs of a running guest, attach and detach them",
		Long: `Says which LUNs a running guest has, gives it one more, or takes one away: the guest's
driver is told, as when a disk is plugged in or pulled.`,
		Example: "  vmm lun list web1\n  vmm lun attach web1 id=data2,path=/dev/sg3",
		Args: func(_ *cobra.Command, args []string) error {
			return usageError{errors.New("lun wants to know what to do, as in: vmm lun list web1")}
		},
		RunE: func(*cobra.Command, []string) error { return nil },
	}
	c.AddCommand(newLunListCommand(), newLunAttachCommand(), newLunDetachCommand())
	return c
}

func newLunListCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:               "list NAME",
		Aliases:           []string{"ls"},
		Short:             "List a guest's LUNs and what is reserved on them",
		Long:              "Lists the LUNs of the running guest NAME. The disks are asked for their reservations\nthrough the guest's process: the guest loses no unit attention. vmm pr show NAME tells more.",
		Example:           "  vmm lun list web1\n  vmm lun list web1 -o json",
		Args:              oneGuest,
		ValidArgsFunction: completeGuest,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := dial(args[0])
			if err != nil {
				return err
			}
			defer client.Close()
			r, err := ask(c.Context(), client, diskTime, client.Luns, &vmmv1.LunsRequest{})
			if err != nil {
				return err
			}
			if format.json() {
				return printMessage(c.OutOrStdout(), r)
			}
			t := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "ID\tTARGET\tKIND\tPATH\tIDENTITY\tRESERVATION")
			for _, l := range r.Luns {
				kind := l.Kind
				if l.Readonly {
					kind += ", read only"
				}
				fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\n", l.Id, l.Target, kind, l.Path, l.Identity, reservationText(l))
			}
			return t.Flush()
		},
	}
	format.addFlag(c)
	return c
}

// reservationText is a LUN's reservation and the guest's part in it, in a few
// words.
func reservationText(l *vmmv1.Lun) string {
	r := l.Reservations
	switch {
	case l.Error != "":
		return "could not be asked: " + oneLine(errors.New(l.Error))
	case r == nil || !r.Supported:
		return "not supported"
	}
	text, own := "none", (*vmmv1.Registrant)(nil)
	if r.Type != 0 {
		text = r.TypeName
	}
	for _, one := range r.Registrants {
		if one.Own {
			own = one
		}
	}
	switch {
	case own != nil && own.Holder:
		return text + ", held by the guest"
	case own != nil:
		return text + "; the guest is registered"
	case r.OwnUnknown:
		return text + "; the guest may be registered"
	case len(r.Registrants) > 0:
		return fmt.Sprintf("%s; others registered: %d", text, len(r.Registrants))
	}
	return text
}

func newLunAttachCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:   "attach NAME LUN",
		Short: "Give a running guest one more LUN",
		Long: `Attaches a LUN to the running guest NAME, whose driver is told and finds the disk.
A LUN is what vmm run takes as --lun:
  [id=NAME,]path=PATH[,target=N][,initiator=NAME][,timeout=30s][,readonly][,allow=unsafe]
Without target= it is the lowest target that the guest has not had since it booted. A
LUN that cannot be attached changes nothing. A guest that migrates takes it along.`,
		Example: "  vmm lun attach web1 id=data2,path=/dev/sg3\n  vmm lun attach web1 path=./scratch.img,readonly",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{errors.New("attach wants a guest and a LUN, as in: vmm lun attach web1 path=/dev/sg3")}
			}
			return validName(args[0])
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return completeLUN(c, args, typed)
			}
			return completeGuest(c, args, typed)
		},
		RunE: func(c *cobra.Command, args []string) error {
			l, err := machine.ParseLUN(args[1])
			if err != nil {
				return usageError{err}
			}
			// The guest's process may stand in another directory.
			path, err := filepath.Abs(l.Path)
			if err != nil {
				return err
			}
			in := &vmmv1.AttachLunRequest{
				Id: l.ID, Path: path, Initiator: l.Initiator, TimeoutMs: uint64(l.Timeout.Milliseconds()), Readonly: l.ReadOnly, AllowUnsafe: l.Unsafe,
			}
			if l.Target >= 0 {
				in.Target = new(uint32(l.Target))
			}
			client, err := dial(args[0])
			if err != nil {
				return err
			}
			defer client.Close()
			r, err := ask(c.Context(), client, plugTime, client.AttachLun, in)
			if err != nil {
				return err
			}
			if format.json() {
				return printMessage(c.OutOrStdout(), r)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "LUN %s is attached: target %d, %s\n", r.Lun.Id, r.Lun.Target, r.Lun.Identity)
			return err
		},
	}
	format.addFlag(c)
	return c
}

func newLunDetachCommand() *cobra.Command {
	var (
		format  outputFormat
		force   bool
		timeout time.Duration
	)
	c := &cobra.Command{
		Use:   "detach NAME ID",
		Short: "Take a LUN away from a running guest",
		Long: `Detaches the LUN called ID from the running guest NAME. Unmount it in the guest first:
to the guest the disk is unplugged, and what it had not written is lost.

Commands in flight come back first, within --timeout. Then the disk is asked whether
the guest is registered with it or has reserved it. If so the LUN stays: detached, it
would leave a registration on this host's nexus that keeps other nodes out, and that
whoever gets the disk on this host next inherits. Let the guest's cluster software
unregister (fence_scsi: stop the node; by hand: sg_persist), or use --force and remove
it afterwards with vmm pr unregister.`,
		Example: "  vmm lun detach web1 data2\n  vmm lun detach web1 data2 --force --timeout 3s",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{errors.New("detach wants a guest and the id of one of its LUNs; vmm lun list NAME shows them")}
			}
			if timeout < 0 {
				return usageError{fmt.Errorf("--timeout: %v: give a time of 0 or more", timeout)}
			}
			return validName(args[0])
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return lunIDs(c, args[0], typed), cobra.ShellCompDirectiveNoFileComp
			}
			return completeGuest(c, args, typed)
		},
		RunE: func(c *cobra.Command, args []string) error {
			client, err := dial(args[0])
			if err != nil {
				return err
			}
			defer client.Close()
			in := &vmmv1.DetachLunRequest{Id: args[1], Force: force, TimeoutMs: new(uint32(min(timeout.Milliseconds(), 1<<31)))}
			r, err := ask(c.Context(), client, plugTime+timeout, client.DetachLun, in)
			if err != nil {
				return err
			}
			if format.json() {
				return printMessage(c.OutOrStdout(), r)
			}
			fmt.Fprintf(c.OutOrStdout(), "LUN %s is detached\n", args[1])
			for _, left := range r.Left {
				fmt.Fprintf(c.OutOrStdout(), "  left behind: %s\n", left)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "also from a guest that is registered, has commands in flight, or whose disk does not answer")
	c.Flags().DurationVar(&timeout, "timeout", machine.DetachTimeout, "time for commands in flight to come back and the disk to answer")
	format.addFlag(c)
	return c
}

// lunIDs are the names of a guest's LUNs that begin with prefix.
func lunIDs(c *cobra.Command, guest, prefix string) []string {
	if control.ValidName(guest) != nil {
		return nil
	}
	client, err := dial(guest)
	if err != nil {
		return nil
	}
	defer client.Close()
	s, err := ask(c.Context(), client, askTime, client.Status, &vmmv1.StatusRequest{})
	if err != nil {
		return nil
	}
	var ids []string
	for _, l := range s.Luns {
		if strings.HasPrefix(l.Id, prefix) {
			ids = append(ids, l.Id)
		}
	}
	return ids
}
