package sys

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// ReplaceFile puts content in the place of the file at path, whole or not at
// all, and on the medium when it returns (rename(2), fsync(2) of the file and
// of its directory). After an error it may be there or not. A file that is new
// has mode perm, less the umask.
//
// It writes path.new first. That name is always the same, so what a crash has
// left there is overwritten, and callers that may do this to one path at a time
// take turns by a lock.
func ReplaceFile(path string, content []byte, perm fs.FileMode) error {
	temp := path + ".new"
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes lasting what was created, renamed or removed in a directory.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
