// Package emulator finds the QEMU that a lab host runs under. Before 8.1 a
// nested guest's XSETBV changes its host's registers behind KVM's back, so a
// machine whose own QEMU is older gets a newer one out of Debian's backports,
// unpacked into the lab's cache and not installed. (Newer ones, too, lose an
// interrupt or a host now and then: see lab's nudge and scripts/guests.)
package emulator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"vmm/tests/lab/deb"
)

// QEMU is an emulator that can be started.
type QEMU struct {
	Program string
	Args    []string // before all others: where its own files are
	Version Version
}

// Version is a release of QEMU.
type Version struct{ Major, Minor int }

func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// Oldest is the first release that lets a hypervisor intercept XSETBV.
var Oldest = Version{8, 1}

// Less says whether v is older than w.
func (v Version) Less(w Version) bool {
	return v.Major < w.Major || v.Major == w.Major && v.Minor < w.Minor
}

const program = "qemu-system-x86_64"

// Find returns the environment's VMM_LAB_QEMU; else the installed QEMU if it
// is new enough; else one from the cache, or fetched into it.
func Find(ctx context.Context) (*QEMU, error) {
	q, err := find(ctx)
	if err != nil && ctx.Err() != nil { // then each program that was asked failed, and says nothing of itself
		return nil, fmt.Errorf("lab: look for a QEMU: %w", context.Cause(ctx))
	}
	return q, err
}

func find(ctx context.Context) (*QEMU, error) {
	if path := os.Getenv("VMM_LAB_QEMU"); path != "" {
		return try(ctx, path)
	}
	if path, err := exec.LookPath(program); err == nil {
		if q, err := try(ctx, path); err == nil && !q.Version.Less(Oldest) {
			return q, nil
		}
	}
	dir, err := deb.CacheDir()
	if err != nil {
		return nil, err
	}
	unlock, err := deb.Lock(ctx, filepath.Join(dir, "qemu.lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if q := cached(ctx, dir); q != nil {
		return q, nil
	}
	if err := fetch(ctx, dir); err != nil {
		return nil, fmt.Errorf("lab: no QEMU of release %v or newer is installed, and none could be fetched: %w (name one in VMM_LAB_QEMU)", Oldest, err)
	}
	if q := cached(ctx, dir); q != nil {
		return q, nil
	}
	return nil, fmt.Errorf("lab: the QEMU fetched into %s does not run: install the libraries of Debian's qemu-system-x86", dir)
}

var release = regexp.MustCompile(`QEMU emulator version (\d+)\.(\d+)`)

// try asks a program for its release.
func try(ctx context.Context, path string, args ...string) (*QEMU, error) {
	out, err := deb.Run(ctx, "", path, "--version")
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	m := release.FindSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("lab: %s --version says %q; want QEMU's", path, strings.TrimSpace(string(out)))
	}
	major, _ := strconv.Atoi(string(m[1]))
	minor, _ := strconv.Atoi(string(m[2]))
	return &QEMU{path, args, Version{major, minor}}, nil
}

// packages hold the program, its firmware and its option ROMs.
var packages = []string{"qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"}

// cached returns the newest QEMU in the cache that runs, or nil.
func cached(ctx context.Context, dir string) *QEMU {
	var best *QEMU
	trees, _ := filepath.Glob(filepath.Join(dir, "qemu-*", "usr"))
	for _, usr := range trees {
		q, err := try(ctx, filepath.Join(usr, "bin", program),
			"-L", filepath.Join(usr, "share/qemu"), "-L", filepath.Join(usr, "share/seabios"))
		if err == nil && !q.Version.Less(Oldest) && (best == nil || best.Version.Less(q.Version)) {
			best = q
		}
	}
	return best
}

// fetch unpacks a QEMU from the backports of this machine's Debian into the
// cache: complete or not at all.
func fetch(ctx context.Context, dir string) error {
	suite, uri, err := backports(ctx)
	if err != nil {
		return err
	}
	temp, err := os.MkdirTemp(dir, "tmp-qemu-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	if err := os.MkdirAll(filepath.Join(temp, "lists/partial"), 0o755); err != nil {
		return err
	}
	source := fmt.Sprintf("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", uri, suite)
	if err := os.WriteFile(filepath.Join(temp, "source.list"), []byte(source), 0o644); err != nil {
		return err
	}
	// A package list of our own: the machine's stays as it is.
	apt := func(args ...string) error {
		_, err := deb.Run(ctx, temp, "apt-get", append([]string{"-qq",
			// As root, apt would drop to a user that cannot write here.
			"-o", "APT::Sandbox::User=root",
			"-o", "Dir::Etc::SourceList=" + filepath.Join(temp, "source.list"),
			"-o", "Dir::Etc::SourceParts=/dev/null",
			"-o", "Dir::State::Lists=" + filepath.Join(temp, "lists"),
			"-o", "Dir::Cache::PkgCache=", "-o", "Dir::Cache::SrcPkgCache=",
		}, args...)...)
		return err
	}
	if err := apt("update"); err != nil {
		return err
	}
	// Dependent packages name the release that they need: take those of the suite.
	download := []string{"download"}
	for _, p := range packages {
		download = append(download, p+"/"+suite)
	}
	if err := apt(download...); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(temp, "*.deb"))
	if len(debs) != len(packages) {
		return fmt.Errorf("%d packages came from %s; want %d", len(debs), suite, len(packages))
	}
	tree := filepath.Join(temp, "tree")
	for _, d := range debs {
		if _, err := deb.Run(ctx, temp, "dpkg-deb", "-x", d, tree); err != nil {
			return err
		}
	}
	i := slices.IndexFunc(debs, func(d string) bool { return strings.HasPrefix(filepath.Base(d), "qemu-system-x86_") })
	_, version, _ := strings.Cut(strings.TrimSuffix(filepath.Base(debs[i]), ".deb"), "_")
	return os.Rename(tree, filepath.Join(dir, "qemu-"+version))
}

// backports returns the suite with newer packages for this machine's Debian,
// and the archive that apt is configured to take Debian from.
func backports(ctx context.Context) (suite, uri string, err error) {
	out, err := deb.Run(ctx, "", "apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)",
		"Created-By: Packages", "Component: main", "Origin: Debian")
	if err != nil {
		return "", "", err
	}
	codename, err := deb.Run(ctx, "", "sh", "-c", ". /etc/os-release && echo $VERSION_CODENAME")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(string(out)) {
		name, uri, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == strings.TrimSpace(string(codename)) {
			return name + "-backports", uri, nil
		}
	}
	return "", "", errors.New("apt has no package list of Debian's main component for this release (try: apt-get update)")
}
