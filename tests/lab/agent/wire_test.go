package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"testing"

	"pgregory.net/rapid"
)

func TestCOBS(t *testing.T) {
	run := func(n int) []byte { return bytes.Repeat([]byte{7}, n) }
	for _, test := range []struct {
		name        string
		plain, want []byte
	}{
		{"empty", nil, []byte{1}},
		{"zero", []byte{0}, []byte{1, 1}},
		{"two zeros", []byte{0, 0}, []byte{1, 1, 1}},
		{"no zero", []byte{1, 2, 3}, []byte{4, 1, 2, 3}},
		{"zero inside", []byte{1, 0, 2}, []byte{2, 1, 2, 2}},
		{"zero at the end", []byte{1, 0}, []byte{2, 1, 1}},
		{"253", run(253), append([]byte{254}, run(253)...)},
		{"254", run(254), append([]byte{255}, run(254)...)},
		{"255", run(255), append(append([]byte{255}, run(254)...), 2, 7)},
		{"254 and a zero", append(run(254), 0), append(append([]byte{255}, run(254)...), 1, 1)},
	} {
		got := appendCOBS(nil, test.plain)
		if !bytes.Equal(got, test.want) {
			t.Errorf("%s: appendCOBS(% x) = % x; want % x", test.name, test.plain, got, test.want)
		}
		back, ok := decodeCOBS(bytes.Clone(got))
		if !ok || !bytes.Equal(back, test.plain) {
			t.Errorf("%s: decodeCOBS(% x) = % x, %v; want % x", test.name, got, back, ok, test.plain)
		}
	}
	for _, bad := range [][]byte{{0}, {2}, {3, 1}, {1, 5, 1}} {
		if got, ok := decodeCOBS(bytes.Clone(bad)); ok {
			t.Errorf("decodeCOBS(% x) = % x; want a refusal", bad, got)
		}
	}
}

// Whatever noise stands between frames, every whole frame after a delimiter
// arrives, and nothing else does.
func TestFramesSurviveNoise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var line bytes.Buffer
		w := &frameWriter{w: &line}
		var sent [][]byte
		noise := rapid.SliceOfN(rapid.Byte(), 0, 600)
		for range rapid.IntRange(1, 8).Draw(t, "frames") {
			msg := rapid.SliceOfN(rapid.Byte(), 1, 1000).Draw(t, "message")
			switch rapid.IntRange(0, 3).Draw(t, "before") {
			case 1:
				line.Write(noise.Draw(t, "noise"))
			case 2: // the first part of a frame whose sender died
				var half bytes.Buffer
				(&frameWriter{w: &half}).write(msg)
				line.Write(half.Bytes()[:rapid.IntRange(0, half.Len()-2).Draw(t, "cut")])
			case 3: // longer than any frame
				line.Write(bytes.Repeat([]byte{0x55}, maxEncoded+rapid.IntRange(0, 3*maxEncoded).Draw(t, "long")))
			}
			if err := w.write(msg); err != nil {
				t.Fatal(err)
			}
			sent = append(sent, msg)
		}
		r := newFrameReader(&line)
		for i, want := range sent {
			got, err := r.read()
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("frame %d = % x, %v; want % x", i, got, err, want)
			}
		}
		if got, err := r.read(); err != io.EOF {
			t.Fatalf("after the last frame: % x, %v; want EOF", got, err)
		}
	})
}

// No single wrong bit makes another message of a frame.
func TestChecksum(t *testing.T) {
	var line bytes.Buffer
	want := []byte("message \x00 of some length")
	if err := (&frameWriter{w: &line}).write(want); err != nil {
		t.Fatal(err)
	}
	frame := line.Bytes()
	for bit := range len(frame) * 8 {
		wrong := bytes.Clone(frame)
		wrong[bit/8] ^= 1 << (bit % 8)
		r := newFrameReader(bytes.NewReader(append(wrong, 0)))
		for {
			got, err := r.read()
			if err != nil {
				break
			}
			if !bytes.Equal(got, want) {
				t.Errorf("with bit %d wrong, the frame is %q", bit, got)
			}
		}
	}
}

func TestFrameLimits(t *testing.T) {
	var line bytes.Buffer
	w := &frameWriter{w: &line}
	for _, fill := range []byte{0, 0xff} {
		want := bytes.Repeat([]byte{fill}, MaxMessage)
		if err := w.write(want); err != nil {
			t.Fatal(err)
		}
		if line.Len() > maxEncoded+2 {
			t.Errorf("a frame of %d bytes takes %d; at most %d expected", MaxMessage, line.Len(), maxEncoded+2)
		}
		if got, err := newFrameReader(&line).read(); err != nil || !bytes.Equal(got, want) {
			t.Errorf("largest message of %#x: got %d bytes, %v", fill, len(got), err)
		}
		line.Reset()
	}
	if err := w.write(make([]byte, MaxMessage+1)); err == nil || line.Len() != 0 {
		t.Errorf("write of MaxMessage+1 bytes = %v, %d bytes on the line; want an error and none", err, line.Len())
	}
}

