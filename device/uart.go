package device

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
)

// UARTPorts is the number of I/O ports of a UART.
const UARTPorts = 8

// Registers of the 16550A, by offset (TI PC16550D, section 8). Offsets 0 and 1
// are the divisor latch while LCR.DLAB is set.
const (
	regData = 0 // read: receiver buffer; write: transmitter holding register
	regIER  = 1
	regIIR  = 2 // read; a write goes to the FIFO control register
	regLCR  = 3
	regMCR  = 4
	regLSR  = 5
	regMSR  = 6
	regSCR  = 7
)

const (
	ierRDI  = 1 << 0 // received data
	ierTHRI = 1 << 1 // transmitter holding register empty
	ierRLSI = 1 << 2 // receiver line status
	ierMSI  = 1 << 3 // modem status

	iirModem   = 0x0
	iirNone    = 0x1
	iirTHRI    = 0x2
	iirRDI     = 0x4
	iirRLSI    = 0x6
	iirTimeout = 0xc
	iirFIFO    = 0xc0 // FIFOs present and enabled

	fcrEnable  = 1 << 0
	fcrClearRx = 1 << 1

	lcrDLAB = 1 << 7

	mcrDTR  = 1 << 0
	mcrRTS  = 1 << 1
	mcrOut1 = 1 << 2
	mcrOut2 = 1 << 3
	mcrLoop = 1 << 4

	lsrDR   = 1 << 0
	lsrOE   = 1 << 1
	lsrTHRE = 1 << 5
	lsrTEMT = 1 << 6

	msrTERI = 1 << 2 // trailing edge of RI; the other delta bits are lines>>4
	msrCTS  = 1 << 4
	msrDSR  = 1 << 5
	msrRI   = 1 << 6
	msrDCD  = 1 << 7
)

const (
	fifoSize = 16 // bytes

	// The transmitter says that it is full while txFull bytes wait for the
	// writer, and empty again at half of that. A driver may write a FIFO's
	// worth when it has seen "empty", and Linux's console gives up waiting
	// after 10 ms and writes all the same: that is stored too. What reaches
	// txLimit comes from a driver that does not look, and is lost as on a
	// wire.
	txFull  = 64 << 10
	txLimit = 1 << 20

	// rxLimit is how much input waits for the guest before Input blocks.
	rxLimit = 64 << 10
)

// UART is a 16550A.
//
// Output goes to a writer through a buffer and a goroutine, so that a vCPU
// never waits for the writer. When the buffer is full the guest's driver sees
// a transmitter that is not empty, as with a slow line, and waits: output is
// delayed, not dropped.
//
// Input waits in a buffer until the guest asserts RTS, and follows its FIFO
// from there: the other end of the line honours flow control.
type UART struct {
	irq func(level bool)
	out io.Writer

	mu      sync.Mutex
	changed sync.Cond // a buffer was filled or drained, or the UART closed

	ier, fcr, lcr, mcr, scr, dll, dlm byte

	overrun  bool // LSR.OE
	thri     bool // "transmitter empty" is pending as an interrupt
	full     bool // the transmitter reports that it is not empty
	msrDelta byte
	line     bool // level of the interrupt line

	fifo  []byte       // received, not yet read by the guest; at most fifoSize
	queue bytes.Buffer // input that waits for room in fifo; at most rxLimit

	tx     []byte // accepted, not yet given to the writer
	spare  []byte // tx's other half
	flying int    // bytes that the writer has in hand
	lost   uint64
	err    error // the writer's first
	closed bool
}

// NewUART makes a UART that writes the guest's output to out and drives irq.
// Close ends its goroutine.
func NewUART(out io.Writer, irq func(level bool)) *UART {
	u := &UART{irq: irq, out: out, fifo: make([]byte, 0, fifoSize)}
	u.changed.L = &u.mu
	u.reset()
	go u.drain()
	return u
}

