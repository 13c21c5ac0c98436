package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"

	vmmv1 "vmm/proto/vmm/v1"
)

// describe tells whoever asks what this host is. No migration is begun, and
// one that is under way does not notice.
func (r *receiver) describe(conn net.Conn) {
	if r.opts.Survey == nil {
		return
	}
	r.surveying.Lock()
	s := r.opts.Survey()
	r.surveying.Unlock()
	s.Version, s.Features = version, slices.Sorted(maps.Keys(features))
	if b, err := appendMessage(nil, s); err == nil {
		_, _ = conn.Write(b) // within the deadline of the greeting; else nobody waits for it
	}
}

// Survey asks the destination that waits at the end of dial (Dialer) what its
// host is. The answer is not trusted.
func Survey(ctx context.Context, dial func(context.Context) (net.Conn, error)) (*vmmv1.HostSurvey, error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	s := new(vmmv1.HostSurvey)
	if _, err = conn.Write(preamble{role: roleSurvey}.bytes()); err == nil {
		err = readProto(conn, maxHello, s)
	}
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("the other host gave no answer in time: %w", context.Cause(ctx))
	case errors.Is(err, io.EOF):
		return nil, errors.New("the other host ended the connection without an answer: its vmm may be older than this one")
	case err != nil:
		return nil, fmt.Errorf("the other host's answer: %w", err)
	}
	return s, nil
}

// Speaks says whether a source here and the host of s speak of a migration in
// the same way, and which features of the stream, that some guest may need,
// only this side knows.
func Speaks(s *vmmv1.HostSurvey) (unknown []string, err error) {
	if s.Version != version {
		return nil, fmt.Errorf("the other host speaks version %d of the stream, this one version %d", s.Version, version)
	}
	for _, f := range slices.Sorted(maps.Keys(features)) {
		if !slices.Contains(s.Features, f) {
			unknown = append(unknown, f)
		}
	}
	return unknown, nil
}
