package migration

import (
	"context"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

// anyMessage draws a message of any kind, with fields that mean something more
// often than not.
func anyMessage(t *rapid.T, luns []*vmmv1.HostLun) *vmmv1.StreamMessage {
	small := rapid.Uint32Range(0, 3)
	switch k := kind(rapid.IntRange(int(kindHello)-1, int(kinds)-1).Draw(t, "kind")); k {
	case kindWelcome:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Welcome{Welcome: &vmmv1.Welcome{
			Version: 1, Luns: luns[:rapid.IntRange(0, len(luns)).Draw(t, "luns")],
		}}}
	case kindRefused:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Refused{Refused: &vmmv1.Refused{Reason: "no"}}}
	case kindProgress:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Progress{Progress: &vmmv1.Progress{Round: small.Draw(t, "round")}}}
	case kindRoundDone:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_RoundDone{RoundDone: &vmmv1.RoundDone{Round: small.Draw(t, "round")}}}
	case kindState:
		s := &vmmv1.FinalState{LastRound: small.Draw(t, "last round")}
		if rapid.Bool().Draw(t, "machine") {
			s.Machine = &vmmv1.MachineState{}
		}
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_State{State: s}}
	case kindReservation:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Reservation{Reservation: &vmmv1.Reservation{
			Lun: small.Draw(t, "lun"), Step: vmmv1.Reservation_Step(rapid.IntRange(0, 7).Draw(t, "step")),
			Result: vmmv1.Reservation_Result(rapid.IntRange(0, 4).Draw(t, "result")), Type: 5, Key: uint64(keyGuest),
		}}}
	case kindReady:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Ready{Ready: &vmmv1.Ready{}}}
	case kindCommit:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Commit{Commit: &vmmv1.Commit{}}}
	case kindRunning:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Running{Running: &vmmv1.Running{}}}
	case kindAborted:
		return abortedBecause("no")
	case kindAbort:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Abort{Abort: &vmmv1.Abort{}}}
	case kindAcknowledge:
		return acknowledge()
	case kindUndecided:
		return undecided("perhaps")
	case kindAttachment:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Attachment{Attachment: &vmmv1.AttachmentChunk{Attachment: small.Draw(t, "file"), Data: []byte("x")}}}
	case kindHello:
		return &vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Hello{Hello: &vmmv1.Hello{}}}
	}
	return new(vmmv1.StreamMessage) // of a later version
}

func hostLUNs(l []*LUN) (w []*vmmv1.HostLun) {
	for _, l := range l {
		w = append(w, offerLUN(l))
	}
	return w
}

// A source that says anything in any order gets no guest run that it has not
// committed, and leaves no registration behind.
func TestHostileSource(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := reserved(pr.WriteExclusiveRegistrantsOnly)
		r := newRig(t, 1<<20, d)
		r.src.g.runs.Store(0) // whoever runs it is the first
		r.recv.Deadlines = shortly
		r.recv.Warn = nil
		ln, err := Listen(r.listen, Security{}, nil)
		if err != nil {
			rt.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		arrived := make(chan *Arrival, 1)
		go func() {
			a, _ := Receive(ctx, ln, r.host, r.recv)
			if a != nil {
				<-ctx.Done()
				a.Leave()
				a.Machine.Close()
			}
			arrived <- a
		}()
		o := r.outgoing()
		conn, err := o.open(ctx, preamble{role: roleControl})
		if err != nil {
			rt.Fatal(err)
		}
		hello := &vmmv1.Hello{
			Version: 1, Channels: 1, Config: r.src.Config(), Luns: hostLUNs(r.src.luns),
			Regions: []*vmmv1.MemoryRegion{{Size: 1 << 20}},
		}
		say := func(m *vmmv1.StreamMessage) bool {
			m.Id = o.id[:]
			b, err := appendMessage(nil, m)
			if err != nil {
				rt.Fatal(err)
			}
			_, err = conn.Write(b)
			return err == nil
		}
		say(&vmmv1.StreamMessage{Body: &vmmv1.StreamMessage_Hello{Hello: hello}})
		if m, err := readMessage(conn, maxMessage); err != nil || kindOf(m) != kindWelcome {
			rt.Fatalf("the destination answers %v, %v", m, err)
		}
		data, err := o.open(ctx, preamble{role: roleData})
		if err != nil {
			rt.Fatal(err)
		}
		c := &channel{conn: data, idle: time.Second}
		for round := range rapid.Uint32Range(0, 3).Draw(rt, "rounds") {
			if err := c.end(round + 1); err != nil {
				rt.Fatal(err)
			}
		}
		// It begins as it should, up to some point.
		list := []*vmmv1.StreamMessage{
			{Body: &vmmv1.StreamMessage_State{State: &vmmv1.FinalState{Machine: &vmmv1.MachineState{}, LastRound: 1}}},
			{Body: &vmmv1.StreamMessage_Reservation{Reservation: encodeReservation(0, pr.Msg{Kind: pr.State, Key: keyGuest})}},
			{Body: &vmmv1.StreamMessage_Reservation{Reservation: encodeReservation(0, pr.Msg{Kind: pr.Proved})}},
			{Body: &vmmv1.StreamMessage_Commit{Commit: &vmmv1.Commit{}}},
		}[:rapid.IntRange(0, 4).Draw(rt, "honest")]
		for range rapid.IntRange(0, 6).Draw(rt, "messages") {
			list = append(list, anyMessage(rt, hello.Luns))
		}
		committed := false
		for _, m := range list {
			if !say(m) {
				break
			}
			committed = committed || kindOf(m) == kindCommit
		}
		// Long enough for an answer, mostly; what it is does not matter.
		if err := conn.SetReadDeadline(time.Now().Add(shortly.Ask)); err == nil {
			_, _ = io.Copy(io.Discard, conn)
		}
		conn.Close()
		data.Close()
		cancel()
		ran := false
		within(t, "the destination's end", func() {
			ran = <-arrived != nil
		})
		if ran && !committed {
			rt.Error("the guest runs, and nobody has committed it")
		}
		if d.key(nexD) != 0 && !ran {
			rt.Errorf("the destination is registered with %v, and does not run the guest", d.key(nexD))
		}
	})
}

