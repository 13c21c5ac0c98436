package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrClosed is the cause of every failure after Close.
var ErrClosed = errors.New("agent: connection closed")

// A Client asks an agent to run commands. Its methods may be called from any
// goroutine.
type Client struct {
	conn io.ReadWriteCloser
	out  frameWriter
	in   *frameReader

	done chan struct{} // closed when the connection has failed or was closed

	mu     sync.Mutex
	err    error // why done is closed
	nextID uint32
	cmds   map[uint32]*Cmd
	pongs  map[string]chan struct{}
}

// NewClient returns a client that owns conn.
func NewClient(conn io.ReadWriteCloser) *Client {
	var start [2]byte
	rand.Read(start[:])
	c := &Client{
		conn: conn,
		out:  frameWriter{w: conn},
		in:   newFrameReader(conn),
		done: make(chan struct{}),
		// The agent may still run a command of an earlier client (a guest that
		// migrated has a new one): do not meet its id.
		nextID: uint32(binary.LittleEndian.Uint16(start[:])) << 4,
		cmds:   map[uint32]*Cmd{},
		pongs:  map[string]chan struct{}{},
	}
	go c.receive()
	return c
}

// Close closes the connection; commands that run fail with ErrClosed.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	return c.conn.Close()
}

// Done is closed when the connection is no more.
func (c *Client) Done() <-chan struct{} { return c.done }

// Dropped returns how many runs of received bytes were no frame.
func (c *Client) Dropped() uint64 { return c.in.dropped.Load() }

// Ping asks for a sign of life once a second until the agent answers or ctx is
// done. (An agent that has not opened its serial port yet loses what is sent.)
func (c *Client) Ping(ctx context.Context) error {
	var nonce [4]byte
	rand.Read(nonce[:])
	answered := make(chan struct{})
	c.mu.Lock()
	c.pongs[string(nonce[:])] = answered
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pongs, string(nonce[:]))
		c.mu.Unlock()
	}()
	again := time.NewTicker(time.Second)
	defer again.Stop()
	for {
		// A pipe whose other end does not read must not hold up ctx.
		sent := make(chan error, 1)
		go func() { sent <- c.out.send(kindPing, 0, nonce[:]) }()
		for waiting := true; waiting; {
			select {
			case <-answered:
				return nil
			case err := <-sent:
				if err != nil {
					return fmt.Errorf("agent: ping: %w", err)
				}
				sent = nil
			case <-again.C:
				waiting = sent != nil // one ping under way at a time
			case <-c.done:
				return fmt.Errorf("agent: ping: %w", c.cause())
			case <-ctx.Done():
				return fmt.Errorf("agent: no answer to ping (%d bad frames seen): %w", c.Dropped(), context.Cause(ctx))
			}
		}
	}
}

// PowerOff asks the agent's machine to power itself off. There is no answer;
// the connection ends.
func (c *Client) PowerOff() error { return c.out.send(kindPowerOff, 0, nil) }

func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.done)
	for _, cmd := range c.cmds {
		cmd.output.end()
		cmd.window.close()
	}
}

func (c *Client) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Client) receive() {
	for {
		b, err := c.in.read()
		if err != nil {
			c.fail(fmt.Errorf("agent: connection lost: %w", err))
			return
		}
		m, err := parseMessage(b)
		if err != nil {
			continue
		}
		c.mu.Lock()
		if m.kind == kindPong {
			if answered, ok := c.pongs[string(m.body)]; ok {
				delete(c.pongs, string(m.body))
				close(answered)
			}
		}
		cmd := c.cmds[m.id]
		c.mu.Unlock()
		if cmd != nil {
			cmd.handle(m)
		}
	}
}

// Cmd is a command at the agent's end, after the pattern of exec.Cmd. It
// cannot be reused.
type Cmd struct {
	Args []string // Args[0] is the program, looked up in the agent's PATH
	Env  []string // K=V, added to the agent's environment
	Dir  string

	// Stdin, if not nil, is read until its end or the command's. A Read that
	// blocks does not hold up Wait.
	Stdin io.Reader
	// Stdout and Stderr get the output, nil discards it. If they are the same
	// writer, the two streams keep their order. A writer that blocks holds up
	// this command only.
	Stdout, Stderr io.Writer
	// PTY, if not nil, runs the command on a terminal of that size. All output
	// goes to Stdout.
	PTY *Size

	client *Client
	ctx    context.Context
	id     uint32
	window *credit // of the input
	output *queue
	exited chan struct{} // closed by the exit message
	result exit

	waiting  sync.WaitGroup
	received uint64
	writeErr error
	stopCtx  func() bool
}

