package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"

	"connectrpc.com/connect"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/proto/vmm/v1/vmmv1connect"
)

// StateWaiting is the state of a guest that has not come yet; machine has the
// others.
const StateWaiting = "waiting"

// Waiting is what a process says of the guest that it waits for.
type Waiting struct {
	Name    string
	Address string // where it is waited for
	Stop    func() // gives the waiting up; called any number of times
}

// NewWaitingServer makes a server on the socket of a name that RunDir.Await has
// claimed.
func NewWaitingServer(c *Claim, w Waiting, version string) *Server {
	service := &waiting{Waiting: w, version: version}
	return newServer(c, service, func(*http.ServeMux) {}, connect.WithInterceptors(notHere{service}))
}

// waiting implements what can be asked of a guest that has not come.
type waiting struct {
	vmmv1connect.UnimplementedMachineServiceHandler
	Waiting
	version string
}

func (w *waiting) Status(context.Context, *connect.Request[vmmv1.StatusRequest]) (*connect.Response[vmmv1.StatusResponse], error) {
	return connect.NewResponse(&vmmv1.StatusResponse{
		Name: w.Name, State: StateWaiting, Pid: uint32(os.Getpid()), Version: w.version, Migration: "waited for at " + w.Address,
	}), nil
}

func (w *waiting) Version(context.Context, *connect.Request[vmmv1.VersionRequest]) (*connect.Response[vmmv1.VersionResponse], error) {
	return connect.NewResponse(&vmmv1.VersionResponse{Version: w.version, Go: runtime.Version()}), nil
}

// Stop answers at once; the process ends when what has arrived is given back.
func (w *waiting) Stop(context.Context, *connect.Request[vmmv1.StopRequest]) (*connect.Response[vmmv1.StopResponse], error) {
	w.Waiting.Stop()
	return connect.NewResponse(&vmmv1.StopResponse{}), nil
}

// notHere makes what a guest that has not come cannot do an error that says
// so.
type notHere struct{ *waiting }

func (n notHere) explain(err error) error {
	if connect.CodeOf(err) != connect.CodeUnimplemented {
		return err
	}
	return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the guest has not come yet: it is waited for at %s", n.Address))
}

func (n notHere) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		a, err := next(ctx, r)
		return a, n.explain(err)
	}
}

func (n notHere) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error { return n.explain(next(ctx, conn)) }
}

func (notHere) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

var _ connect.Interceptor = notHere{}

// ErrAwaited is in the chain of Claim's error where another process waits for
// a guest of that name.
var ErrAwaited = errors.New("is waited for already")
