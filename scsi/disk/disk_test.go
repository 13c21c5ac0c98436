package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// image makes a sparse file of size bytes.
func image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openDisk(t testing.TB, path string, o Options) *LUN {
	t.Helper()
	l, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return l
}

// newDisk is an open disk of 1 MiB whose power-on unit attention is gone.
func newDisk(t testing.TB, o Options) *LUN {
	t.Helper()
	l := openDisk(t, image(t, 1<<20), o)
	do(t, l, []byte{scsi.OpRequestSense, 0, 0, 0, 0, 0}, nil, 0)
	return l
}

// tb is what the helpers need of a testing.TB, or of a rapid.T.
type tb interface {
	Helper()
	Fatalf(string, ...any)
}

// do runs one command with in bytes of data-in buffer and waits for it.
func do(t tb, l *LUN, cdb, out []byte, in int) *scsi.Command {
	t.Helper()
	c := &scsi.Command{CDB: cdb}
	if out != nil {
		c.DataOut = pieces(out)
	}
	if in > 0 {
		c.DataIn = pieces(make([]byte, in))
	}
	run(l, c)
	return c
}

// pieces cuts p so that no piece but the last is a whole block.
func pieces(p []byte) [][]byte {
	var segs [][]byte
	for n := 1; len(p) > n; n = n*3 + 1 {
		segs = append(segs, p[:n:n])
		p = p[n:]
	}
	return append(segs, p)
}

func run(l *LUN, c *scsi.Command) {
	done := make(chan struct{}, 2)
	c.Done = func(*scsi.Command) { done <- struct{}{} }
	l.Submit(c)
	<-done
	if len(done) > 0 {
		panic("Done was called twice")
	}
}

// dataIn is what a command moved into its buffers.
func dataIn(c *scsi.Command) []byte {
	var b []byte
	for _, s := range c.DataIn {
		b = append(b, s...)
	}
	return b[:len(b)-int(c.Residual)]
}

// sense is a command's sense, empty with status GOOD; it fails the test on
// anything else.
func sense(t tb, c *scsi.Command) string {
	t.Helper()
	switch {
	case c.Outcome != scsi.Completed:
		t.Fatalf("% x: outcome %v", c.CDB, c.Outcome)
	case c.Status == scsi.Good && c.SenseLen == 0:
		return ""
	case c.Status == scsi.CheckCondition:
		s, ok := scsi.ParseSense(c.Sense[:c.SenseLen])
		if ok && s.Key != scsi.NoSense {
			return s.String()
		}
	}
	t.Fatalf("% x: status %v with sense % x", c.CDB, c.Status, c.Sense[:c.SenseLen])
	return ""
}

func expect(t tb, c *scsi.Command, want string) {
	t.Helper()
	if got := sense(t, c); got != want {
		t.Fatalf("% x: sense %q; want %q", c.CDB, got, want)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int64) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink("loop", loop); err != nil {
		t.Fatal(err)
	}
	busy := file("busy", 4096)
	openDisk(t, busy, Options{Initiator: "me"})

	for _, test := range []struct {
		path string
		o    Options
		is   error
		want string // PATH stands for the path
	}{
		{path: filepath.Join(dir, "none"), is: fs.ErrNotExist, want: `disk: open PATH: no such file or directory; make an image with "truncate -s 8G PATH"`},
		{path: dir, want: "disk: PATH is a directory, not a regular file; give the image file of a disk"},
		{path: "/dev/full", want: "disk: PATH is a character device, not a regular file; give the image file of a disk"},
		{path: pipe, want: "disk: PATH is a named pipe, not a regular file; give the image file of a disk"},
		{path: file("empty", 0), want: `disk: PATH is empty; give it a size with "truncate -s 8G PATH"`},
		{path: file("odd", 1000), want: `disk: PATH: 1000 bytes are no multiple of the block size 512; round up with "truncate -s %512 PATH"`},
		{path: file("odd4k", 4096+512), o: Options{BlockSize: 4096}, want: `disk: PATH: 4608 bytes are no multiple of the block size 4096; round up with "truncate -s %4096 PATH"`},
		{path: file("bs", 4096), o: Options{BlockSize: 520}, want: "disk: PATH: block size 520: it is 512 or 4096"},
		{path: busy, o: Options{Initiator: "me"}, is: ErrInUse, want: "disk: PATH: image is in use by this process as initiator me; " +
			"stop it first, or, if the guests are a cluster that shares the disk, give each another initiator name"},
		{path: busy, o: Options{Initiator: "me", ReadOnly: true}, is: ErrInUse, want: "disk: PATH: image is in use by this process as initiator me; " +
			"stop it first, or, if the guests are a cluster that shares the disk, give each another initiator name"},
		{path: busy, o: Options{Initiator: strings.Repeat("x", 250)}, want: fmt.Sprintf("disk: PATH: initiator name %q: want 1 to 199 bytes without a zero byte", strings.Repeat("x", 250))},
	} {
		l, err := Open(test.path, test.o)
		if err == nil {
			l.Close()
			t.Errorf("Open(%s) succeeded", test.path)
			continue
		}
		if got := strings.ReplaceAll(err.Error(), test.path, "PATH"); got != test.want {
			t.Errorf("Open(%s) = %s; want %s", test.path, got, test.want)
		}
		if test.is != nil && !errors.Is(err, test.is) {
			t.Errorf("Open(%s) = %v; want one that is %v", test.path, err, test.is)
		}
	}
	if l, err := Open(loop, Options{}); err == nil {
		l.Close()
		t.Error("Open of a symbolic link to itself succeeded")
	}
}

