package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"vmm/control"
	"vmm/kvm"
	"vmm/scsi/pr"
)

// host is where the examination looks; a test gives it another one.
type host struct {
	kvm  string // path of the device
	root string // of /proc and /sys
	now  time.Time
}

// text is the content of a small file on one line; "" if it cannot be read.
func (h host) text(path string) string {
	b, _ := os.ReadFile(filepath.Join(h.root, path))
	return strings.TrimSpace(string(b))
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

// memory is this host's memory in bytes, from /proc/meminfo.
func (h host) memory() (total, available uint64) {
	for line := range strings.Lines(h.text("proc/meminfo")) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseUint(f[1], 10, 64)
		switch f[0] {
		case "MemTotal:":
			total = n << 10
		case "MemAvailable:":
			available = n << 10
		}
	}
	return total, available
}

func (h host) examineMemory() Finding {
	total, available := h.memory()
	f := Finding{"memory", OK, fmt.Sprintf("%d MiB, %d MiB of it available", total>>20, available>>20), ""}
	if available < 256<<20 {
		f.Verdict, f.Mend = Warn, "a stock kernel wants 256 MiB for itself: free some"
	}
	return f
}

// examineHugePages looks at whether a guest's memory, a memfd, can be in huge
// pages: no more than a matter of speed.
func (h host) examineHugePages() Finding {
	const file = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
	_, mode, _ := strings.Cut(h.text(file), "[")
	mode, _, _ = strings.Cut(mode, "]")
	switch mode {
	case "always", "within_size", "force":
		return Finding{"huge pages", OK, "guest memory is in huge pages where there are any (shmem_enabled is " + mode + ")", ""}
	case "":
		return Finding{"huge pages", OK, "this kernel has none for guest memory", ""}
	}
	return Finding{"huge pages", OK, fmt.Sprintf("guest memory is in small pages (shmem_enabled is %s); larger ones: echo within_size > /%s", mode, file), ""}
}

// Files that a guest's process has open: about 40, two for each vCPU's queue,
// and per LUN a few and up to 16 more without CAP_SYS_RAWIO.
const wantFiles = 1024

func examineLimits() Finding {
	var files, locked unix.Rlimit
	err := errors.Join(unix.Getrlimit(unix.RLIMIT_NOFILE, &files), unix.Getrlimit(unix.RLIMIT_MEMLOCK, &locked))
	if err != nil {
		return Finding{"limits", Warn, err.Error(), ""}
	}
	lockedText := "unlimited"
	if locked.Cur != unix.RLIM_INFINITY {
		lockedText = fmt.Sprintf("%d KiB", locked.Cur>>10)
	}
	f := Finding{"limits", OK, fmt.Sprintf("%d open files; locked memory %s (vmm locks none)", files.Max, lockedText), ""}
	if files.Max < wantFiles { // Go raises the soft limit to the hard one
		f.Verdict, f.Mend = Warn, fmt.Sprintf("a guest with many LUNs needs up to %d: ulimit -Hn, or LimitNOFILE= in its unit", wantFiles)
	}
	return f
}

// examineRunDir looks at where guests' sockets and locks are. dir is empty if
// it cannot be used.
func examineRunDir() (dir control.RunDir, f Finding) {
	dir, err := control.DefaultRunDir()
	if err != nil {
		return "", Finding{"run directory", Fail, err.Error(), "see the message, or set VMM_RUN_DIR to a directory that only this user can write to"}
	}
	if err := writable(string(dir)); err != nil {
		return "", Finding{"run directory", Fail, err.Error(), "set VMM_RUN_DIR to a directory that only this user can write to"}
	}
	return dir, Finding{"run directory", OK, string(dir), ""}
}

func writable(dir string) error {
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("%s is not writable: %w", dir, err)
	}
	return nil
}

// examineState looks at the directory of the journal, without which no guest
// migrates, and at what is still to settle in it.
func examineState(dir string, err error) []Finding {
	const name, mend = "state directory", "without its journal no guest can migrate from or to this host: make it writable, or set VMM_STATE_DIR"
	if err != nil {
		return []Finding{{name, Warn, err.Error(), mend}}
	}
	at := dir // or, if it is still to be made, where
	for {
		if _, err = os.Stat(at); !errors.Is(err, os.ErrNotExist) || at == filepath.Dir(at) {
			break
		}
		at = filepath.Dir(at)
	}
	if err == nil {
		err = writable(at)
	}
	if err != nil {
		return []Finding{{name, Warn, err.Error(), mend}}
	}
	if at != dir {
		return []Finding{{name, OK, dir + ", made when it is needed", ""}}
	}
	found := []Finding{{name, OK, dir, ""}}
	journal, err := pr.OpenJournal(dir)
	if err != nil {
		return append(found, Finding{"journal", Warn, err.Error(), mend})
	}
	entries, err := journal.Entries()
	switch {
	case err != nil:
		return append(found, Finding{"journal", Warn, err.Error(), "what it says of reservations must be settled by hand: vmm pr show"})
	case len(entries) > 0:
		return append(found, Finding{"journal", Warn, fmt.Sprintf("%d registrations of guests on the move are not settled", len(entries)), "unless a migration is under way: vmm pr recover"})
	}
	return append(found, Finding{"journal", OK, "nothing to settle", ""})
}
