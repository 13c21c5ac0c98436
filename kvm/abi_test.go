package kvm

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"vmm/kvm/internal/cc"
)

// abi has a row for every structure of abi.go: its C name and, for each field in
// order, the C field; a dotted Go field is one of a nested structure.
var abi = map[string]struct {
	typ    any
	c      string
	fields string // "Go=c Go=c"
	list   string // the C array that follows the structure, if any
}{
	"Regs": {Regs{}, "kvm_regs",
		"RAX=rax RBX=rbx RCX=rcx RDX=rdx RSI=rsi RDI=rdi RSP=rsp RBP=rbp R8=r8 R9=r9 R10=r10 R11=r11 R12=r12 R13=r13 R14=r14 R15=r15 RIP=rip RFlags=rflags", ""},
	"Segment": {Segment{}, "kvm_segment",
		"Base=base Limit=limit Selector=selector Type=type Present=present DPL=dpl DB=db S=s L=l G=g Avl=avl Unusable=unusable", ""},
	"Dtable":      {Dtable{}, "kvm_dtable", "Base=base Limit=limit", ""},
	"MSREntry":    {MSREntry{}, "kvm_msr_entry", "Index=index Data=data", ""},
	"CPUIDEntry2": {CPUIDEntry2{}, "kvm_cpuid_entry2", "Function=function Index=index Flags=flags EAX=eax EBX=ebx ECX=ecx EDX=edx", ""},
	"PITConfig":   {PITConfig{}, "kvm_pit_config", "Flags=flags", ""},
	"sregs": {sregs{}, "kvm_sregs",
		"CS=cs DS=ds ES=es FS=fs GS=gs SS=ss TR=tr LDT=ldt GDT=gdt IDT=idt CR0=cr0 CR2=cr2 CR3=cr3 CR4=cr4 CR8=cr8 EFER=efer APICBase=apic_base InterruptBitmap=interrupt_bitmap", ""},
	"memoryRegion": {memoryRegion{}, "kvm_userspace_memory_region",
		"Slot=slot Flags=flags GuestPhysAddr=guest_phys_addr MemorySize=memory_size UserspaceAddr=userspace_addr", ""},
	"irqfdConfig": {irqfdConfig{}, "kvm_irqfd", "Fd=fd GSI=gsi Flags=flags ResampleFD=resamplefd", ""},
	"Sregs2": {Sregs2{}, "kvm_sregs2",
		"CS=cs DS=ds ES=es FS=fs GS=gs SS=ss TR=tr LDT=ldt GDT=gdt IDT=idt CR0=cr0 CR2=cr2 CR3=cr3 CR4=cr4 CR8=cr8 EFER=efer APICBase=apic_base Flags=flags PDPTRs=pdptrs", ""},
	"VCPUEvents": {VCPUEvents{}, "kvm_vcpu_events",
		"Exception=exception Exception.Injected=exception.injected Exception.Nr=exception.nr Exception.HasErrorCode=exception.has_error_code " +
			"Exception.Pending=exception.pending Exception.ErrorCode=exception.error_code " +
			"Interrupt=interrupt Interrupt.Injected=interrupt.injected Interrupt.Nr=interrupt.nr Interrupt.Soft=interrupt.soft Interrupt.Shadow=interrupt.shadow " +
			"NMI=nmi NMI.Injected=nmi.injected NMI.Pending=nmi.pending NMI.Masked=nmi.masked NMI.Pad=nmi.pad SIPIVector=sipi_vector Flags=flags " +
			"SMI=smi SMI.SMM=smi.smm SMI.Pending=smi.pending SMI.SMMInsideNMI=smi.smm_inside_nmi SMI.LatchedInit=smi.latched_init " +
			"TripleFaultPending=triple_fault.pending ExceptionHasPayload=exception_has_payload ExceptionPayload=exception_payload", ""},
	"DebugRegs":  {DebugRegs{}, "kvm_debugregs", "DB=db DR6=dr6 DR7=dr7 Flags=flags", ""},
	"XCR":        {XCR{}, "kvm_xcr", "Index=xcr Value=value", ""},
	"XCRs":       {XCRs{}, "kvm_xcrs", "N=nr_xcrs Flags=flags List=xcrs", ""},
	"LAPIC":      {LAPIC{}, "kvm_lapic_state", "Regs=regs", ""},
	"mpState":    {mpState{}, "kvm_mp_state", "State=mp_state", ""},
	"IRQChip":    {IRQChip{}, "kvm_irqchip", "ID=chip_id State=chip", ""},
	"PITChannel": {PITChannel{}, "kvm_pit_channel_state", "Count=count LatchedCount=latched_count CountLatched=count_latched StatusLatched=status_latched Status=status ReadState=read_state WriteState=write_state WriteLatch=write_latch RWMode=rw_mode Mode=mode BCD=bcd Gate=gate CountLoadTime=count_load_time", ""},
	"PIT2":       {PIT2{}, "kvm_pit_state2", "Channels=channels Flags=flags", ""},
	"ClockData":  {ClockData{}, "kvm_clock_data", "Clock=clock Flags=flags Realtime=realtime HostTSC=host_tsc", ""},

	"RoutingEntry":  {RoutingEntry{}, "kvm_irq_routing_entry", "GSI=gsi Type=type Flags=flags U=u", ""},
	"irqRouting":    {irqRouting{}, "kvm_irq_routing", "N=nr Flags=flags", "entries"},
	"irqLevel":      {irqLevel{}, "kvm_irq_level", "GSI=irq Level=level", ""},
	"msiMessage":    {msiMessage{}, "kvm_msi", "AddressLo=address_lo AddressHi=address_hi Data=data Flags=flags DeviceID=devid", ""},
	"ioeventfd":     {ioeventfd{}, "kvm_ioeventfd", "Datamatch=datamatch Addr=addr Len=len FD=fd Flags=flags", ""},
	"dirtyLog":      {dirtyLog{}, "kvm_dirty_log", "Slot=slot Bitmap=dirty_bitmap", ""},
	"clearDirtyLog": {clearDirtyLog{}, "kvm_clear_dirty_log", "Slot=slot NumPages=num_pages FirstPage=first_page Bitmap=dirty_bitmap", ""},
	"enableCap":     {enableCap{}, "kvm_enable_cap", "Cap=cap Flags=flags Args=args", ""},
	"deviceAttr":    {deviceAttr{}, "kvm_device_attr", "Flags=flags Group=group Attr=attr Addr=addr", ""},
	"translation":   {translation{}, "kvm_translation", "Linear=linear_address Physical=physical_address Valid=valid Writeable=writeable Usermode=usermode", ""},
	"msrList":       {msrList{}, "kvm_msr_list", "N=nmsrs", "indices"},
	"msrs":          {msrs{}, "kvm_msrs", "N=nmsrs", "entries"},
	"cpuid2":        {cpuid2{}, "kvm_cpuid2", "N=nent", "entries"},
}

