// Package doctor examines a host: whether guests can run on it, what they can
// be given, and whether they can migrate to another one. It changes nothing:
// of the commands for reservations it sends PERSISTENT RESERVE IN alone, and
// what a guest has is asked through that guest's process.
package doctor

import (
	"context"
	"strings"
	"time"
	"unicode"

	"vmm/control"
)

// Verdict grades a Finding.
type Verdict string

const (
	OK   Verdict = "ok"
	Warn Verdict = "warn" // guests run, but something a user may want does not
	Fail Verdict = "fail" // guests cannot run here, or cannot migrate there
)

// Finding is one thing that was looked at.
type Finding struct {
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
	Mend    string  `json:"mend,omitempty"` // what the user can do
}

// Options say what to look at beside the host itself.
type Options struct {
	TLSDir string // directory with ca.pem, cert.pem and key.pem; empty: none
}

// Report is the result of an examination.
type Report struct {
	CanRun     bool      `json:"can_run"`               // guests can run on this host
	CanMigrate *bool     `json:"can_migrate,omitempty"` // and migrate to the peer; nil: no peer was asked
	Findings   []Finding `json:"findings"`
}

// Examine looks at this host.
func Examine(ctx context.Context, o Options) *Report {
	h := host{kvm: "/dev/kvm", root: "/", now: time.Now()}
	r := &Report{}
	r.Findings = append(r.Findings, h.examineKVM()...)
	r.Findings = append(r.Findings, h.examineMemory(), h.examineHugePages(), examineLimits())
	run, runDir := examineRunDir()
	r.Findings = append(r.Findings, runDir)
	r.Findings = append(r.Findings, examineState(control.StateDir())...)
	tls := h.examineTLS(o.TLSDir)
	luns := h.examineLUNs(ctx, run)
	r.CanRun = !failed(r.Findings) && !failed(luns) // without TLS they run, and stay
	r.Findings = append(append(r.Findings, tls...), luns...)
	return r
}

// Compare adds what came of asking a peer.
func (r *Report) Compare(peer []Finding) {
	can := !failed(peer)
	r.CanMigrate = &can
	r.Findings = append(r.Findings, peer...)
}

// Healthy says that nothing failed.
func (r *Report) Healthy() bool { return !failed(r.Findings) }

func failed(found []Finding) bool {
	for _, f := range found {
		if f.Verdict == Fail {
			return true
		}
	}
	return false
}

// foreign is a text from elsewhere, a device or another host, fit for a
// terminal: on one line, and nothing in it acts.
func foreign(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}
