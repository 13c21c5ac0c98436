package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"vmm/proto/vmm/v1/vmmv1connect"
)

// What clients may cost the machine. Whoever can open the socket may stop the
// machine anyway; these keep mistakes, and what such a client feeds us, from
// doing more than was asked.
const (
	maxClients = 64                // connections at a time; further ones are closed
	maxStreams = 8                 // requests at a time on one HTTP/2 connection
	maxHeader  = 16 << 10          // bytes
	maxRequest = 16 << 10          // bytes of one request's body
	readTime   = 10 * time.Second  // for one request to arrive
	writeTime  = 10 * time.Second  // for a client to take one piece of an answer
	idleTime   = 120 * time.Second // of a connection between two requests
)

// Server serves a machine's control API.
type Server struct {
	http    http.Server
	clients atomic.Int32
	served  chan struct{} // closed when Serve has returned
	claim   *Claim
}

// NewServer makes a server on the socket that was claimed. version is that of
// the program. The claim stays the caller's to close, after the server.
func NewServer(c *Claim, m Machine, version string) *Server {
	service := &service{machine: m, dir: c.dir, claim: c, version: version}
	return newServer(c, service, func(mux *http.ServeMux) {
		mux.HandleFunc("GET /events", service.eventLines)
		mux.Handle("GET "+MetricsPath, service.metricsHandler())
		mux.HandleFunc("GET "+consolePath, service.consoleText)
	})
}

// newServer serves service, and what add adds.
func newServer(c *Claim, service vmmv1connect.MachineServiceHandler, add func(*http.ServeMux), options ...connect.HandlerOption) *Server {
	s := &Server{claim: c, served: make(chan struct{})}
	// Made for the first request: where a guest has just arrived it has better
	// use for the processor.
	routes := sync.OnceValue(func() http.Handler {
		mux := http.NewServeMux()
		add(mux)
		mux.Handle(vmmv1connect.NewMachineServiceHandler(service, append(options,
			connect.WithCodec(jsonCodec("json")), connect.WithCodec(jsonCodec("json; charset=utf-8")),
			connect.WithCompression("gzip", nil, nil), // a local socket is faster than gzip
			connect.WithReadMaxBytes(maxRequest))...))
		return mux
	})
	s.http = http.Server{
		Handler:           patient(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { routes().ServeHTTP(w, r) })),
		ReadHeaderTimeout: readTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		Protocols:         new(http.Protocols),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:          log.New(io.Discard, "", 0), // standard error may be a terminal in raw mode, and the guest's
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				s.clients.Add(1)
			case http.StateClosed, http.StateHijacked:
				s.clients.Add(-1)
			}
		},
	}
	s.http.Protocols.SetHTTP1(true)
	s.http.Protocols.SetUnencryptedHTTP2(true) // gRPC
	return s
}

// Serve serves until Close. It is called once.
func (s *Server) Serve() error {
	defer close(s.served)
	err := s.http.Serve(&bounded{s.claim.listener, &s.clients})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close stops serving. Answers that are under way have until ctx is done.
func (s *Server) Close(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	<-s.served
	return err
}

// bounded is a listener that turns clients away while there are maxClients.
type bounded struct {
	*net.UnixListener
	clients *atomic.Int32
}

func (b *bounded) Accept() (net.Conn, error) {
	for {
		conn, err := b.UnixListener.Accept()
		if err != nil || b.clients.Load() < maxClients {
			return conn, err
		}
		conn.Close()
	}
}

// patient gives each request a time to arrive and a size, and each piece of
// an answer a time to be taken. The times of http.Server do not fit: they
// bound whole answers, and some of ours last as long as the machine.
func patient(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		// No method streams its request, so all of it comes first.
		_ = rc.SetReadDeadline(time.Now().Add(readTime))
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
		if err != nil {
			http.Error(w, "the request is too large or too slow", http.StatusRequestEntityTooLarge)
			return
		}
		_ = rc.SetReadDeadline(time.Time{})
		r.Body = io.NopCloser(bytes.NewReader(body))
		if !unhurried[r.URL.Path] {
			w = &patientWriter{w, rc}
		}
		h.ServeHTTP(w, r)
	})
}

type patientWriter struct {
	http.ResponseWriter
	rc *http.ResponseController
}

func (w *patientWriter) Write(p []byte) (int, error) {
	_ = w.rc.SetWriteDeadline(time.Now().Add(writeTime))
	return w.ResponseWriter.Write(p)
}

// Flush is http.Flusher, which connect asks for.
func (w *patientWriter) Flush() { _ = w.FlushError() }

func (w *patientWriter) FlushError() error {
	_ = w.rc.SetWriteDeadline(time.Now().Add(writeTime))
	return w.rc.Flush()
}

func (w *patientWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// jsonCodec is JSON with the names of the schema, and with every field: what
// a person reads should not depend on what happens to be zero. A field that
// does not exist is an error, for a person has mistyped it.
type jsonCodec string

func (c jsonCodec) Name() string { return string(c) }

func (jsonCodec) Marshal(m any) ([]byte, error) { return MarshalJSON(m.(proto.Message)) }

func (jsonCodec) Unmarshal(b []byte, m any) error {
	if len(bytes.TrimSpace(b)) == 0 {
		return nil // curl -X POST, with nothing to say
	}
	return protojson.Unmarshal(b, m.(proto.Message))
}

// MarshalJSON is m as the control API shows it, on one line. The output of
// protojson is not the same in every build of it.
func MarshalJSON(m proto.Message) ([]byte, error) {
	b, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Compact(&out, b); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
