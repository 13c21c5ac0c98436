package machine

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// start runs a machine until its guest has said hello.
func start(t *testing.T, ctx context.Context) (*Machine, *console, <-chan error) {
	t.Helper()
	m, out := newMachine(t, asm{}.print("hello").forever(), func(c *Config) { c.CPUs = 2 })
	if got := m.State(); got != StateStarting {
		t.Errorf("before Run: State() = %v; want starting", got)
	}
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	out.waitFor("hello")
	return m, out, done
}

func TestPauseAndResume(t *testing.T) {
	m, _, done := start(t, t.Context())
	for i := range 3 {
		if got := m.State(); got != StateRunning {
			t.Errorf("round %d: State() = %v; want running", i, got)
		}
		for range 2 { // the second changes nothing
			if err := m.Pause(t.Context()); err != nil {
				t.Fatalf("Pause() = %v", err)
			}
			if got := m.State(); got != StatePaused || m.gate.open() || m.gate.still != m.gate.vcpus {
				t.Fatalf("after Pause: state %v, gate open %v, %d of %d vCPUs stand", got, m.gate.open(), m.gate.still, m.gate.vcpus)
			}
		}
		for range 2 {
			if err := m.Resume(); err != nil {
				t.Fatalf("Resume() = %v", err)
			}
		}
	}
	if err := m.Stop(); err != nil {
		t.Errorf("Stop() = %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("Run() = %v; want nil after Stop", err)
	}
	<-m.Ended()
	if got := m.State(); got != StateEnded {
		t.Errorf("State() = %v; want ended", got)
	}
	for name, err := range map[string]error{"Pause": m.Pause(t.Context()), "Resume": m.Resume(), "Stop": m.Stop()} {
		if !errors.Is(err, ErrEnded) {
			t.Errorf("%s() = %v; want ErrEnded", name, err)
		}
	}
}

// The threads of the vCPUs give way, those alone, as long as they are told to, and no
// longer than they are the vCPUs'.
func TestGiveWay(t *testing.T) {
	m, _, done := start(t, t.Context())
	before, err := sys.Nice(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// Every vCPU has a thread when it has stood.
	if err := errors.Join(m.Pause(t.Context()), m.Resume()); err != nil {
		t.Fatal(err)
	}
	count := func() (lower, other int) {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil {
				t.Fatal(err)
			}
			switch nice, err := sys.Nice(tid); {
			case err != nil || nice == before:
			case nice == before+wayNice:
				lower++
			default:
				other++
			}
		}
		return lower, other
	}
	want := func(when string, n int) {
		t.Helper()
		if lower, other := count(); lower != n || other != 0 {
			t.Errorf("%s: %d threads are lower by %d, %d otherwise; want %d", when, lower, wayNice, other, n)
		}
	}
	may := 2
	if err := m.vcpus[0].cpu.Lower(wayNice); errors.Is(err, unix.EPERM) {
		may = 0
	} else if err != nil {
		t.Fatal(err)
	}
	for _, on := range []bool{false, true, true, false, false, true} {
		m.GiveWay(on)
		if on {
			want("told to", may)
		} else {
			want("told not to", 0)
		}
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	want("the guest has ended", 0)
	m.GiveWay(false)
	want("told not to, too late", 0)
}

func TestPausedMachineEnds(t *testing.T) {
	t.Run("stopped", func(t *testing.T) {
		m, _, done := start(t, t.Context())
		if err := errors.Join(m.Pause(t.Context()), m.Stop()); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Errorf("Run() = %v", err)
		}
	})
	t.Run("context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		m, _, done := start(t, ctx)
		if err := m.Pause(t.Context()); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run() = %v; want context.Canceled", err)
		}
	})
}

// Whoever waits for a machine that never runs is let go, by its context or by
// the machine's end.
func TestPauseOfMachineThatNeverRuns(t *testing.T) {
	m, _ := newMachine(t, asm{}.forever(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Pause(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Pause() = %v; want context.Canceled", err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := m.Pause(t.Context()); !errors.Is(err, ErrEnded) {
		t.Errorf("Pause() = %v; want ErrEnded", err)
	}
}

// A guest that resets itself all the time is paused between two resets: the
// reset is done, and no vCPU runs before Resume.
func TestPauseBetweenResets(t *testing.T) {
	m, out := newMachine(t, asm{}.print(".").reset(), func(c *Config) { c.CPUs = 2 })
	done := make(chan error, 1)
	go func() { done <- m.Run(t.Context()) }()
	out.waitFor(".")
	for range 50 {
		if err := m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		select {
		case e := <-m.events:
			t.Fatalf("event %+v while paused", e)
		default:
		}
		if m.gate.open() {
			t.Fatal("the gate is open while paused")
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Once the guest is on its way to another host, an operator cannot let it run
// here, too, whenever he asks.
func TestResumeOfAGuestThatMoves(t *testing.T) {
	m, _, done := start(t, t.Context())
	d, err := m.Depart(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	asking := make(chan struct{})
	asked := make(chan struct{})
	go func() { // at random moments, before, during and after the pause
		defer close(asked)
		for {
			select {
			case <-asking:
				return
			default:
				_ = m.Resume()
			}
		}
	}()
	for range 20 {
		if _, err := d.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := m.Resume(); !errors.Is(err, ErrMoving) {
			t.Fatalf("Resume() of a guest that moves = %v; want ErrMoving", err)
		}
		if got := m.State(); got != StatePaused || m.gate.open() {
			t.Fatalf("state %v, gate open %v", got, m.gate.open())
		}
		if err := d.Resume(); err != nil {
			t.Fatal(err)
		}
		if got := m.State(); got != StateRunning {
			t.Fatalf("after the migration failed: state %v; want running", got)
		}
	}
	close(asking)
	<-asked
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	<-done
}

// Interrupts are held back before a guest that moves is stopped. If it is not
// stopped after all they reach it again once who moves it lets it run, and not
// before.
func TestInterruptsOfAGuestThatIsNotStopped(t *testing.T) {
	m, _, done := start(t, t.Context())
	d, err := m.Depart(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	held := func() bool { // the bus has no final state else
		_, err := m.pci.State()
		return err == nil
	}
	if held() {
		t.Fatal("interrupts are held back while the guest runs")
	}
	ctx, cancel := context.WithCancel(t.Context())
	busy, napped := make(chan struct{}), make(chan error)
	go func() {
		napped <- m.ask(t.Context(), requestNap, func() { // nobody stops the guest meanwhile
			close(busy)
			for !held() {
				runtime.Gosched()
			}
			cancel()
			for d.moving.Load() {
				runtime.Gosched()
			}
		})
	}()
	<-busy
	if _, err := d.Pause(ctx); !errors.Is(err, context.Canceled) || held() {
		t.Errorf("Pause() that is given up = %v, interrupts held back: %v", err, held())
	}
	if err := <-napped; err != nil {
		t.Error(err)
	}
	d.moving.Store(true)
	d.pci.DisconnectInterrupts()
	if err := m.Resume(); !errors.Is(err, ErrMoving) || !held() {
		t.Errorf("Resume() = %v, interrupts held back: %v; want ErrMoving, and they are", err, held())
	}
	if err := d.Resume(); err != nil || held() {
		t.Errorf("Resume() by who moves it = %v, interrupts held back: %v", err, held())
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	<-done
}
