package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"vmm/control"
	"vmm/machine"
	"vmm/migration"
	vmmv1 "vmm/proto/vmm/v1"
)

type migrateFlags struct {
	format       outputFormat
	tls          tlsFlags
	peer         string
	channels     int
	downtime     time.Duration
	maxBandwidth string
	timeout      time.Duration
	cancel       bool
	local        bool
}

func newMigrateCommand() *cobra.Command {
	var f migrateFlags
	c := &cobra.Command{
		Use:   "migrate NAME ADDRESS [flags]",
		Short: "Move a running guest to a host that waits for it",
		Long: `Moves a running guest, with its memory, its devices and its SCSI reservations, to
the vmm receive that waits at ADDRESS: tcp://HOST:PORT, HOST:PORT or unix:///PATH.
Its TLS files are those in --tls-dir, else in ~/.config/vmm/tls, else in /etc/vmm/tls;
within one host there are none unless --tls-dir says so. Until the guest is handed over,
any failure leaves it running here; Ctrl-C, or vmm migrate NAME --cancel from elsewhere,
gives the migration up. At the end stands what became of each disk's
reservation, and vmm run ends here with status 0.`,
		Example: `  vmm migrate web1 tcp://host2:4444
  vmm migrate web1 unix:///run/vmm/incoming
  vmm migrate web1 --cancel`,
		Args: func(_ *cobra.Command, args []string) error {
			want := 2
			if f.cancel {
				want = 1
			}
			if len(args) != want {
				return usageError{errors.New("migrate wants a guest and an address, as in: vmm migrate web1 tcp://host2:4444 (or: vmm migrate web1 --cancel)")}
			}
			return validName(args[0])
		},
		ValidArgsFunction: completeGuest,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := dial(args[0])
			if err != nil {
				return err
			}
			defer client.Close()
			if f.cancel {
				_, err := ask(c.Context(), client, askTime, client.CancelMigration, &vmmv1.CancelMigrationRequest{})
				return err
			}
			return f.run(c, client, args[1])
		},
	}
	fs := c.Flags()
	f.tls.addFlags(c)
	fs.StringVar(&f.peer, "peer", "", "name that the other host's certificate must have, if not the address's host")
	fs.IntVar(&f.channels, "channels", 1, fmt.Sprintf("data connections, 1 to %d", migration.MaxChannels))
	fs.DurationVar(&f.downtime, "downtime", migration.DefaultDowntime, "how long the guest may stand still")
	fs.StringVar(&f.maxBandwidth, "max-bandwidth", "0", "bytes per second while the guest runs, as in 100M; 0: unbounded")
	fs.DurationVar(&f.timeout, "timeout", 0, "give up if the guest has not been stopped by then; 0: never")
	fs.BoolVar(&f.local, "local", false, "hand the memory itself to a process of this host, by a unix socket, instead of copying it")
	fs.BoolVar(&f.cancel, "cancel", false, "give up the migration that is under way")
	f.format.addFlag(c)
	return c
}

// request is what the flags ask for.
func (f *migrateFlags) request(c *cobra.Command, address string) (*vmmv1.MigrateRequest, error) {
	bad := func(flag string, err error) (*vmmv1.MigrateRequest, error) {
		return nil, usageError{fmt.Errorf("--%s: %w", flag, err)}
	}
	to, err := migration.ParseAddress(address)
	if err != nil {
		return nil, usageError{err}
	}
	if f.local && to.Network != "unix" {
		return bad("local", fmt.Errorf("%v: memory can be handed over by a unix socket alone, as in unix:///run/vmm/incoming", to))
	}
	if f.channels < 1 || f.channels > migration.MaxChannels {
		return bad("channels", fmt.Errorf("%d: give 1 to %d", f.channels, migration.MaxChannels))
	}
	if f.downtime < time.Millisecond || f.downtime > time.Hour {
		return bad("downtime", fmt.Errorf("%v: give a time from 1ms to 1h", f.downtime))
	}
	if f.timeout < 0 || f.timeout > 0 && f.timeout < time.Millisecond {
		return bad("timeout", fmt.Errorf("%v: give 1ms or more, or 0 for none", f.timeout))
	}
	bandwidth, err := machine.ParseSize(f.maxBandwidth)
	if err != nil {
		return bad("max-bandwidth", err)
	}
	f.tls.settle(c, to)
	return &vmmv1.MigrateRequest{
		Address: address, TlsDir: absolute(f.tls.dir), Insecure: f.tls.insecure, Peer: f.peer, Channels: uint32(f.channels),
		DowntimeMs: uint64(f.downtime.Milliseconds()), MaxBandwidth: bandwidth, TimeoutMs: uint64(f.timeout.Milliseconds()), Local: f.local,
	}, nil
}

// run asks the guest's process and follows what it says.
func (f *migrateFlags) run(c *cobra.Command, client *control.Client, address string) error {
	request, err := f.request(c, address)
	if err != nil {
		return err
	}
	ended, err := client.WhenEnded()
	if err != nil {
		return err
	}
	defer ended.Close()
	defer cancelOnSignal(client)()
	steps, err := client.Migrate(c.Context(), connect.NewRequest(request))
	if err != nil {
		return client.Explain(err)
	}
	defer steps.Close()
	show := newShower(c, f.format)
	var summary *vmmv1.MigrationSummary
	for steps.Receive() {
		m := steps.Msg()
		if p := m.GetProgress(); p != nil {
			if err := show.progress(p); err != nil {
				return err
			}
		}
		summary = m.GetSummary()
	}
	show.end()
	err = steps.Err()
	if err != nil && !diedOf(err, ended) {
		return client.Explain(err)
	}
	if err != nil || summary == nil {
		return fmt.Errorf("guest %s: its process ended in the middle of the migration; ask the other host whether it runs there", client.Name())
	}
	if err := show.summary(client.Name(), address, summary); err != nil {
		return err
	}
	gone(c, client, ended)
	return nil
}

