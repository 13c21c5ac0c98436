// Package qmp has QEMU, the yardstick of vmm's benchmarks, migrate its guest
// (QEMU Machine Protocol, "QMP Protocol Specification").
package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// acceptTime is how long QEMU may take to connect: in the lab everything is
// emulated.
const acceptTime = 2 * time.Minute

// Monitor is a connection to a QEMU. One goroutine uses it.
type Monitor struct {
	conn net.Conn
	in   *json.Decoder
}

// Listener waits for a QEMU that was started with Args.
type Listener struct{ ln *net.UnixListener }

// Listen makes a socket at path for one QEMU to connect to: unlike a socket
// that QEMU makes, it is there from the start.
func Listen(path string) (*Listener, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("qmp: %w", err)
	}
	return &Listener{ln}, nil
}

// Args are QEMU's arguments.
func (l *Listener) Args() []string { return []string{"-qmp", "unix:" + l.ln.Addr().String()} }

// Accept waits for QEMU, and closes l.
func (l *Listener) Accept() (*Monitor, error) {
	defer l.ln.Close()
	if err := l.ln.SetDeadline(time.Now().Add(acceptTime)); err != nil {
		return nil, err
	}
	conn, err := l.ln.Accept()
	if err != nil {
		return nil, fmt.Errorf("qmp: QEMU has not connected: %w", err)
	}
	m := &Monitor{conn: conn, in: json.NewDecoder(conn)}
	var greeting struct{ QMP json.RawMessage }
	if err := m.in.Decode(&greeting); err != nil || greeting.QMP == nil {
		conn.Close()
		return nil, fmt.Errorf("qmp: no greeting from QEMU: %w", err)
	}
	if err := m.Run("qmp_capabilities", nil, nil); err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

// Close ends the connection; QEMU goes on.
func (m *Monitor) Close() error { return m.conn.Close() }

// message is whatever QEMU sends.
type message struct {
	Return json.RawMessage
	Error  *struct{ Class, Desc string }
	Event  string
	Data   struct{ Status string }
}

// Run executes a command. args and result may be nil.
func (m *Monitor) Run(command string, args, result any) error {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	if err := json.NewEncoder(m.conn).Encode(request); err != nil {
		return fmt.Errorf("qmp: %s: %w", command, err)
	}
	for {
		var reply message
		if err := m.in.Decode(&reply); err != nil {
			return fmt.Errorf("qmp: %s: %w", command, err)
		}
		switch {
		case reply.Error != nil:
			return fmt.Errorf("qmp: %s: %s: %s", command, reply.Error.Class, reply.Error.Desc)
		case reply.Return != nil && result != nil:
			return json.Unmarshal(reply.Return, result)
		case reply.Return != nil:
			return nil
		}
	}
}

// Options of a migration. Both sides must be given the same.
type Options struct {
	Channels     int // of multifd; 0: one connection, without it
	Downtime     time.Duration
	AutoConverge bool // slow a guest down that writes faster than can be sent
}

// unlimited is a bandwidth, bytes per second, that nothing reaches.
const unlimited = 1 << 50

func (m *Monitor) configure(o Options) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := m.Run("migrate-set-capabilities", map[string]any{"capabilities": []capability{
		{"events", true}, {"multifd", o.Channels > 0}, {"auto-converge", o.AutoConverge},
	}}, nil); err != nil {
		return err
	}
	parameters := map[string]any{"max-bandwidth": int64(unlimited), "downtime-limit": o.Downtime.Milliseconds()}
	if o.Channels > 0 {
		parameters["multifd-channels"] = o.Channels
	}
	return m.Run("migrate-set-parameters", parameters, nil)
}

// Receive makes a QEMU that was started with -incoming defer listen.
func (m *Monitor) Receive(uri string, o Options) error {
	if err := m.configure(o); err != nil {
		return err
	}
	return m.Run("migrate-incoming", map[string]any{"uri": uri}, nil)
}

// Summary is what QEMU says of a migration.
type Summary struct {
	Total, Downtime time.Duration
	Sent            uint64 // bytes
}

// ErrLate: a migration took too long, and was given up.
var ErrLate = errors.New("the migration did not end in time")

// Migrate moves the guest, within limit.
func (m *Monitor) Migrate(uri string, o Options, limit time.Duration) (Summary, error) {
	if err := m.configure(o); err != nil {
		return Summary{}, err
	}
	if err := m.Run("migrate", map[string]any{"uri": uri}, nil); err != nil {
		return Summary{}, err
	}
	if err := m.conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return Summary{}, err
	}
	for ended := false; !ended; {
		var e message
		if err := m.in.Decode(&e); err != nil {
			if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
				return Summary{}, fmt.Errorf("qmp: %w: %v", ErrLate, limit)
			}
			return Summary{}, fmt.Errorf("qmp: during the migration: %w", err)
		}
		if e.Event == "MIGRATION" && (e.Data.Status == "failed" || e.Data.Status == "cancelled") {
			return Summary{}, fmt.Errorf("qmp: the migration has %s", e.Data.Status)
		}
		ended = e.Event == "MIGRATION" && e.Data.Status == "completed"
	}
	if err := m.conn.SetReadDeadline(time.Time{}); err != nil {
		return Summary{}, err
	}
	var info struct {
		TotalTime int64 `json:"total-time"` // ms
		Downtime  int64
		RAM       struct{ Transferred uint64 }
	}
	// QEMU says that it has ended before it says how long it took.
	for info.TotalTime == 0 {
		if err := m.Run("query-migrate", nil, &info); err != nil {
			return Summary{}, err
		}
	}
	ms := func(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
	return Summary{ms(info.TotalTime), ms(info.Downtime), info.RAM.Transferred}, nil
}
