package agent

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
	"sync/atomic"
)

const (
	// MaxMessage is the largest message in a frame, in bytes.
	MaxMessage = 64 << 10

	// Window is how many bytes of a command's output, or input, may be under
	// way without having been consumed.
	Window = 256 << 10

	// maxChunk is the most output carried by one message: small enough that
	// commands running side by side take turns.
	maxChunk = 16 << 10

	crcSize = 4
	// maxEncoded is a message of MaxMessage with its checksum under COBS: one
	// byte more for each 254, one more at the start.
	maxEncoded = MaxMessage + crcSize + (MaxMessage+crcSize)/254 + 1
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// appendCOBS appends src to dst without any 00: each run of up to 254 bytes
// that are not 00 is preceded by its length plus one.
func appendCOBS(dst, src []byte) []byte {
	for {
		n := bytes.IndexByte(src, 0)
		end := n < 0
		if end {
			n = len(src)
		}
		full := n >= 254
		if full {
			n = 254 // no 00 is implied after a run of 254
		}
		dst = append(dst, byte(n+1))
		dst = append(dst, src[:n]...)
		src = src[n:]
		switch {
		case full && len(src) == 0:
			return dst
		case full:
		case end:
			return dst
		default:
			src = src[1:]
		}
	}
}

// decodeCOBS undoes appendCOBS in place and returns the shorter slice. It
// reports false for bytes that no encoder makes.
func decodeCOBS(b []byte) ([]byte, bool) {
	out := b[:0]
	for len(b) > 0 {
		n := int(b[0])
		if n == 0 || n > len(b) {
			return nil, false
		}
		// out is always behind b: a code byte has been taken for each run.
		out = append(out, b[1:n]...)
		b = b[n:]
		if n < 255 && len(b) > 0 {
			out = append(out, 0)
		}
	}
	return out, true
}

// frameWriter writes whole frames, from any number of goroutines.
type frameWriter struct {
	mu    sync.Mutex
	w     io.Writer
	plain []byte
	coded []byte
}

// write sends one message made of the parts.
func (f *frameWriter) write(parts ...[]byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.plain = f.plain[:0]
	for _, p := range parts {
		f.plain = append(f.plain, p...)
	}
	if len(f.plain) > MaxMessage {
		return fmt.Errorf("agent: message of %d bytes; at most %d", len(f.plain), MaxMessage)
	}
	sum := crc32.Checksum(f.plain, crcTable)
	f.plain = binary.LittleEndian.AppendUint32(f.plain, sum)
	f.coded = appendCOBS(append(f.coded[:0], 0), f.plain)
	f.coded = append(f.coded, 0)
	_, err := f.w.Write(f.coded)
	return err
}

// frameReader finds the frames in a stream of bytes.
type frameReader struct {
	r       *bufio.Reader
	dropped atomic.Uint64 // runs of bytes that were no frame
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: bufio.NewReaderSize(r, maxEncoded+1)}
}

// read returns the next good message; it is valid until the next call.
func (f *frameReader) read() ([]byte, error) {
	for {
		raw, err := f.r.ReadSlice(0)
		for errors.Is(err, bufio.ErrBufferFull) {
			// Longer than any frame: noise. Skip to its end.
			raw = nil
			if _, err = f.r.ReadSlice(0); err == nil {
				f.dropped.Add(1)
				raw, err = f.r.ReadSlice(0)
			}
		}
		if err != nil {
			return nil, err
		}
		raw = raw[:len(raw)-1]
		if len(raw) == 0 {
			continue
		}
		if b, ok := decodeCOBS(raw); ok && len(b) > crcSize {
			msg := b[:len(b)-crcSize]
			if crc32.Checksum(msg, crcTable) == binary.LittleEndian.Uint32(b[len(msg):]) {
				return msg, nil
			}
		}
		f.dropped.Add(1)
	}
}

type kind byte

const (
	kindPing kind = iota + 1 // 0 is no kind
	kindPong
	kindStart
	kindInput
	kindResize
	kindSignal
	kindStdout
	kindStderr
	kindExit
	kindCredit
	kindPowerOff
)

