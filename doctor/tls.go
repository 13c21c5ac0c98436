package doctor

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"vmm/migration"
)

// soon is how long before its end a certificate is complained about.
const soon = 30 * 24 * time.Hour

// examineTLS looks at a TLS directory (docs/migration.md): what would make
// the two ends of a migration refuse each other.
func (h host) examineTLS(dir string) []Finding {
	if dir == "" {
		return []Finding{{"tls", OK, "there are no TLS files (--tls-dir): guests migrate by unix sockets and this host's own addresses", ""}}
	}
	const mendFiles = "docs/quickstart.md says how to make the three files"
	if _, err := migration.LoadCertificates(dir); err != nil {
		mend := mendFiles
		if errors.Is(err, os.ErrPermission) {
			mend = "run as the user that owns them"
		}
		return []Finding{{"tls", Fail, err.Error(), mend}}
	}
	certs, err := certificates(filepath.Join(dir, migration.FileCert))
	if err == nil && len(certs) == 0 {
		err = errors.New("no certificate")
	}
	authorities, err2 := certificates(filepath.Join(dir, migration.FileCA))
	if err := errors.Join(err, err2); err != nil {
		return []Finding{{"tls", Fail, foreign(err.Error()), mendFiles}}
	}
	found := []Finding{{"tls", OK, dir + ": certificate and key belong together, nobody else can read the key", ""}}
	mine := certs[0]
	found = append(found, h.valid("tls certificate", mine))
	for _, a := range authorities {
		found = append(found, h.valid("tls authority", a))
	}
	return append(found, h.chain(certs, authorities), names(mine))
}

// certificates are those of a PEM file.
func certificates(path string) (list []*x509.Certificate, err error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return list, nil
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list = append(list, c)
	}
}

func (h host) valid(name string, c *x509.Certificate) Finding {
	const day = "2006-01-02"
	who := foreign(c.Subject.CommonName)
	switch {
	case h.now.Before(c.NotBefore):
		return Finding{name, Fail, fmt.Sprintf("%s is valid from %s on", who, c.NotBefore.Format(time.RFC3339)), "set this host's clock, or wait"}
	case h.now.After(c.NotAfter):
		return Finding{name, Fail, fmt.Sprintf("%s was valid until %s", who, c.NotAfter.Format(day)), "have a new one signed"}
	case h.now.Add(soon).After(c.NotAfter):
		return Finding{name, Warn, fmt.Sprintf("%s is valid until %s only", who, c.NotAfter.Format(day)), "have a new one signed"}
	}
	return Finding{name, OK, fmt.Sprintf("%s, valid until %s", who, c.NotAfter.Format(day)), ""}
}

// chain looks at what the other end will: who signed it, and what for. A host
// is the server of the guests that it receives and the client of those that
// it sends. Dates are another finding's.
func (h host) chain(certs, authorities []*x509.Certificate) Finding {
	const name = "tls chain"
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range authorities {
		roots.AddCert(c)
	}
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	var lacks []string
	for _, use := range []struct {
		usage x509.ExtKeyUsage
		text  string
	}{{x509.ExtKeyUsageServerAuth, "server (to receive guests)"}, {x509.ExtKeyUsageClientAuth, "client (to send them)"}} {
		_, err := certs[0].Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{use.usage}, CurrentTime: within(certs[0], authorities),
		})
		var invalid x509.CertificateInvalidError
		switch {
		case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
			lacks = append(lacks, use.text)
		case err != nil:
			return Finding{name, Fail, foreign(err.Error()), "the other host has the same " + migration.FileCA + ": have " + migration.FileCert + " signed by that authority"}
		}
	}
	if lacks != nil {
		return Finding{name, Fail, "the certificate is not for the use as " + strings.Join(lacks, ", "), "have one signed with extendedKeyUsage = serverAuth, clientAuth"}
	}
	return Finding{name, OK, "signed by the authority, for server and client", ""}
}

// within is a moment in which c and, if there is one, the authorities are
// valid, so that only what is wrong with the chain is found.
func within(c *x509.Certificate, authorities []*x509.Certificate) time.Time {
	at := c.NotBefore
	for _, a := range authorities {
		if a.NotBefore.After(at) {
			at = a.NotBefore
		}
	}
	return at
}

// names looks at whether the certificate has this host's name, by which
// others are likely to call it.
func names(c *x509.Certificate) Finding {
	const name = "tls names"
	var all []string
	all = append(all, c.DNSNames...)
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	list := foreign(strings.Join(all, ", "))
	if len(all) == 0 {
		return Finding{name, Fail, "the certificate has no subjectAltName: no source would accept it", "have one signed with this host's DNS names and addresses"}
	}
	self, err := os.Hostname()
	if err == nil && c.VerifyHostname(self) != nil {
		return Finding{name, Warn, fmt.Sprintf("%s; not this host's own name, %s", list, self), "sources must use one of those names: vmm migrate --peer NAME"}
	}
	return Finding{name, OK, list, ""}
}
