// Package kernel finds Debian's stock kernels: it fetches the packages that
// linux-image-amd64 and linux-image-cloud-amd64 stand for, unpacks them into a
// cache, and extracts the ELF image from the bzImage.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"vmm/tests/lab/deb"
)

// Flavour is one of Debian's kernel builds.
type Flavour string

const (
	// Generic has everything as modules: nested KVM, LIO, 9p.
	Generic Flavour = "generic"
	// Cloud is made for virtual machines: smaller, faster to start, no 9p.
	Cloud Flavour = "cloud"
)

// Flavours are all of them.
var Flavours = []Flavour{Generic, Cloud}

// metaPackage is the package that depends on the newest kernel of a flavour.
func (f Flavour) metaPackage() (string, error) {
	switch f {
	case Generic:
		return "linux-image-amd64", nil
	case Cloud:
		return "linux-image-cloud-amd64", nil
	}
	return "", fmt.Errorf("kernel: flavour %q is not one of %v", string(f), Flavours)
}

// Kernel is an unpacked kernel package. All paths are absolute.
type Kernel struct {
	Flavour Flavour
	Package string // linux-image-6.1.0-56-amd64
	Version string // of the package: 6.1.192-2
	Release string // as uname -r prints it: 6.1.0-56-amd64
	BzImage string // the kernel as distributed
	VMLinux string // the ELF image in it
	Modules string // .../lib/modules/RELEASE, with depmod's files
}

// ErrNotFetched is the cause when a kernel is neither cached nor to be had.
var ErrNotFetched = errors.New("kernel cannot be fetched")

// Find returns the newest kernel of a flavour that apt knows, from the cache
// or fetched into it. Where apt knows none (no package lists, no network) the
// newest one in the cache is used.
func Find(ctx context.Context, f Flavour) (*Kernel, error) {
	meta, err := f.metaPackage()
	if err != nil {
		return nil, err
	}
	dir, err := deb.CacheDir()
	if err != nil {
		return nil, err
	}
	pkg, version, err := resolve(ctx, meta)
	if err != nil {
		if k := newestCached(dir, f); k != nil {
			return k, nil
		}
		return nil, err
	}
	k := &Kernel{Flavour: f, Package: pkg, Version: version}
	if k.locate(filepath.Join(dir, entryName(f, pkg, version))) == nil {
		return k, nil
	}
	if err := fetch(ctx, dir, k); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotFetched, err)
	}
	return k, nil
}

func entryName(f Flavour, pkg, version string) string {
	return fmt.Sprintf("kernel-%s-%s_%s", f, pkg, strings.ReplaceAll(version, ":", "%3a"))
}

// resolve asks apt which package a meta package stands for, and its version.
func resolve(ctx context.Context, meta string) (pkg, version string, err error) {
	out, err := deb.Run(ctx, "", "apt-cache", "--no-all-versions", "show", meta)
	if err != nil {
		return "", "", fmt.Errorf("%w: %w (is this Debian? try: apt-get update)", ErrNotFetched, err)
	}
	// Depends: linux-image-6.1.0-56-amd64 (= 6.1.192-2)
	for line := range strings.Lines(string(out)) {
		depends, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: ")
		if !ok {
			continue
		}
		for dep := range strings.SplitSeq(depends, ",") {
			name, rest, _ := strings.Cut(strings.TrimSpace(dep), " ")
			if !strings.HasPrefix(name, "linux-image-") {
				continue
			}
			if v, ok := strings.CutPrefix(rest, "(= "); ok {
				return name, strings.TrimSuffix(v, ")"), nil
			}
			v, err := deb.Candidate(ctx, name)
			if err != nil {
				err = fmt.Errorf("%w: %w", ErrNotFetched, err)
			}
			return name, v, err
		}
	}
	return "", "", fmt.Errorf("%w: apt-cache show %s names no linux-image package; try: apt-get update", ErrNotFetched, meta)
}

