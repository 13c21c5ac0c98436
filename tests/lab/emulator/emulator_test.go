package emulator

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fake writes a program that answers --version.
func fake(t *testing.T, path, answer string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+answer+"'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFind(t *testing.T) {
	const old, recent = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", "QEMU emulator version 10.0.2 (Debian 1:10.0.2)"
	path := os.Getenv("PATH")
	for _, test := range []struct {
		name, named, installed string
		cache                  []string
		want                   string // Program, relative to the test's directory; or the error's words
		args                   int
	}{
		{name: "installed and new enough", installed: recent, cache: []string{recent}, want: "bin/qemu-system-x86_64"},
		{name: "installed and too old", installed: old, cache: []string{recent}, want: "cache/qemu-0/usr/bin/qemu-system-x86_64", args: 4},
		{name: "the newest of the cache", installed: old, cache: []string{"QEMU emulator version 9.2.0", recent, old}, want: "cache/qemu-1/usr/bin/qemu-system-x86_64", args: 4},
		{name: "named", named: "QEMU emulator version 11.1.0", installed: recent, want: "named"},
		{name: "named, of any age", named: old, installed: recent, want: "named"},
		{name: "named, something else", named: "busybox", want: `says "busybox"; want QEMU's`},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("VMM_LAB_CACHE", filepath.Join(dir, "cache"))
			t.Setenv("PATH", filepath.Join(dir, "bin")+":"+path)
			t.Setenv("VMM_LAB_QEMU", "")
			if test.named != "" {
				t.Setenv("VMM_LAB_QEMU", fake(t, filepath.Join(dir, "named"), test.named))
			}
			if test.installed != "" {
				fake(t, filepath.Join(dir, "bin", program), test.installed)
			}
			for i, answer := range test.cache {
				fake(t, filepath.Join(dir, "cache", "qemu-"+string(rune('0'+i)), "usr/bin", program), answer)
			}
			q, err := Find(t.Context())
			if err != nil {
				if !strings.Contains(err.Error(), test.want) {
					t.Errorf("Find() = %v; want %s", err, test.want)
				}
				return
			}
			if got, _ := filepath.Rel(dir, q.Program); got != test.want || len(q.Args) != test.args {
				t.Errorf("Find() = %s %v; want %s and %d arguments", got, q.Args, test.want, test.args)
			}
		})
	}
}

// Who gives up while programs are asked hears why, not what the programs did
// not say.
func TestFindInTime(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("VMM_LAB_CACHE", dir)
	t.Setenv("VMM_LAB_QEMU", "")
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	fake(t, filepath.Join(dir, program), "QEMU emulator version 10.0.2")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("too slow"))
	if q, err := Find(ctx); err == nil || !strings.Contains(err.Error(), "too slow") {
		t.Errorf("Find() = %v, %v; want the cause", q, err)
	}
}

func TestVersionLess(t *testing.T) {
	for _, test := range []struct {
		a, b Version
		want bool
	}{
		{Version{7, 2}, Version{8, 1}, true},
		{Version{8, 0}, Version{8, 1}, true},
		{Version{8, 1}, Version{8, 1}, false},
		{Version{10, 0}, Version{8, 1}, false},
	} {
		if got := test.a.Less(test.b); got != test.want {
			t.Errorf("%v.Less(%v) = %v; want %v", test.a, test.b, got, test.want)
		}
	}
}
