package pr

import (
	"encoding/binary"
	"errors"
	"slices"

	"vmm/scsi"
)

// Answer is how a device server ends a command. Sense means something with
// CHECK CONDITION only.
type Answer struct {
	Status scsi.Status
	Sense  scsi.Sense
}

func (a Answer) String() string {
	if a.Status == scsi.CheckCondition {
		return a.Status.String() + " " + a.Sense.String()
	}
	return a.Status.String()
}

// OK says that the status is GOOD.
func (a Answer) OK() bool { return a.Status == scsi.Good }

var (
	good     = Answer{Status: scsi.Good}
	conflict = Answer{Status: scsi.ReservationConflict}
)

func check(s scsi.Sense) Answer { return Answer{scsi.CheckCondition, s} }

// Sense data of persistent reservations (SPC-5 5.14 and annex F).
var (
	ReservationsPreempted  = scsi.Sense{Key: scsi.UnitAttention, ASC: 0x2a, ASCQ: 0x03}
	ReservationsReleased   = scsi.Sense{Key: scsi.UnitAttention, ASC: 0x2a, ASCQ: 0x04}
	RegistrationsPreempted = scsi.Sense{Key: scsi.UnitAttention, ASC: 0x2a, ASCQ: 0x05}
	NexusLoss              = scsi.Sense{Key: scsi.UnitAttention, ASC: 0x29, ASCQ: 0x07}
	InvalidRelease         = scsi.Sense{Key: scsi.IllegalRequest, ASC: 0x26, ASCQ: 0x04}
	NoRegistrationRoom     = scsi.Sense{Key: scsi.IllegalRequest, ASC: 0x55, ASCQ: 0x04}
	lunCommunication       = scsi.Sense{Key: scsi.NotReady, ASC: 0x08, ASCQ: 0x00}
)

// maxPorts bounds what one target remembers, in nexuses. Beyond it a
// registration is refused with INSUFFICIENT REGISTRATION RESOURCES.
const maxPorts = 1024

// Target keeps the reservations of one logical unit for any number of I_T
// nexuses, as SPC-5 5.14 has them. It does no I/O and keeps no time; its
// methods are not safe for concurrent use.
type Target struct {
	Quirks Quirks

	ports   []port // every nexus that was ever seen, in order of appearance
	gen     uint32 // PRgeneration
	typ     Type   // of the reservation; None
	holder  int    // index of the holder; with all registrants, who reserved; -1
	persist bool   // PTPL_A
	spc2    int    // index of the nexus that RESERVE gave the logical unit to; -1
	since   uint32 // with AllHolderKey: registrations so far
}

// port is one nexus's part.
type port struct {
	Nexus
	key      Key // 0: not registered
	allPorts bool
	since    uint32        // with AllHolderKey: which registration key's is, in their order
	pending  [4]scsi.Sense // unit attentions, oldest first; the zero value ends them
}

// NewTarget is a target nobody has registered with.
func NewTarget(q Quirks) *Target { return &Target{Quirks: q, holder: -1, spc2: -1} }

// Clone is a target in the same state.
func (t *Target) Clone() *Target {
	c := *t
	c.ports = slices.Clone(t.ports)
	return &c
}

// port finds n among the known nexuses, or adds it.
func (t *Target) port(n Nexus) int {
	for i := range t.ports {
		if t.ports[i].Nexus == n {
			return i
		}
	}
	t.ports = append(t.ports, port{Nexus: n})
	return len(t.ports) - 1
}

// Attention makes a unit attention pending for n, as a reset, a loss of the
// nexus or a change of the medium does. One that is pending already is not
// doubled (SAM-5 5.14); beyond four the newest is dropped.
func (t *Target) Attention(n Nexus, s scsi.Sense) { t.ports[t.port(n)].attention(s) }

func (p *port) attention(s scsi.Sense) {
	for i := range p.pending {
		if p.pending[i] == s {
			return
		}
		if p.pending[i] == (scsi.Sense{}) {
			p.pending[i] = s
			return
		}
	}
}

