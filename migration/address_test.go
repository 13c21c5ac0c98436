package migration

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"vmm/tests/certs"
)

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]string{
		"tcp://host2:4444":   "tcp://host2:4444",
		"host2:4444":         "tcp://host2:4444",
		"[::1]:4444":         "tcp://[::1]:4444",
		"tcp://0.0.0.0:1":    "tcp://0.0.0.0:1",
		"unix:///run/a.sock": "unix:///run/a.sock",
		"host2":              "",
		"host2:":             "",
		"unix://a.sock":      "",
		"http://host2:80":    "",
		"":                   "",
	} {
		a, err := ParseAddress(in)
		if err != nil && want != "" || err == nil && a.String() != want {
			t.Errorf("ParseAddress(%q) = %v, %v; want %q", in, a, err, want)
		}
	}
}

// Without TLS nothing leaves the host, unless the user says so.
func TestInsecure(t *testing.T) {
	for address, private := range map[string]bool{
		"tcp://127.0.0.1:0": true, "tcp://localhost:0": true, "tcp://[::1]:0": true, "unix:///tmp/x": true,
		"tcp://0.0.0.0:0": false, "tcp://:0": false, "tcp://192.0.2.1:0": false, "tcp://host2:0": false, "tcp://localhost.example:0": false,
	} {
		a, err := ParseAddress(address)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Dialer(a, Security{}, ""); (err == nil) != private {
			t.Errorf("Dialer(%v) without TLS: %v; want it allowed: %v", a, err, private)
		}
		if _, err := Dialer(a, Security{Insecure: true}, ""); err != nil {
			t.Errorf("Dialer(%v), insecure: %v", a, err)
		}
		if private {
			continue
		}
		if ln, err := Listen(a, Security{}, nil); err == nil {
			ln.Close()
			t.Errorf("Listen(%v) without TLS succeeded", a)
		}
	}
}

// A socket that a killed process has left is in nobody's way, and one that is
// in use, or no socket, stays.
func TestListenUnix(t *testing.T) {
	a := Address{"unix", filepath.Join(t.TempDir(), "in")}
	leave := func() {
		t.Helper()
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: a.Address, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false)
		ln.Close()
	}
	leave()
	ln, err := Listen(a, Security{}, nil)
	if err != nil {
		t.Fatalf("beside a socket that nobody listens on: %v", err)
	}
	if info, err := os.Stat(a.Address); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v; want mode 600", info, err)
	}
	if _, err := Listen(a, Security{}, nil); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("a second listener: %v", err)
	}
	conn, err := net.Dial("unix", a.Address)
	if err != nil {
		t.Fatalf("the first listener has lost its socket: %v", err)
	}
	conn.Close()
	ln.Close()
	if _, err := os.Lstat(a.Address); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket after Close: %v; want it removed", err)
	}
	if err := os.WriteFile(a.Address, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(a, Security{}, nil); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("over a file: %v", err)
	}
	if b, err := os.ReadFile(a.Address); string(b) != "precious" {
		t.Errorf("the file has %q, %v", b, err)
	}
	if err := os.Remove(a.Address); err != nil {
		t.Fatal(err)
	}
	// Of many who find the same dead socket one gets it, and keeps it.
	for range 20 {
		leave()
		got := make(chan net.Listener, 8)
		for range cap(got) {
			go func() {
				ln, _ := Listen(a, Security{}, nil)
				got <- ln
			}()
		}
		var won []net.Listener
		for range cap(got) {
			if ln := <-got; ln != nil {
				won = append(won, ln)
			}
		}
		if len(won) != 1 {
			t.Fatalf("%d of %d have the socket; want one", len(won), cap(got))
		}
		conn, err := net.Dial("unix", a.Address)
		if err != nil {
			t.Fatalf("the one who has the socket is not reached: %v", err)
		}
		conn.Close()
		won[0].Close()
	}
}

// authority makes the certificates of hosts.
type authority struct{ *certs.Authority }

func newAuthority(t testing.TB) authority {
	from, until := certs.Day()
	return authority{certs.New(t, from, until)}
}

// issue makes those of a host with these names.
func (a authority) issue(t testing.TB, names ...string) *Certificates {
	t.Helper()
	c, err := LoadCertificates(a.Directory(a.Host(names...)))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// overTCP gives r a listener on a free port. Receive closes it.
func (r *rig) overTCP(certs *Certificates, peers ...string) {
	r.Helper()
	ln, err := Listen(Address{"tcp", "127.0.0.1:0"}, Security{TLS: certs}, peers)
	if err != nil {
		r.Fatal(err)
	}
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		r.Fatal(err)
	}
	r.dial = Address{"tcp", "localhost:" + port}
	r.ln = ln
}

