package reservations

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"vmm/scsi"
	"vmm/scsi/pr"
	"vmm/tests/lab/lio"
)

// session is an iSCSI initiator (RFC 7143) for one command at a time: enough
// to be one more kind of I_T nexus, whose initiator port has a name of
// variable length.
type session struct {
	net.Conn
	cmdSN, expStatSN, tag uint32
}

// Opcodes, of initiator and target (RFC 7143, 11.2.1.2).
const (
	isNopOut    = 0x00
	isCommand   = 0x01
	isLogin     = 0x03
	isNopIn     = 0x20
	isResponse  = 0x21
	isLoginDone = 0x23
	isDataIn    = 0x25
	isImmediate = 0x40
)

const (
	headerLen = 48
	noTag     = 0xffffffff
)

// login begins a session; isid tells it from others of the same initiator.
func login(address, target, initiator string, isid uint32) (*session, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	s := &session{Conn: c, cmdSN: 1}
	keys := strings.Join([]string{
		"InitiatorName=" + initiator, "TargetName=" + target, "SessionType=Normal", "AuthMethod=None",
		"HeaderDigest=None", "DataDigest=None", "InitialR2T=Yes", "ImmediateData=Yes", "MaxConnections=1",
		"MaxRecvDataSegmentLength=65536", "FirstBurstLength=65536", "MaxBurstLength=65536", "ErrorRecoveryLevel=0",
		"DefaultTime2Wait=0", "DefaultTime2Retain=0", "MaxOutstandingR2T=1", "DataPDUInOrder=Yes", "DataSequenceInOrder=Yes", "",
	}, "\x00")
	var text []byte
	for range 5 {
		h := make([]byte, headerLen)
		h[0], h[1] = isLogin|isImmediate, 0x87 // from the operational stage on to the full-feature phase
		h[8] = 0x80                            // ISID: random type
		binary.BigEndian.PutUint32(h[10:], isid)
		binary.BigEndian.PutUint32(h[24:], s.cmdSN)
		binary.BigEndian.PutUint32(h[28:], s.expStatSN)
		if err = s.write(h, []byte(keys)); err != nil {
			break
		}
		var answer []byte
		if answer, text, err = s.read(); err != nil || answer[0] != isLoginDone || answer[36] != 0 {
			c.Close()
			return nil, fmt.Errorf("iSCSI login of %s: answer % x %q, %v", initiator, answer, text, err)
		}
		s.expStatSN = binary.BigEndian.Uint32(answer[24:]) + 1
		if answer[1]&0x80 != 0 {
			return s, nil
		}
		keys = ""
	}
	c.Close()
	return nil, fmt.Errorf("iSCSI login of %s: the target does not come to an end: %q, %v", initiator, text, err)
}

// write sends a PDU with its data segment.
func (s *session) write(h, data []byte) error {
	h[5], h[6], h[7] = byte(len(data)>>16), byte(len(data)>>8), byte(len(data))
	_, err := s.Write(append(append(h, data...), make([]byte, -len(data)&3)...))
	return err
}

func (s *session) read() (h, data []byte, err error) {
	h = make([]byte, headerLen)
	if _, err = io.ReadFull(s, h); err != nil {
		return h, nil, err
	}
	n := int(h[5])<<16 | int(h[6])<<8 | int(h[7])
	data = make([]byte, 4*int(h[4])+(n+3)&^3)
	_, err = io.ReadFull(s, data)
	return h, data[4*int(h[4]):][:n], err
}