// Pending is the oldest unit attention that waits for n's next command.
func (t *Target) Pending(n Nexus) (s scsi.Sense, ok bool) {
	for i := range t.ports {
		if t.ports[i].Nexus == n {
			s = t.ports[i].pending[0]
			break
		}
	}
	return s, s != scsi.Sense{}
}

// take removes and returns the oldest unit attention of p.
func (p *port) take() (s scsi.Sense, ok bool) {
	s = p.pending[0]
	copy(p.pending[:], p.pending[1:])
	p.pending[len(p.pending)-1] = scsi.Sense{}
	return s, s != scsi.Sense{}
}

// enter makes k the registration of i.
func (t *Target) enter(i int, k Key) {
	if t.Quirks.AllHolderKey && t.ports[i].key == 0 {
		t.since++
		t.ports[i].since = t.since
	}
	t.ports[i].key = k
}

// Status is everything that can be read about the target.
func (t *Target) Status() FullStatus {
	f := FullStatus{Generation: t.gen}
	for i, p := range t.ports {
		if p.key == 0 {
			continue
		}
		r := Registration{Key: p.key, AllTargetPorts: p.allPorts, Nexus: p.Nexus, Holder: t.holds(i)}
		if r.Holder {
			r.Type = t.typ
		}
		f.Registrations = append(f.Registrations, r)
	}
	return f
}

// Reservation is the reservation; its Key is that of the only holder.
func (t *Target) Reservation() Reservation {
	r := Reservation{Generation: t.gen, Type: t.typ}
	if t.typ.Single() {
		r.Key = t.ports[t.holder].key
	}
	return r
}

// Key is n's registration; 0 if it has none.
func (t *Target) Key(n Nexus) Key {
	for i := range t.ports {
		if t.ports[i].Nexus == n {
			return t.ports[i].key
		}
	}
	return 0
}

// Capabilities is what REPORT CAPABILITIES says.
func (t *Target) Capabilities() Capabilities {
	return Capabilities{
		CompatibleSPC2: !t.Quirks.NoSPC2Compatible,
		SpecifyPorts:   true,
		AllTargetPorts: true,
		Persist:        !t.Quirks.NoPersist,
		PersistActive:  t.persist,
		TypesValid:     true,
		Types:          Types,
	}
}

// PowerCycle is a loss of power: what SPC lets survive it survives, and every
// nexus has a unit attention.
func (t *Target) PowerCycle() {
	t.gen, t.spc2 = 0, -1
	for i := range t.ports {
		p := &t.ports[i]
		if !t.persist {
			p.key = 0
		}
		p.pending = [4]scsi.Sense{scsi.PowerOnOccurred}
	}
	if !t.persist {
		t.typ, t.holder = None, -1
	}
}

// LoseNexus is the loss of the I_T nexus n, or a LOGICAL UNIT RESET that came
// through it: registrations and reservations stay, a reservation made with
// RESERVE does not (SPC-2 5.5.1).
func (t *Target) LoseNexus(n Nexus) {
	if i := t.port(n); t.spc2 == i {
		t.spc2 = -1
	}
}

// Execute is a whole command from n, other than its data: a pending unit
// attention, the reservation check, then PERSISTENT RESERVE IN or OUT, RESERVE
// or RELEASE themselves. For any other command GOOD means: carry it out.
// data is what PERSISTENT RESERVE IN transfers.
func (t *Target) Execute(n Nexus, cdb, list []byte) (data []byte, a Answer) {
	if len(cdb) == 0 {
		return nil, check(scsi.InvalidOpcode)
	}
	i := t.port(n)
	// SAM-5 5.14.5: these neither report nor clear a unit attention.
	switch cdb[0] {
	case scsi.OpInquiry, scsi.OpReportLUNs, scsi.OpRequestSense:
		return nil, good
	}
	if s, ok := t.ports[i].take(); ok {
		if t.Quirks.OneAttention {
			t.ports[i].pending = [4]scsi.Sense{}
		}
		return nil, check(s)
	}
	switch cdb[0] {
	case scsi.OpPersistentReserveIn:
		if t.spc2 >= 0 {
			return nil, conflict
		}
		return t.in(cdb)
	case scsi.OpPersistentReserveOut:
		o, err := ParseOut(cdb, list)
		if err != nil {
			return nil, refused(err)
		}
		if t.spc2 >= 0 {
			return nil, conflict
		}
		return nil, t.out(i, &o)
	case scsi.OpReserve6, scsi.OpReserve10:
		return nil, t.reserveUnit(i)
	case scsi.OpRelease6, scsi.OpRelease10:
		return nil, t.releaseUnit(i)
	}
	if t.conflicts(i, cdb) {
		return nil, conflict
	}
	return nil, good
}

