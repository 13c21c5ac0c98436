package pid1

import (
	"slices"
	"testing"
)

func TestCmdline(t *testing.T) {
	c := Cmdline(`console=ttyS0 lab.ip=10.0.0.1/24 lab.ip=10.0.1.1/24 quiet x="a b" scsi_mod.scan=async kvm-amd.nested=0 kvm_amd.npt=1 lab.name=one lab.name=two y.z`)
	for _, test := range []struct {
		key, want string
		ok        bool
	}{
		{"lab.name", "two", true}, {"x", "a b", true}, {"quiet", "", true}, {"absent", "", false}, {"lab", "", false},
	} {
		if got, ok := c.Get(test.key); got != test.want || ok != test.ok {
			t.Errorf("Get(%s) = %q, %v; want %q, %v", test.key, got, ok, test.want, test.ok)
		}
	}
	if got, want := c.All("lab.ip"), []string{"10.0.0.1/24", "10.0.1.1/24"}; !slices.Equal(got, want) {
		t.Errorf("All(lab.ip) = %q; want %q", got, want)
	}
	for module, want := range map[string]string{
		"scsi_mod": "scan=async", "kvm_amd": "nested=0 npt=1", "y": "z", "x": "", "kvm": "",
	} {
		if got := c.ModuleParameters(module); got != want {
			t.Errorf("ModuleParameters(%s) = %q; want %q", module, got, want)
		}
	}
	if got := Cmdline("").Fields(); len(got) != 0 {
		t.Errorf("Fields of nothing = %q", got)
	}
}

func FuzzCmdline(f *testing.F) {
	f.Add(`a=b "c d"=e f.g=h`)
	f.Add(`"`)
	f.Fuzz(func(t *testing.T, s string) {
		c := Cmdline(s)
		c.Get("a")
		c.All("a")
		c.ModuleParameters("f")
		for _, field := range c.Fields() {
			if field == "" && !slices.Contains([]rune(s), '"') {
				t.Errorf("Fields(%q) has an empty one", s)
			}
		}
	})
}
