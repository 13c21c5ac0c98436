package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

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
	transport *http.Transport
}

// Dial makes a client of the machine called name. It fails with ErrNotRunning
// if no process has that name.
func (d RunDir) Dial(name string) (*Client, error) {
	if err := ValidName(name); err != nil {
		return nil, err
	}
	pid, err := d.find(name)
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, notRunning(name)
	}
	return d.client(name), nil
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
			return notRunning(c.name)
		}
		return fmt.Errorf("guest %s does not answer: it is just starting or ending; try again", c.name)
	case errors.As(err, &e) && e.Code() == connect.CodeDeadlineExceeded && !connect.IsWireError(err):
		return fmt.Errorf("guest %s does not answer in time: its process may be stopped or overloaded", c.name)
	case errors.As(err, &e):
		return fmt.Errorf("guest %s: %s", c.name, e.Message())
	}
	return fmt.Errorf("guest %s: %w", c.name, err)
}
