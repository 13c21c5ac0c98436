package disk

import (
	"bytes"
	"path/filepath"
	"testing"

	"vmm/scsi"
	"vmm/scsi/pr"
)

// FuzzDisk sends a CDB with data to a disk. Whatever they are, the command
// comes back once, with a result or an error and never both, with a residual
// inside its buffers, touching neither the memory around them nor the file
// beyond its end.
func FuzzDisk(f *testing.F) {
	for _, row := range commands {
		for _, fill := range []byte{0x00, 0x01, 0xff} {
			cdb := bytes.Clone(row.cdb)
			for i := 1; i < len(cdb); i++ {
				if i > 1 || row.flags&serviceAction == 0 {
					cdb[i] &= fill
				}
			}
			f.Add(cdb, []byte{0, 8, 0, 0, 0x08, 0x12, 0x04, 0, 1, 2, 3}, uint16(300), byte(0))
		}
	}
	f.Add(cdb10(scsi.OpUnmap, 0, 0, 24), []byte{0, 22, 0, 16, 16: 0, 23: 8}, uint16(0), byte(1))
	f.Add(cdb16(scsi.OpCompareAndWrite, 0, 1, 1), make([]byte, 1024), uint16(0), byte(2))
	f.Add(cdb16(scsi.OpServiceActionIn16, scsi.SAGetLBAStatus, 1, 4096), []byte{}, uint16(4096), byte(0))
	for _, o := range []pr.Out{
		{Action: pr.Register, ServiceKey: 1, APTPL: true},
		{Action: pr.RegisterAndIgnoreExistingKey, Key: 1, ServiceKey: 2},
		{Action: pr.RegisterAndMove, Key: 1, ServiceKey: 2, Unregister: true, MoveTo: named(f, "other")},
		{Action: pr.Register, ServiceKey: 1, SpecifyPorts: true, Ports: []pr.TransportID{named(f, "other").Initiator}},
	} {
		cdb, list := o.Encode()
		f.Add(cdb, list, uint16(0), byte(0))
	}
	f.Add(read10(8, 100, 10), []byte{}, uint16(5120), byte(3))

	none := noReservations(f)
	f.Cleanup(func() { none.Close() })
	f.Fuzz(func(t *testing.T, cdb, out []byte, in uint16, attr byte) {
		const guard = 0xa5
		file := &memFile{data: pattern(1, 64<<10)}
		o := Options{BlockSize: 512, ReadOnly: attr&0x80 != 0}
		if attr&0x40 != 0 {
			o.BlockSize = 4096
		}
		// Files take their time, so only who may change them gets new ones.
		reservations := none
		if commandReserves(cdb) != nil {
			reservations = noReservations(t)
			defer reservations.Close()
		}
		l := newLUN("fuzz", file, uint64(len(file.data)), uuid{}, reservations, o)
		defer func() {
			l.reservations = nil // not this LUN's to close
			l.Close()
		}()
		l.takeAttention()

		// Data-in is a piece of a larger array, whose other bytes show whether
		// somebody went too far.
		memory := bytes.Repeat([]byte{guard}, int(in)+64)
		outWas := bytes.Clone(out)
		for range 2 { // the second meets what the first left
			c := &scsi.Command{CDB: bytes.Clone(cdb), Attr: scsi.TaskAttr(attr & 7)}
			switch {
			case len(out) > 0:
				c.DataOut = [][]byte{out[:len(out)/2], nil, out[len(out)/2:]}
			case in > 0:
				c.DataIn = [][]byte{memory[32 : 32+in/3], memory[32+in/3 : 32+in]}
			}
			run(l, c)
			switch {
			case c.Outcome != scsi.Completed:
				t.Errorf("outcome %v", c.Outcome)
			case c.Status == scsi.Good:
				if c.SenseLen != 0 {
					t.Errorf("GOOD with sense % x", c.Sense[:c.SenseLen])
				}
			case c.Status == scsi.CheckCondition:
				if s, ok := scsi.ParseSense(c.Sense[:c.SenseLen]); !ok || s.Key == scsi.NoSense {
					t.Errorf("CHECK CONDITION with sense % x", c.Sense[:c.SenseLen])
				}
			case c.Status == scsi.ReservationConflict: // a REGISTER with a key that is not the disk's
				if commandReserves(cdb) == nil || c.SenseLen != 0 {
					t.Errorf("RESERVATION CONFLICT with sense % x", c.Sense[:c.SenseLen])
				}
			default:
				t.Errorf("status %v", c.Status)
			}
			if int(c.Residual) > c.DataLen() {
				t.Errorf("residual %d of %d", c.Residual, c.DataLen())
			}
			if c.DataIn != nil {
				moved := int(in) - int(c.Residual)
				for i, b := range memory {
					if (i < 32 || i >= 32+moved) && b != guard {
						t.Fatalf("byte %d of the memory around a buffer of %d, of which %d were moved, was written", i-32, in, moved)
					}
				}
				for i := range memory {
					memory[i] = guard
				}
			}
		}
		if !bytes.Equal(out, outWas) {
			t.Error("data-out was written")
		}
		if file.beyond {
			t.Error("the file was accessed beyond its end")
		}
		if len(commandsChanging(cdb)) == 0 && !bytes.Equal(file.data, pattern(1, 64<<10)) {
			t.Errorf("% x changed the medium", cdb)
		}
	})
}

// noReservations is reservations that nobody has.
func noReservations(t testing.TB) *pr.File {
	f, err := openReservations(filepath.Join(fastDir(t), "disk.img"), "fuzz")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// commandReserves is a row of the table for cdb that has to do with
// reservations, if there is one.
func commandReserves(cdb []byte) *command {
	if len(cdb) == 0 {
		return nil
	}
	for i, row := range byOpcode[cdb[0]] {
		if row.flags&reserves != 0 {
			return &byOpcode[cdb[0]][i]
		}
	}
	return nil
}

// commandsChanging is the rows of the table for cdb that may change the medium.
func commandsChanging(cdb []byte) (rows []command) {
	if len(cdb) == 0 {
		return nil
	}
	for _, row := range byOpcode[cdb[0]] {
		if row.flags&changes != 0 {
			rows = append(rows, row)
		}
	}
	return rows
}
