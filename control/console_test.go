package control

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"vmm/control/controltest"
	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
)

// readConsole attaches and returns the pieces until f says that it is enough.
func readConsole(t *testing.T, c *Client, r *vmmv1.ConsoleRequest, enough func(text string) bool) (text string, missed uint64) {
	t.Helper()
	stream, err := c.Console(t.Context(), request(r))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		m := stream.Msg()
		text += string(m.Text)
		missed += m.MissedBytes
		if enough(text) {
			return text, missed
		}
	}
	if err := stream.Err(); err != nil {
		t.Errorf("Console() ends with %v after %q", err, text)
	}
	return text, missed
}

func ends(string) bool { return false }

func TestConsole(t *testing.T) {
	f := controltest.New("web1")
	_, c := serve(t, f)
	f.Console().Write([]byte("booted\r\n"))
	for _, test := range []struct {
		scrollback *uint64
		want       string
	}{{nil, "booted\r\n"}, {new(uint64(4)), "ed\r\n"}, {new(uint64(0)), ""}} {
		if got, missed := readConsole(t, c, &vmmv1.ConsoleRequest{ScrollbackBytes: test.scrollback, NoFollow: true}, ends); got != test.want || missed != 0 {
			t.Errorf("Console() = %q, %d missed; want %q", got, missed, test.want)
		}
	}
	// Two who read, both of whom type.
	streams := make([]*connect.ServerStreamForClient[vmmv1.ConsoleResponse], 2)
	for i := range streams {
		var err error
		if streams[i], err = c.Console(t.Context(), request(&vmmv1.ConsoleRequest{})); err != nil {
			t.Fatal(err)
		}
		defer streams[i].Close()
		for at, want := range []string{"booted\r\n", ""} {
			if !streams[i].Receive() || string(streams[i].Msg().Text) != want || streams[i].Msg().Scrollback != (at == 0) {
				t.Fatalf("reader %d: %v, %v; want %q", i, streams[i].Msg(), streams[i].Err(), want)
			}
		}
	}
	for _, typed := range []string{"ls\r", "date\r"} {
		if _, err := c.ConsoleInput(t.Context(), request(&vmmv1.ConsoleInputRequest{Text: []byte(typed)})); err != nil {
			t.Fatal(err)
		}
		for i, s := range streams {
			if !s.Receive() || string(s.Msg().Text) != typed || s.Msg().Scrollback {
				t.Errorf("reader %d: %v, %v; want %q", i, s.Msg(), s.Err(), typed)
			}
		}
	}
	f.Stop()
	for i, s := range streams {
		if s.Receive() || s.Err() != nil {
			t.Errorf("reader %d after the end: %v, %v; want the end", i, s.Msg(), s.Err())
		}
	}
	f.Type = func(context.Context, []byte) (int, error) { return 0, machine.ErrEnded }
	if _, err := c.ConsoleInput(t.Context(), request(&vmmv1.ConsoleInputRequest{Text: []byte("x")})); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("ConsoleInput() after the end = %v; want failed precondition", err)
	}
}

// A reader that does not read holds up neither the guest nor another reader,
// and learns what it has missed.
func TestSlowConsoleReader(t *testing.T) {
	f := controltest.New("web1")
	_, c := serve(t, f)
	slow, err := c.Console(t.Context(), request(&vmmv1.ConsoleRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	if !slow.Receive() {
		t.Fatal(slow.Err())
	}
	const lines = 8 << 10
	line := append(bytes.Repeat([]byte("x"), 1023), '\n')
	for range lines {
		f.Console().Write(line)
	}
	f.Console().Write([]byte("login: "))
	text, missed := readConsole(t, c, &vmmv1.ConsoleRequest{}, func(s string) bool { return strings.HasSuffix(s, "login: ") })
	if len(text) != machine.ConsoleKept || missed != lines*1024+7-machine.ConsoleKept {
		t.Errorf("another reader got %d bytes and missed %d; want the last %d", len(text), missed, machine.ConsoleKept)
	}
	f.Stop()
	var got, lost uint64
	for slow.Receive() {
		got += uint64(len(slow.Msg().Text))
		lost += slow.Msg().MissedBytes
	}
	if err := slow.Err(); err != nil || got+lost != lines*1024+7 || lost == 0 {
		t.Errorf("the slow reader got %d bytes and missed %d, %v; want %d together, and some missed", got, lost, err, lines*1024+7)
	}
}

func TestConsoleReadersAreBounded(t *testing.T) {
	f := controltest.New("web1")
	dir, c := serve(t, f)
	attach := func() *connect.ServerStreamForClient[vmmv1.ConsoleResponse] {
		s, err := c.Console(t.Context(), request(&vmmv1.ConsoleRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	for range maxConsoles {
		if s := attach(); !s.Receive() {
			t.Fatal(s.Err())
		}
	}
	if s := attach(); s.Receive() || connect.CodeOf(s.Err()) != connect.CodeResourceExhausted {
		t.Errorf("one reader too many: %v, %v; want resource exhausted", s.Msg(), s.Err())
	}
	h := overSocket(dir, false)
	defer h.CloseIdleConnections()
	r, err := h.Get("http://vmm/console")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != 429 {
		t.Errorf("one reader too many by GET: %d; want 429", r.StatusCode)
	}
	if _, err := c.Status(t.Context(), request(&vmmv1.StatusRequest{})); err != nil {
		t.Errorf("Status() beside them = %v", err)
	}
	f.Stop() // and they leave
}

// Whoever types at a guest that does not read may leave.
func TestTypingAtADeafGuest(t *testing.T) {
	f := controltest.New("web1")
	typing := make(chan struct{})
	left := make(chan error, 1)
	f.Type = func(ctx context.Context, _ []byte) (int, error) {
		close(typing)
		<-ctx.Done()
		left <- ctx.Err()
		return 0, ctx.Err()
	}
	_, c := serve(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-typing
		cancel()
	}()
	if _, err := c.ConsoleInput(ctx, request(&vmmv1.ConsoleInputRequest{Text: []byte("x")})); connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("ConsoleInput() = %v; want canceled", err)
	}
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the guest's side: %v; want canceled", err)
	}
}

func TestConsoleByCurl(t *testing.T) {
	f := controltest.New("web1")
	dir, _ := serve(t, f)
	f.Console().Write(bytes.Repeat([]byte("x"), machine.ConsoleKept+5))
	h := overSocket(dir, false)
	defer h.CloseIdleConnections()
	r, err := h.Get("http://vmm/console")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	lines := bufio.NewScanner(r.Body)
	lines.Buffer(nil, 2*machine.ConsoleKept)
	f.Stop()
	var got []string
	for lines.Scan() {
		got = append(got, lines.Text())
	}
	if len(got) != 3 || got[1] != "[vmm: 5 bytes are missing here]" || len(got[2]) != machine.ConsoleKept {
		t.Errorf("GET /console: %d lines, %.60q; want the 5 missing bytes and the rest", len(got), got)
	}
}
