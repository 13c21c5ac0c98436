package disk

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// uuid is a disk's identity: RFC 9562, version 4 for one that was drawn,
// version 8 for one that was derived.
type uuid [16]byte

func (u uuid) hex() string { return hex.EncodeToString(u[:]) }

func (u uuid) String() string {
	h := u.hex()
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func parseUUID(s string) (u uuid, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(s), "-", ""))
	if err != nil || len(b) != len(u) {
		return u, false
	}
	copy(u[:], b)
	return u, u != uuid{}
}

func (u uuid) marked(version byte) uuid {
	u[6] = u[6]&0x0f | version<<4
	u[8] = u[8]&0x3f | 0x80
	return u
}

func newUUID() uuid {
	var u uuid
	rand.Read(u[:]) // never fails
	return u.marked(4)
}

// naa is the disk's locally assigned designator (SPC-5 7.7.6.6.4): 3h and the
// 60 bits of the UUID behind its version and variant.
func (u uuid) naa() uint64 {
	return 3<<60 | binary.BigEndian.Uint64(u[8:])&(1<<60-1)
}

// xattrName is the extended attribute that keeps the UUID, as text.
const xattrName = "user.vmm.uuid"

// identity finds the UUID of the image open as fd, or gives it one.
//
// It is drawn when the image is first opened and kept in the extended
// attribute user.vmm.uuid: there it survives renaming, is the same on every
// host that mounts the directory (NFS from 4.2 on), and stays behind when the
// content is copied, as the copy is another disk. (A copy that keeps extended
// attributes, `cp -a`, keeps the identity too; `setfattr -x user.vmm.uuid`
// gives it one of its own.) Where the file system has no such attributes it is
// in PATH.vmm/uuid and that directory is renamed with the image. Hosts that
// share an image must agree on which of the two they can see.
//
// A read-only disk whose image can be given neither has a UUID derived from
// the image's inode number, size and modification time: equally stable as long
// as nobody writes to it.
func identity(fd int, path string, st *unix.Stat_t, readOnly bool) (uuid, error) {
	u, found, xattrErr := readXattr(fd)
	if found || errors.Is(xattrErr, errMalformed) {
		return u, xattrErr
	}
	beside := path + ".vmm"
	if u, found, err := readUUIDFile(beside); found || errors.Is(err, errMalformed) {
		return u, err
	}
	if xattrErr == nil {
		if u, xattrErr = createXattr(fd, newUUID()); xattrErr == nil {
			return u, nil
		}
	}
	u, fileErr := createUUIDFile(beside, newUUID())
	switch {
	case fileErr == nil:
		return u, nil
	case readOnly:
		return derived(st), nil
	}
	return u, fmt.Errorf("the disk's identity can be kept neither in the extended attribute %s (%w) nor in %s (%w); let this user write one of them",
		xattrName, xattrErr, beside, fileErr)
}

var errMalformed = errors.New("no UUID")

func readXattr(fd int) (u uuid, found bool, err error) {
	var b [64]byte
	n, err := unix.Fgetxattr(fd, xattrName, b[:])
	switch {
	case err == unix.ENODATA:
		return u, false, nil
	case err == unix.ERANGE:
		n = 0 // longer than any UUID
	case err != nil:
		return u, false, err
	}
	if u, found = parseUUID(string(b[:n])); !found {
		return u, false, fmt.Errorf("extended attribute %s: %w: %q; write one, or remove it with setfattr -x", xattrName, errMalformed, b[:n])
	}
	return u, true, nil
}

// createXattr gives the file u, or answers what another host gave it first.
func createXattr(fd int, u uuid) (uuid, error) {
	err := unix.Fsetxattr(fd, xattrName, []byte(u.String()), unix.XATTR_CREATE)
	if err == unix.EEXIST {
		u, _, err = readXattr(fd)
	}
	return u, err
}

func readUUIDFile(dir string) (u uuid, found bool, err error) {
	name := filepath.Join(dir, "uuid")
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return u, false, nil
	} else if err != nil {
		return u, false, err
	}
	if u, found = parseUUID(string(b)); !found {
		return u, false, fmt.Errorf("%s: %w: %q; write one, or remove the file", name, errMalformed, b)
	}
	return u, true, nil
}

// createUUIDFile writes u to dir/uuid, or answers what another process or host
// wrote there first. link(2) makes it appear whole, and fails if it is there.
func createUUIDFile(dir string, u uuid) (uuid, error) {
	if err := os.Mkdir(dir, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return u, err
	}
	tmp, err := os.CreateTemp(dir, "uuid-*")
	if err != nil {
		return u, err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(u.String() + "\n")
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
	if err != nil {
		return u, err
	}
	if err := os.Link(tmp.Name(), filepath.Join(dir, "uuid")); errors.Is(err, fs.ErrExist) {
		other, found, err := readUUIDFile(dir)
		if err == nil && !found {
			err = fmt.Errorf("%s/uuid was removed while it was read", dir)
		}
		return other, err
	} else if err != nil {
		return u, err
	}
	return u, nil
}

func derived(st *unix.Stat_t) uuid {
	sum := sha256.Sum256(fmt.Appendf(nil, "vmm disk %d %d %d.%09d", st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec))
	return uuid(sum[:16]).marked(8)
}
