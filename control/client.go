package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"vmm/proto/vmm/v1/vmmv1connect"
)

// ErrNotRunning is in the chain of errors about a machine that is not there.
var ErrNotRunning = errors.New("no such guest runs here")

// Client asks one machine. Its methods are those of the schema; Explain makes
// their errors readable.
type Client struct {
	vmmv1connect.MachineServiceClient
	name      string
	dir       RunDir
	pid       int
	transport *http.Transport
}

// Dial makes a client of the machine called name, or of the process that waits
// for it. It fails with ErrNotRunning if there is neither.
func (d RunDir) Dial(name string) (*Client, error) {
	if err := ValidName(name); err != nil {
		return nil, err
	}
	reached, pid, err := d.reach(name)
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, notRunning(name)
	}
	c := d.client(reached)
	c.pid = pid
	return c, nil
}

// DialListed makes a client of the very process that List has found.
func (d RunDir) DialListed(r Running) (*Client, error) {
	reached := r.Name
	if r.Awaited {
		reached += incoming
	}
	pid, err := d.find(reached)
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, notRunning(r.Name)
	}
	c := d.client(reached)
	c.pid = pid
	return c, nil
}

func notRunning(name string) error {
	return fmt.Errorf("guest %s: %w (vmm ls lists those that do)", name, ErrNotRunning)
}

// client asks without looking first whether anybody is there.
func (d RunDir) client(name string) *Client {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", d.Socket(name))
		},
		DisableCompression: true,
	}
	return &Client{
		MachineServiceClient: vmmv1connect.NewMachineServiceClient(&http.Client{Transport: t}, "http://"+name, connect.WithReadMaxBytes(maxAnswer)),
		name:                 name,
		dir:                  d,
		transport:            t,
	}
}

// maxAnswer bounds what a client takes, in bytes: the registrations of all
// LUNs that a machine can have come to less.
const maxAnswer = 64 << 20

// Name is the guest's name.
func (c *Client) Name() string { return strings.TrimSuffix(c.name, incoming) }

// Awaited says that this is the process that waits for the guest.
func (c *Client) Awaited() bool { return strings.HasSuffix(c.name, incoming) }

// Close drops the connection.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Explain makes an error of one of the client's methods an error for the
// user.
func (c *Client) Explain(err error) error {
	var e *connect.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		// It has gone since Dial looked, or does not listen yet, or any more.
		if pid, ferr := c.dir.find(c.name); ferr == nil && pid == 0 {
			return notRunning(c.Name())
		}
		return fmt.Errorf("guest %s does not answer: it is just starting or ending; try again (%w)", c.Name(), err)
	case errors.As(err, &e) && e.Code() == connect.CodeDeadlineExceeded && !connect.IsWireError(err):
		return fmt.Errorf("guest %s does not answer in time: its process may be stopped or overloaded", c.Name())
	case errors.As(err, &e):
		return fmt.Errorf("guest %s: %s", c.Name(), e.Message())
	}
	return fmt.Errorf("guest %s: %w", c.Name(), err)
}

// Process is the process of a machine, whose end can be waited for.
type Process struct{ pidfd int }

// WhenEnded begins to watch the machine's process. The end of that is the end
// of everything that the machine held.
func (c *Client) WhenEnded() (*Process, error) {
	fd, err := unix.PidfdOpen(c.pid, 0)
	switch {
	case err == unix.ESRCH:
		return nil, notRunning(c.Name())
	case err != nil:
		return nil, fmt.Errorf("guest %s: pidfd_open of pid %d: %w", c.Name(), c.pid, err)
	}
	// Had the process ended before, its number might be another's by now.
	if pid, err := c.dir.find(c.name); err != nil || pid != c.pid {
		unix.Close(fd)
		return nil, errors.Join(notRunning(c.Name()), err)
	}
	return &Process{fd}, nil
}

// Wait waits for the end of the process, limit at most, and says whether it
// has come.
func (p *Process) Wait(limit time.Duration) bool {
	end := time.Now().Add(limit)
	for {
		fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(time.Until(end), 0)/time.Millisecond))
		if err != unix.EINTR {
			return n == 1
		}
	}
}

// Close ends the watch.
func (p *Process) Close() { unix.Close(p.pidfd) }
