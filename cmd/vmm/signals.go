package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// stopSignals are the signals that ask this process to end. From catchStop on
// none ends it by itself, whoever minds them at the moment, and the first two
// are never lost: more say nothing new.
type stopSignals chan os.Signal

func catchStop() stopSignals {
	s := make(stopSignals, 4)
	signal.Notify(s, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	return s
}

// release leaves them to what they do by default.
func (s stopSignals) release() { signal.Stop(s) }

// stop is one more, without a sender.
func (s stopSignals) stop() {
	select {
	case s <- syscall.SIGTERM:
	default:
	}
}

// context is one that ends with a signal, while a guest is waited for. From
// keep on they are the guest's: also one that has come, if there is a guest in
// spite of it. A second keep does nothing.
func (s stopSignals) context(parent context.Context) (ctx context.Context, keep func()) {
	ctx, cancel := context.WithCancel(parent)
	done := make(chan struct{})
	came := false
	go func() {
		defer close(done)
		select {
		case <-s:
			came = true
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel()
		<-done
		if came {
			s.stop()
			came = false
		}
	}
}
