package main

import (
	"os"
	"path/filepath"
	"testing"

	"vmm/migration"
)

// Which TLS files a connection has, by what the command line says.
func TestTLSDirectory(t *testing.T) {
	config := t.TempDir()
	own := filepath.Join(config, "vmm", "tls")
	if err := os.MkdirAll(own, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{migration.FileCA, migration.FileCert, migration.FileKey} {
		if err := os.WriteFile(filepath.Join(own, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("XDG_CONFIG_HOME", config)
	for _, test := range []struct {
		address string
		flags   []string
		want    string
	}{
		{"tcp://host2:4444", nil, own},
		{"tcp://0.0.0.0:4444", nil, own},
		{"tcp://host2:4444", []string{"--tls-dir", "/other"}, "/other"},
		{"tcp://host2:4444", []string{"--tls-dir", ""}, ""},
		{"tcp://host2:4444", []string{"--insecure"}, ""},
		{"tcp://127.0.0.1:4444", nil, ""},
		{"tcp://127.0.0.1:4444", []string{"--tls-dir", "/other"}, "/other"},
		{"unix:///in", nil, ""},
	} {
		address, err := migration.ParseAddress(test.address)
		if err != nil {
			t.Fatal(err)
		}
		for name, f := range map[string]*tlsFlags{"migrate": {}, "receive": {}, "doctor": {}} {
			c, _, err := newRoot().Find([]string{name})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.ParseFlags(test.flags); err != nil {
				t.Fatal(err)
			}
			f.dir, f.insecure = c.Flag("tls-dir").Value.String(), c.Flag("insecure").Value.String() == "true"
			if f.settle(c, address); f.dir != test.want {
				t.Errorf("vmm %s %s %q: TLS files in %q; want %q", name, test.address, test.flags, f.dir, test.want)
			}
		}
	}
	// What migrate asks the guest's process for, which has a working directory
	// of its own.
	c := newMigrateCommand()
	f := migrateFlags{channels: 1, downtime: migration.DefaultDowntime, maxBandwidth: "0"}
	if r, err := f.request(c, "host2:4444"); err != nil || r.TlsDir != own {
		t.Errorf("vmm migrate asks for %v, %v; want the files in %s", r, err, own)
	}
}
