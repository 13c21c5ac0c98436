// Bench measures migrations from one process to another over loopback TCP, on
// the host where it is started, of guests that are a few instructions, so that
// any KVM will do. First how fast memory goes, which is random bytes: vmm, QEMU
// without and with multifd, and a plain copy of the same bytes between two
// memfds, taking turns. Then how long a move of vmm and of QEMU takes, and how
// long the guest is silent. What counts is the ratios.
package main

import (
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"vmm/internal/sys"
)

// fillAt is where the random bytes begin: the guest's code, and what its
// monitor has put there, stand below.
const fillAt = 16 << 20

func main() {
	vmm := flag.String("vmm", ".build/vmm", "the vmm `command`")
	memory := flag.Int("memory", 2048, "the guest's memory, `MiB`")
	rounds := flag.Int("rounds", 5, "measurements of each")
	receiver := flag.Int("receiver", 0, "be the receiving end of a plain copy over so many `connections`")
	flag.Parse()
	var err error
	switch size := *memory << 20; {
	case size <= fillAt || *rounds < 1:
		err = errors.New("give more than 16 MiB of memory and at least one round")
	case *receiver > 0:
		err = receiveCopy(*receiver, size)
	default:
		err = errors.Join(stream(*vmm, size, *rounds), moves(*vmm, *rounds))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// mover is one way of moving memory. Each move answers bytes per second.
type mover struct {
	who         string
	connections int
	move        func() (float64, error)
}

// halting is a guest that prints a letter and halts.
var halting = []byte{
	0x66, 0xba, 0xf8, 0x03, 0xb0, '!', 0xee, // mov dx, COM1; mov al, '!'; out dx, al
	0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp back to hlt
}

// stream measures rates, each that of a whole migration.
func stream(vmm string, size, rounds int) error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ours, err := newVMM(vmm, dir, shape{size, size, halting})
	if err != nil {
		return err
	}
	defer ours.close()
	theirs, err := newQEMU(dir, shape{size, size, nil})
	if err != nil {
		return err
	}
	defer theirs.close()
	var movers []mover
	for _, n := range []int{1, 2, 4} {
		movers = append(movers,
			mover{"plain copy", n, func() (float64, error) { return plainCopy(ours.at, n, size) }},
			mover{"vmm", n, func() (float64, error) {
				m, err := ours.move(n)
				return float64(m.sent) / m.total.Seconds(), err
			}},
			mover{"qemu", n, func() (float64, error) {
				m, err := theirs.move(n)
				return float64(size-fillAt) / m.total.Seconds(), err
			}})
	}
	const perCount = 3 // of each number of connections, the plain copy first
	fmt.Printf("%d MiB of random memory over loopback TCP; the load is %s\n", size>>20, load())
	rates := make([][]float64, len(movers))
	for round := range rounds + 1 {
		for i, m := range movers {
			if err := warm(size); err != nil {
				return err
			}
			rate, err := m.move()
			if err != nil {
				return fmt.Errorf("%s, %d connections: %w", m.who, m.connections, err)
			}
			if round > 0 { // the first one makes page tables
				rates[i] = append(rates[i], rate)
			}
		}
	}
	fmt.Printf("%-12s %-11s %8s %8s   %s\n", "connections", "who", "MB/s", "of copy", "MB/s in each round")
	for i, m := range movers {
		var ratios []float64
		for round, copied := range rates[i/perCount*perCount] {
			ratios = append(ratios, rates[i][round]/copied)
		}
		fmt.Printf("%-12d %-11s %8.0f %8.2f  ", m.connections, m.who, median(rates[i])/1e6, median(ratios))
		for _, rate := range rates[i] {
			fmt.Printf(" %.0f", rate/1e6)
		}
		fmt.Println()
	}
	fmt.Printf("QEMU has multifd where there are 2 connections or more; \"of copy\" is the median of the rounds' ratios; the load is %s\n", load())
	return nil
}

// warm has the host use and free as much memory as a guest needs, and then some,
// before each measurement: a host that is a virtual machine itself may have given
// its free memory back, and gets it anew page by page, slower than any copy.
func warm(guest int) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	free := info.Freeram * uint64(info.Unit)
	m, err := sys.MapAnonymous(int(min(uint64(guest+guest/2), free/2)))
	if err != nil {
		return err
	}
	clear(m.Bytes())
	return m.Close()
}

func median(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	return s[len(s)/2]
}

func load() string {
	text, _ := os.ReadFile("/proc/loadavg")
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum is that of the random bytes in a guest's memory.
func checksum(file *os.File, size int) (uint32, error) {
	m, err := sys.MapShared(int(file.Fd()), 0, size)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	return crc32.Checksum(m.Bytes()[fillAt:], castagnoli), nil
}
