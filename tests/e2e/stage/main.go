// Stage puts what the tests with guests need into a directory, which may then
// be shared with a lab host: for each stock kernel FLAVOUR/bzImage,
// FLAVOUR/vmlinux and FLAVOUR/initrd.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"vmm/tests/guest"
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
	return nil
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
