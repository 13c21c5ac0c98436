package main

import (
	"flag"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// dirty writes to each page of its memory in turn, again and again, and prints
// a line when it has done so once.
func dirty(args []string) error {
	flags := flag.NewFlagSet("dirty", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: dirty [-size BYTES]\nWrites to memory until it is killed.")
		flags.PrintDefaults()
	}
	size := flags.Int("size", 32<<20, "of the memory, bytes")
	flags.Parse(args)
	if flags.NArg() != 0 || *size < 1 {
		flags.Usage()
		os.Exit(2)
	}
	memory, err := unix.Mmap(-1, 0, *size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("mmap %d bytes: %w", *size, err)
	}
	pass := func(v byte) {
		for at := 0; at < len(memory); at += os.Getpagesize() {
			memory[at] = v | 1 // never zero, which would not be sent
		}
	}
	pass(0)
	fmt.Println("dirtying")
	for v := byte(2); ; v += 2 {
		pass(v)
	}
}
