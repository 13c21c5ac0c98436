package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"vmm/tests/guest"
	"vmm/tests/lab/lio"
)

// documented is a file of the repository that a user is told to install or to
// follow.
func documented(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(stage, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// service is what the files in contrib/systemd make of a host, done here with
// the files themselves as the instructions: a lab host has no systemd. Names of
// users and groups become numbers, and /run, /var and /etc are beneath root.
type service struct {
	t      *testing.T
	unit   string // vmm@.service, for the guest web1
	root   string
	ids    map[string]uint32   // of users and groups
	groups map[string][]uint32 // of users
}

func newService(t *testing.T) *service {
	t.Helper()
	root, err := os.MkdirTemp("", "vmm") // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	s := &service{
		t: t, root: root, unit: strings.ReplaceAll(documented(t, "contrib/systemd/vmm@.service"), "%i", "web1"),
		ids: map[string]uint32{}, groups: map[string][]uint32{},
	}
	s.makeUsers(documented(t, "contrib/systemd/vmm.sysusers.conf"))
	for _, kind := range []struct{ key, base string }{{"RuntimeDirectory", "/run"}, {"StateDirectory", "/var/lib"}} {
		mode, err := strconv.ParseUint(s.value(kind.key+"Mode"), 8, 32)
		if err != nil {
			t.Fatalf("%sMode: %v", kind.key, err)
		}
		dir := filepath.Join(root, kind.base, s.value(kind.key))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		s.give(dir, s.user(), s.id(s.value("Group")), os.FileMode(mode))
	}
	// Who may use KVM is the distribution's rule (root:kvm 0660 in systemd's
	// 50-udev-default.rules), where there is one.
	info, err := os.Stat("/dev/kvm")
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode().Perm()&0o006 != 0o006 {
		s.give("/dev/kvm", 0, s.id("kvm"), 0o660)
		t.Cleanup(func() { s.give("/dev/kvm", st.Uid, st.Gid, info.Mode().Perm()) })
	}
	return s
}

func (s *service) give(path string, uid, gid uint32, mode os.FileMode) {
	s.t.Helper()
	if err := os.Chown(path, int(uid), int(gid)); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		s.t.Fatal(err)
	}
}

// id is the number of a user or group that sysusers has made.
func (s *service) id(name string) uint32 {
	s.t.Helper()
	n, ok := s.ids[name]
	if !ok {
		s.t.Fatalf("vmm.sysusers.conf makes no %q; it makes %v", name, s.ids)
	}
	return n
}

// makeUsers does what sysusers.d(5) says of lines g, u and m.
func (s *service) makeUsers(conf string) {
	s.t.Helper()
	make := func(name string) {
		if _, ok := s.ids[name]; !ok {
			s.ids[name] = uint32(61500 + len(s.ids)) // of no user of a distribution
		}
	}
	for line := range strings.Lines(conf) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || strings.HasPrefix(f[0], "#"):
		case len(f) >= 2 && (f[0] == "g" || f[0] == "u"):
			make(f[1])
		case len(f) == 3 && f[0] == "m":
			s.groups[f[1]] = append(s.groups[f[1]], s.id(f[2]))
		default:
			s.t.Fatalf("vmm.sysusers.conf: %q", line)
		}
	}
}

// values are what the unit sets a key to; value is the only one.
func (s *service) values(key string) (list []string) {
	for _, m := range regexp.MustCompile(`(?m)^`+key+`=(.*)$`).FindAllStringSubmatch(s.unit, -1) {
		list = append(list, strings.Fields(m[1])...)
	}
	return list
}

func (s *service) value(key string) string {
	s.t.Helper()
	list := s.values(key)
	if len(list) != 1 {
		s.t.Fatalf("vmm@.service: %s=%q; want one value", key, list)
	}
	return list[0]
}

func (s *service) user() uint32 { return s.id(s.value("User")) }

