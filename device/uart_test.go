package device

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// line is an interrupt line that counts its rising edges.
type line struct {
	mu    sync.Mutex
	level bool
	rises int
}

func (l *line) set(level bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if level && !l.level {
		l.rises++
	}
	l.level = level
}

func (l *line) get() (level bool, rises int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.level, l.rises
}

// gate is a writer that lets nothing through until it is opened.
type gate struct {
	open chan struct{}
	mu   sync.Mutex
	got  bytes.Buffer
}

func newGate() *gate { return &gate{open: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.got.Write(p)
}

func (g *gate) bytes() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return bytes.Clone(g.got.Bytes())
}

func newUART(t testing.TB, out io.Writer) (*UART, *line) {
	t.Helper()
	l := new(line)
	u := NewUART(out, l.set)
	t.Cleanup(func() { u.Close(t.Context()) })
	return u, l
}

type handler interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

func in(d handler, off uint64) byte {
	var p [1]byte
	d.Read(off, p[:])
	return p[0]
}

func out(d handler, off uint64, v ...byte) { d.Write(off, v) }

func check(t *testing.T, what string, got, want byte) {
	t.Helper()
	if got != want {
		t.Errorf("%s = %#02x; want %#02x", what, got, want)
	}
}

func flush(t *testing.T, u *UART) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := u.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

// What Linux's 8250 driver does to find out what a UART is, and whether it
// has one of the known bugs.
func TestUARTIsA16550AForLinux(t *testing.T) {
	u, l := newUART(t, io.Discard)

	// Only four bits of IER exist.
	out(u, regIER, 0)
	check(t, "IER after 0", in(u, regIER), 0)
	out(u, regIER, 0xff)
	check(t, "IER after 0xff", in(u, regIER), 0x0f)
	out(u, regIER, 0)

	// Loopback connects MCR's outputs to MSR's inputs.
	for _, test := range []struct{ mcr, msr byte }{
		{mcrLoop | 0x0a, 0x90}, {mcrLoop | 0x05, 0x60}, {mcrLoop, 0}, {mcrLoop | 0x0f, 0xf0}, {0, 0xb0}, {0x0f, 0xb0},
	} {
		out(u, regMCR, test.mcr)
		if got := in(u, regMSR) & 0xf0; got != test.msr {
			t.Errorf("MSR with MCR %#x = %#x; want %#x", test.mcr, got, test.msr)
		}
		check(t, "MCR", in(u, regMCR), test.mcr)
	}
	out(u, regMCR, 0)

	// FIFOs that work, no enhanced feature register, no 64-byte FIFO.
	out(u, regLCR, 0xbf)
	out(u, regIIR, 0)
	out(u, regLCR, 0)
	out(u, regIIR, fcrEnable)
	check(t, "IIR with FIFOs", in(u, regIIR), 0xc1)
	out(u, regLCR, lcrDLAB)
	if in(u, regIIR) == 0 {
		t.Error("offset 2 with DLAB reads as 0: a 16650's EFR")
	}
	out(u, regIIR, fcrEnable|1<<5)
	check(t, "IIR after asking for 64-byte FIFOs", in(u, regIIR)>>5, 6)
	out(u, regLCR, 0)
	out(u, regIIR, 0)
	check(t, "IIR without FIFOs", in(u, regIIR), 0x01)

	for _, v := range []byte{0, 0x55, 0xaa} {
		out(u, regSCR, v)
		check(t, "scratch register", in(u, regSCR), v)
	}
	out(u, regLCR, lcrDLAB|3)
	out(u, regData, 1)
	out(u, regIER, 2)
	check(t, "DLL", in(u, regData), 1)
	check(t, "DLM", in(u, regIER), 2)
	out(u, regLCR, 3)
	check(t, "IER behind DLM", in(u, regIER), 0)

	// The THRE interrupt comes each time it is enabled.
	_, before := l.get()
	for i := range 3 {
		out(u, regIER, 0)
		check(t, "IIR with interrupts disabled", in(u, regIIR), iirNone)
		out(u, regIER, ierTHRI)
		if level, rises := l.get(); !level || rises-before != i+1 {
			t.Errorf("enabling THRI %d times: line %v after %d edges; want it high after %d", i+1, level, rises-before, i+1)
		}
		check(t, "LSR", in(u, regLSR), lsrTHRE|lsrTEMT)
		check(t, "IIR", in(u, regIIR), iirTHRI)
		check(t, "IIR after it was acknowledged", in(u, regIIR), iirNone)
		if level, _ := l.get(); level {
			t.Error("line is high after the IIR was read")
		}
	}
}

