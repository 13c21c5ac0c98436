package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// diskTime is the time that disks have to answer, be it through a guest's
// process or not.
const diskTime = 15 * time.Second

func newPRCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pr",
		Short: "Look at, and repair, persistent reservations",
		Long: `Shows who is registered with a disk and who holds its reservation, removes what a
guest has left behind, and settles what a crash has left of a migration.`,
		Example: "  vmm pr show web1\n  vmm pr recover",
		Args: func(_ *cobra.Command, args []string) error {
			return usageError{errors.New("pr wants to know what to do, as in: vmm pr show /dev/sg2")}
		},
		RunE: func(*cobra.Command, []string) error { return nil },
	}
	c.AddCommand(newPRShowCommand(), newPRUnregisterCommand(), newPRRecoverCommand())
	return c
}

func newPRShowCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:   "show PATH|NAME",
		Short: "Show a disk's reservation and who is registered",
		Long: `Shows the persistent reservation and the registrations of the disk at PATH, or of
every disk of the running guest NAME. A disk that a guest has is asked through that
guest's process: the guest loses no unit attention. PATH has a slash in it, or is no
running guest's name.

"this host" marks the registration of this host's nexus. A disk that no guest has
is asked with a REGISTER that does nothing whether this host is registered at all;
where several are, only a guest's process knows which is its own, and until then
the mark is a question mark.`,
		Example: "  vmm pr show /dev/sg2\n  vmm pr show ./disk.img -o json\n  vmm pr show web1",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{errors.New("show wants one disk's path or one guest's name, as in: vmm pr show /dev/sg2")}
			}
			return nil
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return runningNames(typed), cobra.ShellCompDirectiveDefault
		},
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), diskTime)
			defer cancel()
			guest, luns, err := reservationsOf(ctx, args[0])
			if err != nil {
				return err
			}
			if format.json() {
				list := []json.RawMessage{}
				for _, l := range luns {
					b, err := control.MarshalJSON(l)
					if err != nil {
						return err
					}
					list = append(list, b)
				}
				return printJSON(c.OutOrStdout(), map[string]any{"guest": guest, "luns": list})
			}
			for i, l := range luns {
				if i > 0 {
					fmt.Fprintln(c.OutOrStdout())
				}
				if err := printReservations(c.OutOrStdout(), guest, l); err != nil {
					return err
				}
			}
			return nil
		},
	}
	format.addFlag(c)
	return c
}

// reservationsOf reads what what names: a guest's disks, or one disk, through
// the guest that has it if one has.
func reservationsOf(ctx context.Context, what string) (guest string, luns []*vmmv1.Lun, err error) {
	dir, err := control.DefaultRunDir()
	if err != nil {
		return "", nil, err
	}
	_, statErr := os.Stat(what)
	var client *control.Client
	id := ""
	if !strings.Contains(what, "/") && control.ValidName(what) == nil {
		client, err = dir.Dial(what)
		switch {
		case errors.Is(err, control.ErrNotRunning) && statErr == nil:
			err = nil // a file then
		case errors.Is(err, control.ErrNotRunning):
			return "", nil, fmt.Errorf("%s is neither a guest that runs (vmm ls lists them) nor a disk: give a /dev/sgN, a SCSI block device or a disk image", what)
		}
		if err != nil {
			return "", nil, err
		}
	}
	if client == nil {
		if client, id, err = dir.User(ctx, what); err != nil {
			return "", nil, err
		}
	}
	if client == nil {
		l, err := dir.Show(ctx, what)
		return "", []*vmmv1.Lun{l}, err
	}
	defer client.Close()
	r, err := ask(ctx, client, diskTime, client.Luns, &vmmv1.LunsRequest{Id: id})
	if err != nil {
		return "", nil, err
	}
	return client.Name(), r.Luns, nil
}

