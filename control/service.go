package control

import (
	"context"
	"errors"
	"net/http"
	"os"
	"runtime"
	"time"

	"connectrpc.com/connect"

	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
)

// Machine is what the service controls: a *machine.Machine.
type Machine interface {
	Info() machine.Info
	Metrics() machine.Metrics
	State() machine.State
	Pause(context.Context) error
	Resume() error
	Stop() error
	PowerButton()
	Ended() <-chan struct{}
	Events() (events <-chan machine.Event, cancel func())
	Console() *machine.Console
	ConsoleInput(ctx context.Context, p []byte) (int, error)
	Reservation(ctx context.Context, id string) (machine.Reservation, error)
	Attach(ctx context.Context, c machine.LUNConfig) (machine.LUNInfo, error)
	Detach(ctx context.Context, id string, timeout time.Duration, force bool) (left []string, err error)
	Depart(ctx context.Context) (*machine.Departure, error)
}

var _ Machine = (*machine.Machine)(nil)

// DefaultStopTimeout is the time that a guest has to shut down.
const DefaultStopTimeout = 30 * time.Second

const (
	pauseTime = 10 * time.Second // for the vCPUs to stand
	diskTime  = 10 * time.Second // for the disks to say who is registered
)

// service implements vmmv1connect.MachineServiceHandler.
type service struct {
	machine   Machine
	dir       RunDir
	claim     *Claim
	version   string
	migration migrations
	consoles  consoles
}

// failed is err as the API has it: what the client can do about it decides
// the code.
func failed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, machine.ErrEnded), errors.Is(err, machine.ErrMoving), errors.Is(err, machine.ErrLUNInUse):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, machine.ErrNoLUN):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, machine.ErrLUNTaken):
		return connect.NewError(connect.CodeAlreadyExists, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

func (s *service) Status(context.Context, *connect.Request[vmmv1.StatusRequest]) (*connect.Response[vmmv1.StatusResponse], error) {
	info := s.machine.Info()
	r := &vmmv1.StatusResponse{
		Name:        info.Name,
		State:       info.State.String(),
		Cpus:        uint32(info.CPUs),
		MemoryBytes: info.Memory,
		CpuModel:    string(info.CPU),
		Pid:         uint32(os.Getpid()),
		Version:     s.version,
		Migration:   s.migration.standing(),
	}
	if !info.Started.IsZero() {
		r.Started = info.Started.Format(time.RFC3339)
		r.UptimeSeconds = time.Since(info.Started).Seconds()
	}
	for i := range info.LUNs {
		r.Luns = append(r.Luns, lunMessage(&info.LUNs[i]))
	}
	return connect.NewResponse(r), nil
}

func (s *service) Version(context.Context, *connect.Request[vmmv1.VersionRequest]) (*connect.Response[vmmv1.VersionResponse], error) {
	return connect.NewResponse(&vmmv1.VersionResponse{Version: s.version, Go: runtime.Version()}), nil
}

func (s *service) Pause(ctx context.Context, _ *connect.Request[vmmv1.PauseRequest]) (*connect.Response[vmmv1.PauseResponse], error) {
	if err := s.migration.inTheWay(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, pauseTime)
	defer cancel()
	if err := s.machine.Pause(ctx); err != nil {
		return nil, failed(err)
	}
	return connect.NewResponse(&vmmv1.PauseResponse{}), nil
}

func (s *service) Resume(_ context.Context, r *connect.Request[vmmv1.ResumeRequest]) (*connect.Response[vmmv1.ResumeResponse], error) {
	if forced, err := s.migration.force(r.Msg.Force); forced || err != nil {
		return connect.NewResponse(&vmmv1.ResumeResponse{}), err
	}
	if err := s.machine.Resume(); err != nil {
		return nil, failed(err)
	}
	return connect.NewResponse(&vmmv1.ResumeResponse{}), nil
}

func (s *service) Stop(ctx context.Context, r *connect.Request[vmmv1.StopRequest]) (*connect.Response[vmmv1.StopResponse], error) {
	timeout := DefaultStopTimeout
	if r.Msg.TimeoutMs != nil {
		timeout = time.Duration(*r.Msg.TimeoutMs) * time.Millisecond
	}
	if !r.Msg.Force {
		switch s.machine.State() {
		case machine.StatePaused:
			return nil, connect.NewError(connect.CodeFailedPrecondition,
				errors.New("the guest is paused and would not see the power button: resume it first, or force"))
		case machine.StateEnded:
			return nil, failed(machine.ErrEnded)
		}
		s.machine.PowerButton()
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		select {
		case <-s.machine.Ended():
			return connect.NewResponse(&vmmv1.StopResponse{}), nil
		case <-ctx.Done():
			return nil, failed(context.Cause(ctx))
		case <-timer.C:
		}
	}
	err := s.machine.Stop()
	if errors.Is(err, machine.ErrEnded) && !r.Msg.Force {
		return connect.NewResponse(&vmmv1.StopResponse{}), nil // in the last moment, by itself
	}
	if err != nil {
		return nil, failed(err)
	}
	return connect.NewResponse(&vmmv1.StopResponse{Forced: true}), nil
}

func (s *service) Events(ctx context.Context, _ *connect.Request[vmmv1.EventsRequest], out *connect.ServerStream[vmmv1.Event]) error {
	return s.events(ctx, out.Send)
}

// events hands send every event until the machine ends, send fails or the
// client leaves.
func (s *service) events(ctx context.Context, send func(*vmmv1.Event) error) error {
	events, cancel := s.machine.Events()
	defer cancel()
	for {
		select {
		case e, open := <-events:
			if !open {
				return nil
			}
			if err := send(eventMessage(e)); err != nil {
				return err
			}
		case <-ctx.Done():
			return failed(context.Cause(ctx))
		}
	}
}

// eventLines is Events for curl: one line of JSON for each.
func (s *service) eventLines(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	_ = rc.Flush() // whoever waits for the answer's beginning need not wait for an event
	_ = s.events(r.Context(), func(e *vmmv1.Event) error {
		line, err := MarshalJSON(e)
		if err == nil {
			_, err = w.Write(append(line, '\n'))
		}
		if err == nil {
			err = rc.Flush()
		}
		return err
	}) // the client has left, or the machine: there is nobody to tell
}
