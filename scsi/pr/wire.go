package pr

import (
	"encoding/binary"
	"fmt"

	"vmm/scsi"
)

// Key is a reservation key. 0 is no key: SPC gives it the meaning "not
// registered" wherever a key is expected.
type Key uint64

func (k Key) String() string { return fmt.Sprintf("0x%016x", uint64(k)) }

// Type is a persistent reservation type (SPC-5 6.16.3.4). The scope is always
// that of the logical unit, 0: SPC defines no other.
type Type uint8

// The types. None is ours: "there is no reservation".
const (
	None                           Type = 0
	WriteExclusive                 Type = 1
	ExclusiveAccess                Type = 3
	WriteExclusiveRegistrantsOnly  Type = 5
	ExclusiveAccessRegistrantsOnly Type = 6
	WriteExclusiveAllRegistrants   Type = 7
	ExclusiveAccessAllRegistrants  Type = 8
)

// Types is every type there is.
var Types = []Type{
	WriteExclusive, ExclusiveAccess, WriteExclusiveRegistrantsOnly,
	ExclusiveAccessRegistrantsOnly, WriteExclusiveAllRegistrants, ExclusiveAccessAllRegistrants,
}

// Valid says whether t is a type that a reservation can have.
func (t Type) Valid() bool { return t < 9 && 1<<t&0b1_1110_1010 != 0 }

// AllRegistrants says that every registered nexus holds a reservation of
// type t, and that none of them is its only holder.
func (t Type) AllRegistrants() bool {
	return t == WriteExclusiveAllRegistrants || t == ExclusiveAccessAllRegistrants
}

// Single says that a reservation of type t has one holder.
func (t Type) Single() bool { return t.Valid() && !t.AllRegistrants() }

// admitsRegistrants says that registered nexuses may use the medium.
func (t Type) admitsRegistrants() bool { return t >= WriteExclusiveRegistrantsOnly && t.Valid() }

// exclusiveAccess says that reading the medium is reserved too.
func (t Type) exclusiveAccess() bool {
	return t == ExclusiveAccess || t == ExclusiveAccessRegistrantsOnly || t == ExclusiveAccessAllRegistrants
}

func (t Type) String() string {
	switch t {
	case None:
		return "none"
	case WriteExclusive:
		return "Write Exclusive"
	case ExclusiveAccess:
		return "Exclusive Access"
	case WriteExclusiveRegistrantsOnly:
		return "Write Exclusive, Registrants Only"
	case ExclusiveAccessRegistrantsOnly:
		return "Exclusive Access, Registrants Only"
	case WriteExclusiveAllRegistrants:
		return "Write Exclusive, All Registrants"
	case ExclusiveAccessAllRegistrants:
		return "Exclusive Access, All Registrants"
	}
	return fmt.Sprintf("type %#x", uint8(t))
}

// InAction is a service action of PERSISTENT RESERVE IN (SPC-5 6.15.1).
type InAction uint8

const (
	ReadKeys           InAction = 0
	ReadReservation    InAction = 1
	ReportCapabilities InAction = 2
	ReadFullStatus     InAction = 3
)

func (a InAction) String() string {
	names := [...]string{"READ KEYS", "READ RESERVATION", "REPORT CAPABILITIES", "READ FULL STATUS"}
	if int(a) < len(names) {
		return names[a]
	}
	return fmt.Sprintf("PERSISTENT RESERVE IN service action %#02x", uint8(a))
}

// OutAction is a service action of PERSISTENT RESERVE OUT (SPC-5 6.16.2).
type OutAction uint8

const (
	Register                     OutAction = 0
	Reserve                      OutAction = 1
	Release                      OutAction = 2
	Clear                        OutAction = 3
	Preempt                      OutAction = 4
	PreemptAndAbort              OutAction = 5
	RegisterAndIgnoreExistingKey OutAction = 6
	RegisterAndMove              OutAction = 7
	ReplaceLostReservation       OutAction = 8
)

func (a OutAction) String() string {
	names := [...]string{
		"REGISTER", "RESERVE", "RELEASE", "CLEAR", "PREEMPT", "PREEMPT AND ABORT",
		"REGISTER AND IGNORE EXISTING KEY", "REGISTER AND MOVE", "REPLACE LOST RESERVATION",
	}
	if int(a) < len(names) {
		return names[a]
	}
	return fmt.Sprintf("PERSISTENT RESERVE OUT service action %#02x", uint8(a))
}

