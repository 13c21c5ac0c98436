package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	blockSize = 4096
	stripe    = 256 << 10 // bytes that fill and sum move at a time
)

// result is what rdtest prints.
type result struct {
	Device  string  `json:"device"`
	Mode    string  `json:"mode"` // read or write
	Depth   int     `json:"depth"`
	Ops     int     `json:"ops"`
	Seconds float64 `json:"seconds"`
	IOPS    float64 `json:"iops"`
}

// rdtest measures random 4 KiB reads or writes past the page cache, at a fixed
// number of requests under way.
func rdtest(args []string) error {
	flags := flag.NewFlagSet("rdtest", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: rdtest [-depth N] [-time DURATION] [-write] [-seed N] DEVICE\nPrints the rate as JSON. -write destroys the contents.")
		flags.PrintDefaults()
	}
	depth := flags.Int("depth", 1, "requests under way, 1 to 256")
	duration := flags.Duration("time", 3*time.Second, "for how long")
	write := flags.Bool("write", false, "write instead of read")
	seed := flags.Uint64("seed", 1, "of the offsets")
	flags.Parse(args)
	if flags.NArg() != 1 || *depth < 1 || *depth > 256 {
		flags.Usage()
		os.Exit(2)
	}
	f, size, err := openDirect(flags.Arg(0), *write)
	if err != nil {
		return err
	}
	defer f.Close()
	blocks := size / blockSize
	if blocks == 0 {
		return fmt.Errorf("%s: %d bytes are less than a block", f.Name(), size)
	}
	buf, err := alignedBuffer(*depth * blockSize)
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(*seed, 0))
	for i := range buf {
		buf[i] = byte(random.Uint32())
	}
	offset := func() int64 { return random.Int64N(blocks) * blockSize }

	start := time.Now()
	var ops int
	if *depth == 1 {
		ops, err = oneByOne(f, buf, offset, *write, start.Add(*duration))
	} else {
		ops, err = atDepth(f, buf, offset, *write, start.Add(*duration))
	}
	if err != nil {
		return err
	}
	seconds := time.Since(start).Seconds()
	mode := "read"
	if *write {
		mode = "write"
	}
	return json.NewEncoder(os.Stdout).Encode(result{f.Name(), mode, *depth, ops, seconds, float64(ops) / seconds})
}

func oneByOne(f *os.File, buf []byte, offset func() int64, write bool, until time.Time) (ops int, err error) {
	for ; time.Now().Before(until); ops++ {
		if write {
			_, err = f.WriteAt(buf, offset())
		} else {
			_, err = f.ReadAt(buf, offset())
		}
		if err != nil {
			return ops, err
		}
	}
	return ops, nil
}

// openDirect opens a block device, or a file, past the page cache.
func openDirect(path string, write bool) (*os.File, int64, error) {
	mode := os.O_RDONLY
	if write {
		mode = os.O_RDWR
	}
	f, err := os.OpenFile(path, mode|unix.O_DIRECT, 0)
	if err != nil {
		return nil, 0, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, size, nil
}

// alignedBuffer returns memory aligned to pages, as O_DIRECT wants it.
func alignedBuffer(size int) ([]byte, error) {
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mmap %d bytes: %w", size, err)
	}
	return buf, nil
}

// fill writes a pattern to a device and prints its checksum, which sum prints
// too if the device then has what was written.
func fill(args []string) error {
	flags := flag.NewFlagSet("fill", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: fill [-offset BYTES] [-size BYTES] [-seed N] DEVICE\nWrites a pattern (a multiple of 4096 bytes) and prints its SHA-256.")
	}
	return eachStripe(flags, args, true, func(f *os.File, h hash.Hash, buf []byte, offset int64, seed uint64) error {
		pattern(buf, offset, seed)
		h.Write(buf)
		_, err := f.WriteAt(buf, offset)
		return err
	})
}

func sum(args []string) error {
	flags := flag.NewFlagSet("sum", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: sum [-offset BYTES] [-size BYTES] DEVICE\nPrints the SHA-256 of a device's contents, read past the page cache.")
	}
	return eachStripe(flags, args, false, func(f *os.File, h hash.Hash, buf []byte, offset int64, _ uint64) error {
		if _, err := f.ReadAt(buf, offset); err != nil {
			return err
		}
		h.Write(buf)
		return nil
	})
}

func eachStripe(flags *flag.FlagSet, args []string, write bool, do func(f *os.File, h hash.Hash, buf []byte, offset int64, seed uint64) error) error {
	offset := flags.Int64("offset", 0, "where to start, in bytes")
	size := flags.Int64("size", 0, "how many bytes; 0: to the end")
	seed := flags.Uint64("seed", 1, "of the pattern")
	flags.Parse(args)
	if flags.NArg() != 1 {
		flags.Usage()
		os.Exit(2)
	}
	f, end, err := openDirect(flags.Arg(0), write)
	if err != nil {
		return err
	}
	defer f.Close()
	if *size == 0 {
		*size = (end - *offset) / blockSize * blockSize
	}
	if *offset < 0 || *size < 0 || *offset%blockSize != 0 || *size%blockSize != 0 || *size > end-*offset {
		return fmt.Errorf("offset %d, size %d: want multiples of %d within %d bytes", *offset, *size, blockSize, end)
	}
	buf, err := alignedBuffer(stripe)
	if err != nil {
		return err
	}
	h := sha256.New()
	for at, last := *offset, *offset+*size; at < last; at += stripe {
		part := buf[:min(stripe, last-at)]
		if err := do(f, h, part, at, *seed); err != nil {
			return err
		}
	}
	if write {
		if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	fmt.Printf("%x\n", h.Sum(nil))
	return nil
}

// pattern fills buf with numbers that depend on the position on the device:
// a block in the wrong place shows.
func pattern(buf []byte, offset int64, seed uint64) {
	for i := 0; i < len(buf); i += 8 {
		// splitmix64's finaliser of position and seed
		x := (uint64(offset)+uint64(i))*0x9e3779b97f4a7c15 + seed*0xd1342543de82ef95
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(buf[i:], x^x>>31)
	}
}