// moved is a path of the unit beneath root.
func (s *service) moved(text string) string {
	return regexp.MustCompile(`/(run|var/lib|etc)/vmm`).ReplaceAllString(text, s.root+"$0")
}

// command is a program as the unit would run it: its user, groups and
// environment, and no capability.
func (s *service) command(program string, args ...string) *exec.Cmd {
	s.t.Helper()
	groups := append([]uint32(nil), s.groups[s.value("User")]...)
	for _, name := range s.values("SupplementaryGroups") {
		groups = append(groups, s.id(name))
	}
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=" + os.Getenv("PATH")}
	for _, e := range s.values("Environment") {
		cmd.Env = append(cmd.Env, s.moved(e))
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: s.user(), Gid: s.id(s.value("Group")), Groups: groups}}
	return cmd
}

// says runs vmm as that user; want is what its output must match.
func (s *service) says(want string, args ...string) {
	s.t.Helper()
	out, err := s.command(filepath.Join(stage, "vmm"), args...).CombinedOutput()
	if !regexp.MustCompile("(?m)" + want).Match(out) {
		s.t.Errorf("vmm %s, as an unprivileged user: %v\n%s\nwant %s", strings.Join(args, " "), err, out, want)
	}
}

// plug does what udev(7) does with 60-vmm.rules when a device comes: the keys
// that the rules use, and no others.
func (s *service) plug(subsystem, node string) {
	s.t.Helper()
	sys, err := filepath.EvalSymlinks(filepath.Join("/sys/class", subsystem, filepath.Base(node)))
	if err != nil {
		s.t.Fatal(err)
	}
	uevent, _ := os.ReadFile(filepath.Join(sys, "uevent"))
	is := func(key, attribute, pattern string) bool {
		value := ""
		switch key {
		case "ACTION":
			value = "add"
		case "SUBSYSTEM":
			value = subsystem
		case "KERNEL":
			value = filepath.Base(node)
		case "ENV":
			if m := regexp.MustCompile(`(?m)^` + attribute + `=(.*)$`).FindSubmatch(uevent); m != nil {
				value = string(m[1])
			}
		case "ATTRS": // of the device or one above it
			for dir := sys; dir != "/sys"; dir = filepath.Dir(dir) {
				if b, err := os.ReadFile(filepath.Join(dir, attribute)); err == nil {
					value = strings.TrimRight(string(b), " \n")
					break
				}
			}
		default:
			s.t.Fatalf("60-vmm.rules: a match for %s", key)
		}
		ok, err := path.Match(pattern, value)
		if err != nil {
			s.t.Fatalf("60-vmm.rules: %q: %v", pattern, err)
		}
		return ok
	}
	item := regexp.MustCompile(`([A-Z]+)(?:\{(\w+)\})?(==|=)"([^"]*)"`)
	skip, ruled := "", false
	for line := range strings.Lines(documented(s.t, "contrib/systemd/60-vmm.rules")) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		matches, set := true, map[string]string{}
		for _, m := range item.FindAllStringSubmatch(line, -1) {
			if m[3] == "=" {
				set[m[1]] = m[4]
			} else {
				matches = matches && is(m[1], m[2], m[4])
			}
		}
		switch {
		case skip != "" && set["LABEL"] != skip || !matches:
			continue
		case set["GOTO"] != "":
			skip = set["GOTO"]
			continue
		}
		skip = ""
		if set["GROUP"] != "" {
			mode, err := strconv.ParseUint(set["MODE"], 8, 32)
			if err != nil {
				s.t.Fatalf("60-vmm.rules: %s: %v", line, err)
			}
			s.give(node, 0, s.id(set["GROUP"]), os.FileMode(mode))
			ruled = true
		}
	}
	if !ruled {
		s.t.Fatalf("60-vmm.rules says nothing of %s", node)
	}
}

