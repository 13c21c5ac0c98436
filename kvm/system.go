package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"syscall"

	hype "github.com/c35s/hype/kvm"
	"golang.org/x/sys/unix"
)

// DefaultPath is where KVM's device node is.
const DefaultPath = "/dev/kvm"

// System is /dev/kvm: it tells what the host's KVM can do and makes VMs.
type System struct {
	handle
	runSize int // bytes of a vCPU's kvm_run mapping
}

// Open opens KVM's device node. The error is a sentence that says what the user
// can do about it.
func Open(path string) (*System, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0) // the os package sets O_CLOEXEC
	if err != nil {
		return nil, explainOpen(path, err)
	}
	version, err := hype.GetAPIVersion(file)
	if err == nil && version != hype.StableAPIVersion {
		err = wrongVersion(path, version)
	} else if errors.Is(err, unix.ENOTTY) {
		err = notKVM(path, err)
	} else {
		err = failure("KVM_GET_API_VERSION", err)
	}
	var size int
	if err == nil {
		size, err = hype.GetVCPUMmapSize(file)
		if err = failure("KVM_GET_VCPU_MMAP_SIZE", err); err == nil && size < runSize {
			err = fmt.Errorf("kvm: KVM_GET_VCPU_MMAP_SIZE says %d bytes; struct kvm_run has %d", size, runSize)
		}
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return &System{handle: handle{file: file}, runSize: size}, nil
}

func explainOpen(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("this host has no KVM (%w): load the module with \"modprobe kvm_amd\" or \"modprobe kvm_intel\"; "+
			"if that fails, switch on virtualization in the firmware, or nested virtualization if this host is itself a VM", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("KVM is forbidden to this user (%w): %s", err, howToJoin(path))
	}
	return fmt.Errorf("cannot open KVM: %w", err)
}

// howToJoin says how a user gets access to the device node. Distributions give
// it to group kvm, bare systems to root only.
func howToJoin(path string) string {
	const onlyRoot = "only root may open it; as root, \"chgrp kvm %[1]s && chmod 660 %[1]s\", then join group kvm"
	info, err := os.Stat(path)
	if err != nil {
		return "join group kvm"
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode().Perm()&0o060 != 0o060 {
		return fmt.Sprintf(onlyRoot, path)
	}
	group := strconv.Itoa(int(st.Gid))
	if g, err := user.LookupGroupId(group); err == nil {
		group = g.Name
	}
	return fmt.Sprintf("join group %[1]s with \"usermod -aG %[1]s USER\" as root, then log in again", group)
}

func wrongVersion(path string, version int) error {
	return fmt.Errorf("kvm: %s speaks version %d of the KVM interface, not %d, the only one since Linux 2.6.22: it is not the kernel's own KVM",
		path, version, hype.StableAPIVersion)
}

func notKVM(path string, err error) error {
	return fmt.Errorf("kvm: %s is not KVM's device node: it does not know KVM_GET_API_VERSION: %w", path, failure("KVM_GET_API_VERSION", err))
}

// CreateVM makes a VM without memory, interrupt controller or vCPUs.
func (s *System) CreateVM() (*VM, error) {
	var vm *hype.VM
	err := s.do("KVM_CREATE_VM", func() error {
		// The kernel interrupts the request, which may wait for the whole host
		// (it registers an MMU notifier), when a signal arrives; the
		// runtime sends those at any time to preempt goroutines. Nothing was
		// made then, and nobody asked to stop: try again.
		var err error
		for {
			if vm, err = hype.CreateVM(s.file); err != unix.EINTR {
				return err
			}
		}
	})
	if err != nil {
		return nil, err
	}
	return &VM{handle: handle{file: vm.File}, vm: vm, runSize: s.runSize, slots: make(map[Slot]int)}, nil
}

// MSRIndices lists the model-specific registers that a guest's state is made of
// (KVM api 4.3). The MTRRs are not among them.
func (s *System) MSRIndices() ([]uint32, error) { return s.msrIndices(reqGetMSRIndexList) }

// MSRFeatureIndices lists the registers that describe the host rather than the
// guest (KVM api 4.3).
func (s *System) MSRFeatureIndices() ([]uint32, error) {
	return s.msrIndices(reqGetMSRFeatureIndexList)
}

func (s *System) msrIndices(r request) ([]uint32, error) {
	for n := 256; ; {
		list, indices := flexible[msrList, uint32](n)
		list.N = uint32(n)
		_, err := pass(&s.handle, r, list)
		if errors.Is(err, unix.E2BIG) && int(list.N) > n {
			n = int(list.N) // the kernel says how many there are
			continue
		}
		if err != nil {
			return nil, err
		}
		return indices[:list.N], nil
	}
}

// MSRFeatures reads registers of MSRFeatureIndices. One that cannot be read is
// an *MSRError.
func (s *System) MSRFeatures(indices []uint32) ([]MSREntry, error) {
	return getMSRs(&s.handle, indices)
}

// SupportedCPUID are the CPUID leaves that the host's processor and KVM can offer
// a guest (KVM api 4.46).
func (s *System) SupportedCPUID() ([]CPUIDEntry2, error) {
	return getCPUID(&s.handle, reqGetSupportedCPUID)
}

// getCPUID reads a list of leaves, however long it is.
func getCPUID(h *handle, r request) ([]CPUIDEntry2, error) {
	for n := 256; ; n *= 2 {
		list, leaves := flexible[cpuid2, CPUIDEntry2](n)
		list.N = uint32(n)
		_, err := pass(h, r, list)
		if errors.Is(err, unix.E2BIG) && n < 1<<16 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return leaves[:list.N], nil
	}
}
