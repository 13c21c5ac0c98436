package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"vmm/control"
	"vmm/machine"
)

type runFlags struct {
	file                    string
	kernel, initrd, cmdline string
	cpus                    int
	memory, cpu             string
	luns                    []string
	noReboot                bool
	fromFlags
	foreground
}

func newRunCommand() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use:   "run [NAME] {--kernel FILE | --config FILE | --from FILE} [flags]",
		Short: "Boot a guest and stay with it in the foreground",
		Long: `Boots a guest and stays in the foreground: the guest's console is written to
standard output, everything else to standard error. The exit status is 0 when
the guest powers off, 1 when it fails (a kernel panic, a triple fault, an
instruction KVM cannot run), 2 for a mistake in the command line.

On a terminal, Ctrl-] q quits at once and Ctrl-] Ctrl-] types one Ctrl-].
SIGTERM, and SIGINT without a terminal, presses the guest's power button and
ends the guest by force after --stop-timeout; a second one does so at once.
While it runs, vmm ls, status, pause, resume, stop, console and pr reach it by its
name. A terminal that does not keep up with the guest's text misses some of it, which
vmm says; a file or a pipe gets all of it, and the guest's output waits for it.

With --detach the guest runs in the background: the command returns 0 when the guest
runs, or fails as it would in the foreground. vmm console has the guest's text and
keyboard; what else there is to say is in NAME.log, in the directory of the control
sockets: 1 MiB at most, and when the guest fails also the last that it printed.

A LUN is [id=NAME,]path=PATH[,target=N][,initiator=NAME][,timeout=30s][,readonly][,allow=unsafe].
PATH decides what it is: a /dev/sgN or a SCSI block device is passed through, a
regular file is a software disk. The n-th --lun is target n-1, LUN 0, unless
target= says otherwise.

--config reads the same from a YAML file: name, kernel, initrd, cmdline, cpus,
memory, cpu_model, no_reboot, and luns, a list of id, path, target, initiator,
timeout, readonly and allow_unsafe. Relative paths start at the file's directory.
What the command line says as well wins over the file; --lun adds a LUN.

--from goes on with a guest that vmm save has written. What the guest is comes with
it; NAME is its name here, by default the one that it had, and --lun id=NAME,path=PATH
says where a LUN is on this host, as for vmm receive. Its reservations are moved here if
the disks still have them: one that another node took meanwhile is not taken back. The
file is marked as used before the guest runs, and refused from then on.`,
		Example: `  vmm run web1 --kernel vmlinuz --initrd initrd.img --cmdline "console=ttyS0 root=/dev/sda1" \
          --cpus 2 --memory 1G --lun id=data,path=/dev/sg2 --lun id=root,path=root.img
  vmm run --config web1.yaml
  vmm run --config web1.yaml --detach && vmm console web1
  vmm run web2 --config web1.yaml --memory 2G
  vmm run web1 --from web1.snap`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) == 1:
				return validName(args[0])
			case len(args) == 0 && (f.file != "" || f.from != ""):
				return nil
			}
			return usageError{errors.New("run wants one name for the guest, as in: vmm run web1 --kernel vmlinuz")}
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.fromFlags.check(c); err != nil {
				return err
			}
			if f.detach && f.from != "" && len(args) == 0 {
				return usageError{errors.New("run --from --detach wants a name for the guest, by which it is found, as in: vmm run web1 --from web1.snap --detach")}
			}
			if f.leaves(c) {
				return detach(c)
			}
			if f.from != "" {
				return f.background.finish(f.restore(c, strings.Join(args, "")))
			}
			return f.background.finish(f.run(c, strings.Join(args, "")))
		},
	}
	fs := c.Flags()
	fs.StringVar(&f.file, "config", "", "YAML file that describes the guest; see above")
	fs.StringVar(&f.kernel, "kernel", "", "bzImage, or ELF kernel with a PVH note")
	fs.StringVar(&f.initrd, "initrd", "", "initial RAM disk")
	fs.StringVar(&f.cmdline, "cmdline", "console=ttyS0", "kernel command line")
	fs.IntVar(&f.cpus, "cpus", 1, fmt.Sprintf("vCPUs, 1 to %d", machine.MaxCPUs))
	fs.StringVar(&f.memory, "memory", "512M", "guest memory")
	fs.StringVar(&f.cpu, "cpu", string(machine.CPUHost), "CPU model: host, x86-64-v2 or x86-64-v3")
	fs.StringArrayVar(&f.luns, "lun", nil, "a SCSI LUN (repeatable); see above")
	fs.BoolVar(&f.noReboot, "no-reboot", false, "end with status 0 where the guest asks for a reset")
	f.fromFlags.addFlags(c)
	f.foreground.addFlags(fs)
	return c
}