func printReservations(out io.Writer, guest string, l *vmmv1.Lun) error {
	name := l.Path
	if l.Identity != "" {
		name += " (" + l.Identity + ")"
	}
	if guest != "" {
		name += fmt.Sprintf(", LUN %s of guest %s", l.Id, guest)
	}
	fmt.Fprintln(out, name)
	r := l.Reservations
	switch {
	case l.Error != "":
		_, err := fmt.Fprintf(out, "  could not be asked: %s\n", l.Error)
		return err
	case r == nil || !r.Supported:
		_, err := fmt.Fprintln(out, "  has no persistent reservations")
		return err
	}
	held := "none"
	switch {
	case r.Type != 0 && r.HolderKey == "":
		held = fmt.Sprintf("%s (type %d), held by every registrant", r.TypeName, r.Type)
	case r.Type != 0:
		held = fmt.Sprintf("%s (type %d), held with key %s", r.TypeName, r.Type, r.HolderKey)
	}
	yes := map[bool]string{true: "yes", false: "no"}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "  reservation\t%s\n  generation\t%d\n  APTPL\t%s\n", held, r.Generation, yes[r.Aptpl])
	if g := r.Guest; g != nil {
		what := "not registered"
		if g.Key != "" {
			what = "registered with key " + g.Key
		}
		if g.Spc2 {
			what += ", has reserved the disk with RESERVE of SPC-2"
		}
		if g.Doubt {
			what += "; in doubt, the disk knows better"
		}
		fmt.Fprintf(t, "  guest\t%s\n", what)
	}
	if len(r.Registrants) == 0 {
		fmt.Fprint(t, "  registrants\tnone\n")
		return t.Flush()
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprint(t, "  KEY\tHOLDS\tTHIS HOST\tNEXUS\n")
	for _, one := range r.Registrants {
		own := yes[one.Own]
		if r.OwnUnknown && !one.Own {
			own = "?"
		}
		nexus := "not told by the target"
		if r.FullStatus {
			nexus = fmt.Sprintf("%s to target port %d", one.Initiator, one.TargetPort)
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\n", one.Key, yes[one.Holder], own, nexus)
	}
	return t.Flush()
}

func newPRUnregisterCommand() *cobra.Command {
	var (
		format    outputFormat
		keyText   string
		initiator string
		release   bool
		yes       bool
	)
	c := &cobra.Command{
		Use:   "unregister PATH --key KEY",
		Short: "Remove a registration that a guest has left on this host's nexus",
		Long: `Removes the registration of this host's nexus with KEY from the disk at PATH, which
no guest may have at the time. It is what is left when a guest was killed and does not
come back to this host. Registrations of other hosts cannot be removed like this: the
disk refuses.

If the disk's reservation rests on the registration it ends with it; that needs
--release as well. A disk image's nexus is a name: --initiator, as pr show has it.`,
		Example: "  vmm pr unregister /dev/sg2 --key 0x123abc\n  vmm pr unregister disk.img --initiator host1:web1 --key 0x123abc --yes",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{errors.New("unregister wants one disk's path, as in: vmm pr unregister /dev/sg2 --key 0x123abc")}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			key, err := strconv.ParseUint(keyText, 0, 64)
			if err != nil || key == 0 {
				return usageError{fmt.Errorf("--key: %q: give a reservation key other than 0, as in 0x123abc", keyText)}
			}
			dir, err := control.DefaultRunDir()
			if err != nil {
				return err
			}
			if client, _, err := dir.User(c.Context(), args[0]); err != nil {
				return err
			} else if client != nil {
				client.Close()
				return fmt.Errorf("%s: guest %s has it: unregister inside the guest, or stop the guest first", args[0], client.Name())
			}
			disk, err := dir.OpenDisk(c.Context(), args[0], initiator, "pr unregister")
			if err != nil {
				return err
			}
			defer disk.Close()
			return unregister(c, disk, args[0], pr.Key(key), release, yes, format)
		},
	}
	c.Flags().StringVar(&keyText, "key", "", "the reservation key to remove")
	c.Flags().StringVar(&initiator, "initiator", "", "the nexus of a disk image; default: this host's name")
	c.Flags().BoolVar(&release, "release", false, "also where the disk's reservation ends by it")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	format.addFlag(c)
	return c
}

