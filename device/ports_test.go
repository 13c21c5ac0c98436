package device

import "testing"

func TestResetControl(t *testing.T) {
	resets := 0
	d := NewResetControl(func() { resets++ })
	for _, test := range []struct {
		v, read byte
		resets  int
	}{
		{0, 0, 0}, {2, 2, 0}, {ResetValue, 6, 1}, {ResetValue, 6, 1}, {2, 2, 1}, {0x0e, 0x0e, 2}, {0xf0, 0, 2}, {4, 4, 3},
	} {
		out(d, 0, test.v)
		if got := in(d, 0); got != test.read || resets != test.resets {
			t.Errorf("after %#x: register %#x and %d resets; want %#x and %d", test.v, got, resets, test.read, test.resets)
		}
	}
	s := d.State()
	d.Reset()
	check(t, "register after a reset", in(d, 0), 0)
	d.SetState(s)
	check(t, "register after the move", in(d, 0), 4)
	out(d, 1, 4)
	check(t, "outside", in(d, 1), 0xff)
	if resets != 3 {
		t.Errorf("%d resets; want 3", resets)
	}
}

func TestKeyboardReset(t *testing.T) {
	resets := 0
	d := NewKeyboardReset(func() { resets++ })
	check(t, "status", in(d, 0), 0xff)
	for _, v := range []byte{0, 0xaa, 0xd1, 0xff} {
		out(d, 0, v)
	}
	if resets != 0 {
		t.Errorf("%d resets; want 0", resets)
	}
	out(d, 0, 0xfe, 0)
	out(d, 1, 0xfe)
	if resets != 1 {
		t.Errorf("%d resets; want 1", resets)
	}
}

func TestPVPanic(t *testing.T) {
	var panics, crashes int
	d := NewPVPanic(func() { panics++ }, func() { crashes++ })
	check(t, "events", in(d, 0), 3)
	out(d, 0, 1)
	out(d, 0, 2)
	out(d, 0, 0xfc)
	out(d, 1, 1)
	if panics != 1 || crashes != 1 {
		t.Errorf("%d panics and %d crashes; want 1 and 1", panics, crashes)
	}
}
