package pr

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"vmm/scsi"
)

// A process started with this variable set is the victim of TestKill.
const childEnv = "VMM_PR_TEST_IMAGE"

func TestMain(m *testing.M) {
	if image := os.Getenv(childEnv); image != "" {
		if err := child(image); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func nexusOf(t testing.TB, name string) Nexus {
	t.Helper()
	n, err := NamedNexus(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func open(t testing.TB, image, name string) *File {
	t.Helper()
	f, err := Open(image, nexusOf(t, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func do(t testing.TB, f *File, o Out, want Answer) {
	t.Helper()
	_, a, err := f.Execute(o.Encode())
	if err != nil || a != want {
		t.Fatalf("%+v: %v, %v; want %v", o, a, err, want)
	}
}

func enter(t testing.TB, f *File, cdb []byte, want Answer) {
	t.Helper()
	pass, a, err := f.Enter(cdb, false)
	if err != nil || a != want {
		t.Fatalf("% x: %v, %v; want %v", cdb, a, err, want)
	}
	f.Exit(pass)
}

// fastImage is the name of an image in memory, if there is a file system there:
// every change is synced three times.
func fastImage(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "pr-test-")
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "disk.img")
}

// byLocks takes the quick way from f, as on a network file system.
func byLocks(f *File) {
	f.ruling.Store(nil)
	f.number, f.busy = nil, nil
}

// Two open files are to each other what two processes are: flock knows no
// process.
func TestFileShared(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	a, b := open(t, image, "host1:web1"), open(t, image, "host2:web1")
	write := []byte{scsi.OpWrite10, 0, 0, 0, 0, 0, 0, 0, 1, 0}
	do(t, a, Out{Action: Register, ServiceKey: keyA, APTPL: true}, good)
	enter(t, b, write, good)
	do(t, a, Out{Action: Reserve, Key: keyA, Type: WriteExclusiveRegistrantsOnly}, good)
	enter(t, a, write, good)
	enter(t, b, write, conflict)
	enter(t, b, []byte{scsi.OpRead10, 0, 0, 0, 0, 0, 0, 0, 1, 0}, good)
	do(t, b, Out{Action: Register, ServiceKey: keyB}, good)
	enter(t, b, write, good)
	do(t, b, Out{Action: Preempt, Key: keyB, ServiceKey: keyA, Type: WriteExclusiveRegistrantsOnly}, good)
	enter(t, a, write, check(RegistrationsPreempted))
	enter(t, a, write, conflict)
	enter(t, b, write, good)

	// All of it survives everybody's leaving, and is found by the same name.
	b.Close()
	again := open(t, image, "host2:web1")
	data, answer, err := again.Execute(In{ReadFullStatus, 8192}.CDB(), nil)
	if err != nil || !answer.OK() {
		t.Fatal(answer, err)
	}
	st, err := ParseFullStatus(data)
	if err != nil || len(st.Registrations) != 1 || st.Registrations[0].Nexus != again.Nexus() || !st.Registrations[0].Holder {
		t.Fatalf("after opening it again: %+v, %v", st, err)
	}
	do(t, again, Out{Action: Release, Key: keyB, Type: WriteExclusiveRegistrantsOnly}, good)
	enter(t, a, write, good)

	// SPC-2 reservations do not survive their nexus, nor a LOGICAL UNIT RESET.
	do(t, again, Out{Action: Clear, Key: keyB}, good)
	reserve := []byte{scsi.OpReserve6, 0, 0, 0, 0, 0}
	c := open(t, image, "host3:web1")
	if _, r, err := c.Execute(reserve, nil); err != nil || !r.OK() {
		t.Fatal(r, err)
	}
	enter(t, a, write, conflict)
	c.Close()
	enter(t, a, write, good)
	if _, r, err := again.Execute(reserve, nil); err != nil || !r.OK() {
		t.Fatal(r, err)
	}
	enter(t, a, write, conflict)
	if err := a.Reset(); err != nil {
		t.Fatal(err)
	}
	enter(t, a, write, good)
	enter(t, again, write, check(DeviceReset))
	enter(t, again, write, good)
}

// The name of a nexus is taken as long as its holder lives, and its seat free
// afterwards; another name shares the image.
// Whoever has the same file open knows the other's nonce; a copy, made while
// it was open, has nobody in it.
func TestFileNonce(t *testing.T) {
	image := fastImage(t)
	a := open(t, image, "a")
	b := open(t, image, "b")
	if !b.Met(a.Nonce()) || b.Met(b.Nonce()) || b.Met(nil) || b.Met(make([]byte, 16)) {
		t.Errorf("b has met a: %v, itself: %v, nobody: %v, zeros: %v; want a alone", b.Met(a.Nonce()), b.Met(b.Nonce()), b.Met(nil), b.Met(make([]byte, 16)))
	}
	twin := fastImage(t)
	for _, suffix := range []string{".pr", ".pr.lock"} {
		data, err := os.ReadFile(image + suffix)
		if err == nil {
			err = os.WriteFile(twin+suffix, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if c := open(t, twin, "c"); c.Met(a.Nonce()) || c.Met(b.Nonce()) {
		t.Error("a copy of the file has met those who have the file open")
	}
	old := a.Nonce()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if d := open(t, image, "d"); d.Met(old) || !d.Met(b.Nonce()) {
		t.Errorf("d has met a, who left: %v, b: %v; want b alone", d.Met(old), d.Met(b.Nonce()))
	}
}

func TestFileNames(t *testing.T) {
	image := fastImage(t)
	a := open(t, image, "a")
	open(t, image, "b")
	_, err := Open(image, a.Nexus())
	var held *HeldError
	if !errors.As(err, &held) || held.Holder() != "this process" {
		t.Errorf("Open of a taken name = %v; want a HeldError by this process", err)
	}
	a.Close()
	for range 2 * maxSeats { // seats are taken again
		open(t, image, "a").Close()
	}
	for i := range 3 * maxSeats { // and names forgotten
		open(t, image, fmt.Sprint("guest", i)).Close()
	}
	tg, err := open(t, image, "a").Target()
	if err != nil || len(tg.ports) > 3 {
		t.Errorf("%d nexuses are remembered, %v; want those of the two that are open", len(tg.ports), err)
	}
	for i := range maxSeats - 2 {
		open(t, image, fmt.Sprint("more", i))
	}
	if _, err := Open(image, nexusOf(t, "one too many")); err == nil || errors.As(err, &held) {
		t.Errorf("Open without a free seat = %v; want an error that says so", err)
	}
}

// While somebody has the disk to itself nobody else's command runs, by
// whichever way it came in: not one that began before, and none that begins.
// And a stream of commands starves no RESERVE.
func TestFileShutsOut(t *testing.T) {
	image := fastImage(t)
	owner := open(t, image, "owner")
	do(t, owner, Out{Action: Register, ServiceKey: keyA}, good)
	write := []byte{scsi.OpWrite10, 0, 0, 0, 0, 0, 0, 0, 1, 0}

	var mine, over atomic.Bool
	var in atomic.Int64
	var guests sync.WaitGroup
	defer guests.Wait()
	defer over.Store(true)
	ways := make([]atomic.Int64, 4) // commands by pass
	for i := range 3 {
		f := open(t, image, fmt.Sprint("guest", i))
		if i == 2 {
			byLocks(f)
		}
		for range 2 {
			guests.Go(func() {
				for n := 0; !over.Load(); n++ {
					alone := n%64 == 0
					pass, answer, err := f.Enter(write, alone)
					if err != nil {
						t.Error(err)
						return
					}
					if !answer.OK() {
						continue
					}
					inside := in.Add(1)
					if mine.Load() || pass == passAlone && inside > 1 {
						t.Errorf("a command (pass %d) runs beside %d others; the disk is reserved: %v", pass, inside-1, mine.Load())
						over.Store(true)
					}
					ways[pass].Add(1)
					runtime.Gosched()
					if mine.Load() {
						t.Errorf("the disk was reserved while a command (pass %d) was running", pass)
						over.Store(true)
					}
					in.Add(-1)
					f.Exit(pass)
				}
			})
		}
	}
	for range 50 {
		do(t, owner, Out{Action: Reserve, Key: keyA, Type: ExclusiveAccess}, good)
		mine.Store(true)
		enter(t, owner, write, good)
		mine.Store(false)
		do(t, owner, Out{Action: Release, Key: keyA, Type: ExclusiveAccess}, good)
		// Until somebody has been in again.
		for before := in.Load(); in.Load() == before && !over.Load(); {
			runtime.Gosched()
		}
	}
	for pass := passLocks; pass <= passAlone; pass++ {
		if ways[pass].Load() == 0 {
			t.Errorf("nobody came in by pass %d", pass)
		}
	}
	if owner.number != nil && ways[passQuick].Load() == 0 {
		t.Error("nobody came in the quick way")
	}
}

// Whoever is killed in the middle of a command holds up nobody, and a number
// that was left odd is made even.
func TestFileAfterDeath(t *testing.T) {
	image := fastImage(t)
	a := open(t, image, "a")
	write := []byte{scsi.OpWrite10, 0, 0, 0, 0, 0, 0, 0, 1, 0}

	b := open(t, image, "b")
	enter(t, b, write, good)
	if _, answer, err := b.Enter(write, false); err != nil || !answer.OK() { // and never comes out
		t.Fatal(answer, err)
	}
	b.Close() // as its death would
	do(t, a, Out{Action: Register, ServiceKey: keyA}, good)

	c := open(t, image, "c")
	if err := c.begin(); err != nil {
		t.Fatal(err)
	}
	c.Close() // with all the locks
	for range 2 {
		enter(t, a, write, good) // by the locks, if need be
	}
	do(t, a, Out{Action: Reserve, Key: keyA, Type: WriteExclusive}, good)
	enter(t, a, write, good)
	if seq, err := a.locks.seq(); err != nil || seq&1 != 0 {
		t.Errorf("the sequence number is %d, %v; want an even one", seq, err)
	}
	enter(t, open(t, image, "d"), write, conflict)
}

func TestFileDamaged(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	a := open(t, image, "a")
	do(t, a, Out{Action: Register, ServiceKey: keyA}, good)
	whole, err := os.ReadFile(image + ".pr")
	if err != nil {
		t.Fatal(err)
	}
	for _, damaged := range [][]byte{
		{}, whole[:len(whole)/2], whole[:len(whole)-1], append(bytes.Clone(whole), '\n'),
		bytes.Replace(whole, []byte("Generation"), []byte("generation"), 1),
		bytes.Replace(whole, []byte(`"Key": 170`), []byte(`"Key": 171`), 1),
		[]byte(stateMagic + strings.Repeat("0", 64) + "\n{}"),
		sealed(stateMagic, []byte(`{"Type": 1, "Holder": 0, "SPC2": -1}`)),
		sealed(stateMagic, []byte(`{"Type": 1, "Holder": -1, "SPC2": -1}`)),
		sealed(stateMagic, []byte(`{"Type": 0, "Holder": -1, "SPC2": -1, "Extra": 1}`)),
	} {
		if bytes.Equal(damaged, whole) {
			t.Fatal("the damage is none")
		}
		if err := os.WriteFile(image+".pr", damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if f, err := Open(image, nexusOf(t, "b")); err == nil {
			f.Close()
			t.Errorf("%q was believed", damaged)
		}
	}
	// What a crash leaves half written beside it is not looked at.
	if err := os.WriteFile(image+".pr", whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(image+".pr.new", whole[:10], 0o600); err != nil {
		t.Fatal(err)
	}
	b := open(t, image, "b")
	if tg, err := b.Target(); err != nil || tg.Key(a.Nexus()) != keyA {
		t.Errorf("state beside a torn write: %v, %v", tg, err)
	}
}

func TestNamedNexus(t *testing.T) {
	for name, want := range map[string]string{
		"host1:web1":          "iscsi iqn.2026-01.invalid.vmm:host1:web1",
		"iqn.2003-01.a:b":     "iscsi iqn.2003-01.a:b",
		"eui.02004567a425678": "iscsi eui.02004567a425678",
	} {
		if got := nexusOf(t, name).Initiator.String(); got != want {
			t.Errorf("NamedNexus(%q) = %q; want %q", name, got, want)
		}
	}
	for _, name := range []string{"", "a\x00b", strings.Repeat("x", 300)} {
		if n, err := NamedNexus(name); err == nil {
			t.Errorf("NamedNexus(%q) = %v; want an error", name, n)
		}
	}
}

func TestEnterDoesNotAllocate(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	f := open(t, filepath.Join(t.TempDir(), "disk.img"), "a")
	write := []byte{scsi.OpWrite10, 0, 0, 0, 0, 0, 0, 0, 1, 0}
	if n := testing.AllocsPerRun(100, func() { enter(t, f, write, good) }); n != 0 {
		t.Errorf("%v allocations per command; want 0", n)
	}
	byLocks(f)
	enter(t, f, write, good)
	if n := testing.AllocsPerRun(100, func() { enter(t, f, write, good) }); n != 0 {
		t.Errorf("%v allocations per command by the locks; want 0", n)
	}
}

// What a state file or a journal entry says is either refused, or a state that
// a target can be in and that is written back the same.
func FuzzState(f *testing.F) {
	tg := NewTarget(Quirks{})
	tg.Attention(nexB, scsi.PowerOnOccurred)
	tg.Do(nexA, &Out{Action: Register, ServiceKey: keyA})
	tg.Do(nexA, &Out{Action: Reserve, Key: keyA, Type: WriteExclusive})
	body, err := unseal(stateMagic, tg.encode())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add([]byte(`{"LUN": "naa.5", "Key": 7, "Old": "` + strings.ReplaceAll(goldenSAS, " ", "") + `"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		// The checksum is put on: no fuzzer would find it.
		if tg, err := decodeState(sealed(stateMagic, body)); err == nil {
			again, err := decodeState(tg.encode())
			if err != nil || !tg.equal(again) {
				t.Fatalf("%s became %s, %v", body, again.encode(), err)
			}
			// Any command may come next.
			for a := range ReplaceLostReservation {
				cdb, list := Out{Action: a, Key: tg.Key(nexA), Type: WriteExclusive, MoveTo: nexB}.Encode()
				tg.Execute(nexA, cdb, list)
			}
		}
		if e, err := decodeEntry(sealed(journalMagic, body)); err == nil {
			saved := savedEntry(e)
			if again, err := saved.entry(); err != nil || again != e {
				t.Fatalf("%+v became %+v, %v", e, again, err)
			}
		}
	})
}

// killScript is what the victim does over and over; every prefix of it gives
// another state.
func killScript() []Out {
	return []Out{
		{Action: RegisterAndIgnoreExistingKey, ServiceKey: keyA, APTPL: true},
		{Action: Reserve, Key: keyA, Type: WriteExclusiveRegistrantsOnly},
		{Action: Register, Key: keyA, ServiceKey: keyB},
		{Action: Preempt, Key: keyB, ServiceKey: keyB, Type: ExclusiveAccess},
		{Action: PreemptAndAbort, Key: keyB, ServiceKey: keyC, Type: ExclusiveAccess},
		{Action: RegisterAndMove, Key: keyB, ServiceKey: keyA, MoveTo: nexC},
		{Action: Release, Key: keyB, Type: ExclusiveAccess},
		{Action: Clear, Key: keyB},
	}
}

// child carries out the script for ever, and says so after each command.
func child(image string) error {
	self, err := NamedNexus("victim")
	if err != nil {
		return err
	}
	f, err := Open(image, self)
	if err != nil {
		return err
	}
	for {
		for _, o := range killScript() {
			if _, _, err := f.Execute(o.Encode()); err != nil {
				return err
			}
			if _, err := os.Stdout.WriteString("answered\n"); err != nil {
				return err
			}
		}
	}
}

// However a process is killed, the state is one that a prefix of its commands
// produces, and not a shorter one than it has had answers for.
func TestKill(t *testing.T) {
	rounds := 20
	if *bound != "quick" {
		rounds = 200
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := killScript()
	for round := range rounds {
		image := filepath.Join(t.TempDir(), "disk.img")
		other := open(t, image, "bystander")
		do(t, other, Out{Action: Register, ServiceKey: keyC}, good)
		model := NewTarget(Quirks{})
		model.Do(other.Nexus(), &Out{Action: Register, ServiceKey: keyC})

		cmd := exec.Command(exe, "-test.run=^$")
		cmd.Env = append(os.Environ(), childEnv+"="+image)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		answers := bufio.NewScanner(out)
		for range 1 + round%17 {
			if !answers.Scan() {
				t.Fatal("the victim said nothing more")
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		answered := 1 + round%17
		for answers.Scan() { // what it had said before it died
			answered++
		}
		cmd.Wait()

		got, err := other.Target()
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		victim := nexusOf(t, "victim")
		model.port(victim)
		model.LoseNexus(victim)
		ok := false
		// One command may have taken effect without its answer coming out.
		for i := range answered + 1 {
			cdb, list := script[i%len(script)].Encode()
			model.Execute(victim, cdb, list)
			if i >= answered-1 && fmt.Sprint(got.Status()) == fmt.Sprint(model.Status()) {
				ok = true
				break
			}
		}
		if !ok {
			t.Fatalf("round %d, %d answers: the state is %+v; the whole script would give %+v", round, answered, got.Status(), model.Status())
		}
	}
}

// BenchmarkEnter is what reservations cost a command that they allow.
func BenchmarkEnter(b *testing.B) {
	for _, way := range []string{"quick", "locks"} {
		b.Run(way, func(b *testing.B) {
			f := open(b, filepath.Join(b.TempDir(), "disk.img"), "a")
			if way == "locks" {
				byLocks(f)
			}
			write := []byte{scsi.OpWrite10, 0, 0, 0, 0, 0, 0, 0, 1, 0}
			b.ReportAllocs()
			for b.Loop() {
				pass, _, err := f.Enter(write, false)
				if err != nil {
					b.Fatal(err)
				}
				f.Exit(pass)
			}
		})
	}
}
