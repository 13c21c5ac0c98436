package machine

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseLUN(t *testing.T) {
	for _, test := range []struct {
		in   string
		want LUNConfig
	}{
		{"path=/dev/sg2", LUNConfig{Path: "/dev/sg2", Target: -1, Timeout: DefaultTimeout}},
		{"id=data,path=/dev/sg2,target=7,timeout=5s,readonly,allow=unsafe",
			LUNConfig{ID: "data", Path: "/dev/sg2", Target: 7, Timeout: 5 * time.Second, ReadOnly: true, Unsafe: true}},
		{"path=a.img,initiator=host1:web1", LUNConfig{Path: "a.img", Target: -1, Timeout: DefaultTimeout, Initiator: "host1:web1"}},
		{"path=a,,b=c.img", LUNConfig{Path: "a,b=c.img", Target: -1, Timeout: DefaultTimeout}},
	} {
		got, err := ParseLUN(test.in)
		if err != nil {
			t.Errorf("ParseLUN(%q) = %v", test.in, err)
			continue
		}
		if d := cmp.Diff(test.want, got); d != "" {
			t.Errorf("ParseLUN(%q): -want +got\n%s", test.in, d)
		}
	}
	for in, want := range map[string]string{
		"":                    "unknown option",
		"id=x":                "path=PATH is missing",
		"/dev/sg2":            "unknown option",
		"path":                "path needs a value",
		"path=":               "path needs a value",
		"path=a,path=b":       "path is given twice",
		"path=a,target=256":   "from 0 to 255",
		"path=a,target=-1":    "from 0 to 255",
		"path=a,timeout=1ms":  "from 1s to 24h",
		"path=a,readonly=yes": "takes no value",
		"path=a,initiator=":   "initiator needs a value",
		"path=a,initiator=" + strings.Repeat("x", 200): "want 1 to 199 bytes",
		"path=a,allow=all":           "only allow=unsafe",
		"path=a,type=disk":           "unknown option \"type\"",
		"path=a,target=99999999999 ": "from 0 to 255",
	} {
		if got, err := ParseLUN(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseLUN(%q) = %v, %v; want an error with %q", in, got, err, want)
		}
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]uint64{"0": 0, "1": 1, "256M": 256 << 20, "256m": 256 << 20, "1G": 1 << 30, "5g": 5 << 30, "2T": 2 << 40, "4K": 4096} {
		if got, err := ParseSize(in); got != want || err != nil {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "G", "-1", "1.5G", "1GB", "99999999999999999999", "99999999999T", "0x10", " 1"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d; want an error", in, got)
		}
	}
}

func TestNormalize(t *testing.T) {
	base := func() Config { return Config{CPUs: 1, Memory: 256 << 20, CPU: CPUHost, Kernel: "vmlinuz"} }
	c := base()
	c.LUNs = []LUNConfig{{Path: "a", Target: -1}, {Path: "b", Target: -1, ID: "data"}}
	if err := c.normalize(); err != nil {
		t.Fatal(err)
	}
	if c.LUNs[0].ID != "lun0" || c.LUNs[0].Target != 0 || c.LUNs[1].ID != "data" || c.LUNs[1].Target != 1 {
		t.Errorf("LUNs are %+v", c.LUNs)
	}
	for name, change := range map[string]func(*Config){
		"give 1 to 8":                         func(c *Config) { c.CPUs = 9 },
		"0 vCPUs":                             func(c *Config) { c.CPUs = 0 },
		"too little":                          func(c *Config) { c.Memory = 0 },
		"no multiple":                         func(c *Config) { c.Memory = 256<<20 + 1 },
		"CPU model":                           func(c *Config) { c.CPU = "486" },
		"LUNs a and b have the same target 1": func(c *Config) { c.LUNs = []LUNConfig{{Path: "a", Target: 1}, {Path: "b", Target: -1}} },
		"two LUNs have the": func(c *Config) {
			c.LUNs = []LUNConfig{{Path: "a", ID: "x", Target: -1}, {Path: "b", ID: "x", Target: -1}}
		},
	} {
		c := base()
		change(&c)
		if err := c.normalize(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("normalize() = %v; want an error with %q", err, name)
		}
	}
}
