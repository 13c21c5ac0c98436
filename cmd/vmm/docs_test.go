package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"vmm/doctor"
	"vmm/migration"
	"vmm/tests/pages"
)

// documents are all pages.
func documents(t *testing.T) []pages.Page {
	t.Helper()
	all, err := pages.Read("../..")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// before is what may stand before a command's name.
var before = regexp.MustCompile(`^\s*(\$ )?(sudo (-u \w+ )?)?([A-Z_]+=\S+ )*(\.build/)?`)

// Whatever command line the documentation shows, the program understands: a
// flag that is renamed or an argument that is no longer taken fails here.
func TestDocumentedCommands(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	shown, mentioned := 0, 0
	for _, d := range documents(t) {
		targets := func(line string) {
			args, _ := words(line)
			for _, target := range args[1:] {
				if !strings.Contains(target, "=") && !regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(target)+`:`).Match(makefile) {
					t.Errorf("%s: %s: the Makefile has no %s", d.Path, line, target)
				}
			}
		}
		for _, line := range d.Lines {
			line = before.ReplaceAllString(line, "")
			switch {
			case strings.HasPrefix(line, "vmm "):
				shown++
				if err := understood(line, false); err != nil {
					t.Errorf("%s: %v", d.Path, err)
				}
			case strings.HasPrefix(line, "make "):
				targets(line)
			}
		}
		for _, span := range d.Spans {
			span = before.ReplaceAllString(span, "")
			switch {
			case strings.HasPrefix(span, "vmm "):
				mentioned++
				if err := understood(span, true); err != nil {
					t.Errorf("%s: `%s`: %v", d.Path, span, err)
				}
			case strings.HasPrefix(span, "make "):
				targets(span)
			}
		}
	}
	if shown < 20 || mentioned < 20 {
		t.Errorf("%d command lines and %d mentions of commands found in the documentation; the test does not see them", shown, mentioned)
	}
}

// Links within the repository lead somewhere, to a heading that is there if
// they name one; a picture says what is on it, and each picture is on a page.
func TestDocumentedLinks(t *testing.T) {
	link := regexp.MustCompile(`(!?)\[([^\]]*)\]\(([^)#:]*)(?:#([^)]*))?\)`)
	shown := make(map[string]bool)
	links := 0
	for _, d := range documents(t) {
		dir := filepath.Join("../..", filepath.Dir(d.Path))
		for _, m := range link.FindAllStringSubmatch(d.Text, -1) {
			links++
			target, text := filepath.Join(dir, m[3]), d.Text
			if m[3] != "" {
				if _, err := os.Stat(target); err != nil {
					t.Errorf("%s: link to %s: %v", d.Path, m[3], err)
					continue
				}
				shown[target] = true
				if m[4] != "" {
					b, err := os.ReadFile(target)
					if err != nil {
						t.Fatal(err)
					}
					text = string(b)
				}
			}
			if m[4] != "" && !slices.Contains(anchors(text), m[4]) {
				t.Errorf("%s: link to %s#%s: no such heading", d.Path, m[3], m[4])
			}
			if m[1] != "" && len(m[2]) < 20 {
				t.Errorf("%s: picture %s: %q says too little to who does not see it", d.Path, m[3], m[2])
			}
		}
	}
	if links < 20 {
		t.Errorf("%d links found; the test does not see them", links)
	}
	pictures, err := filepath.Glob("../../docs/pictures/*.svg")
	if err != nil || len(pictures) == 0 {
		t.Errorf("pictures: %v, %v", pictures, err)
	}
	for _, path := range pictures {
		if !shown[path] {
			t.Errorf("%s is on no page", path)
		}
	}
}

// anchors are what a page's headings are called in links, as Markdown's
// renderers make it: small letters, hyphens for blanks, no other signs.
func anchors(text string) (list []string) {
	for _, m := range regexp.MustCompile(`(?m)^#{1,6} (.+)$`).FindAllStringSubmatch(text, -1) {
		name := regexp.MustCompile(`[^\p{L}\p{N}_\- ]`).ReplaceAllString(strings.ToLower(m[1]), "")
		list = append(list, strings.ReplaceAll(name, " ", "-"))
	}
	return list
}

// literals are all texts in the product's code, those that are written in
// several pieces put together.
func literals(t *testing.T) []string {
	t.Helper()
	var all []string
	var whole func(e ast.Expr) (string, bool)
	whole = func(e ast.Expr) (string, bool) {
		switch e := e.(type) {
		case *ast.BasicLit:
			s, err := strconv.Unquote(e.Value)
			return s, e.Kind == token.STRING && err == nil
		case *ast.BinaryExpr:
			x, ok := whole(e.X)
			y, ok2 := whole(e.Y)
			return x + y, e.Op == token.ADD && ok && ok2
		}
		return "", false
	}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".build" || d.Name() == ".git" || d.Name() == "tests" || d.Name() == "tools"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if e, ok := n.(ast.Expr); ok {
				if s, ok := whole(e); ok {
					all = append(all, s)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Each message that the page on troubleshooting quotes is one of the
// program's. What differs from case to case is an ellipsis there.
func TestQuotedMessages(t *testing.T) {
	text, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	quoted := regexp.MustCompile("(?m)^#{2,3} `(.*)`$").FindAllStringSubmatch(string(text), -1)
	if len(quoted) < 15 {
		t.Fatalf("%d messages quoted; the test does not see them", len(quoted))
	}
	all := literals(t)
	for _, q := range quoted {
		for part := range strings.SplitSeq(q[1], "…") {
			part = strings.Trim(part, " ")
			found := part == ""
			for _, s := range all {
				found = found || strings.Contains(s, part)
			}
			if !found {
				t.Errorf("troubleshooting.md quotes %q, and nothing in the code says %q", q[1], part)
			}
		}
		if len(strings.Trim(q[1], "… :")) < 7 {
			t.Errorf("troubleshooting.md quotes %q: too little to be found", q[1])
		}
	}
}

// The commands that make TLS files, as they stand, make files that two hosts
// can use.
func TestDocumentedCertificates(t *testing.T) {
	needTool(t, "openssl")
	dir := t.TempDir()
	for _, d := range documents(t) {
		if d.Path != "docs/quickstart.md" {
			continue
		}
		script := "set -e\n"
		for _, line := range d.Lines {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "openssl ") || strings.HasPrefix(line, "HOST=") || strings.HasPrefix(line, "chmod 600 key.pem") {
				script += line + "\n"
			}
		}
		c := exec.Command("bash", "-c", script)
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	if _, err := migration.LoadCertificates(dir); err != nil {
		t.Fatal(err)
	}
	tls := 0
	for _, f := range doctor.Examine(t.Context(), doctor.Options{TLSDir: dir}).Findings {
		if strings.HasPrefix(f.Name, "tls") {
			tls++
			if f.Verdict == doctor.Fail || f.Verdict == doctor.Warn && f.Name != "tls names" { // this host is not the one in the text
				t.Errorf("%s: %s: %s (%s)", f.Verdict, f.Name, f.Detail, f.Mend)
			}
		}
	}
	if tls < 4 {
		t.Errorf("%d findings about TLS; want every one", tls)
	}
}
