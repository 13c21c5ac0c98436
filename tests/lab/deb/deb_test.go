package deb

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Lock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Lock of what is locked = %v; want the deadline", err)
	}
	unlock()
	unlock, err = Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestNeedTool(t *testing.T) {
	if err := NeedTool("sh", "dash"); err != nil {
		t.Error(err)
	}
	err := NeedTool("no-such-tool", "no-such-package")
	if want := "lab: no-such-tool is missing; install it: apt-get install --no-install-recommends no-such-package"; err == nil || err.Error() != want {
		t.Errorf("NeedTool = %v; want %s", err, want)
	}
}

func TestCacheDir(t *testing.T) {
	t.Setenv("VMM_LAB_CACHE", "")
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	dir, err := CacheDir()
	if want := filepath.Join(os.Getenv("XDG_CACHE_HOME"), "vmm-lab"); err != nil || dir != want {
		t.Errorf("CacheDir() = %s, %v; want %s", dir, err, want)
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		t.Errorf("CacheDir() is no directory: %v", err)
	}
}
