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

// Nice is the nice value of a thread, -20 to 19; 0 is the calling one.
func Nice(tid int) (int, error) {
	const top = 20 // which the system call takes it from (getpriority(2))
	n, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
	return top - n, err
}

// CanRenice says whether this process may add by to a thread's nice value and take
// it away again: that is for CAP_SYS_NICE or RLIMIT_NICE to allow.
func CanRenice(by int) bool {
	can := make(chan bool)
	go func() {
		runtime.LockOSThread() // to the end: the thread goes with it
		before, err := Nice(0)
		if err == nil {
			err = unix.Setpriority(unix.PRIO_PROCESS, 0, before+by)
		}
		after, nerr := Nice(0)
		can <- errors.Join(err, nerr) == nil && after == before+by && unix.Setpriority(unix.PRIO_PROCESS, 0, before) == nil
	}()
	return <-can
}

// CalmMonitor lets the thread with which Go's scheduler watches over threads in
// system calls (sysmon) sleep up to ten milliseconds longer than it asks for. It
// asks for 20 us at a time, and goes back to that whenever it has found a system
// call of 10 ms, which is what a vCPU is; and where there is a P for every thread,
// what it finds has no hurry. It needs CAP_SYS_NICE, and Linux 4.6.
//
// A thread has the slack of the one that creates it. So that this one need not
// create any, there are some more threads from now on, which are idle. Should it
// create one all the same, that one's timers are less exact, nothing worse. Later
// calls answer what the first one did.
func CalmMonitor() error { return calmed() }

var calmed = sync.OnceValue(func() error {
	const slack = "10000000" // ns
	makeThreads(spareThreads)
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
})

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
