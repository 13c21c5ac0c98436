package control

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"

	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

func (s *service) Luns(ctx context.Context, r *connect.Request[vmmv1.LunsRequest]) (*connect.Response[vmmv1.LunsResponse], error) {
	info := s.machine.Info()
	var out vmmv1.LunsResponse
	for i := range info.LUNs {
		if r.Msg.Id == "" || r.Msg.Id == info.LUNs[i].ID {
			out.Luns = append(out.Luns, lunMessage(&info.LUNs[i]))
		}
	}
	if r.Msg.Id != "" && len(out.Luns) == 0 {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("guest %s has no LUN %q", info.Name, r.Msg.Id))
	}
	ctx, cancel := context.WithTimeout(ctx, diskTime)
	defer cancel()
	var asked sync.WaitGroup
	for _, l := range out.Luns {
		asked.Go(func() {
			found, err := s.machine.Reservation(ctx, l.Id)
			switch {
			case err == nil:
				l.Reservations = ReservationsMessage(found.View, found.Own, found.OwnUnknown)
				l.Reservations.Guest = guestMessage(found.Guest)
			case pr.Unsupported(err):
				l.Reservations = &vmmv1.Reservations{}
			default:
				l.Error = err.Error()
			}
		})
	}
	asked.Wait()
	return connect.NewResponse(&out), nil
}

// attachTime is the time that a new disk has to say who it is.
const attachTime = 30 * time.Second

func (s *service) AttachLun(ctx context.Context, r *connect.Request[vmmv1.AttachLunRequest]) (*connect.Response[vmmv1.AttachLunResponse], error) {
	c, err := lunConfig(r.Msg)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := s.migration.plug(); err != nil {
		return nil, err
	}
	defer s.migration.unplug()
	ctx, cancel := context.WithTimeout(ctx, attachTime)
	defer cancel()
	// What a crash has left on this host's nexus would look like the guest's.
	if state, err := StateDir(); err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	} else if _, err := s.dir.Recover(ctx, state); err != nil {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("journal of reservations: %w", err))
	}
	info, err := s.machine.Attach(ctx, c)
	if err != nil {
		return nil, failed(err)
	}
	return connect.NewResponse(&vmmv1.AttachLunResponse{Lun: lunMessage(&info)}), nil
}

// lunConfig is the LUN that a client asks for.
func lunConfig(r *vmmv1.AttachLunRequest) (machine.LUNConfig, error) {
	c := machine.LUNConfig{
		ID: r.Id, Path: r.Path, Target: -1, Timeout: machine.DefaultTimeout, ReadOnly: r.Readonly, Unsafe: r.AllowUnsafe, Initiator: r.Initiator,
	}
	if r.Target != nil {
		c.Target = int(min(*r.Target, machine.MaxTargets))
	}
	if r.TimeoutMs != 0 {
		c.Timeout = time.Duration(min(r.TimeoutMs, 1<<40)) * time.Millisecond
	}
	if err := c.Check(); err != nil {
		return c, fmt.Errorf("LUN %q: %w", r.Path, err)
	}
	if !filepath.IsAbs(c.Path) {
		return c, fmt.Errorf("LUN %q: give an absolute path: the guest's process is in another directory", c.Path)
	}
	return c, nil
}

func (s *service) DetachLun(ctx context.Context, r *connect.Request[vmmv1.DetachLunRequest]) (*connect.Response[vmmv1.DetachLunResponse], error) {
	timeout := machine.DetachTimeout
	if r.Msg.TimeoutMs != nil {
		timeout = time.Duration(*r.Msg.TimeoutMs) * time.Millisecond
	}
	if err := s.migration.plug(); err != nil {
		return nil, err
	}
	defer s.migration.unplug()
	left, err := s.machine.Detach(ctx, r.Msg.Id, timeout, r.Msg.Force)
	if err != nil {
		return nil, failed(err)
	}
	return connect.NewResponse(&vmmv1.DetachLunResponse{Left: left}), nil
}

// plug keeps migrations from beginning while the guest's list of LUNs changes:
// the other host makes its machine of that list. unplug ends it.
func (m *migrations) plug() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	switch {
	case m.blocked != nil:
		err = m.blocked
	case m.current != nil:
		err = fmt.Errorf("the guest is %s: its LUNs cannot change meanwhile", m.current.doing)
	default:
		m.plugging++
		return nil
	}
	return connect.NewError(connect.CodeFailedPrecondition, err)
}

func (m *migrations) unplug() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.plugging--
}

// errPlugging keeps a migration from beginning.
var errPlugging = errors.New("a LUN is being attached or detached: try again when that is done")
