package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// drainTime is how long after the end of a command its output is still
// waited for, counted from the last byte: a daemon it left behind may hold the
// pipe open for ever.
const drainTime = 500 * time.Millisecond

// maxCommands is how many commands may run at once for one connection.
const maxCommands = 64

// Options say how Serve treats its commands.
type Options struct {
	Env      []string // environment of every command
	PowerOff func()   // obeys a poweroff message; nil: ignored
	// Chunk is the most output in one message, in bytes; 16 KiB if 0. On a slow
	// line a small one keeps the wait short for whoever comes next.
	Chunk int
}

// Serve runs the commands that arrive on conn until reading it fails, then
// kills what still runs and returns the error; io.EOF is returned as it is.
func Serve(conn io.ReadWriter, opt Options) error {
	if opt.Chunk <= 0 || opt.Chunk > maxChunk {
		opt.Chunk = maxChunk
	}
	s := &server{out: frameWriter{w: conn}, opt: opt, procs: map[uint32]*proc{}}
	err := s.loop(newFrameReader(conn))
	s.mu.Lock()
	for _, p := range s.procs {
		p.abandon()
	}
	s.mu.Unlock()
	s.running.Wait()
	return err
}

type server struct {
	out     frameWriter
	opt     Options
	running sync.WaitGroup

	mu    sync.Mutex
	procs map[uint32]*proc
}

func (s *server) loop(in *frameReader) error {
	for {
		b, err := in.read()
		if err != nil {
			return err
		}
		m, err := parseMessage(b)
		if err != nil {
			continue // a newer asker's; it will notice that there is no answer
		}
		switch m.kind {
		case kindPing:
			if len(m.body) <= 16 {
				s.out.send(kindPong, 0, m.body)
			}
		case kindPowerOff:
			if s.opt.PowerOff != nil {
				s.opt.PowerOff()
			}
		case kindStart:
			s.start(m.id, m.body)
		default:
			s.mu.Lock()
			p := s.procs[m.id]
			s.mu.Unlock()
			if p != nil {
				p.handle(m)
			}
		}
	}
}

func (s *server) start(id uint32, body []byte) {
	refuse := func(format string, args ...any) {
		s.exit(id, 0, 0, fmt.Sprintf(format, args...))
	}
	var req Request
	if err := json.Unmarshal(body, &req); err != nil {
		refuse("request: %v", err)
		return
	}
	if len(req.Args) == 0 {
		refuse("request: no program to run")
		return
	}
	p := &proc{server: s, id: id, req: req, window: newCredit(), input: newQueue()}
	s.mu.Lock()
	switch {
	case s.procs[id] != nil:
		s.mu.Unlock()
		return // a repeated start; the first one is running
	case len(s.procs) >= maxCommands:
		s.mu.Unlock()
		refuse("%d commands are running already", maxCommands)
		return
	}
	s.procs[id] = p
	s.mu.Unlock()
	s.running.Go(p.run)
}

func (s *server) exit(id uint32, status syscall.WaitStatus, sent uint64, text string) {
	body := uvarintBytes(uint64(status), sent)
	s.out.send(kindExit, id, append(body, text...))
}

// proc is a command that runs, or is about to.
type proc struct {
	server *server
	id     uint32
	req    Request
	window *credit // of its output
	input  *queue  // bytes for its standard input

	mu        sync.Mutex
	pid       int      // 0: not started, or reaped
	pty       *os.File // the terminal's master side
	pendingSg []unix.Signal
	abandoned bool

	sentMu sync.Mutex
	sent   uint64
}

func (p *proc) handle(m message) {
	var a, b uint64
	switch m.kind {
	case kindInput:
		if len(m.body) == 0 || !p.input.put(kindInput, m.body) {
			p.input.end()
		}
	case kindCredit:
		if _, err := uvarints(m.body, &a); err == nil {
			p.window.give(a)
		}
	case kindSignal:
		if _, err := uvarints(m.body, &a); err == nil && a > 0 && a <= 64 {
			p.signal(unix.Signal(a))
		}
	case kindResize:
		if _, err := uvarints(m.body, &a, &b); err == nil && a < 1<<16 && b < 1<<16 {
			p.resize(uint16(a), uint16(b))
		}
	}
}

// signal reaches the command's whole session's first process group. A signal
// that comes before the command has started is kept for it.
func (p *proc) signal(sig unix.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid == 0 {
		if len(p.pendingSg) < 8 {
			p.pendingSg = append(p.pendingSg, sig)
		}
		return
	}
	unix.Kill(-p.pid, sig)
}

func (p *proc) resize(rows, cols uint16) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pty != nil {
		setSize(p.pty, rows, cols)
	}
}

// abandon ends a command whose asker has gone.
func (p *proc) abandon() {
	p.mu.Lock()
	p.abandoned = true
	p.mu.Unlock()
	p.window.close()
	p.input.end()
	p.signal(unix.SIGKILL)
}

func (p *proc) run() {
	status, err := p.execute()
	p.server.mu.Lock()
	delete(p.server.procs, p.id)
	p.server.mu.Unlock()
	text := ""
	if err != nil {
		text = err.Error()
	}
	p.server.exit(p.id, status, p.sent, text)
}

