package migration

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	vmmv1 "vmm/proto/vmm/v1"
)

// allowed is every (state, message) pair that is not an error, as a reader of
// the design would write it down: what a state hears and says, and where that
// leads if it is not to itself.
const allowed = `
offering   says hello>offered
offered    hears welcome>copying refused>returned aborted>returned; says abort>revoking
copying    hears round_done aborted>returned; says progress attachment state>handing abort>revoking
handing    hears round_done reservation ready>willing aborted>returned; says reservation abort>revoking
willing    hears aborted>returned; says commit>handed abort>revoking
handed     hears reservation undecided running>gone aborted>returned; says reservation
revoking   hears welcome round_done reservation ready refused>returned aborted>returned
returned   hears aborted; says acknowledge
gone       says acknowledge
listening  hears hello>weighing
weighing   hears abort>undoing; says welcome>filling refused>over aborted>aborted
filling    hears progress attachment state>loading abort>undoing; says round_done aborted>aborted
loading    hears reservation abort>undoing; says round_done reservation ready>ready aborted>aborted
ready      hears reservation commit>moving abort>undoing; says aborted>aborted
moving     hears reservation; says reservation running>running undecided>stuck
undoing    says aborted>aborted
running    hears reservation acknowledge>over; says running
stuck      hears reservation
aborted    hears progress attachment state reservation commit abort acknowledge>over; says aborted
over
`

func TestEveryStateAndMessage(t *testing.T) {
	want := map[arrow]string{}
	kindNamed := map[string]kind{}
	for k := kindHello; k < kinds; k++ {
		kindNamed[k.String()] = k
	}
	stateNamed := map[string]state{}
	for s := offering; s < states; s++ {
		stateNamed[s.String()] = s
	}
	lines := strings.Split(strings.TrimSpace(allowed), "\n")
	if len(lines) != len(stateNamed) {
		t.Fatalf("%d states are described; there are %d", len(lines), len(stateNamed))
	}
	for _, line := range lines {
		name, rest, _ := strings.Cut(line, " ")
		at, ok := stateNamed[name]
		if !ok {
			t.Fatalf("no state %q", name)
		}
		for part := range strings.SplitSeq(rest, ";") {
			words := strings.Fields(part)
			for _, w := range words[min(1, len(words)):] {
				message, to, leads := strings.Cut(w, ">")
				if !leads {
					to = name
				}
				if kindNamed[message] == 0 {
					t.Fatalf("%s: no message %q", name, message)
				}
				want[arrow{at, words[0] == "says", kindNamed[message]}] = to
			}
		}
	}
	for s := offering; s < states; s++ {
		for _, sent := range []bool{sends, receives} {
			for k := kind(0); k <= kinds; k++ {
				next, err := s.step(sent, k)
				w, ok := want[arrow{s, sent, k}]
				switch {
				case ok && (err != nil || next.String() != w):
					t.Errorf("%v, sent %v, %v: step = %v, %v; want %s", s, sent, k, next, err, w)
				case !ok && (err == nil || next != s || !strings.Contains(err.Error(), k.String())):
					t.Errorf("%v, sent %v, %v: step = %v, %v; want an error", s, sent, k, next, err)
				}
			}
		}
	}
}

// Each kind is a field of the schema, and each field a kind.
func TestKindsAreTheSchema(t *testing.T) {
	fields := (*vmmv1.StreamMessage)(nil).ProtoReflect().Descriptor().Oneofs().Get(0).Fields()
	if fields.Len() != int(kinds-kindHello) {
		t.Errorf("%d messages in the schema, %d kinds", fields.Len(), kinds-kindHello)
	}
	for k := kindHello; k < kinds; k++ {
		f := fields.ByNumber(protoreflect.FieldNumber(k))
		if f == nil {
			t.Errorf("kind %d is no field", k)
			continue
		}
		m := new(vmmv1.StreamMessage)
		m.ProtoReflect().Set(f, m.ProtoReflect().NewField(f))
		if got := kindOf(m); got != k {
			t.Errorf("kindOf(%s) = %v", f.Name(), got)
		}
	}
	if k := kindOf(new(vmmv1.StreamMessage)); k != 0 {
		t.Errorf("kindOf of an unknown message = %v; want 0", k)
	}
}

