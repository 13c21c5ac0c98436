// Command vmm runs virtual machines. Each subcommand has a file of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// Exit statuses.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// usageError is a mistake in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// exitError ends a command with that status when it has said why already.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// errSilent is the commonest of them.
var errSilent error = exitError(exitFailed)

// newRoot is the tree of commands.
func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "vmm",
		Short: "A KVM virtual-machine monitor with real SCSI LUNs",
		Long: `vmm boots stock Linux guests under KVM, gives them real SCSI logical units through
virtio-scsi, and moves running guests to another host together with their SCSI
reservations.`,
		Example: `  vmm run web1 --kernel vmlinuz --initrd initrd.img --lun path=/dev/sg2
  vmm ls
  vmm stop web1`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(newRunCommand(), newReceiveCommand(), newMigrateCommand(), newSaveCommand(), newLsCommand(), newStatusCommand(), newPauseCommand(), newResumeCommand(), newStopCommand(), newConsoleCommand(), newLunCommand(), newPRCommand(),
		newDoctorCommand(), newManCommand(), newVersionCommand())
	completeFlags(root)
	return root
}

// run is the whole program but for the process: it returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	parsed := false // from here on an error is none of usage, unless it says so
	root := newRoot()
	root.PersistentPreRun = func(*cobra.Command, []string) { parsed = true }
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)

	err := root.ExecuteContext(ctx)
	var (
		usage  usageError
		silent exitError
	)
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &silent):
		return int(silent)
	case !parsed || errors.As(err, &usage):
		fmt.Fprintf(stderr, "vmm: %s (see vmm --help)\n", oneLine(err))
		return exitUsage
	}
	fmt.Fprintf(stderr, "vmm: %s\n", oneLine(err))
	return exitFailed
}

// oneLine is an error's text on one line, whatever a library put into it.
func oneLine(err error) string {
	return strings.Join(strings.Fields(err.Error()), " ")
}
