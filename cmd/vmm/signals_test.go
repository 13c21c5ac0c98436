package main

import (
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A signal that comes while a guest is waited for ends the waiting; if the
// guest has come all the same, it is the guest's, as those are that come later.
func TestStopSignals(t *testing.T) {
	s := catchStop()
	defer s.release()
	for _, waiting := range []bool{true, false} {
		ctx, keep := s.context(t.Context())
		if waiting {
			if err := unix.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			<-ctx.Done()
		}
		keep()
		if !waiting {
			if err := unix.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
		}
		keep()
		if got := <-s; got != syscall.SIGHUP {
			t.Errorf("waiting %v: the guest gets %v; want SIGHUP", waiting, got)
		}
		select {
		case got := <-s:
			t.Errorf("waiting %v: the guest gets %v as well", waiting, got)
		default:
		}
	}
}
