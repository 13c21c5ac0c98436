package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"

	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// A configuration file is a MachineConfig (proto/vmm/v1/config.proto) in YAML:
// its fields under their own names, but for the units. What is NAME_bytes there
// is NAME here and takes a size, as in 1G; what is NAME_ms is NAME and takes a
// time, as in 30s.

// maxConfigFile bounds a configuration file, bytes.
const maxConfigFile = 1 << 20

// LoadConfig reads the configuration file at path over c: what the file does
// not say stays as it is, and its LUNs follow those of c. Relative paths in
// it start at the file's directory. An error begins with FILE:LINE.
func (c *Config) LoadConfig(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if len(text) > maxConfigFile {
		return fmt.Errorf("configuration: %s has more than %d bytes", path, maxConfigFile)
	}
	return c.parse(path, text)
}

// parse reads text, the content of the file at path.
func (c *Config) parse(path string, text []byte) error {
	m := &vmmv1.MachineConfig{
		Name: c.Name, Cpus: uint32(c.CPUs), MemoryBytes: c.Memory, CpuModel: string(c.CPU),
		Kernel: c.Kernel, Initrd: c.Initrd, Cmdline: c.Cmdline, NoReboot: c.NoReboot,
	}
	r := configReader{path: path}
	if err := r.document(text, m); err != nil {
		return err
	}
	c.Name, c.CPUs, c.Memory, c.CPU = m.Name, int(m.Cpus), m.MemoryBytes, CPUModel(m.CpuModel)
	c.Kernel, c.Initrd, c.Cmdline, c.NoReboot = m.Kernel, m.Initrd, m.Cmdline, m.NoReboot
	for i, l := range m.Luns {
		lun := lunConfig(l)
		if !r.targets[i] {
			lun.Target = -1
		}
		c.LUNs = append(c.LUNs, lun)
	}
	return nil
}

// configReader reads one configuration file.
type configReader struct {
	path    string
	targets []bool // whether the LUN says its target
}

// fail is an error at a node of the file.
func (r *configReader) fail(n *yaml.Node, field, format string, args ...any) error {
	if field != "" {
		format = field + ": " + format
	}
	return fmt.Errorf("%s:%d: %s", r.path, n.Line, fmt.Sprintf(format, args...))
}

func (r *configReader) document(text []byte, m *vmmv1.MachineConfig) error {
	d := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	switch err := d.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil // empty
	case err != nil:
		return r.syntax(err)
	}
	var second yaml.Node
	switch err := d.Decode(&second); {
	case err == nil:
		return r.fail(&second, "", "a second document: a file describes one machine")
	case !errors.Is(err, io.EOF):
		return r.syntax(err)
	}
	return r.message(doc.Content[0], "", m.ProtoReflect())
}

// syntax is the library's word that the file is no YAML, with the line in
// front where the library knows it.
func (r *configReader) syntax(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if line, what, ok := strings.Cut(rest, ": "); ok {
			return fmt.Errorf("%s:%s: no YAML: %s", r.path, line, what)
		}
	}
	return fmt.Errorf("%s: no YAML: %s", r.path, text)
}

// hidden are fields that a machine fills in by itself.
var hidden = map[protoreflect.Name]bool{"passthrough": true}

// key is a field's name in a file.
func key(f protoreflect.FieldDescriptor) string {
	name := strings.TrimSuffix(string(f.Name()), "_ms")
	return strings.TrimSuffix(name, "_bytes")
}

// message fills m in from a mapping. at is the mapping's place, empty for the
// file's own.
func (r *configReader) message(n *yaml.Node, at string, m protoreflect.Message) error {
	if n.Kind != yaml.MappingNode {
		return r.fail(n, at, "%s: want fields, as in \"path: /dev/sg2\"", said(n))
	}
	fields := map[string]protoreflect.FieldDescriptor{}
	var known []string
	all := m.Descriptor().Fields()
	for i := range all.Len() {
		if f := all.Get(i); !hidden[f.Name()] {
			fields[key(f)] = f
			known = append(known, key(f))
		}
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, value := n.Content[i], n.Content[i+1]
		field := name.Value
		if at != "" {
			field = at + "." + field
		}
		f := fields[name.Value]
		if f == nil || name.Kind != yaml.ScalarNode {
			return r.fail(name, field, "unknown field; known are %s", strings.Join(known, ", "))
		}
		if line, twice := seen[name.Value]; twice {
			return r.fail(name, field, "given twice, first in line %d", line)
		}
		seen[name.Value] = name.Line
		if err := r.field(value, field, m, f); err != nil {
			return err
		}
	}
	if _, lun := m.Interface().(*vmmv1.LunConfig); lun {
		if seen["path"] == 0 {
			return r.fail(n, at, "path is missing: a device, or a disk image")
		}
		r.targets = append(r.targets, seen["target"] != 0)
	}
	return nil
}

