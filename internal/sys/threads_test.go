package sys

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// All threads give way, those that come later too.
func TestGiveWay(t *testing.T) {
	if os.Getenv("GIVE_WAY") == "" { // the priority of these tests stays what it is
		c := exec.Command(os.Args[0], "-test.run=^TestGiveWay$")
		c.Env = append(os.Environ(), "GIVE_WAY=1")
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	before, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	var threads sync.WaitGroup
	done := make(chan struct{})
	more := func(n int) {
		var up sync.WaitGroup
		for range n {
			up.Add(1)
			threads.Go(func() {
				runtime.LockOSThread()
				up.Done()
				<-done
			})
		}
		up.Wait()
	}
	more(5)
	if err := GiveWay(); err != nil {
		t.Error(err)
	}
	more(5)
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil || len(tasks) < 11 {
		t.Fatalf("%d threads, %v; want those that were begun", len(tasks), err)
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		// The system call's result is 20 less the nice value (getpriority(2)).
		if p, err := unix.Getpriority(unix.PRIO_PROCESS, tid); err != nil || p != min(before, 10) {
			t.Errorf("thread %d has priority %d, %v; want %d, before it was %d", tid, p, err, min(before, 10), before)
		}
	}
	close(done)
	threads.Wait()
}

// Where RLIMIT_NICE forbids the way back, and no capability allows it, there is
// none; and none that leads beyond the last value.
func TestCanRenice(t *testing.T) {
	before, err := Nice(0)
	if err != nil {
		t.Fatal(err)
	}
	if CanRenice(40) {
		t.Error("40 more are 19 at most, and cannot be taken away again")
	}
	if nice, err := Nice(0); nice != before || err != nil {
		t.Errorf("the nice value is %d, %v; before it was %d", nice, err, before)
	}
	if os.Getenv("CAN_RENICE") == "no" {
		if CanRenice(1) {
			t.Error("nobody may")
		}
		return
	}
	if os.Getuid() != 0 {
		t.Skip("only root is sure to be allowed to")
	}
	if !CanRenice(1) {
		t.Error("root may not")
	}
	c := exec.Command("/proc/self/exe", "-test.run=^TestCanRenice$", "-test.v")
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	c.Env = append(os.Environ(), "CAN_RENICE=no")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// The thread that is slowed down is the one that sleeps while all else works, and
// none that it has work done by when others are in system calls for long.
func TestCalmMonitor(t *testing.T) {
	err := CalmMonitor()
	if errors.Is(err, os.ErrPermission) && os.Getuid() != 0 {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	var blocked sync.WaitGroup
	var ends []int
	for range spareThreads / 2 {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		ends = append(ends, p[1])
		blocked.Go(func() {
			unix.Read(p[0], make([]byte, 1))
			unix.Close(p[0])
		})
	}
	for begun := time.Now(); time.Since(begun) < 100*time.Millisecond; { // work for those that have no thread
		runtime.Gosched()
	}
	for _, w := range ends {
		unix.Close(w)
	}
	blocked.Wait()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	var calm []string
	for _, task := range tasks {
		if slack, err := os.ReadFile("/proc/" + task.Name() + "/timerslack_ns"); err == nil && string(slack) == "10000000\n" {
			calm = append(calm, task.Name())
		}
	}
	if len(calm) != 1 {
		t.Fatalf("threads %v of %v sleep longer; want one", calm, tasks)
	}
	call := fmt.Sprint(unix.SYS_NANOSLEEP, " ")
	for deadline := time.Now().Add(10 * time.Second); ; {
		now, err := os.ReadFile("/proc/self/task/" + calm[0] + "/syscall")
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(string(now), call) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("thread %s does not sleep: its system call is %q", calm[0], now)
		}
	}
}
