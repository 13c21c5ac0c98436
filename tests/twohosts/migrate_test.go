package twohosts

import (
	"net"
	"strings"
	"testing"

	"vmm/tests/certs"
)

const tlsDir = "/etc/vmm/tls"

func newAuthority(t *testing.T) *certs.Authority {
	from, until := certs.Day()
	return certs.New(t, from, until)
}

// equip gives a host a TLS directory with a certificate for an address.
func (h *host) equip(a *certs.Authority, dir, address string) {
	c := a.Host()
	c.IPAddresses = []net.IP{net.ParseIP(address)}
	for name, data := range a.Files(c) {
		h.put(dir+"/"+name, data)
	}
}

// One guest moves six times between two hosts, over TLS, each time with a
// reservation of another type, while it writes and a third node tries to. Then
// it is home again, and offered to destinations that are not the right one.
func TestTwoHosts(t *testing.T) {
	p := startPair(t)
	ca := newAuthority(t)
	for _, h := range []*host{p.one, p.two} {
		h.equip(ca, tlsDir, h.address)
	}
	v := boot(p.one)
	bootID := v.in("cat /proc/sys/kernel/random/boot_id")
	for _, typ := range []int{5, 1, 3, 6, 7, 8} {
		from, to := v.at, p.two
		if from == p.two {
			to = p.one
		}
		v.reserve(typ)
		p.wantReserved(from, typ)
		v.churn()
		before := v.churned()
		stop := p.intruder()
		w := receive(to, "--tls-dir", tlsDir)
		m := migrate(from, to, "--tls-dir", tlsDir)
		for n := 1; n < attempts && m.late(); n++ {
			p.wantReserved(from, typ)
			v.churnsOn(v.churned())
			m = migrate(from, to, "--tls-dir", tlsDir)
		}
		if status := m.wait(); status != 0 {
			t.Fatalf("vmm migrate ended with %d\n%s", status, m.stderr)
		}
		stop()
		s := m.summary()
		t.Logf("type %d, host %s to host %s: %d rounds, %.1f MiB in %.1f s, downtime %.1f ms, of it takeover %.1f ms; %s", typ, from.name, to.name, s.Rounds,
			float64(s.SentBytes)/(1<<20), float64(s.TotalUs)/1e6, float64(s.Downtime.TotalUs)/1e3, float64(s.Downtime.TakeoverUs)/1e3, s.Luns[0].Sentence)
		if status := v.wait(); status != 0 {
			t.Errorf("the source's process ended with %d; want 0", status)
		}
		p.wantReserved(to, typ)
		w.agent, v = v.agent, w
		v.dial()
		if got := v.in("cat /proc/sys/kernel/random/boot_id"); got != bootID {
			t.Errorf("boot id %s at the destination; want the guest's, %s", got, bootID)
		}
		v.churnsOn(before)
		v.stopChurn()
		v.unregister()
	}
	v.reserve(5)
	t.Run("refused", func(t *testing.T) { refused(t, p, v, ca) })
	t.Run("refused others", func(t *testing.T) { refusedOthers(t, p) })
	if log := v.in("dmesg | grep -E 'BUG|Oops|WARNING|Call Trace|I/O error|eservation conflict' || true"); log != "" {
		t.Errorf("the guest's kernel says:\n%s", log)
	}
	v.poweroff()
}