// Refusal is a command that a device server refuses before it looks at any
// reservation, as the sense data that says so.
type Refusal struct {
	Sense  scsi.Sense
	Reason string
}

func (r *Refusal) Error() string { return r.Reason + " (" + r.Sense.String() + ")" }

func refuse(s scsi.Sense, format string, args ...any) *Refusal {
	return &Refusal{s, fmt.Sprintf(format, args...)}
}

// CDBLen is the length of both commands' CDBs in bytes.
const CDBLen = 10

// In is a PERSISTENT RESERVE IN command.
type In struct {
	Action InAction
	Alloc  uint16 // allocation length, bytes
}

// ParseIn reads a PERSISTENT RESERVE IN CDB. Its errors are *Refusal.
func ParseIn(cdb []byte) (In, error) {
	if len(cdb) < CDBLen || cdb[0] != scsi.OpPersistentReserveIn {
		return In{}, refuse(scsi.InvalidOpcode, "not a PERSISTENT RESERVE IN CDB: % x", cdb)
	}
	in := In{InAction(cdb[1] & 0x1f), binary.BigEndian.Uint16(cdb[7:])}
	if in.Action > ReadFullStatus {
		return in, refuse(scsi.InvalidFieldInCDB, "%v is not defined", in.Action)
	}
	return in, nil
}

// CDB encodes the command.
func (in In) CDB() []byte {
	cdb := make([]byte, CDBLen)
	cdb[0], cdb[1] = scsi.OpPersistentReserveIn, byte(in.Action)
	binary.BigEndian.PutUint16(cdb[7:], in.Alloc)
	return cdb
}

// Out is a PERSISTENT RESERVE OUT command with its parameter list. Which
// fields mean something depends on the service action, as SPC-5 6.16.2 says.
type Out struct {
	Action OutAction
	Scope  uint8
	Type   Type

	Key        Key // RESERVATION KEY
	ServiceKey Key // SERVICE ACTION RESERVATION KEY
	APTPL      bool

	AllTargetPorts bool          // ALL_TG_PT
	SpecifyPorts   bool          // SPEC_I_PT
	Ports          []TransportID // with SPEC_I_PT: initiator ports to register as well

	// REGISTER AND MOVE only.
	Unregister bool // UNREG: the sender's registration ends
	MoveTo     Nexus
}

// Lengths of the parameter lists, bytes (SPC-5 6.16.3, 6.16.4).
const (
	basicListLen = 24 // also the header before additional data and TransportIDs
	maxListLen   = 64 << 10
)

// ParseOut reads a PERSISTENT RESERVE OUT CDB and its parameter list, of
// which list holds what the initiator sent. Its errors are *Refusal, with the
// sense data that SPC asks for.
func ParseOut(cdb, list []byte) (Out, error) {
	var o Out
	if len(cdb) < CDBLen || cdb[0] != scsi.OpPersistentReserveOut {
		return o, refuse(scsi.InvalidOpcode, "not a PERSISTENT RESERVE OUT CDB: % x", cdb)
	}
	o.Action = OutAction(cdb[1] & 0x1f)
	o.Scope, o.Type = cdb[2]>>4, Type(cdb[2]&0xf)
	if o.Action > ReplaceLostReservation {
		return o, refuse(scsi.InvalidFieldInCDB, "%v is not defined", o.Action)
	}
	n := binary.BigEndian.Uint32(cdb[5:])
	if n < basicListLen || n > maxListLen {
		return o, refuse(scsi.ParameterListLength, "%v with a parameter list of %d bytes", o.Action, n)
	}
	if uint64(len(list)) < uint64(n) {
		return o, refuse(scsi.ParameterListLength, "%v: %d bytes announced, %d sent", o.Action, n, len(list))
	}
	list = list[:n]
	o.Key = Key(binary.BigEndian.Uint64(list))
	o.ServiceKey = Key(binary.BigEndian.Uint64(list[8:]))
	if o.Action == RegisterAndMove {
		return o, o.parseMove(list)
	}
	o.APTPL = list[20]&1 != 0
	o.AllTargetPorts = list[20]&4 != 0
	o.SpecifyPorts = list[20]&8 != 0
	if !o.SpecifyPorts {
		// SPC-5 6.16.2: exactly 24 bytes unless SPEC_I_PT is one.
		if n != basicListLen {
			return o, refuse(scsi.ParameterListLength, "%v with a parameter list of %d bytes; want %d", o.Action, n, basicListLen)
		}
		return o, nil
	}
	// SPC-5 6.16.2: SPEC_I_PT with any service action but REGISTER is refused.
	if o.Action != Register {
		return o, refuse(scsi.InvalidFieldInList, "%v with SPEC_I_PT", o.Action)
	}
	if n < basicListLen+4 {
		return o, refuse(scsi.ParameterListLength, "SPEC_I_PT with a parameter list of %d bytes", n)
	}
	ids := list[basicListLen+4:]
	if got := binary.BigEndian.Uint32(list[basicListLen:]); uint64(got) != uint64(len(ids)) {
		return o, refuse(scsi.ParameterListLength, "TRANSPORTID PARAMETER DATA LENGTH %d in a list that has %d", got, len(ids))
	}
	for len(ids) > 0 {
		id, rest, err := ParseTransportID(ids)
		if err != nil {
			return o, refuse(scsi.InvalidFieldInList, "TransportID %d of SPEC_I_PT: %v", len(o.Ports), err)
		}
		o.Ports = append(o.Ports, id)
		ids = rest
	}
	return o, nil
}

