package control

import (
	"context"
	"fmt"
	"path/filepath"

	"connectrpc.com/connect"

	"vmm/migration"
	vmmv1 "vmm/proto/vmm/v1"
)

// saveStep is how far a save is, in bytes.
type saveStep struct{ written, total uint64 }

func (s *service) Save(ctx context.Context, r *connect.Request[vmmv1.SaveRequest], out *connect.ServerStream[vmmv1.SaveResponse]) error {
	steps := make(latest[saveStep], 1)
	o, err := s.save(ctx, r.Msg, func(written, total uint64) { steps.put(saveStep{written, total}) })
	if err != nil {
		return err
	}
	err = steps.follow(ctx, o, func(p saveStep) error {
		return out.Send(&vmmv1.SaveResponse{Body: &vmmv1.SaveResponse_Progress{
			Progress: &vmmv1.SaveProgress{WrittenBytes: p.written, TotalBytes: p.total},
		}})
	})
	if err != nil {
		return err
	}
	return out.Send(&vmmv1.SaveResponse{Body: &vmmv1.SaveResponse_Summary{Summary: &vmmv1.SaveSummary{
		Id: o.saved.ID.String(), Path: o.saved.Path, Bytes: o.saved.Bytes, TotalUs: micros(o.saved.Total), Luns: lunMessages(o.saved.LUNs),
	}}})
}

// save begins to save the guest.
func (s *service) save(ctx context.Context, r *vmmv1.SaveRequest, progress func(written, total uint64)) (*outgoing, error) {
	if !filepath.IsAbs(r.Path) {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("file %q: give an absolute path: this process has a directory of its own", r.Path))
	}
	asked, cancel := context.WithCancel(ctx)
	defer cancel()
	life, giveUp := context.WithCancel(context.Background())
	o := &outgoing{giveUp: func() { cancel(); giveUp() }, doing: "being saved to " + r.Path, ended: make(chan struct{})}
	if err := s.migration.begin(o); err != nil {
		giveUp()
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	source, err := s.machine.Depart(asked)
	if err != nil {
		giveUp()
		s.migration.end(o)
		return nil, failed(err)
	}
	s.outlive(life, o, func(life context.Context) {
		defer giveUp()
		o.saved, o.err = migration.Save(life, source, r.Path, migration.SaveOptions{Force: r.Force, Progress: progress})
	})
	return o, nil
}
