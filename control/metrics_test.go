package control

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"vmm/control/controltest"
	"vmm/migration"
)

// documented are the names in docs/api.md's table.
func documented(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(vmm_[a-z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		names = append(names, m[1])
	}
	slices.Sort(names)
	return names
}

// Each metric that is documented is there, and each that is there is
// documented, with its labels.
func TestMetricsAreDocumented(t *testing.T) {
	s := &service{machine: controltest.New("web1"), version: "1.2.3"}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(metrics{s})
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		row := regexp.MustCompile("(?m)^\\| `" + f.GetName() + "` \\| ([a-z_, ]*) ?\\|").FindStringSubmatch(string(text))
		if row == nil {
			t.Errorf("%s is not in docs/api.md", f.GetName())
			continue
		}
		said := strings.FieldsFunc(row[1], func(r rune) bool { return r == ',' || r == ' ' })
		slices.Sort(said)
		if slices.Sort(labels); !slices.Equal(said, labels) {
			t.Errorf("%s has the labels %v; docs/api.md says %v", f.GetName(), labels, said)
		}
	}
	if got := documented(t); !slices.Equal(got, names) || len(names) != len(descs) {
		t.Errorf("docs/api.md has\n%v\nthe machine has\n%v\nwith %d descriptions", got, names, len(descs))
	}
}

func TestMetrics(t *testing.T) {
	dir, _ := serve(t, controltest.New("web1"))
	h := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", dir.Socket("web1"))
	}}}
	defer h.CloseIdleConnections()
	resp, err := h.Get("http://vmm" + MetricsPath)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d, %v: %s", resp.StatusCode, err, body)
	}
	for _, want := range []string{
		`vmm_info{name="web1",version="1.2.3"} 1`,
		`vmm_state{state="running"} 1`,
		`vmm_state{state="paused"} 0`,
		`vmm_vcpu_exits_total{reason="io",vcpu="1"} 1`,
		`vmm_lun_requests_total{lun="data",operation="write",queue="0"} 4`,
		`vmm_lun_requests_total{lun="data",operation="write",queue="1"} 0`,
		`vmm_lun_transferred_bytes_total{lun="root",operation="read",queue="0"} 20480`,
		`vmm_lun_request_duration_seconds_bucket{lun="data",queue="0",le="1.6384e-05"} 2`,
		`vmm_lun_request_duration_seconds_bucket{lun="data",queue="0",le="0.000262144"} 3`,
		`vmm_lun_request_duration_seconds_bucket{lun="data",queue="0",le="+Inf"} 4`,
		`vmm_lun_request_duration_seconds_sum{lun="data",queue="0"} 0.003`,
		`vmm_lun_check_conditions_total{lun="data",sense_key="unit_attention"} 2`,
		`vmm_lun_errors_total{lun="data",reason="aborted"} 1`,
		`vmm_lun_errors_total{lun="data",reason="reservation_conflict"} 1`,
		`vmm_lun_reservation_commands_total{action="register",lun="data",result="good"} 1`,
		`vmm_migration_phase{phase="none"} 1`,
		`vmm_migrations_total{result="failed"} 0`,
	} {
		if !strings.Contains(string(body), "\n"+want+"\n") {
			t.Errorf("no line %s", want)
		}
	}
	for _, name := range []string{"go_goroutines ", "process_open_fds "} {
		if !strings.Contains(string(body), "\n"+name) {
			t.Errorf("no metric %s", name)
		}
	}
}

func TestMigrationMetrics(t *testing.T) {
	var m migrations
	expect := func(phase string, round int, results [3]uint64) {
		t.Helper()
		p, progress, r := m.metrics()
		if p != phase || progress.Round != round || r != results {
			t.Errorf("metrics() = %s, round %d, %v; want %s, %d, %v", p, progress.Round, r, phase, round, results)
		}
	}
	begin := func() *outgoing {
		o := &outgoing{to: "host2:4444", ended: make(chan struct{})}
		if err := m.begin(o); err != nil {
			t.Fatal(err)
		}
		return o
	}
	expect(phaseNone, 0, [3]uint64{})
	o := begin()
	expect(phasePreparing, 0, [3]uint64{})
	o.progress = migration.Progress{Round: 2}
	expect(phaseCopying, 2, [3]uint64{})
	o.progress.HandedOver = "no answer"
	expect(phaseHandedOver, 2, [3]uint64{})
	o.err = migration.ErrRefused
	m.end(o)
	expect(phaseNone, 0, [3]uint64{0, 1, 0})
	o = begin()
	o.to = ""
	expect(phaseSaving, 0, [3]uint64{0, 1, 0})
	m.end(o)
	expect(phaseNone, 0, [3]uint64{0, 1, 0})
	m.end(begin()) // the disks said no: it did not get as far as an error of its own
	expect(phaseNone, 0, [3]uint64{0, 2, 0})
	o = begin()
	o.summary.ID[0] = 1
	m.end(o)
	expect(phaseNone, 0, [3]uint64{1, 2, 0})
	o = begin()
	o.err = migration.ErrBlocked
	m.end(o)
	expect(phaseBlocked, 0, [3]uint64{1, 2, 1})
}
