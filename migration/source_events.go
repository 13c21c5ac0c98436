package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// send sends a message, if it may be sent now.
func (o *Outgoing) send(m *vmmv1.StreamMessage) error {
	if o.link == nil {
		return fmt.Errorf("%w: %w", errLink, whyLost(o.why))
	}
	next, err := o.state.step(sends, kindOf(m))
	if err != nil {
		return err
	}
	if err := o.link.send(m); err != nil {
		o.lose(err)
		return fmt.Errorf("%w: %w", errLink, whyLost(err))
	}
	o.state = next
	return nil
}

// lose ends the link. After COMMIT the machines go on as they must.
func (o *Outgoing) lose(err error) {
	if o.link == nil {
		return
	}
	o.why = err
	o.hangUp()
	if o.state == handed {
		o.change(func(s *pr.Source) { s.Lost() })
	}
}

func (o *Outgoing) hangUp() {
	if o.link != nil {
		o.link.close()
		o.link = nil
	}
	if o.pages != nil {
		for _, c := range o.pages.channels {
			c.conn.Close()
		}
	}
}

// receive takes a message of the destination.
func (o *Outgoing) receive(m *vmmv1.StreamMessage) error {
	next, err := o.state.step(receives, kindOf(m))
	if err != nil {
		return err
	}
	was := o.state
	o.state = next
	switch b := m.Body.(type) {
	case *vmmv1.StreamMessage_Welcome:
		o.welcome = b.Welcome
	case *vmmv1.StreamMessage_Refused:
		return fmt.Errorf("%w by the destination: %s", ErrRefused, sentence(b.Refused.Reason))
	case *vmmv1.StreamMessage_RoundDone:
		if was == revoking {
			return nil
		}
		if b.RoundDone.Round != uint32(o.rounds) {
			return errProtocol("round %d is complete; this is round %d", b.RoundDone.Round, o.rounds)
		}
		o.acked = b.RoundDone.Round
	case *vmmv1.StreamMessage_Reservation:
		if was == revoking {
			return nil
		}
		return o.takeover.deliver(b.Reservation, func(x *lunTakeover, m pr.Msg) { x.task.Machine.(*pr.Source).Receive(m) })
	case *vmmv1.StreamMessage_Ready:
		o.down.Load = time.Duration(b.Ready.LoadUs) * time.Microsecond
	case *vmmv1.StreamMessage_Running:
		o.down.Start = time.Duration(b.Running.StartUs) * time.Microsecond
		o.lag = time.Duration(min(b.Running.LagUs, micros(time.Since(o.committed)))) * time.Microsecond
		o.landed = b.Running.Luns
	case *vmmv1.StreamMessage_Aborted:
		o.reason = sentence(b.Aborted.Reason)
		if was != revoking && was != handed {
			return fmt.Errorf("the destination gave up: %s", o.reason)
		}
	case *vmmv1.StreamMessage_Undecided:
		o.reason = sentence(b.Undecided.Reason)
	}
	return nil
}

// sentence is a peer's text, bounded.
func sentence(s string) string {
	const most = 1000
	if len(s) > most {
		s = s[:most] + "..."
	}
	return s
}

// poll handles what has arrived without waiting.
func (o *Outgoing) poll() error {
	err := o.wait(0, func() bool { return false })
	if errors.Is(err, errLate) {
		return nil
	}
	return err
}

// wait handles what happens until until is true, d has passed (errLate), or
// something ends the migration. It is the only place where anything is heard.
func (o *Outgoing) wait(d time.Duration, until func() bool) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for !until() {
		if err := o.event(timer.C); err != nil {
			return err
		}
	}
	return nil
}

func (o *Outgoing) event(late <-chan time.Time) error {
	var in chan *vmmv1.StreamMessage
	var lost chan struct{}
	if o.link != nil {
		in, lost = o.link.in, o.link.lost
	}
	var reports chan report
	if o.takeover != nil {
		reports = o.takeover.reports
	}
	ended := o.life
	switch {
	case o.state == handed:
		ended = o.ctx
	case o.deaf:
		ended = context.Background()
	}
	force := o.force
	if o.forcing != nil {
		force = nil
	}
	select {
	case m := <-in:
		if err := o.receive(m); err != nil {
			if o.state == handed { // it has lost its right to be heard here
				o.lose(err)
				return nil
			}
			return err
		}
	case <-lost:
		err := o.link.err
		o.lose(err)
		if o.state == handed {
			return nil
		}
		return fmt.Errorf("%w: %w", errLink, whyLost(err))
	case m := <-o.answers:
		o.asking = false
		if m != nil && o.state == handed {
			return o.receive(m)
		}
	case r := <-reports:
		return o.reported(r)
	case err := <-o.working:
		o.working = nil
		return err
	case <-ended.Done():
		return context.Cause(ended)
	case done := <-force:
		if o.state != handed {
			done <- errors.New("the guest was not handed over: cancel the migration instead")
			return nil
		}
		if o.opts.Local {
			done <- errShared
			return nil
		}
		o.forcing = done
		o.takeover.change(func(x *lunTakeover) {
			x.task.Machine.(*pr.Source).Force()
			x.forced = true
		})
	case <-o.ticker.C:
		o.report()
	case <-late:
		return errLate
	}
	return nil
}

// reported takes what a LUN's machine says.
func (o *Outgoing) reported(r report) error {
	o.takeover.take(r)
	switch {
	case r.again && o.forcing != nil:
		o.forcing <- fmt.Errorf("LUN %s cannot be taken back now: its disk does not answer, or this host's journal cannot be written", r.lun.lun.ID)
		o.forcing = nil
	case r.kind == pr.Abort && o.state != handed:
		return fmt.Errorf("LUN %s: the disk does not say what the guest has, or the journal cannot be written", r.lun.lun.ID)
	case r.finished && o.state != handed && o.state != returned && o.state != revoking:
		return errors.New(r.outcome.Sentence(r.lun.lun.ID))
	}
	return nil
}

func (o *Outgoing) report() {
	if o.opts.Progress == nil {
		return
	}
	p := &o.progress
	if o.pages != nil {
		p.Sent = o.pages.sent.Load()
	}
	now := *p
	if took := time.Since(o.begun.at); !o.begun.at.IsZero() && took > 0 {
		now.Remaining -= min(o.pages.walked.Load()-o.begun.walked, p.Remaining)
		now.Bandwidth = uint64(float64(p.Sent-o.begun.sent) / took.Seconds())
	}
	o.opts.Progress(now)
}