func TestUARTOutput(t *testing.T) {
	var got bytes.Buffer
	u, l := newUART(t, &got)
	out(u, regIER, ierTHRI)
	in(u, regIIR)
	for i, b := range []byte("hello") {
		out(u, regData, b)
		if level, rises := l.get(); !level || rises != i+2 {
			t.Errorf("after byte %d: line %v after %d edges; want it high after %d", i, level, rises, i+2)
		}
	}
	flush(t, u)
	if got.String() != "hello" {
		t.Errorf("writer got %q; want \"hello\"", got.String())
	}
}

// A driver that respects THRE loses nothing to a writer that stands still,
// and is interrupted when it may go on.
func TestUARTOutputWaitsForTheWriter(t *testing.T) {
	g := newGate()
	u, l := newUART(t, g)
	out(u, regIIR, fcrEnable)
	var sent []byte
	for in(u, regLSR)&lsrTHRE != 0 {
		for range fifoSize {
			b := byte(len(sent) % 251)
			out(u, regData, b)
			sent = append(sent, b)
		}
		if len(sent) > 2*txFull {
			t.Fatalf("transmitter is empty after %d bytes that nobody took", len(sent))
		}
	}
	out(u, regIER, ierTHRI)
	if level, _ := l.get(); level {
		t.Error("THRE interrupt while the transmitter is full")
	}
	// A console that has waited long enough writes all the same.
	out(u, regData, 'x')
	sent = append(sent, 'x')

	s := u.State()
	if !s.THRI {
		t.Error("a state taken while full does not hold the THRE interrupt that is due elsewhere")
	}

	close(g.open)
	flush(t, u)
	check(t, "LSR after all was written", in(u, regLSR), lsrTHRE|lsrTEMT)
	check(t, "IIR after all was written", in(u, regIIR), iirFIFO|iirTHRI)
	if level, rises := l.get(); level || rises != 1 {
		t.Errorf("line %v after %d edges; want it low after 1", level, rises)
	}
	if !bytes.Equal(g.bytes(), sent) {
		t.Errorf("writer got %d bytes; want the %d sent", len(g.bytes()), len(sent))
	}
	if n := u.Lost(); n != 0 {
		t.Errorf("Lost() = %d; want 0", n)
	}
}

