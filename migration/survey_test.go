package migration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	vmmv1 "vmm/proto/vmm/v1"
)

func (r *rig) survey() (*vmmv1.HostSurvey, error) {
	r.Helper()
	dial, err := Dialer(r.listen, Security{}, "")
	if err != nil {
		r.Fatal(err)
	}
	return Survey(r.Context(), dial)
}

// A destination answers before a guest comes, and while one comes, and the
// guest comes all the same.
func TestSurvey(t *testing.T) {
	r := newRig(t, 1<<20)
	asked := 0
	r.recv.Survey = func() *vmmv1.HostSurvey {
		asked++
		return &vmmv1.HostSurvey{Host: fmt.Sprintf("host2, asked %d", asked)}
	}
	check := func(n int) {
		t.Helper()
		s, err := r.survey()
		if want := fmt.Sprintf("host2, asked %d", n); err != nil || s.Host != want || s.Version != version {
			t.Errorf("Survey() = %v, %v; want %q", s, err, want)
		}
		if unknown, err := Speaks(s); unknown != nil || err != nil {
			t.Errorf("Speaks(its own) = %v, %v; want that it does", unknown, err)
		}
	}
	arrived := r.receiving()
	check(1)
	r.src.inPause = func() { check(2) } // COMMIT is to come
	if _, err := r.migrate(); err != nil {
		t.Fatal(err)
	}
	if a := <-arrived; a == nil {
		t.Error("the guest did not arrive")
	}
}

func TestSurveyWithoutAnAnswer(t *testing.T) {
	r := newRig(t, 1<<20)
	r.receiving() // and Survey is nil, as though the host were an older one
	if _, err := r.survey(); err == nil || !strings.Contains(err.Error(), "may be older") {
		t.Errorf("Survey() of a host that does not know it: %v; want a hint at its age", err)
	}
	for what, answer := range map[string][]byte{
		"a message of": {0xff, 0xff, 0xff, 0xff},
		"is damaged":   {2, 0, 0, 0, 0xff, 0xff},
		"unexpected":   {5, 0, 0, 0, 1},
	} {
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			if p, err := readPreamble(there); err != nil || p.role != roleSurvey {
				t.Errorf("the question begins with %+v, %v", p, err)
			}
			_, _ = there.Write(answer) // it may be refused half-way
		}()
		_, err := Survey(t.Context(), func(context.Context) (net.Conn, error) { return here, nil })
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("Survey() answered with % x = %v; want %q", answer, err, what)
		}
	}
	// A host that says nothing, and a user who waits no longer.
	here, there := net.Pipe()
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		_, _ = readPreamble(there)
		cancel(errors.New("enough"))
	}()
	if _, err := Survey(ctx, func(context.Context) (net.Conn, error) { return here, nil }); err == nil || !strings.Contains(err.Error(), "no answer in time: enough") {
		t.Errorf("Survey() of a silent host = %v", err)
	}
}

func TestSpeaks(t *testing.T) {
	if _, err := Speaks(&vmmv1.HostSurvey{Version: version + 1}); err == nil || !strings.Contains(err.Error(), "the other host speaks version") {
		t.Errorf("Speaks(another version) = %v", err)
	}
	features["sound"] = true
	defer delete(features, "sound")
	if unknown, err := Speaks(&vmmv1.HostSurvey{Version: version}); err != nil || len(unknown) != len(features) {
		t.Errorf("Speaks(without features) = %v, %v; want %v", unknown, err, features)
	}
}
