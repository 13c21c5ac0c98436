package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"vmm/internal/sys"
)

// copyChunk is how much one system call of a plain copy is given, bytes.
const copyChunk = 1 << 20

// plainCopy copies the guest's random bytes over n connections into the memfd
// of another process, each connection its share of them.
func plainCopy(from *guest, n, size int) (rate float64, err error) {
	file, err := from.memory()
	if err != nil {
		return 0, err
	}
	defer file.Close()
	m, err := sys.MapShared(int(file.Fd()), 0, size)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	memory := m.Bytes()
	touch(memory) // as the monitors have theirs mapped

	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(self, "-receiver", strconv.Itoa(n), "-memory", strconv.Itoa(size>>20))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var address string
	if _, err := fmt.Fscan(out, &address); err != nil {
		return 0, fmt.Errorf("the receiver of a plain copy: %w", err)
	}
	began := time.Now()
	if err := each(n, func(i int) error {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.Write([]byte{byte(i)}); err != nil {
			return err
		}
		for part := share(memory, i, n); len(part) > 0; {
			k := min(len(part), copyChunk)
			if _, err := conn.Write(part[:k]); err != nil {
				return err
			}
			part = part[k:]
		}
		_, err = conn.Read(make([]byte, 1)) // all is in place
		return err
	}); err != nil {
		return 0, err
	}
	return float64(size-fillAt) / time.Since(began).Seconds(), nil
}

// receiveCopy is the other end.
func receiveCopy(n, size int) error {
	file, err := sys.MemFD("copy", int64(size))
	if err != nil {
		return err
	}
	defer file.Close()
	m, err := sys.MapShared(int(file.Fd()), 0, size)
	if err != nil {
		return err
	}
	defer m.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	fmt.Println(ln.Addr())
	return each(n, func(int) error {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		defer conn.Close()
		which := make([]byte, 1)
		if _, err := io.ReadFull(conn, which); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, share(m.Bytes(), int(which[0]), n)); err != nil {
			return err
		}
		_, err = conn.Write(which)
		return err
	})
}

// share is the i-th of n parts of the random bytes.
func share(memory []byte, i, n int) []byte {
	filled := memory[fillAt:]
	return filled[len(filled)/n*i : len(filled)/n*(i+1)]
}

// each calls f n times at once.
func each(n int, f func(i int) error) error {
	var wg sync.WaitGroup
	errs := make(chan error, n)
	for i := range n {
		wg.Go(func() { errs <- f(i) })
	}
	wg.Wait()
	for range n {
		if err := <-errs; err != nil {
			return err
		}
	}
	return nil
}

// touch has every page mapped.
func touch(memory []byte) (sum byte) {
	for at := 0; at < len(memory); at += 4096 {
		sum += memory[at]
	}
	return sum
}
