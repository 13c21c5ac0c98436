package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"vmm/tests/qmp"
)

const (
	// downtime is the limit that both monitors are given.
	downtime = 20 * time.Millisecond
	// moveTime is how long a move, and the start of a monitor, may take.
	moveTime = 2 * time.Minute
)

// guest is a monitor with a guest, or one that waits for it.
type guest struct {
	cmd    *exec.Cmd
	ram    string // how the memfd of its memory is called
	said   text
	exited chan struct{}
}

// text gathers what a process writes.
type text struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	want string
	seen chan struct{} // closed when want was written
}

func (t *text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	if t.want != "" && strings.Contains(t.buf.String(), t.want) {
		t.want = ""
		close(t.seen)
	}
	return len(p), nil
}

func (t *text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// launch starts a monitor, and waits until it has written ready, if that is
// not empty.
func launch(ram, ready string, env []string, program string, args ...string) (*guest, error) {
	g := &guest{cmd: exec.Command(program, args...), ram: ram, exited: make(chan struct{})}
	g.said.want, g.said.seen = ready, make(chan struct{})
	g.cmd.Env = append(os.Environ(), env...)
	g.cmd.Stdout, g.cmd.Stderr = &g.said, &g.said
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		g.cmd.Wait()
		close(g.exited)
	}()
	if ready == "" {
		return g, nil
	}
	select {
	case <-g.said.seen:
		return g, nil
	case <-g.exited:
		return nil, g.failed(errors.New("it ended"))
	case <-time.After(moveTime):
		return nil, g.failed(errors.New("it did not get ready"))
	}
}

func (g *guest) kill() {
	g.cmd.Process.Kill()
	<-g.exited
}

// failed ends the process; its error is err with what it has said.
func (g *guest) failed(err error) error {
	g.kill()
	return fmt.Errorf("%s: %w: %s", filepath.Base(g.cmd.Path), err, &g.said)
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
func (g *guest) fill(size int) (sum uint32, err error) {
	file, err := g.memory()
	if err != nil {
		return 0, err
	}
	defer file.Close()
	random := rand.NewChaCha8([32]byte{})
	chunk := make([]byte, 1<<20)
	for at := fillAt; at < size; at += len(chunk) {
		random.Read(chunk)
		if _, err := file.WriteAt(chunk, int64(at)); err != nil {
			return 0, err
		}
	}
	return checksum(file, size)
}

// arrived says whether a guest's memory is what it was.
func (g *guest) arrived(size int, want uint32) error {
	file, err := g.memory()
	if err != nil {
		return err
	}
	defer file.Close()
	sum, err := checksum(file, size)
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
	size    int
	sum     uint32
	moves   int
	at      *guest
}

func newVMM(program, dir string, size int) (*vmmPair, error) {
	kernel := filepath.Join(dir, "kernel")
	if err := os.WriteFile(kernel, halting(), 0o600); err != nil {
		return nil, err
	}
	p := &vmmPair{program: program, size: size, env: []string{"VMM_RUN_DIR=" + filepath.Join(dir, "run"), "VMM_STATE_DIR=" + filepath.Join(dir, "state")}}
	var err error
	if p.at, err = p.start("up", "run", p.name(), "--kernel", kernel, "--memory", fmt.Sprintf("%dM", size>>20)); err != nil {
		return nil, err
	}
	if p.sum, err = p.at.fill(size); err != nil {
		p.close()
	}
	return p, err
}

func (p *vmmPair) name() string { return fmt.Sprintf("guest%d", p.moves) }

func (p *vmmPair) close() { p.at.kill() }

func (p *vmmPair) start(ready string, args ...string) (*guest, error) {
	return launch("vmm-ram", ready, p.env, p.program, args...)
}

// move moves the guest over n connections. The rate is that of the whole
// migration, as vmm's summary has it.
func (p *vmmPair) move(n int) (rate float64, err error) {
	address, err := freeAddress()
	if err != nil {
		return 0, err
	}
	from := p.name()
	p.moves++
	next, err := p.start("waiting for a guest", "receive", p.name(), "--listen", address)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(p.program, "migrate", from, address, "--channels", fmt.Sprint(n), "--downtime", downtime.String(), "-o", "json")
	cmd.Env = append(os.Environ(), p.env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, next.failed(fmt.Errorf("vmm migrate: %w: %s; the source said: %s", err, &stderr, &p.at.said))
	}
	<-p.at.exited
	p.at = next
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	var last struct {
		Summary struct {
			SentBytes uint64 `json:"sent_bytes,string"`
			TotalUs   uint64 `json:"total_us,string"`
		}
	}
	if err := json.Unmarshal(lines[len(lines)-1], &last); err != nil || last.Summary.TotalUs == 0 {
		return 0, fmt.Errorf("vmm migrate's summary: %w: %s", err, out)
	}
	return float64(last.Summary.SentBytes) * 1e6 / float64(last.Summary.TotalUs), p.at.arrived(p.size, p.sum)
}

// halting is a kernel that says "up" and halts: an ELF file with a PVH note
// (Xen's "x86/HVM direct boot ABI").
func halting() []byte {
	const at = 1 << 20 // where it is loaded and entered, in 32-bit mode
	code := []byte{
		0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h: the first serial port
		0xb0, 'u', 0xee, // mov al, 'u'; out dx, al
		0xb0, 'p', 0xee,
		0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp back to hlt
	}
	note := []byte("\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00\x00\x00\x10\x00") // XEN_ELFNOTE_PHYS32_ENTRY: at
	const headers = 64 + 2*56
	var b bytes.Buffer
	put := func(v any) { binary.Write(&b, binary.LittleEndian, v) } // a buffer takes everything
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: at, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	put(h)
	put(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: headers, Filesz: uint64(len(note)), Memsz: uint64(len(note)), Align: 4})
	put(elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: 5, Off: headers + uint64(len(note)), Vaddr: at, Paddr: at, Filesz: uint64(len(code)), Memsz: uint64(len(code)), Align: 1})
	b.Write(note)
	b.Write(code)
	return b.Bytes()
}

