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
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		for _, waiting := range []bool{true, false} {
			ctx, keep := s.context(t.Context())
			send := func() {
				t.Helper()
				if err := unix.Kill(os.Getpid(), sig); err != nil {
					t.Fatal(err)
				}
			}
			want := os.Signal(sig)
			if waiting {
				send()
				<-ctx.Done()
				want = syscall.SIGTERM // whichever it was
			}
			keep()
			if !waiting {
				send()
			}
			keep()
			if got := <-s; got != want {
				t.Errorf("%v, waiting %v: the guest gets %v; want %v", sig, waiting, got, want)
			}
			if len(s) > 0 {
				t.Errorf("%v, waiting %v: the guest gets %v as well", sig, waiting, <-s)
			}
		}
	}
}
