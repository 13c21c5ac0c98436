package initrd

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// ListFile is the file in an archive that names its modules, one path a line,
// in load order. Package pid1 reads it.
const ListFile = "/etc/modules"

// Tree is the module directory of a kernel, /lib/modules/RELEASE somewhere,
// after depmod.
type Tree struct {
	Dir     string
	deps    map[string][]string // file -> what it needs, all of it, nearest first
	byName  map[string]string   // module name -> file
	builtin map[string]bool     // module names that the kernel contains
}

// ErrNoModule is the cause when a kernel neither has nor contains a module.
var ErrNoModule = errors.New("no such module")

// OpenTree reads dir's modules.dep and modules.builtin (modprobe.d(5),
// depmod(8)).
func OpenTree(dir string) (*Tree, error) {
	deps, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	return parseTree(dir, deps, builtin)
}

func parseTree(dir string, deps, builtin []byte) (*Tree, error) {
	t := &Tree{Dir: dir, deps: map[string][]string{}, byName: map[string]string{}, builtin: map[string]bool{}}
	lines := bufio.NewScanner(bytes.NewReader(deps))
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		file, needs, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("%s/modules.dep:%d: no colon in %q", dir, n, lines.Text())
		}
		t.deps[file] = strings.Fields(needs)
		t.byName[moduleName(file)] = file
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s/modules.dep: %w", dir, err)
	}
	for file := range strings.FieldsSeq(string(builtin)) {
		t.builtin[moduleName(file)] = true
	}
	return t, nil
}

// moduleName turns a file name into the name that the kernel knows: without
// its suffixes (.ko, .ko.xz), and with _ for -.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// LoadOrder returns the files of the named modules and of all that they need,
// each once, what is needed first. A module that is built into the kernel
// needs no file.
func (t *Tree) LoadOrder(names ...string) ([]string, error) {
	var order []string
	seen := map[string]bool{}
	add := func(file string) {
		if !seen[file] {
			seen[file] = true
			order = append(order, file)
		}
	}
	for _, name := range names {
		name = strings.ReplaceAll(name, "-", "_")
		file, ok := t.byName[name]
		if !ok {
			if t.builtin[name] {
				continue
			}
			return nil, fmt.Errorf("%s: %s: %w", t.Dir, name, ErrNoModule)
		}
		// depmod lists a dependency before what that one itself needs.
		needs := t.deps[file]
		for i := len(needs) - 1; i >= 0; i-- {
			add(needs[i])
		}
		add(file)
	}
	return order, nil
}

// Modules adds the modules that are to be loaded at boot, those that are only
// to be there for modprobe, and what both need.
func (a *Archive) Modules(t *Tree, load, available []string) error {
	boot, err := t.LoadOrder(load...)
	if err != nil {
		return err
	}
	all, err := t.LoadOrder(append(append([]string{}, load...), available...)...)
	if err != nil {
		return err
	}
	root := "/lib/modules/" + filepath.Base(t.Dir)
	var list, deps bytes.Buffer
	for _, file := range boot {
		fmt.Fprintf(&list, "%s/%s\n", root, file)
	}
	names := map[string]bool{}
	for _, file := range all {
		data, err := os.ReadFile(filepath.Join(t.Dir, file))
		if err != nil {
			return err
		}
		a.File(path.Join(root, file), 0o644, data)
		fmt.Fprintf(&deps, "%s: %s\n", file, strings.Join(t.deps[file], " "))
		names[moduleName(file)] = true
	}
	a.File(ListFile, 0o644, list.Bytes())
	a.File(path.Join(root, "modules.dep"), 0o644, deps.Bytes())

	// The aliases of these modules only: busybox reads the file for each
	// modprobe, and a whole one has 20,000 lines.
	aliases, err := os.ReadFile(filepath.Join(t.Dir, "modules.alias"))
	if err != nil {
		return err
	}
	var kept bytes.Buffer
	for line := range strings.Lines(string(aliases)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" && names[f[2]] {
			kept.WriteString(line)
		}
	}
	a.File(path.Join(root, "modules.alias"), 0o644, kept.Bytes())
	return nil
}
