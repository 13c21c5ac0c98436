package control

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
)

// A process of its own claims a name, or one that ends in .incoming as who waits
// for that, and waits to be killed.
func TestMain(m *testing.M) {
	if name := os.Getenv("CONTROL_TEST_CLAIM"); name != "" {
		dir := RunDir(os.Getenv("CONTROL_TEST_DIR"))
		take := dir.Claim
		name, awaited := strings.CutSuffix(name, incoming)
		if awaited {
			take = func(name string) (*Claim, error) { return dir.Await(name, false) }
		}
		claim, err := take(name)
		end := make(chan os.Signal, 1)
		signal.Notify(end, os.Interrupt) // a process that waits for nothing at all is ended as deadlocked
		fmt.Println(err)
		<-end
		runtime.KeepAlive(claim) // collected, its lock would be given up
	}
	os.Exit(m.Run())
}

// otherProcess claims name in dir.
func otherProcess(t *testing.T, dir RunDir, name string) *exec.Cmd {
	t.Helper()
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), "CONTROL_TEST_CLAIM="+name, "CONTROL_TEST_DIR="+string(dir))
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "<nil>\n" {
		t.Fatalf("the other process says %q, %v", line, err)
	}
	return c
}

func TestNameIsTakenOnce(t *testing.T) {
	dir := runDir(t)
	other := otherProcess(t, dir, "web1")
	_, err := dir.Claim("web1")
	if want := fmt.Sprintf("(pid %d)", other.Process.Pid); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), want) {
		t.Errorf("Claim() = %v; want %q", err, want)
	}
	list, err := dir.List()
	if err != nil || len(list) != 1 || list[0] != (Running{"web1", other.Process.Pid, false}) {
		t.Errorf("List() = %v, %v", list, err)
	}
	if c, err := dir.Dial("web1"); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	info, err := os.Stat(dir.Socket("web1"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", info.Mode(), err)
	}

	// Dead, it leaves its files behind; they hide nothing and bind nobody.
	other.Process.Kill()
	other.Wait()
	if _, err := os.Stat(dir.Socket("web1")); err != nil {
		t.Fatalf("a process that was killed left no socket: this test tests nothing: %v", err)
	}
	if _, err := dir.Dial("web1"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Dial() = %v; want ErrNotRunning", err)
	}
	c, err := dir.Claim("web1")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := dir.Dial("web1"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Dial() after Close = %v; want ErrNotRunning", err)
	}
}

