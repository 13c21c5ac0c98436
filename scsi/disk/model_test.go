package disk

import (
	"bytes"
	"encoding/binary"
	"testing"

	"pgregory.net/rapid"

	"vmm/scsi"
)

// TestAgainstModel compares the disk with an array of bytes, under random
// sequences of commands that change and read it.
func TestAgainstModel(t *testing.T) {
	for _, o := range []Options{{BlockSize: 512}, {BlockSize: 4096}} {
		l := openDisk(t, image(t, 256<<10), o)
		l.takeAttention()
		if !l.thin {
			t.Skip("the file system of TMPDIR cannot punch holes")
		}
		l.flusher.sync = func() error { return nil } // durability is not looked at, and real disks take their time
		bs := int(o.BlockSize)
		blocks := 256 << 10 / bs
		model := make([]byte, blocks*bs)
		rapid.Check(t, func(t *rapid.T) {
			extent := func(most int) (lba, n int) {
				lba = rapid.IntRange(0, blocks-1).Draw(t, "lba")
				return lba, rapid.IntRange(0, min(most, blocks-lba)).Draw(t, "blocks")
			}
			data := func(n int) []byte {
				return pattern(rapid.IntRange(0, 255).Draw(t, "data"), n)
			}
			// cut spreads p over pieces of memory of any length.
			cut := func(p []byte) (segs [][]byte) {
				for len(p) > 0 {
					n := rapid.IntRange(0, len(p)).Draw(t, "piece")
					if len(segs) > 8 {
						n = len(p)
					}
					segs = append(segs, p[:n])
					p = p[n:]
				}
				return segs
			}
			send := func(cdb, out []byte) {
				t.Helper()
				c := &scsi.Command{CDB: cdb, DataOut: cut(out)}
				if run(l, c); c.Status != scsi.Good || c.Residual != 0 {
					t.Fatalf("% x with %d bytes: %v, sense % x, residual %d", cdb, len(out), c.Status, c.Sense[:c.SenseLen], c.Residual)
				}
			}
			fua := func() byte { return rapid.SampledFrom([]byte{0, fuaField}).Draw(t, "FUA") }
			t.Repeat(map[string]func(*rapid.T){
				"": func(*rapid.T) {},
				"READ": func(*rapid.T) {
					lba, n := extent(blocks)
					c := &scsi.Command{CDB: cdb16(scsi.OpRead16, fua(), uint64(lba), uint32(n)), DataIn: cut(make([]byte, n*bs))}
					if run(l, c); c.Status != scsi.Good || c.Residual != 0 {
						t.Fatalf("READ of %d+%d: %v", lba, n, c.Status)
					}
					if !bytes.Equal(dataIn(c), model[lba*bs:(lba+n)*bs]) {
						t.Fatalf("READ of %d+%d: not what the model has", lba, n)
					}
				},
				"WRITE": func(*rapid.T) {
					lba, n := extent(64)
					p := data(n * bs)
					send(cdb16(scsi.OpWrite16, fua(), uint64(lba), uint32(n)), p)
					copy(model[lba*bs:], p)
				},
				"UNMAP": func(*rapid.T) {
					descriptors := rapid.IntRange(0, 3).Draw(t, "descriptors")
					list := make([]byte, 8+16*descriptors)
					binary.BigEndian.PutUint16(list[2:], uint16(16*descriptors))
					for i := range descriptors {
						lba, n := extent(blocks / 4)
						binary.BigEndian.PutUint64(list[8+16*i:], uint64(lba))
						binary.BigEndian.PutUint32(list[16+16*i:], uint32(n))
						clear(model[lba*bs : (lba+n)*bs])
					}
					send(cdb10(scsi.OpUnmap, 0, 0, uint16(len(list))), list)
				},
				"WRITE SAME": func(*rapid.T) {
					lba, n := extent(blocks / 4)
					if n == 0 {
						return
					}
					flags := rapid.SampledFrom([]byte{0, unmapField, ndobField, unmapField | ndobField}).Draw(t, "flags")
					block, p := make([]byte, bs), []byte(nil)
					if flags&ndobField == 0 {
						if rapid.Bool().Draw(t, "not zero") {
							block = data(bs)
						}
						p = block
					}
					send(cdb16(scsi.OpWriteSame16, flags, uint64(lba), uint32(n)), p)
					for i := lba; i < lba+n; i++ {
						copy(model[i*bs:], block)
					}
				},
				"COMPARE AND WRITE": func(*rapid.T) {
					lba, n := extent(int(l.maxCompareBlocks()))
					old := bytes.Clone(model[lba*bs : (lba+n)*bs])
					next := data(n * bs)
					c := &scsi.Command{CDB: cdb16(scsi.OpCompareAndWrite, fua(), uint64(lba), uint32(n))}
					wrong := -1
					if n > 0 && rapid.Bool().Draw(t, "miscompare") {
						wrong = rapid.IntRange(0, len(old)-1).Draw(t, "at")
						old[wrong]++
					}
					c.DataOut = cut(append(old, next...))
					run(l, c)
					if wrong < 0 {
						if c.Status != scsi.Good || c.Residual != 0 {
							t.Fatalf("COMPARE AND WRITE of what is there: %v", c.Status)
						}
						copy(model[lba*bs:], next)
					} else if s, _ := scsi.ParseSense(c.Sense[:c.SenseLen]); s != miscompare || binary.BigEndian.Uint32(c.Sense[3:]) != uint32(wrong) {
						t.Fatalf("COMPARE AND WRITE with a difference at %d: %v at %d", wrong, s, binary.BigEndian.Uint32(c.Sense[3:]))
					}
				},
				"VERIFY": func(*rapid.T) {
					lba, n := extent(blocks)
					send(cdb16(scsi.OpVerify16, 0x02, uint64(lba), uint32(n)), model[lba*bs:(lba+n)*bs])
				},
				"GET LBA STATUS": func(*rapid.T) {
					lba, _ := extent(0)
					c := do(t, l, cdb16(scsi.OpServiceActionIn16, scsi.SAGetLBAStatus, uint64(lba), 4096), nil, 4096)
					next := uint64(lba)
					for d := dataIn(c)[8:]; len(d) > 0; d = d[16:] {
						at, n := binary.BigEndian.Uint64(d), uint64(binary.BigEndian.Uint32(d[8:]))
						if at != next || n == 0 || at+n > uint64(blocks) {
							t.Fatalf("GET LBA STATUS: %d+%d; want one that begins at %d", at, n, next)
						}
						next += n
						if hole := model[at*uint64(bs) : next*uint64(bs)]; d[12] == 1 && bytes.Count(hole, []byte{0}) != len(hole) {
							t.Fatalf("GET LBA STATUS: %d+%d is deallocated, but was written", at, n)
						}
					}
				},
			})
		})
	}
}
