// Package migration moves a running guest to another process: the stream, both
// sides of it, and the commit protocol that keeps the guest from running twice.
//
// A migration is one control connection, which carries length-prefixed
// protobuf messages (frame.go, proto/vmm/v1/stream.proto), and N data
// connections, which carry guest memory without a copy in user space
// (pages.go). Which message may come when is one table (protocol.go):
//
//	source                              destination
//	Hello ────────────────────────────▶  everything that can be refused is
//	      ◀──────────────────── Welcome   refused here; the guest runs
//	pages, round marker ══════════════▶
//	      ◀────────────────── RoundDone   every page of the round is in place
//	(rounds until the rest is short)
//	the guest stops; State ───────────▶
//	last pages, round marker ═════════▶  loads
//	Reservation ◀─────────────────────▶  prepares and proves (package scsi/pr)
//	      ◀────────────────────── Ready
//	Commit ───────────────────────────▶  the guest is handed over
//	Reservation ◀─────────────────────▶  moves the reservations
//	      ◀──────────────────── Running   noted on disk, then run, then said
//	Acknowledge ──────────────────────▶
//
// Until Commit is sent, any failure gives the guest back to the source. Once
// it is sent the source runs the guest again only if the destination answers
// Aborted, which it says only if it never ran the guest and never will, or if
// the operator says that the destination is dead (Outgoing.Force).
//
// The package knows a machine only by the interfaces in this file.
package migration

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"vmm/memory"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi"
	"vmm/scsi/pr"
)

// Source is a machine that is to move away.
type Source interface {
	Config() *vmmv1.MachineConfig
	// Requirements are what the guest needs of its host.
	Requirements() *vmmv1.Requirements
	RAM() *memory.RAM
	// LUNs lists the guest's logical units. The reservations' takeover uses
	// their ports only while the guest is paused.
	LUNs() []*LUN
	// Attachments are the files that move with the guest.
	Attachments() []Attachment
	// TrackDirty begins to note which pages are written, with all of them
	// taken for written.
	TrackDirty() (DirtyLog, error)
	// Throttle takes percent (0 to 99) of the vCPUs' time away.
	Throttle(percent int)
	// GiveWay says whether the vCPUs leave the processors to others where there
	// are too few.
	GiveWay(on bool)
	// Settle brings to the disks, while the guest runs, what this host has in
	// its page cache of what the guest wrote. It is called where the guest may
	// go on with another cache, and not for one that stays on this host; then
	// Pause brings the rest, within its ctx. ctx may end it early.
	Settle(ctx context.Context) error
	// Pause stops the vCPUs, says since when, and waits until every SCSI command
	// is complete. On an error, ctx's end included, the guest runs on as though
	// it had not been called.
	Pause(ctx context.Context) (since time.Time, err error)
	// Save is the state of the paused machine.
	Save() (*vmmv1.MachineState, error)
	// Resume undoes Pause.
	Resume() error
}

// DirtyLog says which pages were written, by vCPUs and devices.
type DirtyLog interface {
	// Collect takes what was written since it was visited last, and says how
	// many pages that is. Collect again adds to it.
	Collect() (pages uint64, err error)
	// Visit calls fn with each run of collected pages, of n bytes in one
	// region, ascending. Before that the log is told to watch the run's pages
	// again: what is written while fn reads them is collected the next time.
	// The first Visit leaves out what has no memory behind it: the
	// destination's memory begins as one hole. fn's error ends it.
	Visit(fn func(gpa memory.GPA, n uint64) error) error
	// Close ends the tracking.
	Close() error
}

// Host makes machines for guests that arrive.
type Host interface {
	// Prepare builds the machine that the offer describes, without running
	// it, or says in a sentence why this host cannot. It finds each LUN by
	// its identity. The guest still runs at the source.
	Prepare(ctx context.Context, offer Offer) (Destination, error)
}