// config is the machine that the command line and the file describe. A flag
// that is given wins over the file; --lun adds to the file's LUNs.
func (f *runFlags) config(c *cobra.Command, name string) (cfg machine.Config, err error) {
	if err := f.foreground.check(); err != nil {
		return cfg, err
	}
	settings := []struct {
		flag string
		set  func() error
	}{
		{"kernel", func() error { cfg.Kernel = f.kernel; return nil }},
		{"initrd", func() error { cfg.Initrd = f.initrd; return nil }},
		{"cmdline", func() error { cfg.Cmdline = f.cmdline; return nil }},
		{"no-reboot", func() error { cfg.NoReboot = f.noReboot; return nil }},
		{"cpus", func() error {
			cfg.CPUs = f.cpus
			if f.cpus < 1 || f.cpus > machine.MaxCPUs {
				return fmt.Errorf("%d: give 1 to %d", f.cpus, machine.MaxCPUs)
			}
			return nil
		}},
		{"memory", func() (err error) { cfg.Memory, err = machine.ParseSize(f.memory); return err }},
		{"cpu", func() (err error) { cfg.CPU, err = machine.ParseCPUModel(f.cpu); return err }},
		{"lun", func() error {
			for _, s := range f.luns {
				l, err := machine.ParseLUN(s)
				if err != nil {
					return err
				}
				cfg.LUNs = append(cfg.LUNs, l)
			}
			return nil
		}},
	}
	set := func(given bool) error {
		for _, s := range settings {
			if c.Flags().Changed(s.flag) != given {
				continue
			}
			if err := s.set(); err != nil {
				return usageError{fmt.Errorf("--%s: %w", s.flag, err)}
			}
		}
		return nil
	}
	if err := set(false); err != nil {
		return cfg, err
	}
	if f.file != "" {
		if err := cfg.LoadConfig(f.file); err != nil {
			return cfg, usageError{err}
		}
	}
	if err := set(true); err != nil {
		return cfg, err
	}
	if name != "" {
		cfg.Name = name
	}
	switch {
	case cfg.Name == "":
		return cfg, usageError{fmt.Errorf("%s: name is missing, and so is a name on the command line, as in: vmm run web1 --config %[1]s", f.file)}
	case cfg.Kernel == "" && f.file != "":
		return cfg, usageError{fmt.Errorf("%s: kernel is missing: give a bzImage or an ELF kernel there, or --kernel", f.file)}
	case cfg.Kernel == "":
		return cfg, usageError{errors.New("--kernel: give a bzImage or an ELF kernel")}
	}
	return cfg, validName(cfg.Name)
}

// answerTime is the time that the last answers on the control socket have.
const answerTime = 5 * time.Second

func (f *runFlags) run(c *cobra.Command, name string) (err error) {
	cfg, err := f.config(c, name)
	if err != nil {
		return err
	}
	dir, err := control.DefaultRunDir()
	if err != nil {
		return err
	}
	cfg.RunDir = string(dir)
	// The name comes first: nothing else is touched on behalf of a second
	// guest of one name. It is given up last, when the LUNs are free.
	claim, err := dir.Claim(cfg.Name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, claim.Close()) }()
	f.attach(c, &cfg)
	if f.serial != "" {
		if cfg.Serial, err = f.port(); err != nil {
			return err
		}
	}
	settle(c.Context(), dir, cfg.Warn)
	m, err := machine.New(cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	return f.supervise(c, catchStop(), claim, m, cfg.Warn, func() error { return m.Run(c.Context()) })
}

// settle removes what a crash has left of this host's reservations, before a
// guest is given a LUN on which it would look like the guest's own.
func settle(ctx context.Context, dir control.RunDir, warn func(string)) {
	state, err := control.StateDir()
	var settled []control.Settled
	if err == nil {
		settled, err = dir.Recover(ctx, state)
	}
	if err != nil {
		warn(fmt.Sprintf("journal of reservations: %v", err))
	}
	for _, s := range settled {
		if !s.InUse {
			warn(s.Outcome)
		}
	}
}

// foreground is how a process stays with its guest.
type foreground struct {
	serial      string
	stopTimeout time.Duration
	detach      bool
	background  *background // this process is in the background, or on its way there
}

// leaves says whether this is the process that leaves another one behind in
// the background.
func (f *foreground) leaves(c *cobra.Command) bool {
	if f.detach {
		f.background = detached(c)
	}
	return f.detach && f.background == nil
}

