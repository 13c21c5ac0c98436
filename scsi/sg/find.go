package sg

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"vmm/scsi"
)

// Unit is a logical unit of this host as the kernel describes it.
type Unit struct {
	Node    string // "/dev/sg2"
	Type    string // peripheral device type in decimal: "0" is a disk (SPC-5 6.7.2)
	Vendor  string
	Product string
	// Name is the best designator of VPD page 83h (scsi.Identity.Name); empty
	// if it has none.
	Name string
	Nexus
}

// List returns this host's logical units in the kernel's order. The kernel
// read what they are when it found them: nothing is sent.
func List() ([]Unit, error) { return host("/").list() }

func (h host) list() ([]Unit, error) {
	const class = "sys/class/scsi_generic"
	entries, err := os.ReadDir(h.file(class))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no such class: no such devices
		return nil, err
	}
	if len(entries) == 0 {
		return nil, nil
	}
	boot, err := h.bootID()
	if err != nil {
		return nil, err
	}
	var units []Unit
	for _, e := range entries {
		dir, err := filepath.EvalSymlinks(filepath.Join(h.file(class), e.Name(), "device"))
		if err != nil {
			continue // it has just gone
		}
		u := Unit{Node: "/dev/" + e.Name(), Type: text(dir, "type"), Vendor: text(dir, "vendor"), Product: text(dir, "model"), Nexus: Nexus{BootID: boot}}
		if u.Address, err = parseAddress(filepath.Base(dir)); err != nil {
			continue
		}
		if page, err := os.ReadFile(filepath.Join(dir, "vpd_pg83")); err == nil {
			if designators, err := scsi.ParseDesignators(page); err == nil {
				id := scsi.Identity{Designators: designators}
				if d, ok := id.Name(); ok {
					u.Name = d.String()
				}
			}
		}
		units = append(units, u)
	}
	slices.SortFunc(units, func(a, b Unit) int { // sg2 before sg10
		return cmp.Or(cmp.Compare(len(a.Node), len(b.Node)), cmp.Compare(a.Node, b.Node))
	})
	return units, nil
}

// Find returns the nodes /dev/sgN of this host's logical units of that Name,
// in the kernel's order, but first the one that another process hands over, if
// there is one (first, which may be nil).
func Find(name string, first *Handed) ([]string, error) { return host("/").findNamed(name, first) }

func (h host) findNamed(name string, first *Handed) (nodes []string, err error) {
	units, err := h.list()
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", name, err)
	}
	for _, u := range units {
		switch {
		case u.Name != name || name == "":
		case first.at(u.Nexus):
			nodes = slices.Insert(nodes, 0, u.Node)
		default:
			nodes = append(nodes, u.Node)
		}
	}
	return nodes, nil
}
