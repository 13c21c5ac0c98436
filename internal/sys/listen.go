package sys

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ListenUnix listens on a unix socket that only this user can connect to. One
// that a killed process has left is replaced: a socket that refuses connections
// has no listener (unix(7)). One that is in use is an error, and so is whatever
// is no socket.
//
// Between bind(2) and listen(2) a socket refuses connections too, and two may
// find the same one dead; so whoever makes or removes one here has the
// directory locked, if it may read it: where it may not, what is there stays.
// Others lock directories for reasons of their own, so the wait is bounded.
// Close removes the path before it ends the listener: never somebody else's.
func ListenUnix(path string) (*net.UnixListener, error) {
	unlock, err := lockDir(filepath.Dir(path))
	locked := err == nil
	switch {
	case locked:
		defer unlock()
	case !errors.Is(err, os.ErrPermission):
		return nil, err
	}
	address := &net.UnixAddr{Name: path, Net: "unix"}
	ln, err := net.ListenUnix("unix", address)
	if errors.Is(err, unix.EADDRINUSE) && locked {
		if err := removeDead(address); err != nil {
			return nil, err
		}
		ln, err = net.ListenUnix("unix", address)
	}
	if err != nil {
		return nil, cause(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// lockTime is how long another process may have the directory locked.
var lockTime = 5 * time.Second

// lockDir locks a directory until unlock.
func lockDir(path string) (unlock func() error, err error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, cause(err)
	}
	locked := make(chan error, 1)
	go func() {
		var err error = unix.EINTR
		for err == unix.EINTR {
			err = unix.Flock(int(dir.Fd()), unix.LOCK_EX)
		}
		locked <- err
	}()
	late := time.NewTimer(lockTime)
	defer late.Stop()
	select {
	case err = <-locked:
	case <-late.C:
		go func() { // nothing interrupts flock(2)
			<-locked
			dir.Close()
		}()
		return nil, fmt.Errorf("directory %s has been locked by another process for %v: give a path elsewhere", path, lockTime)
	}
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("flock %s: %w", path, err)
	}
	return dir.Close, nil
}

// removeDead removes a socket that nobody listens on. The caller has the
// directory's lock.
func removeDead(a *net.UnixAddr) error {
	conn, err := net.DialUnix("unix", nil, a)
	switch {
	case err == nil:
		conn.Close()
		return errors.New("another process listens there: give another path, or end that one (vmm ls shows it)")
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("it is there already, and whether anybody listens cannot be told: %w", cause(err))
	}
	if info, err := os.Lstat(a.Name); err == nil && info.Mode()&os.ModeSocket == 0 {
		return errors.New("there is a file already that is no socket: give another path")
	}
	if err := os.Remove(a.Name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the socket that a killed process has left: %w", err)
	}
	return nil
}

// cause drops what the caller says better.
func cause(err error) error {
	var op *net.OpError
	var path *os.PathError
	switch {
	case errors.As(err, &op):
		return op.Err
	case errors.As(err, &path):
		return path.Err
	}
	return err
}
