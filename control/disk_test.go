package control

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vmm/scsi/pr"
)

// image makes a disk image, on which the nexuses of keys are registered; held
// is who reserves it, if anybody.
func image(t *testing.T, keys map[string]pr.Key, held string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<20)); err != nil {
		t.Fatal(err)
	}
	for name, key := range keys {
		f, err := pr.Open(path, nexus(t, name))
		if err != nil {
			t.Fatal(err)
		}
		outs := []pr.Out{{Action: pr.RegisterAndIgnoreExistingKey, ServiceKey: key}}
		if name == held {
			outs = append(outs, pr.Out{Action: pr.Reserve, Key: key, Type: pr.WriteExclusiveRegistrantsOnly})
		}
		for _, o := range outs {
			cdb, list := o.Encode()
			for range 2 { // the first may meet a unit attention
				if _, a, err := f.Execute(cdb, list); err != nil || a.Status != 0 && a.Sense.Key != 6 {
					t.Fatalf("%v: %v, %v", o.Action, a, err)
				}
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func nexus(t *testing.T, name string) pr.Nexus {
	t.Helper()
	n, err := pr.NamedNexus(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRecover(t *testing.T) {
	const key, other pr.Key = 0xaa, 0xbb
	for _, test := range []struct {
		name    string
		held    string
		handed  bool
		elsehow func(e *pr.Entry)
		done    bool
		left    pr.Key // on this host's nexus
		says    string
	}{
		{"a leftover", "", false, nil, true, 0, "is not registered with key 0x00000000000000aa any more"},
		{"a leftover that holds", "here", false, nil, false, key, "reservation rests on it"},
		{"one that may be the guest's only one", "", true, nil, false, key, "may be the only registration"},
		{"a disk that is gone", "", false, func(e *pr.Entry) { e.Path += ".gone" }, false, key, "no such file"},
		{"another disk at its path", "", false, func(e *pr.Entry) { e.LUN = "naa.5" }, false, key, "now"},
		{"nothing left", "", false, func(e *pr.Entry) { e.Key = 0xcc }, true, key, "is not registered with key 0x00000000000000cc any more"},
	} {
		dir, state := runDir(t), filepath.Join(t.TempDir(), "state")
		path := image(t, map[string]pr.Key{"here": key, "there": other}, test.held)
		x, err := dir.OpenDisk(t.Context(), path, "looking", "test")
		if err != nil {
			t.Fatal(err)
		}
		e := pr.Entry{LUN: x.Name, Path: path, Migration: "1", Key: key, Handed: test.handed,
			Pair: pr.Pair{Old: nexus(t, "here"), New: nexus(t, "there"), FullStatus: true}}
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
		if test.elsehow != nil {
			test.elsehow(&e)
		}
		j, err := pr.OpenJournal(state)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Write(e); err != nil {
			t.Fatal(err)
		}
		settled, err := dir.Recover(t.Context(), state)
		if err != nil || len(settled) != 1 || settled[0].Done != test.done || !strings.Contains(settled[0].Outcome, test.says) {
			t.Errorf("%s: Recover() = %+v, %v; want done %v, %q", test.name, settled, err, test.done, test.says)
		}
		if left, err := j.Entries(); err != nil || len(left) == 0 != test.done {
			t.Errorf("%s: the journal has %d entries, %v", test.name, len(left), err)
		}
		target, err := pr.ReadState(path + ".pr")
		if err != nil {
			t.Fatal(err)
		}
		if here, there := target.Key(nexus(t, "here")), target.Key(nexus(t, "there")); here != test.left || there != other {
			t.Errorf("%s: keys %v here, %v there; want %v, %v", test.name, here, there, test.left, other)
		}
	}
	if settled, err := runDir(t).Recover(t.Context(), "/nowhere/at/all"); len(settled) != 0 || err != nil {
		t.Errorf("without a journal: Recover() = %v, %v", settled, err)
	}
}

// The nexuses of this host's guests, by their default names, are this host's.
func TestShowImage(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	path := image(t, map[string]pr.Key{host + ":web1": 0xaa, host + "2:web1": 0xbb}, host+":web1")
	link := filepath.Join(t.TempDir(), "link.img")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	l, err := runDir(t).Show(t.Context(), link)
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Reservations.Registrants) != 2 || l.Reservations.HolderKey != pr.Key(0xaa).String() {
		t.Errorf("Show() = %v", l)
	}
	for _, r := range l.Reservations.Registrants {
		if want := r.Key == pr.Key(0xaa).String(); r.Own != want || r.Holder != want {
			t.Errorf("registrant %v: own %v, holder %v; want %v", r, r.Own, r.Holder, want)
		}
	}
}

// Two paths of one thing are one, and others are not.
func TestUnit(t *testing.T) {
	path := image(t, nil, "")
	link := filepath.Join(t.TempDir(), "hard.img")
	if err := os.Link(path, link); err != nil {
		t.Skip(err) // another file system
	}
	a, err := unit(path)
	b, err2 := unit(link)
	c, err3 := unit(image(t, nil, ""))
	if a != b || a == c || errors.Join(err, err2, err3) != nil {
		t.Errorf("units %q, %q, %q, %v", a, b, c, errors.Join(err, err2, err3))
	}
	null, err := unit("/dev/null")
	if zero, err2 := unit("/dev/zero"); null == zero || err != nil || err2 != nil {
		t.Errorf("units %q, %q, %v, %v", null, zero, err, err2)
	}
	for _, bad := range []string{t.TempDir(), "/nowhere"} {
		if _, err := unit(bad); err == nil {
			t.Errorf("unit(%q) succeeded", bad)
		}
	}
}
