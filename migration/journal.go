package migration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"vmm/internal/sys"
)

// journal is what a destination's host has decided about guests that came to
// it: one file per migration, written before the decision is told to anybody.
// So the answer is the same after a crash.
type journal struct{ dir string }

type verdict string

const (
	verdictNone    verdict = ""
	verdictRunning verdict = "running"
	verdictAborted verdict = "aborted"

	verdictSuffix = ".migration"
	// verdictLife is how long a verdict that no source has acknowledged is
	// kept: a handed-over source has been settled by its operator by then.
	verdictLife = 30 * 24 * time.Hour
)

// openJournal opens the journal in dir, which pr.OpenJournal has made and found
// writable, and drops what is older than anybody asks for.
func openJournal(dir string) (*journal, error) {
	j := &journal{dir}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err == nil && strings.Contains(f.Name(), verdictSuffix) && time.Since(info.ModTime()) > verdictLife {
			_ = os.Remove(filepath.Join(dir, f.Name())) // it is harmless where it stays
		}
	}
	return j, nil
}

func (j *journal) name(id ID) string { return id.String() + verdictSuffix }

// note makes v the verdict on id, lastingly.
func (j *journal) note(id ID, v verdict, why string) error {
	if err := sys.ReplaceFile(filepath.Join(j.dir, j.name(id)), []byte(string(v)+"\n"+why+"\n"), 0o600); err != nil {
		return fmt.Errorf("journal entry of migration %v: %w", id, err)
	}
	return nil
}

// verdict is what was noted, and why.
func (j *journal) verdict(id ID) (v verdict, why string, err error) {
	b, err := os.ReadFile(filepath.Join(j.dir, j.name(id)))
	if errors.Is(err, os.ErrNotExist) {
		return verdictNone, "", nil
	}
	if err != nil {
		return verdictNone, "", fmt.Errorf("journal entry of migration %v: %w", id, err)
	}
	first, rest, _ := strings.Cut(string(b), "\n")
	switch v = verdict(first); v {
	case verdictRunning, verdictAborted:
		return v, strings.TrimSpace(rest), nil
	}
	return verdictNone, "", fmt.Errorf("journal entry of migration %v is damaged", id)
}

// forget drops the verdict: the source knows it.
func (j *journal) forget(id ID) error {
	err := os.Remove(filepath.Join(j.dir, j.name(id)))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
