package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

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
