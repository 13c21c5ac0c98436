package initrd

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// read returns an archive's entries as "mode name contents", in order.
func read(t *testing.T, r io.Reader) []string {
	t.Helper()
	var entries []string
	in := cpio.NewReader(r)
	for {
		h, err := in.Next()
		if err == io.EOF {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		if h.Links != 1 {
			t.Errorf("%s has %d links; want 1", h.Name, h.Links)
		}
		text := h.Mode.String() + " " + h.Name
		if s := string(data) + h.Linkname; s != "" {
			text += " " + s
		}
		entries = append(entries, text)
	}
}

func sample() *Archive {
	var a Archive
	a.File("/init", 0o755, []byte("program"))
	a.Symlink("../init", "/bin/tool")
	a.Dir("/proc")
	a.File("a/b/c", 0o600, []byte("12345"))
	a.File("/empty", 0o644, nil)
	return &a
}

func TestArchive(t *testing.T) {
	var out bytes.Buffer
	n, err := sample().WriteTo(&out)
	if err != nil || n != int64(out.Len()) {
		t.Fatalf("WriteTo = %d, %v; want %d bytes", n, err, out.Len())
	}
	want := []string{
		"040755 a", "040755 a/b", "0100600 a/b/c 12345",
		"040755 bin", "0120777 bin/tool ../init",
		"0100644 empty", "0100755 init program", "040755 proc",
	}
	if diff := cmp.Diff(want, read(t, bytes.NewReader(out.Bytes()))); diff != "" {
		t.Errorf("archive (-want +got):\n%s", diff)
	}

	// Another implementation of the format agrees.
	if busybox, err := exec.LookPath("busybox"); err == nil {
		dir := t.TempDir()
		cmd := exec.Command(busybox, "cpio", "-idm")
		cmd.Dir, cmd.Stdin = dir, &out
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cpio -i: %v: %s", err, text)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "bin/tool")); err != nil || string(got) != "program" {
			t.Errorf("bin/tool, unpacked by busybox = %q, %v; want \"program\" through the link", got, err)
		}
	}
}

func TestKey(t *testing.T) {
	first, again := sample().Key(), sample().Key()
	if first != again {
		t.Errorf("the same tree has keys %s and %s", first, again)
	}
	for name, change := range map[string]func(*Archive){
		"contents": func(a *Archive) { a.File("/init", 0o755, []byte("Program")) },
		"mode":     func(a *Archive) { a.File("/init", 0o711, []byte("program")) },
		"name":     func(a *Archive) { a.Dir("/sys") },
		"link":     func(a *Archive) { a.Symlink("/init", "/bin/tool") },
	} {
		a := sample()
		change(a)
		if a.Key() == first {
			t.Errorf("another %s, the same key", name)
		}
	}
}

func TestPrograms(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var a Archive
	if err := a.Programs(sh, script); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{sh, script} {
		if !a.Has(name) {
			t.Errorf("the archive has no %s", name)
		}
	}
	names := []string{}
	for name := range a.entries {
		names = append(names, filepath.Base(name))
	}
	for _, lib := range []string{"libc.so.6", "ld-linux-x86-64.so.2"} {
		if !slices.Contains(names, lib) {
			t.Errorf("the archive has %v; want %s too, which %s needs", names, lib, sh)
		}
	}
	// From a tree a program comes under the name that it has there.
	tree := t.TempDir()
	if err := os.MkdirAll(filepath.Join(tree, "sbin"), 0o755); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(sh)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "sbin/tool"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	var b Archive
	if err := b.ProgramsFrom(tree, "/sbin/tool"); err != nil || !b.Has("/sbin/tool") || b.Has(tree) {
		t.Errorf("ProgramsFrom(%s, /sbin/tool) = %v; want /sbin/tool in the archive", tree, err)
	}
	if err := a.Programs("/no/such/program"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Programs(/no/such/program) = %v; want ErrNotExist", err)
	}
}

const (
	testDeps = `kernel/a.ko:
kernel/b.ko: kernel/a.ko
kernel/c-d.ko.xz: kernel/b.ko kernel/a.ko
kernel/e.ko: kernel/c-d.ko.xz kernel/b.ko kernel/a.ko
`
	testBuiltin = "kernel/in-side.ko\nkernel/too.ko\n"
)