// parseMove reads the rest of a REGISTER AND MOVE parameter list.
func (o *Out) parseMove(list []byte) error {
	o.Unregister = list[17]&2 != 0
	o.APTPL = list[17]&1 != 0
	o.MoveTo.TargetPort = binary.BigEndian.Uint16(list[18:])
	ids := list[basicListLen:]
	if n := binary.BigEndian.Uint32(list[20:]); uint64(n) != uint64(len(ids)) {
		return refuse(scsi.ParameterListLength, "TRANSPORTID DATA LENGTH %d in a list that has %d", n, len(ids))
	}
	id, rest, err := ParseTransportID(ids)
	if err != nil {
		return refuse(scsi.InvalidFieldInList, "TransportID of REGISTER AND MOVE: %v", err)
	}
	if len(rest) != 0 {
		return refuse(scsi.InvalidFieldInList, "REGISTER AND MOVE with %d bytes after its TransportID", len(rest))
	}
	o.MoveTo.Initiator = id
	return nil
}

// Encode is the CDB and the parameter list of the command.
func (o Out) Encode() (cdb, list []byte) {
	list = make([]byte, basicListLen)
	binary.BigEndian.PutUint64(list, uint64(o.Key))
	binary.BigEndian.PutUint64(list[8:], uint64(o.ServiceKey))
	switch {
	case o.Action == RegisterAndMove:
		list[17] = bit(o.Unregister, 2) | bit(o.APTPL, 1)
		binary.BigEndian.PutUint16(list[18:], o.MoveTo.TargetPort)
		binary.BigEndian.PutUint32(list[20:], uint32(len(o.MoveTo.Initiator)))
		list = append(list, o.MoveTo.Initiator...)
	default:
		list[20] = bit(o.SpecifyPorts, 8) | bit(o.AllTargetPorts, 4) | bit(o.APTPL, 1)
		if o.SpecifyPorts {
			var ids []byte
			for _, id := range o.Ports {
				ids = append(ids, id...)
			}
			list = binary.BigEndian.AppendUint32(list, uint32(len(ids)))
			list = append(list, ids...)
		}
	}
	cdb = make([]byte, CDBLen)
	cdb[0], cdb[1] = scsi.OpPersistentReserveOut, byte(o.Action)
	cdb[2] = o.Scope<<4 | byte(o.Type)&0xf
	binary.BigEndian.PutUint32(cdb[5:], uint32(len(list)))
	return cdb, list
}

func bit(set bool, b byte) byte {
	if set {
		return b
	}
	return 0
}

// Keys is READ KEYS parameter data: one key per registered nexus, so a key
// used by several nexuses appears as often.
type Keys struct {
	Generation uint32
	Keys       []Key
	Truncated  bool // the buffer was too short for all of them
}

// Reservation is READ RESERVATION parameter data. Type is None if there is no
// reservation; Key is 0 for the all-registrants types.
type Reservation struct {
	Generation uint32
	Key        Key
	Scope      uint8
	Type       Type
}

// Registration is one registered nexus, as READ FULL STATUS describes it.
type Registration struct {
	Key            Key
	AllTargetPorts bool
	Holder         bool
	Scope          uint8 // if Holder
	Type           Type  // if Holder
	Nexus          Nexus
}

// FullStatus is READ FULL STATUS parameter data.
type FullStatus struct {
	Generation    uint32
	Registrations []Registration
	Truncated     bool // the buffer was too short for all of them
}

