package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"vmm/doctor"
	"vmm/kvm/kvmtest"
)

// What a host is differs from host to host; the report's form does not.
func TestDoctorReport(t *testing.T) {
	can := false
	for file, format := range map[string]outputFormat{"doctor.json": "json", "doctor.txt": "text"} {
		var out bytes.Buffer
		err := printReport(&out, format, &doctor.Report{CanRun: true, CanMigrate: &can, Findings: []doctor.Finding{
			{Name: "kvm", Verdict: doctor.OK, Detail: "/dev/kvm is there and permitted"},
			{Name: "/dev/sg2", Verdict: doctor.Warn, Detail: "naa.6001405: it has no persistent reservations", Mend: "no cluster can fence with it"},
			{Name: "peer version", Verdict: doctor.Fail, Detail: "the other host speaks version 2 of the stream, this one version 1", Mend: "use the same version of vmm on both hosts"},
		}})
		if err != nil {
			t.Fatal(err)
		}
		compareGolden(t, file, out.Bytes())
	}
}

// Two hosts compared: this one with itself, where a vmm receive waits.
func TestDoctorPeer(t *testing.T) {
	kvmtest.NeedKVM(t)
	dir, err := os.MkdirTemp("", "vmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("VMM_RUN_DIR", dir)
	t.Setenv("VMM_STATE_DIR", t.TempDir())
	address := "unix://" + filepath.Join(dir, "in")
	ctx, cancel := context.WithCancel(t.Context())
	var says screen
	says.more.L = &says.mu
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{"receive", "--listen", address}, strings.NewReader(""), new(bytes.Buffer), &says)
	}()
	says.waitFor("waiting for a guest at")
	for _, test := range []struct {
		args []string
		want []string
	}{
		{nil, []string{
			`(?m)^ok    peer              .* waits for a guest, with vmm ` + regexp.QuoteMeta(version) + "$", `(?m)^ok    peer version      both speak version 1 of the stream$`,
			`(?m)^ok    peer processor    offers all that a guest here has$`, `(?m)^ok    peer tsc          both count \d+ kHz$`,
		}},
		{[]string{"-o", "json"}, []string{`"can_migrate": true`}},
		{nil, []string{`(?m)^ok    peer  `}}, // it waits on
	} {
		var out, errs bytes.Buffer
		run(t.Context(), append([]string{"doctor", "--peer", address}, test.args...), strings.NewReader(""), &out, &errs) // its status is about this host
		for _, want := range test.want {
			if !regexp.MustCompile(want).Match(out.Bytes()) {
				t.Errorf("vmm doctor --peer %v:\n%s%s\nwant %s", test.args, &out, &errs, want)
			}
		}
	}
	cancel()
	if status := <-ended; status != exitFailed {
		t.Errorf("vmm receive: status %d; want %d, for no guest came", status, exitFailed)
	}
}