// Send implements pr.Sender.
func (s *session) Send(ctx context.Context, cdb, list, data []byte) (int, pr.Answer, error) {
	if deadline, ok := ctx.Deadline(); ok {
		s.SetDeadline(deadline)
	}
	s.tag++
	h := make([]byte, headerLen)
	h[0], h[1] = isCommand, 0x81 // final, simple task
	if len(list) > 0 {
		h[1] |= 0x20
	} else if len(data) > 0 {
		h[1] |= 0x40
	}
	binary.BigEndian.PutUint32(h[16:], s.tag)
	binary.BigEndian.PutUint32(h[20:], uint32(max(len(list), len(data))))
	binary.BigEndian.PutUint32(h[24:], s.cmdSN)
	binary.BigEndian.PutUint32(h[28:], s.expStatSN)
	copy(h[32:], cdb)
	s.cmdSN++
	if err := s.write(h, list); err != nil {
		return 0, pr.Answer{}, err
	}
	for n := 0; ; {
		h, segment, err := s.read()
		if err != nil {
			return 0, pr.Answer{}, err
		}
		switch h[0] & 0x3f {
		case isNopIn:
			if binary.BigEndian.Uint32(h[20:]) != noTag { // it wants an answer
				pong := make([]byte, headerLen)
				pong[0], pong[1] = isNopOut|isImmediate, 0x80
				binary.BigEndian.PutUint32(pong[16:], noTag)
				copy(pong[20:24], h[20:24])
				binary.BigEndian.PutUint32(pong[24:], s.cmdSN)
				binary.BigEndian.PutUint32(pong[28:], s.expStatSN)
				if err := s.write(pong, nil); err != nil {
					return 0, pr.Answer{}, err
				}
			}
		case isDataIn:
			at := int(binary.BigEndian.Uint32(h[40:]))
			if at > len(data) {
				return 0, pr.Answer{}, fmt.Errorf("data at %d of %d bytes", at, len(data))
			}
			n += copy(data[at:], segment)
			if h[1]&1 != 0 { // with the status
				s.expStatSN = binary.BigEndian.Uint32(h[24:]) + 1
				return n, pr.Answer{Status: scsi.Status(h[3])}, nil
			}
		case isResponse:
			s.expStatSN = binary.BigEndian.Uint32(h[24:]) + 1
			if h[2] != 0 {
				return 0, pr.Answer{}, fmt.Errorf("iSCSI response %#x", h[2])
			}
			a := pr.Answer{Status: scsi.Status(h[3])}
			if a.Status == scsi.CheckCondition && len(segment) > 2 {
				a.Sense, _ = scsi.ParseSense(segment[2:])
			}
			return n, a, nil
		default:
			return 0, pr.Answer{}, fmt.Errorf("iSCSI PDU % x", h)
		}
	}
}

// needISCSI makes a unit whose nexuses are iSCSI sessions of one target port.
func needISCSI(t *testing.T, names string) *unit {
	t.Helper()
	needLIO(t)
	l, err := lio.Create(t.Context(), lio.Config{Name: "pr-iscsi", Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	var initiators []string
	for _, name := range strings.Split(names, "") {
		initiators = append(initiators, "iqn.2026-01.lab:host-"+strings.ToLower(name))
	}
	p, err := l.ExportISCSI(lio.Loopback, initiators...)
	if err != nil {
		l.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	u := &unit{LUN: l}
	for i, initiator := range initiators {
		s, err := login(p.Address, p.Target, initiator, uint32(i+1))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		x := &nexus{name: names[i : i+1], Port: pr.Port{Sender: s, Timeout: patience}}
		if err := x.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if x.id, err = x.Identify(t.Context(), func(pr.Key) pr.Ledger { return noLedger{} }); err != nil {
			t.Fatal(err)
		}
		want, err := pr.ISCSI(initiator, fmt.Sprintf("8000%08x", i+1))
		if err != nil || !x.id.Initiator.Same(want) {
			t.Fatalf("nexus %s finds itself as %v; want %v, %v", x.name, x.id, want, err)
		}
		u.nexus = append(u.nexus, x)
	}
	return u
}

// TestReferenceISCSI is TestReference with iSCSI's nexuses, and with PREEMPT
// AND ABORT, which never ends over tcm_loop (TestAbortNeverEnds).
func TestReferenceISCSI(t *testing.T) {
	compare(t, needISCSI(t, "ABCW"), true)
}

// TestTakeoverISCSI: the way of each type, and REGISTER AND MOVE with a
// TransportID that has a name in it.
func TestTakeoverISCSI(t *testing.T) {
	u := needISCSI(t, "SDOW")
	holding(func(typ pr.Type, aptpl, move bool) {
		before := disk{s: keyK, o: keyO, typ: typ, holder: holder(typ, "S"), aptpl: aptpl}
		after := disk{d: keyK, o: keyO, typ: typ, holder: holder(typ, "D"), aptpl: aptpl}
		u.set(t, before)
		m := newMigration(t, u, move)
		src, dst := m.run(keyK)
		if got := u.show(t); got != after.String() || src.Kind != pr.HandedOver || m.moved != move {
			t.Errorf("%s, move %v, became %s; want %s; %s %s", before, move, got, after, dst.Sentence("D"), src.Sentence("S"))
		}
		u.quiet(t)
	})
}