// Capabilities is REPORT CAPABILITIES parameter data.
type Capabilities struct {
	ReplaceLost    bool  // RLR_C
	CompatibleSPC2 bool  // CRH: compatible reservation handling
	SpecifyPorts   bool  // SIP_C: SPEC_I_PT
	AllTargetPorts bool  // ATP_C: ALL_TG_PT
	Persist        bool  // PTPL_C: APTPL is supported
	AllowCommands  uint8 // ALLOW COMMANDS, 0 to 7
	PersistActive  bool  // PTPL_A: the last APTPL received was one
	TypesValid     bool  // TMV: Types means something
	Types          []Type
}

// header splits parameter data into generation and body; the body is cut to
// the length that the header gives.
func header(b []byte) (gen uint32, body []byte, truncated bool, err error) {
	if len(b) < 8 {
		return 0, nil, false, fmt.Errorf("parameter data of %d bytes; want at least 8", len(b))
	}
	n := uint64(binary.BigEndian.Uint32(b[4:]))
	body = b[8:]
	if uint64(len(body)) > n {
		body = body[:n]
	}
	return binary.BigEndian.Uint32(b), body, uint64(len(body)) < n, nil
}

// ParseKeys reads READ KEYS parameter data.
func ParseKeys(b []byte) (Keys, error) {
	gen, body, cut, err := header(b)
	if err != nil {
		return Keys{}, fmt.Errorf("READ KEYS: %w", err)
	}
	if !cut && len(body)%8 != 0 {
		return Keys{}, fmt.Errorf("READ KEYS: %d bytes of keys; want a multiple of 8", len(body))
	}
	k := Keys{Generation: gen, Truncated: cut}
	for ; len(body) >= 8; body = body[8:] {
		k.Keys = append(k.Keys, Key(binary.BigEndian.Uint64(body)))
	}
	return k, nil
}

// Append encodes k onto b.
func (k Keys) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, k.Generation)
	b = binary.BigEndian.AppendUint32(b, uint32(8*len(k.Keys)))
	for _, key := range k.Keys {
		b = binary.BigEndian.AppendUint64(b, uint64(key))
	}
	return b
}

// ParseReservation reads READ RESERVATION parameter data.
func ParseReservation(b []byte) (Reservation, error) {
	gen, body, cut, err := header(b)
	if err != nil {
		return Reservation{}, fmt.Errorf("READ RESERVATION: %w", err)
	}
	r := Reservation{Generation: gen}
	if len(body) == 0 && !cut {
		return r, nil
	}
	if len(body) < 16 {
		return r, fmt.Errorf("READ RESERVATION: descriptor of %d bytes; want 16", len(body))
	}
	r.Key = Key(binary.BigEndian.Uint64(body))
	r.Scope, r.Type = body[13]>>4, Type(body[13]&0xf)
	if !r.Type.Valid() {
		return r, fmt.Errorf("READ RESERVATION: %v is not a reservation type", r.Type)
	}
	return r, nil
}

// Append encodes r onto b.
func (r Reservation) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, r.Generation)
	if r.Type == None {
		return binary.BigEndian.AppendUint32(b, 0)
	}
	b = binary.BigEndian.AppendUint32(b, 16)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Key))
	return append(b, 0, 0, 0, 0, 0, r.Scope<<4|byte(r.Type), 0, 0)
}

// fullHeaderLen is the fixed part of a full status descriptor, bytes.
const fullHeaderLen = 24