func TestOpenWithoutPermission(t *testing.T) {
	for _, errno := range []error{unix.EACCES, unix.EROFS} {
		err := openError("x.img", &fs.PathError{Op: "open", Path: "x.img", Err: errno})
		if want := "disk: open x.img: " + errno.Error() + "; let this user read and write it, or open it read-only"; err.Error() != want || !errors.Is(err, errno) {
			t.Errorf("openError(%v) = %v; want %s", errno, err, want)
		}
	}
}

// TestOpenNamesTheHolder locks an image in another process.
func TestOpenNamesTheHolder(t *testing.T) {
	if path := os.Getenv("DISK_TEST_HOLD"); path != "" {
		l, err := Open(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("locked\n")
		os.Stdin.Read(make([]byte, 1)) // until the other side closes it
		l.Close()
		return
	}
	path := image(t, 4096)
	other := exec.Command(os.Args[0], "-test.run=^TestOpenNamesTheHolder$")
	other.Env = append(os.Environ(), "DISK_TEST_HOLD="+path)
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("locked\n"))
	if _, err := io.ReadFull(stdout, line); err != nil || string(line) != "locked\n" {
		t.Fatalf("the other process said %q, %v", line, err)
	}
	l, err := Open(path, Options{})
	if err == nil {
		l.Close()
		t.Fatal("Open succeeded")
	}
	want := "process " + strconv.Itoa(other.Process.Pid) + " (\"" + os.Args[0]
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), want) {
		t.Errorf("Open() = %v; want ErrInUse by %q", err, want)
	}
	stdin.Close()
	if err := other.Wait(); err != nil {
		t.Fatal(err)
	}
	openDisk(t, path, Options{})
}

// TestSharing is about who may have an image open at once.
func TestSharing(t *testing.T) {
	path := image(t, 4096)
	a := openDisk(t, path, Options{Initiator: "a"})
	b := openDisk(t, path, Options{Initiator: "b", ReadOnly: true})
	c := openDisk(t, path, Options{Initiator: "c"})
	if a.Serial() != b.Serial() || a.Serial() != c.Serial() {
		t.Errorf("the serial numbers are %s, %s and %s", a.Serial(), b.Serial(), c.Serial())
	}
}

