// Package kvm is /dev/kvm in types: a System makes VMs, a VM makes VCPUs, and
// each has a method for every ioctl that booting and migrating a guest needs.
// It stands on github.com/c35s/hype/kvm, whose types it re-exports where their
// layout is the kernel's; a user of this package does not import hype.
//
// # Ownership
//
// System, VM and VCPU own their file descriptors, which are close-on-exec.
// Close may be called more than once and from any goroutine; a call in progress
// keeps its descriptor until it returns, every later call answers os.ErrClosed.
// Close does not interrupt VCPU.Run: Kick does. The kernel keeps a VM alive until
// its last descriptor is closed, so the order of closing does not matter; guest
// memory must stay mapped until then.
//
// # Concurrency
//
// System and VM may be used by any number of goroutines at once. A VCPU belongs to
// the goroutine that runs it: the kernel makes every ioctl on a vCPU wait while
// another one, KVM_RUN too, is in progress, and the exit's data is overwritten by
// the next Run. Only VCPU.Kick and VCPU.Close may be called from elsewhere.
//
// # Errors
//
// A failed request is an *Error: the request's name, its operands and the kernel's
// answer. errors.Is sees the errno in it, == never does. What the host's KVM lacks is
// an *UnsupportedError, which errors.Is compares equal to ErrNotSupported.
//
// "KVM api" in comments is the kernel's Documentation/virt/kvm/api.rst.
package kvm

//go:generate go run ./internal/gen -o constants.go
