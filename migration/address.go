package migration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"vmm/internal/sys"
)

// Address is where a destination listens.
type Address struct {
	Network string // tcp or unix
	Address string // HOST:PORT or a path
}

// ParseAddress reads tcp://HOST:PORT, HOST:PORT or unix:///PATH.
func ParseAddress(s string) (Address, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		scheme, rest = "tcp", s
	}
	switch scheme {
	case "tcp":
		if _, port, err := net.SplitHostPort(rest); err != nil || port == "" {
			return Address{}, fmt.Errorf("address %q: want tcp://HOST:PORT", s)
		}
	case "unix":
		if !filepath.IsAbs(rest) {
			return Address{}, fmt.Errorf("address %q: want unix:///PATH", s)
		}
	default:
		return Address{}, fmt.Errorf("address %q: want tcp://HOST:PORT, HOST:PORT or unix:///PATH", s)
	}
	return Address{scheme, rest}, nil
}

func (a Address) String() string { return a.Network + "://" + a.Address }

// Private says that what goes to a does not leave this host.
func (a Address) Private() bool {
	if a.Network == "unix" {
		return true
	}
	host, _, _ := net.SplitHostPort(a.Address)
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Security is how the two hosts know each other. A guest's memory goes over
// the connections, and whoever may connect to a destination may have it run a
// guest: without TLS only addresses of this host are allowed, unless Insecure
// says otherwise.
type Security struct {
	TLS      *Certificates // nil: none
	Insecure bool
}

// The files of a TLS directory, in PEM.
const (
	FileCA   = "ca.pem"   // who signs the certificates of all hosts
	FileCert = "cert.pem" // this host's, with its names, for server and client use
	FileKey  = "key.pem"  // the key of FileCert, readable by nobody else
)

// systemTLSDir is the host's TLS directory.
const systemTLSDir = "/etc/vmm/tls"

// DefaultTLSDir is the TLS directory where nobody names one: vmm/tls in the
// user's configuration directory ($XDG_CONFIG_HOME, else ~/.config), else
// /etc/vmm/tls, if it has the three files; empty if neither has.
func DefaultTLSDir() string {
	if own, err := os.UserConfigDir(); err == nil {
		return firstTLSDir(filepath.Join(own, "vmm", "tls"), systemTLSDir)
	}
	return firstTLSDir(systemTLSDir)
}

// firstTLSDir is the first of dirs that has the three files.
func firstTLSDir(dirs ...string) string {
	for _, dir := range dirs {
		missing := slices.ContainsFunc([]string{FileCA, FileCert, FileKey}, func(name string) bool {
			_, err := os.Stat(filepath.Join(dir, name))
			return err != nil
		})
		if !missing {
			return dir
		}
	}
	return ""
}

// Certificates are a TLS directory's content.
type Certificates struct {
	dir  string
	cert tls.Certificate
	ca   *x509.CertPool
}

// LoadCertificates reads a TLS directory.
func LoadCertificates(dir string) (*Certificates, error) {
	key := filepath.Join(dir, FileKey)
	info, err := os.Stat(key)
	if err != nil {
		return nil, fmt.Errorf("TLS: %w; a TLS directory has %s, %s and %s", err, FileCA, FileCert, FileKey)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("TLS: %s has mode %v: others must not read it; chmod 600 %s", key, info.Mode().Perm(), key)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, FileCert), key)
	if err != nil {
		return nil, fmt.Errorf("TLS: certificate and key in %s: %w", dir, err)
	}
	file := filepath.Join(dir, FileCA)
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	ca := x509.NewCertPool()
	if !ca.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("TLS: %s has no certificate", file)
	}
	return &Certificates{dir: dir, cert: cert, ca: ca}, nil
}

// config is mutual TLS 1.3. Go's client side checks the server's name, and both
// check the other's chain and its purpose.
func (c *Certificates) config() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{c.cert},
		RootCAs:      c.ca,
		ClientCAs:    c.ca,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		// A record of 16 KiB from the first byte on: this is bulk data.
		DynamicRecordSizingDisabled: true,
	}
}

// allow says why a is not to be used.
func (s Security) allow(a Address) error {
	if s.TLS == nil && !s.Insecure && !a.Private() {
		return fmt.Errorf("%v without TLS: the guest's memory would cross the network in the clear, and anybody could send a guest; "+
			"put the files into %s or give --tls-dir, or --insecure if the network is trusted", a, systemTLSDir)
	}
	return nil
}

// Dialer is Options.Dial for a. peer, if not empty, is the name that the
// destination's certificate must have instead of the address's host.
func Dialer(a Address, s Security, peer string) (func(context.Context) (net.Conn, error), error) {
	if err := s.allow(a); err != nil {
		return nil, err
	}
	var config *tls.Config
	if s.TLS != nil && a.Network == "tcp" {
		config = s.TLS.config()
		config.ServerName, _, _ = net.SplitHostPort(a.Address)
		if peer != "" {
			config.ServerName = peer
		}
	}
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, a.Network, a.Address)
		if err != nil {
			return nil, fmt.Errorf("connect to %v: %w", a, cause(err))
		}
		if config == nil {
			return conn, nil
		}
		secure := tls.Client(conn, config)
		if err := secure.HandshakeContext(ctx); err != nil {
			conn.Close()
			if errors.Is(err, io.EOF) {
				err = errors.New("what listens there closed the connection before it said anything; is it vmm receive, with --tls-dir?")
			}
			return nil, fmt.Errorf("connect to %v: %w", a, err)
		}
		return secure, nil
	}, nil
}

// cause drops what the caller says better.
func cause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// Listen is Receive's listener on a. peers, if any, are the names of which a
// source's certificate must have one; otherwise any certificate that the
// authority has signed will do.
func Listen(a Address, s Security, peers []string) (net.Listener, error) {
	if err := s.allow(a); err != nil {
		return nil, err
	}
	var ln net.Listener
	var err error
	if a.Network == "unix" {
		ln, err = sys.ListenUnix(a.Address)
	} else {
		ln, err = net.Listen(a.Network, a.Address)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w", a, cause(err))
	}
	if s.TLS == nil || a.Network != "tcp" {
		return ln, nil
	}
	config := s.TLS.config()
	if len(peers) > 0 {
		config.VerifyConnection = func(cs tls.ConnectionState) error {
			for _, name := range peers {
				if cs.PeerCertificates[0].VerifyHostname(name) == nil {
					return nil
				}
			}
			return fmt.Errorf("the source's certificate has none of the names %s", strings.Join(peers, ", "))
		}
	}
	return tls.NewListener(ln, config), nil
}