// TestWithoutReservations is about images beside which nothing can be kept.
func TestWithoutReservations(t *testing.T) {
	fd := func(path string, mode int) int {
		t.Helper()
		fd, err := unix.Open(path, mode, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	type who struct{ reserving, readOnly bool }
	writer, reader := who{false, false}, who{false, true}
	for _, test := range []struct {
		first, second who
		ok            bool
	}{
		{reader, reader, true},
		{reader, writer, false},
		{writer, reader, false},
		{writer, writer, false},
		{who{true, false}, who{true, false}, true},
		{who{true, true}, who{true, false}, true},
		{who{true, false}, reader, false},
		{who{true, true}, writer, false},
		{reader, who{true, true}, false},
		{writer, who{true, false}, false},
	} {
		path := image(t, 4096)
		mode := map[bool]int{true: unix.O_RDONLY, false: unix.O_RDWR}
		first := fd(path, mode[test.first.readOnly])
		if err := lockImage(first, test.first.reserving, test.first.readOnly); err != nil {
			t.Fatal(err)
		}
		second := fd(path, mode[test.second.readOnly])
		err := lockImage(second, test.second.reserving, test.second.readOnly)
		if (err == nil) != test.ok || err != nil && !errors.Is(err, ErrInUse) {
			t.Errorf("%+v beside %+v: %v; want it possible: %v", test.second, test.first, err, test.ok)
		}
	}

	if os.Getuid() == 0 {
		return // to whom every directory is writable
	}
	path := image(t, 4096)
	if err := os.Chmod(filepath.Dir(path), 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(filepath.Dir(path), 0o700) })
	l := openDisk(t, path, Options{})
	l.takeAttention()
	expect(t, do(t, l, make([]byte, 6), nil, 0), "")
	expect(t, do(t, l, pr.In{Action: pr.ReadKeys, Alloc: 8}.CDB(), nil, 8), "5/20/00")
}

func TestCloseTwice(t *testing.T) {
	l, err := Open(image(t, 4096), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	c := &scsi.Command{CDB: []byte{scsi.OpRead6, 0, 0, 0, 1, 0}}
	if run(l, c); c.Outcome != scsi.Failure {
		t.Errorf("READ after Close: outcome %v; want failure", c.Outcome)
	}
	if err := l.Reset(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Reset after Close = %v; want %v", err, os.ErrClosed)
	}
}

func TestIdentity(t *testing.T) {
	serial := func(path string, o Options) string {
		t.Helper()
		l, err := Open(path, o)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Serial()
	}
	path := image(t, 4096)
	first := serial(path, Options{})
	if again := serial(path, Options{ReadOnly: true}); again != first {
		t.Errorf("reopened: serial %s; want %s", again, first)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if again := serial(link, Options{}); again != first {
		t.Errorf("through a link: serial %s; want %s", again, first)
	}
	moved := path + ".moved"
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path + ".vmm"); err == nil { // no extended attributes here
		if err := os.Rename(path+".vmm", moved+".vmm"); err != nil {
			t.Fatal(err)
		}
	}
	if again := serial(moved, Options{}); again != first {
		t.Errorf("renamed: serial %s; want %s", again, first)
	}
	content, err := os.ReadFile(moved)
	if err != nil {
		t.Fatal(err)
	}
	copied := path + ".copy"
	if err := os.WriteFile(copied, content, 0o644); err != nil {
		t.Fatal(err)
	}
	if other := serial(copied, Options{}); other == first {
		t.Errorf("the copy has the serial number of the original, %s", other)
	}
}

// TestIdentityBeside is about file systems without extended attributes: every
// one of several hosts that open a new image at once sees the same UUID.
func TestIdentityBeside(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "disk.img.vmm")
	got := make([]uuid, 16)
	var hosts sync.WaitGroup
	for i := range got {
		hosts.Go(func() {
			u, err := createUUIDFile(dir, newUUID())
			if err != nil {
				t.Error(err)
			}
			got[i] = u
		})
	}
	hosts.Wait()
	u, found, err := readUUIDFile(dir)
	if !found || err != nil {
		t.Fatalf("readUUIDFile() = %v, %v, %v", u, found, err)
	}
	for i := range got {
		if got[i] != u {
			t.Errorf("host %d has UUID %v; want %v", i, got[i], u)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("%d files are left in %s; want 1", len(left), dir)
	}
	if err := os.WriteFile(filepath.Join(dir, "uuid"), []byte("rubbish"), 0o644); err != nil {
		t.Fatal(err)
	}
	if u, found, err := readUUIDFile(dir); found || !errors.Is(err, errMalformed) {
		t.Errorf("rubbish read as %v, %v, %v", u, found, err)
	}
}

func TestUUID(t *testing.T) {
	u, ok := parseUUID("01234567-89ab-4def-9123-456789abcdef\n")
	if !ok || u.String() != "01234567-89ab-4def-9123-456789abcdef" || u.hex() != "0123456789ab4def9123456789abcdef" {
		t.Errorf("parseUUID = %v, %v", u, ok)
	}
	if got := u.naa(); got != 0x3123456789abcdef {
		t.Errorf("naa() = %#x; want 0x3123456789abcdef", got)
	}
	for _, bad := range []string{"", "0123", "00000000-0000-0000-0000-000000000000", strings.Repeat("g", 32), strings.Repeat("0", 33)} {
		if u, ok := parseUUID(bad); ok {
			t.Errorf("parseUUID(%q) = %v", bad, u)
		}
	}
	st := unix.Stat_t{Ino: 1, Size: 2}
	if a, b := derived(&st), derived(&st); a != b || a[6]>>4 != 8 || a[8]>>6 != 2 {
		t.Errorf("derived() = %v and %v", a, b)
	}
	a := newUUID()
	if a == newUUID() || a[6]>>4 != 4 || a[8]>>6 != 2 {
		t.Errorf("newUUID() = %v", a)
	}
}

func TestUnitAttentions(t *testing.T) {
	path := image(t, 1<<20)
	l := openDisk(t, path, Options{})
	tur := []byte{scsi.OpTestUnitReady, 0, 0, 0, 0, 0}
	inquiry := []byte{scsi.OpInquiry, 0, 0, 0, 36, 0}
	luns := []byte{scsi.OpReportLUNs, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0}
	exempt := func() {
		t.Helper()
		expect(t, do(t, l, inquiry, nil, 36), "")
		expect(t, do(t, l, luns, nil, 16), "")
	}

	exempt()
	expect(t, do(t, l, tur, nil, 0), "6/29/00")
	expect(t, do(t, l, tur, nil, 0), "")

	if err := l.Reset(); err != nil {
		t.Fatal(err)
	}
	exempt()
	// An unknown command meets it too.
	expect(t, do(t, l, []byte{0xff, 0, 0, 0, 0, 0}, nil, 0), "6/29/03")
	expect(t, do(t, l, tur, nil, 0), "")

	if changed, err := l.Rescan(); changed || err != nil {
		t.Errorf("Rescan() of the same size = %v, %v", changed, err)
	}
	expect(t, do(t, l, tur, nil, 0), "")
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
	if changed, err := l.Rescan(); !changed || err != nil {
		t.Errorf("Rescan() of a grown file = %v, %v", changed, err)
	}
	expect(t, do(t, l, []byte{scsi.OpRead10, 0, 0, 0, 0x0f, 0xff, 0, 0, 1, 0}, nil, 512), "6/2a/09")
	expect(t, do(t, l, []byte{scsi.OpRead10, 0, 0, 0, 0x0f, 0xff, 0, 0, 1, 0}, nil, 512), "")
	if err := os.Truncate(path, 2<<20+1); err != nil {
		t.Fatal(err)
	}
	if changed, err := l.Rescan(); changed || err == nil {
		t.Errorf("Rescan() of an odd size = %v, %v; want an error", changed, err)
	}
	expect(t, do(t, l, tur, nil, 0), "")

	// REQUEST SENSE tells the attention as data, and ends it.
	l.raise(attentionCapacity | attentionReset)
	c := do(t, l, []byte{scsi.OpRequestSense, 0, 0, 0, 252, 0}, nil, 252)
	expect(t, c, "")
	if s, _ := scsi.ParseSense(dataIn(c)); s.String() != "6/29/03" {
		t.Errorf("REQUEST SENSE tells %v; want 6/29/03", s)
	}
	c = do(t, l, []byte{scsi.OpRequestSense, 1, 0, 0, 252, 0}, nil, 252)
	if got, want := dataIn(c), []byte{0x72, 6, 0x2a, 0x09, 0, 0, 0, 0}; !bytes.Equal(got, want) {
		t.Errorf("REQUEST SENSE with DESC tells % x; want % x", got, want)
	}
	expect(t, do(t, l, tur, nil, 0), "")
}
