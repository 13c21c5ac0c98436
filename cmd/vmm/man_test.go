package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Each command has a page, and mandoc finds nothing to complain about.
func TestMan(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man1")
	var out, errs bytes.Buffer
	if status := run(t.Context(), []string{"man", dir}, strings.NewReader(""), &out, &errs); status != 0 {
		t.Fatalf("vmm man: status %d, %s", status, &errs)
	}
	var want []string
	for _, c := range visible(newRoot()) {
		want = append(want, filepath.Join(dir, manName(c)+".1"))
	}
	slices.Sort(want)
	pages, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || !slices.Equal(pages, want) {
		t.Fatalf("pages %v, %v; want %v", pages, err, want)
	}
	page, err := os.ReadFile(filepath.Join(dir, "vmm-run.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{
		".TH VMM\\-RUN 1 ", ".SH NAME\nvmm\\-run \\- Boot a guest", ".SH SYNOPSIS\n\\fBvmm run\\fR [NAME]", ".SH DESCRIPTION\nBoots a guest",
		".TP\n\\fB\\-\\-cpus\\fR \\fIint\\fR\nvCPUs, 1 to 8 (default 1)\n", ".SH EXAMPLES\n.EX\n  vmm run web1 \\-\\-kernel", "ttyS0 root=/dev/sda1\" \\e\n", ".SH SEE ALSO\n.BR vmm (1)\n",
	} {
		if !bytes.Contains(page, []byte(part)) {
			t.Errorf("vmm-run.1 has no %q:\n%s", part, page)
		}
	}
	mandoc := needTool(t, "mandoc")
	for _, page := range pages {
		if out, err := exec.Command(mandoc, "-T", "lint", "-W", "warning", page).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("mandoc -T lint %s: %v\n%s", page, err, out)
		}
	}
}

func TestRoff(t *testing.T) {
	for in, want := range map[string]string{
		"plain text": "plain text", "--cpus": `\-\-cpus`, `a \ b`: `a \e b`, ".TH": `\&.TH`, "a\n.b\n'c": "a\n\\&.b\n\\&'c", "'": `\&'`,
	} {
		if got := roff(in); got != want {
			t.Errorf("roff(%q) = %q; want %q", in, got, want)
		}
	}
}