// qemuPair moves a guest of QEMU to and fro. It never runs.
type qemuPair struct {
	dir   string
	size  int
	sum   uint32
	moves int
	at    *guest
	qmp   *qmp.Monitor
}

func newQEMU(dir string, size int) (*qemuPair, error) {
	p := &qemuPair{dir: dir, size: size}
	var err error
	if p.at, p.qmp, err = p.start(); err != nil {
		return nil, err
	}
	if p.sum, err = p.at.fill(size); err != nil {
		p.close()
	}
	return p, err
}

func (p *qemuPair) close() { p.at.kill() }

func (p *qemuPair) start(more ...string) (*guest, *qmp.Monitor, error) {
	ln, err := qmp.Listen(filepath.Join(p.dir, fmt.Sprintf("qmp%d", p.moves)))
	if err != nil {
		return nil, nil, err
	}
	args := append(ln.Args(), "-accel", "kvm", "-M", "q35,memory-backend=ram", "-m", fmt.Sprint(p.size>>20),
		"-object", fmt.Sprintf("memory-backend-memfd,id=ram,share=on,size=%dM", p.size>>20),
		"-nodefaults", "-no-user-config", "-display", "none", "-S")
	g, err := launch("memory-backend-memfd", "", nil, "qemu-system-x86_64", append(args, more...)...)
	if err != nil {
		return nil, nil, err
	}
	m, err := ln.Accept()
	if err != nil {
		return nil, nil, g.failed(err)
	}
	return g, m, nil
}

// move moves the guest, with multifd if over more than one connection. The
// rate is that of QEMU's total time.
func (p *qemuPair) move(n int) (rate float64, err error) {
	address, err := freeAddress()
	if err != nil {
		return 0, err
	}
	p.moves++
	next, monitor, err := p.start("-incoming", "defer")
	if err != nil {
		return 0, err
	}
	o := qmp.Options{Downtime: downtime}
	if n > 1 {
		o.Channels = n
	}
	if err := monitor.Receive("tcp:"+address, o); err != nil {
		return 0, next.failed(err)
	}
	s, err := p.qmp.Migrate("tcp:"+address, o, moveTime)
	if err != nil {
		return 0, next.failed(fmt.Errorf("%w; the source said: %s", err, &p.at.said))
	}
	p.qmp.Close()
	p.at.kill()
	p.at, p.qmp = next, monitor
	return float64(p.size-fillAt) / s.Total.Seconds(), p.at.arrived(p.size, p.sum)
}
