package sys

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// GiveWay lets other processes have the processor before this one, from now on
// (nice(2), 10): for one that has only to end. It is never refused.
func GiveWay() error {
	const nice = 10
	// Linux has a priority for each thread; a new one inherits that of its
	// creator.
	threads, err := os.ReadDir("/proc/self/task")
	for _, t := range threads {
		tid, perr := strconv.Atoi(t.Name())
		if perr == nil {
			perr = unix.Setpriority(unix.PRIO_PROCESS, tid, nice)
		}
		if perr != nil && !errors.Is(perr, unix.ESRCH) { // it has ended
			err = errors.Join(err, perr)
		}
	}
	return err
}
