package main

import (
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"vmm/kvm/internal/cc"
)

func TestCommittedConstantsAreTheCompilersAnswer(t *testing.T) {
	want, err := generate()
	if errors.Is(err, cc.ErrNoCompiler) && os.Getenv("VMM_TEST_ALLOW_NO_GCC") != "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../constants.go")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("constants.go is stale; run go generate ./kvm (-generated +committed):\n%s", d)
	}
}
