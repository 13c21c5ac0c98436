package sys

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Every page of the program is there afterwards.
func TestPopulateProgram(t *testing.T) {
	err := PopulateProgram()
	if errors.Is(err, unix.EINVAL) {
		t.Skip("this kernel cannot: Linux before 5.14")
	}
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	var ours bool
	var size, found int
	for line := range strings.Lines(string(smaps)) {
		line = strings.TrimSpace(line)
		var n int
		switch {
		case strings.Contains(line, "-") && strings.Contains(line, " r"):
			ours = strings.HasSuffix(line, " "+program)
		case !ours:
		case strings.HasPrefix(line, "Size:"):
			_, err = fmt.Sscanf(line, "Size: %d kB", &n)
			size = n
		case strings.HasPrefix(line, "Rss:"):
			_, err = fmt.Sscanf(line, "Rss: %d kB", &n)
			if n != size {
				t.Errorf("%d KiB of a mapping of %d are there", n, size)
			}
			found++
		}
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	if found == 0 {
		t.Error("the program has no mapping")
	}
}
