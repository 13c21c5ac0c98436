package lio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// debugDriver is where scsi_debug shows its parameters and its hosts.
const debugDriver = "/sys/bus/pseudo/drivers/scsi_debug"

// Bits of scsi_debug's opts (drivers/scsi/scsi_debug.c, SDEBUG_OPT_*).
const (
	OptNoise       = 1
	OptMediumError = 2      // reads of the blocks from 0x1234 on (medium_error_start, _count) fail: MEDIUM ERROR
	OptTimeout     = 4      // every every_nth-th command is not answered
	OptRecovered   = 8      // every every_nth-th: RECOVERED ERROR
	OptTransport   = 16     // every every_nth-th: ABORTED COMMAND, ACK/NAK TIMEOUT
	OptShortRead   = 128    // every every_nth-th read is shortened to half
	OptHostBusy    = 0x8000 // every every_nth-th: host busy
)

// Debug is a loaded scsi_debug: simulated disks that share one memory, without
// reservations, but with delays, odd block sizes and errors on demand.
type Debug struct {
	Devices []Device
}

// LoadDebug loads scsi_debug with parameters such as "delay=100",
// "sector_size=4096", "dev_size_mb=64", and waits for its disks (num_tgts ×
// max_luns × add_host of them, one by default). Only one can be loaded.
func LoadDebug(ctx context.Context, params ...string) (*Debug, error) {
	if _, err := os.Stat(debugDriver); err == nil {
		return nil, errors.New("lio: scsi_debug is loaded already")
	}
	for _, module := range []string{"sd_mod", "sg"} {
		if err := modprobe(module); err != nil {
			return nil, err
		}
	}
	if err := modprobe(append([]string{"scsi_debug"}, params...)...); err != nil {
		return nil, err
	}
	d := &Debug{}
	if err := d.find(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Debug) find(ctx context.Context) error {
	want := int64(1)
	for _, name := range []string{"add_host", "num_tgts", "max_luns"} {
		n, err := readInt(filepath.Join(debugDriver, name))
		if err != nil {
			return fmt.Errorf("lio: scsi_debug: %w", err)
		}
		want *= n
	}
	var found []string
	err := waitUevent(ctx, func() (bool, error) {
		found = nil
		paths, err := filepath.Glob("/sys/bus/pseudo/devices/adapter*/host*/target*/*:*:*:*")
		for _, path := range paths {
			found = append(found, filepath.Base(path))
		}
		return int64(len(found)) >= want, err
	})
	if err != nil {
		return fmt.Errorf("lio: wait for %d disks of scsi_debug, found %v: %w", want, found, err)
	}
	slices.Sort(found)
	for _, hctl := range found {
		device, err := WaitDevice(ctx, hctl)
		if err != nil {
			return err
		}
		d.Devices = append(d.Devices, device)
	}
	return nil
}

// Set changes a parameter of the loaded driver: opts, every_nth, delay,
// ndelay ...
func (d *Debug) Set(name, value string) error {
	if err := write(filepath.Join(debugDriver, name), value); err != nil {
		return fmt.Errorf("lio: scsi_debug: %w", err)
	}
	return nil
}

// Inject makes the driver misbehave as the Opt bits say, each nth command
// where they depend on it; no bits: it behaves.
func (d *Debug) Inject(opts, nth int) error {
	if err := d.Set("every_nth", fmt.Sprint(nth)); err != nil {
		return err
	}
	return d.Set("opts", fmt.Sprintf("%#x", opts))
}

// Close unloads the driver. Its disks must not be in use.
func (d *Debug) Close() error {
	err := unix.DeleteModule("scsi_debug", unix.O_NONBLOCK)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		users := ""
		for _, device := range d.Devices {
			users += " " + strings.TrimPrefix(device.Block, "/dev/")
		}
		return fmt.Errorf("lio: unload scsi_debug (disks%s): %w", users, err)
	}
	return nil
}