// execute runs the command to its end and relays its output. An error means
// that it never started.
func (p *proc) execute() (syscall.WaitStatus, error) {
	cmd := exec.Command(p.req.Args[0], p.req.Args[1:]...)
	cmd.Env = append(append(cmd.Env, p.server.opt.Env...), p.req.Env...)
	if len(cmd.Env) == 0 {
		cmd.Env = os.Environ()
	}
	cmd.Dir = p.req.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}

	var theirs []*os.File // the command's ends, closed here once it has them
	closeTheirs := func() {
		for _, f := range theirs {
			f.Close()
		}
	}
	var pumps []*pump
	addPump := func(r *os.File, k kind) {
		pumps = append(pumps, &pump{proc: p, r: r, kind: k})
	}
	var stdin *os.File
	fail := func(err error) (syscall.WaitStatus, error) {
		closeTheirs()
		for _, pm := range pumps {
			pm.r.Close()
		}
		if stdin != nil && p.req.PTY == nil {
			stdin.Close()
		}
		return 0, err
	}

	if p.req.PTY != nil {
		master, slave, err := OpenPTY()
		if err != nil {
			return fail(fmt.Errorf("terminal: %w", err))
		}
		setSize(master, p.req.PTY.Rows, p.req.PTY.Cols)
		theirs = append(theirs, slave)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		cmd.SysProcAttr.Setctty = true // Ctty 0: standard input
		stdin = master
		addPump(master, kindStdout)
	} else {
		out, w, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		theirs = append(theirs, w)
		addPump(out, kindStdout)
		cmd.Stdout, cmd.Stderr = w, w
		if !p.req.Merge {
			r, w, err := os.Pipe()
			if err != nil {
				return fail(err)
			}
			theirs = append(theirs, w)
			addPump(r, kindStderr)
			cmd.Stderr = w
		}
		if p.req.Stdin {
			r, w, err := os.Pipe()
			if err != nil {
				return fail(err)
			}
			theirs = append(theirs, r)
			cmd.Stdin, stdin = r, w
		}
	}

	p.mu.Lock()
	if p.abandoned {
		p.mu.Unlock()
		return fail(errors.New("the asker has gone"))
	}
	if err := cmd.Start(); err != nil {
		p.mu.Unlock()
		return fail(err)
	}
	p.pid = cmd.Process.Pid
	if p.req.PTY != nil {
		p.pty = stdin
	}
	for _, sig := range p.pendingSg {
		unix.Kill(-p.pid, sig)
	}
	p.mu.Unlock()
	closeTheirs()

	var feeding sync.WaitGroup
	if stdin != nil {
		feeding.Go(func() { p.feed(stdin) })
	}
	var pumping sync.WaitGroup
	for _, pm := range pumps {
		pumping.Go(pm.run)
	}
	cmd.Wait() // the status is in ProcessState whatever it says
	p.mu.Lock()
	p.pid = 0
	p.pty = nil
	p.mu.Unlock()
	p.input.end()
	for _, pm := range pumps {
		pm.finish()
	}
	pumping.Wait()
	if stdin != nil && p.req.PTY == nil {
		stdin.Close() // wakes a feed that is stuck in a write
	}
	feeding.Wait()
	for _, pm := range pumps {
		pm.r.Close()
	}
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok {
		return 0, fmt.Errorf("no exit status: %v", cmd.ProcessState)
	}
	return status, nil
}

// feed writes the input messages to the command, and closes its end at the
// end of the input (a terminal gets an end-of-file character instead).
func (p *proc) feed(w *os.File) {
	for {
		c, ok := p.input.next()
		if !ok {
			break
		}
		if _, err := w.Write(c.data); err != nil {
			// Nobody reads any more. What still comes is taken and dropped.
			continue
		}
		p.server.out.sendNumbers(kindCredit, p.id, uint64(len(c.data)))
	}
	if p.req.PTY == nil {
		w.Close()
	} else {
		w.Write([]byte{4}) // ^D
	}
}

// pump relays one stream of output.
type pump struct {
	proc *proc
	r    *os.File
	kind kind

	mu       sync.Mutex
	finished bool // the command has ended; only what is there is still relayed
}

func (m *pump) finish() {
	m.mu.Lock()
	m.finished = true
	m.mu.Unlock()
	m.r.SetReadDeadline(time.Now().Add(drainTime))
}

func (m *pump) run() {
	buf := make([]byte, m.proc.server.opt.Chunk)
	for {
		m.mu.Lock()
		if m.finished {
			// The time spent waiting for credit does not count.
			m.r.SetReadDeadline(time.Now().Add(drainTime))
		}
		m.mu.Unlock()
		n, err := m.r.Read(buf)
		for data := buf[:n]; len(data) > 0; {
			k := m.proc.window.take(len(data))
			if k == 0 {
				return
			}
			m.proc.sentMu.Lock()
			m.proc.sent += uint64(k)
			m.proc.sentMu.Unlock()
			m.proc.server.out.send(m.kind, m.proc.id, data[:k])
			data = data[k:]
		}
		if err != nil {
			return // end of file, EIO of a terminal without a user, or the deadline
		}
	}
}

// OpenPTY makes a pseudo-terminal.
func OpenPTY() (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	n, err := ptyNumber(master)
	if err == nil {
		slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	return master, slave, nil
}

func ptyNumber(master *os.File) (n int, err error) {
	err2 := control(master, func(fd int) {
		if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		}
	})
	return n, errors.Join(err, err2)
}

func setSize(f *os.File, rows, cols uint16) {
	control(f, func(fd int) {
		unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

// control runs fn with f's descriptor and leaves f in the poller's care.
func control(f *os.File, fn func(fd int)) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return c.Control(func(fd uintptr) { fn(int(fd)) })
}
