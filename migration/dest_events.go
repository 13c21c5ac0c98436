package migration

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// lose ends the link and says why.
func (a *arrival) lose(err error) error {
	if a.link != nil {
		a.why = err
		a.hangUp()
		if a.state == moving {
			a.change(func(d *pr.Dest) { d.Lost() })
		}
	}
	return fmt.Errorf("%w: %w", errLink, whyLost(a.why))
}

func (a *arrival) doubt(why string) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.r.doubt = why
}

func (a *arrival) send(m *vmmv1.StreamMessage) error {
	if a.link == nil {
		return fmt.Errorf("%w: %w", errLink, whyLost(a.why))
	}
	next, err := a.state.step(sends, kindOf(m))
	if err != nil {
		return err
	}
	if err := a.link.send(m); err != nil {
		return a.lose(err)
	}
	a.state = next
	return nil
}

// wait handles what happens until until is true, d has passed (errLate), or
// something ends the migration.
func (a *arrival) wait(ctx context.Context, d time.Duration, until func() bool) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for !until() {
		if err := a.event(ctx, timer.C); err != nil {
			return err
		}
	}
	return nil
}

func (a *arrival) event(ctx context.Context, late <-chan time.Time) error {
	var in chan *vmmv1.StreamMessage
	var lost chan struct{}
	if a.link != nil {
		in, lost = a.link.in, a.link.lost
	}
	var reports chan report
	if a.takeover != nil {
		reports = a.takeover.reports
	}
	select {
	case m := <-in:
		return a.receive(m)
	case <-lost:
		err := a.lose(a.link.err)
		if a.state == moving {
			return nil
		}
		return err
	case m := <-a.marks:
		return a.marked(m)
	case d := <-a.r.data:
		d.conn.Close()
	case <-a.r.acked:
	case r := <-reports:
		a.takeover.take(r)
		if why := a.takeover.failure(); why != "" && a.state != moving {
			return errors.New(why)
		}
	case err := <-a.loaded:
		a.loading = false
		if err != nil {
			return fmt.Errorf("load the guest's state: %w", err)
		}
	case <-late:
		return errLate
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// receive takes a message of the source.
func (a *arrival) receive(m *vmmv1.StreamMessage) error {
	next, err := a.state.step(receives, kindOf(m))
	if err != nil {
		return err
	}
	a.state = next
	switch b := m.Body.(type) {
	case *vmmv1.StreamMessage_Hello:
		a.hello = b.Hello
	case *vmmv1.StreamMessage_Progress:
		if a.r.opts.Progress != nil {
			p := b.Progress
			a.r.opts.Progress(Progress{Round: int(p.Round), Remaining: p.RemainingBytes, Sent: p.SentBytes})
		}
	case *vmmv1.StreamMessage_Attachment:
		return a.attach(b.Attachment)
	case *vmmv1.StreamMessage_State:
		if err := a.attached(); err != nil {
			return err
		}
		if b.State.Machine == nil || (b.State.LastRound == 0) != a.local || b.State.LastRound < a.round {
			return errProtocol("round %d is to be the last after round %d", b.State.LastRound, a.round)
		}
		a.saved, a.last = b.State.Machine, b.State.LastRound
		a.take()
	case *vmmv1.StreamMessage_Reservation:
		if a.takeover == nil {
			return nil
		}
		senses, err := decodeSenses(b.Reservation.Attentions)
		if err != nil {
			return err
		}
		return a.takeover.deliver(b.Reservation, func(x *lunTakeover, m pr.Msg) {
			if m.Kind == pr.State {
				x.key, x.came = m.Key, senses
			}
			x.task.Machine.(*pr.Dest).Receive(m)
		})
	case *vmmv1.StreamMessage_Abort:
		return fmt.Errorf("the source gave up: %s", sentence(b.Abort.Reason))
	}
	return nil
}

// attached checks that the attachments are complete, and what was offered.
func (a *arrival) attached() error {
	for _, f := range a.files {
		if f.have {
			continue
		}
		if f.left > 0 {
			return errProtocol("attachment %s lacks %d bytes", f.name, f.left)
		}
		if got := [sha256.Size]byte(f.hash.Sum(nil)); got != f.want {
			return fmt.Errorf("attachment %s has digest %x, and was offered with %x: did the file change on the source?", f.name, got, f.want)
		}
	}
	return nil
}

func (a *arrival) attach(c *vmmv1.AttachmentChunk) error {
	if uint64(c.Attachment) >= uint64(len(a.files)) {
		return errProtocol("a part of attachment %d of %d", c.Attachment, len(a.files))
	}
	f := a.files[c.Attachment]
	if uint64(len(c.Data)) > f.left {
		return errProtocol("%d bytes more of attachment %s, which lacks %d", len(c.Data), f.name, f.left)
	}
	f.left -= uint64(len(c.Data))
	a.bytes.Add(uint64(len(c.Data)))
	if f.have { // the source is older than Welcome.have
		return nil
	}
	f.hash.Write(c.Data)
	if err := a.machine.Attach(int(c.Attachment), c.Data); err != nil {
		return fmt.Errorf("attachment %s: %w", f.name, err)
	}
	return nil
}
