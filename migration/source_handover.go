package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// switchOver stops the guest and sends the rest: state, then last pages.
func (o *Outgoing) switchOver(log DirtyLog) error {
	o.unthrottle()
	o.src.GiveWay(false) // it is to stop at once
	o.pages.limit.set(0)
	if err := o.halt(uint32(o.rounds + 1)); err != nil {
		return err
	}
	at := time.Now()
	if _, err := log.Collect(); err != nil {
		return err
	}
	err := o.sendRound(log, time.Now().Add(o.opts.Deadlines.Ready))
	o.down.Pages = time.Since(at)
	return err
}

// halt stops the guest and sends its state. The reservations are read while
// the last pages, if any, are on their way.
func (o *Outgoing) halt(lastRound uint32) error {
	ctx, done := context.WithTimeout(o.life, o.opts.Deadlines.Drain)
	defer done()
	var err error
	if o.pausedAt, err = o.src.Pause(ctx); err != nil {
		return fmt.Errorf("stop the guest: %w", err)
	}
	o.paused = true
	o.down.Stop = time.Since(o.pausedAt)
	at := time.Now()
	machine, err := o.src.Save()
	if err != nil {
		return fmt.Errorf("save the guest's state: %w", err)
	}
	o.down.Save = time.Since(at)
	blob := &vmmv1.FinalState{Machine: machine, LastRound: lastRound}
	if err := o.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_State{State: blob}}); err != nil {
		return err
	}
	o.take()
	return nil
}

// take starts the reservations' machines.
func (o *Outgoing) take() {
	luns := o.src.LUNs()
	o.takeover = newTakeover(len(luns))
	for i, l := range luns {
		pair, err := pairOf(offerLUN(l), o.welcome.Luns[i])
		if err != nil || pair == nil { // an error was one in negotiate
			continue
		}
		var key pr.Key
		if l.Tracked != nil {
			key = l.Tracked().Key
		}
		m := pr.NewSource(pair, key)
		link := o.link // lose makes o.link nil
		o.takeover.add(i, l, &m, nil, func(key pr.Key) pr.Ledger {
			return o.opts.Journal.For(entry(o.id, l, key, *pair))
		}, func(w *vmmv1.Reservation) error {
			return link.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Reservation{Reservation: w}})
		})
	}
}

// stop waits for READY.
func (o *Outgoing) stop() error {
	return o.wait(o.opts.Deadlines.Ready, func() bool { return o.state == willing })
}

// hand notes the hand-over for each LUN, then commits.
func (o *Outgoing) hand() error {
	o.change(func(s *pr.Source) { s.Receive(pr.Msg{Kind: pr.Ready}); s.Commit() })
	if err := o.wait(o.opts.Deadlines.Ready, func() bool { return o.takeover.all(pr.Commit) }); err != nil {
		return err
	}
	next, err := o.state.step(sends, kindCommit)
	if err != nil {
		return err
	}
	// Whatever becomes of the message, it may have arrived.
	o.state, o.committed = next, time.Now()
	if err := o.link.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Commit{Commit: &vmmv1.Commit{}}}); err != nil {
		o.lose(err)
	}
	return nil
}

// settle finds out what became of a guest that was handed over.
func (o *Outgoing) settle() error {
	asked := time.Now().Add(o.opts.Deadlines.Running)
	for o.state == handed {
		taken := func() bool { return o.forcing != nil && o.takeover.finished() }
		err := o.wait(o.opts.Deadlines.Ask, func() bool { return o.state != handed || taken() || o.link == nil && !o.asking })
		switch {
		case o.state != handed:
		case taken():
			return o.forced()
		case err != nil && !errors.Is(err, errLate):
			way := "'vmm resume --force' takes it back if the destination is dead, 'vmm stop' gives it up"
			if o.opts.Local {
				way = errShared.Error()
			}
			return fmt.Errorf("%w: %s; %s", ErrHandedOver, o.doubt(), way)
		case o.asking:
		case o.link == nil || time.Now().After(asked):
			o.ask()
			o.progress.HandedOver = o.doubt()
			o.report()
		}
	}
	if o.forcing != nil { // it has become unnecessary, or is too late
		o.forcing <- errors.New("the destination has answered")
		o.forcing = nil
	}
	if o.state == gone {
		return o.leave()
	}
	// The destination never ran it.
	o.change(func(s *pr.Source) { s.Receive(pr.Msg{Kind: pr.Aborted}) })
	return o.resume(fmt.Errorf("the destination gave up: %s", o.reason))
}

// doubt is why nothing is known of a guest that was handed over.
func (o *Outgoing) doubt() string {
	switch {
	case o.reason != "":
		return o.reason
	case o.why != nil:
		return whyLost(o.why).Error()
	}
	return errLate.Error()
}