func TestTLS(t *testing.T) {
	a := newAuthority(t)
	for _, tt := range []struct {
		name     string
		src, dst *Certificates
		peers    []string // that the destination lets in
		ok       bool
	}{
		{"both known", a.issue(t, "host1"), a.issue(t, "localhost"), nil, true},
		{"the source by name", a.issue(t, "host1"), a.issue(t, "localhost"), []string{"host0", "host1"}, true},
		{"a source with another name", a.issue(t, "host1"), a.issue(t, "localhost"), []string{"host0"}, false},
		{"a destination with another name", a.issue(t, "host1"), a.issue(t, "host2"), nil, false},
		{"a source of another authority", newAuthority(t).issue(t, "host1"), a.issue(t, "localhost"), nil, false},
		{"a destination of another authority", a.issue(t, "host1"), newAuthority(t).issue(t, "localhost"), nil, false},
		{"a source without TLS", nil, a.issue(t, "localhost"), nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 8<<20)
			r.opts.Channels = 2
			r.opts.Deadlines = Deadlines{Connect: 2 * time.Second}
			for p := uint64(0); p < 1500; p++ {
				r.src.write(p, p)
			}
			r.overTCP(tt.dst, tt.peers...)
			r.security = Security{TLS: tt.src}
			arrived := r.receiving()
			_, err := r.migrate()
			if !tt.ok {
				if !errors.Is(err, ErrRefused) && !errors.Is(err, ErrKept) || r.src.pauses != 0 || r.host.dest() != nil {
					t.Errorf("Run = %v; the guest was stopped %d times", err, r.src.pauses)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			same(t, (<-arrived).Machine.(*fakeDest).ram, r.src.ram)
		})
	}
}

func TestLoadCertificates(t *testing.T) {
	certs := newAuthority(t).issue(t, "host1")
	if err := os.Chmod(filepath.Join(certs.dir, FileKey), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCertificates(certs.dir); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others may read: %v", err)
	}
	if _, err := LoadCertificates(t.TempDir()); err == nil || !strings.Contains(err.Error(), FileCA) {
		t.Errorf("an empty directory: %v; want the names of the files", err)
	}
}