// diedOf says whether err, of a call to a guest's process, is that process's
// death: it did not send err, and is gone or going.
func diedOf(err error, ended *control.Process) bool {
	return !connect.IsWireError(err) && ended.Wait(time.Second)
}

// gone waits for the end of the process of a guest that has left it: until then
// its name and its disks are taken.
func gone(c *cobra.Command, client *control.Client, ended *control.Process) {
	if !ended.Wait(endTime) {
		fmt.Fprintf(c.ErrOrStderr(), "vmm: guest %s has left, but its process here is still closing its disks\n", client.Name())
	}
}

// absolute is a path as another process, with another working directory, needs
// it.
func absolute(path string) string {
	if path == "" {
		return ""
	}
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path
}

// shower writes the progress and the summary of a migration or a save: lines of
// JSON, a bar on a terminal, else the summary alone.
type shower struct {
	json  bool
	out   io.Writer
	bar   io.Writer  // nil: none
	width func() int // the bar's, in cells; it may change
}

func newShower(c *cobra.Command, format outputFormat) *shower {
	s := &shower{json: format.json(), out: c.OutOrStdout()}
	if file, ok := isTerminal(c.ErrOrStderr()); ok && !s.json {
		s.bar, s.width = file, func() int { return cellsOf(file) }
	}
	return s
}

const barWidth = 20

func (s *shower) progress(p *vmmv1.MigrationProgress) error {
	switch {
	case s.json:
		return s.line(&vmmv1.MigrateResponse{Body: &vmmv1.MigrateResponse_Progress{Progress: p}})
	case s.bar == nil:
	case p.HandedOver != "":
		s.draw("handed over; waiting for the other host: " + p.HandedOver)
	case p.Round == 0:
		s.draw("preparing; the guest's memory comes next")
	default:
		done := 0.0
		if all := p.SentBytes + p.RemainingBytes; all > 0 {
			done = float64(p.SentBytes) / float64(all)
		}
		full := int(done * barWidth)
		parts := []string{
			fmt.Sprintf("round %d [%s%s] %s left", p.Round, strings.Repeat("#", full), strings.Repeat(".", barWidth-full), amount(p.RemainingBytes)),
			amount(p.Bandwidth) + "/s sent",
		}
		if p.Round > 1 { // the first round measures what the guest writes
			parts = append(parts, amount(p.DirtyRate)+"/s dirtied")
			if p.Throttle > 0 {
				parts = append(parts, fmt.Sprintf("slowed by %d%%", p.Throttle))
			}
			parts = append(parts, fmt.Sprintf("downtime %d ms", p.ExpectedDowntimeMs))
		}
		s.draw(parts...)
	}
	return nil
}

func (s *shower) line(m proto.Message) error {
	b, err := control.MarshalJSON(m)
	if err != nil {
		return err
	}
	_, err = s.out.Write(append(b, '\n'))
	return err
}

// draw puts parts in the bar's place.
func (s *shower) draw(parts ...string) { fmt.Fprint(s.bar, "\r\x1b[K"+fit(s.width(), parts)) }

// fit is as many of parts, separated by commas, as a line of width cells has
// room for. The last cell stays free: a letter there would begin a new line on
// some terminals, and the old one could not be drawn anew. Of a first part that
// is too long the beginning stands.
func fit(width int, parts []string) string {
	room := max(width-1, 0)
	line := parts[0]
	if cells := []rune(line); len(cells) > room {
		return string(cells[:room])
	}
	for _, p := range parts[1:] {
		if utf8.RuneCountInString(line+", "+p) > room {
			break
		}
		line += ", " + p
	}
	return line
}

// end leaves the bar's line.
func (s *shower) end() {
	if s.bar != nil {
		fmt.Fprint(s.bar, "\r\x1b[K")
	}
}

func (s *shower) summary(name, address string, m *vmmv1.MigrationSummary) error {
	if s.json {
		return s.line(&vmmv1.MigrateResponse{Body: &vmmv1.MigrateResponse_Summary{Summary: m}})
	}
	ms := func(us uint64) string { return fmt.Sprintf("%.1f", float64(us)/1000) }
	d := m.GetDowntime()
	fmt.Fprintf(s.out, "%s runs at %s\n", name, address)
	fmt.Fprintf(s.out, "  %d rounds, %s in %.1f s\n", m.Rounds, amount(m.SentBytes), float64(m.TotalUs)/1e6)
	fmt.Fprintf(s.out, "  downtime %s ms: stop %s, save %s, pages %s, load %s, takeover %s, start %s\n",
		ms(d.GetTotalUs()), ms(d.GetStopUs()), ms(d.GetSaveUs()), ms(d.GetPagesUs()), ms(d.GetLoadUs()), ms(d.GetTakeoverUs()), ms(d.GetStartUs()))
	for _, l := range m.Luns {
		fmt.Fprintf(s.out, "  there: %s\n", folded(l.Sentence, cellsOf(s.out), 9))
	}
	for _, l := range m.Left {
		fmt.Fprintf(s.out, "  here: %s\n", folded(l.Sentence, cellsOf(s.out), 8))
	}
	return nil
}

// amount is a number of bytes for people.
func amount(n uint64) string {
	for i, unit := range []string{"GiB", "MiB", "KiB"} {
		if shift := 30 - 10*i; n >= 1<<shift {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(uint64(1)<<shift), unit)
		}
	}
	return fmt.Sprintf("%d B", n)
}
