// Package tests checks the rules of the house that no compiler knows: which
// package may import which, where unsafe and raw system calls may stand, what
// commit messages look like.
package tests

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// floors are the packages from the roof down; a package imports only from
// floors below its own (docs/ARCHITECTURE.md).
var floors = []string{"cmd", "doctor", "control", "machine", "migration", "boot", "device", "virtio", "scsi/sg", "scsi/disk", "scsi/pr", "scsi", "pci", "kvm", "memory", "internal/sys", "proto"}

// Test packages, and what makes the documentation, stand beside the house and
// may import anything.
func isTestTool(dir string) bool {
	return strings.HasPrefix(dir, "tests") || strings.HasPrefix(dir, "docs") || strings.HasSuffix(dir, "test")
}

func floor(dir string) int {
	best := -1
	for i, f := range floors {
		if (dir == f || strings.HasPrefix(dir, f+"/")) && (best < 0 || len(f) > len(floors[best])) {
			best = i
		}
	}
	return best
}

type file struct {
	dir, name string // dir relative to the root
	ast       *ast.File
}

func goFiles(t *testing.T) []file {
	t.Helper()
	var files []file
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".build" || d.Name() == ".git" || d.Name() == "tools") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, _ := filepath.Rel("..", filepath.Dir(path))
		files = append(files, file{dir, filepath.Base(path), parsed})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 20 {
		t.Fatalf("found %d Go files; the test looks in the wrong place", len(files))
	}
	return files
}

func imports(f file) []string {
	var list []string
	for _, i := range f.ast.Imports {
		list = append(list, strings.Trim(i.Path.Value, `"`))
	}
	return list
}

func TestImportsPointDown(t *testing.T) {
	for _, f := range goFiles(t) {
		if isTestTool(f.dir) || strings.HasSuffix(f.name, "_test.go") {
			continue
		}
		from := floor(f.dir)
		if from < 0 {
			t.Errorf("%s/%s: the package has no floor in this test and none in docs/ARCHITECTURE.md", f.dir, f.name)
			continue
		}
		for _, path := range imports(f) {
			dir, ours := strings.CutPrefix(path, "vmm/")
			if !ours {
				continue
			}
			to := floor(dir)
			if to < from || isTestTool(dir) {
				t.Errorf("%s/%s imports %s, which is not below it", f.dir, f.name, path)
			}
			sibling := strings.HasPrefix(f.dir, "scsi/") && strings.HasPrefix(dir, "scsi/") && floors[from] != floors[to]
			if sibling && !(floors[from] == "scsi/disk" && floors[to] == "scsi/pr") {
				t.Errorf("%s/%s imports its sibling %s", f.dir, f.name, path)
			}
		}
	}
}

func TestUnsafeStandsInFilesNamedForIt(t *testing.T) {
	for _, f := range goFiles(t) {
		if strings.HasSuffix(f.name, ".pb.go") {
			continue // protoc-gen-go's
		}
		if slices.Contains(imports(f), "unsafe") && !strings.HasSuffix(f.name, "_unsafe.go") && !strings.HasSuffix(f.name, "_test.go") {
			t.Errorf("%s/%s imports unsafe; move that into a file *_unsafe.go", f.dir, f.name)
		}
	}
}

// Raw system calls go through few doors. Devices, the controller, boot and the
// takeover need none.
func TestSystemCallsHaveFewDoors(t *testing.T) {
	closed := []string{"boot", "device", "virtio", "pci", "scsi/pr", "scsi", "migration"}
	for _, f := range goFiles(t) {
		if strings.HasSuffix(f.name, "_test.go") || isTestTool(f.dir) || !slices.Contains(closed, floors[max(floor(f.dir), 0)]) {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := sel.X.(*ast.Ident); ok && (x.Name == "unix" || x.Name == "syscall") && strings.HasPrefix(sel.Sel.Name, "Syscall") {
					t.Errorf("%s/%s makes a raw system call", f.dir, f.name)
				}
			}
			return true
		})
	}
}

func TestOnlyMainExits(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.ast.Name.Name == "main" || strings.HasSuffix(f.name, "_test.go") || isTestTool(f.dir) {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && (x.Name == "os" && sel.Sel.Name == "Exit" || x.Name == "log" && strings.HasPrefix(sel.Sel.Name, "Fatal")) {
				t.Errorf("%s/%s ends the process", f.dir, f.name)
			}
			return true
		})
	}
}

func TestCommitSubjects(t *testing.T) {
	out, err := exec.Command("git", "log", "-100", "--no-merges", "--format=%s").Output()
	if err != nil {
		t.Skipf("no git history here: %v", err)
	}
	subject := regexp.MustCompile(`^[a-z0-9/_., -]+: [^A-Z\s].*[^.]$`)
	for line := range bytes.Lines(out) {
		s := strings.TrimSpace(string(line))
		if len(s) > 72 || !subject.MatchString(s) {
			t.Errorf("commit subject %q: want \"pkg: lower-case imperative\", at most 72 characters, no full stop", s)
		}
	}
}
