package migration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	vmmv1 "vmm/proto/vmm/v1"
)

// Every connection begins with 32 bytes from whoever dialled: the magic, what
// the connection is for, and the migration's ID. All integers of the framing
// are little-endian.
//
//	0..7   "vmmigr\r\n"    a line ending that a text protocol would mangle
//	8      role           1 control, 2 data, 3 a question about the ID,
//	                      4 a question about the host, 5 none: a snapshot's file
//	9      channel        of a data connection, from 0
//	10..15 zero
//	16..31 ID
//
// After it a control connection carries messages: 4 bytes of length, then a
// StreamMessage. A question about the host is answered with one HostSurvey,
// framed in the same way.
const (
	magic       = "vmmigr\r\n"
	preambleLen = 32

	// maxMessage bounds one message, bytes: the state of eight vCPUs is a
	// few hundred KiB. The first one of a connection, from somebody who has
	// shown nothing yet, is shorter.
	maxMessage = 16 << 20
	maxHello   = 1 << 20
)

type role uint8

const (
	roleControl  role = 1
	roleData     role = 2
	roleQuery    role = 3
	roleSurvey   role = 4
	roleSnapshot role = 5
)

type preamble struct {
	role    role
	channel uint8
	id      ID
}

func (p preamble) bytes() []byte {
	b := make([]byte, preambleLen)
	copy(b, magic)
	b[8], b[9] = byte(p.role), p.channel
	copy(b[16:], p.id[:])
	return b
}

func readPreamble(r io.Reader) (p preamble, err error) {
	var b [preambleLen]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return p, fmt.Errorf("the connection's first bytes: %w", err)
	}
	if string(b[:8]) != magic {
		return p, errProtocol("the connection begins with %q; this is no migration, or one of another version", b[:8])
	}
	p = preamble{role: role(b[8]), channel: b[9], id: ID(b[16:])}
	if p.role < roleControl || p.role > roleSurvey || [6]byte(b[10:16]) != [6]byte{} {
		return p, errProtocol("a connection with role %d", p.role)
	}
	return p, nil
}

// readMessage reads one message of at most limit bytes. The length is believed
// only as far as bytes arrive.
func readMessage(r io.Reader, limit uint32) (*vmmv1.StreamMessage, error) {
	m := new(vmmv1.StreamMessage)
	if err := readProto(r, limit, m); err != nil {
		return nil, err
	}
	return m, nil
}

// readProto reads one message as readMessage does, into m.
func readProto(r io.Reader, limit uint32, m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > limit {
		return errProtocol("a message of %d bytes; at most %d are allowed here", n, limit)
	}
	const step = 64 << 10
	var b []byte
	for uint32(len(b)) < n {
		have := len(b)
		b = append(b, make([]byte, min(max(step, have), int(n)-have))...)
		if _, err := io.ReadFull(r, b[have:]); err != nil {
			return unexpectedEOF(err)
		}
	}
	if err := proto.Unmarshal(b, m); err != nil {
		return errProtocol("a message of %d bytes is damaged: %v", n, err)
	}
	return nil
}

func unexpectedEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func appendMessage(b []byte, m proto.Message) ([]byte, error) {
	at := len(b)
	b, err := proto.MarshalOptions{}.MarshalAppend(append(b, 0, 0, 0, 0), m)
	if err != nil {
		return nil, fmt.Errorf("encode message: %w", err)
	}
	n := len(b) - at - 4
	if n > maxMessage {
		return nil, fmt.Errorf("a message of %d bytes; at most %d can be sent", n, maxMessage)
	}
	binary.LittleEndian.PutUint32(b[at:], uint32(n))
	return b, nil
}

// link is one side's end of a control connection. Sending is safe for
// concurrent use; what arrives comes out of in, in order, until lost is
// closed.
type link struct {
	conn  net.Conn
	id    ID
	write time.Duration // bounds sending one message

	mu  sync.Mutex // held while a message is written
	buf []byte

	in   chan *vmmv1.StreamMessage
	lost chan struct{} // closed when no more will arrive; err says why
	err  error
	stop context.CancelFunc
}

// newLink starts reading messages from conn.
func newLink(conn net.Conn, id ID, write time.Duration) *link {
	ctx, stop := context.WithCancel(context.Background())
	l := &link{conn: conn, id: id, write: write, in: make(chan *vmmv1.StreamMessage), lost: make(chan struct{}), stop: stop}
	go func() {
		defer close(l.lost)
		for {
			m, err := readMessage(conn, maxMessage)
			if err == nil && ID(padded(m.Id)) != id {
				err = errProtocol("a message of migration %x in migration %v", m.Id, id)
			}
			if err != nil {
				l.err = err
				return
			}
			select {
			case l.in <- m:
			case <-ctx.Done():
				l.err = net.ErrClosed
				return
			}
		}
	}()
	return l
}

// padded makes 16 bytes of whatever a peer has sent for an ID.
func padded(b []byte) (p [16]byte) {
	if len(b) == len(p) {
		copy(p[:], b)
	}
	return p
}

func (l *link) send(m *vmmv1.StreamMessage) error {
	return l.put(m, func(b []byte) error {
		_, err := l.conn.Write(b)
		return err
	})
}

// put has write write the bytes of a message.
func (l *link) put(m *vmmv1.StreamMessage, write func([]byte) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	m.Id = l.id[:]
	b, err := appendMessage(l.buf[:0], m)
	if err != nil {
		return err
	}
	l.buf = b[:0]
	if err := l.conn.SetWriteDeadline(time.Now().Add(l.write)); err != nil {
		return err
	}
	return write(b)
}

// close ends the link and waits for its reader.
func (l *link) close() {
	l.stop()
	l.conn.Close()
	<-l.lost
}
