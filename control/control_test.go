package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"vmm/control/controltest"
	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/proto/vmm/v1/vmmv1connect"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// runDir is short enough for sockets, which t.TempDir may not be.
func runDir(t *testing.T) RunDir {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return RunDir(dir)
}

// serve serves m as web1 and returns a client of it.
func serve(t *testing.T, m Machine) (RunDir, *Client) {
	t.Helper()
	dir := runDir(t)
	claim, err := dir.Claim("web1")
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(claim, m, "1.2.3")
	done := make(chan error)
	go func() { done <- s.Serve() }()
	c, err := dir.Dial("web1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := errors.Join(s.Close(ctx), <-done, claim.Close(), claim.Close()); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(string(dir) + "/web1*"); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return dir, c
}

func request[T any](m *T) *connect.Request[T] { return connect.NewRequest(m) }

func TestStatusPauseResume(t *testing.T) {
	_, c := serve(t, controltest.New("web1"))
	status := func() *vmmv1.StatusResponse {
		t.Helper()
		r, err := c.Status(t.Context(), request(&vmmv1.StatusRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return r.Msg
	}
	s := status()
	if s.Name != "web1" || s.State != "running" || s.Cpus != 2 || s.MemoryBytes != 1<<30 || s.Version != "1.2.3" ||
		int(s.Pid) != os.Getpid() || s.UptimeSeconds < 59 || s.Started == "" || len(s.Luns) != 2 || s.Luns[0].Kind != "passthrough" {
		t.Errorf("Status() = %v", s)
	}
	if _, err := c.Pause(t.Context(), request(&vmmv1.PauseRequest{})); err != nil {
		t.Fatal(err)
	}
	if got := status().State; got != "paused" {
		t.Errorf("state %q; want paused", got)
	}
	_, err := c.Stop(t.Context(), request(&vmmv1.StopRequest{}))
	if want := "guest web1: the guest is paused and would not see the power button: resume it first, or force"; err == nil || c.Explain(err).Error() != want {
		t.Errorf("Stop() of a paused guest = %v; want %q", c.Explain(err), want)
	}
	if _, err := c.Resume(t.Context(), request(&vmmv1.ResumeRequest{})); err != nil {
		t.Fatal(err)
	}
	if got := status().State; got != "running" {
		t.Errorf("state %q; want running", got)
	}
	v, err := c.Version(t.Context(), request(&vmmv1.VersionRequest{}))
	if err != nil || v.Msg.Version != "1.2.3" {
		t.Errorf("Version() = %v, %v", v, err)
	}
}

func TestStop(t *testing.T) {
	short := uint32(1)
	for _, test := range []struct {
		name   string
		setup  func(*controltest.Machine)
		ask    *vmmv1.StopRequest
		forced bool
		fails  connect.Code
	}{
		{"a guest that listens", func(f *controltest.Machine) { f.Button = func() { f.Stop() } }, &vmmv1.StopRequest{}, false, 0},
		{"a guest that does not", func(*controltest.Machine) {}, &vmmv1.StopRequest{TimeoutMs: &short}, true, 0},
		{"force", func(f *controltest.Machine) { f.Button = func() { panic("the power button was pressed") } }, &vmmv1.StopRequest{Force: true}, true, 0},
		{"a paused guest by force", func(f *controltest.Machine) { f.Pause(context.Background()) }, &vmmv1.StopRequest{Force: true}, true, 0},
		{"a guest that has ended", func(f *controltest.Machine) { f.Stop() }, &vmmv1.StopRequest{}, false, connect.CodeFailedPrecondition},
		{"a guest that has ended, by force", func(f *controltest.Machine) { f.Stop() }, &vmmv1.StopRequest{Force: true}, false, connect.CodeFailedPrecondition},
	} {
		f := controltest.New("web1")
		test.setup(f)
		_, c := serve(t, f)
		r, err := c.Stop(t.Context(), request(test.ask))
		switch {
		case test.fails != 0:
			if connect.CodeOf(err) != test.fails {
				t.Errorf("%s: Stop() = %v; want code %v", test.name, err, test.fails)
			}
		case err != nil || r.Msg.Forced != test.forced:
			t.Errorf("%s: Stop() = %v, %v; want forced %v", test.name, r, err, test.forced)
		case f.State() != machine.StateEnded:
			t.Errorf("%s: state %v", test.name, f.State())
		}
	}
}

// A client that leaves takes its force with it.
func TestStopEndsWithItsClient(t *testing.T) {
	f := controltest.New("web1")
	pressed := make(chan struct{})
	f.Button = func() { close(pressed) }
	ctx, cancel := context.WithCancel(t.Context())
	s := &service{machine: f}
	done := make(chan error)
	go func() {
		_, err := s.Stop(ctx, request(&vmmv1.StopRequest{}))
		done <- err
	}()
	<-pressed
	cancel()
	if err := <-done; connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("Stop() = %v; want canceled", err)
	}
	if f.State() != machine.StateRunning {
		t.Errorf("state %v; want running", f.State())
	}
}

func TestLuns(t *testing.T) {
	f := controltest.New("web1")
	f.Ask = func(id string) (machine.Reservation, error) {
		if id == "root" {
			return machine.Reservation{}, &pr.NotGood{Action: pr.ReadKeys, Answer: pr.Answer{Status: scsi.CheckCondition, Sense: scsi.InvalidOpcode}}
		}
		return controltest.SomeReservation(), nil
	}
	_, c := serve(t, f)
	r, err := c.Luns(t.Context(), request(&vmmv1.LunsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	got, err := MarshalJSON(r.Msg)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "luns.json", got)
	one, err := c.Luns(t.Context(), request(&vmmv1.LunsRequest{Id: "root"}))
	if err != nil || len(one.Msg.Luns) != 1 || one.Msg.Luns[0].Reservations.Supported {
		t.Errorf("Luns(root) = %v, %v", one, err)
	}
	if _, err := c.Luns(t.Context(), request(&vmmv1.LunsRequest{Id: "swap"})); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("Luns(swap) = %v; want not found", err)
	}
	f.Ask = func(string) (machine.Reservation, error) { return machine.Reservation{}, controltest.ErrBroken }
	if r, err = c.Luns(t.Context(), request(&vmmv1.LunsRequest{})); err != nil || r.Msg.Luns[0].Error != controltest.ErrBroken.Error() || r.Msg.Luns[0].Reservations != nil {
		t.Errorf("Luns() of a broken disk = %v, %v", r, err)
	}
}

// golden compares JSON with testdata/name; VMM_UPDATE=1 writes it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	var v any
	if err := json.Unmarshal(got, &v); err != nil {
		t.Fatalf("%v in %s", err, got)
	}
	got, _ = json.MarshalIndent(v, "", "  ")
	path := filepath.Join("testdata", name)
	if os.Getenv("VMM_UPDATE") == "1" {
		if err := os.WriteFile(path, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimSpace(string(want)), string(got)); diff != "" {
		t.Errorf("%s (-want +got; VMM_UPDATE=1 writes it):\n%s", path, diff)
	}
}

// overSocket is an HTTP client as curl --unix-socket is.
func overSocket(dir RunDir, http2 bool) *http.Client {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", dir.Socket("web1"))
	}}
	if http2 {
		t.Protocols = new(http.Protocols)
		t.Protocols.SetUnencryptedHTTP2(true)
	}
	return &http.Client{Transport: t}
}

