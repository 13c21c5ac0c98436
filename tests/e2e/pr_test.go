package e2e

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// vmmSays runs a vmm command on the host; want, if not empty, is what its
// output must match.
func vmmSays(t *testing.T, command, want string) string {
	t.Helper()
	out, err := tryLocal(t, filepath.Join(stage, "vmm")+" "+command)
	if err != nil {
		t.Errorf("vmm %s: %v\n%s", command, err, out)
	}
	if want != "" && !regexp.MustCompile("(?m)"+want).MatchString(out) {
		t.Errorf("vmm %s says\n%s\nwant %s", command, out, want)
	}
	return out
}

// vmm pr on a real LUN: idle, and while a guest has it.
func TestPR(t *testing.T) {
	lun := needLIO(t, "pr", 64<<20, 2)
	mine, other := lun.Nexuses[0], lun.Nexuses[1]
	for _, n := range lun.Nexuses {
		local(t, "sg_turs "+n.SG+" || sg_turs "+n.SG) // takes its unit attentions away
	}
	vmmSays(t, "pr show "+mine.SG, `registrants +none`)
	local(t, fmt.Sprintf("sg_persist -n -o -G -S 0xb0b %s && sg_persist -n -o -R -K 0xb0b -T 5 %[1]s", other.SG))
	vmmSays(t, "pr show "+mine.SG, `reservation +Write Exclusive, Registrants Only \(type 5\), held with key 0x0000000000000b0b`)
	// What a killed guest leaves on this host's nexus.
	local(t, "sg_persist -n -o -G -S 0xdead "+mine.SG)
	vmmSays(t, "pr show "+mine.SG, `^  0x000000000000dead +no `)
	if out, err := tryLocal(t, filepath.Join(stage, "vmm")+" pr unregister "+mine.SG+" --key 0xb0b --yes"); err == nil {
		t.Errorf("another host's registration could be removed: %s", out)
	}
	vmmSays(t, "pr unregister "+mine.SG+" --key 0xdead --yes", `key 0x000000000000dead of this host is removed`)
	if out := vmmSays(t, "pr show "+mine.SG, ""); strings.Contains(out, "dead") || !strings.Contains(out, "b0b") {
		t.Errorf("after the removal vmm pr show says\n%s\nwant the other host's registration alone", out)
	}
	local(t, "sg_persist -n -o -C -K 0xb0b "+other.SG)

	v := boot(t, cloud, "guest.work=agent", "--lun", "id=data,path="+mine.SG)
	v.connect()
	disk := v.diskOf(0)
	v.reserve(disk, 5)
	own := `^  0x1122334455667788 +yes +yes `
	vmmSays(t, "pr show test", own)
	vmmSays(t, "pr show "+mine.SG, own) // by the guest's process
	vmmSays(t, "pr show test -o json", `"key": "0x1122334455667788"`)
	// A unit attention is the guest's, whoever asks the disk before it does.
	local(t, fmt.Sprintf("sg_turs %s; sg_persist -n -o -G -S 0xb0b %[1]s && sg_persist -n -o -P -K 0xb0b -S %s -T 5 %[1]s", other.SG, guestKey))
	vmmSays(t, "pr show test", `^  0x0000000000000b0b +yes +no `)
	if out, _ := v.try("sg_turs -v " + disk + " 2>&1"); !strings.Contains(strings.ToLower(out), "unit attention") {
		t.Errorf("the guest's next command does not meet its unit attention: %s", out)
	}
	v.poweroff()
	local(t, "sg_persist -n -o -C -K 0xb0b "+other.SG)
}
