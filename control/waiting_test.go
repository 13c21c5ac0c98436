package control

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	vmmv1 "vmm/proto/vmm/v1"
)

func TestWaitingServer(t *testing.T) {
	dir := runDir(t)
	claim, err := dir.Await("web1", false)
	if err != nil {
		t.Fatal(err)
	}
	stops := 0
	s := NewWaitingServer(claim, Waiting{Name: "web1", Address: "tcp://host2:4444", Stop: func() { stops++ }}, "1.2.3")
	served := make(chan error)
	go func() { served <- s.Serve() }()
	c, err := dir.Dial("web1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, err := c.Status(t.Context(), request(&vmmv1.StatusRequest{}))
	if err != nil || r.Msg.State != StateWaiting || r.Msg.Name != "web1" || r.Msg.Migration != "waited for at tcp://host2:4444" {
		t.Errorf("Status() = %v, %v; want web1, waiting", r, err)
	}
	if v, err := c.Version(t.Context(), request(&vmmv1.VersionRequest{})); err != nil || v.Msg.Version != "1.2.3" {
		t.Errorf("Version() = %v, %v; want 1.2.3", v, err)
	}
	// What there is no guest for says so, streams too.
	_, pause := c.Pause(t.Context(), request(&vmmv1.PauseRequest{}))
	console, err := c.Console(t.Context(), request(&vmmv1.ConsoleRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	if console.Receive() {
		t.Errorf("Console() = %v; want nothing", console.Msg())
	}
	for method, err := range map[string]error{"Pause": pause, "Console": console.Err()} {
		if got := c.Explain(err); connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(got.Error(), "guest web1: the guest has not come yet: it is waited for at tcp://host2:4444") {
			t.Errorf("%s() = %v, %v; want that it has not come", method, connect.CodeOf(err), got)
		}
	}
	for range 2 {
		if _, err := c.Stop(t.Context(), request(&vmmv1.StopRequest{})); err != nil {
			t.Errorf("Stop() = %v", err)
		}
	}
	if stops != 2 {
		t.Errorf("Stop was called %d times; want 2", stops)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if err := claim.Close(); err != nil {
		t.Error(err)
	}
}