func TestPlainJSON(t *testing.T) {
	f := controltest.New("web1")
	dir, _ := serve(t, f)
	h := overSocket(dir, false)
	defer h.CloseIdleConnections()
	post := func(method, body string) (int, string) {
		t.Helper()
		r, err := h.Post("http://vmm/vmm.v1.MachineService/"+method, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	for _, test := range []struct {
		method, body string
		code         int
		want         string
	}{
		{"Pause", "{}", 200, "{}"},
		{"Status", "", 200, `"state":"paused"`},
		{"Status", "{}", 200, `"memory_bytes":"1073741824"`},
		{"Stop", `{"timeot_ms": 5}`, 400, `unknown field`},
		{"Stop", `{"timeout_ms": -5}`, 400, `invalid_argument`},
		{"Stop", "{}", 400, `"code":"failed_precondition"`},
		{"Resume", "{}", 200, "{}"},
		{"Luns", `{"id":"` + strings.Repeat("x", maxRequest) + `"}`, 413, "too large"},
		{"Explode", "{}", 404, ""},
	} {
		if code, got := post(test.method, test.body); code != test.code || !strings.Contains(got, test.want) {
			t.Errorf("%s %.40s: %d %s; want %d, %q", test.method, test.body, code, got, test.code, test.want)
		}
	}
}

func TestEvents(t *testing.T) {
	f := controltest.New("web1")
	_, c := serve(t, f)
	f.Feed <- machine.Event{Kind: machine.EventState, State: machine.StatePaused, Time: time.Unix(0, 0)}
	stream, err := c.Events(t.Context(), request(&vmmv1.EventsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().State != "paused" || stream.Msg().Kind != "state" {
		t.Errorf("event %v, %v; want that it is paused", stream.Msg(), stream.Err())
	}
	stream.Close()
}

func TestEventLines(t *testing.T) {
	f := controltest.New("web1")
	dir, _ := serve(t, f)
	h := overSocket(dir, false)
	defer h.CloseIdleConnections()
	r, err := h.Get("http://vmm/events")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	f.Feed <- machine.Event{Kind: machine.EventMissed, Missed: 3, Time: time.Unix(0, 0).UTC()}
	lines := bufio.NewScanner(r.Body)
	if want := `{"time":"1970-01-01T00:00:00.000Z","kind":"missed","state":"","text":"","missed":3}`; !lines.Scan() || lines.Text() != want {
		t.Errorf("line %s; want %s", lines.Text(), want)
	}
	f.Stop()
	if lines.Scan() {
		t.Errorf("line %s after the end", lines.Text())
	}
}

func TestGRPC(t *testing.T) {
	dir, _ := serve(t, controltest.New("web1"))
	h := overSocket(dir, true)
	defer h.CloseIdleConnections()
	c := vmmv1connect.NewMachineServiceClient(h, "http://vmm", connect.WithGRPC())
	r, err := c.Status(t.Context(), request(&vmmv1.StatusRequest{}))
	if err != nil || r.Msg.State != "running" {
		t.Errorf("Status() by gRPC = %v, %v", r, err)
	}
}

// Clients that send nothing, or take nothing, keep nobody else from being
// served, and there is an end to how many there can be.
func TestHostileClientsDoNotWedge(t *testing.T) {
	dir, c := serve(t, controltest.New("web1"))
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	silent := func(write string) net.Conn {
		conn, err := net.Dial("unix", dir.Socket("web1"))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		io.WriteString(conn, write)
		return conn
	}
	for i := range maxClients / 2 {
		switch i % 3 {
		case 0:
			silent("")
		case 1:
			silent("POST /vmm.v1.MachineService/Stop HTTP/1.1\r\nHost: vmm\r\nContent-Length: 1000\r\n\r\n{")
		case 2:
			silent(strings.Repeat("GET /vmm.v1.MachineService/Status HTTP/1.1\r\nHost: vmm\r\n\r\n", 500))
		}
	}
	if _, err := c.Status(t.Context(), request(&vmmv1.StatusRequest{})); err != nil {
		t.Errorf("Status() beside %d of them = %v", len(conns), err)
	}
	for range maxClients {
		silent("")
	}
	// The last one was one too many.
	last := conns[len(conns)-1]
	last.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := last.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("client %d reads %v; want the end", len(conns), err)
	}
	if _, err := c.Status(t.Context(), request(&vmmv1.StatusRequest{})); err != nil {
		t.Errorf("Status() on a connection from before = %v", err)
	}
}
