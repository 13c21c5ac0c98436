// Package deb takes what the lab needs out of Debian's packages, without
// installing them: it asks apt, unpacks into a cache, and locks the cache's
// entries.
package deb

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CacheDir returns the directory that keeps what is expensive to make: the
// environment's VMM_LAB_CACHE, /var/cache/vmm-lab for root, otherwise vmm-lab
// in the user's cache directory. It exists afterwards.
func CacheDir() (string, error) {
	dir := os.Getenv("VMM_LAB_CACHE")
	if dir == "" && os.Getuid() == 0 && os.Getenv("XDG_CACHE_HOME") == "" {
		dir = "/var/cache/vmm-lab"
	}
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("lab: no cache directory (set VMM_LAB_CACHE): %w", err)
		}
		dir = filepath.Join(user, "vmm-lab")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// NeedTool returns an error that says how to install a program that is
// missing.
func NeedTool(program, pkg string) error {
	if _, err := exec.LookPath(program); err == nil {
		return nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} { // not in every user's PATH
		if _, err := os.Stat(dir + program); err == nil {
			return nil
		}
	}
	return fmt.Errorf("lab: %s is missing; install it: apt-get install --no-install-recommends %s", program, pkg)
}

// Lock takes an exclusive lock on a file, which is made if it does not exist,
// and returns the function that gives it up.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if err != unix.EINTR {
				got <- err
				return
			}
		}
	}()
	select {
	case err = <-got:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("flock %s: %w", path, err)
		}
		return func() { f.Close() }, nil
	case <-ctx.Done():
		go func() { <-got; f.Close() }()
		return nil, fmt.Errorf("waiting for the lock %s: %w", path, context.Cause(ctx))
	}
}

// Candidate returns the version of a package that apt would install.
func Candidate(ctx context.Context, pkg string) (string, error) {
	out, err := Run(ctx, "", "apt-cache", "--no-all-versions", "show", pkg)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(out)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Version: "); ok {
			return v, nil
		}
	}
	return "", fmt.Errorf("apt-cache show %s names no version", pkg)
}

// Unpack returns a directory that has the contents of packages, from the cache
// or fetched into it: complete or not at all. The first one's version is that
// of the cache's entry; where apt knows none, any entry will do.
func Unpack(ctx context.Context, packages ...string) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	prefix := filepath.Join(cache, "deb-"+packages[0]+"_")
	version, err := Candidate(ctx, packages[0])
	if err != nil {
		if found, _ := filepath.Glob(prefix + "*"); len(found) > 0 {
			return found[len(found)-1], nil
		}
		return "", fmt.Errorf("lab: package %s: %w (is this Debian? try: apt-get update)", packages[0], err)
	}
	entry := prefix + strings.ReplaceAll(version, ":", "%3a")
	unlock, err := Lock(ctx, filepath.Join(cache, "deb-"+packages[0]+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(entry); err == nil {
		return entry, nil
	}
	temp, err := os.MkdirTemp(cache, "tmp-deb-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	// As root, apt would drop to a user that cannot write here, and warn.
	download := append([]string{"-qq", "-o", "APT::Sandbox::User=root", "download"}, packages...)
	if _, err := Run(ctx, temp, "apt-get", download...); err != nil {
		return "", fmt.Errorf("lab: %w (package lists may be out of date; try: apt-get update)", err)
	}
	debs, _ := filepath.Glob(filepath.Join(temp, "*.deb"))
	if len(debs) != len(packages) {
		return "", fmt.Errorf("lab: apt-get download %s: %d packages came; want %d", strings.Join(packages, " "), len(debs), len(packages))
	}
	tree := filepath.Join(temp, "tree")
	for _, file := range debs {
		if _, err := Run(ctx, temp, "dpkg-deb", "-x", file, tree); err != nil {
			return "", err
		}
	}
	return entry, os.Rename(tree, entry)
}

// Run runs a program in a directory and returns its standard output; an error has the
// standard error's text.
func Run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	if path := "/usr/sbin/" + name; name == "depmod" {
		if _, err := exec.LookPath(name); err != nil {
			name = path
		}
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