// Where nobody names a TLS directory, the user's own comes before the host's,
// and one that lacks a file is none.
func TestDefaultTLSDir(t *testing.T) {
	a := newAuthority(t)
	config, host := t.TempDir(), a.issue(t, "host1").dir
	own := filepath.Join(config, "vmm", "tls")
	if got := firstTLSDir(own, host); got != host {
		t.Errorf("firstTLSDir = %q; want the host's, %q", got, host)
	}
	if err := os.MkdirAll(filepath.Dir(own), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(a.issue(t, "host1").dir, own); err != nil {
		t.Fatal(err)
	}
	if got := firstTLSDir(own, host); got != own {
		t.Errorf("firstTLSDir = %q; want the user's, %q", got, own)
	}
	t.Setenv("XDG_CONFIG_HOME", config)
	if got := DefaultTLSDir(); got != own {
		t.Errorf("DefaultTLSDir = %q; want %q", got, own)
	}
	for _, name := range []string{FileKey, FileCert, FileCA} {
		if err := os.Rename(filepath.Join(own, name), filepath.Join(config, name)); err != nil {
			t.Fatal(err)
		}
		if got := firstTLSDir(own); got != "" {
			t.Errorf("firstTLSDir = %q, where %s is missing; want none", got, name)
		}
		if err := os.Rename(filepath.Join(config, name), filepath.Join(own, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// Whoever connects and is no migration is dropped, and the destination goes on
// waiting.
func TestStrangers(t *testing.T) {
	r := newRig(t, 1<<20)
	r.recv.Deadlines.Connect = 200 * time.Millisecond
	arrived := r.receiving()
	hello := preamble{role: roleControl, id: NewID()}.bytes()
	for name, b := range map[string][]byte{
		"nothing":         nil,
		"a web browser":   []byte("GET / HTTP/1.1\r\nHost: a-name-that-is-long-enough\r\n\r\n"),
		"half a preamble": hello[:20],
		"an unknown role": preamble{role: 9}.bytes(),
		"a long message":  append(hello[:len(hello):len(hello)], 0xff, 0xff, 0xff, 0x7f),
		"no protobuf":     append(hello[:len(hello):len(hello)], 4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff),
		"data of nobody":  preamble{role: roleData, id: NewID()}.bytes(),
	} {
		conn, err := net.Dial(r.listen.Network, r.listen.Address)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		within(t, name, func() {
			if n, err := conn.Read(make([]byte, 1)); err == nil {
				t.Errorf("%s was answered with %d bytes", name, n)
			}
		})
		conn.Close()
	}
	// A question about a migration that nobody knows has an answer, too.
	o := r.outgoing()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if m, err := o.question(ctx, time.Second); err != nil || kindOf(m) != kindUndecided {
		t.Errorf("question = %v, %v; want undecided", m, err)
	}
	if _, err := r.migrate(); err != nil {
		t.Errorf("after all that: %v", err)
	}
	<-arrived
}

// Whoever connects and comes to nothing leaves a word with the operator.
func TestComplaints(t *testing.T) {
	hello := preamble{role: roleControl, id: NewID()}.bytes()
	for _, tt := range []struct {
		name  string
		first []byte
		want  string
	}{
		{"a web browser", []byte("GET / HTTP/1.1\r\nHost: a-name-that-is-long-enough\r\n\r\n"), `begins with "GET / HT"; this is no migration`},
		{"half a preamble", hello[:20], "a connection came to nothing: it had not said what it is for after 100ms"},
		{"no offer", hello, "it had not offered its guest after 100ms"},
		{"another message", append(hello[:len(hello):len(hello)], 0, 0, 0, 0), "as the first message"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 1<<20)
			greetings := [][]byte{nil, tt.first} // who says nothing is not worth a word
			if strings.Contains(tt.want, "after 100ms") {
				r.recv.Deadlines.Connect = 100 * time.Millisecond
				greetings = greetings[1:] // for it could be late with that, too
			}
			said := make(chan string, 1)
			r.recv.Warn = func(err error) { said <- err.Error() }
			r.recv.GivenUp = func() { t.Error("a migration was given up, and none had begun") }
			r.receiving()
			for _, b := range greetings {
				conn, err := net.Dial(r.listen.Network, r.listen.Address)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := conn.Write(b); err != nil {
					t.Fatal(err)
				}
				if b == nil {
					conn.Close()
				} else {
					defer conn.Close()
				}
			}
			if got := <-said; !strings.Contains(got, tt.want) {
				t.Errorf("the destination says %q; want %q", got, tt.want)
			}
		})
	}
	// Not more often than that: it may be anybody, any number of times.
	var spoken int
	r := &receiver{opts: ReceiveOptions{Warn: func(error) { spoken++ }}, complained: time.Now().Add(time.Hour)}
	a, _ := net.Pipe()
	r.complain(t.Context(), a, io.EOF)
	if spoken != 0 {
		t.Error("it speaks again at once")
	}
	r.complained = time.Time{}
	if r.complain(t.Context(), a, io.EOF); spoken != 1 {
		t.Error("it does not speak again later")
	}
}

// What a destination has said about a migration stays true, whoever asks again.
func TestDecidedOnce(t *testing.T) {
	r := newRig(t, 1<<20)
	o := r.outgoing()
	if err := os.Mkdir(r.recv.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	j, err := openJournal(r.recv.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.note(o.ID(), verdictAborted, "the guest was given back"); err != nil {
		t.Fatal(err)
	}
	r.receiving()
	if _, err := o.Run(context.Background()); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "decided") {
		t.Errorf("Run = %v; want a refusal", err)
	}
	if m, err := o.question(context.Background(), time.Second); err != nil || m.GetAborted().GetReason() != "the guest was given back" {
		t.Errorf("question = %v, %v; want what was noted", m, err)
	}
	// Whoever has heard it acknowledges it, and it is forgotten.
	within(t, "forgetting", func() {
		for {
			v, _, err := j.verdict(o.ID())
			if err != nil {
				t.Error(err)
				return
			}
			if v == verdictNone {
				return
			}
			runtime.Gosched()
		}
	})
}

func TestJournal(t *testing.T) {
	dir := t.TempDir()
	j, err := openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	id := NewID()
	for _, tt := range []struct {
		v   verdict
		why string
	}{{verdictAborted, "late\nand in two lines"}, {verdictRunning, ""}} {
		if err := j.note(id, tt.v, tt.why); err != nil {
			t.Fatal(err)
		}
		if again, err := openJournal(dir); err != nil {
			t.Fatal(err)
		} else if v, why, err := again.verdict(id); v != tt.v || why != tt.why || err != nil {
			t.Errorf("verdict = %q, %q, %v; want %q, %q", v, why, err, tt.v, tt.why)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, j.name(id)), []byte("walking\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if v, _, err := j.verdict(id); err == nil {
		t.Errorf("a damaged entry is %q", v)
	}
	old := time.Now().Add(-2 * verdictLife)
	if err := os.Chtimes(filepath.Join(dir, j.name(id)), old, old); err != nil {
		t.Fatal(err)
	}
	if j, err = openJournal(dir); err != nil {
		t.Fatal(err)
	}
	if v, _, err := j.verdict(id); v != verdictNone || err != nil {
		t.Errorf("an entry that nobody asks for any more is %q, %v", v, err)
	}
	if err := errors.Join(j.forget(id), j.forget(id)); err != nil {
		t.Errorf("forget: %v", err)
	}
	if _, err := openJournal(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("a journal that is not there was opened")
	}
}

// Something else than a destination may listen there.
func TestDialStranger(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			// It reads, so that its Close is an end and no reset.
			_, _ = conn.Read(make([]byte, 16<<10))
			conn.Close()
		}
	}()
	dial, err := Dialer(Address{"tcp", ln.Addr().String()}, Security{TLS: newAuthority(t).issue(t, "localhost")}, "localhost")
	if err != nil {
		t.Fatal(err)
	}
	if conn, err := dial(t.Context()); err == nil || !strings.Contains(err.Error(), "is it vmm receive, with --tls-dir?") {
		t.Errorf("dial = %v, %v; want to hear that something else listens there", conn, err)
	}
}
