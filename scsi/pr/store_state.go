package pr

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"vmm/scsi"
)

// The state file is a line "vmm reservations 1 SHA256-OF-THE-REST", then JSON.
const stateMagic = "vmm reservations 1 "

// savedTarget is the state as it is stored.
type savedTarget struct {
	Generation uint32
	Type       Type
	Holder     int // index into Nexuses; -1
	Persist    bool
	SPC2       int // index into Nexuses; -1
	Nexuses    []savedPort
}

type savedPort struct {
	Name           string `json:",omitempty"` // for who reads the file; not read back
	TransportID    string // hexadecimal
	TargetPort     uint16
	Key            Key          `json:",omitempty"`
	AllTargetPorts bool         `json:",omitempty"`
	Pending        []scsi.Sense `json:",omitempty"`
}

// sealed puts the line with the checksum before body.
func sealed(magic string, body []byte) []byte {
	sum := sha256.Sum256(body)
	return append([]byte(magic+hex.EncodeToString(sum[:])+"\n"), body...)
}

// unseal checks and takes off that line.
func unseal(magic string, b []byte) ([]byte, error) {
	line, body, ok := bytes.Cut(b, []byte("\n"))
	sum := sha256.Sum256(body)
	switch {
	case !ok || !bytes.HasPrefix(line, []byte(magic)):
		return nil, fmt.Errorf("it does not begin with %q", magic)
	case string(line[len(magic):]) != hex.EncodeToString(sum[:]):
		return nil, errors.New("its checksum is wrong")
	}
	return body, nil
}

func (t *Target) encode() []byte {
	s := savedTarget{Generation: t.gen, Type: t.typ, Holder: t.holder, Persist: t.persist, SPC2: t.spc2}
	for _, p := range t.ports {
		q := savedPort{
			Name: p.Initiator.String(), TransportID: hex.EncodeToString([]byte(p.Initiator)), TargetPort: p.TargetPort,
			Key: p.key, AllTargetPorts: p.allPorts,
		}
		for _, a := range p.pending {
			if a != (scsi.Sense{}) {
				q.Pending = append(q.Pending, a)
			}
		}
		s.Nexuses = append(s.Nexuses, q)
	}
	body, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		panic(err) // integers and strings only
	}
	return sealed(stateMagic, append(body, '\n'))
}

// ReadState reads a state file. One that does not exist is a logical unit
// that nobody has registered with; one that is damaged is an error.
func ReadState(path string) (*Target, error) {
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return NewTarget(Quirks{}), nil
	}
	if err != nil {
		return nil, fmt.Errorf("reservations: %w", err)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxState+1))
	if err != nil {
		return nil, fmt.Errorf("reservations: %w", err)
	}
	t, err := decodeState(b)
	if err != nil {
		return nil, fmt.Errorf("reservations %s are damaged: %w; with every user of the image stopped, remove the file: "+
			"then nobody is registered, so let the cluster software register again before anything writes", path, err)
	}
	return t, nil
}

// decodeState reads what encode has written, and nothing else.
func decodeState(b []byte) (*Target, error) {
	if len(b) > maxState {
		return nil, fmt.Errorf("it is larger than %d bytes", maxState)
	}
	body, err := unseal(stateMagic, b)
	if err != nil {
		return nil, err
	}
	var s savedTarget
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return nil, err
	}
	t := &Target{gen: s.Generation, typ: s.Type, holder: s.Holder, persist: s.Persist, spc2: s.SPC2}
	if len(s.Nexuses) > maxPorts || s.SPC2 < -1 || s.SPC2 >= len(s.Nexuses) || s.Holder < -1 || s.Holder >= len(s.Nexuses) {
		return nil, errors.New("it names a nexus that it does not have")
	}
	for _, q := range s.Nexuses {
		raw, err := hex.DecodeString(q.TransportID)
		if err != nil {
			return nil, err
		}
		id, rest, err := ParseTransportID(raw)
		if err != nil || len(rest) != 0 {
			return nil, fmt.Errorf("TransportID %s: %w", q.TransportID, err)
		}
		p := port{Nexus: Nexus{id, q.TargetPort}, key: q.Key, allPorts: q.AllTargetPorts}
		if len(q.Pending) > len(p.pending) {
			return nil, errors.New("too many unit attentions")
		}
		copy(p.pending[:], q.Pending)
		t.ports = append(t.ports, p)
	}
	if t.typ != None && (!t.typ.Valid() || t.holder < 0 || t.ports[t.holder].key == 0) || t.typ == None && t.holder >= 0 {
		return nil, errors.New("its reservation has no registered holder")
	}
	return t, nil
}
