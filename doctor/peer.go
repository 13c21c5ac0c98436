package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"vmm/machine"
	"vmm/migration"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/sg"
)

// Survey is what this host tells another one that asks: what a migration to it
// would depend on. program is the version of vmm. No SCSI command is sent.
func Survey(program string) *vmmv1.HostSurvey {
	h := host{root: "/"}
	_, available := h.memory()
	s := &vmmv1.HostSurvey{Program: program, MemoryBytes: available}
	s.Host, _ = os.Hostname() // a name is no condition
	var err, err2 error
	s.Processor, err = machine.Needs(machine.CPUHost)
	s.Luns, err2 = hostLUNs()
	if err := errors.Join(err, err2); err != nil {
		s.Problem = err.Error()
	}
	return s
}

func hostLUNs() (luns []*vmmv1.HostLun, err error) {
	units, err := sg.List()
	for _, u := range units {
		if isDisk(u) && u.Name != "" {
			luns = append(luns, &vmmv1.HostLun{Id: u.Node, Identity: u.Name, BootId: u.BootID, Address: u.Address.String()})
		}
	}
	return luns, err
}

// peerTime is the time that another host has to answer.
const peerTime = 20 * time.Second

// Peer asks the vmm receive that waits at address whether guests of this host
// can migrate there. It waits on, and no guest is touched.
func Peer(ctx context.Context, address migration.Address, s migration.Security, name string) []Finding {
	ctx, cancel := context.WithTimeout(ctx, peerTime)
	defer cancel()
	dial, err := migration.Dialer(address, s, name)
	var there *vmmv1.HostSurvey
	if err == nil {
		there, err = migration.Survey(ctx, dial)
	}
	if err != nil {
		return []Finding{{"peer", Fail, foreign(err.Error()),
			"on the other host must run, with the same TLS authority: vmm receive --listen " + address.String()}}
	}
	here := Survey("")
	needs := map[machine.CPUModel]*vmmv1.Requirements{machine.CPUHost: here.Processor}
	for _, model := range []machine.CPUModel{machine.CPUv3, machine.CPUv2} {
		if r, err := machine.Needs(model); err == nil { // else no guest has that model here
			needs[model] = r
		}
	}
	return compare(here, there, needs)
}

// compare says what stands between two hosts. needs is what this host's
// guests need, by CPU model.
func compare(here, there *vmmv1.HostSurvey, needs map[machine.CPUModel]*vmmv1.Requirements) []Finding {
	found := []Finding{{"peer", OK, fmt.Sprintf("%s waits for a guest, with vmm %s", foreign(there.Host), foreign(there.Program)), ""}}
	const same = "use the same version of vmm on both hosts"
	unknown, err := migration.Speaks(there)
	switch {
	case err != nil:
		return append(found, Finding{"peer version", Fail, err.Error(), same})
	case len(unknown) > 0:
		found = append(found, Finding{"peer version", Warn, "it does not know " + strings.Join(unknown, ", "), same + ", or migrate guests that do not need that"})
	default:
		found = append(found, Finding{"peer version", OK, fmt.Sprintf("both speak version %d of the stream", there.Version), ""})
	}
	if there.Problem != "" {
		found = append(found, Finding{"peer host", Fail, foreign(there.Problem), "vmm doctor on the other host says more"})
	}
	if here.Problem != "" {
		found = append(found, Finding{"peer host", Fail, "this host: " + here.Problem, "see the findings above"})
	}
	if here.Processor != nil && there.Processor != nil {
		found = append(found, compareProcessors(here, there, needs)...)
	}
	found = append(found, Finding{"peer memory", OK, fmt.Sprintf("%d MiB available there", there.MemoryBytes>>20), ""})
	return append(found, compareLUNs(here.Luns, there.Luns)...)
}

func compareProcessors(here, there *vmmv1.HostSurvey, needs map[machine.CPUModel]*vmmv1.Requirements) (found []Finding) {
	const name = "peer processor"
	var can []string
	var lacks []string
	for _, model := range []machine.CPUModel{machine.CPUHost, machine.CPUv3, machine.CPUv2} {
		need := needs[model]
		if need == nil {
			continue
		}
		missing, err := machine.Lacks(need, there.Processor)
		if err != nil {
			return []Finding{{name, Fail, foreign(err.Error()), "use the same version of vmm on both hosts"}}
		}
		if missing == nil {
			can = append(can, "--cpu "+string(model))
		} else if lacks == nil {
			lacks = missing
		}
	}
	lacking := foreign(strings.Join(lacks, ", "))
	switch {
	case lacks == nil:
		found = append(found, Finding{name, OK, "offers all that a guest here has", ""})
	case can == nil:
		found = append(found, Finding{name, Fail, "it lacks " + lacking, "no guest of this host can migrate there"})
	default:
		found = append(found, Finding{name, Warn, "it lacks " + lacking, "only guests that were started with " + strings.Join(can, " or ") + " can migrate there"})
	}
	// And back again.
	if missing, err := machine.Lacks(there.Processor, here.Processor); err == nil && missing != nil {
		found = append(found, Finding{"peer processor", Warn, "this host lacks " + foreign(strings.Join(missing, ", ")),
			"guests that are started there with --cpu host cannot come here: start them with --cpu x86-64-v2"})
	}
	a, b := here.Processor.TscKhz, there.Processor.TscKhz
	if a == b {
		return append(found, Finding{"peer tsc", OK, fmt.Sprintf("both count %d kHz", a), ""})
	}
	return append(found, Finding{"peer tsc", OK,
		fmt.Sprintf("this host's time-stamp counter runs at %d kHz, the other's at %d: no matter for a guest whose clock is kvm-clock, others need TSC scaling there", a, b), ""})
}

func compareLUNs(here, there []*vmmv1.HostLun) (found []Finding) {
	at := map[string][]*vmmv1.HostLun{}
	for _, l := range there {
		at[l.GetIdentity()] = append(at[l.GetIdentity()], l)
	}
	seen := map[string]bool{}
	for _, l := range here {
		name := "peer " + l.Id
		switch others := at[l.Identity]; {
		case seen[l.Identity]:
		case others == nil:
			found = append(found, Finding{name, Warn, l.Identity + " is not there", "a guest that has it cannot migrate: log the other host in to its target, or rescan"})
		case slices.ContainsFunc(others, func(o *vmmv1.HostLun) bool { return o.GetBootId() == l.BootId && o.GetAddress() == l.Address }):
			found = append(found, Finding{name, OK, l.Identity + " is there, on the same nexus: it is this host", ""})
		default:
			nodes := make([]string, len(others))
			for i, o := range others {
				nodes[i] = foreign(o.GetId())
			}
			found = append(found, Finding{name, OK, fmt.Sprintf("%s is there, as %s", l.Identity, strings.Join(nodes, ", ")), ""})
		}
		seen[l.Identity] = true
	}
	if len(here) == 0 {
		return []Finding{{"peer luns", OK, "this host has no LUNs to pass through", ""}}
	}
	return found
}