func refused(err error) Answer {
	var r *Refusal
	if errors.As(err, &r) {
		return check(r.Sense)
	}
	return check(scsi.InternalTargetFailed)
}

// in is PERSISTENT RESERVE IN.
func (t *Target) in(cdb []byte) ([]byte, Answer) {
	in, err := ParseIn(cdb)
	if err != nil {
		return nil, refused(err)
	}
	var b []byte
	switch in.Action {
	case ReadKeys:
		k := Keys{Generation: t.gen}
		for _, p := range t.ports {
			if p.key != 0 {
				k.Keys = append(k.Keys, p.key)
			}
		}
		b = k.Append(nil)
	case ReadReservation:
		b = t.Reservation().Append(nil)
	case ReportCapabilities:
		b = t.Capabilities().Append(nil)
	case ReadFullStatus:
		if t.Quirks.NoFullStatus {
			return nil, check(scsi.InvalidFieldInCDB)
		}
		b = t.Status().Append(nil)
	}
	// The length fields tell what there is, whatever the allocation length
	// (SPC-5 4.2.5.6).
	return b[:min(len(b), int(in.Alloc))], good
}

// Do is a PERSISTENT RESERVE OUT command from n, without the unit attention
// that Execute looks at first.
func (t *Target) Do(n Nexus, o *Out) Answer { return t.out(t.port(n), o) }

// holds says whether the reservation is i's.
func (t *Target) holds(i int) bool {
	if t.typ.AllRegistrants() {
		return t.ports[i].key != 0
	}
	return t.typ != None && t.holder == i
}

// reserved drops or makes the reservation.
func (t *Target) reserved(typ Type, holder int) { t.typ, t.holder = typ, holder }

func (t *Target) out(i int, o *Out) Answer {
	p := &t.ports[i]
	// SPC-5 5.14.1, table "PERSISTENT RESERVE OUT service actions that are
	// allowed in the presence of various reservations": what it forbids is not
	// looked at any further.
	if t.typ != None && o.Action != Register && o.Action != RegisterAndIgnoreExistingKey &&
		(p.key == 0 || !t.holds(i) && (o.Action == Reserve || o.Action == RegisterAndMove)) {
		return conflict
	}
	switch o.Action {
	case Register, RegisterAndIgnoreExistingKey:
		return t.register(i, o)
	case ReplaceLostReservation:
		return check(scsi.InvalidFieldInCDB) // RLR_C is zero
	case RegisterAndMove:
		if t.Quirks.NoMove {
			return check(scsi.InvalidFieldInCDB)
		}
	case PreemptAndAbort:
		if t.Quirks.NoPreemptAbort {
			return check(scsi.InvalidFieldInCDB)
		}
	case Reserve:
		if o.Scope != 0 || !o.Type.Valid() {
			return check(scsi.InvalidFieldInCDB)
		}
	}
	// SPC-5 5.14.3: everything but registering needs a registration, and its
	// key in the RESERVATION KEY field.
	if p.key == 0 && t.Quirks.UnregisteredSense {
		switch o.Action {
		case Reserve, Release, Clear, RegisterAndMove:
			return check(lunCommunication)
		}
	}
	if p.key == 0 || p.key != o.Key && !(o.Action == Release && t.Quirks.ReleaseKeyLate && !t.holds(i)) {
		return conflict
	}
	switch o.Action {
	case Reserve:
		return t.reserve(i, o)
	case Release:
		return t.release(i, o)
	case Clear:
		return t.clear(i)
	case Preempt, PreemptAndAbort:
		return t.preempt(i, o)
	}
	return t.move(i, o)
}

