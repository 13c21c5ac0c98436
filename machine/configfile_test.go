package machine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	vmmv1 "vmm/proto/vmm/v1"
)

func TestConfigFile(t *testing.T) {
	base := Config{Name: "a", CPUs: 1, Memory: 512 << 20, CPU: CPUHost, Cmdline: "console=ttyS0", LUNs: []LUNConfig{{ID: "first"}}}
	for _, test := range []struct {
		text string
		want Config
	}{
		{"", base},
		{"# nothing\n", base},
		{`
name: web1
kernel: /boot/vmlinuz
initrd: initrd.img
cmdline: ""
cpus: 2
memory: 1G
cpu_model: x86-64-v2
no_reboot: true
luns:
  - {id: data, path: /dev/sg2, target: 0, timeout: 5s, readonly: true, allow_unsafe: true}
  - path: ../disk.img
    initiator: web1
`, Config{
			Name: "web1", CPUs: 2, Memory: 1 << 30, CPU: CPUv2, Kernel: "/boot/vmlinuz", Initrd: "dir/initrd.img", NoReboot: true,
			LUNs: []LUNConfig{
				{ID: "first"},
				{ID: "data", Path: "/dev/sg2", Timeout: 5 * time.Second, ReadOnly: true, Unsafe: true},
				{Path: "disk.img", Target: -1, Initiator: "web1"},
			},
		}},
		{"memory: 1048576000", Config{Name: "a", CPUs: 1, Memory: 1000 << 20, CPU: CPUHost, Cmdline: "console=ttyS0", LUNs: base.LUNs}},
	} {
		got := base
		if err := got.parse("dir/web1.yaml", []byte(test.text)); err != nil {
			t.Errorf("parse(%q) = %v", test.text, err)
			continue
		}
		if d := cmp.Diff(test.want, got); d != "" {
			t.Errorf("parse(%q): -want +got\n%s", test.text, d)
		}
	}
}

