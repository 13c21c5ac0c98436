package sys

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// GiveWay lets other processes have the processor before this one, from now on
// (nice(2), 10): for one that has only to end. It is never refused.
func GiveWay() error {
	const nice = 10
	// Linux has a priority for each thread; a new one inherits that of its
	// creator. So one that began meanwhile is seen the next time, and when there
	// was none, there will be none.
	for again := true; again; {
		again = false
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, t := range threads {
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				return err
			}
			have, err := Nice(tid)
			if err == nil && have < nice {
				again = true
				err = SetNice(tid, nice)
			}
			if err != nil && err != unix.ESRCH { // it has ended
				return err
			}
		}
	}
	return nil
}

// Nice is the nice value of a thread, -20 to 19; 0 is the calling one.
func Nice(tid int) (int, error) {
	n, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
	return niceTop - n, err
}

// niceTop is what the kernel takes nice values from (getpriority(2), RLIMIT_NICE).
const niceTop = 20

// Lower adds by to the nice value of a thread and says what it was, for SetNice.
// Where this process could not give it back, for want of RLIMIT_NICE and of
// CAP_SYS_NICE, or there is no such value, nothing is changed and the error is EPERM.
func Lower(tid, by int) (before int, err error) {
	if before, err = Nice(tid); err != nil {
		return before, err
	}
	if before+by >= niceTop {
		return before, unix.EPERM
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NICE, &limit); err != nil {
		return before, err
	}
	// Who may go up a step from here, which is undone at once, may come back here. A
	// capability is not asked for: in a namespace of users it says nothing.
	if uint64(niceTop-before) > limit.Cur && SetNice(tid, before-1) != nil {
		return before, unix.EPERM
	}
	return before, SetNice(tid, before+by)
}

// SetNice gives a thread a nice value (setpriority(2)).
func SetNice(tid, nice int) error { return unix.Setpriority(unix.PRIO_PROCESS, tid, nice) }

// CalmMonitor lets the thread with which Go's scheduler watches over threads in
// system calls (sysmon) sleep up to ten milliseconds longer than it asks for. It
// asks for 20 us at a time, and goes back to that whenever it has found a system
// call of 10 ms, which is what a vCPU is; and where there is a P for every thread,
// what it finds has no hurry. It needs CAP_SYS_NICE, and Linux 4.6.
//
// A thread has the slack of the one that creates it. So that this one need not
// create any, there are SpareThreads. Should it create one all the same, that one's
// timers are less exact, nothing worse.
func CalmMonitor() error {
	const slack = "10000000" // ns
	SpareThreads()
	tasks, err := os.Open("/proc/self/task")
	if err != nil {
		return err
	}
	defer tasks.Close()
	// The kernel lists threads in the order in which they began, and that one
	// begins before all but the main one.
	threads, err := tasks.Readdirnames(-1)
	if err != nil {
		return err
	}
	if len(threads) < 2 {
		return fmt.Errorf("/proc/self/task has the threads %v: no monitor", threads)
	}
	// Not below /proc/self/task: timerslack_ns is of each /proc/TID alone.
	f, err := os.OpenFile("/proc/"+threads[1]+"/timerslack_ns", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(slack)
	return errors.Join(err, f.Close())
}

// SpareThreads makes some threads, once, which are idle from then on. Creating
// them takes its time.
var SpareThreads = sync.OnceFunc(func() { makeThreads(spareThreads) })

// spareThreads is for system calls that block beside those of vCPUs and queue
// workers, which have their threads from others. It is a guess, on the safe side.
const spareThreads = 16

// makeThreads has n threads at one time, which Go then keeps.
func makeThreads(n int) {
	var there, gone sync.WaitGroup
	leave := make(chan struct{})
	for range n {
		there.Add(1)
		gone.Go(func() {
			runtime.LockOSThread() // meanwhile this thread is nobody else's
			defer runtime.UnlockOSThread()
			there.Done()
			<-leave
		})
	}
	there.Wait()
	close(leave)
	gone.Wait()
}
