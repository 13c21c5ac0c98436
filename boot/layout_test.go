package boot

import (
	"slices"
	"testing"

	"vmm/device"
	"vmm/memory"
)

func TestLayoutHasNoOverlap(t *testing.T) {
	for _, table := range []struct {
		name  string
		spans []span
		limit uint64
	}{{"addresses", addresses, 1 << 52}, {"ports", ports, 1 << 16}, {"irqs", irqs, 16}} {
		spans := slices.Clone(table.spans)
		slices.SortFunc(spans, func(a, b span) int { return int(int64(a.start) - int64(b.start)) })
		end := uint64(0)
		for _, s := range spans {
			if s.start < end || s.size == 0 || s.start+s.size > table.limit {
				t.Errorf("%s: %s, %#x+%#x, is empty, beyond %#x or overlaps what ends at %#x", table.name, s.name, s.start, s.size, table.limit, end)
			}
			end = s.start + s.size
		}
	}
}

// The table's sizes are those of what is there.
func TestLayoutFitsItsContents(t *testing.T) {
	size := func(start uint64, spans []span) uint64 {
		t.Helper()
		for _, s := range spans {
			if s.start == start {
				return s.size
			}
		}
		t.Errorf("nothing at %#x", start)
		return 0
	}
	ranges := uint64(len(memoryMap([]memory.Region{{Bytes: make([]byte, addrHigh)}, {}})))
	for _, test := range []struct {
		name string
		need uint64
		have uint64
	}{
		{"GDT", uint64(len(gdt())), size(uint64(addrGDT), addresses)},
		{"page tables", uint64(len(identityMap(0))), size(uint64(addrPageTables), addresses)},
		{"boot params", bootParamsSize, size(uint64(addrBootParams), addresses)},
		{"command line", cmdlineRoom, size(uint64(addrCmdline), addresses)},
		{"ACPI tables", uint64(len(acpiTables(MaxCPUs))), size(uint64(addrACPI), addresses)},
		{"memory map", 24 * ranges, size(uint64(addrMemmap), addresses)},
		{"memory map in boot params", 20 * ranges, 20 * 128},
		{"UART", device.UARTPorts, size(PortCOM1, ports)},
		{"PM", device.PMPorts, size(PortPM, ports)},
		{"RTC", device.RTCPorts, size(PortRTC, ports)},
	} {
		if test.need > test.have {
			t.Errorf("%s: %d bytes or ports needed, %d in the table", test.name, test.need, test.have)
		}
	}
}

func TestMemoryMap(t *testing.T) {
	low := memory.Region{GPA: 0, Bytes: make([]byte, 16<<20)}
	high := memory.Region{GPA: memory.HoleEnd, Bytes: make([]byte, 4096)}
	for _, test := range []struct {
		name    string
		regions []memory.Region
		ram     []memoryRange
	}{
		{"low", []memory.Region{low}, []memoryRange{{0, 0x9fc00, 1}, {0x100000, 15 << 20, 1}}},
		{"low and high", []memory.Region{low, high}, []memoryRange{{0, 0x9fc00, 1}, {0x100000, 15 << 20, 1}, {4 << 30, 4096, 1}}},
	} {
		got := memoryMap(test.regions)
		end := uint64(0)
		var ram []memoryRange
		for _, r := range got {
			if r.start < end || r.size == 0 {
				t.Errorf("%s: %#x+%#x is empty or out of order", test.name, r.start, r.size)
			}
			end = r.start + r.size
			if r.kind == memoryRAM {
				ram = append(ram, r)
			}
		}
		if !slices.Equal(ram, test.ram) {
			t.Errorf("%s: RAM %v; want %v", test.name, ram, test.ram)
		}
		for _, s := range addresses {
			for _, r := range ram {
				reserved := s.start >= uint64(addrBIOS) && s.start < uint64(addrHigh) || s.start >= uint64(PCIWindow) && s.start < uint64(memory.HoleEnd)
				if reserved && s.start < r.start+r.size && r.start < s.start+s.size {
					t.Errorf("%s: RAM %#x+%#x is where %s is", test.name, r.start, r.size, s.name)
				}
			}
		}
	}
}
