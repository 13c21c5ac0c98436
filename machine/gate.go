package machine

import (
	"sync"
	"sync/atomic"
)

// phase is what the vCPUs are told to do.
type phase int32

const (
	phaseHeld    phase = iota // stand still, outside of KVM_RUN, instruction complete
	phaseRunning              // run
	phaseEnded                // leave for good
)

// gate stops and starts the vCPUs. A vCPU passes it before every KVM_RUN; who
// closes it kicks the vCPUs, so that each comes by, then waits for all.
//
// The phase is written under mu and read without it by a vCPU on its way to
// KVM_RUN. That read cannot miss a change for good: the writer kicks after the
// write, and a kick makes the next KVM_RUN return at once.
type gate struct {
	phase atomic.Int32
	mu    sync.Mutex
	moved sync.Cond // phase or standing changed
	vcpus int
	still int // vCPUs that stand at the gate or have left
	kick  func()
}

func newGate(vcpus int, kick func()) *gate {
	g := &gate{vcpus: vcpus, kick: kick}
	g.moved.L = &g.mu
	return g
}

// open says without waiting whether a vCPU may run.
func (g *gate) open() bool { return phase(g.phase.Load()) == phaseRunning }

// stand waits at the gate until it opens; false means leave. It is called by a
// vCPU whose state is whole.
func (g *gate) stand() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.still++
	g.moved.Broadcast()
	for phase(g.phase.Load()) == phaseHeld {
		g.moved.Wait()
	}
	if phase(g.phase.Load()) == phaseEnded {
		return false // it stays counted as still
	}
	g.still--
	return true
}

// close tells the vCPUs to stop and returns without waiting. A vCPU may call
// it: its own next look at the gate finds it closed.
func (g *gate) close() {
	g.mu.Lock()
	if phase(g.phase.Load()) == phaseRunning {
		g.phase.Store(int32(phaseHeld))
	}
	g.mu.Unlock()
	g.kick()
}

// hold closes the gate and returns when every vCPU stands.
func (g *gate) hold() {
	g.close()
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.still < g.vcpus {
		g.moved.Wait()
	}
}

// release opens the gate.
func (g *gate) release() { g.set(phaseRunning) }

// end sends every vCPU away.
func (g *gate) end() {
	g.set(phaseEnded)
	g.kick()
}

func (g *gate) set(p phase) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if phase(g.phase.Load()) != phaseEnded {
		g.phase.Store(int32(p))
	}
	g.moved.Broadcast()
}
