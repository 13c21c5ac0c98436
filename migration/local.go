package migration

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	vmmv1 "vmm/proto/vmm/v1"
)

// A migration within one host can hand over the memory itself: the memfd goes
// beside Hello's bytes through the unix socket (SCM_RIGHTS, unix(7)). There are
// no data connections and no rounds: State follows the attachments, and READY
// follows State. Neither takes longer for a larger guest.
//
// Both map the same pages, so COMMIT decides who may write them: before it the
// destination writes not one byte and runs no vCPU, and whatever fails leaves
// the source with its memory as it was; after it the source writes none.
// Therefore nobody can take such a guest back by force: its memory may have
// gone on.

// featureLocal in Hello is the memory that is handed over.
const featureLocal = "local-memory"

var errShared = errors.New("its memory is that of the process which it was handed to, and may have been changed there: it cannot be taken back; 'vmm stop' gives it up")

// handMemory makes the offer, with the memory beside it.
func (o *Outgoing) handMemory(hello *vmmv1.Hello) error {
	u, ok := o.link.conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("%w: memory can be handed over by a unix socket alone", ErrRefused)
	}
	next, err := o.state.step(sends, kindHello)
	if err != nil {
		return err
	}
	err = o.link.put(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Hello{Hello: hello}}, func(b []byte) error {
		n, _, err := u.WriteMsgUnix(b, unix.UnixRights(int(o.src.RAM().File().Fd())), nil)
		if err == nil && n < len(b) {
			_, err = u.Write(b[n:])
		}
		return err
	})
	if err != nil {
		o.lose(err)
		return fmt.Errorf("%w: %w", errLink, whyLost(err))
	}
	o.state = next
	return nil
}

// switchLocal stops the guest, whose memory the destination has already.
func (o *Outgoing) switchLocal() error { return o.halt(0) }

// fileReader reads from a unix socket and keeps the files that come beside the
// bytes.
type fileReader struct {
	conn  *net.UnixConn
	files []*os.File
}

// maxFiles bounds the files that are kept for whoever sends them.
const maxFiles = 2

func (r *fileReader) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, more, _, _, err := r.conn.ReadMsgUnix(b, oob) // sets close-on-exec; what does not fit is closed by the kernel
	messages, cerr := unix.ParseSocketControlMessage(oob[:more])
	if cerr != nil {
		return n, errors.Join(err, cerr)
	}
	for i := range messages {
		fds, rerr := unix.ParseUnixRights(&messages[i])
		if rerr != nil {
			continue // something else than files
		}
		for _, fd := range fds {
			r.files = append(r.files, os.NewFile(uintptr(fd), "vmm-ram"))
		}
	}
	for len(r.files) > maxFiles {
		last := len(r.files) - 1
		r.files[last].Close()
		r.files = r.files[:last]
	}
	return n, err
}

// take is the guest's memory, from here on the caller's. What it is, nobody has
// looked at.
func (r *fileReader) take() (*os.File, error) {
	if r == nil || len(r.files) != 1 {
		n := 0
		if r != nil {
			n = len(r.files)
		}
		return nil, errProtocol("%d files came where the guest's memory is due", n)
	}
	f := r.files[0]
	r.files = nil
	return f, nil
}

// close closes what nobody has taken.
func (r *fileReader) close() {
	if r == nil {
		return
	}
	for _, f := range r.files {
		f.Close()
	}
	r.files = nil
}