// Offer is what a source wants to move.
type Offer struct {
	ID           ID
	Config       *vmmv1.MachineConfig
	Requirements *vmmv1.Requirements // may be nil: a peer has sent it
	LUNs         []OfferedLUN
	// Saved says that the guest comes from a snapshot: it runs nowhere else.
	Saved bool
	// Memory, if not nil, is the memfd of the guest's memory, to be used as it
	// is and not to be written to before Run. Who returns a Destination has
	// taken it over. It may be of any size, and its seals are to be checked.
	Memory *os.File
	// Name, if not nil, is the lock by which the source, on this host, has the
	// guest's name. Like OfferedLUN.Held it is not to be trusted, and closed
	// when Prepare has returned: a host that keeps it keeps a duplicate.
	Name *os.File
	// Attachments have the sizes that the source claims.
	Attachments []Attachment
}

// Attachment is a file that moves with the guest, such as the kernel that a
// reset loads again.
type Attachment struct {
	Name   string
	Size   int64 // bytes
	SHA256 [sha256.Size]byte
	// Data is the source's. In an offer it is a file that the source has open
	// on this host and says it is, or nil: not to be kept, and nobody has looked
	// at it.
	Data io.ReaderAt
}

// OfferedLUN is one of the guest's logical units as the source says that it
// sees it; the fields are those of LUN.
type OfferedLUN struct {
	ID, Identity    string
	BootID, Address string
	Nexus           pr.Nexus
	Preflight       *pr.Preflight // FullStatus and Move of it
	// Held are files by which the source, on this host, keeps others off. Where
	// they let this host use the LUN by the source's own nexus, it sends
	// nothing there, until the guest has stopped, that could take a unit
	// attention away from the guest.
	Held []*os.File
}

// Destination is a machine that a guest moves into.
type Destination interface {
	// RAM has the regions of the source's. What it holds is thrown away, unless
	// it was handed over (Offer.Memory).
	RAM() *memory.RAM
	// LUNs are in the order of the offer.
	LUNs() []*LUN
	// Has says that this host has the attachment with this place in the offer,
	// with the size and the digest of the offer: it need not come.
	Has(attachment int) bool
	// Attach appends data to an attachment that this host does not have, never
	// beyond the size in the offer. All are complete, and have the digests of
	// the offer, before Load.
	Attach(attachment int, data []byte) error
	// Load takes over what the source's Save returned, once memory is complete. A peer has sent
	// it: nothing in it is to be believed unchecked.
	Load(*vmmv1.MachineState) error
	// Run lets the guest run, and says since when it does. An error means that
	// not one instruction was executed.
	Run() (time.Time, error)
	// Close frees a machine that never ran.
	Close() error
}

// LUN is one of a guest's logical units as its host sees it.
type LUN struct {
	// ID is the user's name for it, Identity what is the same on every host:
	// the VPD page 83h designator.
	ID, Identity string
	// Path is where this host found it, for its journal.
	Path string
	// BootID and Address, host:channel:target:lun, name this host's nexus
	// uniquely: two LUNs with the same of both share one. Empty: unknown.
	BootID, Address string
	// Nexus is this host's; the zero value if nobody could tell.
	Nexus pr.Nexus
	// Nonce, not nil for a disk image, shows that two processes have the same
	// file open; Met says whether this one has that of the nonce.
	Nonce []byte
	Met   func(nonce []byte) bool
	// Preflight is nil for a LUN that has no persistent reservations.
	Preflight *pr.Preflight
	// Port sends the takeover's commands while the guest is stopped.
	Port *pr.Port
	// Tracked is what the guest has, as far as its commands told. Only the
	// source's is asked.
	Tracked func() pr.Tracked
	// Held are the files that keep everybody else off the LUN, and can be
	// shared with another process of this host. They are the machine's. Only
	// the source's are asked for, as is Pending: the unit attentions that the
	// guest has not been told yet; nil: there are none.
	Held    []*os.File
	Pending func() []scsi.Sense
	// Settled, if not nil, is told how the takeover ended where the guest is
	// about to run, and which unit attentions the guest must still get.
	Settled func(o pr.Outcome, attentions []scsi.Sense)
}

// ID names one migration: 128 random bits.
type ID [16]byte

