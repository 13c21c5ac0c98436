package machine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"vmm/kvm"
)

// Verdict grades a Finding.
type Verdict string

const (
	OK   Verdict = "ok"
	Warn Verdict = "warn" // guests run, but something a user may want does not
	Fail Verdict = "fail" // guests cannot run here
)

// Finding is one thing that Examine looked at.
type Finding struct {
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
	Mend    string  `json:"mend,omitempty"` // what the user can do
}

// host is where Examine looks; a test gives it another root.
type host struct {
	kvm  string // path of the device
	root string // of /dev and /sys
}

// Examine says whether this host can run guests: it can if no finding has the
// verdict Fail.
func Examine() []Finding { return host{kvm: "/dev/kvm", root: "/"}.examine() }

func (h host) examine() []Finding {
	return append(h.examineKVM(), h.examineMemory(), h.examineSCSI())
}

func (h host) examineKVM() []Finding {
	const mendModule = "load kvm_intel or kvm_amd (virtualization must be enabled in the firmware, or nested virtualization in the hypervisor below), or run guests in the lab: make lab"
	system, err := kvm.Open(h.kvm)
	if err != nil {
		mend := mendModule
		if errors.Is(err, os.ErrPermission) {
			mend = "join the group that owns it, commonly kvm: usermod -aG kvm USER, then log in again"
		}
		return []Finding{{"kvm", Fail, err.Error(), mend}}
	}
	defer system.Close()
	found := []Finding{{"kvm", OK, h.kvm + " is there and permitted", ""}}

	if err := system.Require(kvm.Required...); err != nil {
		return append(found, Finding{"capabilities", Fail, err.Error(), "use a newer kernel; Linux 5.10 and later have all of them"})
	}
	found = append(found, Finding{"capabilities", OK, fmt.Sprintf("all %d that are needed", len(kvm.Required)), ""})

	speed, err := system.ProbeExecution()
	switch {
	case err != nil:
		found = append(found, Finding{"native execution", Fail, err.Error(), "a tiny guest could not be run; see the message"})
	case !speed.Native:
		found = append(found, Finding{"native execution", Fail, speed.String(),
			"this KVM interprets guest kernel code, a stock kernel never finishes booting on it; use a host with hardware virtualization, or the lab: make lab"})
	default:
		found = append(found, Finding{"native execution", OK, speed.String(), ""})
	}
	return found
}

func (h host) examineMemory() Finding {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return Finding{"memory", Warn, err.Error(), ""}
	}
	unit := uint64(info.Unit)
	total, free := uint64(info.Totalram)*unit, (uint64(info.Freeram)+uint64(info.Bufferram))*unit
	f := Finding{"memory", OK, fmt.Sprintf("%d MiB, %d MiB of it free", total>>20, free>>20), ""}
	if total < 512<<20 {
		f.Verdict, f.Mend = Warn, "a stock kernel wants 256 MiB for itself"
	}
	return f
}

// examineSCSI looks at what --lun can pass through.
func (h host) examineSCSI() Finding {
	nodes, _ := filepath.Glob(filepath.Join(h.root, "dev/sg[0-9]*"))
	if len(nodes) == 0 {
		return Finding{"scsi", Warn, "no /dev/sgN: software disks work, there is nothing to pass through",
			"load the module sg, and log in to or scan for the LUNs"}
	}
	sort.Strings(nodes)
	var open, closed []string
	for _, node := range nodes {
		f, err := os.OpenFile(node, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			closed = append(closed, filepath.Base(node))
			continue
		}
		f.Close()
		open = append(open, filepath.Base(node))
	}
	if len(closed) > 0 {
		return Finding{"scsi", Warn, fmt.Sprintf("no permission for %s (%d others can be opened)", strings.Join(closed, ", "), len(open)),
			"give a group access with a udev rule, or run as root"}
	}
	return Finding{"scsi", OK, "can open " + strings.Join(open, ", "), ""}
}

// CanRun says whether no finding rules out running guests.
func CanRun(found []Finding) bool {
	for _, f := range found {
		if f.Verdict == Fail {
			return false
		}
	}
	return true
}