// Reset puts the registers into their state after power-on. Output already
// accepted is still written, input that the guest has not met is kept.
func (u *UART) Reset() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.reset()
	u.update()
}

func (u *UART) reset() {
	u.ier, u.fcr, u.lcr, u.mcr, u.scr = 0, 0, 0, 0, 0
	u.dll, u.dlm = 12, 0 // 9600 baud
	u.overrun, u.thri, u.msrDelta = false, false, 0
	u.fifo = u.fifo[:0]
}

// Read answers the guest's read of len(p) ports at off.
func (u *UART) Read(off uint64, p []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	allOnes(p)
	for i := range p {
		if reg := off + uint64(i); reg < UARTPorts {
			p[i] = u.read(reg)
		}
	}
	u.update()
}

func (u *UART) read(reg uint64) byte {
	switch reg {
	case regData:
		if u.lcr&lcrDLAB != 0 {
			return u.dll
		}
		if len(u.fifo) == 0 {
			return 0
		}
		b := u.fifo[0]
		u.fifo = append(u.fifo[:0], u.fifo[1:]...)
		u.receive()
		return b
	case regIER:
		if u.lcr&lcrDLAB != 0 {
			return u.dlm
		}
		return u.ier
	case regIIR:
		iir := u.pending()
		if iir == iirTHRI {
			u.thri = false // reading IIR as the source acknowledges it
		}
		if u.fcr&fcrEnable != 0 {
			iir |= iirFIFO
		}
		return iir
	case regLCR:
		return u.lcr
	case regMCR:
		return u.mcr
	case regLSR:
		var lsr byte
		if len(u.fifo) > 0 {
			lsr |= lsrDR
		}
		if u.overrun {
			lsr |= lsrOE
			u.overrun = false
		}
		if !u.full {
			lsr |= lsrTHRE | lsrTEMT
		}
		return lsr
	case regMSR:
		msr := u.modemLines() | u.msrDelta
		u.msrDelta = 0
		return msr
	default:
		return u.scr
	}
}

// Write does the guest's write of len(p) ports at off.
func (u *UART) Write(off uint64, p []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, v := range p {
		if reg := off + uint64(i); reg < UARTPorts {
			u.write(reg, v)
		}
	}
	u.update()
}

func (u *UART) write(reg uint64, v byte) {
	switch reg {
	case regData:
		if u.lcr&lcrDLAB != 0 {
			u.dll = v
			return
		}
		// The holding register is full for an instant: the line falls, so that
		// an edge-triggered interrupt sees it rise again.
		u.thri = false
		u.update()
		u.transmit(v)
		u.thri = !u.full
	case regIER:
		if u.lcr&lcrDLAB != 0 {
			u.dlm = v
			return
		}
		// Enabling the interrupt with the transmitter empty raises it, each
		// time: Linux takes a UART that does it only once for a broken one.
		if v&^u.ier&ierTHRI != 0 && !u.full {
			u.thri = true
		}
		u.ier = v & (ierRDI | ierTHRI | ierRLSI | ierMSI)
		if u.ier&ierTHRI == 0 {
			u.thri = false
		}
	case regIIR: // FIFO control
		if v&fcrClearRx != 0 || (v^u.fcr)&fcrEnable != 0 {
			u.fifo = u.fifo[:0]
		}
		if v&fcrEnable == 0 {
			v = 0 // the other bits count only together with this one
		}
		u.fcr = v &^ (fcrClearRx | 1<<2) // the clear bits clear themselves
		u.receive()
	case regLCR:
		u.lcr = v
	case regMCR:
		before := u.modemLines()
		u.mcr = v & (mcrDTR | mcrRTS | mcrOut1 | mcrOut2 | mcrLoop)
		after := u.modemLines()
		u.msrDelta |= (before ^ after) >> 4 &^ msrTERI
		if before&^after&msrRI != 0 {
			u.msrDelta |= msrTERI
		}
		u.receive()
	case regSCR:
		u.scr = v
	}
}

