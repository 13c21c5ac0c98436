package sys

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// PopulateProgram maps all of this process's own program, reading what is not in
// the page cache: code that runs for the first time, and may have to come from a
// slow or busy disk, then costs nothing where every millisecond counts. It is
// safe to call at any time and again, and blocks for as long as the disk takes.
// Linux before 5.14 answers EINVAL: there the program is read as it runs.
func PopulateProgram() error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		// proc_pid_maps(5): start-end perms offset dev inode pathname
		if !strings.HasSuffix(strings.TrimSuffix(line, "\n"), " "+program) {
			continue
		}
		var start, end uintptr
		if _, err := fmt.Sscanf(line, "%x-%x ", &start, &end); err != nil {
			return fmt.Errorf("/proc/self/maps: %q: %w", line, err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_POPULATE_READ); errno != 0 {
			return fmt.Errorf("madvise(%#x, %d, MADV_POPULATE_READ): %w", start, end-start, errno)
		}
	}
	return nil
}
