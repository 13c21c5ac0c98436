package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"vmm/boot/boottest"
	lab "vmm/tests/guest"
	"vmm/tests/qmp"
)

const (
	// downtime is the limit that both monitors are given.
	downtime = 20 * time.Millisecond
	// moveTime is how long a move, and the start of a monitor, may take.
	moveTime = 2 * time.Minute
)

// shape is what a guest has.
type shape struct {
	memory int    // bytes
	filled int    // where the random bytes end that begin at fillAt
	code   []byte // what it does
}

// kernel writes the guest's code as a kernel.
func (s *shape) kernel(dir, who string) (path string, err error) {
	path = filepath.Join(dir, "kernel-"+who)
	return path, boottest.WriteKernel(path, s.code)
}

// moved is what a monitor says of a move.
type moved struct {
	total, downtime time.Duration
	sent            uint64 // bytes
}

// guest is a monitor with a guest, or one that waits for it.
type guest struct {
	cmd     *exec.Cmd
	ram     string      // how the memfd of its memory is called
	console *lab.Output // the guest's
	said    *lab.Output
	exited  chan struct{}
}

// launch starts a monitor.
func launch(ram string, env []string, program string, args ...string) (*guest, error) {
	g := &guest{cmd: exec.Command(program, args...), ram: ram, console: lab.NewOutput(), said: lab.NewOutput(), exited: make(chan struct{})}
	g.cmd.Env = append(os.Environ(), env...)
	g.cmd.Stdout, g.cmd.Stderr = g.console, g.said
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		g.cmd.Wait()
		close(g.exited)
	}()
	return g, nil
}

// prints waits until the guest prints something.
func (g *guest) prints() error {
	return g.wait(g.console, func(text string) bool { return text != "" })
}

// wait waits until ready is true of what comes out of the process.
func (g *guest) wait(out *lab.Output, ready func(text string) bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), moveTime)
	defer cancel()
	if err := out.Wait(ctx, g.exited, ready); err != nil {
		return g.failed(err)
	}
	return nil
}

// still has the monitor stand still, so that what another one is measured at
// has the machine to itself, until it is called with false.
func (g *guest) still(on bool) {
	if on {
		g.cmd.Process.Signal(syscall.SIGSTOP)
	} else {
		g.cmd.Process.Signal(syscall.SIGCONT)
	}
}

func (g *guest) kill() {
	g.cmd.Process.Kill()
	<-g.exited
}

// failed ends the process; its error is err with what it has said.
func (g *guest) failed(err error) error {
	g.kill()
	return fmt.Errorf("%s: %w: %s", filepath.Base(g.cmd.Path), err, g.said)
}

// memory opens the guest's memory.
func (g *guest) memory() (*os.File, error) {
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", g.cmd.Process.Pid))
	if err != nil {
		return nil, err
	}
	for _, link := range links {
		if name, err := os.Readlink(link); err == nil && strings.HasPrefix(name, "/memfd:"+g.ram) {
			return os.OpenFile(link, os.O_RDWR, 0)
		}
	}
	return nil, g.failed(errors.New("no memfd " + g.ram))
}

// fill writes random bytes into a guest's memory and returns their checksum.
// They are the same for every guest.
func (g *guest) fill(end int) (sum uint32, err error) {
	file, err := g.memory()
	if err != nil {
		return 0, err
	}
	defer file.Close()
	random := rand.NewChaCha8([32]byte{})
	chunk := make([]byte, 1<<20)
	for at := fillAt; at < end; at += len(chunk) {
		random.Read(chunk)
		if _, err := file.WriteAt(chunk, int64(at)); err != nil {
			return 0, err
		}
	}
	return checksum(file, end)
}

// arrived says whether a guest's memory is what it was.
func (g *guest) arrived(end int, want uint32) error {
	file, err := g.memory()
	if err != nil {
		return err
	}
	defer file.Close()
	sum, err := checksum(file, end)
	if err == nil && sum != want {
		err = fmt.Errorf("the memory's checksum is %08x after the move; want %08x", sum, want)
	}
	return err
}

// freeAddress is a port of this host that nobody uses.
func freeAddress() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// vmmPair moves a guest of vmm to and fro.
type vmmPair struct {
	program string
	env     []string
	shape   shape
	sum     uint32
	moves   int
	at      *guest
}

func newVMM(program, dir string, s shape) (*vmmPair, error) {
	kernel, err := s.kernel(dir, "vmm")
	if err != nil {
		return nil, err
	}
	p := &vmmPair{program: program, shape: s, env: []string{"VMM_RUN_DIR=" + filepath.Join(dir, "run"), "VMM_STATE_DIR=" + filepath.Join(dir, "state")}}
	if p.at, err = p.start("run", p.name(), "--kernel", kernel, "--memory", fmt.Sprintf("%dM", s.memory>>20)); err != nil {
		return nil, err
	}
	if err = p.at.prints(); err == nil {
		p.sum, err = p.at.fill(s.filled)
	}
	if err != nil {
		p.close()
	}
	return p, err
}

