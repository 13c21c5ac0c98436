package main

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

var errEnough = errors.New("enough")

func TestChurnDisk(t *testing.T) {
	const slots = 4
	for _, tt := range []struct {
		name  string
		after func(f *os.File, c *clock, writes int) error
		want  string
	}{
		{"a good disk", func(_ *os.File, _ *clock, n int) error {
			if n == 3*slots {
				return errEnough
			}
			return nil
		}, "enough"},
		{"a block that changes", func(f *os.File, _ *clock, n int) error {
			if n == slots {
				_, err := f.WriteAt([]byte{0}, blockSize+2*slot+12345)
				return err
			}
			return nil
		}, "are not what write 2 wrote"},
		{"a clock that goes back", func(_ *os.File, c *clock, n int) error {
			c.latest.Store(math.MaxInt64)
			return nil
		}, "CLOCK_MONOTONIC went from"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(blockSize + slots*slot); err != nil {
				t.Fatal(err)
			}
			var c clock
			n := 0
			err = churnDisk(f, blockSize, slots, 0, &c, func() error { n++; return tt.after(f, &c, n) })
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("churnDisk = %v after %d writes; want %q", err, n, tt.want)
			}
		})
	}
}

func TestChurnMemory(t *testing.T) {
	var c clock
	c.latest.Store(math.MaxInt64)
	var passes atomic.Uint64
	if err := churnMemory(1<<20, 0, &passes, &c); err == nil || passes.Load() != 0 {
		t.Errorf("churnMemory = %v after %d passes; want an error of the clock", err, passes.Load())
	}
}
