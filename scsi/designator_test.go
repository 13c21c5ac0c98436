package scsi_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"vmm/scsi"
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// page builds page 83h from descriptors.
func page(descriptors ...string) []byte {
	body := unhex(strings.Join(descriptors, ""))
	return append([]byte{0, 0x83, byte(len(body) >> 8), byte(len(body))}, body...)
}

// Descriptors of one logical unit as the kernel's LIO target lists them.
const (
	naa6      = "01 03 00 10 60014050000000001234567890abcdef"
	naa5      = "01 03 00 08 5000c5001234abcd"
	naa3      = "01 03 00 08 3000000000000001"
	eui64     = "01 02 00 08 0123456789abcdef"
	t10       = "02 01 00 14 4c494f2d4f524720 6469736b 3a 30313233343536" // "LIO-ORG disk:0123456"
	name      = "03 08 00 14 6e61612e36303031343035303030303030303000"    // "naa.600140500000000", padded
	uuid      = "01 0a 00 12 1000 12345678 1234 5678 9abc def012345678"
	vendor    = "01 00 00 04 cafebabe"
	port      = "51 93 00 08 5001405000000001"
	relPort   = "51 94 00 04 00000001"
	portGroup = "51 95 00 04 00000000"
	device    = "01 23 00 08 5000000000000009"
)

func TestParseDesignators(t *testing.T) {
	ds, err := scsi.ParseDesignators(page(naa6, t10, relPort, portGroup, port, device, name, eui64, uuid, vendor, naa5, naa3))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range ds {
		got = append(got, d.String())
	}
	want := []string{
		"naa.60014050000000001234567890abcdef",
		"t10.LIO-ORG_disk:0123456",
		"naa.600140500000000",
		"eui.0123456789abcdef",
		"uuid.12345678-1234-5678-9abc-def012345678",
		"type0.cafebabe",
		"naa.5000c5001234abcd",
		"naa.3000000000000001",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("designators of the logical unit (-want +got):\n%s", d)
	}
}

func TestParseDesignatorsRefuses(t *testing.T) {
	good := page(naa6)
	for what, p := range map[string][]byte{
		"nothing":                   nil,
		"half a header":             good[:3],
		"another page":              append([]byte{0, 0x80}, good[2:]...),
		"less than the header says": good[:10],
		"designator beyond the page": func() []byte {
			p := bytes.Clone(good)
			p[7]++
			return p
		}(),
		"half a descriptor": append([]byte{0, 0x83, 0, 2}, 1, 3),
	} {
		if ds, err := scsi.ParseDesignators(p); err == nil {
			t.Errorf("%s: %v; want an error", what, ds)
		}
	}
	if ds, err := scsi.ParseDesignators(page()); len(ds) != 0 || err != nil {
		t.Errorf("an empty page = %v, %v; want none, nil", ds, err)
	}
}

// identity is one with these designators.
func identity(t testing.TB, descriptors ...string) *scsi.Identity {
	t.Helper()
	ds, err := scsi.ParseDesignators(page(descriptors...))
	if err != nil {
		t.Fatal(err)
	}
	return &scsi.Identity{Vendor: "V", Product: "P", Designators: ds}
}

func TestIdentityName(t *testing.T) {
	for _, c := range []struct {
		descriptors []string
		want        string
	}{
		{[]string{t10, eui64, naa6}, "naa.60014050000000001234567890abcdef"},
		{[]string{naa3, t10, eui64}, "eui.0123456789abcdef"},
		{[]string{t10, name}, "naa.600140500000000"},
		{[]string{naa3, t10}, "t10.LIO-ORG_disk:0123456"},
		{[]string{vendor, naa3}, "naa.3000000000000001"},
		{[]string{vendor}, "V_P"},
		{nil, "V_P"},
	} {
		if got := identity(t, c.descriptors...).String(); got != c.want {
			t.Errorf("String() of %q = %q; want %q", c.descriptors, got, c.want)
		}
	}
	id := &scsi.Identity{Vendor: "A  B", Product: "x\ny", Serial: "12 34"}
	if got, want := id.String(), "A_B_x_y serial 12_34"; got != want {
		t.Errorf("String() = %q; want %q", got, want)
	}
	hostile := identity(t)
	hostile.Designators = []scsi.Designator{{Type: scsi.DesignatorNAA}, {Type: 15, ID: []byte{1}}} // from another host
	if d, ok := hostile.Name(); ok {
		t.Errorf("Name() of empty designators = %v; want none", d)
	}
}

