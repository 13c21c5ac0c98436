package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"vmm/machine"
	"vmm/migration"
	"vmm/tests/pages"
)

// words splits a command line as a shell does, as far as examples need it:
// quotes, escapes and a comment at the end. It ends at a pipe or a redirection.
func words(line string) (list []string, err error) {
	var word strings.Builder
	var quote rune
	in, escaped := false, false
	end := func() {
		if in {
			list = append(list, word.String())
			word.Reset()
			in = false
		}
	}
	for _, r := range line {
		switch {
		case escaped:
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			in, escaped = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '"' || r == '\'':
			in, quote = true, r
		case r == ' ' || r == '\t':
			end()
		case r == '|' || r == '>' || r == '<' || r == ';' || r == '&' || r == '#' && !in:
			end()
			return list, nil
		default:
			in = true
			word.WriteRune(r)
		}
	}
	end()
	if quote != 0 || escaped {
		return nil, fmt.Errorf("%s: a quote without its end", line)
	}
	return list, nil
}

// understood says why the program would refuse a command line as a mistake of
// usage, without running anything: the command, its flags, how many
// arguments, and what the values must look like. With mention only what is
// there is checked: "vmm run --lun" names a flag, and asks nothing.
func understood(line string, mention bool) error {
	args, err := words(line)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return errors.New("an empty line")
	}
	root := newRoot()
	root.InitDefaultCompletionCmd("vmm")
	root.InitDefaultHelpCmd()
	c, rest, err := root.Find(args[1:])
	if err != nil {
		return fmt.Errorf("%s: %w", line, err)
	}
	c.InitDefaultHelpFlag()
	fail := func(err error) error { return fmt.Errorf("%s: %w", line, err) }
	if mention {
		for _, w := range rest {
			if name, ok := strings.CutPrefix(w, "--"); ok {
				name, _, _ = strings.Cut(name, "=")
				if c.Flag(name) == nil {
					return fail(fmt.Errorf("no flag --%s", name))
				}
			}
		}
		if len(args) > 1 && c == root && !strings.HasPrefix(args[1], "-") {
			return fail(errors.New("no such command"))
		}
		return nil
	}
	if err := c.ParseFlags(rest); err != nil {
		return fail(err)
	}
	if help, _ := c.Flags().GetBool("help"); help {
		return nil
	}
	if !c.Runnable() {
		return fail(errors.New("says nothing to do"))
	}
	if err := c.ValidateArgs(c.Flags().Args()); err != nil {
		return fail(err)
	}
	return values(c)
}

// values checks what flags are given, where a command does so only when it
// runs.
func values(c *cobra.Command) error {
	luns, _ := c.Flags().GetStringArray("lun")
	if c.CommandPath() == "vmm lun attach" {
		luns = append(luns, c.Flags().Arg(1))
	}
	for _, l := range luns {
		if _, err := machine.ParseLUN(l); err != nil {
			return err
		}
	}
	for _, flag := range []string{"memory", "max-bandwidth", "scrollback"} {
		if size, err := c.Flags().GetString(flag); err == nil {
			if _, err := machine.ParseSize(size); err != nil {
				return err
			}
		}
	}
	var addresses []string
	switch c.Name() {
	case "receive":
		addresses = append(addresses, c.Flag("listen").Value.String())
	case "migrate":
		if cancel, _ := c.Flags().GetBool("cancel"); !cancel {
			addresses = append(addresses, c.Flags().Arg(1))
		}
	case "doctor":
		if peer := c.Flag("peer").Value.String(); peer != "" {
			addresses = append(addresses, peer)
		}
	}
	for _, a := range addresses {
		if _, err := migration.ParseAddress(a); err != nil {
			return err
		}
	}
	return nil
}

// Each command says in its help what it does, with examples that the program
// understands; and each prints JSON that a golden file has.
func TestEachCommandHelps(t *testing.T) {
	golden := goldens(t)
	commands := visible(newRoot())
	if len(commands) < 14 {
		t.Errorf("%d commands; the test looks in the wrong place", len(commands))
	}
	for _, c := range commands {
		path := c.CommandPath()
		if c.Short == "" || c.Long == "" || c.Example == "" {
			t.Errorf("%s: short %q, long %q, example %q; want all three", path, c.Short, c.Long, c.Example)
		}
		if strings.HasSuffix(c.Short, ".") || len(c.Short) > 70 {
			t.Errorf("%s: short help %q; want 70 letters at most, no full stop", path, c.Short)
		}
		own := false
		for _, line := range pages.Joined(c.Example) {
			if err := understood(strings.TrimSpace(line), false); err != nil {
				t.Errorf("%s: example: %v", path, err)
			}
			own = own || strings.HasPrefix(strings.TrimSpace(line)+" ", path+" ")
		}
		if !own {
			t.Errorf("%s: no example of its own in %q", path, c.Example)
		}
		for _, line := range strings.Split(c.Long+"\n"+c.Example, "\n") {
			if len(line) > 100 {
				t.Errorf("%s: a line of %d letters in its help: %q", path, len(line), line)
			}
		}
		if c.Flag("output") != nil && golden[path] == "" {
			t.Errorf("%s -o json: no golden file: let a script compare it with cmpjson", path)
		}
		if c.Flag("output") == nil && c.Runnable() && !printsNoState[path] {
			t.Errorf("%s: prints what a script may want, without -o json", path)
		}
	}
}

