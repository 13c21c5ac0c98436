package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"vmm/control"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
	"vmm/scsi/sg"
)

// lunTime is the time that a logical unit has to say what it can.
const lunTime = 15 * time.Second

// isDisk says whether a logical unit is a disk (SPC-5 table 197).
func isDisk(u sg.Unit) bool { return u.Type == "0" }

// examineLUNs looks at what --lun can pass through.
func (h host) examineLUNs(ctx context.Context, run control.RunDir) []Finding {
	units, err := sg.List()
	if err != nil {
		return []Finding{{"scsi", Warn, err.Error(), ""}}
	}
	var disks []sg.Unit
	for _, u := range units {
		if isDisk(u) {
			disks = append(disks, u)
		}
	}
	if len(disks) == 0 {
		return []Finding{{"scsi", Warn, fmt.Sprintf("none of %d SCSI devices is a disk: software disks work, there is nothing to pass through", len(units)),
			"load the module sg (modprobe sg), and log in to or scan for the LUNs: docs/luns.md"}}
	}
	found := make([]Finding, len(disks))
	var asked sync.WaitGroup
	for i, u := range disks {
		asked.Go(func() {
			found[i] = examineLUN(ctx, run, u)
			found[i].Name = u.Node
			found[i].Detail = called(u) + ": " + found[i].Detail
		})
	}
	asked.Wait()
	return append(found, examinePaths(disks)...)
}

// called is a unit's name for people.
func called(u sg.Unit) string {
	if u.Name == "" {
		return foreign(u.Vendor + " " + u.Product)
	}
	return foreign(u.Name)
}

// examinePaths looks for logical units with more than one way to them.
func examinePaths(disks []sg.Unit) (found []Finding) {
	nodes := map[string][]string{}
	for _, u := range disks {
		if u.Name != "" {
			nodes[u.Name] = append(nodes[u.Name], filepath.Base(u.Node))
		}
	}
	for _, u := range disks {
		if list := nodes[u.Name]; len(list) > 1 {
			delete(nodes, u.Name)
			found = append(found, Finding{"paths", OK,
				fmt.Sprintf("%s is reached by %s: a guest gets one of them, and its reservations are that path's alone (docs/luns.md)", foreign(u.Name), strings.Join(list, ", ")), ""})
		}
	}
	return found
}

// examineLUN says what a guest can be given of u. Name and identity are the
// caller's to fill in.
func examineLUN(ctx context.Context, run control.RunDir, u sg.Unit) Finding {
	if u.Name == "" {
		return Finding{Verdict: Warn, Detail: "it has no designator that names it (VPD page 83h)",
			Mend: "another host cannot find it: name the device there with vmm receive --lun id=NAME,path=PATH"}
	}
	if err := unix.Access(u.Node, unix.R_OK|unix.W_OK); err != nil {
		return Finding{Verdict: Warn, Detail: fmt.Sprintf("not permitted: %v", err), Mend: "give a group access with a udev rule, as contrib/systemd/60-vmm.rules does, or run as root"}
	}
	if run == "" {
		return Finding{Verdict: OK, Detail: "not asked, for want of a run directory"}
	}
	ctx, cancel := context.WithTimeout(ctx, lunTime)
	defer cancel()
	if client, id, err := run.User(ctx, u.Node); err == nil && client != nil {
		defer client.Close()
		return ofGuest(ctx, client, id)
	}
	d, err := run.OpenDisk(ctx, u.Node, "", "doctor")
	switch {
	case errors.Is(err, sg.ErrBusy):
		_, why, _ := strings.Cut(err.Error(), u.Node+": ")
		return Finding{Verdict: OK, Detail: "no guest can have it, it is " + foreign(why)}
	case errors.Is(err, os.ErrPermission):
		return Finding{Verdict: Warn, Detail: foreign(err.Error()), Mend: "give a group access to the block device as well, or run as root"}
	case err != nil:
		return Finding{Verdict: Warn, Detail: foreign(err.Error())}
	}
	defer d.Close()
	caps, err := d.Port().Capabilities(ctx)
	if err == nil || pr.Unsupported(err) {
		var f pr.Preflight
		if f, err = d.Port().Probe(ctx); err == nil {
			return reservations(f, caps)
		}
	}
	if pr.Unsupported(err) {
		return Finding{Verdict: Warn, Detail: "it has no persistent reservations", Mend: "no cluster can fence with it; enable them at the target, if it has them"}
	}
	return Finding{Verdict: Warn, Detail: "its reservations could not be read: " + foreign(err.Error()), Mend: "see whether the host still reaches it: sg_turs " + u.Node}
}

// ofGuest says what the guest that has a LUN knows of it.
func ofGuest(ctx context.Context, client *control.Client, id string) Finding {
	with := fmt.Sprintf("guest %s has it as %s", client.Name(), id)
	r, err := client.Luns(ctx, connect.NewRequest(&vmmv1.LunsRequest{Id: id}))
	switch {
	case err != nil:
		return Finding{Verdict: Warn, Detail: with + "; asking it: " + foreign(client.Explain(err).Error())}
	case len(r.Msg.Luns) != 1 || r.Msg.Luns[0].Error != "":
		return Finding{Verdict: Warn, Detail: with + "; it does not say what its reservations are", Mend: "vmm pr show " + client.Name()}
	}
	s := r.Msg.Luns[0].Reservations
	if !s.GetSupported() {
		return Finding{Verdict: Warn, Detail: with + "; it has no persistent reservations"}
	}
	return Finding{Verdict: OK, Detail: fmt.Sprintf("%s; %s", with, held(len(s.Registrants), s.TypeName))}
}

func held(registered int, typeName string) string {
	if typeName == "" {
		return fmt.Sprintf("%d registered, not reserved", registered)
	}
	return fmt.Sprintf("%d registered, reserved: %s", registered, typeName)
}

// reservations says what a logical unit's persistent reservations can do for
// a guest that migrates.
func reservations(f pr.Preflight, caps pr.Capabilities) Finding {
	var can, lacks []string
	for _, c := range []struct {
		have bool
		name string
	}{
		{f.FullStatus, "READ FULL STATUS"},
		{f.Move, "REGISTER AND MOVE"},
		{caps.Persist, "APTPL"},
	} {
		if c.have {
			can = append(can, c.name)
		} else {
			lacks = append(lacks, c.name)
		}
	}
	detail := "reservations"
	if can != nil {
		detail += " with " + strings.Join(can, ", ")
	}
	if lacks != nil {
		detail += "; without " + strings.Join(lacks, ", ")
	}
	missing := []string{}
	if caps.TypesValid {
		for _, t := range pr.Types {
			has := false
			for _, c := range caps.Types {
				has = has || c == t
			}
			if !has {
				missing = append(missing, fmt.Sprint(t))
			}
		}
		if len(missing) == 0 {
			detail += "; all types"
		}
	}
	holder := ""
	if f.Held.Type != pr.None {
		holder = f.Held.Type.String()
	}
	detail += "; " + held(len(f.Keys.Keys), holder)
	switch {
	case len(missing) > 0:
		return Finding{Verdict: Warn, Detail: detail, Mend: "the target has no " + strings.Join(missing, ", ") + " reservation: see that the guest's cluster uses another type"}
	case !f.FullStatus:
		return Finding{Verdict: Warn, Detail: detail, Mend: "a guest that shares its key with another node cannot migrate, and a snapshot comes back fenced: docs/reservations.md"}
	}
	return Finding{Verdict: OK, Detail: detail}
}
