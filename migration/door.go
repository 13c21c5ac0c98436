package migration

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
	"vmm/memory"
)

// door is the way of pages from a socket into guest memory within the kernel:
// splice(2) through a pipe into the memory's file. Read into the mapping, which
// has no pages yet, each would cost a page fault, and that takes longer than
// all the rest. But a file has one writer at a time: of several connections,
// those whose turn it is not copy their pages into the mapping meanwhile.
type door struct {
	conn syscall.RawConn
	ram  *memory.RAM
	turn *sync.Mutex // of all connections: who writes into the file holds it
	came *atomic.Uint64
	pipe *sys.Pipe
	held uint64 // bytes of the frame that are in the pipe
	used bool   // bytes have passed: this socket can

	// take takes up to want bytes, and says how many, or why none.
	take func(socket uintptr) (done bool)
	want uint64
	took int
	err  error
}

// smallDoor is a pipe that is not worth it: with two places for pages, as users
// get who have many pipes, there are more system calls than page faults.
const smallDoor = 64 << 10

// newDoor is nil where there is none: conn is no socket, as under TLS, or this
// process has no descriptors or no room for a pipe left.
func newDoor(conn net.Conn, ram *memory.RAM, turn *sync.Mutex, came *atomic.Uint64) *door {
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil
	}
	pipe, err := sys.NewPipe(maxPayload)
	if err != nil {
		return nil
	}
	if pipe.Size() < smallDoor {
		pipe.Close()
		return nil
	}
	d := &door{conn: raw, ram: ram, turn: turn, came: came, pipe: pipe}
	d.take = func(socket uintptr) bool {
		d.took, d.err = d.pipe.From(int(socket), int(min(d.want, uint64(d.pipe.Size()))))
		return !errors.Is(d.err, unix.EAGAIN)
	}
	return d
}

func (d *door) close() { d.pipe.Close() }

// errNoDoor says that the first splice(2) from this socket has failed: the kernel
// cannot do it, or may not, or else who reads learns why.
var errNoDoor = errors.New("no splice(2) from this socket")

// pass brings the next n bytes to gpa, of left that are still to come in their
// frame.
func (d *door) pass(gpa memory.GPA, n, left uint64) error {
	for n > 0 {
		if d.held == 0 {
			d.want = left
			if err := d.conn.Read(d.take); err != nil {
				return err
			}
			if d.err != nil && !d.used {
				return errNoDoor
			}
			if d.err != nil {
				return d.err
			}
			d.held, d.used = uint64(d.took), true
			d.came.Add(d.held)
		}
		k := min(n, d.held)
		if err := d.put(gpa, k); err != nil {
			return err
		}
		gpa, n, left, d.held = gpa+memory.GPA(k), n-k, left-k, d.held-k
	}
	return nil
}

// put brings the next n bytes, which the pipe has, to gpa.
func (d *door) put(gpa memory.GPA, n uint64) error {
	if !d.turn.TryLock() {
		view, err := d.ram.Slice(gpa, n)
		if err != nil {
			return err
		}
		return d.pipe.Into(view)
	}
	defer d.turn.Unlock()
	at, err := d.ram.Offset(gpa, n)
	if err != nil {
		return err
	}
	return d.pipe.To(int(d.ram.File().Fd()), at, int(n))
}
