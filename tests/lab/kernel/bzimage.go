package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/exec"
)

// maxELF caps an unpacked kernel image, in bytes.
const maxELF = 512 << 20

// ExtractELF returns the ELF image that a bzImage carries compressed. The
// setup header says where (Documentation/x86/boot.rst: setup_sects at 0x1f1,
// payload_offset at 0x248 and payload_length at 0x24c since protocol 2.08).
func ExtractELF(ctx context.Context, image []byte) ([]byte, error) {
	if len(image) < 0x250 || string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage: no setup header")
	}
	if version := binary.LittleEndian.Uint16(image[0x206:]); version < 0x208 {
		return nil, fmt.Errorf("bzImage: boot protocol %d.%02d does not say where its payload is", version>>8, version&0xff)
	}
	sectors := int64(image[0x1f1])
	if sectors == 0 {
		sectors = 4 // "for backwards compatibility"
	}
	start := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(image[0x248:]))
	length := int64(binary.LittleEndian.Uint32(image[0x24c:]))
	if length < 8 || start+length > int64(len(image)) {
		return nil, fmt.Errorf("bzImage: payload %#x+%#x is outside the file (%#x bytes)", start, length, len(image))
	}
	payload := image[start : start+length]
	// The build appends the unpacked size to every format but gzip, where it
	// is the format's own trailer.
	size := int64(binary.LittleEndian.Uint32(payload[length-4:]))
	if size > maxELF {
		return nil, fmt.Errorf("bzImage: payload of %d bytes; at most %d", size, maxELF)
	}

	var out []byte
	var err error
	switch packed := payload[:length-4]; {
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		out, err = filter(ctx, packed, "xz", "-dc")
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		out, err = filter(ctx, packed, "zstd", "-dc")
	case bytes.HasPrefix(payload, []byte("\x02\x21\x4c\x18")):
		out, err = unpackLZ4(packed, int(size))
	case bytes.HasPrefix(payload, []byte("\x1f\x8b")):
		var r *gzip.Reader
		if r, err = gzip.NewReader(bytes.NewReader(payload)); err == nil {
			out, err = io.ReadAll(io.LimitReader(r, maxELF))
		}
	default:
		err = fmt.Errorf("unknown compression, magic % x", payload[:6])
	}
	if err != nil {
		return nil, fmt.Errorf("bzImage: payload: %w", err)
	}
	if int64(len(out)) != size {
		return nil, fmt.Errorf("bzImage: payload unpacks to %d bytes; want %d", len(out), size)
	}
	if _, err := elf.NewFile(bytes.NewReader(out)); err != nil {
		return nil, fmt.Errorf("bzImage: payload: %w", err)
	}
	return out, nil
}

func filter(ctx context.Context, in []byte, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(e.Stderr))
	}
	return out, err
}

// unpackLZ4 unpacks the "legacy" frame that kernels use: a magic number, then
// blocks, each preceded by its size (doc/lz4_Frame_format.md, "Legacy frame").
// Each block unpacks to 8 MiB, the last to less.
func unpackLZ4(in []byte, size int) ([]byte, error) {
	const blockSize = 8 << 20
	out := make([]byte, 0, size)
	for in = in[4:]; len(in) > 0; {
		if len(in) < 4 {
			return nil, fmt.Errorf("lz4: %d bytes after the last block", len(in))
		}
		n := int(binary.LittleEndian.Uint32(in))
		in = in[4:]
		if n > len(in) {
			return nil, fmt.Errorf("lz4: block of %d bytes; %d are left", n, len(in))
		}
		var err error
		if out, err = unpackLZ4Block(out, in[:n], min(size, len(out)+blockSize)); err != nil {
			return nil, err
		}
		in = in[n:]
	}
	return out, nil
}

var errLZ4 = errors.New("lz4: malformed block")

// unpackLZ4Block appends a block's contents to out, which must not grow
// beyond limit (doc/lz4_Block_format.md): a token with two 4-bit lengths,
// literals, a 16-bit distance back, and so on; the last sequence has literals
// only.
func unpackLZ4Block(out, in []byte, limit int) ([]byte, error) {
	base := len(out)
	length := func(n int) (int, bool) {
		if n < 15 {
			return n, true
		}
		for len(in) > 0 && n <= limit {
			b := in[0]
			in = in[1:]
			n += int(b)
			if b != 255 {
				return n, true
			}
		}
		return 0, false
	}
	for len(in) > 0 {
		token := in[0]
		in = in[1:]
		n, ok := length(int(token >> 4))
		if !ok || n > len(in) || n > limit-len(out) {
			return nil, errLZ4
		}
		out = append(out, in[:n]...)
		in = in[n:]
		if len(in) == 0 {
			return out, nil
		}
		if len(in) < 2 {
			return nil, errLZ4
		}
		distance := int(binary.LittleEndian.Uint16(in))
		in = in[2:]
		n, ok = length(int(token & 15))
		n += 4
		if !ok || distance == 0 || distance > len(out)-base || n > limit-len(out) {
			return nil, errLZ4
		}
		for range n { // may overlap what it writes: that is how runs are made
			out = append(out, out[len(out)-distance])
		}
	}
	return nil, errLZ4
}