func (r *configReader) field(n *yaml.Node, at string, m protoreflect.Message, f protoreflect.FieldDescriptor) error {
	if f.IsList() {
		if n.Kind != yaml.SequenceNode {
			return r.fail(n, at, "%s: want a list, each entry beginning with \"- \"", said(n))
		}
		list := m.Mutable(f).List()
		for i, e := range n.Content {
			if err := r.message(e, fmt.Sprintf("%s[%d]", at, i), list.AppendMutable().Message()); err != nil {
				return err
			}
		}
		return nil
	}
	v, err := configValue(n, f)
	if err == nil {
		err = r.check(f, &v)
	}
	if err != nil {
		return r.fail(n, at, "%v", err)
	}
	m.Set(f, v)
	return nil
}

// configValue is a node's value as the field wants it.
func configValue(n *yaml.Node, f protoreflect.FieldDescriptor) (v protoreflect.Value, err error) {
	tag := n.ShortTag()
	if n.Kind == yaml.AliasNode {
		return v, errors.New("an alias: write the value out")
	}
	bytes := strings.HasSuffix(string(f.Name()), "_bytes")
	switch {
	case bytes && (tag == "!!str" || tag == "!!int"):
		size, err := ParseSize(n.Value)
		return protoreflect.ValueOfUint64(size), err
	case bytes:
		return v, fmt.Errorf("%s: give a size, as in 512M", said(n))
	case strings.HasSuffix(string(f.Name()), "_ms"):
		d, err := time.ParseDuration(n.Value)
		if tag != "!!str" || err != nil {
			return v, fmt.Errorf("%s: give a time, as in 30s", said(n))
		}
		return protoreflect.ValueOfUint64(uint64(d.Milliseconds())), nil
	}
	switch f.Kind() {
	case protoreflect.StringKind:
		if tag != "!!str" {
			return v, fmt.Errorf("%s: give a text; in quotes if it looks like something else", said(n))
		}
		return protoreflect.ValueOfString(n.Value), nil
	case protoreflect.BoolKind:
		if tag != "!!bool" {
			return v, fmt.Errorf("%s: give true or false", said(n))
		}
		return protoreflect.ValueOfBool(strings.EqualFold(n.Value, "true")), nil
	case protoreflect.Uint32Kind:
		number, err := strconv.ParseUint(n.Value, 10, 32)
		if tag != "!!int" || err != nil {
			return v, fmt.Errorf("%s: give a whole number from 0 to %d", said(n), uint32(math.MaxUint32))
		}
		return protoreflect.ValueOfUint32(uint32(number)), nil
	}
	return v, fmt.Errorf("no file can say what is a %v", f.Kind())
}

// said is how an error quotes a node.
func said(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "fields"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	if n.ShortTag() == "!!null" {
		return "nothing"
	}
	return strconv.Quote(n.Value)
}

// check refuses a value that New would refuse as well, while its line is
// known, and makes a path one of this process.
func (r *configReader) check(f protoreflect.FieldDescriptor, v *protoreflect.Value) error {
	switch f.Name() {
	case "cpus":
		if n := v.Uint(); n < 1 || n > MaxCPUs {
			return fmt.Errorf("%d: give 1 to %d", n, MaxCPUs)
		}
	case "memory_bytes":
		if n := v.Uint(); n < minMemory || n%memory.PageSize != 0 {
			return fmt.Errorf("%d bytes: give at least %d MiB, in pages of %d bytes", n, minMemory>>20, memory.PageSize)
		}
	case "cpu_model":
		_, err := ParseCPUModel(v.String())
		return err
	case "target":
		if n := v.Uint(); n >= MaxTargets {
			return fmt.Errorf("%d: give a number from 0 to %d", n, MaxTargets-1)
		}
	case "timeout_ms":
		if d := time.Duration(v.Uint()) * time.Millisecond; d < minTimeout || d > maxTimeout {
			return fmt.Errorf("%v: give a time from 1s to 24h", d)
		}
	case "initiator":
		_, err := pr.NamedNexus(v.String())
		return err
	case "kernel", "initrd", "path":
		path := v.String()
		if path == "" {
			return errors.New("the path is empty")
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(r.path), path)
		}
		*v = protoreflect.ValueOfString(path)
	}
	return nil
}
