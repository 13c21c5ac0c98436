package main

import (
	"fmt"
	"os"
	"time"
)

// busy is where a guest writes that writes, and how much.
const (
	busyAt   = 256 << 20
	busySize = 32 << 20
)

// What the guests do for the rest of their lives. Each prints a letter every
// few thousand instructions.
var (
	spinning = []byte{
		0x66, 0xba, 0xf8, 0x03, 0xb0, '.', // mov dx, COM1; mov al, '.'
		0xee,                         // out dx, al
		0xb9, 0xd0, 0x07, 0x00, 0x00, // mov ecx, 2000
		0xe2, 0xfe, // loop to itself
		0xeb, 0xf6, // jmp back to the out
	}
	writing = []byte{
		0x66, 0xba, 0xf8, 0x03, 0xb0, '.', // mov dx, COM1; mov al, '.'
		0xbf, 0x00, 0x00, 0x00, busyAt >> 24, // mov edi, busyAt
		0xbb, busySize >> 21, 0x00, 0x00, 0x00, // mov ebx, how many times 512 pages
		0xee,                         // out dx, al
		0xb9, 0x00, 0x02, 0x00, 0x00, // mov ecx, 512
		0x89, 0x3f, // mov [edi], edi
		0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
		0xe2, 0xf6, // loop to the mov
		0x4b, 0x75, 0xed, // dec ebx; jnz back to the out
		0xeb, 0xe1, // jmp back to mov edi
	}
)

// moves measures what a move of a guest of 512 MiB takes, of which 96 MiB are
// random bytes and most of the rest was never touched: writing nothing, and
// writing to 32 MiB. A monitor's own idea of its downtime ends where it says; the
// silence is the time without a letter of the guest's.
func moves(vmm string, rounds int) error {
	const memory, filled = 512 << 20, fillAt + 96<<20
	fmt.Printf("moves of %d MiB over one connection, %v of downtime allowed; the load is %s\n", memory>>20, downtime, load())
	fmt.Printf("%-21s %-5s %9s %12s %11s %9s   %s\n", "guest", "who", "total, ms", "downtime, ms", "silence, ms", "sent, MiB", "silence in each round")
	for _, g := range []struct {
		name string
		code []byte
	}{{"writing nothing", spinning}, {"32 MiB being written", writing}} {
		if err := movesOf(g.name, vmm, shape{memory, filled, g.code}, rounds); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
	}
	return nil
}

func movesOf(name, vmm string, s shape, rounds int) error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ours, err := newVMM(vmm, dir, s)
	if err != nil {
		return err
	}
	defer ours.close()
	theirs, err := newQEMU(dir, s)
	if err != nil {
		return err
	}
	defer theirs.close()
	pairs := []struct {
		who  string
		pair interface {
			move(connections int) (moved, error)
			guest() *guest
		}
		total, downtime, silence, sent []float64
	}{{who: "vmm", pair: ours}, {who: "qemu", pair: theirs}}
	for round := range rounds + 1 {
		for i := range pairs {
			if err := warm(s.memory); err != nil {
				return err
			}
			p, other := &pairs[i], &pairs[1-i]
			from := p.pair.guest()
			other.pair.guest().still(true)
			m, err := p.pair.move(1)
			if err == nil {
				err = p.pair.guest().prints()
			}
			other.pair.guest().still(false)
			if err != nil {
				return fmt.Errorf("%s: %w", p.who, err)
			}
			if round == 0 { // the first one makes page tables
				continue
			}
			_, last := from.console.Span()
			first, _ := p.pair.guest().console.Span()
			ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
			p.total = append(p.total, ms(m.total))
			p.downtime = append(p.downtime, ms(m.downtime))
			p.silence = append(p.silence, ms(first.Sub(last)))
			p.sent = append(p.sent, float64(m.sent)/(1<<20))
		}
	}
	for _, p := range pairs {
		fmt.Printf("%-21s %-5s %9.0f %12.1f %11.1f %9.1f   %.0f\n", name, p.who, median(p.total), median(p.downtime), median(p.silence), median(p.sent), p.silence)
	}
	a, b := &pairs[0], &pairs[1]
	fmt.Printf("%-21s %-5s %9.2f %12.2f %11.2f\n", name, "ratio", ratio(a.total, b.total), ratio(a.downtime, b.downtime), ratio(a.silence, b.silence))
	return nil
}

// ratio is the median of the rounds' ratios.
func ratio(a, b []float64) float64 {
	var all []float64
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	return median(all)
}
