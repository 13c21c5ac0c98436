package kvm_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

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

// REP OUTS and REP INS are one exit for many elements.
func TestStringIO(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, []byte{
		0xbe, 0x00, 0x00, 0x01, 0x00, // mov esi, Data
		0xbf, 0x00, 0x01, 0x01, 0x00, // mov edi, Data+0x100
		0x66, 0xba, 0x50, 0x01, // mov dx, 0x150
		0xb9, 6, 0, 0, 0, // mov ecx, 6
		0xf3, 0x66, 0x6f, // rep outsw
		0xb9, 3, 0, 0, 0, // mov ecx, 3
		0xf3, 0x6d, // rep insd
		0xf4, // hlt
	})
	sent := []byte("twelve bytes")
	copy(g.RAM[kvmtest.Data:], sent)

	// The kernel may deliver the elements in one exit or in several.
	transfer := func(out bool, size, elements int, each func(data []byte)) {
		t.Helper()
		for elements > 0 {
			g.Run(kvm.ExitIO)
			io, err := g.CPU.IO()
			if err != nil {
				t.Fatal(err)
			}
			if io.Out != out || io.Port != 0x150 || io.Size != size || io.Count < 1 || io.Count > elements || len(io.Data) != io.Size*io.Count {
				t.Fatalf("IO() = %+v; want up to %d elements of %d bytes, out %v, port 0x150", io, elements, size, out)
			}
			elements -= io.Count
			each(io.Data)
		}
	}
	var got []byte
	transfer(true, 2, 6, func(data []byte) { got = append(got, data...) })
	if !bytes.Equal(got, sent) {
		t.Errorf("the guest sent %q; want %q", got, sent)
	}
	answer := []byte("answer here!")
	rest := answer
	transfer(false, 4, 3, func(data []byte) { rest = rest[copy(data, rest):] })
	g.Run(kvm.ExitHLT)
	if got := g.RAM[kvmtest.Data+0x100:][:12]; !bytes.Equal(got, answer) {
		t.Errorf("the guest received %q; want %q", got, answer)
	}
}

func TestMMIO(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, []byte{
		0xbb, 0x00, 0x00, 0x00, 0x20, // mov ebx, Device
		0x48, 0x8b, 0x03, // mov rax, [rbx]
		0x48, 0xff, 0xc0, // inc rax
		0x48, 0x89, 0x43, 0x08, // mov [rbx+8], rax
		0x66, 0x89, 0x43, 0x12, // mov [rbx+0x12], ax
		0xf4, // hlt
	})
	for _, want := range []kvm.MMIO{
		{Addr: kvmtest.Device, Data: []byte{0xff, 1, 2, 3, 4, 5, 6, 7}},
		{Addr: kvmtest.Device + 8, Data: []byte{0, 2, 2, 3, 4, 5, 6, 7}, Write: true},
		{Addr: kvmtest.Device + 0x12, Data: []byte{0, 2}, Write: true},
	} {
		g.Run(kvm.ExitMMIO)
		got := g.CPU.MMIO()
		if !got.Write && len(got.Data) == len(want.Data) {
			copy(got.Data, want.Data)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("MMIO() differs from what the guest did (-want +got):\n%s", d)
		}
	}
	g.Run(kvm.ExitHLT)
}

func TestTripleFaultExplained(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, []byte{
		0x0f, 0x0b, // ud2: the IDT is empty
	})
	g.Run(kvm.ExitShutdown)
	err := g.CPU.Explain(kvm.ExitShutdown, g.Read)
	const (
		kept = "vcpu 0 stopped with KVM_EXIT_SHUTDOWN (triple fault) at rip 0x8000, bytes there: 0f 0b"
		lost = "vcpu 0 stopped with KVM_EXIT_SHUTDOWN (triple fault); this host's processor does not keep where"
	)
	if err == nil || !strings.HasPrefix(err.Error(), kept) && err.Error() != lost {
		t.Errorf("Explain() = %v; want %s... or %s", err, kept, lost)
	}
}

// An instruction that is fetched from where no memory is cannot be emulated.
func TestInternalErrorExplained(t *testing.T) {
	g := kvmtest.NewGuest(t, kvmtest.NeedKVM(t), kvmtest.Config{}, []byte{
		0xb8, 0x00, 0x00, 0x00, 0x20, // mov eax, Device
		0xff, 0xe0, // jmp rax
	})
	g.Run(kvm.ExitInternalError)
	if e := g.CPU.InternalError(); e.Suberror != kvm.SuberrorEmulation {
		t.Errorf("InternalError() = %+v; want an emulation failure", e)
	}
	err := g.CPU.Explain(kvm.ExitInternalError, g.Read)
	const want = "vcpu 0 stopped with KVM_EXIT_INTERNAL_ERROR (KVM could not emulate the instruction)"
	if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), " at rip 0x20000000") {
		t.Errorf("Explain() = %v; want %s... at rip 0x20000000", err, want)
	}
	t.Log(err)
}
