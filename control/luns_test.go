package control

import (
	"context"
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vmm/control/controltest"
	vmmv1 "vmm/proto/vmm/v1"
)

func TestAttachAndDetachLun(t *testing.T) {
	t.Setenv("VMM_STATE_DIR", t.TempDir())
	_, c := serve(t, controltest.New("web1"))
	target := func(n uint32) *uint32 { return &n }
	for _, test := range []struct {
		name string
		ask  *vmmv1.AttachLunRequest
		want connect.Code // 0: it is attached
	}{
		{"no path", &vmmv1.AttachLunRequest{}, connect.CodeInvalidArgument},
		{"a path of another directory", &vmmv1.AttachLunRequest{Path: "a.img"}, connect.CodeInvalidArgument},
		{"a target that does not exist", &vmmv1.AttachLunRequest{Path: "/a", Target: target(256)}, connect.CodeInvalidArgument},
		{"too long", &vmmv1.AttachLunRequest{Path: "/a", TimeoutMs: 1 << 63}, connect.CodeInvalidArgument},
		{"its target is taken", &vmmv1.AttachLunRequest{Path: "/a", Target: target(1)}, connect.CodeAlreadyExists},
		{"any target", &vmmv1.AttachLunRequest{Path: "/a"}, 0},
		{"target 3", &vmmv1.AttachLunRequest{Path: "/b", Id: "b", Target: target(3)}, 0},
	} {
		r, err := c.AttachLun(t.Context(), request(test.ask))
		if test.want != 0 {
			if connect.CodeOf(err) != test.want {
				t.Errorf("%s: AttachLun() = %v; want %v", test.name, err, test.want)
			}
		} else if err != nil || r.Msg.Lun.Path != test.ask.Path || test.ask.Target != nil && r.Msg.Lun.Target != *test.ask.Target {
			t.Errorf("%s: AttachLun() = %v, %v", test.name, r, err)
		}
	}
	for _, test := range []struct {
		id    string
		force bool
		want  connect.Code
	}{
		{"nobody", false, connect.CodeNotFound},
		{"data", false, connect.CodeFailedPrecondition},
		{"data", true, 0},
		{"b", false, 0},
		{"b", false, connect.CodeNotFound},
	} {
		_, err := c.DetachLun(t.Context(), request(&vmmv1.DetachLunRequest{Id: test.id, Force: test.force}))
		if test.want == 0 && err != nil || test.want != 0 && connect.CodeOf(err) != test.want {
			t.Errorf("DetachLun(%s, force %v) = %v; want code %v", test.id, test.force, err, test.want)
		}
	}
}

// slowPlug is a machine whose LUNs come and go when the test says so.
type slowPlug struct {
	*controltest.Machine
	begun, end chan struct{}
}

func (m *slowPlug) Detach(context.Context, string, time.Duration, bool) ([]string, error) {
	close(m.begun)
	<-m.end
	return nil, nil
}

// The list of LUNs does not change while a guest migrates, and no migration
// begins while it changes.
func TestLunsAndMigrationExcludeEachOther(t *testing.T) {
	t.Setenv("VMM_STATE_DIR", t.TempDir())
	m := &slowPlug{controltest.New("web1"), make(chan struct{}), make(chan struct{})}
	s := &service{machine: m}
	done := make(chan error)
	go func() {
		_, err := s.DetachLun(t.Context(), request(&vmmv1.DetachLunRequest{Id: "root"}))
		done <- err
	}()
	<-m.begun
	o := &outgoing{doing: "migrating to host2:4444", ended: make(chan struct{})}
	if err := s.migration.begin(o); !errors.Is(err, errPlugging) {
		t.Errorf("begin() while a LUN is detached = %v; want %v", err, errPlugging)
	}
	close(m.end)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := s.migration.begin(o); err != nil {
		t.Fatal(err)
	}
	want := "failed_precondition: the guest is migrating to host2:4444: its LUNs cannot change meanwhile"
	if _, err := s.AttachLun(t.Context(), request(&vmmv1.AttachLunRequest{Path: "/a"})); err == nil || err.Error() != want {
		t.Errorf("AttachLun() while the guest migrates = %v; want %s", err, want)
	}
	if _, err := s.DetachLun(t.Context(), request(&vmmv1.DetachLunRequest{Id: "root"})); err == nil || err.Error() != want {
		t.Errorf("DetachLun() while the guest migrates = %v; want %s", err, want)
	}
	s.migration.end(o)
	if _, err := s.AttachLun(t.Context(), request(&vmmv1.AttachLunRequest{Path: "/a"})); err != nil {
		t.Errorf("AttachLun() after the migration = %v", err)
	}
	if got := len(m.Info().LUNs); got != 3 {
		t.Errorf("the guest has %d LUNs; want 3", got)
	}
}