// modemLines is the upper half of the MSR: a peer that is always ready, or
// the looped-back outputs of the MCR.
func (u *UART) modemLines() byte {
	if u.mcr&mcrLoop == 0 {
		return msrCTS | msrDSR | msrDCD
	}
	var lines byte
	for _, wire := range [...]struct{ out, in byte }{
		{mcrRTS, msrCTS}, {mcrDTR, msrDSR}, {mcrOut1, msrRI}, {mcrOut2, msrDCD},
	} {
		if u.mcr&wire.out != 0 {
			lines |= wire.in
		}
	}
	return lines
}

// pending is the interrupt of the highest priority, as the IIR encodes it.
func (u *UART) pending() byte {
	trigger := 1
	if u.fcr&fcrEnable != 0 {
		trigger = [...]int{1, 4, 8, 14}[u.fcr>>6]
	}
	switch {
	case u.ier&ierRLSI != 0 && u.overrun:
		return iirRLSI
	case u.ier&ierRDI != 0 && len(u.fifo) >= trigger:
		return iirRDI
	case u.ier&ierRDI != 0 && len(u.fifo) > 0:
		// Below the trigger level the chip waits four characters' time for
		// more; here that time is over at once.
		return iirTimeout
	case u.ier&ierTHRI != 0 && u.thri:
		return iirTHRI
	case u.ier&ierMSI != 0 && u.msrDelta != 0:
		return iirModem
	}
	return iirNone
}

func (u *UART) update() {
	if level := u.pending() != iirNone; level != u.line {
		u.line = level
		u.irq(level)
	}
}

// fifoRoom is how many more bytes the receiver can take.
func (u *UART) fifoRoom() int {
	size := 1
	if u.fcr&fcrEnable != 0 {
		size = fifoSize
	}
	return max(size-len(u.fifo), 0)
}

// receive moves waiting input to the receiver.
func (u *UART) receive() {
	if u.mcr&(mcrRTS|mcrLoop) != mcrRTS {
		return
	}
	if got := u.queue.Next(u.fifoRoom()); len(got) > 0 {
		u.fifo = append(u.fifo, got...)
		u.changed.Broadcast()
	}
}

func (u *UART) transmit(v byte) {
	if u.mcr&mcrLoop != 0 {
		if u.fifoRoom() == 0 {
			u.overrun = true
			return
		}
		u.fifo = append(u.fifo, v)
		return
	}
	if u.err != nil || u.closed || len(u.tx)+u.flying >= txLimit {
		u.lost++
		return
	}
	u.tx = append(u.tx, v)
	if len(u.tx) == 1 {
		u.changed.Broadcast()
	}
	u.full = u.full || len(u.tx)+u.flying >= txFull
}

// drain gives the output to the writer until the UART is closed and all is
// written.
func (u *UART) drain() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for {
		for len(u.tx) == 0 && !u.closed {
			u.changed.Wait()
		}
		if len(u.tx) == 0 {
			return
		}
		chunk := u.tx
		u.tx, u.flying = u.spare[:0], len(chunk)
		u.mu.Unlock()
		_, err := u.out.Write(chunk)
		u.mu.Lock()
		u.spare, u.flying = chunk, 0
		if err != nil {
			// Nobody will ever see the rest: the guest goes on without.
			u.err = fmt.Errorf("console output: %w", err)
			u.lost += uint64(len(u.tx))
			u.tx = u.tx[:0]
		}
		if u.full && len(u.tx) <= txFull/2 {
			u.full = false
			u.thri = u.ier&ierTHRI != 0
			u.update()
		}
		u.changed.Broadcast()
	}
}

