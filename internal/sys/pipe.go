package sys

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Pipe is a pipe(2) through which splice(2) moves bytes from a stream socket into
// a file within the kernel, mostly as references to the pages in which they came.
// The file need not be mapped, so that none of its pages is faulted in. One
// goroutine at a time uses it, Close included.
type Pipe struct {
	r, w int // -1 after Close
	size int
}

// NewPipe makes a pipe for size bytes, or for fewer where this user has too many
// pipes already (pipe(7), /proc/sys/fs/pipe-max-size and pipe-user-pages-soft).
func NewPipe(size int) (*Pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	p := &Pipe{r: fds[0], w: fds[1]}
	n, err := unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, size)
	if err != nil {
		n, err = unix.FcntlInt(uintptr(p.w), unix.F_GETPIPE_SZ, 0)
	}
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("size of a pipe: %w", err)
	}
	p.size = n
	return p, nil
}

// Size is how many bytes the pipe can hold, if they come in whole pages.
func (p *Pipe) Size() int { return p.size }

// From takes up to n bytes of what a non-blocking socket has received. EAGAIN
// says that there is nothing, or that the pipe is full, io.EOF that nothing will
// come, and EINVAL that the kernel cannot splice from it. With an error nothing
// was taken.
func (p *Pipe) From(socket, n int) (int, error) {
	if p.w < 0 {
		return 0, os.ErrClosed
	}
	for {
		k, err := unix.Splice(socket, nil, p.w, nil, n, unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case k == 0 && n > 0:
			return 0, io.EOF
		}
		return int(k), nil
	}
}

// To puts the next n bytes, which the pipe has, into a file from offset on.
func (p *Pipe) To(file int, offset int64, n int) error {
	if p.r < 0 {
		return os.ErrClosed
	}
	for n > 0 {
		k, err := unix.Splice(p.r, nil, file, &offset, n, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && k == 0:
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("splice %d bytes to offset %#x of fd %d: %w", n, offset, file, err)
		}
		n -= int(k)
	}
	return nil
}

// Into copies the next len(b) bytes, which the pipe has, into b, as where another
// one writes into the file.
func (p *Pipe) Into(b []byte) error {
	if p.r < 0 {
		return os.ErrClosed
	}
	for len(b) > 0 {
		k, err := unix.Read(p.r, b)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && k == 0:
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("read %d bytes of a pipe: %w", len(b), err)
		}
		b = b[k:]
	}
	return nil
}

// Close closes both ends.
func (p *Pipe) Close() error {
	if p.r < 0 {
		return nil
	}
	err := unix.Close(p.r)
	if werr := unix.Close(p.w); err == nil {
		err = werr
	}
	p.r, p.w = -1, -1
	return err
}
