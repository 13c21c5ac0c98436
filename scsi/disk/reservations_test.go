package disk

import (
	"testing"

	"vmm/scsi/pr"
)

// named is the nexus of an initiator name.
func named(t testing.TB, name string) pr.Nexus {
	t.Helper()
	n, err := pr.NamedNexus(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
