package control

import (
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"vmm/machine"
	"vmm/scsi"
	"vmm/virtio"
)

// MetricsPath is where the machine's metrics are, in Prometheus' format.
const MetricsPath = "/metrics"

// metricsHandler serves what has been counted, and the Go runtime's part. The
// data path keeps plain counters; they become metrics when somebody looks.
func (s *service) metricsHandler() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(metrics{s}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}

// metrics is a service as a prometheus.Collector.
type metrics struct{ *service }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// The metrics; docs/api.md explains them.
var (
	infoDesc  = desc("vmm_info", "What runs; always 1.", "name", "version")
	stateDesc = desc("vmm_state", "1 for the state that the guest is in.", "state")
	exitsDesc = desc("vmm_vcpu_exits_total", "Returns from KVM_RUN to user space.", "vcpu", "reason")

	requestsDesc = desc("vmm_lun_requests_total", "SCSI commands that have come back.", "lun", "queue", "operation")
	bytesDesc    = desc("vmm_lun_transferred_bytes_total", "Data transferred by them.", "lun", "queue", "operation")
	durationDesc = desc("vmm_lun_request_duration_seconds", "Time of a command in the monitor and the LUN, of one command in 32.", "lun", "queue")
	senseDesc    = desc("vmm_lun_check_conditions_total", "Commands that ended with CHECK CONDITION.", "lun", "sense_key")
	errorsDesc   = desc("vmm_lun_errors_total", "Commands that ended with another bad status, or without one.", "lun", "reason")
	outsDesc     = desc("vmm_lun_reservation_commands_total", "Commands of the guest that may change its reservation.", "lun", "action", "result")
	takeoverDesc = desc("vmm_lun_takeovers_total", "Migrations of a LUN's reservation, by how they ended for this process.", "lun", "outcome")

	phaseDesc      = desc("vmm_migration_phase", "1 for the phase of the migration away from here.", "phase")
	roundDesc      = desc("vmm_migration_round", "Round of the copy under way.")
	sentDesc       = desc("vmm_migration_sent_bytes", "Sent by the migration under way.")
	remainingDesc  = desc("vmm_migration_remaining_bytes", "What it has still to send.")
	migrationsDesc = desc("vmm_migrations_total", "Migrations away from here that have ended.", "result")

	descs = []*prometheus.Desc{
		infoDesc, stateDesc, exitsDesc, requestsDesc, bytesDesc, durationDesc, senseDesc, errorsDesc, outsDesc, takeoverDesc,
		phaseDesc, roundDesc, sentDesc, remainingDesc, migrationsDesc,
	}
)

// Describe implements prometheus.Collector.
func (metrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range descs {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (m metrics) Collect(out chan<- prometheus.Metric) {
	count := func(d *prometheus.Desc, n uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	gauge := func(d *prometheus.Desc, n float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, n, labels...)
	}
	oneOf := func(d *prometheus.Desc, is string, all ...string) {
		for _, name := range all {
			n := 0.0
			if name == is {
				n = 1
			}
			gauge(d, n, name)
		}
	}
	info := m.machine.Info()
	gauge(infoDesc, 1, info.Name, m.version)
	oneOf(stateDesc, info.State.String(), machine.StateStarting.String(), machine.StateRunning.String(), machine.StatePaused.String(), machine.StateEnded.String())

	x := m.machine.Metrics()
	for cpu, exits := range x.Exits {
		for reason, n := range exits {
			count(exitsDesc, n, strconv.Itoa(cpu), reason)
		}
	}
	for i := range x.LUNs {
		collectLUN(&x.LUNs[i], count, func(labels []string, n uint64, sum float64, buckets map[float64]uint64) {
			out <- prometheus.MustNewConstHistogram(durationDesc, n, sum, buckets, labels...)
		})
	}

	phase, p, results := m.migration.metrics()
	oneOf(phaseDesc, phase, phases...)
	gauge(roundDesc, float64(p.Round))
	gauge(sentDesc, float64(p.Sent))
	gauge(remainingDesc, float64(p.Remaining))
	for i, name := range migrationResults {
		count(migrationsDesc, results[i], name)
	}
}

// senseNames are the sense keys (SPC-5 4.4.8), in their order.
var senseNames = [16]string{
	"no_sense", "recovered_error", "not_ready", "medium_error", "hardware_error", "illegal_request", "unit_attention", "data_protect",
	"blank_check", "vendor_specific", "copy_aborted", "aborted_command", "reserved", "volume_overflow", "miscompare", "completed",
}

// outcomeNames are the outcomes that are errors.
var outcomeNames = map[scsi.Outcome]string{
	scsi.BadTarget: "bad_target", scsi.ResetOccurred: "reset", scsi.Aborted: "aborted", scsi.Busy: "transport_busy",
	scsi.TransportFailure: "transport_failure", scsi.Failure: "failure",
}

// collectLUN gives out what one LUN has counted.
func collectLUN(l *machine.LUNMetrics, count func(*prometheus.Desc, uint64, ...string), histogram func([]string, uint64, float64, map[float64]uint64)) {
	var senses [16]uint64
	failed := map[string]uint64{"reservation_conflict": 0, "busy": 0, "other_status": 0}
	for i := range l.Queues {
		q, queue := &l.Queues[i], strconv.Itoa(i)
		count(requestsDesc, q.Reads, l.ID, queue, "read")
		count(requestsDesc, q.Writes, l.ID, queue, "write")
		count(requestsDesc, q.Others, l.ID, queue, "other")
		count(bytesDesc, q.ReadBytes, l.ID, queue, "read")
		count(bytesDesc, q.WriteBytes, l.ID, queue, "write")
		for key, n := range q.Senses {
			senses[key] += n
		}
		failed["reservation_conflict"] += q.Conflicts
		failed["busy"] += q.Busy
		failed["other_status"] += q.Other
		for outcome, name := range outcomeNames {
			failed[name] += q.Outcomes[outcome]
		}
		buckets, n := map[float64]uint64{}, uint64(0)
		for b, in := range q.Latency {
			n += in
			if b < virtio.LatencyBuckets {
				buckets[virtio.LatencyBound(b).Seconds()] = n
			}
		}
		histogram([]string{l.ID, queue}, n, q.LatencySum.Seconds(), buckets)
	}
	for key, n := range senses {
		count(senseDesc, n, l.ID, senseNames[key])
	}
	for reason, n := range failed {
		count(errorsDesc, n, l.ID, reason)
	}
	for c, n := range l.Reservations {
		count(outsDesc, n, l.ID, c.Action, c.Result)
	}
	for outcome, n := range l.Takeovers {
		count(takeoverDesc, n, l.ID, outcome)
	}
}
