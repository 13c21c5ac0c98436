package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vmm/tests/qmp"
)

const (
	moveRounds   = 5
	moveBeat     = 5 * time.Millisecond  // between two letters that the guest prints
	moveDowntime = 20 * time.Millisecond // the limit that both are given
	moveLimit    = 2 * time.Minute       // then a move has failed to converge
)

// moved is what a monitor says of a migration.
type moved struct {
	total, downtime time.Duration
	sent            uint64
}

// benchMigrate moves a guest without a LUN from process to process through a
// Unix socket: first idle, then with 32 MiB of its memory being written all the
// time, faster than can be sent. So QEMU may slow it down, as vmm does. What a
// monitor calls its downtime is its own affair: QEMU's ends when all is sent,
// vmm's when the guest runs. So the guest is moved once more with each load while
// it prints all the time, and its silence is measured from outside.
// That guest wants the processor for itself: its total says little.
func benchMigrate(t *testing.T, kernel, initrd string, ours, qemu monitor, note func(what, who string, x float64)) {
	for round := range moveRounds + 1 {
		for _, m := range []struct {
			name   string
			travel func(t *testing.T, kernel, initrd string, each func(v *vm, move func(v *vm) (*vm, moved)))
		}{
			{ours.name, ours.travelVMM},
			{qemu.name, qemu.travelQEMU},
		} {
			t.Logf("round %d: migrate %s", round, m.name)
			m.travel(t, kernel, initrd, func(v *vm, move func(*vm) (*vm, moved)) {
				v.connect()
				for _, load := range []struct{ name, begin string }{
					{"idle", ""},
					{"32 MiB being written", "mkfifo /tmp/f; (dirty >/tmp/f 2>&1 &); read line </tmp/f; test \"$line\" = dirtying"},
					{"32 MiB being written, printing", beat},
					{"printing", "killall dirty"},
				} {
					if load.begin != "" {
						v.sh(load.begin)
					}
					var r moved
					from := v
					v, r = move(v)
					figures := map[string]float64{
						"total, ms": ms(r.total), "downtime, ms": ms(r.downtime), "sent, MiB": float64(r.sent) / (1 << 20),
					}
					if strings.Contains(load.name, "printing") {
						figures = map[string]float64{"silence, ms": ms(silence(t, from, v))}
					}
					v.dial() // it lives
					t.Logf("%s, %s: %v", m.name, load.name, figures)
					if round == 0 { // the emulator comes to know their programs
						continue
					}
					for what, x := range figures {
						note("migrate, "+load.name+", "+what, m.name, x)
					}
				}
				v.kill()
			})
		}
	}
}

// beat has the guest print.
var beat = fmt.Sprintf("(beat -every %v >/dev/ttyS0 2>&1 &)", moveBeat)

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

// silence is how long a guest that prints all the time printed nothing when it
// moved.
func silence(t *testing.T, from, to *vm) time.Duration {
	t.Helper()
	if err := to.console.Wait(t.Context(), to.exited, func(s string) bool { return s != "" }); err != nil {
		t.Fatalf("the guest prints nothing at its destination: %v", err)
	}
	_, last := from.console.Span()
	first, _ := to.console.Span()
	return first.Sub(last)
}

// kill ends a monitor and waits for its end.
func (v *vm) kill() {
	v.agent.Close()
	v.agent = nil
	v.cmd.Process.Kill()
	<-v.exited
}

func (m monitor) travelVMM(t *testing.T, kernel, initrd string, each func(*vm, func(*vm) (*vm, moved))) {
	socket := filepath.Join(t.TempDir(), "s")
	v := m.start(t, kernel, initrd, socket, nil)
	v.serial = socket
	name, moves := "bench", 0
	each(v, func(v *vm) (*vm, moved) {
		moves++
		next := fmt.Sprintf("bench%d", moves)
		w, address := receive(t, next)
		s := migrate(t, name, address, "--downtime", moveDowntime.String(), "--timeout", moveLimit.String())
		v.wait()
		name = next
		us := func(n uint64) time.Duration { return time.Duration(n) * time.Microsecond }
		return w, moved{us(s.TotalUs), us(s.Downtime.TotalUs), s.SentBytes}
	})
}

func (m monitor) travelQEMU(t *testing.T, kernel, initrd string, each func(*vm, func(*vm) (*vm, moved))) {
	launch := func(more ...string) (*vm, *qmp.Monitor) {
		t.Helper()
		dir := t.TempDir()
		ln, err := qmp.Listen(filepath.Join(dir, "q"))
		if err != nil {
			t.Fatal(err)
		}
		socket := filepath.Join(dir, "s")
		// The devices that a guest of vmm always has.
		args := append(ln.Args(), "-device", "virtio-scsi-pci,num_queues=2", "-device", "virtio-rng-pci")
		v := m.start(t, kernel, initrd, socket, nil, append(args, more...)...)
		v.serial = socket
		monitor, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { monitor.Close() })
		return v, monitor
	}
	v, from := launch()
	each(v, func(v *vm) (*vm, moved) {
		w, to := launch("-incoming", "defer")
		o := qmp.Options{Downtime: moveDowntime, AutoConverge: true}
		uri := "unix:" + filepath.Join(t.TempDir(), "m")
		if err := to.Receive(uri, o); err != nil {
			t.Fatal(err)
		}
		s, err := from.Migrate(uri, o, moveLimit)
		if err != nil {
			t.Fatal(err)
		}
		v.kill()
		from = to
		return w, moved{s.Total, s.Downtime, s.Sent}
	})
}
