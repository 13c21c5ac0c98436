package main

import (
	"github.com/spf13/cobra"

	"vmm/migration"
)

// tlsFlags say how two hosts know each other.
type tlsFlags struct {
	dir      string
	insecure bool
}

func (f *tlsFlags) addFlags(c *cobra.Command) {
	c.Flags().StringVar(&f.dir, "tls-dir", "", "directory with ca.pem, cert.pem and key.pem: mutual TLS 1.3; default: see above")
	c.Flags().BoolVar(&f.insecure, "insecure", false, "allow another host without TLS: its network sees the guest's memory")
}

// settle finds the directory for connections with a, where the command line
// does not say: what leaves this host goes with the files that it has, and with
// --insecure without.
func (f *tlsFlags) settle(c *cobra.Command, a migration.Address) {
	if !c.Flags().Changed("tls-dir") && !f.insecure && !a.Private() {
		f.dir = migration.DefaultTLSDir()
	}
}

// security is what the flags ask for.
func (f *tlsFlags) security() (migration.Security, error) {
	s := migration.Security{Insecure: f.insecure}
	if f.dir == "" {
		return s, nil
	}
	var err error
	s.TLS, err = migration.LoadCertificates(f.dir)
	return s, err
}
