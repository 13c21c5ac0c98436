// Package pages reads the documentation for the tests that hold it to its word.
package pages

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Page is a page of documentation in Markdown.
type Page struct {
	Path  string // relative to the repository's root
	Text  string
	Lines []string // of code blocks, continued lines joined
	Spans []string // of code within a sentence
}

// Read returns all pages of the repository, or of a copy of them, at root.
func Read(root string) ([]Page, error) {
	paths, err := filepath.Glob(filepath.Join(root, "docs/*.md"))
	if err == nil && len(paths) < 5 {
		err = fmt.Errorf("%s/docs has the pages %v: this is not the repository's root", root, paths)
	}
	if err != nil {
		return nil, err
	}
	var all []Page
	for _, path := range append(paths, filepath.Join(root, "README.md"), filepath.Join(root, "CHANGELOG.md")) {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		p := parse(string(text))
		if p.Path, err = filepath.Rel(root, path); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

func parse(text string) Page {
	p := Page{Text: text}
	var code, prose strings.Builder
	fenced, after := false, true // after: an indented line would begin a block
	for line := range strings.Lines(text) {
		switch trimmed := strings.TrimSpace(line); {
		case strings.HasPrefix(trimmed, "```"):
			fenced = !fenced
			after = true
		case fenced, after && strings.HasPrefix(line, "    "):
			code.WriteString(line)
		default:
			prose.WriteString(line)
			after = trimmed == ""
		}
	}
	p.Lines = Joined(code.String())
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(prose.String(), -1) {
		p.Spans = append(p.Spans, strings.Join(strings.Fields(m[1]), " "))
	}
	return p
}

// Joined are the lines of a text in which a backslash at the end of a line
// goes on with the next one.
func Joined(text string) []string {
	return strings.Split(regexp.MustCompile(`\\\n\s*`).ReplaceAllString(text, ""), "\n")
}