// message is a decoded message; body aliases the reader's buffer.
type message struct {
	kind kind
	id   uint32
	body []byte
}

var errMessage = errors.New("agent: malformed message")

func parseMessage(b []byte) (message, error) {
	if len(b) < 2 || b[0] == 0 || kind(b[0]) > kindPowerOff {
		return message{}, errMessage
	}
	id, n := binary.Uvarint(b[1:])
	if n <= 0 || id > 1<<32-1 {
		return message{}, errMessage
	}
	return message{kind(b[0]), uint32(id), b[1+n:]}, nil
}

// uvarints parses len(dst) numbers and returns what follows them.
func uvarints(b []byte, dst ...*uint64) ([]byte, error) {
	for _, d := range dst {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, errMessage
		}
		*d, b = v, b[n:]
	}
	return b, nil
}

func (f *frameWriter) send(k kind, id uint32, body []byte) error {
	head := binary.AppendUvarint([]byte{byte(k)}, uint64(id))
	return f.write(head, body)
}

func (f *frameWriter) sendNumbers(k kind, id uint32, numbers ...uint64) error {
	return f.send(k, id, uvarintBytes(numbers...))
}

// Request is what a start message asks for.
type Request struct {
	Args  []string `json:"a"`           // the program and its arguments
	Env   []string `json:"e,omitempty"` // K=V, added to the agent's own environment
	Dir   string   `json:"d,omitempty"` // working directory; the agent's if empty
	Stdin bool     `json:"i,omitempty"` // input messages will come; otherwise /dev/null
	Merge bool     `json:"m,omitempty"` // stderr goes where stdout goes, in order
	PTY   *Size    `json:"t,omitempty"` // run on a terminal of this size
}

// Size is a terminal's size in characters.
type Size struct {
	Rows uint16 `json:"r"`
	Cols uint16 `json:"c"`
}

// credit is the sender's side of a window.
type credit struct {
	mu     sync.Mutex
	cond   sync.Cond
	n      int
	closed bool
}

func newCredit() *credit {
	c := &credit{n: Window}
	c.cond.L = &c.mu
	return c
}

// take waits until something may be sent and takes up to max bytes. It
// returns 0 after close.
func (c *credit) take(max int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.n == 0 && !c.closed {
		c.cond.Wait()
	}
	if c.closed {
		return 0
	}
	n := min(max, c.n)
	c.n -= n
	return n
}

// give returns credit; more than the window is never outstanding, whatever
// the peer says.
func (c *credit) give(n uint64) {
	c.mu.Lock()
	c.n += int(min(n, uint64(Window-c.n)))
	c.mu.Unlock()
	c.cond.Broadcast()
}

func (c *credit) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cond.Broadcast()
}

// chunk is a piece of a stream; the kind tells which.
type chunk struct {
	kind kind
	data []byte
}

// queue is the receiver's side of a window: chunks that came and were not yet
// consumed, at most Window bytes of them.
type queue struct {
	mu     sync.Mutex
	cond   sync.Cond
	chunks []chunk
	size   int
	ended  bool // no more will come
}

func newQueue() *queue {
	q := &queue{}
	q.cond.L = &q.mu
	return q
}

// put adds a copy of data. It reports false if the peer overran the window.
func (q *queue) put(k kind, data []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ended || len(data) == 0 {
		return true
	}
	if q.size+len(data) > Window {
		return false
	}
	q.size += len(data)
	q.chunks = append(q.chunks, chunk{k, bytes.Clone(data)})
	q.cond.Broadcast()
	return true
}

// end marks the end of the stream; what is queued is still delivered.
func (q *queue) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.cond.Broadcast()
}

// next waits for a chunk; false: the stream has ended.
func (q *queue) next() (chunk, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.chunks) == 0 && !q.ended {
		q.cond.Wait()
	}
	if len(q.chunks) == 0 {
		return chunk{}, false
	}
	c := q.chunks[0]
	q.chunks = q.chunks[1:]
	q.size -= len(c.data)
	return c, true
}

func uvarintBytes(numbers ...uint64) []byte {
	var b []byte
	for _, n := range numbers {
		b = binary.AppendUvarint(b, n)
	}
	return b
}
