package sg

import (
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fakeNode is a socket pair that plays an sg node: what is written is one
// command, what is read is one answer. The test has the far end.
func fakeNode(t *testing.T) (near, far int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return fds[0], fds[1]
}

// TestSgRouteWritesOnce answers each command only after signals have rained on
// the process for a while, and counts the writes.
func TestSgRouteWritesOnce(t *testing.T) {
	near, far := fakeNode(t)
	storm(t)
	const n = 200
	var device sync.WaitGroup
	device.Add(1)
	writes := 0
	go func() {
		defer device.Done()
		var b [unsafe.Sizeof(ioHdr{})]byte
		for {
			got, err := unix.Read(far, b[:])
			if err == unix.EINTR {
				continue
			}
			if got == 0 || err != nil {
				return
			}
			h := (*ioHdr)(unsafe.Pointer(&b))
			if got != len(b) || h.packID != int32(writes) {
				t.Errorf("write %d: %d bytes, command %d", writes, got, h.packID)
			}
			writes++
			h.status = uint8(writes)
			for range 5 { // let signals come while the worker waits
				unix.Tgkill(unix.Getpid(), unix.Getpid(), unix.SIGURG)
			}
			unix.Write(far, b[:])
		}
	}()
	s, err := newSlots(1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.m.Close()
	m := s.at(0)
	m.prepare()
	for i := range n {
		m.hdr.packID = int32(i)
		if e := (sgRoute{near}).do(&m.hdr); e != 0 {
			t.Fatalf("command %d: %v", i, e)
		}
		if m.hdr.status != uint8(i+1) {
			t.Fatalf("command %d got answer %d", i, m.hdr.status)
		}
	}
	unix.Shutdown(near, unix.SHUT_RDWR)
	device.Wait()
	if writes != n {
		t.Errorf("%d commands were written %d times", n, writes)
	}
}

func TestSgRouteErrors(t *testing.T) {
	near, far := fakeNode(t)
	s, err := newSlots(1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.m.Close()
	m := s.at(0)
	m.prepare()
	// No room: nothing takes the commands.
	for {
		e := writeHdr(near, &m.hdr)
		if e == 0 {
			continue
		}
		if !refused(e) {
			t.Fatalf("a full queue says %v", e)
		}
		break
	}
	if e := (sgRoute{near}).do(&m.hdr); e != unix.EAGAIN {
		t.Errorf("do with a full queue = %v; want EAGAIN", e)
	}
	// A device that is gone.
	unix.Shutdown(far, unix.SHUT_RDWR)
	if e := (sgRoute{near}).do(&m.hdr); e == 0 || refused(e) {
		t.Errorf("do on a dead node = %v", e)
	}
}

// TestBlockRouteErrors calls the ioctl on what is no block node.
func TestBlockRouteErrors(t *testing.T) {
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	s, err := newSlots(1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.m.Close()
	m := s.at(0)
	m.prepare()
	if e := (blockRoute{fd}).do(&m.hdr); e != unix.ENOTTY {
		t.Errorf("SG_IO on /dev/null = %v; want ENOTTY", e)
	}
	if mayPassAnything(fd, m) {
		t.Error("mayPassAnything(/dev/null) = true")
	}
	if e := resetUnit(fd); e != unix.ENOTTY {
		t.Errorf("SG_SCSI_RESET on /dev/null = %v; want ENOTTY", e)
	}
}
