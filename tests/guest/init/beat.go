package main

import (
	"flag"
	"fmt"
	"os"
	"time"
)

// beat shows from outside when the guest runs and when it does not.
func beat(args []string) error {
	flags := flag.NewFlagSet("beat", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: beat [-every DURATION]\nPrints a letter again and again until it is killed.")
		flags.PrintDefaults()
	}
	every := flags.Duration("every", 10*time.Millisecond, "time between two letters")
	flags.Parse(args)
	if flags.NArg() != 0 || *every <= 0 {
		flags.Usage()
		os.Exit(2)
	}
	for range time.Tick(*every) {
		if _, err := os.Stdout.WriteString("."); err != nil {
			return err
		}
	}
	return nil
}
