package pr

// Quirks is how a target departs from the text of SPC. The zero value is SPC
// as the reference target reads it; Targets has those of targets in the field.
type Quirks struct {
	Name string

	OwnKey            OwnKey // what PREEMPT by one's own key does
	NoFullStatus      bool   // READ FULL STATUS is answered INVALID FIELD IN CDB
	NoMove            bool   // REGISTER AND MOVE likewise
	NoPreemptAbort    bool   // PREEMPT AND ABORT likewise
	NoPersist         bool   // PTPL_C is zero: APTPL is refused
	NoSPC2Compatible  bool   // CRH is zero: RESERVE and RELEASE conflict with registrations
	TypeChecked       bool   // PREEMPT refuses a TYPE that it is not going to use, 0 above all
	PreemptedAsClear  bool   // the unit attention of PREEMPT is that of CLEAR, 2A/03
	AllHolderKey      bool   // an all-registrants reservation remembers who made it: PREEMPT by that key takes it over
	ClearDropsPersist bool   // CLEAR also ends APTPL
	UnregisteredSense bool   // RESERVE, RELEASE, CLEAR and REGISTER AND MOVE of an unregistered nexus get sense data where there is no reservation
	ReleaseConflict   bool   // RELEASE with the wrong type conflicts
	ReleaseKeyLate    bool   // RELEASE that releases nothing is GOOD whatever its RESERVATION KEY
	UnregisterQuiet   bool   // unregistering leaves PRgeneration as it was
	CapacityReserved  bool   // READ CAPACITY conflicts for a nexus that may not read
	HolderOnlySPC2    bool   // compatible reservation handling favours the holder alone: no other registrant
	OneAttention      bool   // reporting a unit attention forgets the others that were pending
	MergePaths        bool   // registrations of one initiator port are one, whatever the target port
}

// OwnKey is what PREEMPT does with the registration of the nexus that sends
// it, where it names that nexus's own key and takes over no reservation.
type OwnKey uint8

const (
	// OwnRemoved: it goes with the others. SPC-5 5.14.11.2.5 says all nexuses
	// registered with that key.
	OwnRemoved OwnKey = iota
	// OwnKept: it stays.
	OwnKept
	// OwnKeptUnreserved: it stays if there is no reservation.
	OwnKeptUnreserved
	// OwnKeptAllHold: it stays with an all-registrants reservation.
	OwnKeptAllHold
)

// Targets has the deviations of targets in the field, as far as public
// sources and measurements show them.
var Targets = []Quirks{
	{Name: "SPC"},
	{
		Name: "LIO", OwnKey: OwnKeptAllHold, TypeChecked: true, AllHolderKey: true, ClearDropsPersist: true,
		UnregisteredSense: true, ReleaseConflict: true, ReleaseKeyLate: true,
		UnregisterQuiet: true, CapacityReserved: true, HolderOnlySPC2: true, OneAttention: true,
	},
	{Name: "3PAR", OwnKey: OwnKept, MergePaths: true},
	{Name: "SCST", OwnKey: OwnKeptUnreserved},
	{
		Name: "tgtd", OwnKey: OwnKept, NoFullStatus: true, NoMove: true, NoPreemptAbort: true,
		NoPersist: true, NoSPC2Compatible: true, PreemptedAsClear: true,
	},
}