// joint is both sides with what is on its way between them.
type joint struct {
	s, d     state
	toD, toS string // one byte a message
	broken   bool   // the link
	ran      bool   // the destination has run the guest
}

// Whatever the two sides may say, in whatever order, however it crosses, and
// wherever the link breaks: nobody gets a message that it has no answer for,
// and the guest never runs on both sides, nor on neither without the source
// knowing that it was handed over.
func TestProtocolNeverRunsTheGuestTwice(t *testing.T) {
	const queue = 3
	seen := map[joint]bool{}
	start := joint{s: offering, d: listening}
	work := []joint{start}
	seen[start] = true
	add := func(j joint) {
		if !seen[j] {
			seen[j] = true
			work = append(work, j)
		}
	}
	// What ends a side before COMMIT without a word, when the link is gone.
	sHas := []state{offering, offered, copying, handing, willing, revoking, returned}
	for len(work) > 0 {
		j := work[len(work)-1]
		work = work[:len(work)-1]
		sRuns := slices.Contains(sHas, j.s)
		j.ran = j.ran || j.d == running
		if sRuns && j.ran {
			t.Fatalf("the guest may run on both sides: %v", describe(j))
		}
		if !sRuns && !j.ran && j.s != handed {
			t.Fatalf("the guest runs nowhere and the source does not say so: %v", describe(j))
		}
		if j.broken {
			// All that is left is to ask, which the source does while it does
			// not know.
			switch {
			case j.s == handed && j.d == running:
				j.s = gone
			case j.s == handed && j.d == aborted:
				j.s = returned
			}
			add(j)
			continue
		}
		for a, to := range protocol {
			if a.sent && a.at == j.s && len(j.toD) < queue {
				n := j
				n.s, n.toD = to, j.toD+string(rune(a.kind))
				add(n)
			}
			if a.sent && a.at == j.d && len(j.toS) < queue {
				n := j
				n.d, n.toS = to, j.toS+string(rune(a.kind))
				add(n)
			}
		}
		if j.toD != "" && j.d != over {
			n, k := j, kind(j.toD[0])
			var err error
			if n.d, err = j.d.step(receives, k); err != nil {
				t.Fatalf("the destination cannot take %v: %v", k, describe(j))
			}
			n.toD = j.toD[1:]
			add(n)
		}
		if j.toS != "" && j.s != gone {
			n, k := j, kind(j.toS[0])
			var err error
			if n.s, err = j.s.step(receives, k); err != nil {
				t.Fatalf("the source cannot take %v: %v", k, describe(j))
			}
			n.toS = j.toS[1:]
			add(n)
		}
		// The link breaks: what is on its way is lost. The source has the
		// guest back unless it has committed; the destination aborts unless
		// COMMIT has come, and goes on alone if it has.
		n := j
		n.broken, n.toD, n.toS = true, "", ""
		if j.s != handed && j.s != gone {
			n.s = returned
		}
		switch j.d {
		case weighing, filling, loading, ready, undoing:
			n.d = aborted
		case moving:
			n.d = running
		}
		add(n)
	}
	if len(seen) < 1000 {
		t.Errorf("only %d states were reached", len(seen))
	}
	t.Logf("%d states", len(seen))
}

func describe(j joint) string {
	names := func(q string) (list []string) {
		for _, k := range []byte(q) {
			list = append(list, kind(k).String())
		}
		return list
	}
	return fmt.Sprintf("source %v, destination %v, on the way there %v, back %v", j.s, j.d, names(j.toD), names(j.toS))
}
