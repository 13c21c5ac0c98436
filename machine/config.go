package machine

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"vmm/memory"
	"vmm/migration"
	"vmm/scsi/pr"
)

const (
	// MaxCPUs is the largest number of vCPUs.
	MaxCPUs = 8
	// MaxTargets is the number of SCSI targets that the controller addresses:
	// one byte of the flat address (virtio 1.3, 5.6.6.1).
	MaxTargets = 256
)

// Config describes a machine. New checks it.
type Config struct {
	Name    string
	CPUs    int
	Memory  uint64 // bytes
	CPU     CPUModel
	Kernel  string // path of a bzImage or an ELF kernel with a PVH note
	Initrd  string // path; empty for none
	Cmdline string
	LUNs    []LUNConfig

	// NoReboot ends the machine where the guest asks for a reset.
	NoReboot bool

	// Console takes what the guest writes to its first serial port; nil: only
	// the machine's own Console does. A slow one slows the guest's output, never
	// its vCPUs.
	Console io.Writer
	// Serial is the second serial port, nil for nobody there. The machine
	// closes it.
	Serial io.ReadWriteCloser
	// RunDir holds the locks of LUNs in use, shared by all machines of this
	// user.
	RunDir string
	// Warn is told, in one line, what the user should know while the guest
	// runs.
	Warn func(string)
}

// LUNConfig describes one logical unit of the guest.
type LUNConfig struct {
	ID       string        // the name the user gives it; default: lunN, N being the target
	Path     string        // /dev/sgN or a SCSI block device: passed through; a regular file: software disk
	Identity string        // what the unit must call itself; empty: anything. Without a Path it is looked for
	Target   int           // the guest's address, LUN 0 of this target; -1: the position in the list
	Timeout  time.Duration // of one passed-through command
	ReadOnly bool
	Unsafe   bool // let commands pass that can brick the device for others

	// Initiator names the nexus of a software disk, to which a registration
	// belongs; default: HOST:NAME of host and machine.
	Initiator string

	// Offered is what another process of this host says, whose guest runs there
	// and is to run here; nil: there is none.
	Offered *migration.OfferedLUN
}

// DefaultTimeout is the time one passed-through command may take.
const DefaultTimeout = 30 * time.Second

// Bounds of that time.
const (
	minTimeout = time.Second
	maxTimeout = 24 * time.Hour
)

// ParseLUN reads [id=NAME,]path=PATH[,target=N][,initiator=NAME][,timeout=30s][,readonly][,allow=unsafe].
// In values a comma is written twice.
func ParseLUN(s string) (LUNConfig, error) {
	l := LUNConfig{Target: -1, Timeout: DefaultTimeout}
	fail := func(format string, args ...any) (LUNConfig, error) {
		return LUNConfig{}, fmt.Errorf("LUN %q: %s", s, fmt.Sprintf(format, args...))
	}
	seen := map[string]bool{}
	for _, field := range splitFields(s) {
		key, value, hasValue := strings.Cut(field, "=")
		if seen[key] {
			return fail("%s is given twice", key)
		}
		seen[key] = true
		if wants := key != "readonly"; wants && (!hasValue || value == "") {
			if !hasValue && !knownLUNKey(key) {
				return fail("unknown option %q; a LUN is [id=NAME,]path=PATH[,target=N][,initiator=NAME][,timeout=30s][,readonly][,allow=unsafe]", key)
			}
			return fail("%s needs a value, as in %s=...", key, key)
		} else if !wants && hasValue {
			return fail("%s takes no value", key)
		}
		switch key {
		case "id":
			l.ID = value
		case "path":
			l.Path = value
		case "readonly":
			l.ReadOnly = true
		case "target":
			n, err := strconv.Atoi(value)
			if err != nil || n < 0 {
				return fail("target %s: give a number from 0 to %d", value, MaxTargets-1)
			}
			l.Target = n
		case "initiator":
			l.Initiator = value
		case "timeout":
			d, err := time.ParseDuration(value)
			if err != nil {
				return fail("timeout %s: give a time from 1s to 24h", value)
			}
			l.Timeout = d
		case "allow":
			if value != "unsafe" {
				return fail("allow=%s: only allow=unsafe is known", value)
			}
			l.Unsafe = true
		default:
			return fail("unknown option %q; a LUN is [id=NAME,]path=PATH[,target=N][,initiator=NAME][,timeout=30s][,readonly][,allow=unsafe]", key)
		}
	}
	if err := l.Check(); err != nil {
		return fail("%v", err)
	}
	return l, nil
}

