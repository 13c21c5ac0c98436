package lio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const iscsi = configfs + "/iscsi"

// Portal is a LUN as an iSCSI target of this machine has it, LUN 0, at
// 127.0.0.1 port 3260.
type Portal struct {
	Target  string // the target's name
	Address string // host:port

	lun        *LUN
	initiators []string
}

// ExportISCSI makes l the LUN of an iSCSI target, without authentication, for
// the initiators of these names and no other. The portal is closed before the
// LUN is.
func (l *LUN) ExportISCSI(initiators ...string) (_ *Portal, err error) {
	p := &Portal{Target: "iqn.2026-01.lab:" + strings.ToLower(l.Name), Address: "127.0.0.1:3260", lun: l, initiators: initiators}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("lio: export LUN %s by iSCSI: %w", l.Name, err), p.Close())
		}
	}()
	for _, module := range []string{"crc32c_generic", "iscsi_target_mod"} {
		if err := modprobe(module); err != nil {
			return nil, err
		}
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	tpg := p.tpg()
	for _, dir := range []string{iscsi, tpg, tpg + "/np/" + p.Address, tpg + "/lun/lun_0"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := write(tpg+"/attrib/authentication", "0"); err != nil {
		return nil, err
	}
	if err := os.Symlink(filepath.Join(core, l.Name), filepath.Join(tpg, "lun/lun_0", l.Name)); err != nil {
		return nil, err
	}
	for _, name := range initiators {
		mapped := filepath.Join(tpg, "acls", name, "lun_0")
		if err := os.MkdirAll(mapped, 0o755); err != nil {
			return nil, err
		}
		if err := os.Symlink(filepath.Join(tpg, "lun/lun_0"), filepath.Join(mapped, l.Name)); err != nil {
			return nil, err
		}
	}
	return p, write(tpg+"/enable", "1")
}

func (p *Portal) tpg() string { return filepath.Join(iscsi, p.Target, "tpgt_1") }

// Close ends the sessions and removes the target.
func (p *Portal) Close() error {
	tpg := p.tpg()
	if _, err := os.Stat(tpg); err == nil {
		if err := write(tpg+"/enable", "0"); err != nil && !errors.Is(err, fs.ErrInvalid) {
			return fmt.Errorf("lio: iSCSI target %s: %w", p.Target, err)
		}
	}
	var paths []string
	for _, name := range p.initiators {
		acl := filepath.Join(tpg, "acls", name)
		paths = append(paths, filepath.Join(acl, "lun_0", p.lun.Name), filepath.Join(acl, "lun_0"), acl)
	}
	paths = append(paths, filepath.Join(tpg, "lun/lun_0", p.lun.Name), filepath.Join(tpg, "lun/lun_0"), filepath.Join(tpg, "np", p.Address), tpg, filepath.Dir(tpg))
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("lio: remove iSCSI target %s: %w", p.Target, err)
		}
	}
	return nil
}
