package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	layout "vmm/boot"
	"vmm/boot/boottest"
	"vmm/device"
	"vmm/migration"
	"vmm/tests/guest"
	"vmm/tests/lab/agent"
	"vmm/tests/pages"
)

// polite is a guest that prints an exclamation mark, waits for its power
// button and then powers off.
var polite = []byte{
	0x66, 0xba, 0xf8, 0x03, 0xb0, '!', 0xee, // mov dx, COM1; mov al, '!'; out dx, al
	0x66, 0xba, layout.PortPM & 0xff, layout.PortPM >> 8, // mov dx, PM1 status
	0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9, // in ax, dx; test ah, power button; jz back to the in
	0x66, 0xba, (layout.PortPM + device.PMControl) & 0xff, (layout.PortPM + device.PMControl) >> 8, // mov dx, PM1 control
	0x66, 0xb8, 0, device.SleepTypeS5<<2 | 1<<5, 0x66, 0xef, // mov ax, S5 and SLP_EN; out dx, ax
	0xeb, 0xfe, // jmp .
}

// place is one of the hosts that the pages speak of.
type place struct {
	hostname string // empty: this host's
	env      []string
}

var (
	host1 = place{}
	// host2 is the same machine, with another name and directories of its own.
	host2 = place{"host2", []string{"VMM_RUN_DIR=/run/vmm2", "VMM_STATE_DIR=/var/lib/vmm2"}}
	// guests is host1 with the directories of the systemd units.
	guests = place{"", []string{"VMM_RUN_DIR=/run/vmm/guests", "VMM_STATE_DIR=/var/lib/vmm/guests"}}
)

// What commands print.
const (
	up       = "!" // the guest
	waits    = "waiting for a guest at"
	moves    = `^web1 runs at `
	examined = `^ok +kvm`
)

// reader does what the documentation says, page by page and command by
// command, as it stands there. None can be left out.
type reader struct {
	t         *testing.T
	dir       string // where the reader stands: in a checkout, with files for a guest
	pages     map[string]pages.Page
	differs   *strings.Replacer // what has another name here
	page      string
	commands  []string // of the page, that are still to come
	variables string   // that the page has set
}

var noCommand = regexp.MustCompile(`^[A-Z](: | (takes|gives|runs|undoes|journals))|^(.*  )?invariant \d: |^\{|^blacklist \{`)

// open turns to a page; the one before has been read to its end.
func (r *reader) open(page string) {
	r.t.Helper()
	r.close()
	r.page, r.variables = page, ""
	for _, line := range r.pages[page].Lines {
		// Traces of the search, JSON and configuration are in code blocks too.
		if line = strings.TrimSpace(line); line != "" && !noCommand.MatchString(line) {
			r.commands = append(r.commands, line)
		}
	}
	if len(r.commands) == 0 {
		r.t.Fatalf("%s has no commands: the test does not see them", page)
	}
	delete(r.pages, page)
}

// close is at the end of a page.
func (r *reader) close() {
	r.t.Helper()
	if len(r.commands) > 0 {
		r.t.Fatalf("%s: these commands are run by no test:\n%s", r.page, strings.Join(r.commands, "\n"))
	}
}

// next is the page's next command, which begins with these words.
func (r *reader) next(words string) string {
	r.t.Helper()
	if len(r.commands) == 0 || !strings.HasPrefix(r.commands[0], words) {
		r.t.Fatalf("%s goes on with %q; this test has %q there", r.page, r.commands[:min(1, len(r.commands))], words)
	}
	line := r.commands[0]
	r.commands = r.commands[1:]
	return line
}

// elsewhere are commands that this host cannot run, and the reason, or who
// runs them.
func (r *reader) elsewhere(reason string, commands ...string) {
	r.t.Helper()
	for _, words := range commands {
		r.t.Logf("%s: %s: not here: %s", r.page, r.next(words), reason)
	}
}

// sets is a command that sets a variable for those behind it.
func (r *reader) sets(words string) {
	r.t.Helper()
	r.variables += r.next(words) + "\n"
}

