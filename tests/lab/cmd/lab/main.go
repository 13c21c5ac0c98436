// Lab starts hosts with nested KVM under QEMU's emulator and runs commands in
// them.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"vmm/tests/guest"
	"vmm/tests/lab"
	"vmm/tests/lab/agent"
	"vmm/tests/lab/kernel"
)

func main() {
	// SIGTERM, SIGINT and SIGHUP end the hosts, then this program. (Should it
	// be killed, the kernel ends them.)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	err := command().ExecuteContext(ctx)
	if err == nil {
		return
	}
	if e, ok := errors.AsType[*agent.ExitError](err); ok {
		if e.Status.Signaled() {
			os.Exit(128 + int(e.Status.Signal())) // as a shell has it
		}
		os.Exit(e.ExitCode())
	}
	fmt.Fprintln(os.Stderr, "lab:", strings.TrimPrefix(err.Error(), "lab: "))
	os.Exit(1)
}

type options struct {
	memory   string
	cpus     int
	programs []string
	share    string
	hostRoot bool
	deadline time.Duration
	env      []string
	dir      string
	cmdline  string
	verbose  bool
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "lab",
		Short:         "Hosts with nested KVM, from this machine's packages",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	var o options
	hostFlags := func(c *cobra.Command) {
		f := c.Flags()
		f.StringVar(&o.memory, "memory", "4G", "the host's memory")
		f.IntVar(&o.cpus, "cpus", 1, "the host's processors; under more than one a guest now and then ends in a triple fault")
		f.StringVar(&o.share, "share", "", "directory of this machine that the host has as /share, writable")
		f.StringArrayVar(&o.programs, "program", nil, "file of the shared directory that the host has in its memory (repeatable)")
		f.BoolVar(&o.hostRoot, "host-root", false, "give the host this machine's / read-only as /outer; \"outer PROGRAM\" runs a program of it")
		f.StringArrayVar(&o.env, "env", nil, "K=V for the command's environment")
		f.StringVar(&o.dir, "dir", "", "the command's working directory")
		f.StringVar(&o.cmdline, "cmdline", "", "more parameters for the host's kernel")
		f.BoolVarP(&o.verbose, "verbose", "v", false, "show the host's console on standard error")
	}

	run := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARGUMENT...]",
		Short: "Run a command in a fresh host; its exit status becomes this program's",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return o.run(c.Context(), args, false)
		},
	}
	hostFlags(run)
	run.Flags().DurationVar(&o.deadline, "deadline", 10*time.Minute, "end the host after this time; 0: never")
	run.Flags().SetInterspersed(false)

	shell := &cobra.Command{
		Use:   "shell [flags] [COMMAND [ARGUMENT...]]",
		Short: "A shell, or another command, on a terminal in a fresh host",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{"sh", "-l"}
			}
			o.deadline = 0 // run's default: a person takes the time that it takes
			return o.run(c.Context(), args, true)
		},
	}
	hostFlags(shell)
	shell.Flags().SetInterspersed(false)

	fetch := &cobra.Command{
		Use:   "fetch",
		Short: "Fetch the kernels and build the images of the host and of the test guests",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			for _, flavour := range kernel.Flavours {
				k, err := kernel.Find(c.Context(), flavour)
				if err != nil {
					return err
				}
				if flavour == kernel.Generic {
					for _, initiator := range []bool{false, true} {
						if _, err := lab.Image(c.Context(), k, initiator); err != nil {
							return err
						}
					}
				}
				if _, err := guest.Initrd(c.Context(), k); err != nil {
					return err
				}
			}
			return nil
		},
	}
	kernels := &cobra.Command{
		Use:   "kernels",
		Short: "Print where the kernels are: flavour, release, bzImage, vmlinux, modules, the test guest's initramfs",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			for _, flavour := range kernel.Flavours {
				k, err := kernel.Find(c.Context(), flavour)
				if err != nil {
					return err
				}
				initrd, err := guest.Initrd(c.Context(), k)
				if err != nil {
					return err
				}
				fmt.Println(strings.Join([]string{string(k.Flavour), k.Release, k.BzImage, k.VMLinux, k.Modules, initrd}, "\t"))
			}
			return nil
		},
	}
	root.AddCommand(run, shell, fetch, kernels)
	return root
}

// run starts a host and runs a command in it.
func (o *options) run(ctx context.Context, args []string, interactive bool) (err error) {
	if o.deadline > 0 {
		var cancel func()
		ctx, cancel = context.WithTimeoutCause(ctx, o.deadline, fmt.Errorf("the deadline of %v has passed", o.deadline))
		defer cancel()
	}
	memory, err := parseSize(o.memory)
	if err != nil {
		return err
	}
	cfg := lab.Config{Memory: memory, CPUs: o.cpus, Share: o.share, Programs: o.programs, HostRoot: o.hostRoot, Cmdline: o.cmdline}
	if o.verbose {
		cfg.Console = os.Stderr
	}
	if interactive && !term.IsTerminal(int(os.Stdin.Fd())) {
		return errors.New("standard input is not a terminal; lab run needs none")
	}
	start := time.Now()
	if interactive {
		fmt.Fprintln(os.Stderr, "lab: starting a host ...")
	}
	host, err := lab.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() {
		if ctx.Err() != nil {
			host.Kill()
			err = errors.Join(err, host.Trouble())
			return
		}
		if err2 := host.Close(); err2 != nil {
			fmt.Fprintln(os.Stderr, err2)
			if err == nil {
				err = errors.New("the command succeeded, but the host's kernel was in trouble")
			}
		}
	}()
	if interactive {
		fmt.Fprintf(os.Stderr, "lab: host is up after %.1f s; it ends with this shell\n", time.Since(start).Seconds())
	}

	cmd := host.Command(ctx, args[0], args[1:]...)
	cmd.Env, cmd.Dir = o.env, o.dir
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if !interactive {
		return cmd.Run()
	}
	return onTerminal(cmd)
}

// onTerminal runs a command on a terminal of its own, of which this program's
// terminal is the face.
func onTerminal(cmd *agent.Cmd) error {
	fd := int(os.Stdin.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return err
	}
	defer term.Restore(fd, old)
	size := func() agent.Size {
		cols, rows, err := term.GetSize(fd)
		if err != nil {
			return agent.Size{Rows: 24, Cols: 80}
		}
		return agent.Size{Rows: uint16(rows), Cols: uint16(cols)}
	}
	now := size()
	cmd.PTY, cmd.Stdin = &now, os.Stdin
	if name := os.Getenv("TERM"); name != "" {
		cmd.Env = append(cmd.Env, "TERM="+name)
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case <-changed:
				cmd.Resize(size())
			case <-ended:
				return
			}
		}
	}()
	return cmd.Wait()
}

// parseSize parses a memory size: a number with the suffix M or G, or of
// bytes.
func parseSize(s string) (int64, error) {
	number, unit := s, int64(1)
	if n := len(s) - 1; n > 0 {
		switch s[n] {
		case 'M', 'm':
			number, unit = s[:n], 1<<20
		case 'G', 'g':
			number, unit = s[:n], 1<<30
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n <= 0 || n > (1<<62)/unit || n*unit < 256<<20 {
		return 0, fmt.Errorf("--memory %s: want a size of at least 256M, such as 4G", s)
	}
	return n * unit, nil
}