func TestLayoutIsTheCompilersAnswer(t *testing.T) {
	type question struct {
		what, c string
		got     uintptr
	}
	var ask []question
	for name, row := range abi {
		typ := reflect.TypeOf(row.typ)
		ask = append(ask, question{"size of " + name, "sizeof(struct " + row.c + ")", typ.Size()})
		if row.list != "" {
			ask = append(ask, question{"list after " + name, fmt.Sprintf("offsetof(struct %s, %s)", row.c, row.list), typ.Size()})
		}
		want := named(typ, "")
		for pair := range strings.FieldsSeq(row.fields) {
			field, c, _ := strings.Cut(pair, "=")
			f, ok := want[field]
			if !ok {
				t.Errorf("%s has no field %s", name, field)
			}
			delete(want, field)
			ask = append(ask,
				question{fmt.Sprintf("offset of %s.%s", name, field), fmt.Sprintf("offsetof(struct %s, %s)", row.c, c), f.offset},
				question{fmt.Sprintf("size of %s.%s", name, field), fmt.Sprintf("sizeof(((struct %s *)0)->%s)", row.c, c), f.size})
		}
		for field := range want {
			t.Errorf("%s.%s is not compared with C", name, field)
		}
	}
	exprs := make([]string, len(ask))
	for i, q := range ask {
		exprs[i] = q.c
	}
	want, err := cc.Eval([]string{"linux/kvm.h"}, exprs)
	if errors.Is(err, cc.ErrNoCompiler) && os.Getenv("VMM_TEST_ALLOW_NO_GCC") != "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatalf("%v (VMM_TEST_ALLOW_NO_GCC=1 skips this test)", err)
	}
	for i, q := range ask {
		if uint64(q.got) != want[i] {
			t.Errorf("%s = %d; want %s = %d", q.what, q.got, q.c, want[i])
		}
	}
}

