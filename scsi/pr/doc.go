// Package pr is SCSI persistent reservations (SPC-5 5.14): what goes over the
// wire, a target that keeps them, a tracker that follows a guest's, and the
// takeover that carries a guest's reservation from one host to another.
//
//	wire.go, transportid.go   PERSISTENT RESERVE IN and OUT, parsed and encoded
//	target.go, quirks.go      the reference target: any number of I_T nexuses
//	store.go, store_state.go  the same beside an image file, shared by processes
//	tracker.go                from a guest's commands and status to its state
//	machine.go                what the state machines of a takeover have in common
//	takeover.go, source.go    its two ends, the forced resume, snapshots, recovery
//	view.go                   what there is on a LUN, for those who only look
//	port.go, journal.go       what drives the machines on a real LUN
//	search_test.go            every interleaving of all that
//
// Vocabulary, as SPC has it: an I_T nexus is an initiator port and a target
// port; a registration is a reservation key on a nexus; a holder is the nexus
// (for the all-registrants types: every registered nexus) that owns the
// reservation. In the takeover, S and D are the nexuses of the source's and
// the destination's host, K is the guest's key, and O any other nexus.
//
// docs/reservations.md has the argument why a fenced guest stays fenced, and
// what an exhaustive search of these very machines found.
package pr
