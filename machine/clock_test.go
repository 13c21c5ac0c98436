package machine

import (
	"math/big"
	"testing"

	"pgregory.net/rapid"

	vmmv1 "vmm/proto/vmm/v1"
)

// The branch for hosts whose KVM tells the TSC of an instant is not run where
// these tests run: its arithmetic is checked with made-up hosts.
func TestMovedOffset(t *testing.T) {
	const second = 1_000_000_000
	for _, test := range []struct {
		name     string
		offset   uint64
		old, now instant
		khz      uint32
		want     uint64 // the guest's counter when now was read
	}{
		{"nothing has passed", 1000, instant{5 * second, 7000}, instant{5 * second, 7000}, 3_000_000, 8000},
		{"a second, another host", 1000, instant{5 * second, 7000}, instant{6 * second, 123}, 3_000_000, 8000 + 3_000_000_000},
		{"a host that was up for longer", 0, instant{second, 1000}, instant{second + 1000, 1 << 60}, 1_000_000, 2000},
		{"a guest younger than its host", ^uint64(0) - 999, instant{0, 5000}, instant{second, 0}, 1_000, 4000 + 1_000_000},
		{"a rate that divides nothing", 0, instant{0, 0}, instant{1_000_003, 0}, 2_445_424, 2_445_431},
	} {
		offset := movedOffset(test.offset, test.old, test.now, test.khz)
		if got := test.now.tsc + offset; got != test.want {
			t.Errorf("%s: the guest's counter is %d; want %d", test.name, got, test.want)
		}
	}
}

// A guest's counter goes on by as much as its clock, whatever the hosts'
// counters are.
func TestMovedOffsetKeepsTime(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		khz := rapid.Uint32Range(1, maxTSCKHz).Draw(t, "kHz")
		old := instant{rapid.Uint64Range(0, maxClock).Draw(t, "clock"), rapid.Uint64().Draw(t, "tsc")}
		ns := rapid.Uint64Range(0, 1<<61).Draw(t, "passed")
		now := instant{old.clock + ns, rapid.Uint64().Draw(t, "new tsc")}
		offset := rapid.Uint64().Draw(t, "offset")
		want := new(big.Int).Mul(big.NewInt(int64(ns)), big.NewInt(int64(khz)))
		want.Div(want, big.NewInt(1_000_000))
		want.Add(want, new(big.Int).SetUint64(old.tsc+offset))
		want.Mod(want, new(big.Int).Lsh(big.NewInt(1), 64))
		if got := now.tsc + movedOffset(offset, old, now, khz); got != want.Uint64() {
			t.Fatalf("the guest's counter is %d; want %v", got, want)
		}
	})
}

func TestTimeNeverGoesBack(t *testing.T) {
	for _, test := range []struct{ then, now, want uint64 }{
		{0, 0, 0}, {5, 5, 0}, {5, 7, 2}, {7, 5, 0}, {1<<64 - 1, 0, 0}, {0, 1<<63 - 1, 1<<63 - 1},
	} {
		if got := passed(test.then, test.now); got != test.want {
			t.Errorf("passed(%d, %d) = %d; want %d", test.then, test.now, got, test.want)
		}
	}
}

func TestCheckClock(t *testing.T) {
	for _, test := range []struct {
		clock *vmmv1.ClockState
		ok    bool
	}{{nil, false}, {&vmmv1.ClockState{}, true}, {&vmmv1.ClockState{ClockNs: maxClock}, true}, {&vmmv1.ClockState{ClockNs: maxClock + 1}, false}} {
		if err := checkClock(test.clock); (err == nil) != test.ok {
			t.Errorf("checkClock(%v) = %v", test.clock, err)
		}
	}
}
