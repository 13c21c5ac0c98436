package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"vmm/control"
)

// askTime is the time a guest's process has to answer what it knows by itself.
const askTime = 5 * time.Second

// validName refuses what cannot be a guest's name.
func validName(name string) error {
	if err := control.ValidName(name); err != nil {
		return usageError{err}
	}
	return nil
}

// oneGuest is the cobra.PositionalArgs of commands on one guest.
func oneGuest(c *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageError{fmt.Errorf("%s wants the name of one guest; vmm ls lists them", c.Name())}
	}
	return validName(args[0])
}

// dial reaches a guest that runs or is waited for.
func dial(name string) (*control.Client, error) {
	dir, err := control.DefaultRunDir()
	if err != nil {
		return nil, err
	}
	return dir.Dial(name)
}

// ask calls a method of a guest's API, with limit as its time.
func ask[In, Out any](ctx context.Context, c *control.Client, limit time.Duration,
	method func(context.Context, *connect.Request[In]) (*connect.Response[Out], error), in *In) (*Out, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r, err := method(ctx, connect.NewRequest(in))
	if err != nil {
		return nil, c.Explain(err)
	}
	return r.Msg, nil
}

// printMessage writes a message of the API as indented JSON.
func printMessage(w io.Writer, m proto.Message) error {
	line, err := control.MarshalJSON(m)
	if err != nil {
		return err
	}
	return printJSON(w, json.RawMessage(line))
}

// printJSON writes v as indented JSON.
func printJSON(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, line, "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = w.Write(b.Bytes())
	return err
}

// sizeText is a number of bytes as --memory takes it.
func sizeText(n uint64) string {
	for i, unit := range "TGMK" {
		if shift := 40 - 10*i; n >= 1<<shift && n%(1<<shift) == 0 {
			return fmt.Sprintf("%d%c", n>>shift, unit)
		}
	}
	return fmt.Sprint(n)
}

// uptimeText is a duration with the two units that matter.
func uptimeText(seconds float64) string {
	s := int(seconds)
	switch {
	case s >= 86400:
		return fmt.Sprintf("%dd%dh", s/86400, s%86400/3600)
	case s >= 3600:
		return fmt.Sprintf("%dh%dm", s/3600, s%3600/60)
	case s >= 60:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	}
	return fmt.Sprintf("%ds", s)
}
