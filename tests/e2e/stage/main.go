// Stage puts what the tests with guests need into a directory, which may then
// be shared with a lab host: for each stock kernel FLAVOUR/bzImage,
// FLAVOUR/vmlinux and FLAVOUR/initrd; the documentation and contrib, which
// tests do what they say; and programs.cpio, what those need of programs that a
// small host lacks, with their libraries. It runs in the repository's root.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"vmm/tests/guest"
	"vmm/tests/lab/deb"
	"vmm/tests/lab/initrd"
	"vmm/tests/lab/kernel"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: stage DIRECTORY")
		os.Exit(2)
	}
	if err := stage(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "stage:", err)
		os.Exit(1)
	}
}

func stage(ctx context.Context, dir string) error {
	for _, flavour := range kernel.Flavours {
		k, err := kernel.Find(ctx, flavour)
		if err != nil {
			return err
		}
		initrd, err := guest.Initrd(ctx, k)
		if err != nil {
			return err
		}
		for name, from := range map[string]string{"bzImage": k.BzImage, "vmlinux": k.VMLinux, "initrd": initrd} {
			if err := place(from, filepath.Join(dir, string(flavour), name)); err != nil {
				return err
			}
		}
	}
	for _, pattern := range []string{"README.md", "CHANGELOG.md", "docs/*.md", "docs/examples/*", "contrib/systemd/*"} {
		followed, err := filepath.Glob(pattern)
		if err != nil || len(followed) == 0 {
			return fmt.Errorf("%s: %d files, %v; start it in the repository's root", pattern, len(followed), err)
		}
		for _, path := range followed {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			to := filepath.Join(dir, path)
			if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(to, b, 0o644); err != nil {
				return err
			}
		}
	}
	return programs(filepath.Join(dir, "programs.cpio"))
}

// programs packs programs of this machine.
func programs(to string) error {
	var paths []string
	for name, pkg := range map[string]string{"curl": "curl", "install": "coreutils"} {
		path, err := exec.LookPath(name)
		if err != nil {
			return deb.NeedTool(name, pkg)
		}
		paths = append(paths, path)
	}
	var a initrd.Archive
	if err := a.Programs(paths...); err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = a.WriteTo(f)
	return errors.Join(err, f.Close())
}

// place links to a file, or copies it where no link can be made.
func place(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := os.Remove(to); err != nil && !os.IsNotExist(err) {
		return err
	}
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
