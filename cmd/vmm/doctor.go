package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"vmm/doctor"
	"vmm/migration"
)

type doctorFlags struct {
	format   outputFormat
	tls      tlsFlags
	peer     string
	peerName string
}

func newDoctorCommand() *cobra.Command {
	var f doctorFlags
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Say whether this host can run guests, and what to mend",
		Long: `Looks at what vmm needs of this host, one line each: ok, warn or fail, and how
to mend it. It changes nothing, and asks SCSI disks only what their reservations
are; a disk that a guest has is asked through that guest's process. Where there are TLS
files, in --tls-dir, else in ~/.config/vmm/tls, else in /etc/vmm/tls, it looks at the
certificate, its key and its authority as well.

--peer asks another host, on which vmm receive waits, whether guests of this one
could migrate there: versions, processors, and for each SCSI disk whether the
other host sees it. The vmm receive waits on.

The exit status is 0 when nothing failed, else 1.`,
		Example: `  vmm doctor
  vmm doctor -o json
  vmm doctor --peer tcp://host2:4444`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c) },
	}
	f.format.addFlag(c)
	f.tls.addFlags(c)
	c.Flags().StringVar(&f.peer, "peer", "", "address of another host's vmm receive, to compare the two")
	c.Flags().StringVar(&f.peerName, "peer-name", "", "name that the other host's certificate must have, if not the address's host")
	return c
}

func (f *doctorFlags) run(c *cobra.Command) error {
	var address migration.Address
	if f.peer != "" {
		var err error
		if address, err = migration.ParseAddress(f.peer); err != nil {
			return usageError{fmt.Errorf("--peer: %w", err)}
		}
	} else if f.peerName != "" {
		return usageError{errors.New("--peer-name: give the other host's address with --peer")}
	}
	f.tls.settle(c, address) // without a peer: the files that the next one needs
	report := doctor.Examine(c.Context(), doctor.Options{TLSDir: f.tls.dir})
	if f.peer != "" {
		security, _ := f.tls.security() // its error is a finding already
		report.Compare(doctor.Peer(c.Context(), address, security, f.peerName))
	}
	if err := printReport(c.OutOrStdout(), f.format, report); err != nil {
		return err
	}
	if !report.Healthy() {
		return errSilent
	}
	return nil
}

func printReport(out io.Writer, format outputFormat, r *doctor.Report) error {
	if format.json() {
		return printJSON(out, r)
	}
	const detail, mend = 24, 26 // columns where they begin
	width := cellsOf(out)
	for _, f := range r.Findings {
		verdict := fmt.Sprintf("%-4s", f.Verdict)
		if width > 0 && os.Getenv("NO_COLOR") == "" { // https://no-color.org
			verdict = colors[f.Verdict] + verdict + "\x1b[m"
		}
		if _, err := fmt.Fprintf(out, "%s  %-16s  %s\n", verdict, f.Name, folded(f.Detail, width, detail)); err != nil {
			return err
		}
		if f.Mend != "" {
			if _, err := fmt.Fprintf(out, "%*s%s\n", mend, "", folded(f.Mend, width, mend)); err != nil {
				return err
			}
		}
	}
	return nil
}

// colors begin the colour of a verdict on a terminal.
var colors = map[doctor.Verdict]string{doctor.OK: "\x1b[32m", doctor.Warn: "\x1b[33m", doctor.Fail: "\x1b[1;31m"}
