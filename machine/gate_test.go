package machine

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// fakeVCPUs run behind a gate as vCPUs do: run until kicked.
type fakeVCPUs struct {
	gate    *gate
	kicks   []chan struct{}
	running atomic.Int32 // inside "KVM_RUN"
	runs    atomic.Int64
	wg      sync.WaitGroup
}

func startFakes(n int) *fakeVCPUs {
	f := &fakeVCPUs{kicks: make([]chan struct{}, n)}
	for i := range f.kicks {
		f.kicks[i] = make(chan struct{}, 1) // as sticky as immediate_exit
	}
	f.gate = newGate(n, func() {
		for _, k := range f.kicks {
			select {
			case k <- struct{}{}:
			default:
			}
		}
	})
	for i := range n {
		f.wg.Go(func() {
			for {
				if !f.gate.open() {
					if !f.gate.stand() {
						return
					}
					continue
				}
				f.running.Add(1)
				<-f.kicks[i]
				f.runs.Add(1)
				f.running.Add(-1)
			}
		})
	}
	return f
}

// After hold no vCPU runs, however often and from wherever it is called; no
// kick is lost, or this test hangs.
func TestGateHoldsEveryVCPU(t *testing.T) {
	f := startFakes(4)
	for range 2000 {
		f.gate.release()
		if rand.IntN(3) == 0 {
			f.gate.close() // as a vCPU's exit does
		}
		f.gate.hold()
		if n := f.running.Load(); n != 0 {
			t.Fatalf("%d vCPUs run behind a closed gate", n)
		}
	}
	f.gate.release()
	for f.running.Load() == 0 {
		runtime.Gosched()
	}
	f.gate.end()
	f.gate.hold() // returns: who has left stands for good
	f.wg.Wait()
	f.gate.release()
	if f.gate.open() {
		t.Error("the gate opens after its end")
	}
	if f.runs.Load() == 0 {
		t.Error("no vCPU ever ran")
	}
}