func (s *service) plugLUN(n *lio.Nexus) {
	s.t.Helper()
	s.plug("scsi_generic", n.SG)
	s.plug("block", n.Block)
}

// needProgram puts what the image of a lab host lacks there.
func needProgram(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err == nil {
		return
	}
	if os.Getenv("VMM_TEST_EMULATED") == "" {
		t.Fatalf("%s is missing: apt-get install it", name)
	}
	local(t, "cd / && cpio -id <"+filepath.Join(stage, "programs.cpio"))
}

// A guest with a passed-through LUN is run by the user whom the documented
// setup makes, exactly as the unit runs it; that user controls it, with vmm and
// with the documentation's curl commands, and nobody else does.
func TestService(t *testing.T) {
	lun := needLIO(t, "service", 64<<20, 2)
	needProgram(t, "curl")
	mine, kept := lun.Nexuses[0], lun.Nexuses[1]
	for _, n := range lun.Nexuses {
		local(t, "sg_turs "+n.SG+" || sg_turs "+n.SG) // takes its unit attentions away
	}
	s := newService(t)
	s.plugLUN(mine)

	// What doctor says to that user of a LUN that it may have and of one that it
	// may not, and of another host that asks.
	local(t, "sg_persist -n -o -G -S 0xb0b "+kept.SG)
	in := "unix://" + s.moved("/run/vmm/guests/in")
	s.says(`waits in the background`, "receive", "probe", "--detach", "--listen", in)
	doctor := strings.NewReplacer("MINE", mine.SG, "KEPT", kept.SG).Replace
	s.says(doctor(`^ok +MINE +naa\.\w+: reservations with READ FULL STATUS(, REGISTER AND MOVE)?, APTPL(; without REGISTER AND MOVE)?; all types; 1 registered, not reserved$`+
		`(?s:.*)^warn +KEPT +naa\.\w+: not permitted: permission denied\n +give a group access with a udev rule`), "doctor", "--peer", in)
	s.says(`is not waited for any more`, "stop", "probe")
	local(t, "sg_persist -n -o -C -K 0xb0b "+kept.SG)

	serial := s.moved("/run/vmm/guests/serial")
	config := filepath.Join(s.root, "etc/vmm/web1.yaml")
	if err := os.MkdirAll(filepath.Dir(config), 0o755); err != nil {
		t.Fatal(err)
	}
	yaml := fmt.Sprintf("kernel: %s\ninitrd: %s\ncmdline: console=ttyS0 quiet panic=-1 mitigations=off nowatchdog guest.work=agent\nluns:\n  - id: data\n    path: %s\n",
		filepath.Join(stage, "cloud/bzImage"), filepath.Join(stage, "cloud/initrd"), mine.SG)
	if err := os.WriteFile(config, []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
	start := strings.Fields(s.moved(strings.Join(s.values("ExecStart"), " ")))
	v := supervise(t, s.command(filepath.Join(stage, "vmm"), append(start[1:], "--serial", serial)...))
	v.serial = serial
	v.connect()
	disk := v.diskOf(0)
	if out := v.sh("sg_inq " + disk); !strings.Contains(out, "LIO-ORG") {
		t.Errorf("sg_inq in the guest: %s; want the LUN's own answer", out)
	}
	v.reserve(disk, 5)
	v.sh("fill -offset 1048576 -size 1048576 " + disk)
	if held := local(t, "sg_persist -n -i -r "+kept.SG); !strings.Contains(held, guestKey) || !strings.Contains(held, reservationTypes[5]) {
		t.Errorf("READ RESERVATION by another nexus shows\n%s\nwant %s, key %s", held, reservationTypes[5], guestKey)
	}
	s.says(`^state +running$`, "status", "web1")
	own := `^  ` + guestKey + ` +yes +yes `
	s.says(own, "pr", "show", "web1")
	s.says(own, "pr", "show", mine.SG)

	// Another user has neither the directory nor the socket.
	socket := s.moved("/run/vmm/guests/web1.sock")
	stranger := s.command("curl", "-s", "--unix-socket", socket, "--json", "{}", "http://vmm/vmm.v1.MachineService/Status")
	const nobody = 65534
	stranger.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	if out, err := stranger.CombinedOutput(); err == nil {
		t.Errorf("another user reaches the guest: %s", out)
	}
	stranger = s.command(filepath.Join(stage, "vmm"), "status", "web1")
	stranger.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	if out, err := stranger.CombinedOutput(); err == nil || !strings.Contains(string(out), "it must be this user's") {
		t.Errorf("vmm status as another user: %v, %s; want to hear whose the directory is", err, out)
	}

	s.followCurl(v, socket)
	if status := v.wait(); status != 0 {
		t.Errorf("vmm ends with %d after Stop; want 0", status)
	}
}

// followCurl runs the commands of docs/api.md as they stand there, with this
// guest's socket and a disk image of this host. The last one ends the guest.
func (s *service) followCurl(v *vm, socket string) {
	s.t.Helper()
	image := filepath.Join(s.moved("/var/lib/vmm/guests"), "more.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.give(image, s.user(), s.id(s.value("Group")), 0o600)
	_, block, _ := strings.Cut(documented(s.t, "docs/api.md"), "## With curl\n")
	block, _, _ = strings.Cut(block, "\nNames are")
	wants := []struct{ command, answer string }{
		{"/Status", `"name":"web1","state":"running"`},
		{"/Pause", `^\{\}$`},
		{"/Resume", `^\{\}$`},
		{"/Luns", `"id":"data".*"holder_key":"` + guestKey + `".*"own":true`},
		{"/AttachLun", `"id":"more".*"target":3`},
		{"/DetachLun", `^\{"left":\[\]\}$`},
		{"/Version", `"go":"go1`},
		{"/events", `"state":"running"(?s:.*)"state":"ended"`},
		{"/metrics", `^vmm_lun_requests_total\{lun="data",operation="read",queue="0"\} [1-9](?s:.*)` +
			`^vmm_lun_requests_total\{lun="data",operation="write",queue="0"\} [1-9]`},
		{"/console?no_follow", `guest: ready`},
		{"/ConsoleInput", `^\{\}$`},
		{"/Stop", `^\{"forced":false\}$`},
	}
	settings, ran := "", 0
	var follows []func()
	for line := range strings.Lines(block) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "S="):
			line = "S=" + socket
			fallthrough
		case strings.HasPrefix(line, "A="):
			settings += line + "\n"
			continue
		case !strings.HasPrefix(line, "curl "):
			continue
		}
		if ran == len(wants) || !strings.Contains(line, wants[ran].command) {
			s.t.Fatalf("docs/api.md: %s; this test knows what commands %d answer, and not that one", line, ran)
		}
		want := wants[ran].answer
		ran++
		c := s.command("sh", "-c", settings+strings.ReplaceAll(line, "/disks/more.img", image))
		out := guest.NewOutput()
		c.Stdout, c.Stderr = out, out
		if err := c.Start(); err != nil {
			s.t.Fatal(err)
		}
		ends := func() {
			if err := c.Wait(); err != nil || !regexp.MustCompile("(?m)"+want).MatchString(out.String()) {
				s.t.Errorf("docs/api.md: %s: %v\n%s\nwant %s", line, err, out, want)
			}
		}
		if strings.Contains(line, "curl -sN") { // until the guest ends
			if err := out.Wait(v.t.Context(), v.exited, func(text string) bool { return text != "" }); err != nil {
				s.t.Errorf("docs/api.md: %s: %v", line, err)
			}
			follows = append(follows, ends)
			continue
		}
		ends()
	}
	for _, ends := range follows {
		ends()
	}
	if ran != len(wants) {
		s.t.Errorf("docs/api.md has %d curl commands; want the %d that this test knows", ran, len(wants))
	}
}
