package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"

	vmmv1 "vmm/proto/vmm/v1"
)

// What a migration prints, as text and as JSON.
func TestMigrationReport(t *testing.T) {
	for file, json := range map[string]bool{"migrate.json": true, "migrate.txt": false} {
		var out bytes.Buffer
		s := &shower{json: json, out: &out}
		err := s.progress(&vmmv1.MigrationProgress{Round: 2, RemainingBytes: 1 << 20, SentBytes: 64 << 20, DirtyRate: 1 << 20, Bandwidth: 100 << 20, ExpectedDowntimeMs: 12, Throttle: 20})
		if err != nil {
			t.Fatal(err)
		}
		err = s.summary("web1", "tcp://host2:4444", &vmmv1.MigrationSummary{
			Rounds: 3, SentBytes: 104<<20 + 200<<10, TotalUs: 1_500_000,
			Downtime: &vmmv1.MigrationDowntime{TotalUs: 71_400, StopUs: 1000, PagesUs: 16_900, SaveUs: 4500, LoadUs: 9600, TakeoverUs: 19_100, StartUs: 5200},
			Luns:     []*vmmv1.MigratedLun{{Id: "data", Sentence: "data: the guest's reservation is on this host.", TakeoverUs: 19_000}},
			Left:     []*vmmv1.MigratedLun{{Id: "data", Sentence: "data: the guest runs on its new host."}},
		})
		if err != nil {
			t.Fatal(err)
		}
		compareGolden(t, file, out.Bytes())
	}
}

// The bar keeps to its line, whatever the terminal's width and the numbers are.
func TestBarFits(t *testing.T) {
	half := &vmmv1.MigrationProgress{Round: 2, SentBytes: 64 << 20, RemainingBytes: 64 << 20, Bandwidth: 8 << 20, DirtyRate: 1 << 20, ExpectedDowntimeMs: 300}
	for _, test := range []struct {
		width int
		p     *vmmv1.MigrationProgress
		want  string
	}{
		{100, half, "round 2 [##########..........] 64.0 MiB left, 8.0 MiB/s sent, 1.0 MiB/s dirtied, downtime 300 ms"},
		{96, half, "round 2 [##########..........] 64.0 MiB left, 8.0 MiB/s sent, 1.0 MiB/s dirtied"},
		{100, &vmmv1.MigrationProgress{Round: 1, SentBytes: 1 << 20, RemainingBytes: 3 << 20, Bandwidth: 1 << 20},
			"round 1 [#####...............] 3.0 MiB left, 1.0 MiB/s sent"},
		{100, &vmmv1.MigrationProgress{}, "preparing; the guest's memory comes next"},
		{70, &vmmv1.MigrationProgress{Round: 12, SentBytes: 1, RemainingBytes: 1 << 40, Throttle: 99}, "round 12 [....................] 1024.0 GiB left, 0 B/s sent"},
		{9, &vmmv1.MigrationProgress{Round: 1}, "round 1 "},
		{1, &vmmv1.MigrationProgress{Round: 1}, ""},
		{30, &vmmv1.MigrationProgress{HandedOver: "connection refused"}, "handed over; waiting for the "},
	} {
		var bar bytes.Buffer
		s := &shower{bar: &bar, width: func() int { return test.width }}
		if err := s.progress(test.p); err != nil {
			t.Fatal(err)
		}
		got := strings.TrimPrefix(bar.String(), "\r\x1b[K")
		if got != test.want || len(got) >= test.width {
			t.Errorf("a bar for %d cells: %q, %d long; want %q", test.width, got, len(got), test.want)
		}
	}
}

func TestFolded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := strings.Join(rapid.SliceOfN(rapid.StringMatching(`[a-zé…]{1,12}`), 0, 40).Draw(t, "words"), " ")
		width, indent := rapid.IntRange(0, 120).Draw(t, "width"), rapid.IntRange(0, 26).Draw(t, "indent")
		got := folded(text, width, indent)
		lines := strings.Split(got, "\n")
		if width == 0 && got != text {
			t.Errorf("for no terminal: %q; want %q", got, text)
		}
		for i, l := range lines {
			indented := strings.HasPrefix(l, strings.Repeat(" ", indent)) && i > 0 || i == 0
			if i == 0 {
				l = strings.Repeat(" ", indent) + l
			}
			if n := utf8.RuneCountInString(l); !indented || width-indent >= 20 && n > width {
				t.Errorf("line %d of %d cells (%d; %d): %q", i, n, width, indent, l)
			}
		}
		if joined := strings.Join(strings.Fields(got), " "); joined != text {
			t.Errorf("folded(%q) = %q", text, joined)
		}
	})
}

func TestSaveReport(t *testing.T) {
	for file, json := range map[string]bool{"save.json": true, "save.txt": false} {
		var out bytes.Buffer
		s := &shower{json: json, out: &out}
		for _, m := range []*vmmv1.SaveResponse{
			{Body: &vmmv1.SaveResponse_Progress{Progress: &vmmv1.SaveProgress{WrittenBytes: 64 << 20, TotalBytes: 100 << 20}}},
			{Body: &vmmv1.SaveResponse_Summary{Summary: &vmmv1.SaveSummary{
				Path: "/var/lib/vmm/web1.snap", Bytes: 98 << 20, TotalUs: 1_500_000,
				Luns: []*vmmv1.MigratedLun{{Id: "data", Sentence: "data: the guest's key 0x00000000000000aa stays registered for it."}},
			}}},
		} {
			if err := s.saving("web1", m); err != nil {
				t.Fatal(err)
			}
		}
		compareGolden(t, file, out.Bytes())
	}
}

// compareGolden compares with a file in testdata, which VMM_UPDATE=1 writes.
func compareGolden(t *testing.T, file string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if os.Getenv("VMM_UPDATE") == "1" {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s has:\n%s\ngot:\n%s", path, want, got)
	}
}
