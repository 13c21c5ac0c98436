package lio

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const iscsi = configfs + "/iscsi"

// Portal is a LUN as an iSCSI target of this machine has it, LUN 0.
type Portal struct {
	Target  string // the target's name
	Address string // host:port

	lun        *LUN
	initiators []string
}

// Loopback is an address for a portal that only this machine reaches.
const Loopback = "127.0.0.1:3260"

// ExportISCSI makes l the LUN of an iSCSI target at an address of this machine,
// HOST:PORT, without authentication, for the initiators of these names and no
// other. The portal is closed before the LUN is.
func (l *LUN) ExportISCSI(address string, initiators ...string) (_ *Portal, err error) {
	p := &Portal{Target: "iqn.2026-01.lab:" + strings.ToLower(l.Name), Address: address, lun: l, initiators: initiators}
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

// Login logs an initiator of this name in to a portal of whatever machine and
// waits for the LUN's devices. The kernel has the session then, and no program:
// a connection that is lost stays lost. A target that does not answer pings in
// time is waited for, as in an emulated host it may only be slow.
func Login(ctx context.Context, initiator, target, address string) (Device, error) {
	fail := func(err error) (Device, error) {
		return Device{}, fmt.Errorf("lio: log in to %s at %s as %s: %w", target, address, initiator, err)
	}
	for _, module := range []string{"crc32c_generic", "iscsi_tcp", "sd_mod", "sg"} {
		if err := modprobe(module); err != nil {
			return Device{}, err
		}
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fail(err)
	}
	out, err := exec.CommandContext(ctx, "iscsistart", "-i", initiator, "-t", target, "-g", "1", "-a", host, "-p", port,
		"-P", "node.conn[0].timeo.noop_out_interval=0", "-P", "node.conn[0].timeo.noop_out_timeout=0").CombinedOutput()
	if err != nil {
		return fail(fmt.Errorf("iscsistart: %w: %s", err, out))
	}
	sessions, err := filepath.Glob("/sys/class/iscsi_session/session*")
	if err != nil {
		return fail(err)
	}
	for _, session := range sessions {
		name, err1 := readLine(session + "/initiatorname")
		to, err2 := readLine(session + "/targetname")
		if err1 != nil || err2 != nil || name != initiator || to != target {
			continue
		}
		// .../hostN/sessionM/iscsi_session/sessionM
		path, err := filepath.EvalSymlinks(session)
		if err != nil {
			return fail(err)
		}
		_, rest, _ := strings.Cut(path, "/host")
		number, _, _ := strings.Cut(rest, "/")
		return WaitDevice(ctx, number+":0:0:0")
	}
	return fail(fmt.Errorf("the kernel has %d sessions, and none of these names", len(sessions)))
}