// register is REGISTER and REGISTER AND IGNORE EXISTING KEY (SPC-5 5.14.7).
func (t *Target) register(i int, o *Out) Answer {
	p := &t.ports[i]
	if o.APTPL && t.Quirks.NoPersist {
		return check(scsi.InvalidFieldInList)
	}
	if o.Action == Register {
		if p.key != o.Key { // also RESERVATION KEY not 0 while unregistered
			return conflict
		}
		if o.SpecifyPorts && p.key != 0 {
			return check(scsi.InvalidFieldInList)
		}
	}
	if p.key == 0 && o.ServiceKey == 0 {
		return good // SPC-5 5.14.7.2: nothing is done
	}
	if o.ServiceKey == 0 {
		t.unregister(i)
	} else {
		for _, id := range o.Ports {
			if t.Key(Nexus{id, p.TargetPort}) != 0 {
				return conflict // SPC-5 5.14.7.4: all of them or none
			}
		}
		if len(t.ports)+len(o.Ports) > maxPorts {
			return check(NoRegistrationRoom)
		}
		if t.Quirks.MergePaths {
			for j := range t.ports {
				if t.ports[j].key != 0 && t.ports[j].Initiator == p.Initiator {
					t.ports[j].key = o.ServiceKey
				}
			}
		}
		t.enter(i, o.ServiceKey)
		p.allPorts = o.AllTargetPorts
		port := p.TargetPort
		for _, id := range o.Ports { // p is not valid after an append
			j := t.port(Nexus{id, port})
			t.enter(j, o.ServiceKey)
			t.ports[j].allPorts = o.AllTargetPorts
		}
	}
	t.persist = o.APTPL
	if o.ServiceKey != 0 || !t.Quirks.UnregisterQuiet {
		t.gen++
	}
	return good
}

// unregister removes i's registration and with it the reservation, if i was
// its last holder (SPC-5 5.14.11.2.3).
func (t *Target) unregister(i int) {
	was, held := t.typ, t.holds(i)
	t.drop(i)
	if !held || t.typ != None {
		return
	}
	if was.admitsRegistrants() {
		t.tell(i, ReservationsReleased)
	}
}

// drop removes i's registration; a reservation that thereby has no holder is
// gone. Nobody is told.
func (t *Target) drop(i int) {
	held := t.holds(i)
	t.ports[i].key, t.ports[i].allPorts = 0, false
	if !held {
		return
	}
	if t.typ.AllRegistrants() {
		first := -1 // of those left, the one that registered first
		for j := range t.ports {
			if t.ports[j].key != 0 && (first < 0 || t.ports[j].since < t.ports[first].since) {
				first = j
			}
		}
		if first >= 0 {
			if t.holder == i {
				t.holder = first
			}
			return
		}
	}
	t.reserved(None, -1)
}

// tell makes a unit attention pending for every registered nexus but i.
func (t *Target) tell(i int, s scsi.Sense) {
	for j := range t.ports {
		if j != i && t.ports[j].key != 0 {
			t.ports[j].attention(s)
		}
	}
}

// reserve is RESERVE (SPC-5 5.14.9).
func (t *Target) reserve(i int, o *Out) Answer {
	if t.typ == None {
		t.reserved(o.Type, i)
		return good
	}
	if t.holds(i) && t.typ == o.Type {
		return good
	}
	return conflict
}

// release is RELEASE (SPC-5 5.14.11.2.2).
func (t *Target) release(i int, o *Out) Answer {
	if !t.holds(i) {
		return good
	}
	if o.Scope != 0 || o.Type != t.typ {
		if t.Quirks.ReleaseConflict {
			return conflict
		}
		return check(InvalidRelease)
	}
	was := t.typ
	t.reserved(None, -1)
	if was.admitsRegistrants() {
		t.tell(i, ReservationsReleased)
	}
	return good
}