// shell is a shell at a host that is to run a line.
func (r *reader) shell(at place, line string) *exec.Cmd {
	script, attr := r.variables+r.differs.Replace(line), new(syscall.SysProcAttr)
	if at.hostname != "" {
		script, attr.Cloneflags = "hostname "+at.hostname+"\n"+script, syscall.CLONE_NEWUTS
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = r.dir
	cmd.Env = append(os.Environ(), at.env...)
	cmd.SysProcAttr = attr
	return cmd
}

// does runs the next command, which succeeds and prints what want matches.
func (r *reader) does(at place, words, want string) {
	r.t.Helper()
	r.succeeds(at, r.next(words), want)
}

func (r *reader) succeeds(at place, line, want string) {
	r.t.Helper()
	cmd := r.shell(at, line)
	overdue := time.AfterFunc(bootTimeout, func() { cmd.Process.Kill() })
	defer overdue.Stop()
	out, err := cmd.CombinedOutput()
	if err != nil || !regexp.MustCompile("(?m)"+want).Match(out) {
		r.t.Fatalf("%s: %s: %v\n%s\nwant %s", r.page, line, err, out, want)
	}
}

// answers runs the next command on a terminal, on which it asks and gets an
// answer.
func (r *reader) answers(words, question, answer, want string) {
	r.t.Helper()
	line := r.next(words)
	master, slave, err := agent.OpenPTY()
	if err != nil {
		r.t.Fatal(err)
	}
	defer master.Close()
	cmd, out := r.shell(host1, line), guest.NewOutput()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, out, out
	if err := errors.Join(cmd.Start(), slave.Close()); err != nil {
		r.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { err = cmd.Wait(); close(ended) }()
	if err := out.Wait(r.t.Context(), ended, func(s string) bool { return strings.Contains(s, question) }); err != nil {
		r.t.Fatalf("%s: %s: %v", r.page, line, err)
	}
	if _, err := master.WriteString(answer); err != nil {
		r.t.Fatal(err)
	}
	<-ended
	if err != nil || !regexp.MustCompile("(?m)"+want).MatchString(out.String()) {
		r.t.Fatalf("%s: %s: %v\n%s\nwant %s", r.page, line, err, out, want)
	}
}

// stays starts the next command, which goes on after it has printed sign.
func (r *reader) stays(at place, words, sign string) (v *vm, line string) {
	r.t.Helper()
	line = r.next(words)
	return r.starts(at, line, sign), line
}

func (r *reader) starts(at place, line, sign string) *vm {
	r.t.Helper()
	v := supervise(r.t, r.shell(at, "exec "+strings.TrimSuffix(line, " &")))
	out := v.console
	if sign != up {
		out = v.stderr
	}
	if err := out.Wait(r.t.Context(), v.exited, func(s string) bool { return strings.Contains(s, sign) }); err != nil {
		r.t.Fatalf("%s: %s: %v", r.page, line, err)
	}
	return v
}

// ends waits for the end of what stays, which is a good one.
func (r *reader) ends(v *vm) {
	r.t.Helper()
	if status := v.wait(); status != 0 {
		r.t.Errorf("%s: %s ends with %d: %s", r.page, v.cmd, status, v.stderr)
	}
}

// off presses a guest's power button, as a signal does.
func (r *reader) off(v *vm) {
	r.t.Helper()
	v.cmd.Process.Signal(syscall.SIGTERM)
	r.ends(v)
}

// certify makes a TLS directory for a host of this name.
func certify(dir string, names ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: names, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	return errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, migration.FileCA), public, 0o644),
		os.WriteFile(filepath.Join(dir, migration.FileCert), public, 0o644),
		os.WriteFile(filepath.Join(dir, migration.FileKey), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
}

// Every command in a code block of the README and of the pages is run, in their
// order, as somebody would who has the host to himself; so that is a host of the
// lab. Commands within sentences TestDocumentedCommands looks at. What
// belongs to another program than vmm, and is not there, is named with its
// reason. The guest is one of a few instructions.
func TestDocs(t *testing.T) {
	if os.Getenv("VMM_TEST_EMULATED") == "" {
		t.Skip("the pages install programs and certificates: not on a host that somebody uses")
	}
	needProgram(t, "install")
	lun := needLIO(t, "docs", 64<<20, 2)
	all, err := pages.Read(stage)
	if err != nil {
		t.Fatal(err)
	}
	r := &reader{t: t, dir: t.TempDir(), pages: map[string]pages.Page{}, differs: strings.NewReplacer("/dev/sg2", lun.Nexuses[0].SG)}
	for _, p := range all {
		r.pages[p.Path] = p
	}
	t.Cleanup(func() {
		exec.Command("sh", "-c", "vmm stop web1 --force; vmm stop web2 --force; rm -rf /etc/vmm /usr/local/bin/vmm /usr/local/sbin/sudo /usr/local/share/man /etc/systemd /boot/vmlinuz-* /boot/initrd.img-*").Run()
	})
	// A host that has a Debian kernel, a checkout and images; sudo is for somebody
	// who is not root.
	kernel := local(t, "uname -r")
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	write("/usr/local/sbin/sudo", "#!/bin/sh\n[ \"$1\" != -u ] || shift 2\nexec env \"$@\"\n")
	for _, version := range []string{kernel, "6.1.0-50-amd64"} {
		write("/boot/initrd.img-"+version, "initrd")
		if err := boottest.WriteKernel("/boot/vmlinuz-"+version, polite); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(r.dir, "initrd.img"), "initrd")
	write(filepath.Join(r.dir, "root.img"), strings.Repeat("\x00", 1<<20))
	write(filepath.Join(r.dir, "shared.img"), strings.Repeat("\x00", 1<<20))
	r.succeeds(host1, "mkdir -p .build /usr/local/bin /etc/systemd/system /etc/sysusers.d /etc/udev/rules.d && cp /boot/vmlinuz-"+kernel+" vmlinuz && "+
		"cp "+filepath.Join(stage, "vmm")+" .build/vmm && cp -r "+filepath.Join(stage, "contrib")+" . && cp "+filepath.Join(stage, "docs/examples/web1.yaml")+" . && "+
		"ip link set lo up && echo 127.0.0.1 host2 host2.example.org >>/etc/hosts", "")
	if err := certify("/etc/vmm/tls", "host2", "host2.example.org"); err != nil {
		t.Fatal(err)
	}

	r.open("docs/quickstart.md")
	r.elsewhere("it has brought what is installed next", "make build")
	r.does(host1, "sudo install -m 755 .build/vmm", "")
	r.does(host1, "sudo vmm man", "")
	r.succeeds(host1, "cat /usr/local/share/man/man1/vmm-run.1", `^\.SH `)
	r.does(host1, "vmm doctor", examined)
	r.sets("KERNEL=")
	v, _ := r.stays(host1, "vmm run first ", up)
	r.off(v)
	v, web1 := r.stays(host1, "vmm run web1 ", up)
	r.off(v)
	v, _ = r.stays(host1, "vmm run --config web1.yaml", up)
	r.off(v)
	r.does(host1, "vmm run web2 --config web1.yaml", `^web2 runs in the background`)
	v, _ = r.stays(host1, "vmm console web2", up)
	r.succeeds(host1, "vmm stop web2", "")
	r.ends(v)
	for _, file := range []string{"vmm@.service", "vmm.sysusers.conf", "60-vmm.rules"} {
		r.does(host1, "sudo install -m 644 contrib/systemd/"+file, "")
	}
	r.succeeds(host1, "cat /etc/systemd/system/vmm-recover.service /etc/systemd/system/vmm@.service /etc/sysusers.d/vmm.conf /etc/udev/rules.d/60-vmm.rules", "vmm")
	r.elsewhere("TestSysusers runs it", "sudo systemd-sysusers")
	r.elsewhere("there is no udev; TestService does what the rules say", "sudo udevadm control --reload")
	r.does(host1, "sudo install -d -m 755 /etc/vmm", "")
	r.succeeds(host1, "cat /etc/vmm/web1.yaml", "^name: web1")
	r.elsewhere("there is no systemd; TestService does what the units say", "sudo systemctl daemon-reload", "sudo systemctl enable --now")
	v = r.starts(guests, web1, up)
	r.does(host1, "sudo -u vmm VMM_RUN_DIR=/run/vmm/guests vmm ls", `^web1 +running`)
	console, _ := r.stays(host1, "sudo -u vmm VMM_RUN_DIR=/run/vmm/guests vmm console", up)
	r.off(v)
	r.ends(console)
	r.elsewhere("TestDocumentedCertificates runs them", "openssl req -x509", "HOST=", "openssl req -new", "openssl x509", "chmod 600 key.pem")
	v = r.starts(host1, web1, up)
	there, _ := r.stays(host2, "vmm receive ", waits)
	r.does(host1, "vmm doctor --peer ", `^ok +peer`)
	r.does(host1, "vmm migrate web1 ", moves)
	r.ends(v)
	r.off(there)
	v = r.starts(host1, web1, up)
	r.does(host1, "sudo install -m 755 .build/vmm", "")
	r.does(host1, "vmm receive web1 --detach", "web1 waits in the background")
	r.does(host1, "vmm migrate web1 unix:///run/vmm/upgrade --local", moves)
	r.ends(v)
	r.succeeds(host1, "vmm stop web1", "")

	r.open("README.md")
	r.elsewhere("the one shows a migration, the other runs this test", "make demo", "make test")
	r.elsewhere("it has brought what is run next", "make build")
	r.does(host1, ".build/vmm doctor", examined)
	v, web1 = r.stays(host1, ".build/vmm run web1 ", up)
	r.does(host1, "vmm ls", `^web1 +running`)
	r.does(host1, "vmm status web1", `^LUN data +target 1, `)
	r.does(host1, "vmm pause web1", "web1 is paused")
	r.succeeds(host1, "vmm resume web1", "web1 is running")
	r.does(host1, "vmm pr show web1", "LUN data of guest web1")
	console, _ = r.stays(host1, "vmm console web1", up)
	r.does(host1, "vmm stop web1", "")
	r.ends(v)
	r.ends(console)
	v = r.starts(host1, web1, up)
	there, _ = r.stays(host2, "vmm receive web1 ", waits)
	r.does(host1, "vmm migrate web1 ", moves)
	r.ends(v)
	r.off(there)

	r.open("docs/migration.md")
	v = r.starts(host1, web1, up)
	there, _ = r.stays(host2, "vmm receive web1 --listen tcp:", waits)
	r.does(host1, "vmm migrate web1 tcp:", moves)
	r.ends(v)
	r.off(there)
	there = r.starts(host2, "vmm receive --listen tcp://0.0.0.0:4444", waits)
	r.does(host1, "vmm doctor --peer ", `^ok +peer`)
	there.cmd.Process.Kill()
	v = r.starts(host1, web1, up)
	there, _ = r.stays(host1, "vmm receive web1 --listen unix:", waits)
	r.does(host1, "vmm migrate web1 unix:", moves)
	r.ends(v)
	r.does(host1, "vmm save web1 web1.snap", `^web1 is in .*/web1\.snap`)
	r.ends(there)
	v, _ = r.stays(host1, "vmm run web1 --from web1.snap", "root: the guest has no registration")
	r.off(v)

	r.open("docs/reservations.md")
	r.succeeds(host1, "sg_persist -n -o -I -S 0x123abc /dev/sg2", "")
	r.answers("vmm pr unregister /dev/sg2 ", "Type yes: ", "yes\n", "")
	r.succeeds(host1, "sg_persist -n -i -k /dev/sg2", "there are NO registered reservation keys")
	r.elsewhere("make test runs it with a smaller bound", "reservations.test ")

	r.open("docs/luns.md")
	r.elsewhere("the hosts of the lab log in to their target without open-iscsi", "iscsiadm -m discovery", "iscsiadm -m node")
	r.elsewhere("another program's", "lsscsi -g")
	r.does(host1, "vmm doctor", examined)
	r.elsewhere("there is no Fibre Channel", `echo "- - -"`, "lsscsi -g -t")
	r.does(host1, "vmm doctor", examined)
	r.elsewhere("there is no multipathd", "multipath -f")
	r.does(host1, "vmm doctor", examined)

	r.open("docs/api.md")
	r.elsewhere("TestService runs them", "S=", "A=")
	for len(r.commands) > 0 {
		r.elsewhere("TestService runs them", "curl ")
	}
	r.close()
	for path, p := range r.pages {
		for _, line := range p.Lines {
			if regexp.MustCompile(`^\s*(\$ |sudo |make |(\.build/)?vmm )`).MatchString(line) {
				t.Errorf("%s: %s: this test does not read that page", path, strings.TrimSpace(line))
			}
		}
	}
}
