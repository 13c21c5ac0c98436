package main

import (
	"errors"
	"fmt"
	"net"
	"sync"

	"vmm/internal/sys"
)

// serialPort is a serial cable as a unix socket: one client at a time. What
// the guest writes while nobody is there is lost, as on a cable that leads
// nowhere; a client that does not read slows the guest's output.
type serialPort struct {
	listener *net.UnixListener

	mu      sync.Mutex
	changed sync.Cond // client or closed
	client  net.Conn  // nil while nobody is there
	closed  bool
}

// listenSerial makes the socket at path and waits for clients on it. The
// socket of a process that is gone is replaced.
func listenSerial(path string) (*serialPort, error) {
	l, err := sys.ListenUnix(path)
	if err != nil {
		return nil, fmt.Errorf("serial port at %s: %w", path, err)
	}
	p := &serialPort{listener: l}
	p.changed.L = &p.mu
	go p.accept()
	return p, nil
}

func (p *serialPort) accept() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.mu.Lock()
		for p.client != nil && !p.closed {
			p.changed.Wait()
		}
		if p.closed {
			conn.Close()
		} else {
			p.client = conn
		}
		p.changed.Broadcast()
		p.mu.Unlock()
	}
}

// Read reads from the client, waiting for one if need be.
func (p *serialPort) Read(b []byte) (int, error) {
	for {
		p.mu.Lock()
		for p.client == nil && !p.closed {
			p.changed.Wait()
		}
		conn := p.client
		if p.closed {
			p.mu.Unlock()
			return 0, net.ErrClosed
		}
		p.mu.Unlock()
		if n, err := conn.Read(b); n > 0 || err == nil {
			return n, nil
		}
		p.hangUp(conn)
	}
}

// Write writes to the client if there is one. It fails only after Close.
func (p *serialPort) Write(b []byte) (int, error) {
	p.mu.Lock()
	conn, closed := p.client, p.closed
	p.mu.Unlock()
	if closed {
		return 0, net.ErrClosed
	}
	if conn != nil {
		if _, err := conn.Write(b); err != nil {
			p.hangUp(conn)
		}
	}
	return len(b), nil
}

// hangUp forgets a client that is gone.
func (p *serialPort) hangUp(conn net.Conn) {
	conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client == conn {
		p.client = nil
		p.changed.Broadcast()
	}
}

// Close removes the socket and hangs up.
func (p *serialPort) Close() error {
	p.mu.Lock()
	p.closed = true
	if p.client != nil {
		p.client.Close()
	}
	p.changed.Broadcast()
	p.mu.Unlock()
	if err := p.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