// clear is CLEAR (SPC-5 5.14.11.2.8).
func (t *Target) clear(i int) Answer {
	t.reserved(None, -1)
	t.tell(i, ReservationsPreempted)
	for j := range t.ports {
		t.ports[j].key, t.ports[j].allPorts = 0, false
	}
	if t.Quirks.ClearDropsPersist {
		t.persist = false
	}
	t.gen++
	return good
}

// preempt is PREEMPT and PREEMPT AND ABORT (SPC-5 5.14.11.2.4 to 2.7). The
// abort is the caller's: who lost a registration has its commands aborted.
func (t *Target) preempt(i int, o *Out) Answer {
	victim := o.ServiceKey
	all := t.typ.AllRegistrants()
	takes := t.typ != None && !all && victim != 0 && t.ports[t.holder].key == victim ||
		all && victim == 0 ||
		all && t.Quirks.AllHolderKey && t.ports[t.holder].key == victim
	if !takes && victim == 0 {
		return check(scsi.InvalidFieldInList)
	}
	if (takes || t.Quirks.TypeChecked) && (o.Scope != 0 || !o.Type.Valid()) {
		return check(scsi.InvalidFieldInCDB)
	}
	lost := RegistrationsPreempted
	if t.Quirks.PreemptedAsClear {
		lost = ReservationsPreempted
	}
	if takes {
		was := t.typ
		t.reserved(o.Type, i)
		for j := range t.ports {
			if q := &t.ports[j]; j != i && q.key != 0 && (victim == 0 || q.key == victim) {
				q.key, q.allPorts = 0, false
				q.attention(lost)
			}
		}
		if was != o.Type {
			t.tell(i, ReservationsReleased)
		}
		t.gen++
		return good
	}

	known := false
	keepOwn := t.Quirks.OwnKey == OwnKept || t.Quirks.OwnKey == OwnKeptUnreserved && t.typ == None ||
		t.Quirks.OwnKey == OwnKeptAllHold && all
	// A holder that merely lends its key to others is not removed: only a key
	// that is not the holder's gets here, or an all-registrants reservation.
	for j := range t.ports {
		if t.ports[j].key != victim {
			continue
		}
		known = true
		if j == i && keepOwn {
			continue
		}
		t.drop(j)
		if j != i {
			t.ports[j].attention(lost)
		}
	}
	if !known {
		return conflict
	}
	t.gen++
	return good
}

// move is REGISTER AND MOVE (SPC-5 5.14.8).
func (t *Target) move(i int, o *Out) Answer {
	if o.APTPL && t.Quirks.NoPersist {
		return check(scsi.InvalidFieldInList)
	}
	if t.typ == None {
		return check(scsi.InvalidFieldInCDB)
	}
	if t.typ.AllRegistrants() || t.holder != i {
		return conflict
	}
	if o.ServiceKey == 0 || o.MoveTo == t.ports[i].Nexus {
		return check(scsi.InvalidFieldInList)
	}
	if len(t.ports) >= maxPorts {
		return check(NoRegistrationRoom)
	}
	j := t.port(o.MoveTo)
	t.enter(j, o.ServiceKey)
	t.holder = j
	if o.Unregister {
		t.ports[i].key, t.ports[i].allPorts = 0, false
	}
	t.persist = o.APTPL
	t.gen++
	return good
}

// registered says whether any nexus is.
func (t *Target) registered() bool {
	for i := range t.ports {
		if t.ports[i].key != 0 {
			return true
		}
	}
	return false
}

// mayUse says that i is the holder, or a registrant whom the type lets in:
// compatible reservation handling answers those GOOD and does nothing
// (SPC-5 5.14.3, "exceptions to SPC-2 RESERVE and RELEASE behavior").
func (t *Target) mayUse(i int) bool {
	return t.holds(i) || t.typ.admitsRegistrants() && t.ports[i].key != 0
}

