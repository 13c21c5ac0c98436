// Gen writes the constants of the KVM ABI that hype/kvm lacks: ioctl numbers,
// flags, and offsets into struct kvm_run. It asks the C compiler, so the
// output depends on the installed <linux/kvm.h> only.
//
//	go generate ./kvm && git diff --exit-code kvm
package main

import (
	"bytes"
	"flag"
	"fmt"
	"go/format"
	"os"

	"vmm/kvm/internal/cc"
)

func main() {
	out := flag.String("o", "", "write to `FILE`")
	flag.Parse()
	src, err := generate()
	if err == nil {
		err = os.WriteFile(*out, src, 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

// constant is one line of the output: a Go name and the C expression.
type constant struct{ name, c string }

// A group becomes one const block. Its type, if any, is declared elsewhere in
// package kvm; a request's C name is what error messages call it.
type group struct {
	doc    string
	typ    string
	consts []constant
}

var groups = []group{
	{
		doc: "The ioctl requests that hype/kvm does not make for us.",
		typ: "request",
		consts: []constant{
			{"reqGetMSRIndexList", "KVM_GET_MSR_INDEX_LIST"},
			{"reqGetMSRFeatureIndexList", "KVM_GET_MSR_FEATURE_INDEX_LIST"},
			{"reqGetSupportedCPUID", "KVM_GET_SUPPORTED_CPUID"},
			{"reqEnableCap", "KVM_ENABLE_CAP"},
			{"reqGetIRQChip", "KVM_GET_IRQCHIP"},
			{"reqSetIRQChip", "KVM_SET_IRQCHIP"},
			{"reqGetPIT2", "KVM_GET_PIT2"},
			{"reqSetPIT2", "KVM_SET_PIT2"},
			{"reqSetGSIRouting", "KVM_SET_GSI_ROUTING"},
			{"reqIRQLine", "KVM_IRQ_LINE"},
			{"reqSignalMSI", "KVM_SIGNAL_MSI"},
			{"reqIOEventFD", "KVM_IOEVENTFD"},
			{"reqGetDirtyLog", "KVM_GET_DIRTY_LOG"},
			{"reqClearDirtyLog", "KVM_CLEAR_DIRTY_LOG"},
			{"reqGetClock", "KVM_GET_CLOCK"},
			{"reqSetClock", "KVM_SET_CLOCK"},
			{"reqGetSregs2", "KVM_GET_SREGS2"},
			{"reqSetSregs2", "KVM_SET_SREGS2"},
			{"reqGetXSave", "KVM_GET_XSAVE"},
			{"reqGetXSave2", "KVM_GET_XSAVE2"},
			{"reqSetXSave", "KVM_SET_XSAVE"},
			{"reqGetXCRs", "KVM_GET_XCRS"},
			{"reqSetXCRs", "KVM_SET_XCRS"},
			{"reqGetVCPUEvents", "KVM_GET_VCPU_EVENTS"},
			{"reqSetVCPUEvents", "KVM_SET_VCPU_EVENTS"},
			{"reqGetDebugRegs", "KVM_GET_DEBUGREGS"},
			{"reqSetDebugRegs", "KVM_SET_DEBUGREGS"},
			{"reqGetLAPIC", "KVM_GET_LAPIC"},
			{"reqSetLAPIC", "KVM_SET_LAPIC"},
			{"reqGetMPState", "KVM_GET_MP_STATE"},
			{"reqSetMPState", "KVM_SET_MP_STATE"},
			{"reqGetMSRs", "KVM_GET_MSRS"},
			{"reqSetMSRs", "KVM_SET_MSRS"},
			{"reqGetCPUID2", "KVM_GET_CPUID2"},
			{"reqSetCPUID2", "KVM_SET_CPUID2"},
			{"reqGetTSCKHz", "KVM_GET_TSC_KHZ"},
			{"reqSetTSCKHz", "KVM_SET_TSC_KHZ"},
			{"reqHasDeviceAttr", "KVM_HAS_DEVICE_ATTR"},
			{"reqGetDeviceAttr", "KVM_GET_DEVICE_ATTR"},
			{"reqSetDeviceAttr", "KVM_SET_DEVICE_ATTR"},
			{"reqKVMClockCtrl", "KVM_KVMCLOCK_CTRL"},
			{"reqNMI", "KVM_NMI"},
			{"reqTranslate", "KVM_TRANSLATE"},
		},
	},
	{
		doc: "Memory slots and the dirty log.",
		consts: []constant{
			{"memLogDirtyPages", "KVM_MEM_LOG_DIRTY_PAGES"},
			{"memReadonly", "KVM_MEM_READONLY"},
			{"dirtyLogManualProtectEnable", "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE"},
			{"dirtyLogInitiallySet", "KVM_DIRTY_LOG_INITIALLY_SET"},
		},
	},
	{
		doc: "The three chips of the in-kernel interrupt controller.",
		typ: "ChipID",
		consts: []constant{
			{"ChipPICMaster", "KVM_IRQCHIP_PIC_MASTER"},
			{"ChipPICSlave", "KVM_IRQCHIP_PIC_SLAVE"},
			{"ChipIOAPIC", "KVM_IRQCHIP_IOAPIC"},
		},
	},
	{
		doc: "Interrupt routing, irqfd and ioeventfd.",
		consts: []constant{
			{"ioapicPins", "KVM_IOAPIC_NUM_PINS"},
			{"routingIRQChip", "KVM_IRQ_ROUTING_IRQCHIP"},
			{"routingMSI", "KVM_IRQ_ROUTING_MSI"},
			{"irqfdDeassign", "KVM_IRQFD_FLAG_DEASSIGN"},
			{"irqfdResample", "KVM_IRQFD_FLAG_RESAMPLE"},
			{"ioeventfdDatamatch", "KVM_IOEVENTFD_FLAG_DATAMATCH"},
			{"ioeventfdPIO", "KVM_IOEVENTFD_FLAG_PIO"},
			{"ioeventfdDeassign", "KVM_IOEVENTFD_FLAG_DEASSIGN"},
		},
	},
	{
		doc: "PITConfig.Flags: a read of port 0x61 is answered by the kernel.",
		consts: []constant{
			{"PITSpeakerDummy", "KVM_PIT_SPEAKER_DUMMY"},
		},
	},
	{
		doc: "ClockData.Flags.",
		consts: []constant{
			{"ClockTSCStable", "KVM_CLOCK_TSC_STABLE"},
			{"ClockRealtime", "KVM_CLOCK_REALTIME"},
			{"ClockHostTSC", "KVM_CLOCK_HOST_TSC"},
		},
	},
	{
		doc: "The states of a vCPU as multiprocessing sees it.",
		typ: "MPState",
		consts: []constant{
			{"MPRunnable", "KVM_MP_STATE_RUNNABLE"},
			{"MPUninitialized", "KVM_MP_STATE_UNINITIALIZED"},
			{"MPInitReceived", "KVM_MP_STATE_INIT_RECEIVED"},
			{"MPHalted", "KVM_MP_STATE_HALTED"},
			{"MPSIPIReceived", "KVM_MP_STATE_SIPI_RECEIVED"},
		},
	},
	{
		doc: "VCPUEvents.Flags: which parts of the structure count.",
		consts: []constant{
			{"EventsValidNMIPending", "KVM_VCPUEVENT_VALID_NMI_PENDING"},
			{"EventsValidSIPIVector", "KVM_VCPUEVENT_VALID_SIPI_VECTOR"},
			{"EventsValidShadow", "KVM_VCPUEVENT_VALID_SHADOW"},
			{"EventsValidSMM", "KVM_VCPUEVENT_VALID_SMM"},
			{"EventsValidPayload", "KVM_VCPUEVENT_VALID_PAYLOAD"},
			{"EventsValidTripleFault", "KVM_VCPUEVENT_VALID_TRIPLE_FAULT"},
		},
	},
	{
		doc: "CPUIDEntry2.Flags: the entry counts for its Index (ECX) only.",
		consts: []constant{
			{"CPUIDSignificantIndex", "KVM_CPUID_FLAG_SIGNIFCANT_INDEX"},
		},
	},
	{
		doc: "Sregs2.Flags: PDPTRs are valid.",
		consts: []constant{
			{"Sregs2PDPTRsValid", "KVM_SREGS2_FLAGS_PDPTRS_VALID"},
		},
	},
	{
		doc: "The vCPU device attribute that is the TSC offset.",
		consts: []constant{
			{"vcpuTSCCtrl", "KVM_VCPU_TSC_CTRL"},
			{"vcpuTSCOffset", "KVM_VCPU_TSC_OFFSET"},
		},
	},
	{
		doc: "Suberrors of KVM_EXIT_INTERNAL_ERROR.",
		typ: "Suberror",
		consts: []constant{
			{"SuberrorEmulation", "KVM_INTERNAL_ERROR_EMULATION"},
			{"SuberrorSimulException", "KVM_INTERNAL_ERROR_SIMUL_EX"},
			{"SuberrorDeliveryEvent", "KVM_INTERNAL_ERROR_DELIVERY_EV"},
			{"SuberrorUnexpectedExit", "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON"},
		},
	},
	{
		doc: "Types of KVM_EXIT_SYSTEM_EVENT.",
		typ: "SystemEventType",
		consts: []constant{
			{"SystemEventShutdown", "KVM_SYSTEM_EVENT_SHUTDOWN"},
			{"SystemEventReset", "KVM_SYSTEM_EVENT_RESET"},
			{"SystemEventCrash", "KVM_SYSTEM_EVENT_CRASH"},
		},
	},
	{
		doc: "Offsets into struct kvm_run, and limits of its parts, in bytes.",
		consts: []constant{
			{"runSize", "sizeof(struct kvm_run)"},
			{"runImmediateExit", "offsetof(struct kvm_run, immediate_exit)"},
			{"runExitReason", "offsetof(struct kvm_run, exit_reason)"},
			{"runHWReason", "offsetof(struct kvm_run, hw.hardware_exit_reason)"},
			{"runFailReason", "offsetof(struct kvm_run, fail_entry.hardware_entry_failure_reason)"},
			{"runFailCPU", "offsetof(struct kvm_run, fail_entry.cpu)"},
			{"runIODirection", "offsetof(struct kvm_run, io.direction)"},
			{"runIOSize", "offsetof(struct kvm_run, io.size)"},
			{"runIOPort", "offsetof(struct kvm_run, io.port)"},
			{"runIOCount", "offsetof(struct kvm_run, io.count)"},
			{"runIODataOffset", "offsetof(struct kvm_run, io.data_offset)"},
			{"runMMIOAddr", "offsetof(struct kvm_run, mmio.phys_addr)"},
			{"runMMIOData", "offsetof(struct kvm_run, mmio.data)"},
			{"runMMIOLen", "offsetof(struct kvm_run, mmio.len)"},
			{"runMMIOIsWrite", "offsetof(struct kvm_run, mmio.is_write)"},
			{"runHypercallNr", "offsetof(struct kvm_run, hypercall.nr)"},
			{"runHypercallArgs", "offsetof(struct kvm_run, hypercall.args)"},
			{"runHypercallRet", "offsetof(struct kvm_run, hypercall.ret)"},
			{"runInternalSuberror", "offsetof(struct kvm_run, internal.suberror)"},
			{"runInternalNData", "offsetof(struct kvm_run, internal.ndata)"},
			{"runInternalData", "offsetof(struct kvm_run, internal.data)"},
			{"runSystemEventType", "offsetof(struct kvm_run, system_event.type)"},
			{"runSystemEventNData", "offsetof(struct kvm_run, system_event.ndata)"},
			{"runSystemEventData", "offsetof(struct kvm_run, system_event.data)"},
			{"ioDirectionOut", "KVM_EXIT_IO_OUT"},
			{"emulationHasInstruction", "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES"},
		},
	},
}

func generate() ([]byte, error) {
	exprs := []string{"LINUX_VERSION_CODE"}
	for _, g := range groups {
		for _, c := range g.consts {
			exprs = append(exprs, c.c)
		}
	}
	vals, err := cc.Eval([]string{"linux/version.h", "linux/kvm.h"}, exprs)
	if err != nil {
		return nil, err
	}

	var b bytes.Buffer
	// The header's patch level is left out: it changes with every security
	// update of the distribution, the ABI does not.
	fmt.Fprintf(&b, "// Code generated by vmm/kvm/internal/gen from <linux/kvm.h> of Linux %d.%d. DO NOT EDIT.\n\n", vals[0]>>16, vals[0]>>8&0xff)
	fmt.Fprintf(&b, "package kvm\n\n")
	vals = vals[1:]
	var requests []constant
	for _, g := range groups {
		fmt.Fprintf(&b, "// %s\nconst (\n", g.doc)
		for _, c := range g.consts {
			fmt.Fprintf(&b, "%s %s = %s // %s\n", c.name, g.typ, literal(g.typ, vals[0]), c.c)
			vals = vals[1:]
			if g.typ == "request" {
				requests = append(requests, c)
			}
		}
		fmt.Fprintf(&b, ")\n\n")
	}
	fmt.Fprintf(&b, "// String is the request's name in the kernel's header.\n")
	fmt.Fprintf(&b, "func (r request) String() string {\nswitch r {\n")
	for _, c := range requests {
		fmt.Fprintf(&b, "case %s:\nreturn %q\n", c.name, c.c)
	}
	fmt.Fprintf(&b, "}\nreturn \"unknown KVM request\"\n}\n")
	return format.Source(b.Bytes())
}

func literal(typ string, v uint64) string {
	if typ == "request" {
		return fmt.Sprintf("%#x", v)
	}
	return fmt.Sprint(v)
}
