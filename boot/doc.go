// Package boot puts a kernel, its initrd and command line, and the firmware's
// tables into guest memory, and says in what state the first vCPU enters the
// kernel.
//
// Two kinds of kernel are known: the bzImage that distributions ship, entered
// in 64-bit mode (Documentation/arch/x86/boot.rst in the Linux tree, "the boot
// protocol"), and an ELF with a PVH note (Xen's docs/misc/pvh.pandoc and
// public/arch-x86/hvm/start_info.h, "PVH"), which is what Linux's vmlinux is.
//
// The machine that the ACPI tables describe is the one of layout.go; the sizes
// and places of registers come from package device.
package boot