// A destination that says anything in any order gets no second run of the
// guest, and takes nothing from it before COMMIT.
func TestHostileDestination(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := reserved(pr.WriteExclusiveRegistrantsOnly)
		r := newRig(t, 1<<20, d)
		r.opts.Deadlines = shortly
		near, far := net.Pipe()
		first := true
		r.opts.Dial = func(context.Context) (net.Conn, error) {
			if first {
				first = false
				return near, nil
			}
			a, b := net.Pipe()
			go discard(b)
			return a, nil
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		o := r.outgoing()
		var list []*vmmv1.StreamMessage
		list = append(list, []*vmmv1.StreamMessage{
			{Body: &vmmv1.StreamMessage_Welcome{Welcome: &vmmv1.Welcome{Version: 1, Luns: hostLUNs(r.host.luns)}}},
			{Body: &vmmv1.StreamMessage_RoundDone{RoundDone: &vmmv1.RoundDone{Round: 1}}},
			{Body: &vmmv1.StreamMessage_RoundDone{RoundDone: &vmmv1.RoundDone{Round: 2}}},
			{Body: &vmmv1.StreamMessage_Reservation{Reservation: encodeReservation(0, pr.Msg{Kind: pr.AskProof, Key: keyGuest})}},
			{Body: &vmmv1.StreamMessage_Ready{Ready: &vmmv1.Ready{}}},
		}[:rapid.IntRange(0, 5).Draw(rt, "honest")]...)
		for range rapid.IntRange(0, 8).Draw(rt, "messages") {
			list = append(list, anyMessage(rt, hostLUNs(r.host.luns)))
		}
		go func() {
			if _, err := readPreamble(far); err == nil {
				go discard(far)
			}
			for _, m := range list {
				m.Id = o.id[:]
				b, err := appendMessage(nil, m)
				if err != nil {
					rt.Error(err)
				}
				if _, err := far.Write(b); err != nil {
					return
				}
			}
			far.Close()
		}()
		done := make(chan error, 1)
		go func() {
			_, err := o.Run(ctx)
			done <- err
		}()
		var err error
		within(t, "the source's end", func() {
			select {
			case err = <-done:
			case <-time.After(2 * time.Second): // handed over, and asking
				cancel()
				err = <-done
			}
		})
		said := func(k kind) bool {
			return slices.ContainsFunc(list, func(m *vmmv1.StreamMessage) bool { return kindOf(m) == k })
		}
		runs := r.src.g.runs.Load()
		if runs != 1 && !said(kindReady) {
			rt.Errorf("the guest runs %d times, and the destination was never ready; %v", runs, err)
		}
		if runs == 1 && !said(kindReady) && d.key(nexS) != keyGuest {
			rt.Errorf("the source's key is %v", d.key(nexS))
		}
	})
}
