package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// take starts the reservations' machines, when the source's guest has stopped.
func (a *arrival) take() {
	a.takeover = newTakeover(len(a.luns))
	link := a.link
	for i, l := range a.luns {
		pair := a.pairs[i]
		if pair == nil {
			continue
		}
		m := pr.NewDest(pair)
		a.takeover.add(i, l, &m, nil, func(key pr.Key) pr.Ledger {
			own := *pair
			own.Old, own.New = pair.New, pair.Old
			return a.r.intents.For(entry(a.id, l, key, own))
		}, func(w *vmmv1.Reservation) error {
			return link.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Reservation{Reservation: w}})
		})
	}
}

func (a *arrival) change(f func(*pr.Dest)) {
	if a.takeover != nil {
		a.takeover.change(func(x *lunTakeover) { f(x.task.Machine.(*pr.Dest)) })
	}
}

// move takes the reservations over and lets the guest run: COMMIT has come.
func (a *arrival) move(ctx context.Context) (*Arrival, error) {
	a.doubt("the destination is moving the guest's reservations")
	ask, began := a.r.opts.Deadlines.Ask, time.Now()
	for _, x := range a.takeover.luns {
		x.began = began
	}
	a.takeover.change(func(x *lunTakeover) {
		x.ask = ask // from here on each question to the source is bounded by itself
		x.task.Machine.(*pr.Dest).Receive(pr.Msg{Kind: pr.Commit})
	})
	if a.link == nil {
		a.change(func(d *pr.Dest) { d.Lost() })
	}
	for !a.takeover.finished() {
		// Nothing ends this early: each machine ends by itself.
		if err := a.event(context.WithoutCancel(ctx), nil); err != nil {
			_ = a.lose(err)
		}
	}
	if a.takeover.blocked() {
		return nil, a.stick(a.takeover.failure())
	}
	a.takeover.settled()
	started := time.Now()
	if err := a.r.verdicts.note(a.id, verdictRunning, ""); err != nil {
		return nil, a.stick(err.Error())
	}
	since, err := a.machine.Run()
	if err != nil {
		if ferr := a.r.verdicts.forget(a.id); ferr != nil {
			err = errors.Join(err, ferr)
		}
		return nil, a.stick(err.Error())
	}
	for _, x := range a.takeover.luns {
		// The registration is the running guest's: no recovery may remove it.
		// An entry that stays is settled by looking, and by the verdict.
		if err := x.Erase(); err != nil {
			a.r.opts.Warn(err)
		}
	}
	m := &vmmv1.Running{StartUs: micros(since.Sub(started))}
	outcomes := a.takeover.outcomes()
	for _, l := range outcomes {
		m.Luns = append(m.Luns, &vmmv1.LunOutcome{Id: l.ID, Sentence: l.Sentence, TakeoverUs: micros(l.Takeover)})
	}
	m.LagUs = micros(time.Since(since))
	if a.link == nil || a.send(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Running{Running: m}}) != nil {
		a.state = running
	}
	a.takeover.close()
	a.closeData()
	return &Arrival{ID: a.id, Machine: a.machine, LUNs: outcomes}, nil
}

// stick ends a migration whose guest is neither here nor given back: the
// source is told, and keeps it stopped until its operator decides.
func (a *arrival) stick(why string) error {
	if a.link != nil {
		_ = a.send(undecided(why))
	}
	a.tearDown()
	return fmt.Errorf("%w: %s; 'vmm resume --force' on the source takes it back", ErrBlocked, why)
}

// linger keeps answering until the source has acknowledged RUNNING.
func (a *arrival) linger(ctx context.Context) {
	late := time.NewTimer(a.r.opts.Deadlines.Answer)
	defer late.Stop()
	defer a.hangUp()
	for a.state != over {
		var in chan *vmmv1.StreamMessage
		var lost chan struct{}
		if a.link != nil {
			in, lost = a.link.in, a.link.lost
		}
		select {
		case m := <-in:
			if next, err := a.state.step(receives, kindOf(m)); err == nil {
				a.state = next
			} else {
				a.hangUp()
			}
		case <-lost:
			a.hangUp()
		case d := <-a.r.data:
			d.conn.Close()
		case h := <-a.r.control:
			a.r.refuse(h.conn, h.id, "the guest that this destination waited for has arrived")
			h.conn.Close()
			h.files.close()
			a.r.end()
		case id := <-a.r.acked:
			if id == a.id {
				return
			}
		case <-late.C:
			return
		case <-ctx.Done():
			return
		}
	}
	if err := a.r.verdicts.forget(a.id); err != nil {
		a.r.opts.Warn(err)
	}
}

// abort undoes everything: COMMIT did not come, and if it comes the answer is
// ABORTED.
func (a *arrival) abort(cause error) error {
	if a.takeover != nil {
		a.change(func(d *pr.Dest) { d.Lost() })
		for !a.takeover.finished() {
			a.takeover.take(<-a.takeover.reports)
		}
	}
	if a.state != over && a.state != listening {
		why := cause.Error()
		if err := a.r.verdicts.note(a.id, verdictAborted, why); err != nil {
			// Nothing may be said then: the source asks again, or its
			// operator decides.
			cause = errors.Join(cause, err)
		} else if a.link != nil && a.send(abortedBecause(why)) == nil {
			a.lateCommit()
		}
	}
	a.tearDown()
	return cause
}

// lateCommit answers a COMMIT that was on its way when ABORTED was sent, and
// hears that the source knows.
func (a *arrival) lateCommit() {
	late := time.NewTimer(a.r.opts.Deadlines.Ask)
	defer late.Stop()
	for a.state == aborted {
		select {
		case m := <-a.link.in:
			next, err := a.state.step(receives, kindOf(m))
			if err != nil {
				return
			}
			a.state = next
			if kindOf(m) == kindCommit && a.send(abortedBecause("")) != nil {
				return
			}
		case <-a.marks: // what the source sent before it knew
		case <-a.link.lost:
			return
		case <-late.C:
			return
		}
	}
	_ = a.r.verdicts.forget(a.id) // it is harmless where it stays
}

// tearDown frees everything; nothing of the guest runs here.
func (a *arrival) tearDown() {
	if a.takeover != nil {
		a.takeover.close()
	}
	a.hangUp()
	a.closeData()
	if a.loading {
		<-a.loaded
	}
	if a.machine != nil {
		if err := a.machine.Close(); err != nil {
			a.r.opts.Warn(err)
		}
	}
}

// closeData ends the data connections and waits for their readers: nobody
// writes guest memory after it.
func (a *arrival) closeData() {
	for _, c := range a.conns {
		c.Close()
	}
	done := make(chan struct{})
	go func() { a.readers.Wait(); close(done) }()
	for {
		select {
		case <-a.marks:
		case <-done:
			return
		}
	}
}

func (a *arrival) hangUp() {
	if a.link != nil {
		a.link.close()
		a.link = nil
	}
}