func TestParseMessage(t *testing.T) {
	for _, bad := range [][]byte{nil, {1}, {0, 0}, {byte(kindPowerOff) + 1, 0}, {3, 0x80}, {3, 0xff, 0xff, 0xff, 0xff, 0xff, 1}} {
		if m, err := parseMessage(bad); !errors.Is(err, errMessage) {
			t.Errorf("parseMessage(% x) = %v, %v; want an error", bad, m, err)
		}
	}
	if m, err := parseMessage([]byte{7, 0x81, 0x01, 'x'}); err != nil || m.kind != kindStdout || m.id != 129 || string(m.body) != "x" {
		t.Errorf("parseMessage(stdout, 129, x) = %v, %v", m, err)
	}
}

// FuzzFrames: any bytes on the line; a frame behind them still arrives. No
// panic, no unbounded memory (the reader's buffer is fixed).
func FuzzFrames(f *testing.F) {
	var line bytes.Buffer
	w := &frameWriter{w: &line}
	w.send(kindStart, 5, []byte(`{"a":["sh","-c","exit 3"]}`))
	w.send(kindStdout, 5, []byte("hello\x00world"))
	w.sendNumbers(kindExit, 5, 0x300, 11)
	f.Add(line.Bytes())
	f.Add(line.Bytes()[3:20])
	f.Add([]byte{0, 0, 1, 0})
	f.Add(bytes.Repeat([]byte{1}, 400))
	f.Fuzz(func(t *testing.T, noise []byte) {
		var line bytes.Buffer
		line.Write(noise)
		want := []byte("the frame behind it")
		if err := (&frameWriter{w: &line}).write(want); err != nil {
			t.Fatal(err)
		}
		r := newFrameReader(&line)
		var last []byte
		for {
			msg, err := r.read()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			parseMessage(msg)
			last = bytes.Clone(msg)
		}
		if !bytes.Equal(last, want) {
			t.Errorf("after % x: last frame = %q; want %q", noise, last, want)
		}
	})
}

// FuzzServe: a server that gets any sequence of messages answers or ignores
// them, and ends when the line does. Commands that it starts are killed.
func FuzzServe(f *testing.F) {
	message := func(k kind, id uint32, body string) []byte {
		var line bytes.Buffer
		(&frameWriter{w: &line}).send(k, id, []byte(body))
		return line.Bytes()
	}
	f.Add(byte(kindStart), uint32(1), `{"a":["true"]}`, byte(kindInput), "x")
	f.Add(byte(kindStart), uint32(1), `{"a":["sleep","1000"],"i":true}`, byte(kindSignal), "\x09")
	f.Add(byte(kindStart), uint32(1), `{"a":["sleep","1000"],"t":{"r":2,"c":3}}`, byte(kindResize), "\x05\x06")
	f.Add(byte(kindPing), uint32(0), "0123456789abcdefX", byte(kindCredit), "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
	f.Add(byte(kindStart), uint32(9), `{"a":[]}`, byte(kindExit), "")
	f.Fuzz(func(t *testing.T, k1 byte, id uint32, body1 string, k2 byte, body2 string) {
		// Not a fuzzer of this machine's programs: only these two are run.
		var req Request
		if json.Unmarshal([]byte(body1), &req) == nil && len(req.Args) > 0 && req.Args[0] != "sleep" && req.Args[0] != "true" {
			body1 = `{"a":["/no/such/program"]}`
		}
		if kind(k2) == kindStart {
			body2 = `{"a":["true"]`
		}
		if len(body1) > MaxMessage-8 || len(body2) > MaxMessage-8 {
			return
		}
		line := append(message(kind(k1), id, body1), message(kind(k2), id, body2)...)
		line = append(line, message(kindPing, 0, "end")...)
		var answer bytes.Buffer
		err := Serve(struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(line), &answer}, Options{})
		if err != io.EOF {
			t.Fatalf("Serve = %v; want EOF", err)
		}
		r := newFrameReader(&answer)
		for {
			msg, err := r.read()
			if err != nil {
				t.Fatalf("no answer to the last ping: %v", err)
			}
			if m, err := parseMessage(msg); err != nil {
				t.Errorf("malformed answer % x", msg)
			} else if m.kind == kindPong && string(m.body) == "end" {
				return
			}
		}
	})
}