type place struct{ offset, size uintptr }

// named maps each field of a structure with a name, those of nested nameless
// structures included, to its place.
func named(t reflect.Type, prefix string) map[string]place {
	m := make(map[string]place)
	for f := range t.Fields() {
		if f.Name == "_" {
			continue
		}
		m[prefix+f.Name] = place{f.Offset, f.Type.Size()}
		if f.Type.Kind() == reflect.Struct && f.Type.Name() == "" {
			for name, p := range named(f.Type, prefix+f.Name+".") {
				m[name] = place{p.offset + f.Offset, p.size}
			}
		}
	}
	return m
}

// Padding that the compiler inserts is padding that nobody thought about.
func TestNoHiddenPadding(t *testing.T) {
	var check func(name string, typ reflect.Type)
	check = func(name string, typ reflect.Type) {
		var sum uintptr
		for f := range typ.Fields() {
			sum += f.Type.Size()
			if f.Type.Kind() == reflect.Struct {
				check(name+"."+f.Name, f.Type)
			}
		}
		if sum != typ.Size() {
			t.Errorf("the fields of %s have %d bytes, the structure has %d", name, sum, typ.Size())
		}
	}
	for name, row := range abi {
		check(name, reflect.TypeOf(row.typ))
	}
}

func TestEveryABIStructureHasARow(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "abi.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var declared []string
	for _, d := range file.Decls {
		if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.TYPE {
			for _, s := range g.Specs {
				declared = append(declared, s.(*ast.TypeSpec).Name.Name)
			}
		}
	}
	slices.Sort(declared)
	if rows := slices.Sorted(maps.Keys(abi)); !slices.Equal(declared, rows) {
		t.Errorf("abi.go declares %v;\nthe table has rows for %v", declared, rows)
	}

	// And no structure of the kernel's hides in another file: whoever passes
	// one to the kernel gives it the HostLayout marker, or takes hype's.
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if name == "abi.go" || strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "HostLayout" {
				t.Errorf("%s declares a structure of the kernel's; its place is abi.go", name)
			}
			if spec, ok := n.(*ast.TypeSpec); ok && spec.Assign.IsValid() {
				if sel, ok := spec.Type.(*ast.SelectorExpr); ok && fmt.Sprint(sel.X) == "hype" {
					switch sel.Sel.Name {
					case "Cap", "Exit": // numbers
					default:
						t.Errorf("%s takes hype.%s; its place is abi.go", name, sel.Sel.Name)
					}
				}
			}
			return true
		})
	}
}

func TestFlexible(t *testing.T) {
	for _, n := range []int{0, 1, 3, 256} {
		head, entries := flexible[msrs, MSREntry](n)
		if len(entries) != n || *head != (msrs{}) {
			t.Fatalf("flexible(%d) = %+v and %d entries; want zeros and %d", n, *head, len(entries), n)
		}
		if n == 0 {
			continue
		}
		entries[n-1].Data = 1
		if head.N = uint32(n); entries[0].Index != 0 {
			t.Fatalf("flexible(%d): the head overlaps the entries", n)
		}
		list, indices := flexible[msrList, uint32](n) // a size that is no multiple of 8
		list.N = ^uint32(0)
		if slices.Max(indices) != 0 || len(indices) != n {
			t.Fatalf("flexible(%d): the head overlaps the indices", n)
		}
	}
}
