package machine

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"vmm/boot"
	vmmv1 "vmm/proto/vmm/v1"
)

// Image is a file that a reset of the guest loads, and which therefore goes
// where the guest goes.
type Image struct {
	Name   string // where it came from, for messages
	Size   int64  // bytes
	SHA256 [sha256.Size]byte
	Data   io.ReaderAt
}

// Images are the guest's kernel and its initrd, nil if it has none. The first
// call reads both files, for their digests: ask before the guest is stopped.
func (m *Machine) Images() (kernel, initrd *Image, err error) {
	s, err := m.boot()
	if err != nil {
		return nil, nil, err
	}
	image := func(f *boot.File, s *vmmv1.Image) *Image {
		return &Image{Name: f.Name, Size: f.Size, SHA256: [sha256.Size]byte(s.GetSha256()), Data: f.Data}
	}
	if m.kernel.Data == nil {
		return nil, nil, fmt.Errorf("kernel %s: its image did not come here with the guest", s.GetKernel().GetName())
	}
	kernel = image(&m.kernel, s.GetKernel())
	if m.initrd != nil {
		initrd = image(m.initrd, s.GetInitrd())
	}
	return kernel, initrd, nil
}

// hashImages describes the files that the machine was configured with.
func (m *Machine) hashImages() (*vmmv1.BootState, error) {
	hash := func(f *boot.File) (*vmmv1.Image, error) {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(f.Data, 0, f.Size)); err != nil {
			return nil, fmt.Errorf("read %s: %w", f.Name, cause(err))
		}
		return &vmmv1.Image{Name: f.Name, Size: uint64(f.Size), Sha256: h.Sum(nil)}, nil
	}
	var s vmmv1.BootState
	var err error
	if s.Kernel, err = hash(&m.kernel); err == nil && m.initrd != nil {
		s.Initrd, err = hash(m.initrd)
	}
	return &s, err
}

// acceptImages takes the files of a guest that arrives.
func (m *Machine) acceptImages(in *Incoming) {
	take := func(i *Image) (boot.File, *vmmv1.Image) {
		if c, ok := i.Data.(io.Closer); ok {
			m.onClose(c.Close)
		}
		return boot.File{Name: i.Name, Data: i.Data, Size: i.Size}, &vmmv1.Image{Name: i.Name, Size: uint64(i.Size), Sha256: i.SHA256[:]}
	}
	if m.handed = in.Memory; m.handed != nil {
		m.onClose(func() error {
			if m.handed == nil { // it is ram's by now
				return nil
			}
			return m.handed.Close()
		})
	}
	var s vmmv1.BootState
	if in.Kernel != nil {
		m.kernel, s.Kernel = take(in.Kernel)
	}
	if in.Initrd != nil {
		f, i := take(in.Initrd)
		m.initrd, s.Initrd = &f, i
	}
	m.boot = func() (*vmmv1.BootState, error) { return &s, nil }
}

// loadBoot checks that the images here are those that the state names.
func (m *Machine) loadBoot(s *vmmv1.BootState) error {
	if s.GetKernel() == nil {
		return errors.New("no kernel is named")
	}
	if m.kernel.Data == nil {
		m.boot = func() (*vmmv1.BootState, error) { return s, nil } // for the next host, which may have them
		return nil
	}
	mine, err := m.boot()
	if err != nil {
		return err
	}
	for _, i := range []struct {
		what       string
		mine, want *vmmv1.Image
	}{{"kernel", mine.GetKernel(), s.GetKernel()}, {"initrd", mine.GetInitrd(), s.GetInitrd()}} {
		switch {
		case i.mine == nil && i.want == nil:
		case i.mine == nil:
			return fmt.Errorf("the guest's %s %s is missing here", i.what, i.want.GetName())
		case i.want == nil:
			return fmt.Errorf("%s %s is not the guest's: it has none", i.what, i.mine.GetName())
		case !bytes.Equal(i.mine.GetSha256(), i.want.GetSha256()) || i.mine.GetSize() != i.want.GetSize():
			return fmt.Errorf("%s %s is not the guest's (%d bytes, SHA-256 %x; want %d bytes, %x)", i.what, i.mine.GetName(),
				i.mine.GetSize(), i.mine.GetSha256(), i.want.GetSize(), i.want.GetSha256())
		}
	}
	return nil
}
