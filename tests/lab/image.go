package lab

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"vmm/tests/lab/deb"
	"vmm/tests/lab/initrd"
	"vmm/tests/lab/kernel"
)

// bootModules are loaded before the host's agent answers. What they need
// comes with them.
var bootModules = []string{
	"virtio_pci", "virtio_console", "9pnet_virtio", "9p", "virtio_net",
	"kvm_amd",
	"sd_mod", "sg", "target_core_mod", "target_core_file", "tcm_loop",
}

// otherModules are in the image for modprobe.
var otherModules = []string{
	"scsi_debug", "crc32c_generic", "iscsi_target_mod", "iscsi_tcp",
	"target_core_iblock", "scsi_dh_alua", "dm_mod", "dm_multipath", "loop",
	"ext4", "overlay", "vhost_net", "tun",
}

// packages are the programs that the lab needs on the outer machine, and the
// Debian packages that have them.
var packages = [][2]string{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"busybox", "busybox-static"},
	{"sg_persist", "sg3-utils"},
	{"depmod", "kmod"},
	{"xz", "xz-utils"},
	{"ldd", "libc-bin"},
}

// Image returns the path of the initramfs of a lab host for a kernel, with an
// iSCSI initiator if that is wanted. It is built if the cache has none with the
// same contents.
func Image(ctx context.Context, k *kernel.Kernel, initiator bool) (string, error) {
	for _, p := range packages {
		if err := deb.NeedTool(p[0], p[1]); err != nil {
			return "", err
		}
	}
	var a initrd.Archive
	init, err := GoProgram(ctx, "vmm/tests/lab/init")
	if err != nil {
		return "", err
	}
	a.File("/init", 0o755, init)
	tools, err := filepath.Glob("/usr/bin/sg_*")
	if err != nil {
		return "", err
	}
	if err := a.Programs(tools...); err != nil {
		return "", err
	}
	if initiator {
		tree, err := deb.Unpack(ctx, "open-iscsi", "libopeniscsiusr")
		if err != nil {
			return "", err
		}
		if err := a.ProgramsFrom(tree, "/sbin/iscsistart"); err != nil {
			return "", err
		}
	}
	if err := a.Busybox(); err != nil {
		return "", err
	}
	tree, err := initrd.OpenTree(k.Modules)
	if err != nil {
		return "", err
	}
	if err := a.Modules(tree, bootModules, otherModules); err != nil {
		return "", err
	}
	a.Dir("/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/mnt", "/var/tmp")
	// The kernel's target keeps persistent reservations here (APTPL); it looks
	// when target_core_mod is loaded.
	a.Dir("/etc/target/pr", "/etc/target/alua")
	a.File("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	a.File("/etc/group", 0o644, []byte("root:x:0:\n"))
	a.File("/etc/profile", 0o644, []byte("PS1='\\h:\\w\\$ '\nalias ll='ls -l'\n"))
	a.File("/bin/outer", 0o755, []byte(`#!/bin/sh
# Runs a program of the outer machine, in its file system. /share is /mnt there.
exec chroot /outer "$@"
`))
	return Store(ctx, "host-"+k.Release, &a)
}

// Store puts an archive into the cache, under a name that has its contents'
// hash, and returns the path. Concurrent callers are safe.
func Store(ctx context.Context, name string, a *initrd.Archive) (string, error) {
	dir, err := deb.CacheDir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, name+"-"+a.Key()+".cpio")
	now := time.Now()
	if os.Chtimes(path, now, now) == nil {
		return path, nil
	}
	prune(filepath.Join(dir, name+"-*.cpio"), now.Add(-unused))
	temp, err := os.CreateTemp(dir, "tmp-image-")
	if err != nil {
		return "", err
	}
	defer os.Remove(temp.Name()) // no longer there if all went well
	w := bufio.NewWriterSize(temp, 1<<20)
	_, err = a.WriteTo(w)
	if err == nil {
		err = w.Flush()
	}
	if err2 := temp.Close(); err == nil {
		err = err2
	}
	if err == nil {
		err = os.Chmod(temp.Name(), 0o644)
	}
	if err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		return "", fmt.Errorf("lab: image %s: %w", path, err)
	}
	return path, nil
}

// unused is how long an image is kept that nobody asks for.
const unused = 24 * time.Hour

// prune removes the files that match pattern and were last used before a time.
// One that cannot be removed does no harm.
func prune(pattern string, before time.Time) {
	old, _ := filepath.Glob(pattern)
	for _, path := range old {
		if info, err := os.Stat(path); err == nil && info.ModTime().Before(before) {
			os.Remove(path)
		}
	}
}

// GoProgram builds a program of this module, static and reproducible, and
// returns its contents.
func GoProgram(ctx context.Context, pkg string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmm-lab-build-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "program")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	// The module is where this source file is, wherever the caller stands.
	if _, file, _, ok := runtime.Caller(0); ok && filepath.IsAbs(file) {
		if _, err := os.Stat(file); err == nil {
			cmd.Dir = filepath.Dir(file)
		}
	}
	if text, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("lab: go build %s: %w: %s", pkg, err, text)
	}
	return os.ReadFile(out)
}