func TestIdentitySame(t *testing.T) {
	serial := func(s string) *scsi.Identity { return &scsi.Identity{Vendor: "V", Product: "P", Serial: s} }
	otherNAA := strings.Replace(naa6, "cdef", "cdee", 1)
	for _, c := range []struct {
		what string
		a, b *scsi.Identity
		want bool
	}{
		{"equal", identity(t, naa6, t10), identity(t, naa6, t10), true},
		{"in another order, through another port", identity(t, naa6, t10, port), identity(t, t10, relPort, naa6), true},
		{"one more lesser designator", identity(t, naa6), identity(t, naa6, t10, eui64), true},
		{"the lesser one differs", identity(t, naa6, eui64), identity(t, naa6, strings.Replace(eui64, "cdef", "cdee", 1)), true},
		{"one of two of a kind", identity(t, naa6, naa5), identity(t, naa5), true},
		{"the better one differs", identity(t, naa6, t10), identity(t, otherNAA, t10), false},
		{"only the lesser in common", identity(t, naa6, t10), identity(t, t10), true},
		{"no kind in common", identity(t, naa6), identity(t, eui64), false},
		{"same port only", identity(t, port), identity(t, port), false},
		{"vendor specific only", identity(t, vendor), identity(t, vendor), false},
		{"NAA 3 only", identity(t, naa3), identity(t, naa3), true},
		{"serial", serial("1"), serial("1"), true},
		{"serials differ", serial("1"), serial("2"), false},
		{"no serial", serial(""), serial(""), false},
		{"serial of another product", serial("1"), &scsi.Identity{Vendor: "V", Product: "Q", Serial: "1"}, false},
	} {
		if got := c.a.Same(c.b); got != c.want {
			t.Errorf("%s: Same = %v; want %v", c.what, got, c.want)
		}
		if got := c.b.Same(c.a); got != c.want {
			t.Errorf("%s: Same the other way round = %v; want %v", c.what, got, c.want)
		}
		if c.want && !c.a.Unique() {
			t.Errorf("%s: Unique = false for an identity that another is Same as", c.what)
		}
	}
}

// target answers INQUIRY from tables as a device would.
type target struct {
	standard []byte
	pages    map[byte][]byte
	before   []scsi.Sense // what it answers first
}

func (d *target) lun() *scripted {
	return &scripted{answer: func(c *scsi.Command) {
		if c.CDB[0] != scsi.OpInquiry {
			panic(fmt.Sprintf("% x is not INQUIRY", c.CDB))
		}
		if len(d.before) > 0 {
			s := d.before[0]
			d.before = d.before[1:]
			c.Check(s)
			return
		}
		p := d.standard
		if c.CDB[1]&1 != 0 {
			var ok bool
			if p, ok = d.pages[c.CDB[2]]; !ok {
				c.Check(scsi.InvalidFieldInCDB)
				return
			}
		}
		p = p[:min(len(p), int(c.CDB[3])<<8+int(c.CDB[4]))]
		c.Finish(c.Scatter(p))
	}}
}

func lioTarget() *target {
	standard := make([]byte, 36)
	copy(standard[8:], "LIO-ORG disk            4.0 ")
	return &target{
		standard: standard,
		pages: map[byte][]byte{
			0x00: {0, 0, 0, 4, 0x00, 0x80, 0x83, 0xb0},
			0x80: append([]byte{0, 0x80, 0, 9}, " serial1\x00"...),
			0x83: page(naa6, t10, port),
		},
	}
}