// A guest that is waited for is one guest, before it comes, while it arrives
// and when it is there; its name is nobody else's meanwhile.
func TestAwaitedName(t *testing.T) {
	dir := runDir(t)
	one := func(when string, pid int, awaited bool) {
		t.Helper()
		list, err := dir.List()
		if err != nil || len(list) != 1 || list[0] != (Running{"web1", pid, awaited}) {
			t.Errorf("%s: List() = %v, %v; want web1, awaited %v", when, list, err, awaited)
		}
		c, err := dir.Dial("web1")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if c.Name() != "web1" || c.Awaited() != awaited {
			t.Errorf("%s: Dial() = %s, awaited %v; want web1, %v", when, c.Name(), c.Awaited(), awaited)
		}
	}
	in, err := dir.Await("web1", false)
	if err != nil {
		t.Fatal(err)
	}
	one("before it comes", os.Getpid(), true)
	if _, err := dir.Await("web1", false); !errors.Is(err, ErrAwaited) {
		t.Errorf("Await() twice = %v; want ErrAwaited", err)
	}
	here, err := dir.Claim("web1")
	if err != nil {
		t.Fatal(err)
	}
	one("while it arrives", os.Getpid(), true)
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	one("when it is there", os.Getpid(), false)
	if err := here.Close(); err != nil {
		t.Error(err)
	}

	other := otherProcess(t, dir, "web1"+incoming)
	one("another process", other.Process.Pid, true)
	want := fmt.Sprintf("guest web1 is waited for already (pid %d)", other.Process.Pid)
	if _, err := dir.Claim("web1"); !errors.Is(err, ErrAwaited) || !strings.Contains(err.Error(), want) {
		t.Errorf("Claim() of a name that another awaits = %v; want %q", err, want)
	}
	other.Process.Kill()
	other.Wait()
	other = otherProcess(t, dir, "web1")
	one("another guest", other.Process.Pid, false)
	if _, err := dir.Await("web1", false); !errors.Is(err, ErrRunning) {
		t.Errorf("Await() of one that runs = %v; want ErrRunning", err)
	}
	other.Process.Kill()
	other.Wait()
	if list, err := dir.List(); err != nil || len(list) != 0 {
		t.Errorf("List() = %v, %v; want nobody", list, err)
	}
	if left, _ := filepath.Glob(string(dir) + "/web1*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestListCleansUp(t *testing.T) {
	dir := runDir(t)
	var wait sync.WaitGroup
	for i := range 6 {
		p := otherProcess(t, dir, fmt.Sprintf("vm%d", i))
		if i%2 == 0 {
			wait.Go(func() { p.Process.Kill(); p.Wait() })
		}
	}
	wait.Wait()
	list, err := dir.List()
	if err != nil || len(list) != 3 || list[0].Name != "vm1" || list[2].Name != "vm5" {
		t.Errorf("List() = %v, %v; want vm1, vm3, vm5", list, err)
	}
	if left, _ := filepath.Glob(string(dir) + "/vm[024]*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if live, _ := filepath.Glob(string(dir) + "/vm[135].sock"); len(live) != 3 {
		t.Errorf("sockets of the living: %v", live)
	}
}

// Of many that want one name at the same time, with others that list and
// clean up all the while, exactly one has it at any moment.
func TestClaimRaces(t *testing.T) {
	dir := runDir(t)
	var mu sync.Mutex
	holding, got := 0, 0
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for range 50 {
				c, err := dir.Claim("web1")
				if errors.Is(err, ErrRunning) {
					continue
				} else if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if holding++; holding > 1 {
					t.Errorf("%d hold one name", holding)
				}
				got++
				mu.Unlock()
				if conn, err := net.Dial("unix", dir.Socket("web1")); err != nil {
					t.Errorf("the holder's socket: %v", err)
				} else {
					conn.Close()
				}
				mu.Lock()
				holding--
				mu.Unlock()
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}
		})
		wait.Go(func() {
			for range 50 {
				if _, err := dir.List(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	if got == 0 {
		t.Error("nobody ever had the name")
	}
}

func TestRefusedNames(t *testing.T) {
	dir := runDir(t)
	for name, want := range map[string]string{
		"":                      "give 1 to 64 letters",
		"../x":                  "give 1 to 64 letters",
		".hidden":               "give 1 to 64 letters",
		"-rf":                   "give 1 to 64 letters",
		strings.Repeat("x", 65): "give 1 to 64 letters",
		"web1.incoming":         "on their way here",
	} {
		if err := ValidName(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ValidName(%q) = %v; want %q", name, err, want)
		}
		if _, err := dir.Dial(name); err == nil {
			t.Errorf("Dial(%q) succeeded", name)
		}
	}
	long := RunDir(filepath.Join(string(dir), strings.Repeat("d", 100)))
	if err := os.Mkdir(string(long), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := long.Claim("web1"); err == nil || !strings.Contains(err.Error(), "a unix socket's at most 107") {
		t.Errorf("Claim() in a long directory = %v", err)
	}
	if left, _ := filepath.Glob(string(long) + "/web1*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDefaultRunDir(t *testing.T) {
	dir := string(runDir(t))
	t.Setenv("VMM_RUN_DIR", filepath.Join(dir, "run"))
	got, err := DefaultRunDir()
	if err != nil || string(got) != filepath.Join(dir, "run") {
		t.Fatalf("DefaultRunDir() = %v, %v", got, err)
	}
	if info, err := os.Stat(string(got)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v; want mode 0700", info.Mode(), err)
	}
	os.Chmod(string(got), 0o777)
	if _, err := DefaultRunDir(); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("DefaultRunDir() of a directory that all can write to = %v", err)
	}
}

// A socket whose process is alive and does not answer is no dead machine's.
func TestExplain(t *testing.T) {
	dir := runDir(t)
	claim, err := dir.Claim("web1")
	if err != nil {
		t.Fatal(err)
	}
	c, err := dir.Dial("web1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	claim.listener.Close()
	_, err = c.Status(t.Context(), request(&vmmv1.StatusRequest{}))
	if got := c.Explain(err); err == nil || !strings.Contains(got.Error(), "just starting or ending") {
		t.Errorf("a socket that does not listen: %v", got)
	}
	if err := claim.Close(); err != nil {
		t.Error(err)
	}
	_, err = c.Status(t.Context(), request(&vmmv1.StatusRequest{}))
	if got := c.Explain(err); !errors.Is(got, ErrNotRunning) {
		t.Errorf("a machine that has gone: %v", got)
	}
}

// answers says whether whoever connects to name's socket reaches c.
func answers(t *testing.T, c *Claim, name string) bool {
	t.Helper()
	conn, err := net.Dial("unix", c.dir.Socket(name))
	if err != nil {
		t.Errorf("nobody listens: %v", err)
		return false
	}
	defer conn.Close()
	// A connection is in the queue of its listener before connect returns.
	if err := c.listener.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	got, err := c.listener.Accept()
	if err != nil {
		return false
	}
	got.Close()
	return true
}

// A guest that changes its process keeps its name: somebody answers all the
// time, nobody else gets the name, and the old process removes nothing of the
// new one's.
func TestNameIsInherited(t *testing.T) {
	dir := runDir(t)
	files := func() (left []string) {
		all, _ := filepath.Glob(string(dir) + "/web1*")
		for _, path := range all {
			left = append(left, filepath.Base(path))
		}
		return left
	}
	third := func(when string) {
		t.Helper()
		if c, err := dir.Claim("web1"); !errors.Is(err, ErrRunning) {
			t.Errorf("%s: Claim() of a third = %v, %v; want ErrRunning", when, c, err)
		}
	}
	old, err := dir.Claim("web1")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		// One that comes to nothing leaves all as it was.
		next, err := dir.Inherit("web1", old.Share())
		if err != nil {
			t.Fatal(err)
		}
		third("while both have it")
		if !answers(t, old, "web1") {
			t.Error("before Take: the old process does not answer")
		}
		if err := next.Close(); err != nil {
			t.Error(err)
		}
		old.Keep()
		third("after a failure")
		if got := files(); !slices.Equal(got, []string{"web1.pid", "web1.sock"}) || !answers(t, old, "web1") {
			t.Errorf("after a failure: %v", got)
		}

		if next, err = dir.Inherit("web1", old.Share()); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := next.Take(); err != nil {
				t.Error(err)
			}
			third("after Take")
			if !answers(t, next, "web1") {
				t.Error("after Take: the new process does not answer")
			}
		}
		if err := old.Close(); err != nil {
			t.Error(err)
		}
		third("after the old process's end")
		if got := files(); !slices.Equal(got, []string{"web1.pid", "web1.sock"}) || !answers(t, next, "web1") {
			t.Errorf("after the old process's end: %v", got)
		}
		old = next
	}
	if err := old.Close(); err != nil {
		t.Error(err)
	}
	if got := files(); len(got) > 0 {
		t.Errorf("left behind: %v", got)
	}
}

// What is not the lock of that name, locked, gives nobody the name.
func TestInheritTrustsNobody(t *testing.T) {
	dir := runDir(t)
	open := func(path string) *os.File {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	claim, err := dir.Claim("web1")
	if err != nil {
		t.Fatal(err)
	}
	defer claim.Close()
	for _, tt := range []struct {
		name string
		lock *os.File
		want string
	}{
		{"web1", open(filepath.Join(t.TempDir(), "web1.pid")), "is not its lock"},
		{"web1", open(dir.pidFile("web1")), "does not have it"},
		{"web2", claim.pid, "no such file"},
		{"../x", claim.pid, "give 1 to 64 letters"},
	} {
		if c, err := dir.Inherit(tt.name, tt.lock); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Inherit(%q) = %v, %v; want %q", tt.name, c, err, tt.want)
		}
	}
	if !answers(t, claim, "web1") {
		t.Error("the guest does not answer")
	}
	// Nor is it inherited where a third process waits for it.
	other := otherProcess(t, dir, "web2"+incoming)
	lock := open(dir.pidFile("web2"))
	if c, err := dir.Inherit("web2", lock); !errors.Is(err, ErrAwaited) {
		t.Errorf("Inherit() of a name that another awaits = %v, %v; want ErrAwaited", c, err)
	}
	other.Process.Kill()
	other.Wait()
}

// While one process runs the guest and another waits to be its next, the name
// is the one that runs it, and both are listed.
func TestAwaitedBesideTheGuest(t *testing.T) {
	dir := runDir(t)
	other := otherProcess(t, dir, "web1")
	in, err := dir.Await("web1", true)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	list, err := dir.List()
	if want := []Running{{"web1", os.Getpid(), true}, {"web1", other.Process.Pid, false}}; err != nil || !slices.Equal(list, want) {
		t.Errorf("List() = %v, %v; want %v", list, err, want)
	}
	for _, r := range list {
		c, err := dir.DialListed(r)
		if err != nil {
			t.Fatal(err)
		}
		if c.Awaited() != r.Awaited || c.Name() != "web1" || c.pid != r.Pid {
			t.Errorf("DialListed(%v) = %s, awaited %v, pid %d", r, c.Name(), c.Awaited(), c.pid)
		}
		c.Close()
	}
	reach := func(awaited bool) {
		t.Helper()
		c, err := dir.Dial("web1")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if c.Awaited() != awaited {
			t.Errorf("Dial() reaches the one that waits: %v; want %v", c.Awaited(), awaited)
		}
	}
	reach(false)
	other.Process.Kill()
	other.Wait()
	reach(true) // there is nobody else any more
	if _, err := dir.DialListed(list[1]); !errors.Is(err, ErrNotRunning) {
		t.Errorf("DialListed() of the dead = %v; want ErrNotRunning", err)
	}
}
