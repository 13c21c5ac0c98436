package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"sync/atomic"

	"connectrpc.com/connect"

	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/proto/vmm/v1/vmmv1connect"
)

const (
	maxConsoles  = 16       // readers of the console at a time: most of maxClients is left to others
	consolePiece = 32 << 10 // bytes of its text in one piece
)

// consolePath is where a console is plain text, for curl.
const consolePath = "/console"

// unhurried are the paths of answers that a client may take as slowly as it
// likes: a console whose terminal is stopped is to be there when that goes on.
// Such a client costs a goroutine and a connection; its text is kept by nobody.
var unhurried = map[string]bool{vmmv1connect.MachineServiceConsoleProcedure: true, consolePath: true}

// consoles counts the readers of a console.
type consoles struct{ n atomic.Int32 }

// follow hands send what the guest prints until the machine ends, send fails,
// or the client leaves. Between what was printed before and what comes is an
// empty text.
func (s *service) follow(ctx context.Context, r *vmmv1.ConsoleRequest, send func(machine.ConsoleText) error) error {
	defer s.consoles.n.Add(-1)
	if s.consoles.n.Add(1) > maxConsoles {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%d clients read the console already: detach one of them", maxConsoles))
	}
	scrollback := uint64(math.MaxUint64)
	if r.ScrollbackBytes != nil {
		scrollback = *r.ScrollbackBytes
	}
	reader := s.machine.Console().Attach(scrollback)
	buf := make([]byte, consolePiece)
	for old := true; ; {
		if old && reader.Live() {
			if old = false; r.NoFollow {
				return nil
			}
			if err := send(machine.ConsoleText{}); err != nil {
				return err
			}
		}
		t, err := reader.Next(ctx, buf)
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return failed(err)
		}
		if err := send(t); err != nil {
			return err
		}
	}
}

func (s *service) Console(ctx context.Context, r *connect.Request[vmmv1.ConsoleRequest], out *connect.ServerStream[vmmv1.ConsoleResponse]) error {
	return s.follow(ctx, r.Msg, func(t machine.ConsoleText) error {
		return out.Send(&vmmv1.ConsoleResponse{Text: t.Text, Scrollback: t.Scrollback, MissedBytes: t.Missed})
	})
}

func (s *service) ConsoleInput(ctx context.Context, r *connect.Request[vmmv1.ConsoleInputRequest]) (*connect.Response[vmmv1.ConsoleInputResponse], error) {
	if _, err := s.machine.ConsoleInput(ctx, r.Msg.Text); err != nil {
		return nil, failed(err)
	}
	return connect.NewResponse(&vmmv1.ConsoleInputResponse{}), nil
}

// consoleText is Console for curl: the text alone. With the parameter no_follow
// it ends where the guest begins to print more.
func (s *service) consoleText(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	rc := http.NewResponseController(w)
	err := s.follow(r.Context(), &vmmv1.ConsoleRequest{NoFollow: r.URL.Query().Has("no_follow")}, func(t machine.ConsoleText) error {
		if t.Missed > 0 {
			fmt.Fprintf(w, "\r\n[vmm: %d bytes are missing here]\r\n", t.Missed)
		}
		if _, err := w.Write(t.Text); err != nil {
			return err
		}
		return rc.Flush()
	})
	if full := new(connect.Error); errors.As(err, &full) && full.Code() == connect.CodeResourceExhausted {
		http.Error(w, full.Message(), http.StatusTooManyRequests)
	} // else the client has left, or the machine: there is nobody to tell
}