func (p *vmmPair) name() string { return fmt.Sprintf("guest%d", p.moves) }

func (p *vmmPair) close() { p.at.kill() }

func (p *vmmPair) guest() *guest { return p.at }

func (p *vmmPair) start(args ...string) (*guest, error) {
	return launch("vmm-ram", p.env, p.program, args...)
}

// move moves the guest over n connections.
func (p *vmmPair) move(n int) (m moved, err error) {
	address, err := freeAddress()
	if err != nil {
		return m, err
	}
	from := p.name()
	p.moves++
	next, err := p.start("receive", p.name(), "--listen", address)
	if err != nil {
		return m, err
	}
	if err := next.wait(next.said, func(text string) bool { return strings.Contains(text, "waiting for a guest") }); err != nil {
		return m, err
	}
	cmd := exec.Command(p.program, "migrate", from, address, "--channels", fmt.Sprint(n), "--downtime", downtime.String(), "-o", "json")
	cmd.Env = append(os.Environ(), p.env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return m, next.failed(fmt.Errorf("vmm migrate: %w: %s; the source said: %s", err, &stderr, p.at.said))
	}
	<-p.at.exited
	p.at = next
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	var last struct {
		Summary struct {
			SentBytes uint64 `json:"sent_bytes,string"`
			TotalUs   uint64 `json:"total_us,string"`
			Downtime  struct {
				TotalUs uint64 `json:"total_us,string"`
			}
		}
	}
	if err := json.Unmarshal(lines[len(lines)-1], &last); err != nil || last.Summary.TotalUs == 0 {
		return m, fmt.Errorf("vmm migrate's summary: %w: %s", err, out)
	}
	us := func(n uint64) time.Duration { return time.Duration(n) * time.Microsecond }
	m = moved{us(last.Summary.TotalUs), us(last.Summary.Downtime.TotalUs), last.Summary.SentBytes}
	return m, p.at.arrived(p.shape.filled, p.sum)
}

// qemuPair moves a guest of QEMU to and fro. Without code it never runs.
type qemuPair struct {
	dir   string
	shape shape
	sum   uint32
	moves int
	at    *guest
	qmp   *qmp.Monitor
}

func newQEMU(dir string, s shape) (*qemuPair, error) {
	p := &qemuPair{dir: dir, shape: s}
	more := []string{"-S"}
	if p.runs() {
		kernel, err := s.kernel(dir, "qemu")
		if err != nil {
			return nil, err
		}
		more = []string{"-kernel", kernel}
	}
	var err error
	if p.at, p.qmp, err = p.start(more...); err != nil {
		return nil, err
	}
	if p.runs() {
		err = p.at.prints()
	}
	if err == nil {
		p.sum, err = p.at.fill(s.filled)
	}
	if err != nil {
		p.close()
	}
	return p, err
}

func (p *qemuPair) guest() *guest { return p.at }

func (p *qemuPair) runs() bool { return p.shape.code != nil }

func (p *qemuPair) close() { p.at.kill() }

func (p *qemuPair) start(more ...string) (*guest, *qmp.Monitor, error) {
	ln, err := qmp.Listen(filepath.Join(p.dir, fmt.Sprintf("qmp%d", p.moves)))
	if err != nil {
		return nil, nil, err
	}
	args := append(ln.Args(), "-accel", "kvm", "-M", "q35,memory-backend=ram", "-m", fmt.Sprint(p.shape.memory>>20),
		"-object", fmt.Sprintf("memory-backend-memfd,id=ram,share=on,size=%dM", p.shape.memory>>20),
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio")
	g, err := launch("memory-backend-memfd", nil, "qemu-system-x86_64", append(args, more...)...)
	if err != nil {
		return nil, nil, err
	}
	m, err := ln.Accept()
	if err != nil {
		return nil, nil, g.failed(err)
	}
	return g, m, nil
}

// move moves the guest, with multifd if over more than one connection. QEMU
// may slow it down, as vmm does.
func (p *qemuPair) move(n int) (m moved, err error) {
	address, err := freeAddress()
	if err != nil {
		return m, err
	}
	p.moves++
	more := []string{"-incoming", "defer"}
	if !p.runs() {
		more = append(more, "-S")
	}
	next, monitor, err := p.start(more...)
	if err != nil {
		return m, err
	}
	o := qmp.Options{Downtime: downtime, AutoConverge: p.runs()}
	if n > 1 {
		o.Channels = n
	}
	if err := monitor.Receive("tcp:"+address, o); err != nil {
		return m, next.failed(err)
	}
	s, err := p.qmp.Migrate("tcp:"+address, o, moveTime)
	if err != nil {
		return m, next.failed(fmt.Errorf("%w; the source said: %s", err, p.at.said))
	}
	p.qmp.Close()
	p.at.kill()
	p.at, p.qmp = next, monitor
	return moved{s.Total, s.Downtime, s.Sent}, p.at.arrived(p.shape.filled, p.sum)
}
