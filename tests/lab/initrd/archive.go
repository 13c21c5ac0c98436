// Package initrd builds initial RAM file systems: a cpio archive in memory
// with programs of this machine, the libraries they need, and kernel modules
// in the order in which they load.
package initrd

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// Archive is a file tree. The zero value is an empty one. Directories appear
// as they are needed, mode 0755, everything belongs to root, and the same tree
// is always written as the same bytes.
type Archive struct {
	entries map[string]entry // by clean absolute path
}

type entry struct {
	mode cpio.FileMode
	data []byte // contents, or a symbolic link's target
}

func (a *Archive) add(name string, e entry) {
	if a.entries == nil {
		a.entries = map[string]entry{}
	}
	name = path.Clean("/" + name)
	for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
		if _, ok := a.entries[dir]; !ok {
			a.entries[dir] = entry{mode: cpio.TypeDir | 0o755}
		}
	}
	a.entries[name] = e
}

// File adds a regular file. The archive keeps data.
func (a *Archive) File(name string, perm fs.FileMode, data []byte) {
	a.add(name, entry{cpio.TypeReg | cpio.FileMode(perm.Perm()), data})
}

// Dir adds directories.
func (a *Archive) Dir(names ...string) {
	for _, name := range names {
		a.add(name, entry{mode: cpio.TypeDir | 0o755})
	}
}

// Symlink adds a symbolic link to target.
func (a *Archive) Symlink(target, name string) {
	a.add(name, entry{cpio.TypeSymlink | 0o777, []byte(target)})
}

// Has reports whether name is in the archive.
func (a *Archive) Has(name string) bool {
	_, ok := a.entries[path.Clean("/"+name)]
	return ok
}

// Copy adds a file of this machine under the same name, following links.
func (a *Archive) Copy(names ...string) error {
	for _, name := range names {
		if err := a.copyFrom("", name); err != nil {
			return err
		}
	}
	return nil
}

func (a *Archive) copyFrom(root, name string) error {
	data, err := os.ReadFile(root + name)
	if err != nil {
		return err
	}
	info, err := os.Stat(root + name)
	if err != nil {
		return err
	}
	a.File(name, info.Mode(), data)
	return nil
}

var lddLine = regexp.MustCompile(`(?m)^\s+(?:\S+ => )?(/\S+) \(0x`)

// Programs adds programs of this machine, each under its own name, and the
// shared libraries they need, as ldd finds them.
func (a *Archive) Programs(names ...string) error { return a.ProgramsFrom("", names...) }

// ProgramsFrom is Programs for what a directory has as if it were the root: a
// package that was unpacked there. Libraries that it lacks are this machine's.
func (a *Archive) ProgramsFrom(root string, names ...string) error {
	// ldd fails for scripts and static programs; both need no libraries.
	var dynamic []string
	for _, name := range names {
		if err := a.copyFrom(root, name); err != nil {
			return err
		}
		if bytes.Contains(a.entries[path.Clean(name)].data, []byte("/ld-linux")) {
			dynamic = append(dynamic, root+name)
		}
	}
	if len(dynamic) == 0 {
		return nil
	}
	cmd := exec.Command("ldd", dynamic...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if root != "" {
		cmd.Env = append(cmd.Env, "LD_LIBRARY_PATH="+root+"/usr/lib/x86_64-linux-gnu:"+root+"/lib/x86_64-linux-gnu")
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("ldd %s: %w: %s", strings.Join(dynamic, " "), err, out)
	}
	if i := strings.Index(string(out), "not found"); i >= 0 {
		return fmt.Errorf("ldd: a library is missing: %s", out)
	}
	for _, match := range lddLine.FindAllSubmatch(out, -1) {
		from := ""
		lib := string(match[1])
		if root != "" && strings.HasPrefix(lib, root+"/") {
			from, lib = root, strings.TrimPrefix(lib, root)
		}
		if !a.Has(lib) {
			if err := a.copyFrom(from, lib); err != nil {
				return err
			}
		}
	}
	return nil
}

// Busybox adds the static busybox of this machine as /bin/busybox and a link
// in /bin for each of its applets, where the archive has no such name yet, and
// the names that kernels call.
func (a *Archive) Busybox() error {
	const source = "/usr/bin/busybox"
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	a.File("/bin/busybox", 0o755, data)
	applets, err := exec.Command(source, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", source, err)
	}
	for _, applet := range strings.Fields(string(applets)) {
		if name := "/bin/" + applet; !a.Has(name) {
			a.Symlink("busybox", name)
		}
	}
	a.Symlink("../bin/busybox", "/sbin/modprobe")
	return nil
}

// WriteTo writes the archive in the "newc" format.
func (a *Archive) WriteTo(w io.Writer) (int64, error) {
	counter := &countingWriter{w: w}
	out := cpio.NewWriter(counter)
	names := make([]string, 0, len(a.entries))
	for name := range a.entries {
		names = append(names, name)
	}
	slices.Sort(names) // a directory comes before what is in it
	for i, name := range names {
		e := a.entries[name]
		// Links 1, or the kernel looks for hard links by inode number.
		// A link's target is its contents.
		header := &cpio.Header{Name: name[1:], Mode: e.mode, Inode: int64(i + 1), Links: 1, Size: int64(len(e.data))}
		if err := out.WriteHeader(header); err != nil {
			return counter.n, fmt.Errorf("cpio: %s: %w", name, err)
		}
		if _, err := out.Write(e.data); err != nil {
			return counter.n, fmt.Errorf("cpio: %s: %w", name, err)
		}
	}
	err := out.Close()
	return counter.n, err
}

// Key returns a name for the contents: the same tree, the same key.
func (a *Archive) Key() string {
	h := sha256.New()
	a.WriteTo(h) // a hash does not fail
	return hex.EncodeToString(h.Sum(nil)[:12])
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
