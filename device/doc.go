// Package device is the few legacy parts that a PC needs around its virtio
// devices: UARTs, ACPI power management, the reset ports, the real-time clock
// and pvpanic.
//
// Every device answers Read and Write at an offset from its first port, with
// 1, 2 or 4 bytes; bytes at which it has no register read as all ones, as on
// an ISA bus, and ignore writes. Nothing the guest does there fails.
//
// All methods may be called from several vCPU threads at once. A device calls
// its interrupt function with its lock held, so that the levels arrive in
// order: the function must not call the device. It calls the functions that
// announce an event (poweroff, reset, panic) with no lock held, on the vCPU's
// thread in the middle of its exit: they take note and return.
//
// State is the device's state as plain data, for migration. It is taken while
// no vCPU runs and no input arrives. SetState drives the interrupt line to the
// level that follows from the state: the interrupt controllers are loaded
// before. The state may come from another host and is checked.
package device

// allOnes is what a bus without a device behind it reads as.
func allOnes(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}
