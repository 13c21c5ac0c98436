package sg

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"vmm/scsi"
)

// Find returns the nodes /dev/sgN of this host's SCSI devices whose name, the
// best designator of VPD page 83h (scsi.Identity.Name), is the given one, in
// the kernel's order. The kernel read the pages when it found the devices:
// nothing is sent.
func Find(name string) ([]string, error) { return host("/").findNamed(name) }

func (h host) findNamed(name string) (nodes []string, err error) {
	const class = "sys/class/scsi_generic"
	entries, err := os.ReadDir(h.file(class))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no such class: no such devices
		return nil, fmt.Errorf("look for %s: %w", name, err)
	}
	for _, e := range entries {
		page, err := os.ReadFile(filepath.Join(h.file(class), e.Name(), "device/vpd_pg83"))
		if err != nil {
			continue // it has no such page, or has just gone
		}
		designators, err := scsi.ParseDesignators(page)
		if err != nil {
			continue
		}
		id := scsi.Identity{Designators: designators}
		if d, ok := id.Name(); ok && d.String() == name {
			nodes = append(nodes, "/dev/"+e.Name())
		}
	}
	slices.SortFunc(nodes, func(a, b string) int { // sg2 before sg10
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		if a < b {
			return -1
		}
		return 1
	})
	return nodes, nil
}