// NewID makes up an ID.
func NewID() (id ID) {
	rand.Read(id[:])
	return id
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Limits of a migration, and what they are if nothing is said.
const (
	MaxChannels     = 64
	DefaultDowntime = 300 * time.Millisecond
)

// Deadlines bound every wait of either side. The zero value of each means its
// default.
type Deadlines struct {
	// Connect bounds dialling, the TLS handshake and the offer's answer, 30 s.
	Connect time.Duration
	// Idle bounds how long a connection may stand still while memory is
	// copied, 30 s.
	Idle time.Duration
	// Drain bounds the wait for SCSI commands in flight once the vCPUs are
	// stopped, 5 s: past it the switch-over is called off.
	Drain time.Duration
	// Ready bounds the time from there to READY, and at the destination from
	// READY to COMMIT, 10 s.
	Ready time.Duration
	// Ask bounds each question about a reservation after COMMIT, 2 s.
	Ask time.Duration
	// Running bounds the wait for RUNNING before the source asks on a new
	// connection, 10 s; each question waits as long as Ask.
	Running time.Duration
	// Answer is how long a destination keeps answering for a migration that
	// the source has not acknowledged, 10 minutes.
	Answer time.Duration
}

func (d Deadlines) withDefaults() Deadlines {
	set := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	set(&d.Connect, 30*time.Second)
	set(&d.Idle, 30*time.Second)
	set(&d.Drain, 5*time.Second)
	set(&d.Ready, 10*time.Second)
	set(&d.Ask, 2*time.Second)
	set(&d.Running, 10*time.Second)
	set(&d.Answer, 10*time.Minute)
	return d
}

// Progress says how far a migration is.
type Progress struct {
	Round      int
	Remaining  uint64        // bytes of memory that are to be sent
	Sent       uint64        // bytes that went over the data connections
	DirtyRate  uint64        // bytes per second that the guest writes anew
	Bandwidth  uint64        // bytes per second
	Expected   time.Duration // downtime if the guest were stopped now
	Throttle   int           // percent
	HandedOver string        // not empty: COMMIT was sent, and why no answer came
}

// Downtime is the time from the first vCPU's stop here to the first one's start
// there, in its parts. What is not in a part is the network's, the way of RUNNING
// among it.
type Downtime struct {
	Total    time.Duration
	Stop     time.Duration // vCPUs stopped, commands drained
	Save     time.Duration
	Pages    time.Duration // the last round, with its acknowledgement
	Load     time.Duration // at the destination
	Takeover time.Duration // from COMMIT to the last LUN's end
	Start    time.Duration // RUNNING noted on disk, vCPUs started
}

// LUNOutcome is how the takeover of one LUN ended, as a sentence for an
// operator.
type LUNOutcome struct {
	ID       string
	Sentence string
	Takeover time.Duration // from COMMIT, at the destination
}

// Summary is what became of a migration that ended with the guest running at
// its destination.
type Summary struct {
	ID       ID
	Rounds   int
	Sent     uint64
	Total    time.Duration
	Downtime Downtime
	LUNs     []LUNOutcome // as the destination has them
	Left     []LUNOutcome // of what stays at the source
}

// How a migration can end other than well. Each comes wrapped in a sentence.
var (
	// ErrRefused: the destination, or this host, cannot; the guest was not
	// touched.
	ErrRefused = errors.New("refused")
	// ErrKept: the guest runs on at the source.
	ErrKept = errors.New("the guest runs on here")
	// ErrHandedOver: COMMIT was sent and no answer came. The guest stays
	// stopped here.
	ErrHandedOver = errors.New("the guest was handed over and is stopped here")
	// ErrBlocked: the guest must not run here, and does not.
	ErrBlocked = errors.New("the guest is kept stopped")
)

// errProtocol is a message that its sender had no right to, or a snapshot that
// nobody has written so.
func errProtocol(format string, args ...any) error {
	return protocolError(fmt.Sprintf(format, args...))
}

type protocolError string

func (e protocolError) Error() string { return "the other side breaks the protocol: " + string(e) }