// newestCached returns the cached kernel of a flavour that was fetched last,
// or nil.
func newestCached(dir string, f Flavour) *Kernel {
	found, _ := filepath.Glob(filepath.Join(dir, "kernel-"+string(f)+"-*_*"))
	age := func(path string) int64 {
		info, err := os.Stat(path)
		if err != nil {
			return 0
		}
		return -info.ModTime().UnixNano()
	}
	slices.SortFunc(found, func(a, b string) int {
		if age(a) < age(b) {
			return -1
		}
		return 1
	})
	for _, path := range found {
		k := &Kernel{Flavour: f}
		k.Package, k.Version, _ = strings.Cut(strings.TrimPrefix(filepath.Base(path), "kernel-"+string(f)+"-"), "_")
		if k.locate(path) == nil {
			return k
		}
	}
	return nil
}

// locate fills in the paths of a kernel unpacked in dir, and checks that they
// are there.
func (k *Kernel) locate(dir string) error {
	images, err := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*"))
	if err != nil {
		return err
	}
	if len(images) != 1 {
		return fmt.Errorf("%s: %d files match boot/vmlinuz-*; want 1", dir, len(images))
	}
	k.BzImage = images[0]
	k.Release = strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	k.VMLinux = filepath.Join(dir, "boot/vmlinux-"+k.Release)
	k.Modules = filepath.Join(dir, "lib/modules", k.Release)
	for _, path := range []string{k.VMLinux, filepath.Join(k.Modules, "modules.dep")} {
		if _, err := os.Stat(path); err != nil {
			return err
		}
	}
	return nil
}

// fetch fills the cache entry of k. The entry appears complete or not at all;
// concurrent callers do the work once.
func fetch(ctx context.Context, cache string, k *Kernel) error {
	for _, tool := range [][2]string{
		{"apt-get", "apt"}, {"dpkg-deb", "dpkg"}, {"depmod", "kmod"}, {"xz", "xz-utils"},
	} {
		if err := deb.NeedTool(tool[0], tool[1]); err != nil {
			return err
		}
	}
	entry := filepath.Join(cache, entryName(k.Flavour, k.Package, k.Version))
	unlock, err := deb.Lock(ctx, entry+".lock")
	if err != nil {
		return err
	}
	defer unlock()
	if k.locate(entry) == nil {
		return nil // another process was faster
	}
	temp, err := os.MkdirTemp(cache, "tmp-kernel-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)

	// As root, apt would drop to a user that cannot write here, and warn.
	if _, err := deb.Run(ctx, temp, "apt-get", "-qq", "-o", "APT::Sandbox::User=root",
		"download", k.Package+"="+k.Version); err != nil {
		return fmt.Errorf("%w (package lists may be out of date; try: apt-get update)", err)
	}
	debs, _ := filepath.Glob(filepath.Join(temp, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download %s: %d packages came; want 1", k.Package, len(debs))
	}
	tree := filepath.Join(temp, "tree")
	if _, err := deb.Run(ctx, temp, "dpkg-deb", "-x", debs[0], tree); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(tree, "usr")); err != nil { // documentation
		return err
	}
	images, _ := filepath.Glob(filepath.Join(tree, "boot/vmlinuz-*"))
	if len(images) != 1 {
		return fmt.Errorf("%s: %d files match boot/vmlinuz-*; want 1", filepath.Base(debs[0]), len(images))
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	if _, err := deb.Run(ctx, temp, "depmod", "-b", tree, release); err != nil {
		return err
	}
	image, err := os.ReadFile(images[0])
	if err != nil {
		return err
	}
	elf, err := ExtractELF(ctx, image)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(images[0]), err)
	}
	if err := os.WriteFile(filepath.Join(tree, "boot/vmlinux-"+release), elf, 0o644); err != nil {
		return err
	}
	os.RemoveAll(entry) // an incomplete one is of an older layout
	if err := os.Rename(tree, entry); err != nil {
		return err
	}
	return k.locate(entry)
}
