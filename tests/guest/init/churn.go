package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// slot is what churn writes to the disk at a time.
const slot = 64 << 10

// churn works the whole machine until SIGTERM, and checks all that it sees: a
// page or a block that is not what was last written there, a command that
// fails, a clock that goes back is the end, with an error that says where.
func churn(args []string) error {
	flags := flag.NewFlagSet("churn", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: churn [-memory BYTES] [-offset BYTES] [-size BYTES] [-rest DURATION] -count FILE DEVICE\nWrites and checks memory, a part of a disk and the clock until SIGTERM. FILE says how often.")
		flags.PrintDefaults()
	}
	memory := flags.Int("memory", 8<<20, "bytes of memory")
	offset := flags.Int64("offset", 0, "where on the disk, in bytes")
	size := flags.Int64("size", 1<<20, "how much of the disk, in bytes")
	rest := flags.Duration("rest", 20*time.Millisecond, "pause after each pass over the memory, and each write")
	count := flags.String("count", "", "file that says how often the memory and the disk have been written")
	flags.Parse(args)
	if flags.NArg() != 1 || *count == "" || *memory < os.Getpagesize() || *size < slot || *offset%blockSize != 0 {
		flags.Usage()
		os.Exit(2)
	}
	f, end, err := openDirect(flags.Arg(0), true)
	if err != nil {
		return err
	}
	defer f.Close()
	if *offset < 0 || *size > end-*offset {
		return fmt.Errorf("%s: bytes %d to %d of %d", f.Name(), *offset, *offset+*size, end)
	}
	counts, err := os.Create(*count)
	if err != nil {
		return err
	}
	defer counts.Close()
	var passes, writes atomic.Uint64
	var t clock
	failed := make(chan error, 2)
	go func() { failed <- churnMemory(*memory, *rest, &passes, &t) }()
	go func() {
		failed <- churnDisk(f, *offset, *size/slot, *rest, &t, func() error {
			_, err := counts.WriteAt(fmt.Appendf(nil, "%20d %20d\n", writes.Add(1), passes.Load()), 0)
			return err
		})
	}()
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	select {
	case err := <-failed:
		return err
	case <-term:
		return nil
	}
}

// clock is CLOCK_MONOTONIC, as far as anybody has seen it.
type clock struct{ latest atomic.Int64 }

func (c *clock) check() error {
	before := c.latest.Load()
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return err
	}
	now := t.Nano()
	if now < before {
		return fmt.Errorf("CLOCK_MONOTONIC went from %d back to %d ns", before, now)
	}
	for before < now && !c.latest.CompareAndSwap(before, now) {
		before = c.latest.Load()
	}
	return nil
}

// churnMemory writes all of its memory in each pass, and checks in the next
// that it is so still.
func churnMemory(size int, rest time.Duration, passes *atomic.Uint64, t *clock) error {
	page := os.Getpagesize()
	mem, err := alignedBuffer(size / page * page)
	if err != nil {
		return err
	}
	want := make([]byte, page)
	for pass := uint64(0); ; pass++ {
		for at := 0; at < len(mem); at += page {
			p := mem[at:][:page]
			if pass > 0 {
				pattern(want, int64(at), pass-1)
				if !bytes.Equal(p, want) {
					return fmt.Errorf("memory: the page at %#x is not what pass %d wrote", at, pass-1)
				}
			}
			pattern(p, int64(at), pass)
		}
		if err := t.check(); err != nil {
			return err
		}
		passes.Add(1)
		time.Sleep(rest)
	}
}

// churnDisk writes the slots in turn, each after it has checked what it wrote
// there last, and reads back what it has written.
func churnDisk(f *os.File, offset, slots int64, rest time.Duration, t *clock, wrote func() error) error {
	buf, err := alignedBuffer(slot)
	if err != nil {
		return err
	}
	want := make([]byte, slot)
	check := func(at int64, n uint64) error {
		pattern(want, at, n)
		if _, err := f.ReadAt(buf, at); err != nil {
			return err
		}
		if !bytes.Equal(buf, want) {
			return fmt.Errorf("%s: the %d bytes at %d are not what write %d wrote", f.Name(), slot, at, n)
		}
		return nil
	}
	for n := uint64(1); ; n++ {
		at := offset + int64(n)%slots*slot
		if n > uint64(slots) {
			if err := check(at, n-uint64(slots)); err != nil {
				return err
			}
		}
		pattern(buf, at, n)
		if _, err := f.WriteAt(buf, at); err != nil {
			return err
		}
		if err := errors.Join(check(at, n), t.check(), wrote()); err != nil {
			return err
		}
		time.Sleep(rest)
	}
}

// now prints the time, for whoever compares it with another clock.
func now([]string) error {
	_, err := fmt.Println(time.Now().UnixNano())
	return err
}