// compatible says that RESERVE and RELEASE of SPC-2 from i are GOOD and do
// nothing, although there are registrations.
func (t *Target) compatible(i int) bool {
	switch {
	case t.Quirks.NoSPC2Compatible:
		return false
	case t.Quirks.HolderOnlySPC2:
		return t.typ != None && t.holder == i
	}
	return t.mayUse(i)
}

// reserveUnit is RESERVE(6) or RESERVE(10) of SPC-2.
func (t *Target) reserveUnit(i int) Answer {
	if t.registered() {
		if t.compatible(i) {
			return good
		}
		return conflict
	}
	if t.spc2 >= 0 && t.spc2 != i {
		return conflict
	}
	t.spc2 = i
	return good
}

// releaseUnit is RELEASE(6) or RELEASE(10) of SPC-2: from a nexus that has
// not reserved it does nothing, and that is no error.
func (t *Target) releaseUnit(i int) Answer {
	if t.registered() {
		if t.compatible(i) {
			return good
		}
		return conflict
	}
	if t.spc2 == i {
		t.spc2 = -1
	}
	return good
}

// conflicts says whether the reservations forbid i a command other than the
// reservation commands themselves.
func (t *Target) conflicts(i int, cdb []byte) bool {
	c := classify(cdb)
	if t.spc2 >= 0 && t.spc2 != i {
		return c != classFree // SPC-2 5.5.1
	}
	if t.typ == None || t.mayUse(i) {
		return false
	}
	switch c {
	case classFree, classState:
		return false
	case classCapacity:
		return t.Quirks.CapacityReserved && t.typ.exclusiveAccess()
	case classRead:
		return t.typ.exclusiveAccess()
	}
	return true
}

// class sorts the commands by what a reservation of somebody else does to
// them (SPC-5 table "commands that are allowed in the presence of various
// reservations", SBC-4 table 13).
type class uint8

const (
	classWrite    class = iota // conflicts with every type; also whatever is unknown
	classRead                  // conflicts with exclusive access
	classCapacity              // allowed, though some targets disagree
	classState                 // allowed, but not under an SPC-2 reservation
	classFree                  // always allowed
)

func classify(cdb []byte) class {
	at := func(i int) byte { // a CDB may be shorter than its operation code says
		if i < len(cdb) {
			return cdb[i]
		}
		return 0xff
	}
	switch at(0) {
	case scsi.OpInquiry, scsi.OpReportLUNs, scsi.OpRequestSense:
		return classFree
	case scsi.OpTestUnitReady, scsi.OpLogSense, scsi.OpPersistentReserveIn:
		return classState
	case scsi.OpReadCapacity10:
		return classCapacity
	case scsi.OpServiceActionIn16:
		if at(1)&0x1f == scsi.SAReadCapacity16 {
			return classCapacity
		}
		return classRead
	case scsi.OpMaintenanceIn:
		if at(1)&0x1f == scsi.SAReportTargetPortGroups {
			return classState
		}
		return classRead
	case scsi.OpStartStopUnit:
		if at(4) == 0x01 { // START with POWER CONDITION 0
			return classState
		}
	case scsi.OpPreventAllowRemoval:
		if at(4)&3 == 0 {
			return classState
		}
	case scsi.OpRead6, scsi.OpRead10, scsi.OpRead12, scsi.OpRead16,
		scsi.OpVerify10, scsi.OpVerify12, scsi.OpVerify16,
		scsi.OpPreFetch10, scsi.OpPreFetch16,
		scsi.OpModeSense6, scsi.OpModeSense10,
		scsi.OpReadBuffer, scsi.OpReadDefectData10, scsi.OpReceiveDiagnostic,
		scsi.OpThirdPartyCopyIn, scsi.OpSecurityProtocolIn, scsi.OpZBCIn:
		return classRead
	case scsi.OpVariableLength:
		if len(cdb) >= 10 {
			switch binary.BigEndian.Uint16(cdb[8:]) {
			case 0x0009, 0x000a: // READ(32), VERIFY(32)
				return classRead
			}
		}
	}
	return classWrite
}