// Check refuses values that no logical unit can have. Whether there is a disk
// is found out when it is opened.
func (l *LUNConfig) Check() error {
	switch {
	case !utf8.ValidString(l.ID):
		return fmt.Errorf("id %q: it must be UTF-8", l.ID)
	case l.Path == "":
		return errors.New("path=PATH is missing")
	case l.Target < -1 || l.Target >= MaxTargets:
		return fmt.Errorf("target %d: give a number from 0 to %d", l.Target, MaxTargets-1)
	case l.Timeout < minTimeout || l.Timeout > maxTimeout:
		return fmt.Errorf("timeout %v: give a time from 1s to 24h", l.Timeout)
	}
	if l.Initiator != "" {
		if _, err := pr.NamedNexus(l.Initiator); err != nil {
			return err
		}
	}
	return nil
}

func knownLUNKey(key string) bool {
	switch key {
	case "id", "path", "target", "initiator", "timeout", "allow":
		return true
	}
	return false
}

// splitFields splits at single commas; a double comma is a comma.
func splitFields(s string) []string {
	const comma = "\x00"
	fields := strings.Split(strings.ReplaceAll(s, ",,", comma), ",")
	for i := range fields {
		fields[i] = strings.ReplaceAll(fields[i], comma, ",")
	}
	return fields
}

// ParseSize reads a number of bytes with an optional suffix K, M, G or T
// (powers of 1024).
func ParseSize(s string) (uint64, error) {
	digits, shift := s, 0
	if n := len(s); n > 0 {
		if i := strings.IndexByte("KMGT", s[n-1]&^0x20); i >= 0 {
			digits, shift = s[:n-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || n > ^uint64(0)>>shift {
		return 0, fmt.Errorf("size %q: give a number with an optional K, M, G or T, as in 512M", s)
	}
	return n << shift, nil
}

// normalize fills in defaults and refuses what cannot be built.
func (c *Config) normalize() error {
	if c.CPUs < 1 || c.CPUs > MaxCPUs {
		return fmt.Errorf("%d vCPUs: give 1 to %d", c.CPUs, MaxCPUs)
	}
	if c.Memory%memory.PageSize != 0 {
		return fmt.Errorf("memory of %d bytes is no multiple of the page size %d", c.Memory, memory.PageSize)
	}
	if c.Memory < minMemory {
		return fmt.Errorf("memory of %d MiB is too little: give at least %d MiB", c.Memory>>20, minMemory>>20)
	}
	model, err := ParseCPUModel(string(c.CPU))
	if err != nil {
		return err
	}
	c.CPU = model
	if c.Warn == nil {
		c.Warn = func(string) {}
	}
	targets, ids := map[int]string{}, map[string]bool{}
	for i := range c.LUNs {
		l := &c.LUNs[i]
		if l.Target < 0 {
			l.Target = i
		}
		if l.Target >= MaxTargets {
			return fmt.Errorf("LUN %s: target %d: the controller has targets 0 to %d", l.Path, l.Target, MaxTargets-1)
		}
		if l.ID == "" {
			l.ID = fmt.Sprintf("lun%d", l.Target)
		}
		if other, taken := targets[l.Target]; taken {
			return fmt.Errorf("LUNs %s and %s have the same target %d: give one another target=", other, l.Path, l.Target)
		}
		if ids[l.ID] {
			return fmt.Errorf("two LUNs have the id %s: give one another id=", l.ID)
		}
		targets[l.Target], ids[l.ID] = l.Path, true
		if l.Timeout == 0 {
			l.Timeout = DefaultTimeout
		}
	}
	return nil
}

// minMemory is what the smallest guest needs: the low tables and a kernel of a
// few pages. Stock kernels want more and say so themselves.
const minMemory = 2 << 20
