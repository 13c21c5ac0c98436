package migration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
)

// recorded is what a channel writes for the given memory.
func recorded(t testing.TB, ram *memory.RAM, runs ...run) []byte {
	t.Helper()
	a, b := net.Pipe()
	out := make(chan []byte)
	go func() {
		all, _ := io.ReadAll(b)
		out <- all
	}()
	c := &channel{conn: a, idle: shortly.Connect}
	if len(runs) > 0 {
		if _, err := c.send(ram, runs); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.end(7); err != nil {
		t.Fatal(err)
	}
	a.Close()
	return <-out
}

// The data frames, byte for byte: what this version writes, every later one
// must read.
func TestFrames(t *testing.T) {
	ram := newRAM(t, 1<<20)
	view, err := ram.Slice(0x3000, 2*memory.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	for i := range view {
		view[i] = 0xa5
	}
	got := recorded(t, ram, run{0x2000, 4 * memory.PageSize}, run{0x10000, memory.PageSize})
	var want []byte
	for _, v := range []uint64{
		4<<32 | 1, 2 * memory.PageSize, // four runs, two pages
		0x2000 | 1, memory.PageSize,
		0x3000, 2 * memory.PageSize,
		0x5000 | 1, memory.PageSize,
		0x10000 | 1, memory.PageSize,
	} {
		want = binary.LittleEndian.AppendUint64(want, v)
	}
	want = append(want, view...)
	want = append(want, 2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	if !bytes.Equal(got, want) {
		t.Errorf("frames are % x...; want % x...", got[:min(len(got), 96)], want[:96])
	}
	if b := (preamble{role: roleData, channel: 3, id: ID{0: 1, 15: 2}}).bytes(); !bytes.Equal(b, []byte("vmmigr\r\n\x02\x03\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02")) {
		t.Errorf("preamble % x", b)
	}

	to := newRAM(t, 1<<20)
	stale, err := to.Slice(0x10000, 5)
	if err != nil {
		t.Fatal(err)
	}
	copy(stale, "stale")
	p := &pageReader{r: bytes.NewReader(got), ram: to, ended: true}
	if round, err := p.next(); round != 7 || err != nil {
		t.Errorf("next = %d, %v; want 7", round, err)
	}
	if _, err := p.next(); err != io.EOF {
		t.Errorf("next at the end = %v; want EOF", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(to.File().Fd()), &st); err != nil || st.Blocks != 2*memory.PageSize/512 {
		t.Errorf("memory has %d blocks, %v; want two pages", st.Blocks, err)
	}
	same(t, to, ram)
}

// hostile are data frames that no honest source sends.
func hostile() map[string][]byte {
	frame := func(words ...uint64) (b []byte) {
		for _, v := range words {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
		return b
	}
	const page = memory.PageSize
	return map[string][]byte{
		"kind 0":                frame(0, 0),
		"kind 3":                frame(1<<32|3, 0),
		"an end with bytes":     frame(1<<32|2, 1),
		"no runs":               frame(1, 0),
		"too many runs":         frame((maxRuns+1)<<32|1, 0),
		"too many bytes":        frame(1<<32|1, maxPayload+page, 0, maxPayload+page),
		"beyond the end":        frame(1<<32|1, page, 1<<20, page),
		"across the end":        frame(1<<32|1, 2*page, 1<<20-page, 2*page),
		"zeroes beyond":         frame(1<<32|1, 0, 1<<20|1, page),
		"an address that wraps": frame(1<<32|1, page, ^uint64(0)&^(page-1), page),
		"a length that wraps":   frame(2<<32|1, page, 0, page, page, ^uint64(0)&^(page-1)),
		"not aligned":           frame(1<<32|1, page, 512, page),
		"half a page":           frame(1<<32|1, 100, 0, 100),
		"an empty run":          frame(1<<32|1, 0, 0, 0),
		"more than it says":     frame(2<<32|1, page, 0, page, page, page),
		"less than it says":     frame(1<<32|1, 2*page, 0, page),
	}
}

func TestHostileFrames(t *testing.T) {
	for name, b := range hostile() {
		ram := newRAM(t, 1<<20)
		p := &pageReader{r: io.MultiReader(bytes.NewReader(b), bytes.NewReader(bytes.Repeat([]byte{0xff}, 4<<20))), ram: ram}
		_, err := p.next()
		if err == nil || !strings.Contains(err.Error(), "breaks the protocol") {
			t.Errorf("%s: next = %v", name, err)
		}
		if err := ram.Extents(0, ram.Size(), func(gpa memory.GPA, n uint64) error {
			return fmt.Errorf("%d bytes at %v were written", n, gpa)
		}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A stream that ends in the middle is no end.
	whole := recorded(t, newRAM(t, 1<<20), run{0, 3 * memory.PageSize})
	for cut := 1; cut < len(whole)-frameHead; cut++ {
		p := &pageReader{r: bytes.NewReader(whole[:cut]), ram: newRAM(t, 1<<20)}
		if _, err := p.next(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d of %d: %v; want unexpected EOF", cut, len(whole), err)
		}
	}
}

// A length is believed only as far as bytes arrive.
func TestMessageAllocation(t *testing.T) {
	head := binary.LittleEndian.AppendUint32(nil, maxMessage)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := readMessage(bytes.NewReader(head), maxMessage); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("readMessage = %v; want unexpected EOF", err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("a length of %d allocates %d bytes", maxMessage, n)
	}
	if _, err := readMessage(bytes.NewReader(binary.LittleEndian.AppendUint32(nil, maxMessage+1)), maxMessage); err == nil {
		t.Error("a message that is too long was read")
	}
	big := &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Refused{Refused: &vmmv1.Refused{Reason: strings.Repeat("x", maxMessage)}}}
	if _, err := appendMessage(nil, big); err == nil {
		t.Error("a message that is too long was encoded")
	}
}

// The page path does not allocate per frame.
func TestPagesDoNotAllocate(t *testing.T) {
	ram := newRAM(t, 1<<20)
	view, err := ram.Slice(0, ram.Size())
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(view); i += 2 * memory.PageSize {
		view[i] = 1
	}
	whole := recorded(t, ram, run{0, ram.Size()})
	in := bytes.NewReader(whole)
	p := &pageReader{r: in, ram: newRAM(t, 1<<20)}
	if n := testing.AllocsPerRun(100, func() {
		in.Reset(whole)
		if _, err := p.next(); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("receiving a frame allocates %v times", n)
	}
	c := &channel{conn: discardConn{}}
	runs := []run{{0, ram.Size()}}
	send := func() {
		if _, err := c.send(ram, runs); err != nil {
			t.Fatal(err)
		}
	}
	send()
	if n := testing.AllocsPerRun(100, send); n > 1 { // net.Buffers' header escapes
		t.Errorf("sending a frame of 256 runs allocates %v times", n)
	}
}

type discardConn struct{ net.Conn }

func (discardConn) Write(b []byte) (int, error)      { return len(b), nil }
func (discardConn) SetWriteDeadline(time.Time) error { return nil }

// FuzzPages: whatever arrives on a data connection, nothing panics, nothing
// is written outside the runs, and an error xor a round's end comes out.
func FuzzPages(f *testing.F) {
	for _, b := range hostile() {
		f.Add(b)
	}
	ram := newRAM(f, 1<<20)
	view, err := ram.Slice(0x3000, 2*memory.PageSize)
	if err != nil {
		f.Fatal(err)
	}
	view[0], view[memory.PageSize] = 1, 1
	f.Add(recorded(f, ram, run{0x2000, 4 * memory.PageSize}))
	f.Add(recorded(f, ram, run{0x4000, memory.PageSize}, run{0x2000, 2 * memory.PageSize}))
	f.Add(recorded(f, ram))
	to, spliced := newRAM(f, 64<<10), newRAM(f, 64<<10)
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, ram := range []*memory.RAM{to, spliced} {
			if err := ram.Discard(0, ram.Size()); err != nil {
				t.Fatal(err)
			}
		}
		in := bytes.NewReader(b)
		p := &pageReader{r: in, ram: to}
		for {
			if _, err := p.next(); err != nil {
				break
			}
		}
		written := uint64(0)
		if err := to.Extents(0, to.Size(), func(_ memory.GPA, n uint64) error { written += n; return nil }); err != nil {
			t.Fatal(err)
		}
		// A page is allocated when its first byte arrives.
		if most := uint64(len(b)-in.Len()) + memory.PageSize; written > most {
			t.Fatalf("%d bytes of memory were written by %d bytes of input", written, len(b)-in.Len())
		}
		// What goes by the door arrives as well.
		out, conn := socketPair(t)
		go func() {
			out.Write(b)
			out.Close()
		}()
		q := newPageReader(conn, spliced, new(sync.Mutex), new(atomic.Uint64))
		defer q.close()
		if q.door == nil {
			t.Fatal("there is no door")
		}
		for {
			if _, err := q.next(); err != nil {
				break
			}
		}
		same(t, spliced, to)
	})
}

// FuzzMessage: both sides' readers of the control connection. What is read is
// a message that encodes again to the same meaning.
func FuzzMessage(f *testing.F) {
	id := NewID()
	for _, m := range []*vmmv1.StreamMessage{
		{Body: &vmmv1.StreamMessage_Hello{Hello: &vmmv1.Hello{
			Version: 1, Channels: 2, Regions: []*vmmv1.MemoryRegion{{Size: 1 << 20}}, Config: &vmmv1.MachineConfig{Name: "web1"},
			Luns: []*vmmv1.HostLun{{Id: "data", Identity: "naa.5", TransportId: []byte(nexS.Initiator), Reservations: true}},
		}}},
		{Body: &vmmv1.StreamMessage_State{State: &vmmv1.FinalState{Machine: &vmmv1.MachineState{}, LastRound: 3}}},
		{Body: &vmmv1.StreamMessage_Reservation{Reservation: &vmmv1.Reservation{Step: 1, Result: 1, Type: 5, Key: 7, Attentions: []uint32{0x062a09}}}},
		{Body: &vmmv1.StreamMessage_Attachment{Attachment: &vmmv1.AttachmentChunk{Attachment: 1, Data: []byte("kernel")}}},
		abortedBecause("no"), undecided("perhaps"), acknowledge(),
	} {
		m.Id = id[:]
		b, err := appendMessage(nil, m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := readMessage(bytes.NewReader(b), maxHello)
		if (err == nil) == (m == nil) {
			t.Fatalf("readMessage = %v, %v", m, err)
		}
		if err != nil {
			return
		}
		again, err := appendMessage(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := readMessage(bytes.NewReader(again), maxMessage); err != nil || kindOf(n) != kindOf(m) {
			t.Fatalf("read %v, encoded it, read %v, %v", m, n, err)
		}
		// What a side makes of it, in every state.
		for s := offering; s < states; s++ {
			if _, err := s.step(receives, kindOf(m)); err != nil && err.Error() == "" {
				t.Fatal("an error without words")
			}
		}
		if r := m.GetReservation(); r != nil {
			_, _ = decodeReservation(r)
			_, _ = decodeSenses(r.Attentions)
		}
		for _, l := range m.GetHello().GetLuns() {
			if p, err := pairOf(l, l); err == nil && p != nil && !p.Same && p.Old == p.New && p.FullStatus {
				t.Fatalf("two hosts on one nexus: %v", l)
			}
		}
	})
}

// stream measures the page path: 256 MiB that are not zero.
func stream(b *testing.B, channels int, dial func(net.Listener) func() net.Conn, ln net.Listener) {
	const size = 256 << 20
	ram, to := newRAM(b, size), newRAM(b, size)
	view, err := ram.Slice(0, size)
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; i < len(view); i += 8 {
		binary.LittleEndian.PutUint64(view[i:], uint64(i)|1)
	}
	connect := dial(ln)
	p := &pump{ram: ram}
	var turn sync.Mutex
	done := make(chan error, channels)
	for range channels {
		accepted := make(chan net.Conn, 1) // a TLS client waits for the first read
		go func() {
			c, err := ln.Accept()
			if err != nil {
				b.Error(err)
			}
			accepted <- c
			r := newPageReader(c, to, &turn, new(atomic.Uint64))
			defer r.close()
			for {
				_, err := r.next()
				done <- err
				if err != nil {
					return
				}
			}
		}()
		p.channels = append(p.channels, &channel{conn: connect(), idle: Deadlines{}.withDefaults().Idle})
		in := <-accepted
		defer in.Close()
	}
	visit := func(fn func(memory.GPA, uint64) error) error { return fn(0, size) }
	round := uint32(0)
	send := func() {
		round++
		if err := p.round(context.Background(), round, visit); err != nil {
			b.Fatal(err)
		}
		for range channels {
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
	}
	b.SetBytes(size)
	for b.Loop() {
		b.StopTimer()
		if err := to.Discard(0, size); err != nil { // as a destination's memory is in the first round
			b.Fatal(err)
		}
		b.StartTimer()
		send()
	}
	for _, c := range p.channels {
		c.conn.Close()
	}
}

func BenchmarkPages(b *testing.B) {
	unixListener := func() net.Listener {
		ln, err := net.Listen("unix", filepath.Join(b.TempDir(), "s"))
		if err != nil {
			b.Fatal(err)
		}
		return ln
	}
	tcpListener := func(s Security) net.Listener {
		ln, err := Listen(Address{"tcp", "127.0.0.1:0"}, s, nil)
		if err != nil {
			b.Fatal(err)
		}
		return ln
	}
	dial := func(s Security) func(net.Listener) func() net.Conn {
		return func(ln net.Listener) func() net.Conn {
			a := Address{ln.Addr().Network(), ln.Addr().String()}
			d, err := Dialer(a, s, "localhost")
			if err != nil {
				b.Fatal(err)
			}
			return func() net.Conn {
				c, err := d(context.Background())
				if err != nil {
					b.Fatal(err)
				}
				return c
			}
		}
	}
	secure := Security{TLS: newAuthority(b).issue(b, "localhost")}
	for _, channels := range []int{1, 2} {
		for _, tt := range []struct {
			name string
			s    Security
			ln   func() net.Listener
		}{
			{"unix", Security{}, unixListener},
			{"tcp", Security{}, func() net.Listener { return tcpListener(Security{}) }},
			{"tls", secure, func() net.Listener { return tcpListener(secure) }},
		} {
			b.Run(fmt.Sprintf("%s/channels=%d", tt.name, channels), func(b *testing.B) {
				ln := tt.ln()
				defer ln.Close()
				stream(b, channels, dial(tt.s), ln)
			})
		}
	}
}

// BenchmarkCopy is what BenchmarkPages is to be compared with: the same bytes
// through one connection in pieces of 1 MiB, with nothing made of them.
func BenchmarkCopy(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		b.Run(network, func(b *testing.B) {
			address := "127.0.0.1:0"
			if network == "unix" {
				address = filepath.Join(b.TempDir(), "s")
			}
			ln, err := net.Listen(network, address)
			if err != nil {
				b.Fatal(err)
			}
			defer ln.Close()
			const size = 256 << 20
			from, to := newRAM(b, size), newRAM(b, size)
			src, err := from.Slice(0, size)
			if err != nil {
				b.Fatal(err)
			}
			for i := 0; i < len(src); i += memory.PageSize {
				src[i] = 1
			}
			dst, err := to.Slice(0, size)
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan error)
			go func() {
				c, err := ln.Accept()
				for err == nil {
					_, err = io.ReadFull(c, dst)
					done <- err
				}
			}()
			c, err := net.Dial(network, ln.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			defer func() {
				c.Close()
				<-done
			}()
			send := func() {
				for at := 0; at < size; at += maxPayload {
					if _, err := c.Write(src[at : at+maxPayload]); err != nil {
						b.Fatal(err)
					}
				}
				if err := <-done; err != nil {
					b.Fatal(err)
				}
			}
			send()
			b.SetBytes(size)
			b.ResetTimer()
			for b.Loop() {
				send()
			}
		})
	}
}
