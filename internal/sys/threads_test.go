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

// A thread is lowered where it can be raised again, to where it was: root may, with
// CAP_SYS_NICE, and nobody as far as RLIMIT_NICE goes.
func TestLower(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := Nice(0)
	if err != nil {
		t.Fatal(err)
	}
	lower := func(by int, may bool) {
		t.Helper()
		was, err := Lower(0, by)
		now, nerr := Nice(0)
		if nerr != nil {
			t.Fatal(nerr)
		}
		if may && (err != nil || was != before || now != before+by) || !may && (err != unix.EPERM || now != before) {
			t.Errorf("Lower(%d) = %d, %v, and the nice value is %d; before it was %d; want it to go: %v", by, was, err, now, before, may)
		}
		if err := SetNice(0, before); err != nil {
			t.Errorf("there is no way back: %v", err)
		}
	}
	lower(20-before, false)
	if role := os.Getenv("LOWER"); role != "" {
		lower(5, role == "allowed")
		return
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	var capabilities uint64
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "CapEff: %x", &capabilities)
	}
	if need := uint64(1<<unix.CAP_SYS_NICE | 1<<unix.CAP_SYS_RESOURCE | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID); capabilities&need != need {
		t.Skip("only root can be everybody here")
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NICE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NICE, &limit)
	for role, nice := range map[string]uint64{"forbidden": 0, "allowed": uint64(20 - before)} {
		if err := unix.Setrlimit(unix.RLIMIT_NICE, &unix.Rlimit{Cur: nice, Max: nice}); err != nil {
			t.Fatal(err)
		}
		lower(5, true)
		c := exec.Command("/proc/self/exe", "-test.run=^TestLower$", "-test.v")
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		c.Env = append(os.Environ(), "LOWER="+role)
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestLower") {
			t.Errorf("%s: %v: %s", role, err, out)
		}
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