type exit struct {
	status syscall.WaitStatus
	sent   uint64
	text   string
}

// ExitError is how a command that ran and did not succeed is reported.
type ExitError struct {
	Args   []string
	Status syscall.WaitStatus
	Stderr []byte // from Output: the end of what it wrote there
}

func (e *ExitError) Error() string {
	what := fmt.Sprintf("exit status %d", e.Status.ExitStatus())
	if e.Status.Signaled() {
		what = "signal: " + e.Status.Signal().String()
	}
	text := fmt.Sprintf("%s: %s", strings.Join(e.Args, " "), what)
	if s := bytes.TrimSpace(e.Stderr); len(s) > 0 {
		text += ": " + string(s)
	}
	return text
}

// ExitCode returns the exit status, or -1 if a signal ended the command.
func (e *ExitError) ExitCode() int { return e.Status.ExitStatus() }

// Command returns a command that has not been started. When ctx is done, the
// command and its process group are killed.
func (c *Client) Command(ctx context.Context, name string, args ...string) *Cmd {
	return &Cmd{Args: append([]string{name}, args...), client: c, ctx: ctx}
}

// Start starts the command. Wait must follow.
func (m *Cmd) Start() error {
	if m.exited != nil {
		return errors.New("agent: command started twice")
	}
	if err := m.ctx.Err(); err != nil {
		return context.Cause(m.ctx)
	}
	m.exited, m.window, m.output = make(chan struct{}), newCredit(), newQueue()
	body, err := json.Marshal(Request{
		Args: m.Args, Env: m.Env, Dir: m.Dir, PTY: m.PTY,
		Stdin: m.Stdin != nil,
		Merge: m.Stdout != nil && sameWriter(m.Stdout, m.Stderr),
	})
	if err != nil {
		return err
	}
	if len(body) > MaxMessage-16 {
		return fmt.Errorf("agent: a command of %d bytes; at most %d", len(body), MaxMessage-16)
	}

	c := m.client
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	m.id = c.nextID
	c.nextID++
	c.cmds[m.id] = m
	c.mu.Unlock()
	if err := c.out.send(kindStart, m.id, body); err != nil {
		m.forget()
		return err
	}
	m.stopCtx = context.AfterFunc(m.ctx, func() { m.Signal(unix.SIGKILL) })
	m.waiting.Go(m.consume)
	if m.Stdin != nil {
		go m.feed()
	}
	return nil
}

// sameWriter compares two writers; types that cannot be compared differ.
func sameWriter(a, b io.Writer) bool {
	defer func() { recover() }()
	return a == b
}

func (m *Cmd) forget() {
	m.client.mu.Lock()
	delete(m.client.cmds, m.id)
	m.client.mu.Unlock()
}

func (m *Cmd) handle(msg message) {
	switch msg.kind {
	case kindStdout, kindStderr:
		if !m.output.put(msg.kind, msg.body) {
			m.client.fail(errors.New("agent: the peer sent more than the window allows"))
		}
	case kindCredit:
		var n uint64
		if _, err := uvarints(msg.body, &n); err == nil {
			m.window.give(n)
		}
	case kindExit:
		var status uint64
		text, err := uvarints(msg.body, &status, &m.result.sent)
		if err != nil {
			text = []byte("malformed exit message")
		}
		m.result.status, m.result.text = syscall.WaitStatus(status), string(text)
		m.forget() // so that there is no second one
		close(m.exited)
		m.window.close()
		m.output.end()
	}
}

// consume hands the output to the writers and the credit back to the agent.
func (m *Cmd) consume() {
	owed := 0
	for {
		c, ok := m.output.next()
		if !ok {
			return
		}
		w := m.Stdout
		if c.kind == kindStderr {
			w = m.Stderr
		}
		if w != nil && m.writeErr == nil {
			_, m.writeErr = w.Write(c.data)
		}
		m.received += uint64(len(c.data))
		// A serial line is slow: give back large portions only.
		if owed += len(c.data); owed >= Window/4 {
			m.client.out.sendNumbers(kindCredit, m.id, uint64(owed))
			owed = 0
		}
	}
}

func (m *Cmd) feed() {
	buf := make([]byte, maxChunk)
	for {
		n, err := m.Stdin.Read(buf)
		for data := buf[:n]; len(data) > 0; {
			k := m.window.take(len(data))
			if k == 0 || m.client.out.send(kindInput, m.id, data[:k]) != nil {
				return
			}
			data = data[k:]
		}
		if err != nil {
			m.client.out.send(kindInput, m.id, nil)
			return
		}
	}
}