// ParseFullStatus reads READ FULL STATUS parameter data.
func ParseFullStatus(b []byte) (FullStatus, error) {
	gen, body, cut, err := header(b)
	if err != nil {
		return FullStatus{}, fmt.Errorf("READ FULL STATUS: %w", err)
	}
	f := FullStatus{Generation: gen, Truncated: cut}
	for len(body) > 0 {
		if len(body) < fullHeaderLen {
			if cut {
				break
			}
			return f, fmt.Errorf("READ FULL STATUS: descriptor %d has %d bytes; want %d", len(f.Registrations), len(body), fullHeaderLen)
		}
		n := uint64(binary.BigEndian.Uint32(body[20:]))
		if n > uint64(len(body)-fullHeaderLen) {
			if cut {
				break
			}
			return f, fmt.Errorf("READ FULL STATUS: descriptor %d announces %d bytes, %d are left", len(f.Registrations), n, len(body)-fullHeaderLen)
		}
		r := Registration{
			Key:            Key(binary.BigEndian.Uint64(body)),
			AllTargetPorts: body[12]&2 != 0,
			Holder:         body[12]&1 != 0,
		}
		if r.Holder { // SPC-5 6.15.5: scope and type are reserved otherwise
			r.Scope, r.Type = body[13]>>4, Type(body[13]&0xf)
			if !r.Type.Valid() {
				return f, fmt.Errorf("READ FULL STATUS: descriptor %d holds with %v", len(f.Registrations), r.Type)
			}
		}
		id, rest, err := ParseTransportID(body[fullHeaderLen : fullHeaderLen+n])
		if err != nil {
			return f, fmt.Errorf("READ FULL STATUS: descriptor %d: %w", len(f.Registrations), err)
		}
		if len(rest) != 0 {
			return f, fmt.Errorf("READ FULL STATUS: descriptor %d has %d bytes after its TransportID", len(f.Registrations), len(rest))
		}
		r.Nexus = Nexus{id, binary.BigEndian.Uint16(body[18:])}
		f.Registrations = append(f.Registrations, r)
		body = body[fullHeaderLen+n:]
	}
	return f, nil
}

// Append encodes f onto b.
func (f FullStatus) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, f.Generation)
	at := len(b)
	b = binary.BigEndian.AppendUint32(b, 0)
	for _, r := range f.Registrations {
		d := make([]byte, fullHeaderLen)
		binary.BigEndian.PutUint64(d, uint64(r.Key))
		d[12] = bit(r.AllTargetPorts, 2) | bit(r.Holder, 1)
		if r.Holder {
			d[13] = r.Scope<<4 | byte(r.Type)
		}
		binary.BigEndian.PutUint16(d[18:], r.Nexus.TargetPort)
		binary.BigEndian.PutUint32(d[20:], uint32(len(r.Nexus.Initiator)))
		b = append(append(b, d...), r.Nexus.Initiator...)
	}
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	return b
}

// capabilitiesLen is the length of REPORT CAPABILITIES parameter data, bytes.
const capabilitiesLen = 8

// typeMask is where REPORT CAPABILITIES has each type's bit, in bytes 4 and 5
// read as one big-endian number (SPC-5 6.15.4).
var typeMask = map[Type]uint16{
	WriteExclusive: 1 << 9, ExclusiveAccess: 1 << 11, WriteExclusiveRegistrantsOnly: 1 << 13,
	ExclusiveAccessRegistrantsOnly: 1 << 14, WriteExclusiveAllRegistrants: 1 << 15,
	ExclusiveAccessAllRegistrants: 1 << 0,
}

// ParseCapabilities reads REPORT CAPABILITIES parameter data.
func ParseCapabilities(b []byte) (Capabilities, error) {
	if len(b) < capabilitiesLen {
		return Capabilities{}, fmt.Errorf("REPORT CAPABILITIES: parameter data of %d bytes; want %d", len(b), capabilitiesLen)
	}
	if n := binary.BigEndian.Uint16(b); n != capabilitiesLen {
		return Capabilities{}, fmt.Errorf("REPORT CAPABILITIES: LENGTH %d; want %d", n, capabilitiesLen)
	}
	c := Capabilities{
		ReplaceLost:    b[2]&0x80 != 0,
		CompatibleSPC2: b[2]&0x10 != 0,
		SpecifyPorts:   b[2]&0x08 != 0,
		AllTargetPorts: b[2]&0x04 != 0,
		Persist:        b[2]&0x01 != 0,
		TypesValid:     b[3]&0x80 != 0,
		AllowCommands:  b[3] >> 4 & 7,
		PersistActive:  b[3]&0x01 != 0,
	}
	mask := binary.BigEndian.Uint16(b[4:])
	for _, t := range Types {
		if c.TypesValid && mask&typeMask[t] != 0 {
			c.Types = append(c.Types, t)
		}
	}
	return c, nil
}

// Append encodes c onto b.
func (c Capabilities) Append(b []byte) []byte {
	var mask uint16
	for _, t := range c.Types {
		mask |= typeMask[t]
	}
	return append(b, 0, capabilitiesLen,
		bit(c.ReplaceLost, 0x80)|bit(c.CompatibleSPC2, 0x10)|bit(c.SpecifyPorts, 0x08)|bit(c.AllTargetPorts, 0x04)|bit(c.Persist, 0x01),
		bit(c.TypesValid, 0x80)|c.AllowCommands&7<<4|bit(c.PersistActive, 0x01),
		byte(mask>>8), byte(mask), 0, 0)
}
