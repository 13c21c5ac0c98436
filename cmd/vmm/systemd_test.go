package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const contrib = "../../contrib/systemd"

// The units are what systemd understands, and start what vmm understands.
func TestUnits(t *testing.T) {
	units := []string{"vmm@.service", "vmm-recover.service"}
	dir := t.TempDir()
	// systemd wants the program to be there, and it is not installed here.
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command := regexp.MustCompile(`(?m)^ExecStart=/usr/local/bin/(vmm .*)$`)
	for _, name := range units {
		text, err := os.ReadFile(filepath.Join(contrib, name))
		if err != nil {
			t.Fatal(err)
		}
		starts := command.FindAllStringSubmatch(string(text), -1)
		if len(starts) != 1 {
			t.Fatalf("%s has %d ExecStart of /usr/local/bin/vmm; want one", name, len(starts))
		}
		if err := understood(strings.ReplaceAll(starts[0][1], "%i", "web1"), false); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		changed := strings.Replace(string(text), "/usr/local/bin/vmm", program, 1)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(changed), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	analyze := needTool(t, "systemd-analyze")
	c := exec.Command(analyze, "verify", "--man=no", filepath.Join(dir, "vmm@web1.service"), filepath.Join(dir, "vmm-recover.service"))
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v: %v\n%s", c.Args, err, out)
	}
}

// The user that the units name exists after systemd-sysusers, in the groups
// that the units and the udev rules name.
func TestSysusers(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	conf, err := filepath.Abs(filepath.Join(contrib, "vmm.sysusers.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(needTool(t, "systemd-sysusers"), "--root="+root, conf).CombinedOutput(); err != nil {
		t.Fatalf("systemd-sysusers: %v\n%s", err, out)
	}
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	users, groups := read(filepath.Join(root, "etc/passwd")), read(filepath.Join(root, "etc/group"))
	rules := read(filepath.Join(contrib, "60-vmm.rules"))
	for _, m := range regexp.MustCompile(`GROUP="([^"]*)"`).FindAllStringSubmatch(rules, -1) {
		if !regexp.MustCompile(`(?m)^` + m[1] + `:.*[:,]vmm(,|$)`).MatchString(groups) {
			t.Errorf("60-vmm.rules: user vmm is not in group %s:\n%s", m[1], groups)
		}
	}
	for _, name := range []string{"vmm@.service", "vmm-recover.service"} {
		unit := read(filepath.Join(contrib, name))
		user := regexp.MustCompile(`(?m)^User=(.*)$`).FindStringSubmatch(unit)
		if user == nil || !regexp.MustCompile(`(?m)^`+user[1]+`:`).MatchString(users) {
			t.Errorf("%s: user %v is not in:\n%s", name, user, users)
		}
		for _, line := range regexp.MustCompile(`(?m)^SupplementaryGroups=(.*)$`).FindAllStringSubmatch(unit, -1) {
			for _, g := range strings.Fields(line[1]) {
				if !regexp.MustCompile(`(?m)^` + g + `:`).MatchString(groups) {
					t.Errorf("%s: group %s is not in:\n%s", name, g, groups)
				}
			}
		}
	}
	// Lines of matches and assignments, each KEY OP "VALUE".
	item := regexp.MustCompile(`^[A-Z]+(\{\w+\})?(==|=)"[^"]+"$`)
	for line := range strings.Lines(rules) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		for _, part := range strings.Split(line, ", ") {
			if !item.MatchString(part) {
				t.Errorf("60-vmm.rules: %q is no udev match or assignment", part)
			}
		}
	}
}