// Signal sends sig to the command's process group.
func (m *Cmd) Signal(sig syscall.Signal) error {
	return m.client.out.sendNumbers(kindSignal, m.id, uint64(sig))
}

// Resize tells the command's terminal its new size.
func (m *Cmd) Resize(s Size) error {
	return m.client.out.sendNumbers(kindResize, m.id, uint64(s.Rows), uint64(s.Cols))
}

// Wait waits for the command's end and for its output to be written.
func (m *Cmd) Wait() error {
	select {
	case <-m.exited:
	case <-m.client.done:
	case <-m.ctx.Done():
		// It has been killed. Its end is worth waiting for, but the agent may
		// be the very thing that hangs.
		select {
		case <-m.exited:
		case <-m.client.done:
		case <-time.After(10 * time.Second):
			m.forget()
			m.output.end()
		}
	}
	m.stopCtx()
	m.waiting.Wait()

	select {
	case <-m.exited:
	default:
		if m.ctx.Err() != nil {
			return fmt.Errorf("agent: %s: %w", m.name(), context.Cause(m.ctx))
		}
		m.forget()
		return fmt.Errorf("agent: %s: %w", m.name(), m.client.cause())
	}
	switch r := m.result; {
	case r.text != "":
		return fmt.Errorf("agent: start %s: %s", m.name(), r.text)
	case m.ctx.Err() != nil && r.status.Signaled():
		return fmt.Errorf("agent: %s: %w", m.name(), context.Cause(m.ctx))
	case m.received != r.sent:
		return fmt.Errorf("agent: %s: output lost on the way: got %d bytes of %d", m.name(), m.received, r.sent)
	case r.status != 0:
		return &ExitError{Args: m.Args, Status: r.status}
	}
	return m.writeErr
}

func (m *Cmd) name() string { return strings.Join(m.Args, " ") }

// Run starts the command and waits for it.
func (m *Cmd) Run() error {
	if err := m.Start(); err != nil {
		return err
	}
	return m.Wait()
}

// Output runs the command and returns what it wrote to its standard output.
// An ExitError carries the end of its standard error if Stderr was nil.
func (m *Cmd) Output() ([]byte, error) {
	if m.Stdout != nil {
		return nil, errors.New("agent: Stdout already set")
	}
	var out bytes.Buffer
	m.Stdout = &out
	tail := &Tail{Max: 4 << 10}
	if m.Stderr == nil {
		m.Stderr = tail
	}
	err := m.Run()
	if e, ok := errors.AsType[*ExitError](err); ok {
		e.Stderr = tail.Bytes()
	}
	return out.Bytes(), err
}

// CombinedOutput runs the command and returns all that it wrote.
func (m *Cmd) CombinedOutput() ([]byte, error) {
	if m.Stdout != nil || m.Stderr != nil {
		return nil, errors.New("agent: Stdout or Stderr already set")
	}
	var out bytes.Buffer
	m.Stdout, m.Stderr = &out, &out
	err := m.Run()
	return out.Bytes(), err
}

// Tail is a writer that keeps the last Max bytes written to it.
type Tail struct {
	Max int

	mu  sync.Mutex
	buf []byte
}

func (t *Tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if len(t.buf) > 2*t.Max { // not with each write: that would copy Max bytes for each
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-t.Max:]...)
	}
	return len(p), nil
}

// Bytes returns a copy of what is kept.
func (t *Tail) Bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Clone(t.buf[max(0, len(t.buf)-t.Max):])
}

// Conn starts the command and returns its standard input and output as a
// connection. Close kills the command. Its standard error goes to Stderr.
func (m *Cmd) Conn() (io.ReadWriteCloser, error) {
	if m.Stdin != nil || m.Stdout != nil {
		return nil, errors.New("agent: Stdin or Stdout already set")
	}
	c := &conn{cmd: m}
	var in *io.PipeReader
	var out *io.PipeWriter
	in, c.PipeWriter = io.Pipe()
	c.PipeReader, out = io.Pipe()
	m.Stdin, m.Stdout = in, out
	if err := m.Start(); err != nil {
		return nil, err
	}
	c.waited.Go(func() {
		err := m.Wait()
		if err == nil {
			err = io.EOF
		}
		out.CloseWithError(err) // what Read returns after the last output
		in.CloseWithError(err)
	})
	return c, nil
}

type conn struct {
	cmd *Cmd
	*io.PipeReader
	*io.PipeWriter
	waited sync.WaitGroup
}

func (c *conn) Close() error {
	c.PipeReader.Close() // output is discarded from now on
	c.PipeWriter.Close()
	err := c.cmd.Signal(unix.SIGKILL)
	c.waited.Wait()
	return err
}
