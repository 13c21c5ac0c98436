package kvm_test

import (
	"bytes"
	"testing"

	"vmm/kvm"
	"vmm/kvm/kvmtest"
)

// A guest reads a port, adds one, writes the sum to another port and halts.
func TestPortIO(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, []byte{
		0xe5, 0x10, // in  eax, 0x10
		0xff, 0xc0, // inc eax
		0x66, 0xe7, 0x20, // out 0x20, ax
		0xf4, // hlt
	})
	g.Run(kvm.ExitIO)
	io, err := g.CPU.IO()
	if err != nil {
		t.Fatal(err)
	}
	if io.Out || io.Port != 0x10 || io.Size != 4 || io.Count != 1 || len(io.Data) != 4 {
		t.Fatalf("IO() = %+v; want a 4-byte read of port 0x10", io)
	}
	copy(io.Data, []byte{0xff, 0x12, 0, 0})
	g.Run(kvm.ExitIO)
	if io, err = g.CPU.IO(); err != nil {
		t.Fatal(err)
	}
	if !io.Out || io.Port != 0x20 || io.Size != 2 || io.Count != 1 || !bytes.Equal(io.Data, []byte{0x00, 0x13}) {
		t.Fatalf("IO() = %+v; want 0x1300 written to port 0x20", io)
	}
	g.Run(kvm.ExitHLT)
}