// ask asks the destination on a connection of its own. The answer comes out of
// o.answers, nil if there is none; an unsuccessful attempt takes at least as
// long as the deadline of one, so that a dead destination is not flooded.
func (o *Outgoing) ask() {
	o.asking = true
	d := o.opts.Deadlines.Ask
	ctx, done := context.WithTimeout(o.ctx, d)
	go func() {
		defer done()
		m, err := o.question(ctx, d)
		if err != nil {
			m = nil
			<-ctx.Done()
		}
		o.answers <- m
	}()
}

func (o *Outgoing) question(ctx context.Context, d time.Duration) (*vmmv1.StreamMessage, error) {
	conn, err := o.open(ctx, preamble{role: roleQuery})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	l := newLink(conn, o.id, d)
	defer l.close()
	if err := l.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Query{Query: &vmmv1.Query{}}}); err != nil {
		return nil, err
	}
	select {
	case m := <-l.in:
		switch kindOf(m) {
		case kindRunning, kindAborted:
			// From here on nobody will ask again.
			_ = l.send(acknowledge())
		case kindUndecided:
			<-ctx.Done() // then ask again
		default:
			return nil, errProtocol("%v in answer to a question", kindOf(m))
		}
		return m, nil
	case <-l.lost:
		return nil, l.err
	}
}

func acknowledge() *vmmv1.StreamMessage {
	return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Acknowledge{Acknowledge: &vmmv1.Acknowledge{}}}
}

// leave ends a migration whose guest runs at the destination: registrations
// that stayed behind here are removed.
func (o *Outgoing) leave() error {
	o.down.Total = time.Since(o.pausedAt) - o.lag
	if o.link != nil {
		_ = o.send(acknowledge()) // otherwise the destination stops waiting by itself
	}
	o.change(func(s *pr.Source) { s.Receive(pr.Msg{Kind: pr.Running}) })
	o.drainReports(o.takeover.finished)
	return nil
}

// forced ends a migration whose guest the operator has taken back.
func (o *Outgoing) forced() error {
	o.lose(errLink)
	o.state = returned
	err := o.resume(errors.New("the operator states that the destination is dead"))
	var failed error
	if !errors.Is(err, ErrKept) {
		failed = err
	}
	o.forcing <- failed
	o.forcing = nil
	return err
}

// rollBack gives the guest back to this host; cause is why.
func (o *Outgoing) rollBack(cause error) error {
	early := o.takeover == nil
	if o.link != nil && o.state != returned {
		abort := &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Abort{Abort: &vmmv1.Abort{Reason: cause.Error()}}}
		if o.state == offering || o.send(abort) != nil {
			o.lose(errLink)
		} else {
			// A canceled migration waits for this, too: it is short.
			o.deaf = true
			_ = o.wait(o.opts.Deadlines.Ask, func() bool { return o.state != revoking })
		}
	}
	if !early {
		heard := o.state == returned
		o.change(func(s *pr.Source) {
			// COMMIT was never sent, so a machine that was ready to send it
			// may take it for refused.
			if heard || s.HandedOver() {
				s.Receive(pr.Msg{Kind: pr.Aborted})
			} else {
				s.Lost()
			}
		})
	}
	o.state = returned
	if errors.Is(cause, ErrRefused) {
		return cause
	}
	return o.resume(cause)
}

// resume lets the guest run here again, once the reservations are known to be
// what they should.
func (o *Outgoing) resume(cause error) error {
	if o.link != nil {
		_ = o.send(acknowledge())
	}
	o.unthrottle()
	if o.takeover != nil {
		o.drainReports(o.takeover.finished)
		if o.takeover.blocked() {
			return fmt.Errorf("%w: %s (%w)", ErrBlocked, o.takeover.failure(), cause)
		}
		o.takeover.settled()
	}
	if o.paused {
		if err := o.src.Resume(); err != nil {
			return fmt.Errorf("%w: resume: %w (%w)", ErrBlocked, err, cause)
		}
		o.paused = false
	}
	return fmt.Errorf("%w: %w", ErrKept, cause)
}

func (o *Outgoing) unthrottle() {
	if o.throttled > 0 {
		o.throttled = 0
		o.src.Throttle(0)
	}
}

// change has every LUN's machine changed.
func (o *Outgoing) change(f func(*pr.Source)) {
	if o.takeover == nil {
		return
	}
	o.takeover.change(func(x *lunTakeover) { f(x.task.Machine.(*pr.Source)) })
}

// drainReports waits for the machines alone: nothing can interrupt what they
// do then, and each of their commands has its deadline.
func (o *Outgoing) drainReports(until func() bool) {
	for !until() {
		o.takeover.take(<-o.takeover.reports)
	}
}