func TestReadIdentity(t *testing.T) {
	d := lioTarget()
	got, err := scsi.ReadIdentity(t.Context(), d.lun())
	if err != nil {
		t.Fatal(err)
	}
	want := identity(t, naa6, t10)
	want.Vendor, want.Product, want.Revision, want.Serial = "LIO-ORG", "disk", "4.0", "serial1"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}

	// A page longer than the first question allows for.
	var many []string
	for i := range 30 {
		many = append(many, strings.Replace(naa6, "cdef", fmt.Sprintf("%04x", i), 1))
	}
	d.pages[0x83] = page(many...)
	if got, err = scsi.ReadIdentity(t.Context(), d.lun()); err != nil || len(got.Designators) != 30 {
		t.Errorf("long page: %v, %v; want 30 designators", got, err)
	}

	// A target that reports unit attentions to INQUIRY, which it must not.
	d = lioTarget()
	d.before = []scsi.Sense{scsi.PowerOnOccurred, scsi.ReportedLUNsChanged}
	if got, err = scsi.ReadIdentity(t.Context(), d.lun()); err != nil || got.Serial != "serial1" {
		t.Errorf("after unit attentions: %v, %v", got, err)
	}

	// No vital product data at all.
	d = lioTarget()
	d.pages = nil
	if got, err = scsi.ReadIdentity(t.Context(), d.lun()); err != nil || got.Unique() || got.Vendor != "LIO-ORG" {
		t.Errorf("without VPD: %v, %v", got, err)
	}
}

func TestReadIdentityRefuses(t *testing.T) {
	for _, c := range []struct {
		what   string
		change func(d *target)
		want   string
	}{
		{"no unit at this number", func(d *target) { d.standard[0] = 0x7f }, "INQUIRY: no logical unit here (peripheral qualifier 3)"},
		{"short data", func(d *target) { d.standard = d.standard[:35] }, "INQUIRY: 35 bytes of standard data; want 36"},
		{"page 83h listed and missing", func(d *target) { delete(d.pages, 0x83) }, "INQUIRY of VPD page 83h: CHECK CONDITION, sense 5/24/00"},
		{"page 83h cut off", func(d *target) { d.pages[0x83] = d.pages[0x83][:20] }, "INQUIRY of VPD page 83h: 40 bytes of the page are missing"},
		{"page 80h is another", func(d *target) { d.pages[0x80] = []byte{0, 0x81, 0, 0} }, "INQUIRY of VPD page 80h: the answer is no such page: 00 81 00 00"},
		{"page beyond INQUIRY", func(d *target) { d.pages[0x83] = append([]byte{0, 0x83, 0xff, 0xff}, make([]byte, 300)...) }, "INQUIRY of VPD page 83h: 65539 bytes are more than INQUIRY can carry"},
		{"no answer", func(d *target) { d.before = make([]scsi.Sense, 1) }, "INQUIRY: CHECK CONDITION, sense 0/00/00"},
	} {
		d := lioTarget()
		c.change(d)
		id, err := scsi.ReadIdentity(t.Context(), d.lun())
		if err == nil || err.Error() != c.want {
			t.Errorf("%s: %v, %v; want %q", c.what, id, err, c.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	silent := &scripted{answer: func(*scsi.Command) {}}
	if id, err := scsi.ReadIdentity(ctx, silent); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v, %v", id, err)
	}
}

// FuzzParseDesignators: an answer or an error, and what is found can be
// compared and printed on one line.
func FuzzParseDesignators(f *testing.F) {
	f.Add(page(naa6, t10, relPort, portGroup, port, device, name, eui64, uuid, vendor, naa5, naa3))
	f.Add(page())
	f.Add([]byte{0, 0x83, 0, 2, 1, 3})
	f.Fuzz(func(t *testing.T, p []byte) {
		ds, err := scsi.ParseDesignators(p)
		if err != nil {
			if ds != nil {
				t.Fatalf("%v and %v", ds, err)
			}
			return
		}
		id := &scsi.Identity{Designators: ds}
		if s := id.String(); strings.ContainsAny(s, "\n\r\x00") {
			t.Fatalf("String() = %q", s)
		}
		if id.Unique() != id.Same(id) {
			t.Fatalf("Unique = %v, Same as itself = %v", id.Unique(), id.Same(id))
		}
	})
}

// FuzzReadIdentity plays a device that answers each INQUIRY with any bytes.
func FuzzReadIdentity(f *testing.F) {
	d := lioTarget()
	f.Add(d.standard, d.pages[0], d.pages[0x80], d.pages[0x83])
	f.Add(d.standard, []byte{0, 0, 0, 1, 0x83}, []byte{}, []byte{0, 0x83, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, standard, list, serial, ids []byte) {
		d := &target{standard: standard, pages: map[byte][]byte{0: list, 0x80: serial, 0x83: ids}}
		id, err := scsi.ReadIdentity(t.Context(), d.lun())
		if (id == nil) == (err == nil) {
			t.Fatalf("%v and %v", id, err)
		}
	})
}