// refused tries destinations that must not get the guest. It writes all the
// while, and has what it had.
func refused(t *testing.T, p *pair, v *vm, ca *certs.Authority) {
	other := newAuthority(t)
	p.two.equip(other, "/etc/vmm/stranger", p.two.address)
	p.two.equip(ca, "/etc/vmm/misnamed", "10.2.0.99")
	want := p.one.sh("sg_persist -n -i -s " + p.third.SG + " | grep -v generation")
	v.churn()
	stop := p.one.watch("web1")
	for _, test := range []struct {
		name, dir string
		setUp     string
		says      string
	}{
		{"another authority's certificate", "/etc/vmm/stranger", "", "certificate"},
		{"a certificate with another name", "/etc/vmm/misnamed", "", "certificate"},
		{"no LUN", tlsDir, "echo 1 >" + p.two.lun.Sys() + "/delete", "data"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.setUp != "" {
				p.two.sh(test.setUp)
			}
			before := v.churned()
			w := receive(p.two, "--tls-dir", test.dir)
			m := migrate(p.one, p.two, "--tls-dir", tlsDir)
			for n := 1; n < attempts && m.late(); n++ {
				m = migrate(p.one, p.two, "--tls-dir", tlsDir)
			}
			if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), test.says) {
				t.Errorf("vmm migrate ended with %d, %q; want 1, and to hear of the %s", status, m.stderr, test.says)
			}
			t.Logf("%s", m.stderr)
			w.kill()
			if state := p.one.sh("/share/vmm status web1"); !strings.Contains(state, "running") {
				t.Errorf("vmm status says\n%s\nwant a running guest", state)
			}
			if got := p.one.sh("sg_persist -n -i -s " + p.third.SG + " | grep -v generation"); got != want {
				t.Errorf("READ FULL STATUS shows\n%s\nwant what it was:\n%s", got, want)
			}
			v.churnsOn(before)
		})
	}
	v.stopChurn()
	if states := stop(); len(states) != 1 {
		t.Errorf("meanwhile the guest was %v; want it never to have stood still", states)
	}
	// The disk is there again.
	host, _, _ := strings.Cut(p.two.lun.HCTL, ":")
	p.two.sh("echo '- - -' >/sys/class/scsi_host/host" + host + "/scan")
	p.two.sh("while ! test -e " + p.two.lun.Sys() + "/scsi_generic; do sleep 0.1; done; sg_turs " + p.two.lun.SG + " || true")
}

// refusedOthers offers guests that host two cannot have, as it is.
func refusedOthers(t *testing.T, p *pair) {
	for _, test := range []struct{ name, flags, says string }{
		{"too little memory", "--memory 1200M --cpu x86-64-v2", "memory"},
		{"a processor that lacks a feature", "--memory 128M --cpu host", "adx"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p.one.sh("/share/vmm run web2 --detach --kernel /share/cloud/bzImage --cmdline panic=0 " + test.flags)
			stop := p.one.watch("web2")
			w := p.two.start("receive", "web2", "--listen", "tcp://"+p.two.address+":4444", "--tls-dir", tlsDir)
			w.await(w.stderr, "waiting for a guest")
			m := p.one.start("migrate", "web2", "tcp://"+p.two.address+":4444", "--tls-dir", tlsDir)
			if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), test.says) {
				t.Errorf("vmm migrate ended with %d, %q; want 1, and to hear of %s", status, m.stderr, test.says)
			}
			t.Logf("%s", m.stderr)
			if states := stop(); len(states) != 1 {
				t.Errorf("meanwhile the guest was %v; want it never to have stood still", states)
			}
			w.kill()
			p.one.sh("/share/vmm stop web2 --force")
		})
	}
	t.Run("another version of the stream", func(t *testing.T) {
		const between = "127.0.0.1:4445"
		p.one.sh("/share/vmm run web2 --detach --kernel /share/cloud/bzImage --cmdline panic=0 --memory 128M --cpu x86-64-v2")
		stop := p.one.watch("web2")
		w := p.two.start("receive", "web2", "--listen", "tcp://"+p.two.address+":4444", "--insecure")
		w.await(w.stderr, "waiting for a guest")
		_, end := p.one.does("listening", "relay", between, p.two.address+":4444")
		m := p.one.start("migrate", "web2", "tcp://"+between)
		if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), "the source speaks version 2 of the stream, this destination version 1") {
			t.Errorf("vmm migrate ended with %d, %q; want 1, and to hear of both versions", status, m.stderr)
		}
		t.Logf("%s", m.stderr)
		if states := stop(); len(states) != 1 {
			t.Errorf("meanwhile the guest was %v; want it never to have stood still", states)
		}
		end()
		w.kill()
		p.one.sh("/share/vmm stop web2 --force")
	})
	t.Run("a port where something else listens", func(t *testing.T) {
		p.two.sh("nc -l -p 4444 >/dev/null </dev/null & while ! netstat -ltn | grep -q :4444; do sleep 0.1; done")
		stop := p.one.watch("web1")
		m := p.one.start("migrate", "web1", "tcp://"+p.two.address+":4444", "--tls-dir", tlsDir)
		if status := m.wait(); status != 1 || !strings.Contains(m.stderr.String(), "is it vmm receive") {
			t.Errorf("vmm migrate ended with %d, %q; want 1, and to hear that something else listens there", status, m.stderr)
		}
		t.Logf("%s", m.stderr)
		if states := stop(); len(states) != 1 {
			t.Errorf("meanwhile the guest was %v; want it never to have stood still", states)
		}
	})
}