// Each command is run by a script, once well and once badly.
func TestEachCommandIsScripted(t *testing.T) {
	// What doctor says, and its status, are the host's: TestDoctorReport.
	well, badly := map[string]bool{"vmm doctor": true}, map[string]bool{}
	call := regexp.MustCompile(`^(!|status [12]|status 0|exec|)\s*(vmm [a-z].*)$`)
	for _, line := range scriptLines(t) {
		m := call.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		args, err := words(m[2])
		if err != nil {
			t.Fatal(err)
		}
		c, _, _ := newRoot().Find(args[1:]) // an error is that of a command that is not there
		if m[1] == "!" || m[1] == "status 1" || m[1] == "status 2" {
			badly[c.CommandPath()] = true
		} else {
			well[c.CommandPath()] = true
		}
	}
	for _, c := range visible(newRoot()) {
		path := c.CommandPath()
		if !badly[path] || !well[path] && c.Runnable() && !c.HasSubCommands() {
			t.Errorf("%s: run well by a script: %v, and badly: %v; want both", path, well[path], badly[path])
		}
	}
}

// printsNoState are the commands that have no result but the guest's own.
var printsNoState = map[string]bool{"vmm run": true, "vmm receive": true, "vmm console": true, "vmm man": true, "vmm pr": true, "vmm lun": true}

// goldens says which golden file has a command's JSON: from the scripts, where
// cmpjson follows the command, and from tests in Go.
func goldens(t *testing.T) map[string]string {
	t.Helper()
	golden := map[string]string{"vmm doctor": "doctor.json", "vmm migrate": "migrate.json", "vmm save": "save.json"} // TestDoctorReport, TestMigrationReport, TestSaveReport
	last := ""
	for _, line := range scriptLines(t) {
		args, _ := words(line)
		switch {
		case len(args) > 1 && args[0] == "vmm" && strings.Contains(line, "-o json"):
			if c, _, err := newRoot().Find(args[1:]); err == nil {
				last = c.CommandPath()
			}
		case len(args) == 2 && args[0] == "cmpjson":
			golden[last] = args[1]
		}
	}
	for command, file := range golden {
		if _, err := os.Stat(filepath.Join("testdata", file)); err != nil {
			t.Errorf("%s: %v", command, err)
		}
	}
	return golden
}

// scriptLines are those of all scripts.
func scriptLines(t *testing.T) (lines []string) {
	t.Helper()
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("scripts: %v, %v", scripts, err)
	}
	for _, script := range scripts {
		text, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

func TestUnderstood(t *testing.T) {
	for line, want := range map[string]string{
		`vmm ls`:                                 "",
		`vmm ls | grep web`:                      "",
		`vmm pr show web1 -o json # all of them`: "",
		`vmm run web1 --kernel k --cmdline "console=ttyS0 root=/dev/sda1"`: "",
		`vmm completion bash`:                "",
		`vmm run --help`:                     "",
		`vmm frob`:                           "unknown command",
		`vmm ls web1`:                        "unknown command",
		`vmm run web1 --kernal k`:            "unknown flag",
		`vmm run web1 --kernel k --lun id=a`: "path=PATH is missing",
		`vmm stop`:                           "wants the name of one guest",
		`vmm migrate web1 nowhere`:           "want tcp://",
		`vmm run "web1`:                      "a quote without its end",
	} {
		if err := understood(line, false); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("understood(%s) = %v; want %q", line, err, want)
		}
	}
	for line, ok := range map[string]bool{`vmm run`: true, `vmm run --config`: true, `vmm run --kernal`: false, `vmm frob`: false, `vmm --help`: true} {
		if err := understood(line, true); (err == nil) != ok {
			t.Errorf("understood(%s), a mention = %v; want it understood: %v", line, err, ok)
		}
	}
}

// needTool finds a program or skips the test; where make has installed the
// tools a skip is a failure.
func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("VMM_TEST_REQUIRE_TOOLS") == "1" {
		t.Fatal(err)
	}
	t.Skip(err)
	return ""
}