func TestConfigFileErrors(t *testing.T) {
	for text, want := range map[string]string{
		"- a":                                    `f:1: a list: want fields`,
		"just text":                              `f:1: "just text": want fields`,
		"cpus: 1\n---\ncpus: 2":                  `f:2: a second document`,
		"cpus: 1\n\tx":                           `no YAML: `,
		"a: b: c":                                `f: no YAML: mapping values`,
		"\ncpu: host":                            `f:2: cpu: unknown field; known are name, cpus, memory, cpu_model`,
		"memory_bytes: 5":                        `f:1: memory_bytes: unknown field`,
		"? [a]\n: b":                             `unknown field`,
		"<<: {cpus: 2}":                          `f:1: <<: unknown field`,
		"cpus: 1\nname: x\ncpus: 2":              `f:3: cpus: given twice, first in line 1`,
		"cpus: 0":                                `f:1: cpus: 0: give 1 to 8`,
		"cpus: 9":                                `f:1: cpus: 9: give 1 to 8`,
		"cpus: -1":                               `f:1: cpus: "-1": give a whole number from 0 to 4294967295`,
		"cpus: 1.5":                              `f:1: cpus: "1.5": give a whole number`,
		"cpus: '2'":                              `f:1: cpus: "2": give a whole number`,
		"cpus: 99999999999999":                   `f:1: cpus: "99999999999999": give a whole number`,
		"cpus:":                                  `f:1: cpus: nothing: give a whole number`,
		"cpus: [1]":                              `f:1: cpus: a list: give a whole number`,
		"cpus: {a: 1}":                           `f:1: cpus: fields: give a whole number`,
		"memory: 1.5":                            `f:1: memory: "1.5": give a size, as in 512M`,
		"memory: 4100K":                          "",
		"memory: 4097":                           `f:1: memory: 4097 bytes: give at least 2 MiB`,
		"memory: 2097153":                        `f:1: memory: 2097153 bytes: give at least 2 MiB, in pages of 4096 bytes`,
		"memory: true":                           `f:1: memory: "true": give a size`,
		"cpu_model: pentium":                     `f:1: cpu_model: CPU model "pentium": give host`,
		"name: 5":                                `f:1: name: "5": give a text; in quotes`,
		"name: &x a\nkernel: *x":                 `f:2: kernel: an alias: write the value out`,
		"kernel: ''":                             `f:1: kernel: the path is empty`,
		"no_reboot: yes":                         `f:1: no_reboot: "yes": give true or false`,
		"no_reboot: 1":                           `f:1: no_reboot: "1": give true or false`,
		"luns: a":                                `f:1: luns: "a": want a list, each entry beginning with "- "`,
		"luns: [a]":                              `f:1: luns[0]: "a": want fields`,
		"luns:\n- id: a":                         `f:2: luns[0]: path is missing`,
		"luns:\n- path: a\n- path: b\n  path: c": `f:4: luns[1].path: given twice, first in line 3`,
		"luns:\n- path: a\n  passthrough: true":  `f:3: luns[0].passthrough: unknown field; known are id, path`,
		"luns:\n- path: a\n  target: 256":        `f:3: luns[0].target: 256: give a number from 0 to 255`,
		"luns:\n- path: a\n  timeout: 1ms":       `f:3: luns[0].timeout: 1ms: give a time from 1s to 24h`,
		"luns:\n- path: a\n  timeout: 30":        `f:3: luns[0].timeout: "30": give a time, as in 30s`,
		"luns:\n- path: a\n  timeout: -1s":       `f:3: luns[0].timeout: `,
		"luns:\n- path: a\n  initiator: ''":      `f:3: luns[0].initiator: initiator name "": want 1 to 199 bytes`,
		"luns:\n- path: a\n  readonly: 'true'":   `f:3: luns[0].readonly: "true": give true or false`,
		"x: &a [1]\ny: *a":                       `f:1: x: unknown field`,
		"luns: &a [{path: x}]\nname: x\ncmdline: 1": `f:3: cmdline: "1": give a text`,
	} {
		err := new(Config).parse("f", []byte(text))
		if want == "" {
			if err != nil {
				t.Errorf("parse(%q) = %v; want no error", text, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parse(%q) = %v; want %q", text, err, want)
		}
	}
}

func TestConfigFileTooLong(t *testing.T) {
	path := filepath.Join(t.TempDir(), "long.yaml")
	if err := os.WriteFile(path, []byte(strings.Repeat("# no end\n", maxConfigFile/8)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := new(Config).LoadConfig(path); err == nil || !strings.Contains(err.Error(), "has more than 1048576 bytes") {
		t.Errorf("LoadConfig of a long file = %v; want a refusal", err)
	}
}

// Whoever adds a field to the schema has it in the file; if its kind is new, or
// it needs a bound, this test and check are where to say so.
func TestConfigFileHasTheWholeSchema(t *testing.T) {
	text := map[protoreflect.Name]string{
		"name": "a", "cpus": "1", "memory_bytes": "64M", "cpu_model": "host", "kernel": "k", "initrd": "i", "cmdline": "c", "no_reboot": "true",
		"id": "a", "path": "p", "target": "3", "timeout_ms": "7s", "readonly": "true", "allow_unsafe": "true", "initiator": "me",
	}
	file := func(m protoreflect.Message, indent string) (s string) {
		fields := m.Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			switch value, known := text[f.Name()]; {
			case known:
				s += indent + key(f) + ": " + value + "\n"
			case !hidden[f.Name()] && !f.IsList():
				t.Errorf("field %s: not in this test", f.FullName())
			}
		}
		return s
	}
	var c Config
	if err := c.parse("f", []byte(file((&vmmv1.MachineConfig{}).ProtoReflect(), "")+"luns:\n-\n"+file((&vmmv1.LunConfig{}).ProtoReflect(), "  "))); err != nil {
		t.Fatal(err)
	}
	want := Config{
		Name: "a", CPUs: 1, Memory: 64 << 20, CPU: CPUHost, Kernel: "k", Initrd: "i", Cmdline: "c", NoReboot: true,
		LUNs: []LUNConfig{{ID: "a", Path: "p", Target: 3, Timeout: 7 * time.Second, ReadOnly: true, Unsafe: true, Initiator: "me"}},
	}
	if d := cmp.Diff(want, c); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

// A file is text from anywhere: it is read or refused with a line, and what
// is read is within its bounds.
func FuzzConfigFile(f *testing.F) {
	f.Add("name: web1\ncpus: 2\nmemory: 1G\nluns:\n- path: a\n  timeout: 5s\n")
	f.Add("a: &a [*a]\n<<: *a\n? {x: y}\n: 5\n---\n...\n")
	f.Add("luns: [{path: x, target: 255, initiator: y}]")
	f.Fuzz(func(t *testing.T, text string) {
		c := Config{CPUs: 1, Memory: minMemory, CPU: CPUHost}
		err := c.parse("f", []byte(text))
		if err != nil {
			if !strings.HasPrefix(err.Error(), "f:") {
				t.Errorf("parse(%q) = %v; want the file's name in front", text, err)
			}
			return
		}
		if c.CPUs < 1 || c.CPUs > MaxCPUs || c.Memory < minMemory {
			t.Errorf("parse(%q): %d vCPUs, %d bytes", text, c.CPUs, c.Memory)
		}
		for _, l := range c.LUNs {
			if l.Path == "" || l.Target < -1 || l.Target >= MaxTargets || l.Timeout > maxTimeout {
				t.Errorf("parse(%q): LUN %+v", text, l)
			}
		}
	})
}
