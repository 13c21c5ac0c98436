// Gen draws the documentation's pictures. Each has its source beside it, in one
// of three small languages:
//
//	*.screen    what a terminal of 100 columns showed, colours included
//	*.boxes     rows of boxes, and arrows that point down
//	*.sequence  who sends what to whom, from top to bottom
//
// Every source begins with "title: ", which says in one sentence what is to be
// seen, for those who do not see it. The same source gives the same bytes.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

//go:generate go run . ..

// languages are what draws a source, by the ending of its name.
var languages = map[string]func(source string) (string, error){
	".screen":   drawScreen,
	".boxes":    drawBoxes,
	".sequence": drawSequence,
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: gen DIRECTORY")
		os.Exit(2)
	}
	if err := drawAll(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

// drawAll draws each source in dir, beside it.
func drawAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		draw := languages[filepath.Ext(path)]
		if draw == nil {
			continue
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		svg, err := draw(string(source))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := os.WriteFile(picture(path), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// picture is where the picture of a source stands.
func picture(source string) string {
	return strings.TrimSuffix(source, filepath.Ext(source)) + ".svg"
}

// header takes "NAME: TEXT" from the head of a source.
func header(source, name string) (text, rest string, err error) {
	line, rest, _ := strings.Cut(source, "\n")
	text, found := strings.CutPrefix(line, name+": ")
	if text = strings.TrimSpace(text); !found || text == "" {
		return "", "", fmt.Errorf("%q: want a line %q here", line, name+": ...")
	}
	return text, rest, nil
}
