package pr

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"vmm/internal/sys"
)

// Journal is a directory of what this host has begun with the reservations of
// LUNs and must settle if it crashes: one small file per LUN, written as the
// reservations of a disk image are.
type Journal struct{ dir string }

// Entry is what the journal holds for one LUN.
type Entry struct {
	LUN       string // the LUN's identity: its VPD page 83h designator
	Path      string // where this host found it
	Via       string // which of this host's ways to the LUN: host:channel:target:lun, or a nexus
	Migration string // the migration's id
	Key       Key    // the guest's, registered on this host's nexus or about to be
	Pair      Pair   // Old is this host's nexus, as Recovery wants it
	Handed    bool   // the other host may have given its registration up
}

const (
	journalMagic  = "vmm journal 1 "
	journalSuffix = ".pr-intent"
	maxEntry      = 64 << 10 // bytes
)

// OpenJournal opens the journal in dir, which it makes if need be, and shows
// that it can be written: that is part of the preflight.
func OpenJournal(dir string) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	if err := probe(dir); err != nil {
		return nil, fmt.Errorf("journal %s cannot be written; see VMM_STATE_DIR: %w", dir, err)
	}
	return &Journal{dir}, nil
}

// probe writes to dir, under a name of its own: several processes may do so.
func probe(dir string) error {
	f, err := os.CreateTemp(dir, ".probe-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString("probe\n")
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// file is where e stands. A host may be both sides of a LUN, or reach it for two
// guests: the way to it counts.
func (j *Journal) file(e Entry) string {
	sum := sha256.Sum256([]byte(e.LUN + "\x00" + e.Via))
	return filepath.Join(j.dir, hex.EncodeToString(sum[:16])+journalSuffix)
}

// Write makes e the LUN's entry, lastingly.
func (j *Journal) Write(e Entry) error {
	body, err := json.MarshalIndent(savedEntry(e), "", "  ")
	if err != nil {
		return fmt.Errorf("journal entry of %s: %w", e.LUN, err)
	}
	if e.LUN == "" || len(body) > maxEntry/2 {
		return fmt.Errorf("journal entry of a LUN whose identity has %d bytes", len(e.LUN))
	}
	if err := sys.ReplaceFile(j.file(e), sealed(journalMagic, append(body, '\n')), 0o600); err != nil {
		return fmt.Errorf("journal entry of %s: %w", e.LUN, err)
	}
	return nil
}

// Erase removes the entry of e's LUN and way, if there is one.
func (j *Journal) Erase(e Entry) error {
	err := os.Remove(j.file(e))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = sys.SyncDir(j.dir)
	}
	if err != nil {
		return fmt.Errorf("journal entry of %s: %w", e.LUN, err)
	}
	return nil
}

// Entries is everything that has to be settled. A damaged entry is part of
// the error, which does not keep the others back.
func (j *Journal) Entries() ([]Entry, error) {
	files, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var entries []Entry
	var failed error
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), journalSuffix) {
			continue
		}
		path := filepath.Join(j.dir, f.Name())
		e, err := readEntry(path)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("journal entry %s: %w", path, err))
			continue
		}
		entries = append(entries, e)
	}
	return entries, failed
}

func readEntry(path string) (Entry, error) {
	file, err := os.Open(path)
	if err != nil {
		return Entry{}, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxEntry))
	if err != nil {
		return Entry{}, err
	}
	return decodeEntry(b)
}

func decodeEntry(b []byte) (Entry, error) {
	body, err := unseal(journalMagic, b)
	if err != nil {
		return Entry{}, err
	}
	var s entryJSON
	if err := json.Unmarshal(body, &s); err != nil {
		return Entry{}, err
	}
	return s.entry()
}

// entryJSON is an Entry with its TransportIDs, which are not text, in
// hexadecimal.
type entryJSON struct {
	LUN, Path, Via   string
	Migration        string
	Key              Key
	Handed           bool
	Old, New         string
	OldPort, NewPort uint16
	FullStatus, Same bool
}

func savedEntry(e Entry) entryJSON {
	return entryJSON{
		LUN: e.LUN, Path: e.Path, Via: e.Via, Migration: e.Migration, Key: e.Key, Handed: e.Handed,
		Old: hex.EncodeToString([]byte(e.Pair.Old.Initiator)), OldPort: e.Pair.Old.TargetPort,
		New: hex.EncodeToString([]byte(e.Pair.New.Initiator)), NewPort: e.Pair.New.TargetPort,
		FullStatus: e.Pair.FullStatus, Same: e.Pair.Same,
	}
}

func (s entryJSON) entry() (Entry, error) {
	e := Entry{
		LUN: s.LUN, Path: s.Path, Via: s.Via, Migration: s.Migration, Key: s.Key, Handed: s.Handed,
		Pair: Pair{FullStatus: s.FullStatus, Same: s.Same},
	}
	for _, n := range []struct {
		hex  string
		port uint16
		to   *Nexus
	}{{s.Old, s.OldPort, &e.Pair.Old}, {s.New, s.NewPort, &e.Pair.New}} {
		raw, err := hex.DecodeString(n.hex)
		if err != nil {
			return Entry{}, err
		}
		if len(raw) == 0 { // not known without READ FULL STATUS
			continue
		}
		id, rest, err := ParseTransportID(raw)
		if err != nil || len(rest) > 0 {
			return Entry{}, fmt.Errorf("TransportID %s is damaged", n.hex)
		}
		*n.to = Nexus{id, n.port}
	}
	return e, nil
}

// For is the Ledger of one LUN's machine.
func (j *Journal) For(e Entry) Ledger { return &ledger{j, e} }

type ledger struct {
	j *Journal
	e Entry
}

func (l *ledger) Note(handed bool) error {
	l.e.Handed = l.e.Handed || handed
	return l.j.Write(l.e)
}

func (l *ledger) Erase() error { return l.j.Erase(l.e) }
