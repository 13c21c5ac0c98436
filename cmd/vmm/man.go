package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIR",
		Short: "Write the manual pages into a directory",
		Long: `Writes a page of section 1 for vmm and for each of its commands into DIR, which is
made. They are what --help says, so they belong to this very version.`,
		Example: "  vmm man /usr/local/share/man/man1",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{errors.New("man wants a directory, as in: vmm man /usr/local/share/man/man1")}
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			for _, page := range visible(c.Root()) {
				if err := os.WriteFile(filepath.Join(args[0], manName(page)+".1"), manPage(page, buildTime()), 0o644); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// buildTime is the date on the pages: today, or what a reproducible build
// wants.
func buildTime() time.Time {
	if s, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		return time.Unix(s, 0).UTC()
	}
	return time.Now()
}

// visible is c with all commands below it that a user sees, but for those that
// cobra makes.
func visible(c *cobra.Command) (list []*cobra.Command) {
	list = append(list, c)
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" && sub.Name() != "completion" {
			list = append(list, visible(sub)...)
		}
	}
	return list
}

func manName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// manPage is a command's page, in the macros of man(7).
func manPage(c *cobra.Command, date time.Time) []byte {
	var b bytes.Buffer
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line(".TH %s 1 %s %q %q", roff(strings.ToUpper(manName(c))), date.Format(time.DateOnly), "vmm "+version, "vmm")
	line(".SH NAME\n%s \\- %s", roff(manName(c)), roff(c.Short))
	line(".SH SYNOPSIS")
	name, arguments, _ := strings.Cut(c.UseLine(), c.CommandPath())
	line("\\fB%s\\fR%s%s", roff(c.CommandPath()), name, roff(arguments))
	line(".SH DESCRIPTION")
	manText(&b, c.Long)
	if flags := c.NonInheritedFlags(); flags.HasAvailableFlags() {
		line(".SH OPTIONS")
		flags.VisitAll(func(f *pflag.Flag) {
			value, usage := pflag.UnquoteUsage(f)
			option := "\\fB\\-\\-" + roff(f.Name) + "\\fR"
			if f.Shorthand != "" {
				option = "\\fB\\-" + f.Shorthand + "\\fR, " + option
			}
			if value != "" {
				option += " \\fI" + roff(value) + "\\fR"
			}
			switch f.DefValue {
			case "", "0", "0s", "[]", "false":
			default:
				usage += " (default " + f.DefValue + ")"
			}
			line(".TP\n%s\n%s", option, roff(usage))
		})
	}
	if c.HasAvailableSubCommands() {
		line(".SH COMMANDS")
		for _, sub := range visible(c)[1:] {
			if sub.Runnable() {
				line(".TP\n\\fB%s\\fR\n%s", roff(sub.CommandPath()), roff(sub.Short))
			}
		}
	}
	if !c.HasParent() {
		line(".SH EXIT STATUS\n0 when it is done, 1 when it failed, 2 for a mistake in the command line.")
		line(".SH ENVIRONMENT\n.TP\n\\fBVMM_RUN_DIR\\fR\n%s", roff("where locks and sockets of running guests are; default: /run/vmm for root, else vmm in $XDG_RUNTIME_DIR"))
		line(".TP\n\\fBVMM_STATE_DIR\\fR\n%s", roff("where the journal of migrations is; default: /var/lib/vmm for root, else vmm in $XDG_STATE_HOME"))
	}
	line(".SH EXAMPLES\n.EX\n%s\n.EE", roff(c.Example))
	line(".SH SEE ALSO")
	var also []string
	if c.HasParent() {
		also = append(also, manName(c.Parent()))
	}
	for _, sub := range visible(c)[1:] {
		also = append(also, manName(sub))
	}
	for i, name := range also {
		end := ","
		if i == len(also)-1 {
			end = ""
		}
		line(".BR %s (1)%s", roff(name), end)
	}
	return b.Bytes()
}

// manText writes paragraphs.
func manText(b *bytes.Buffer, text string) {
	for i, paragraph := range strings.Split(text, "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		b.WriteString(roff(paragraph) + "\n")
	}
}

// roff is a text that troff sets as it stands.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'").Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		return `\&` + s
	}
	return s
}
