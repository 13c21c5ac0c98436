// Package certs makes the files of TLS directories, for tests.
package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Authority signs certificates of hosts.
type Authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Day is what most tests need: a certificate that is valid now.
func Day() (from, until time.Time) {
	now := time.Now()
	return now.Add(-24 * time.Hour), now.Add(24 * time.Hour)
}

// New makes an authority whose certificate is valid from then until then.
func New(t testing.TB, from, until time.Time) *Authority {
	t.Helper()
	a := &Authority{t: t, cert: &x509.Certificate{
		Subject: pkix.Name{CommonName: "hosts"}, NotBefore: from, NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	a.key = a.sign(a.cert)
	return a
}

// sign makes a key and completes c with the certificate of it, which a signs;
// if a has no key yet, that one does.
func (a *Authority) sign(c *x509.Certificate) *ecdsa.PrivateKey {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	signer := a.key
	if signer == nil {
		signer = key
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	done, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	*c = *done
	return key
}

// Host is a certificate for a host with these names, which is valid as long as
// the authority's; it is not signed yet.
func (a *Authority) Host(names ...string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: "host1"}, DNSNames: names, NotBefore: a.cert.NotBefore, NotAfter: a.cert.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// Files signs c and returns a TLS directory with it: by name, what the files hold.
func (a *Authority) Files(c *x509.Certificate) map[string][]byte {
	a.t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(a.sign(c))
	if err != nil {
		a.t.Fatal(err)
	}
	return map[string][]byte{
		"ca.pem":   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}),
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}),
		"key.pem":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	}
}

// Directory writes Files to a directory that ends with the test.
func (a *Authority) Directory(c *x509.Certificate) string {
	a.t.Helper()
	dir := a.t.TempDir()
	for name, data := range a.Files(c) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return dir
}
