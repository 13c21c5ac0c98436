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
//
// Beside it goes what keeps others off the guest's LUNs and off its name: locks
// belong to open files, so from then on both processes have them, and whoever
// ends first leaves them to the other. That lets the destination be the
// source's successor in everything: a new process for the same guest, on the
// same nexus of each LUN.

// Features of a local migration, in Hello.
const (
	featureLocal = "local-memory" // the memory is handed over
	featureHeld  = "local-holds"  // and so is what keeps others off
)

var errShared = errors.New("its memory is that of the process which it was handed to, and may have been changed there: it cannot be taken back; 'vmm stop' gives it up")

// maxFiles bounds the files beside one message (SCM_MAX_FD, unix(7)), and so
// those that are kept for whoever sends them.
const maxFiles = 253

// offer makes the offer. Through a unix socket its files go beside it: those
// that a local migration hands over, and in any case those attachments that are
// files, which the destination may have itself.
func (o *Outgoing) offer(hello *vmmv1.Hello) error {
	u, ok := o.link.conn.(*net.UnixConn)
	if !ok {
		if o.opts.Local {
			return fmt.Errorf("%w: memory can be handed over by a unix socket alone", ErrRefused)
		}
		return o.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Hello{Hello: hello}})
	}
	var files []*os.File
	if o.opts.Local {
		hello.Channels, hello.Features = 0, []string{featureLocal}
		files = []*os.File{o.src.RAM().File()}
		for i, l := range o.src.LUNs() {
			hello.Luns[i].Held = uint32(len(l.Held))
			files = append(files, l.Held...)
		}
		if o.opts.Name != nil {
			hello.Name = true
			files = append(files, o.opts.Name)
		}
		if len(files) > 1 {
			hello.Features = append(hello.Features, featureHeld)
		}
	}
	for i, a := range o.src.Attachments() {
		if f, ok := a.Data.(*os.File); ok {
			hello.Attachments[i].Beside = true
			files = append(files, f)
		}
	}
	if len(files) > maxFiles {
		return fmt.Errorf("%w: %d files would go to the other process, those of %d LUNs among them, and a unix socket takes %d at a time: detach some of the LUNs first",
			ErrRefused, len(files), len(hello.Luns), maxFiles)
	}
	next, err := o.state.step(sends, kindHello)
	if err != nil {
		return err
	}
	err = o.link.put(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Hello{Hello: hello}}, func(b []byte) error {
		return descriptors(files, nil, func(fds []int) error {
			var rights []byte
			if len(fds) > 0 {
				rights = unix.UnixRights(fds...)
			}
			n, _, err := u.WriteMsgUnix(b, rights, nil)
			if err == nil && n < len(b) {
				_, err = u.Write(b[n:])
			}
			return err
		})
	})
	if err != nil {
		o.lose(err)
		return fmt.Errorf("%w: %w", errLink, whyLost(err))
	}
	o.state = next
	return nil
}

// descriptors calls f with fds and the descriptors of files, none of which can
// be closed meanwhile.
func descriptors(files []*os.File, fds []int, f func(fds []int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	c, err := files[0].SyscallConn()
	if err == nil {
		cerr := c.Control(func(fd uintptr) { err = descriptors(files[1:], append(fds, int(fd)), f) })
		if err == nil {
			err = cerr
		}
	}
	return err
}

// switchLocal stops the guest, whose memory the destination has already.
func (o *Outgoing) switchLocal() error { return o.halt(0) }

// fileReader reads from a unix socket and keeps the files that come beside the
// bytes.
type fileReader struct {
	conn  *net.UnixConn
	files []*os.File
}

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
			r.files = append(r.files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	for len(r.files) > maxFiles {
		last := len(r.files) - 1
		r.files[last].Close()
		r.files = r.files[:last]
	}
	return n, err
}

// take gives the offer its files. The memory of a local migration is the
// caller's from here on, the rest is closed with r. What they are, nobody has
// looked at.
func (r *fileReader) take(h *vmmv1.Hello, local bool, offer *Offer) error {
	want := uint64(0)
	if local {
		want++
		for _, l := range h.Luns {
			want += uint64(l.GetHeld())
		}
		if h.Name {
			want++
		}
	}
	for _, a := range h.Attachments {
		if a.GetBeside() {
			want++
		}
	}
	got := 0
	if r != nil {
		got = len(r.files)
	}
	if uint64(got) != want {
		return errProtocol("%d files came beside the offer, where %d are due: the guest's memory, what keeps others off, kernel and initrd", got, want)
	}
	if want == 0 {
		return nil
	}
	at := 0
	if local {
		offer.Memory = r.files[0]
		r.files = r.files[1:]
		for i, l := range h.Luns {
			n := int(l.GetHeld())
			offer.LUNs[i].Held = r.files[at : at+n : at+n]
			at += n
		}
		if h.Name {
			offer.Name = r.files[at]
			at++
		}
	}
	for i, a := range h.Attachments {
		if a.GetBeside() {
			offer.Attachments[i].Data = r.files[at]
			at++
		}
	}
	return nil
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
