package kernel

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// smallELF returns an ELF header, which is all that a reader needs, followed
// by bytes that compress well and badly.
func smallELF() []byte {
	b := make([]byte, 64)
	copy(b, elf.ELFMAG)
	b[4], b[5], b[6] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	binary.LittleEndian.PutUint16(b[16:], uint16(elf.ET_EXEC))
	binary.LittleEndian.PutUint16(b[18:], uint16(elf.EM_X86_64))
	binary.LittleEndian.PutUint32(b[20:], uint32(elf.EV_CURRENT))
	binary.LittleEndian.PutUint16(b[52:], 64)
	b = append(b, bytes.Repeat([]byte("kernel text "), 500)...)
	x := uint32(1)
	for range 3000 {
		x = x*1664525 + 1013904223
		b = append(b, byte(x>>24))
	}
	return b
}

// bzImage wraps a compressed payload as the kernel's build does.
func bzImage(payload []byte) []byte {
	const sectors, offset = 3, 0x123
	image := make([]byte, (sectors+1)*512+offset)
	image[0x1f1] = sectors
	copy(image[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(image[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(image[0x248:], offset)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	return append(append(image, payload...), "trailer"...)
}

func withSize(packed []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(packed, uint32(size))
}

// packLZ4 makes a legacy frame of one block: literals, then a match that
// overlaps what it copies, then literals.
func packLZ4(t *testing.T, plain []byte) []byte {
	t.Helper()
	var block []byte
	literals := func(token byte, lit []byte) {
		n := len(lit)
		if n < 15 {
			block = append(block, byte(n)<<4|token)
		} else {
			block = append(block, 0xf0|token)
			for n -= 15; n >= 255; n -= 255 {
				block = append(block, 255)
			}
			block = append(block, byte(n))
		}
		block = append(block, lit...)
	}
	// "kernel text " repeated: 64 + 12 literal bytes, then distance 12.
	const head, match = 64 + 12, 499 * 12
	literals(15, plain[:head])
	block = append(block, 12, 0)
	n := match - 4 - 15
	for ; n >= 255; n -= 255 {
		block = append(block, 255)
	}
	block = append(block, byte(n))
	literals(0, plain[head+match:])
	out := []byte{0x02, 0x21, 0x4c, 0x18}
	out = binary.LittleEndian.AppendUint32(out, uint32(len(block)))
	return append(out, block...)
}

func TestExtractELF(t *testing.T) {
	plain := smallELF()
	payloads := map[string][]byte{"lz4": withSize(packLZ4(t, plain), len(plain))}
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	w.Write(plain)
	w.Close()
	payloads["gzip"] = gz.Bytes()
	for _, tool := range []string{"xz", "zstd"} {
		if _, err := exec.LookPath(tool); err != nil {
			continue
		}
		cmd := exec.Command(tool, "-c", "-q")
		if tool == "xz" {
			cmd.Args = append(cmd.Args, "--check=crc32")
		}
		cmd.Stdin = bytes.NewReader(plain)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		payloads[tool] = withSize(packed, len(plain))
	}
	for name, payload := range payloads {
		got, err := ExtractELF(t.Context(), bzImage(payload))
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: %d bytes, %v; want the %d that were packed", name, len(got), err, len(plain))
		}
	}
}

func TestExtractELFRefuses(t *testing.T) {
	plain := smallELF()
	good := bzImage(withSize(packLZ4(t, plain), len(plain)))
	edit := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	start := (3+1)*512 + 0x123
	for _, test := range []struct {
		name  string
		image []byte
		want  string
	}{
		{"empty", nil, "not a bzImage"},
		{"no signature", edit(func(b []byte) { b[0x202] = 'X' }), "not a bzImage"},
		{"old protocol", edit(func(b []byte) { b[0x206] = 7 }), "boot protocol 2.07"},
		{"payload outside", edit(func(b []byte) { b[0x24f] = 0x7f }), "outside the file"},
		{"payload of nothing", edit(func(b []byte) { copy(b[0x24c:], []byte{4, 0, 0, 0}) }), "outside the file"},
		{"compression", edit(func(b []byte) { b[start] = 0xaa }), "unknown compression"},
		// magic, size, token, length byte, 76 literals: the distance
		{"distance", edit(func(b []byte) { copy(b[start+4+4+1+1+76:], []byte{0xff, 0xff}) }), "malformed block"},
		{"not ELF", bzImage(withSize([]byte{0x02, 0x21, 0x4c, 0x18, 3, 0, 0, 0, 0x20, 'h', 'i'}, 2)), "payload: EOF"},
		{"wrong size", bzImage(withSize(packLZ4(t, plain), len(plain)+1)), "unpacks to"},
		{"enormous", bzImage(withSize(packLZ4(t, plain), 0xffffffff)), "at most"},
	} {
		_, err := ExtractELF(t.Context(), test.image)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: ExtractELF = %v; want an error with %q", test.name, err, test.want)
		}
	}
}

func FuzzUnpackLZ4(f *testing.F) {
	f.Add([]byte{0x20, 'h', 'i'})
	f.Add([]byte{0x14, 'a', 1, 0, 0x10, 'b'})
	f.Add([]byte{0xff, 255, 255, 0})
	f.Fuzz(func(t *testing.T, block []byte) {
		const limit = 1 << 16
		out, err := unpackLZ4Block(nil, block, limit)
		if err == nil && len(out) > limit {
			t.Errorf("unpackLZ4Block(% x) = %d bytes; the limit is %d", block, len(out), limit)
		}
	})
}

// fakeTools puts shell scripts in front of PATH.
func fakeTools(t *testing.T, tools map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range tools {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// archive is the fake package archive: apt knows version $V of a kernel, and
// each download is counted.
func archive(t *testing.T) (downloads string) {
	t.Helper()
	dir := t.TempDir()
	plain := smallELF()
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, bzImage(withSize(packLZ4(t, plain), len(plain))), 0o644); err != nil {
		t.Fatal(err)
	}
	downloads = filepath.Join(dir, "downloads")
	t.Setenv("VMM_LAB_CACHE", filepath.Join(dir, "cache"))
	t.Setenv("V", "6.1.1-1")
	t.Setenv("IMAGE", image)
	t.Setenv("DOWNLOADS", downloads)
	fakeTools(t, map[string]string{
		"apt-cache": `echo "Package: $3"; echo "Version: $V"; echo "Depends: linux-image-6.1.0-9-amd64 (= $V), kmod"`,
		"apt-get":   `for last; do :; done; echo "$last" >> $DOWNLOADS; touch linux-image.deb`,
		"dpkg-deb": `mkdir -p "$3/boot" "$3/lib/modules/6.1.0-9-amd64" "$3/usr/share/doc"; cp $IMAGE "$3/boot/vmlinuz-6.1.0-9-amd64"
echo kernel/x.ko > "$3/lib/modules/6.1.0-9-amd64/modules.builtin"`,
		"depmod": `touch "$2/lib/modules/$3/modules.dep"`,
	})
	return downloads
}

func TestFind(t *testing.T) {
	downloads := archive(t)
	// Callers at once do the work once.
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			k, err := Find(t.Context(), Generic)
			if err != nil {
				t.Error(err)
				return
			}
			if k.Release != "6.1.0-9-amd64" || k.Version != "6.1.1-1" {
				t.Errorf("Find = %+v; want release 6.1.0-9-amd64, version 6.1.1-1", k)
			}
			if got, err := os.ReadFile(k.VMLinux); err != nil || !bytes.Equal(got, smallELF()) {
				t.Errorf("%s: %d bytes, %v; want the ELF image", k.VMLinux, len(got), err)
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(k.BzImage), "../usr")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the documentation was kept: %v", err)
			}
		})
	}
	callers.Wait()
	wantDownloads := func(want string) {
		t.Helper()
		if got, _ := os.ReadFile(downloads); string(got) != want {
			t.Errorf("downloads = %q; want %q", got, want)
		}
	}
	wantDownloads("linux-image-6.1.0-9-amd64=6.1.1-1\n")

	// A newer version is another entry.
	t.Setenv("V", "6.1.2-1")
	if k, err := Find(t.Context(), Generic); err != nil || k.Version != "6.1.2-1" {
		t.Errorf("Find = %+v, %v; want version 6.1.2-1", k, err)
	}
	wantDownloads("linux-image-6.1.0-9-amd64=6.1.1-1\nlinux-image-6.1.0-9-amd64=6.1.2-1\n")

	// Without apt, what is cached.
	fakeTools(t, map[string]string{"apt-cache": "echo 'E: No packages found' >&2; exit 100"})
	k, err := Find(t.Context(), Generic)
	if err != nil || k.Version != "6.1.2-1" || k.Package != "linux-image-6.1.0-9-amd64" {
		t.Errorf("Find without apt = %+v, %v; want the cached 6.1.2-1", k, err)
	}
	if _, err := Find(t.Context(), Cloud); !errors.Is(err, ErrNotFetched) || !strings.Contains(err.Error(), "apt-get update") || !strings.Contains(err.Error(), "No packages found") {
		t.Errorf("Find of a flavour neither cached nor known = %v; want ErrNotFetched that says what to do", err)
	}
	if left, _ := filepath.Glob(filepath.Join(os.Getenv("VMM_LAB_CACHE"), "tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFindFails(t *testing.T) {
	archive(t)
	fakeTools(t, map[string]string{"apt-get": "echo '404  Not Found' >&2; exit 100"})
	if _, err := Find(t.Context(), Generic); !errors.Is(err, ErrNotFetched) || !strings.Contains(err.Error(), "404  Not Found") {
		t.Errorf("Find with a failing download = %v; want ErrNotFetched with apt's words", err)
	}
	if _, err := Find(t.Context(), "fancy"); err == nil || !strings.Contains(err.Error(), `"fancy"`) {
		t.Errorf("Find(fancy) = %v; want an error that names it", err)
	}
	entries, err := os.ReadDir(os.Getenv("VMM_LAB_CACHE"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".lock") {
			t.Errorf("a failed fetch left %s in the cache", e.Name())
		}
	}
}
