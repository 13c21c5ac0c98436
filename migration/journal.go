package migration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
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

// openJournal opens the journal in dir, which it makes if need be, and drops
// what is older than anybody asks for.
func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	j := &journal{dir}
	if err := j.replace("writable", nil); err != nil {
		return nil, fmt.Errorf("journal %s cannot be written; see VMM_STATE_DIR: %w", dir, err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err == nil && strings.HasSuffix(f.Name(), verdictSuffix) && time.Since(info.ModTime()) > verdictLife {
			_ = os.Remove(filepath.Join(dir, f.Name())) // it is harmless where it stays
		}
	}
	return j, nil
}

func (j *journal) name(id ID) string { return id.String() + verdictSuffix }

// note makes v the verdict on id, lastingly.
func (j *journal) note(id ID, v verdict, why string) error {
	if err := j.replace(j.name(id), []byte(string(v)+"\n"+why+"\n")); err != nil {
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

// replace writes a file whole or not at all, and on the medium when it
// returns.
func (j *journal) replace(name string, content []byte) (err error) {
	f, err := os.CreateTemp(j.dir, ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(content); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), filepath.Join(j.dir, name)); err != nil {
		return err
	}
	dir, err := os.Open(j.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