func TestUARTOutputIsBounded(t *testing.T) {
	g := newGate()
	u, _ := newUART(t, g)
	const extra = 1000
	for range txLimit + extra {
		out(u, regData, 'x')
	}
	if n := u.Lost(); n != extra {
		t.Errorf("Lost() = %d; want %d", n, extra)
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if err := u.Flush(done); !errors.Is(err, context.Canceled) {
		t.Errorf("Flush(canceled) = %v; want context.Canceled", err)
	}
	close(g.open)
	flush(t, u)
	if n := len(g.bytes()); n != txLimit {
		t.Errorf("writer got %d bytes; want %d", n, txLimit)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// A console that went away does not stop the guest.
func TestUARTSurvivesABrokenWriter(t *testing.T) {
	u, _ := newUART(t, brokenWriter{})
	out(u, regData, 'x')
	if err := u.Flush(t.Context()); !errors.Is(err, io.ErrClosedPipe) {
		t.Fatalf("Flush() = %v; want the writer's error", err)
	}
	for range 2 * txFull {
		out(u, regData, 'x')
	}
	check(t, "LSR", in(u, regLSR), lsrTHRE|lsrTEMT)
	if n := u.Lost(); n != 2*txFull {
		t.Errorf("Lost() = %d; want %d", n, 2*txFull)
	}
}

// guest opens the UART as a driver does.
func openReceiver(u *UART, fcr byte) {
	out(u, regIIR, fcr)
	out(u, regMCR, mcrDTR|mcrRTS|mcrOut2)
	in(u, regMSR)
	out(u, regIER, ierRDI|ierRLSI)
}

// A paste of 1 KiB arrives whole, also what came before the driver was there.
func TestUARTInputArrivesWhole(t *testing.T) {
	for _, test := range []struct {
		name string
		fcr  byte
	}{{"FIFO, trigger 14", fcrEnable | 0xc0}, {"FIFO, trigger 1", fcrEnable}, {"no FIFO", 0}} {
		t.Run(test.name, func(t *testing.T) {
			u, l := newUART(t, io.Discard)
			paste := make([]byte, 1024)
			for i := range paste {
				paste[i] = byte(i * 7)
			}
			if n, err := u.Input(t.Context(), paste); n != len(paste) || err != nil {
				t.Fatalf("Input() = %d, %v; want %d", n, err, len(paste))
			}
			if in(u, regLSR)&lsrDR != 0 {
				t.Error("data arrives without RTS")
			}
			openReceiver(u, test.fcr|fcrClearRx)
			var got []byte
			for {
				level, _ := l.get()
				iir := in(u, regIIR) & 0xf
				if level != (iir != iirNone) {
					t.Fatalf("line is %v and IIR %#x", level, iir)
				}
				if !level {
					break
				}
				if iir != iirRDI && iir != iirTimeout {
					t.Fatalf("IIR = %#x; want received data", iir)
				}
				for in(u, regLSR)&lsrDR != 0 {
					got = append(got, in(u, regData))
				}
			}
			if !bytes.Equal(got, paste) {
				t.Errorf("guest got %d bytes; want the %d pasted", len(got), len(paste))
			}
		})
	}
}

func TestUARTInputTriggerLevels(t *testing.T) {
	for _, test := range []struct {
		fcr   byte
		bytes int
		iir   byte
	}{
		{fcrEnable, 1, 0xc4}, {fcrEnable | 0x40, 3, 0xcc}, {fcrEnable | 0x40, 4, 0xc4},
		{fcrEnable | 0x80, 7, 0xcc}, {fcrEnable | 0x80, 8, 0xc4},
		{fcrEnable | 0xc0, 13, 0xcc}, {fcrEnable | 0xc0, 14, 0xc4}, {0xc0, 1, 0x04}, {fcrEnable, 0, 0xc1},
	} {
		u, _ := newUART(t, io.Discard)
		openReceiver(u, test.fcr)
		u.Input(t.Context(), make([]byte, test.bytes))
		if got := in(u, regIIR); got != test.iir {
			t.Errorf("FCR %#x, %d bytes: IIR = %#x; want %#x", test.fcr, test.bytes, got, test.iir)
		}
	}
}

// Input holds back what the guest does not take, and goes on when it does.
func TestUARTInputBlocksAndResumes(t *testing.T) {
	u, _ := newUART(t, io.Discard)
	openReceiver(u, fcrEnable)
	big := bytes.Repeat([]byte("0123456789"), 20_000)
	done := make(chan error, 1)
	go func() {
		_, err := u.Input(t.Context(), big)
		done <- err
	}()
	var got []byte
	for len(got) < len(big) {
		if in(u, regLSR)&lsrDR != 0 {
			got = append(got, in(u, regData))
		}
	}
	if err := <-done; err != nil || !bytes.Equal(got, big) {
		t.Errorf("Input() = %v and the guest got other bytes than it was given", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		n, err := u.Input(ctx, big)
		if n > rxLimit+fifoSize {
			t.Errorf("Input accepted %d bytes that nobody read", n)
		}
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Input() = %v; want context.Canceled", err)
	}
	go func() {
		_, err := u.Input(t.Context(), big)
		done <- err
	}()
	u.Close(t.Context())
	if err := <-done; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Input() while closing = %v; want io.ErrClosedPipe", err)
	}
}

// With its flow control the guest loses nothing; clearing the FIFO drops only
// what is in it.
func TestUARTInputFlowControl(t *testing.T) {
	u, _ := newUART(t, io.Discard)
	openReceiver(u, fcrEnable)
	out(u, regMCR, mcrDTR)
	u.Input(t.Context(), []byte("0123456789abcdefghijklmnopqrstuvwxyz"))
	if in(u, regLSR)&lsrDR != 0 {
		t.Error("data arrives while RTS is off")
	}
	out(u, regMCR, mcrDTR|mcrRTS)
	check(t, "first byte", in(u, regData), '0') // FIFO: 1-9, a-g
	out(u, regMCR, mcrDTR)
	out(u, regIIR, fcrEnable|fcrClearRx)
	if in(u, regLSR)&lsrDR != 0 {
		t.Error("data after the FIFO was cleared")
	}
	out(u, regMCR, mcrDTR|mcrRTS)
	check(t, "byte behind the FIFO", in(u, regData), 'h')
}

func TestUARTLoopbackData(t *testing.T) {
	var got bytes.Buffer
	u, l := newUART(t, &got)
	out(u, regIIR, fcrEnable)
	out(u, regMCR, mcrLoop)
	out(u, regIER, ierRLSI)
	for i := range byte(fifoSize + 1) {
		out(u, regData, i)
	}
	if level, _ := l.get(); !level {
		t.Error("no interrupt for an overrun")
	}
	check(t, "IIR after an overrun", in(u, regIIR), iirFIFO|iirRLSI)
	check(t, "LSR after an overrun", in(u, regLSR), lsrDR|lsrOE|lsrTHRE|lsrTEMT)
	check(t, "LSR read again", in(u, regLSR), lsrDR|lsrTHRE|lsrTEMT)
	for i := range byte(fifoSize) {
		check(t, "looped-back byte", in(u, regData), i)
	}
	flush(t, u)
	if got.Len() != 0 {
		t.Errorf("writer got %q in loopback", got.String())
	}
}

func TestUARTModemStatusChanges(t *testing.T) {
	u, l := newUART(t, io.Discard)
	out(u, regIER, ierMSI)
	out(u, regMCR, mcrLoop|mcrOut1) // CTS, DSR, DCD fall, RI rises
	if level, _ := l.get(); !level {
		t.Error("no interrupt for a change of the modem lines")
	}
	check(t, "IIR", in(u, regIIR), iirModem)
	check(t, "MSR", in(u, regMSR), msrRI|0x0b)
	check(t, "MSR read again", in(u, regMSR), msrRI)
	out(u, regMCR, mcrLoop) // RI falls
	check(t, "MSR after RI fell", in(u, regMSR), msrTERI)
}

// Every width at every offset is a row of byte accesses; what is outside
// reads as ones.
func TestUARTWideAccess(t *testing.T) {
	u, _ := newUART(t, io.Discard)
	out(u, regLCR, lcrDLAB)
	out(u, regData, 0x34, 0x12)
	var p [4]byte
	u.Read(regData, p[:2])
	if p[0] != 0x34 || p[1] != 0x12 {
		t.Errorf("divisor as a word = % x; want 34 12", p[:2])
	}
	out(u, regSCR, 0x77, 1, 2, 3)
	u.Read(regSCR, p[:])
	if want := [4]byte{0x77, 0xff, 0xff, 0xff}; p != want {
		t.Errorf("4 bytes at the last register = % x; want % x", p, want)
	}
	for _, off := range []uint64{UARTPorts, 1 << 40, ^uint64(0)} {
		if off == ^uint64(0) {
			u.Write(off, []byte{1}) // its second byte would be register 0
		} else {
			u.Write(off, []byte{1, 2, 3, 4})
		}
		check(t, "outside", in(u, off), 0xff)
	}
}

func TestUARTStateMoves(t *testing.T) {
	from, _ := newUART(t, io.Discard)
	openReceiver(from, fcrEnable|0x80)
	out(from, regSCR, 0x5a)
	out(from, regIER, 0xf)
	from.Input(t.Context(), []byte("0123456789abcdefghij"))
	s := from.State()

	var got bytes.Buffer
	to, l := newUART(t, &got)
	if err := to.SetState(s); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, to.State()); diff != "" {
		t.Errorf("state after the move (-from +to):\n%s", diff)
	}
	if level, _ := l.get(); !level {
		t.Error("line is low after the move with received data")
	}
	for _, b := range []byte("0123456789abcdefghij") {
		check(t, "byte after the move", in(to, regData), b)
	}
	out(to, regData, 'x')
	flush(t, to)
	if got.String() != "x" {
		t.Errorf("writer got %q; want \"x\"", got.String())
	}
	for _, bad := range []UARTState{{FIFO: make([]byte, fifoSize+1)}, {Queue: make([]byte, rxLimit+1)}} {
		if err := to.SetState(bad); err == nil {
			t.Errorf("SetState with %d+%d bytes succeeded", len(bad.FIFO), len(bad.Queue))
		}
	}
	to.Reset()
	if diff := cmp.Diff(UARTState{DLL: 12}, to.State(), cmp.Comparer(func(a, b []byte) bool { return bytes.Equal(a, b) })); diff != "" {
		t.Errorf("state after a reset (-want +got):\n%s", diff)
	}
}

// Two vCPUs, the writer and the input at once: nothing is lost or doubled.
func TestUARTConcurrently(t *testing.T) {
	var got bytes.Buffer
	u, _ := newUART(t, &got)
	openReceiver(u, fcrEnable)
	const n = 20_000
	var wg sync.WaitGroup
	wg.Go(func() {
		for range n {
			for in(u, regLSR)&lsrTHRE == 0 {
			}
			out(u, regData, 'x')
		}
	})
	wg.Go(func() { u.Input(t.Context(), make([]byte, n)) })
	wg.Go(func() {
		for seen := 0; seen < n; {
			in(u, regIIR)
			if in(u, regLSR)&lsrDR != 0 {
				in(u, regData)
				seen++
			}
		}
	})
	wg.Wait()
	flush(t, u)
	if got.Len() != n {
		t.Errorf("writer got %d bytes; want %d", got.Len(), n)
	}
}

// FuzzUART plays a driver that does anything, in any width, and checks what
// must hold whatever it does.
func FuzzUART(f *testing.F) {
	f.Add([]byte{regIER | 0x80, 0xf, regMCR | 0x80, 3, regIIR | 0x80, 1, 0x40, 'a', regIIR, 0, regLSR, 0, regData, 0})
	f.Add([]byte{regMCR | 0x80, mcrLoop, regData | 0x80, 1, regData | 0x80, 2, regLSR, 0, 0x20, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		l := new(line)
		u := NewUART(io.Discard, l.set)
		defer u.Close(context.Background())
		done, cancel := context.WithCancel(context.Background())
		cancel() // input never waits
		for len(ops) >= 2 {
			op, v := ops[0], ops[1]
			ops = ops[2:]
			off, width := uint64(op&0xf), 1<<(v&3)%7
			switch {
			case op&0x80 != 0:
				u.Write(off, []byte{v, v + 1, v + 2, v + 3}[:width])
			case op&0x40 != 0:
				u.Input(done, bytes.Repeat([]byte{v}, int(v)))
			case op&0x20 != 0:
				s := u.State()
				if err := u.SetState(s); err != nil {
					t.Fatalf("SetState(State()) = %v", err)
				}
			case op&0x10 != 0:
				u.Reset()
			default:
				var p [4]byte
				u.Read(off, p[:width])
			}
			u.mu.Lock()
			pending, level := u.pending() != iirNone, u.line
			room := u.fifoRoom()
			waiting := u.mcr&(mcrRTS|mcrLoop) == mcrRTS && room > 0 && u.queue.Len() > 0
			u.mu.Unlock()
			if pending != level {
				t.Fatalf("after %#x %#x: pending %v but line %v", op, v, pending, level)
			}
			if len(u.fifo) > fifoSize {
				t.Fatalf("FIFO holds %d bytes", len(u.fifo))
			}
			if waiting {
				t.Fatalf("after %#x %#x: input waits although the receiver has room for %d", op, v, room)
			}
		}
	})
}

func BenchmarkUARTOutput(b *testing.B) {
	u, _ := newUART(b, io.Discard)
	p := []byte{'x'}
	b.ReportAllocs()
	for b.Loop() {
		u.Write(regData, p)
	}
}
