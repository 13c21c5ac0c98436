package pr

import (
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"vmm/scsi"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func iscsi(t testing.TB, name, isid string) TransportID {
	t.Helper()
	id, err := ISCSI(name, isid)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// The bytes are written out from the tables of SPC-5 6.15, 6.16 and 7.6.4,
// not made by the encoders.
const (
	goldenFC  = "00000000 00000000 2100001b32812345 0000000000000000"
	goldenSAS = "06000000 5000c50012345678 000000000000000000000000"
	goldenSRP = "04000000 00000000 fe800000000000000002c90300001234"
	// "iqn.2003-01.a:b" is 15 bytes and its null: padded to the minimum of 20.
	goldenDevice = "05000014 69716e2e323030332d30312e613a62 0000000000"
	// "iqn.2003-01.a:b,i,0x00023d000001" is 32 bytes, and its null makes 36.
	goldenPort = "45000024 69716e2e323030332d30312e613a62 2c692c3078 303030323364303030303031 00000000"
)

func TestTransportID(t *testing.T) {
	for _, tt := range []struct {
		id     TransportID
		wire   string
		text   string
		prefix byte
	}{
		{FC(0x2100001b32812345), goldenFC, "fc 0x2100001b32812345", ProtoFC},
		{SAS(0x5000c50012345678), goldenSAS, "sas 0x5000c50012345678", ProtoSAS},
		{SRP([16]byte(unhex(t, "fe800000000000000002c90300001234"))), goldenSRP, "srp 0xfe800000000000000002c90300001234", ProtoSRP},
		{iscsi(t, "iqn.2003-01.a:b", ""), goldenDevice, "iscsi iqn.2003-01.a:b", ProtoISCSI},
		{iscsi(t, "iqn.2003-01.a:b", "00023d000001"), goldenPort, "iscsi iqn.2003-01.a:b,i,0x00023d000001", ProtoISCSI},
	} {
		want := unhex(t, tt.wire)
		if string(tt.id) != string(want) {
			t.Errorf("%s = %x; want %x", tt.text, string(tt.id), want)
		}
		got, rest, err := ParseTransportID(append(want, 0xaa))
		if err != nil || got != tt.id || len(rest) != 1 {
			t.Errorf("ParseTransportID(%x) = %x, %x, %v; want %x and one byte", want, string(got), rest, err, want)
		}
		if got.String() != tt.text || got.Protocol() != tt.prefix {
			t.Errorf("%x is %q of protocol %d; want %q of %d", want, got, got.Protocol(), tt.text, tt.prefix)
		}
	}
	for _, bad := range []string{
		"", "00", goldenFC[:len(goldenFC)-2],
		"40" + goldenFC[2:],                        // a format that FC does not have
		"0f" + goldenFC[2:],                        // a protocol nobody has
		"0500001069716e2e323030332d30312e613a6200", // shorter than the minimum
		"05000015" + goldenDevice[8:] + "00",       // not a multiple of four
		"05000018" + goldenDevice[8:],              // longer than what is there
		"85" + goldenDevice[2:],                    // format 2
		"45" + goldenDevice[2:],                    // format 1 without an ISID
		"05000014" + strings.Repeat("41", 20),      // no null
		"05000014" + strings.Repeat("00", 20),      // no name
	} {
		if id, _, err := ParseTransportID(unhex(t, bad)); err == nil {
			t.Errorf("ParseTransportID(%s) = %v; want an error", bad, id)
		}
	}
	for _, name := range []string{"", "a\x00b", strings.Repeat("x", 224)} {
		if id, err := ISCSI(name, ""); err == nil {
			t.Errorf("ISCSI(%q) = %v; want an error", name, id)
		}
	}
	upper, lower := iscsi(t, "iqn.2003-01.a:B", "00023D000001"), iscsi(t, "iqn.2003-01.a:b", "00023d000001")
	if upper == lower || !upper.Same(lower) || upper.Same(FC(1)) {
		t.Error("Same must ignore case, and nothing else")
	}
}

func TestOutWire(t *testing.T) {
	fc := FC(0x2100001b32812345)
	for _, tt := range []struct {
		name, cdb, list string
		out             Out
	}{
		{
			"register", "5f 00 00 0000 00000018 00", "0000000000000000 00000000000000aa 00000000 01 00 0000",
			Out{Action: Register, ServiceKey: 0xaa, APTPL: true},
		},
		{
			"reserve", "5f 01 05 0000 00000018 00", "00000000000000aa 0000000000000000 00000000 00 00 0000",
			Out{Action: Reserve, Type: WriteExclusiveRegistrantsOnly, Key: 0xaa},
		},
		{
			"preempt and abort", "5f 05 08 0000 00000018 00", "00000000000000aa 123456789abcdef0 00000000 00 00 0000",
			Out{Action: PreemptAndAbort, Type: ExclusiveAccessAllRegistrants, Key: 0xaa, ServiceKey: 0x123456789abcdef0},
		},
		{
			"register with ports", "5f 00 00 0000 00000034 00",
			"0000000000000000 00000000000000aa 00000000 0c 00 0000 00000018" + goldenFC,
			Out{Action: Register, ServiceKey: 0xaa, AllTargetPorts: true, SpecifyPorts: true, Ports: []TransportID{fc}},
		},
		{
			"register and move", "5f 07 00 0000 00000030 00",
			"00000000000000aa 00000000000000bb 00 03 0102 00000018" + goldenFC,
			Out{Action: RegisterAndMove, Key: 0xaa, ServiceKey: 0xbb, APTPL: true, Unregister: true, MoveTo: Nexus{fc, 0x102}},
		},
	} {
		cdb, list := unhex(t, tt.cdb), unhex(t, tt.list)
		got, err := ParseOut(cdb, list)
		if diff := cmp.Diff(tt.out, got); err != nil || diff != "" {
			t.Errorf("%s: ParseOut: %v, %s", tt.name, err, diff)
		}
		gotCDB, gotList := tt.out.Encode()
		if diff := cmp.Diff(cdb, gotCDB); diff != "" {
			t.Errorf("%s: CDB %s", tt.name, diff)
		}
		if diff := cmp.Diff(list, gotList); diff != "" {
			t.Errorf("%s: list %s", tt.name, diff)
		}
	}
	for _, tt := range []struct {
		name, cdb, list string
		want            scsi.Sense
	}{
		{"short CDB", "5f 00 00", "", scsi.InvalidOpcode},
		{"other command", "5e 00 00 0000 00000018 00", "", scsi.InvalidOpcode},
		{"action 9", "5f 09 00 0000 00000018 00", strings.Repeat("00", 24), scsi.InvalidFieldInCDB},
		{"list of 23", "5f 00 00 0000 00000017 00", strings.Repeat("00", 23), scsi.ParameterListLength},
		{"list of 25", "5f 00 00 0000 00000019 00", strings.Repeat("00", 25), scsi.ParameterListLength},
		{"list of 4 GiB", "5f 00 00 0000 ffffffff 00", strings.Repeat("00", 24), scsi.ParameterListLength},
		{"less than announced", "5f 00 00 0000 00000018 00", strings.Repeat("00", 20), scsi.ParameterListLength},
		{"SPEC_I_PT with RESERVE", "5f 01 01 0000 00000018 00", strings.Repeat("00", 20) + "08000000", scsi.InvalidFieldInList},
		{"SPEC_I_PT without a length", "5f 00 00 0000 00000018 00", strings.Repeat("00", 20) + "08000000", scsi.ParameterListLength},
		{"SPEC_I_PT, wrong length", "5f 00 00 0000 0000001c 00", strings.Repeat("00", 20) + "08000000 00000018", scsi.ParameterListLength},
		{"SPEC_I_PT, bad port", "5f 00 00 0000 00000034 00", strings.Repeat("00", 20) + "08000000 00000018 0f" + strings.Repeat("00", 23), scsi.InvalidFieldInList},
		{"move without a port", "5f 07 00 0000 00000018 00", strings.Repeat("00", 24), scsi.InvalidFieldInList},
		{"move, wrong length", "5f 07 00 0000 00000030 00", strings.Repeat("00", 23) + "17" + goldenFC, scsi.ParameterListLength},
		{"move to two ports", "5f 07 00 0000 00000048 00", strings.Repeat("00", 23) + "30" + goldenFC + goldenSAS, scsi.InvalidFieldInList},
	} {
		_, err := ParseOut(unhex(t, tt.cdb), unhex(t, tt.list))
		var r *Refusal
		if !errors.As(err, &r) || r.Sense != tt.want {
			t.Errorf("%s: ParseOut: %v; want %v", tt.name, err, tt.want)
		}
	}
}

func TestInWire(t *testing.T) {
	in := In{ReadFullStatus, 0x1234}
	cdb := unhex(t, "5e 03 00 00 00 00 00 1234 00")
	if got := in.CDB(); string(got) != string(cdb) {
		t.Errorf("CDB = %x; want %x", got, cdb)
	}
	if got, err := ParseIn(cdb); err != nil || got != in {
		t.Errorf("ParseIn(%x) = %v, %v; want %v", cdb, got, err, in)
	}
	cdb[1] = 4
	if _, err := ParseIn(cdb); err == nil {
		t.Error("service action 4 was accepted")
	}

	k := Keys{Generation: 7, Keys: []Key{0xaa, 0xaa, 0xbb}}
	wire := unhex(t, "00000007 00000018 00000000000000aa 00000000000000aa 00000000000000bb")
	if got := k.Append(nil); string(got) != string(wire) {
		t.Errorf("keys = %x; want %x", got, wire)
	}
	if got, err := ParseKeys(append(wire, 1, 2, 3)); err != nil || cmp.Diff(k, got) != "" {
		t.Errorf("ParseKeys: %v, %s", err, cmp.Diff(k, got))
	}
	if got, err := ParseKeys(wire[:20]); err != nil || !got.Truncated || len(got.Keys) != 1 {
		t.Errorf("ParseKeys of 20 bytes = %v, %v; want one key and truncation", got, err)
	}
	if _, err := ParseKeys(unhex(t, "00000007 00000004 00000000")); err == nil {
		t.Error("half a key was accepted")
	}

	r := Reservation{Generation: 7, Key: 0xaa, Type: ExclusiveAccessRegistrantsOnly}
	wire = unhex(t, "00000007 00000010 00000000000000aa 00000000 00 06 0000")
	if got := r.Append(nil); string(got) != string(wire) {
		t.Errorf("reservation = %x; want %x", got, wire)
	}
	if got, err := ParseReservation(wire); err != nil || got != r {
		t.Errorf("ParseReservation = %v, %v; want %v", got, err, r)
	}
	if got, err := ParseReservation(unhex(t, "00000007 00000000")); err != nil || got != (Reservation{Generation: 7}) {
		t.Errorf("ParseReservation of none = %v, %v", got, err)
	}
	for _, bad := range []string{"", "00000007", "00000007 00000010", "00000007 00000010 00000000000000aa 00000000 00 02 0000"} {
		if got, err := ParseReservation(unhex(t, bad)); err == nil {
			t.Errorf("ParseReservation(%s) = %v; want an error", bad, got)
		}
	}

	f := FullStatus{Generation: 7, Registrations: []Registration{
		{Key: 0xaa, Holder: true, Type: WriteExclusiveRegistrantsOnly, Nexus: Nexus{FC(0x2100001b32812345), 1}},
		{Key: 0xbb, AllTargetPorts: true, Nexus: Nexus{iscsi(t, "iqn.2003-01.a:b", "00023d000001"), 2}},
	}}
	wire = unhex(t, "00000007 00000070"+
		"00000000000000aa 00000000 01 05 00000000 0001 00000018"+goldenFC+
		"00000000000000bb 00000000 02 00 00000000 0002 00000028"+goldenPort)
	if got := f.Append(nil); string(got) != string(wire) {
		t.Errorf("full status = %x; want %x", got, wire)
	}
	if got, err := ParseFullStatus(wire); err != nil || cmp.Diff(f, got) != "" {
		t.Errorf("ParseFullStatus: %v, %s", err, cmp.Diff(f, got))
	}
	if got, err := ParseFullStatus(wire[:80]); err != nil || !got.Truncated || len(got.Registrations) != 1 {
		t.Errorf("ParseFullStatus of 80 bytes = %v, %v; want one registration and truncation", got, err)
	}
	wire[4+3] = 0x18 // the first descriptor's length field now reaches beyond
	if got, err := ParseFullStatus(wire); err == nil {
		t.Errorf("ParseFullStatus = %v; want an error", got)
	}

	c := Capabilities{CompatibleSPC2: true, SpecifyPorts: true, AllTargetPorts: true, Persist: true, PersistActive: true, TypesValid: true, Types: Types}
	wire = unhex(t, "0008 1d 81 ea 01 0000")
	if got := c.Append(nil); string(got) != string(wire) {
		t.Errorf("capabilities = %x; want %x", got, wire)
	}
	if got, err := ParseCapabilities(wire); err != nil || cmp.Diff(c, got) != "" {
		t.Errorf("ParseCapabilities: %v, %s", err, cmp.Diff(c, got))
	}
	for _, bad := range []string{"0008 1d 81 ea 01 00", "0009 1d 81 ea 01 0000"} {
		if got, err := ParseCapabilities(unhex(t, bad)); err == nil {
			t.Errorf("ParseCapabilities(%s) = %v; want an error", bad, got)
		}
	}
}

func TestNames(t *testing.T) {
	for want, got := range map[string]string{
		"Write Exclusive, Registrants Only": WriteExclusiveRegistrantsOnly.String(),
		"type 0x2":                          Type(2).String(),
		"REGISTER AND MOVE":                 RegisterAndMove.String(),
		"READ FULL STATUS":                  ReadFullStatus.String(),
		"0x00000000000000aa":                Key(0xaa).String(),
		"CHECK CONDITION 6/2a/05":           check(RegistrationsPreempted).String(),
		"RESERVATION CONFLICT":              conflict.String(),
	} {
		if got != want {
			t.Errorf("name %q; want %q", got, want)
		}
	}
	valid := 0
	for ty := range Type(255) {
		if ty.Valid() {
			valid++
		}
		if ty.Valid() != (ty.Single() || ty.AllRegistrants()) {
			t.Errorf("%v is valid %v, single %v, all registrants %v", ty, ty.Valid(), ty.Single(), ty.AllRegistrants())
		}
	}
	if valid != len(Types) {
		t.Errorf("%d valid types; want %d", valid, len(Types))
	}
}

// A parser answers with an error or with something that encodes to what it
// has read.
func FuzzParseOut(f *testing.F) {
	for _, o := range []Out{
		{Action: Register, ServiceKey: 0xaa, APTPL: true},
		{Action: Register, ServiceKey: 0xaa, SpecifyPorts: true, Ports: []TransportID{FC(1), iscsi(f, "iqn.2003-01.a:b", "1")}},
		{Action: RegisterAndMove, Key: 1, ServiceKey: 2, MoveTo: Nexus{SAS(3), 4}},
		{Action: Preempt, Type: WriteExclusive, Key: 1, ServiceKey: 2},
	} {
		cdb, list := o.Encode()
		f.Add(cdb, list)
	}
	f.Fuzz(func(t *testing.T, cdb, list []byte) {
		o, err := ParseOut(cdb, list)
		if err != nil {
			var r *Refusal
			if !errors.As(err, &r) || r.Sense.Key != scsi.IllegalRequest {
				t.Fatalf("ParseOut: %v", err)
			}
			return
		}
		again, err := ParseOut(o.Encode())
		if diff := cmp.Diff(o, again); err != nil || diff != "" {
			t.Fatalf("ParseOut(Encode(%+v)): %v, %s", o, err, diff)
		}
	})
}

func FuzzParseIn(f *testing.F) {
	f.Add(In{ReadKeys, 8192}.CDB())
	f.Fuzz(func(t *testing.T, cdb []byte) {
		in, err := ParseIn(cdb)
		if err != nil {
			return
		}
		if again, err := ParseIn(in.CDB()); err != nil || again != in {
			t.Fatalf("ParseIn(CDB(%v)) = %v, %v", in, again, err)
		}
	})
}

func FuzzParameterData(f *testing.F) {
	full := FullStatus{Registrations: []Registration{
		{Key: 1, Holder: true, Type: WriteExclusive, Nexus: Nexus{FC(1), 1}},
		{Key: 2, Nexus: Nexus{iscsi(f, "iqn.2003-01.a:b", "1"), 1}},
	}}
	f.Add(full.Append(nil))
	f.Add(Keys{Keys: []Key{1, 2}}.Append(nil))
	f.Add(Reservation{Key: 1, Type: ExclusiveAccess}.Append(nil))
	f.Add(Capabilities{TypesValid: true, Types: Types}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if k, err := ParseKeys(b); err == nil && !k.Truncated {
			if got := k.Append(nil); string(got) != string(b[:len(got)]) {
				t.Fatalf("keys %x became %x", b, got)
			}
		}
		if r, err := ParseReservation(b); err == nil {
			if again, err := ParseReservation(r.Append(nil)); err != nil || again != r {
				t.Fatalf("reservation %+v became %+v, %v", r, again, err)
			}
		}
		if c, err := ParseCapabilities(b); err == nil {
			again, err := ParseCapabilities(c.Append(nil))
			if diff := cmp.Diff(c, again); err != nil || diff != "" {
				t.Fatalf("capabilities: %v, %s", err, diff)
			}
		}
		if s, err := ParseFullStatus(b); err == nil {
			again, err := ParseFullStatus(s.Append(nil))
			s.Truncated = false
			if diff := cmp.Diff(s, again); err != nil || diff != "" {
				t.Fatalf("full status: %v, %s", err, diff)
			}
		}
	})
}
