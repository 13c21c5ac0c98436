package migration

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vmm/memory"
)

// socketPair is two connected unix sockets, in the care of Go's poller.
func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) net.Conn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	return conn(fds[0]), conn(fds[1])
}

func tcpPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// Pages that go by the door are the source's, round after round: runs of all
// lengths, zero ones among them, that clear what came before. In some rounds
// another connection is at the file.
func TestDoor(t *testing.T) {
	for name, pair := range map[string]func(testing.TB) (net.Conn, net.Conn){"unix": socketPair, "tcp": tcpPair} {
		t.Run(name, func(t *testing.T) {
			const size = 8 << 20
			ram, to := newRAM(t, size), newRAM(t, size)
			out, in := pair(t)
			var turn sync.Mutex
			var came atomic.Uint64
			r := newPageReader(in, to, &turn, &came)
			defer r.close()
			c := &channel{conn: out, idle: time.Minute}
			random := rand.New(rand.NewPCG(1, 2))
			sent := uint64(0)
			for round := uint32(1); round <= 8; round++ {
				busy := round%3 == 0
				if busy {
					turn.Lock()
				}
				errs := make(chan error, 1)
				go func() {
					got, err := r.next()
					if err == nil && got != round {
						err = errors.New("the end of another round")
					}
					errs <- err
				}()
				for at := uint64(0); at < size; {
					n := min(uint64(1+random.IntN(300))*memory.PageSize, maxPayload, size-at)
					view, err := ram.Slice(memory.GPA(at), n)
					if err != nil {
						t.Fatal(err)
					}
					for page := 0; page < len(view); page += memory.PageSize {
						clear(view[page : page+memory.PageSize])
						if random.IntN(3) > 0 {
							view[page+random.IntN(memory.PageSize)] = byte(1 + random.IntN(255))
						}
					}
					more, err := c.send(ram, []run{{memory.GPA(at), n}})
					if err != nil {
						t.Fatal(err)
					}
					sent += more
					at += n + uint64(random.IntN(4))*memory.PageSize
				}
				if err := c.end(round); err != nil {
					t.Fatal(err)
				}
				sent += frameHead
				if err := <-errs; err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				if busy {
					turn.Unlock()
				}
				same(t, to, ram)
			}
			if r.door == nil || !r.door.used {
				t.Error("nothing has gone by the door")
			}
			if came.Load() != sent {
				t.Errorf("%d bytes have come; want the %d that were sent", came.Load(), sent)
			}
		})
	}
}

// A connection that ends within a frame, or is closed here, is lost.
func TestDoorBreaks(t *testing.T) {
	const pages = 64
	ram := newRAM(t, 1<<20)
	view, err := ram.Slice(0, pages*memory.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	for i := range view {
		view[i] = 0xa5
	}
	frame := recorded(t, ram, run{0, pages * memory.PageSize})
	for _, x := range []struct {
		name string
		some int // of the pages' bytes
		end  func(out, in net.Conn)
		want error
	}{
		{"by the peer between pages", 10 * memory.PageSize, func(out, _ net.Conn) { out.Close() }, io.ErrUnexpectedEOF},
		{"by the peer within a page", 100, func(out, _ net.Conn) { out.Close() }, io.ErrUnexpectedEOF},
		{"here", 3 * memory.PageSize, func(_, in net.Conn) { in.Close() }, net.ErrClosed},
		{"by a deadline", 3 * memory.PageSize, func(_, in net.Conn) { in.SetReadDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
	} {
		t.Run(x.name, func(t *testing.T) {
			out, in := socketPair(t)
			raw, err := in.(syscall.Conn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			asked := make(chan struct{}, pages*memory.PageSize)
			r := newPageReader(&strange{in, raw, asked}, newRAM(t, 1<<20), new(sync.Mutex), new(atomic.Uint64))
			defer r.close()
			if r.door == nil {
				t.Fatal("there is no door")
			}
			if _, err := out.Write(frame[:frameHead+frameRun+x.some]); err != nil {
				t.Fatal(err)
			}
			failed := make(chan error, 1)
			go func() {
				_, err := r.next()
				failed <- err
			}()
			for range 2 { // for what has come, then for more
				<-asked
			}
			x.end(out, in)
			if err := <-failed; !errors.Is(err, x.want) {
				t.Errorf("the error is %v; want %v", err, x.want)
			}
		})
	}
}

// A socket from which the kernel cannot splice is read.
func TestNoDoor(t *testing.T) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC) // it has no splice
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(epoll), "epoll")
	defer file.Close()
	raw, err := file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	ram, to := newRAM(t, 1<<20), newRAM(t, 1<<20)
	view, err := ram.Slice(0x3000, 5*memory.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	for i := range view {
		view[i] = 0xa5
	}
	out, in := socketPair(t)
	if _, err := out.Write(recorded(t, ram, run{0x3000, 5 * memory.PageSize})); err != nil {
		t.Fatal(err)
	}
	r := newPageReader(&strange{in, raw, make(chan struct{}, 1)}, to, new(sync.Mutex), new(atomic.Uint64))
	defer r.close()
	if r.door == nil {
		t.Fatal("there is no door to try")
	}
	if _, err := r.next(); err != nil || r.door != nil {
		t.Errorf("next: %v; the door is still there: %v", err, r.door != nil)
	}
	same(t, to, ram)
}

// strange is a connection that tells when its descriptor is asked for what has
// come, which is another one's perhaps.
type strange struct {
	net.Conn
	raw   syscall.RawConn
	asked chan<- struct{}
}

func (s *strange) SyscallConn() (syscall.RawConn, error) { return teller{s.raw, s.asked}, nil }

type teller struct {
	syscall.RawConn
	asked chan<- struct{}
}

func (t teller) Read(f func(uintptr) bool) error {
	t.asked <- struct{}{}
	return t.RawConn.Read(f)
}