func TestLoadOrder(t *testing.T) {
	tree, err := parseTree("/lib/modules/6.1.0", []byte(testDeps), []byte(testBuiltin))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		names string
		want  string
	}{
		{"a", "kernel/a.ko"},
		{"b", "kernel/a.ko kernel/b.ko"},
		{"c_d", "kernel/a.ko kernel/b.ko kernel/c-d.ko.xz"},
		{"c-d", "kernel/a.ko kernel/b.ko kernel/c-d.ko.xz"},
		{"e", "kernel/a.ko kernel/b.ko kernel/c-d.ko.xz kernel/e.ko"},
		{"b e a", "kernel/a.ko kernel/b.ko kernel/c-d.ko.xz kernel/e.ko"},
		{"in_side too b", "kernel/a.ko kernel/b.ko"},
		{"", ""},
	} {
		got, err := tree.LoadOrder(strings.Fields(test.names)...)
		if err != nil || strings.Join(got, " ") != test.want {
			t.Errorf("LoadOrder(%s) = %s, %v; want %s", test.names, strings.Join(got, " "), err, test.want)
		}
	}
	if got, err := tree.LoadOrder("a", "missing"); !errors.Is(err, ErrNoModule) || err.Error() != "/lib/modules/6.1.0: missing: no such module" {
		t.Errorf("LoadOrder(a missing) = %v, %v; want ErrNoModule that names it", got, err)
	}
	if _, err := parseTree("/x", []byte("no colon\n"), nil); err == nil {
		t.Error("a modules.dep without a colon was accepted")
	}
}

// Every module comes after all that it needs, whatever depends on whatever
// and whatever is asked for.
func TestLoadOrderIsTopological(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 12).Draw(t, "modules")
		name := func(i int) string { return "m" + strconv.Itoa(i) }
		needs := make([][]int, n) // all of it, nearest first, as depmod writes it
		var deps strings.Builder
		for i := range n {
			for j := i - 1; j >= 0; j-- {
				if rapid.Bool().Draw(t, "needs") && !slices.Contains(needs[i], j) {
					needs[i] = append(needs[i], j)
				}
			}
			for _, j := range slices.Clone(needs[i]) {
				for _, k := range needs[j] {
					if at := slices.Index(needs[i], k); at >= 0 {
						needs[i] = slices.Delete(needs[i], at, at+1)
					}
					needs[i] = append(needs[i], k)
				}
			}
			deps.WriteString(name(i) + ".ko:")
			for _, j := range needs[i] {
				deps.WriteString(" " + name(j) + ".ko")
			}
			deps.WriteString("\n")
		}
		tree, err := parseTree("/x", []byte(deps.String()), nil)
		if err != nil {
			t.Fatal(err)
		}
		var wanted []string
		for _, i := range rapid.SliceOfN(rapid.IntRange(0, n-1), 1, 5).Draw(t, "wanted") {
			wanted = append(wanted, name(i))
		}
		order, err := tree.LoadOrder(wanted...)
		if err != nil {
			t.Fatal(err)
		}
		loaded := map[string]bool{}
		for _, file := range order {
			if loaded[file] {
				t.Fatalf("%s comes twice in %v", file, order)
			}
			for _, need := range tree.deps[file] {
				if !loaded[need] {
					t.Fatalf("LoadOrder(%v) = %v: %s comes before %s, which it needs;\n%s", wanted, order, file, need, deps.String())
				}
			}
			loaded[file] = true
		}
		for _, name := range wanted {
			if !loaded[name+".ko"] {
				t.Fatalf("LoadOrder(%v) = %v; want %s in it", wanted, order, name)
			}
		}
	})
}

func TestModules(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "6.1.0")
	for name, text := range map[string]string{
		"modules.dep": testDeps, "modules.builtin": testBuiltin,
		"modules.alias": "# Aliases\nalias pci:v1* c_d\nalias fs-x e\nalias other z\n",
		"kernel/a.ko":   "A", "kernel/b.ko": "B", "kernel/c-d.ko.xz": "C", "kernel/e.ko": "E",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	var a Archive
	if err := a.Modules(tree, []string{"b"}, []string{"c-d"}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		ListFile:                              "/lib/modules/6.1.0/kernel/a.ko\n/lib/modules/6.1.0/kernel/b.ko\n",
		"/lib/modules/6.1.0/modules.dep":      "kernel/a.ko: \nkernel/b.ko: kernel/a.ko\nkernel/c-d.ko.xz: kernel/b.ko kernel/a.ko\n",
		"/lib/modules/6.1.0/modules.alias":    "alias pci:v1* c_d\n",
		"/lib/modules/6.1.0/kernel/c-d.ko.xz": "C",
	} {
		if got := string(a.entries[name].data); got != want {
			t.Errorf("%s = %q; want %q", name, got, want)
		}
	}
	if a.Has("/lib/modules/6.1.0/kernel/e.ko") {
		t.Error("the archive has e.ko, which nobody asked for")
	}
	if _, err := OpenTree(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("OpenTree of an empty directory = %v; want ErrNotExist", err)
	}
}