func unregister(c *cobra.Command, disk *control.Disk, path string, key pr.Key, release, yes bool, format outputFormat) error {
	ctx, cancel := context.WithTimeout(c.Context(), diskTime)
	defer cancel()
	v, err := disk.Port().View(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	holds, count := false, 0
	for _, r := range v.Registrations {
		if r.Key == key {
			count++
		}
	}
	holds = v.Held.Type.Single() && v.Held.Key == key || v.Held.Type.AllRegistrants() && len(v.Registrations) == 1
	switch {
	case count == 0:
		return fmt.Errorf("%s: nobody is registered with key %v (vmm pr show %[1]s)", path, key)
	case holds && !release:
		return fmt.Errorf("%s: the disk's %v reservation is held with key %v and may end with this registration, on which other nodes may rely: if it must go, add --release", path, v.Held.Type, key)
	}
	if !yes {
		if _, terminal := isTerminal(c.InOrStdin()); !terminal {
			return usageError{errors.New("nobody is there to confirm: add --yes")}
		}
		fmt.Fprintf(c.ErrOrStderr(), "Remove this host's registration with key %v from %s (%s)? Type yes: ", key, path, disk.Name)
		line, _ := bufio.NewReader(c.InOrStdin()).ReadString('\n')
		if strings.TrimSpace(line) != "yes" {
			return errors.New("not confirmed: nothing was changed")
		}
	}
	ctx, cancel = context.WithTimeout(c.Context(), diskTime) // a person has thought in between
	defer cancel()
	done, err := disk.Port().Unregister(ctx, v, key)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case !done:
		return fmt.Errorf("%s: this host's nexus is not registered with key %v: nothing was changed; the host that is can remove it", path, key)
	}
	if format.json() {
		return printJSON(c.OutOrStdout(), struct {
			Path    string `json:"path"`
			Key     string `json:"key"`
			Removed bool   `json:"removed"`
		}{path, key.String(), true})
	}
	_, err = fmt.Fprintf(c.OutOrStdout(), "%s: key %v of this host is removed\n", path, key)
	return err
}

func newPRRecoverCommand() *cobra.Command {
	var format outputFormat
	c := &cobra.Command{
		Use:   "recover",
		Short: "Settle what a crash has left of guests on the move",
		Long: `Settles this host's journal: a registration that a migration has made or left here,
and whose guest runs elsewhere, is removed, unless a reservation rests on it. What
cannot be settled yet stays in the journal, and the exit status is 1. The journal is in
$VMM_STATE_DIR, else /var/lib/vmm, or for a user in the XDG state directory.`,
		Example: "  vmm pr recover\n  vmm pr recover -o json",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			dir, err := control.DefaultRunDir()
			if err != nil {
				return err
			}
			state, err := control.StateDir()
			if err != nil {
				return err
			}
			settled, err := dir.Recover(c.Context(), state)
			out := c.OutOrStdout()
			open := false
			type entry struct {
				LUN     string `json:"lun"`
				Path    string `json:"path"`
				Settled bool   `json:"settled"`
				Outcome string `json:"outcome"`
			}
			list := []entry{}
			for _, s := range settled {
				open = open || !s.Done
				list = append(list, entry{s.LUN, s.Path, s.Done, s.Outcome})
				if !format.json() {
					fmt.Fprintln(out, oneLine(errors.New(s.Outcome)))
				}
			}
			switch {
			case format.json():
				err = errors.Join(err, printJSON(out, map[string]any{"entries": list}))
			case err == nil && len(settled) == 0:
				fmt.Fprintln(out, "nothing to settle")
			}
			if err == nil && open {
				return errSilent
			}
			return err
		},
	}
	format.addFlag(c)
	return c
}