func (f *foreground) addFlags(fs *pflag.FlagSet) {
	fs.StringVar(&f.serial, "serial", "", "unix socket, made here, that is the guest's second serial port (ttyS1)")
	fs.DurationVar(&f.stopTimeout, "stop-timeout", control.DefaultStopTimeout, "time between the power button and force")
	fs.BoolVar(&f.detach, "detach", false, "go to the background; see above")
}

// check refuses what no flag can mean.
func (f *foreground) check() error {
	if f.stopTimeout < 0 {
		return usageError{fmt.Errorf("--stop-timeout: %v: give a time of 0 or more", f.stopTimeout)}
	}
	return nil
}

// attach gives the machine what the process prints to.
func (f *foreground) attach(c *cobra.Command, cfg *machine.Config) {
	if f.background != nil {
		cfg.Warn = f.background.warn // and the machine's own console keeps the text
		return
	}
	stderr := c.ErrOrStderr()
	if cfg.Console = c.OutOrStdout(); screenOf(c) != nil {
		cfg.Console = nil // supervise shows it: nobody waits for a terminal
	}
	newline := "\n"
	if _, raw := isTerminal(c.InOrStdin()); raw {
		newline = "\r\n" // while the guest has the terminal, a line feed does no more than it says
	}
	cfg.Warn = func(line string) { fmt.Fprintf(stderr, "vmm: %s%s", line, newline) }
}

// screenOf is the terminal that shows the guest's console; nil: that goes to a
// file or a pipe, which gets all of it, however slow it is.
func screenOf(c *cobra.Command) *os.File {
	f, ok := isTerminal(c.OutOrStdout())
	if !ok {
		return nil
	}
	return f
}

// show writes a console's text to a terminal until it ends. A terminal that
// does not keep up misses some.
func show(console *machine.Console, f *os.File, warn func(string)) {
	text, buf := console.Attach(machine.ConsoleKept), make([]byte, 4096)
	for {
		t, err := text.Next(context.Background(), buf)
		if err != nil {
			return
		}
		if t.Missed > 0 {
			warn(fmt.Sprintf("%d bytes of the guest's text are missing here: they came faster than they could be shown", t.Missed))
		}
		if _, err := f.Write(t.Text); err != nil {
			return // the terminal is gone, the guest is not
		}
	}
}

// port makes the second serial port.
func (f *foreground) port() (io.ReadWriteCloser, error) {
	port, err := listenSerial(f.serial)
	if err != nil {
		return nil, err
	}
	return port, nil
}

// supervise stays with a machine until run returns, which it does when the
// guest has ended: it serves the control API, types what a person types, and
// presses the power button on a signal. What closes the machine then can be
// ended by one.
func (f *foreground) supervise(c *cobra.Command, signals stopSignals, claim *control.Claim, m *machine.Machine, warn func(string), run func() error) error {
	if err := f.background.openLog(claim.Dir(), claim.Name()); err != nil {
		return err
	}
	server := control.NewServer(claim, m, version)
	go func() {
		if err := server.Serve(); err != nil {
			warn(fmt.Sprintf("control socket: %v", err))
		}
	}()
	defer func() {
		closeServer(server) // whoever asked for the end learns that it has come
	}()
	force := func() { _ = m.Stop() } // else it has ended by itself
	f.background.readyWhenRunning(m, claim.Name())
	if f.background == nil {
		guest := func(p []byte) { _, _ = m.ConsoleInput(context.Background(), p) } // else it has ended
		quit := func() {
			fmt.Fprint(c.ErrOrStderr(), "\r\n") // the guest's line is left as it is
			force()
		}
		restore, err := attachConsole(c.InOrStdin(), guest, quit)
		if err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		defer restore()
	}
	if screen := screenOf(c); screen != nil && f.background == nil {
		shown := make(chan struct{})
		go func() {
			show(m.Console(), screen, warn)
			close(shown)
		}()
		defer func() {
			m.Console().Close()
			select {
			case <-shown:
			case <-time.After(answerTime): // the terminal is stopped
			}
		}()
	}

	defer signals.release()
	ended := make(chan struct{})
	defer close(ended)
	go stopOnSignal(signals, ended, f.stopTimeout, m.PowerButton, force, warn)
	return run()
}

// stopOnSignal presses the power button on the first signal, and forces after
// timeout or on the second one.
func stopOnSignal(signals <-chan os.Signal, ended <-chan struct{}, timeout time.Duration, button, force func(), warn func(string)) {
	select {
	case <-signals:
	case <-ended:
		return
	}
	button()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-timer.C:
		warn(fmt.Sprintf("the guest did not power off within %v: ended by force", timeout))
	case <-signals:
	case <-ended:
		return
	}
	force()
}