// Input gives p to the guest as if it arrived on the line. While 64 KiB wait
// for the guest it blocks; it returns when all of p is accepted, or with
// an error and the number of bytes accepted when ctx is done or the UART is
// closed.
func (u *UART) Input(ctx context.Context, p []byte) (int, error) {
	stop := context.AfterFunc(ctx, u.wake)
	defer stop()
	u.mu.Lock()
	defer u.mu.Unlock()
	done := 0
	for {
		if u.closed {
			return done, io.ErrClosedPipe
		}
		n := min(rxLimit-u.queue.Len(), len(p)-done)
		u.queue.Write(p[done : done+n])
		done += n
		u.receive()
		u.update()
		if done == len(p) {
			return done, nil
		}
		if err := ctx.Err(); err != nil {
			return done, err
		}
		if u.queue.Len() == rxLimit {
			u.changed.Wait()
		}
	}
}

// wake makes whoever waits look at its context. The lock makes sure that it
// is not between looking and waiting.
func (u *UART) wake() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.changed.Broadcast()
}

// Flush waits until all output so far is written, or ctx is done. It returns
// the writer's error, if there was one.
func (u *UART) Flush(ctx context.Context) error {
	stop := context.AfterFunc(ctx, u.wake)
	defer stop()
	u.mu.Lock()
	defer u.mu.Unlock()
	for u.err == nil && len(u.tx)+u.flying > 0 {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("console output: %d bytes not written: %w", len(u.tx)+u.flying, err)
		}
		u.changed.Wait()
	}
	return u.err
}

// Close takes no more input and output, waits like Flush, and ends the
// goroutine. If ctx ends the wait, the goroutine ends when the writer returns.
func (u *UART) Close(ctx context.Context) error {
	u.mu.Lock()
	u.closed = true
	u.changed.Broadcast()
	u.mu.Unlock()
	return u.Flush(ctx)
}

// Lost counts the bytes of output that were dropped: after the writer's first
// error, or because the guest ignored for 1 MiB that the transmitter is full.
func (u *UART) Lost() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.lost
}

// UARTState is a UART's registers and its input. Output that the UART has
// accepted is not part of it: this host writes it.
type UARTState struct {
	IER, FCR, LCR, MCR, SCR, DLL, DLM byte
	MSRDelta                          byte
	Overrun, THRI                     bool
	FIFO                              []byte // received, at most 16 bytes
	Queue                             []byte // not yet received, at most 64 KiB
}

// State copies the state.
func (u *UART) State() UARTState {
	u.mu.Lock()
	defer u.mu.Unlock()
	return UARTState{
		IER: u.ier, FCR: u.fcr, LCR: u.lcr, MCR: u.mcr, SCR: u.scr, DLL: u.dll, DLM: u.dlm,
		MSRDelta: u.msrDelta, Overrun: u.overrun,
		// A full transmitter is this host's: on another one it is empty, and
		// the interrupt that waits for that is due.
		THRI:  u.thri || u.full && u.ier&ierTHRI != 0,
		FIFO:  append([]byte(nil), u.fifo...),
		Queue: append([]byte(nil), u.queue.Bytes()...),
	}
}

// SetState replaces the state.
func (u *UART) SetState(s UARTState) error {
	if len(s.FIFO) > fifoSize || len(s.Queue) > rxLimit {
		return fmt.Errorf("UART state with %d bytes received and %d waiting: at most %d and %d", len(s.FIFO), len(s.Queue), fifoSize, rxLimit)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ier = s.IER & (ierRDI | ierTHRI | ierRLSI | ierMSI)
	u.fcr, u.lcr, u.scr, u.dll, u.dlm = s.FCR, s.LCR, s.SCR, s.DLL, s.DLM
	u.mcr = s.MCR & (mcrDTR | mcrRTS | mcrOut1 | mcrOut2 | mcrLoop)
	u.msrDelta, u.overrun, u.thri = s.MSRDelta&0xf, s.Overrun, s.THRI && !u.full
	u.fifo = append(u.fifo[:0], s.FIFO...)
	u.queue.Reset()
	u.queue.Write(s.Queue)
	u.line = u.pending() != iirNone
	u.irq(u.line)
	u.changed.Broadcast()
	return nil
}
