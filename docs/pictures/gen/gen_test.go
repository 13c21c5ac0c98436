package main

import (
	"encoding/xml"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// Each picture is what its source gives, and each has a source.
func TestPicturesAreDrawn(t *testing.T) {
	pictures, err := filepath.Glob("../*.svg")
	if err != nil || len(pictures) < 3 {
		t.Fatalf("pictures %v, %v; the test looks in the wrong place", pictures, err)
	}
	drawn := 0
	for ending, draw := range languages {
		sources, err := filepath.Glob("../*" + ending)
		if err != nil || len(sources) == 0 {
			t.Errorf("sources *%s: %v, %v", ending, sources, err)
		}
		for _, source := range sources {
			drawn++
			text, err := os.ReadFile(source)
			if err != nil {
				t.Fatal(err)
			}
			want, err := draw(string(text))
			if err != nil {
				t.Errorf("%s: %v", source, err)
				continue
			}
			if _, _, err := texts(want); err != nil {
				t.Errorf("%s: %v", picture(source), err)
			}
			if got, err := os.ReadFile(picture(source)); err != nil || string(got) != want {
				t.Errorf("%s is not what %s gives (%v): run make generate", picture(source), source, err)
			}
		}
	}
	if drawn != len(pictures) {
		t.Errorf("%d sources for %d pictures %v", drawn, len(pictures), pictures)
	}
}

// Each arrow between packages is an import.
func TestPartsAreTrue(t *testing.T) {
	source, err := os.ReadFile("../parts.boxes")
	if err != nil {
		t.Fatal(err)
	}
	d, err := parseBoxes(string(source))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range d.arrows {
		files, err := filepath.Glob("../../../" + a.from.name + "/*.go")
		if err != nil || len(files) == 0 {
			t.Errorf("package %s: %v, %v", a.from.name, files, err)
		}
		imported := slices.ContainsFunc(files, func(path string) bool {
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range f.Imports {
				if i.Path.Value == strconv.Quote("vmm/"+a.to.name) && !strings.HasSuffix(path, "_test.go") {
					return true
				}
			}
			return false
		})
		if !imported {
			t.Errorf("parts.boxes: %s -> %s, and no file there imports it", a.from.name, a.to.name)
		}
	}
}

// texts are a picture's texts with the attributes of each, and its title, if it
// is well-formed.
func texts(svg string) (list []map[string]string, title string, err error) {
	d := xml.NewDecoder(strings.NewReader(svg))
	depth := 0
	for {
		token, err := d.Token()
		if err == io.EOF {
			if depth != 0 || title == "" {
				return nil, "", fmt.Errorf("title %q, %d elements open at the end", title, depth)
			}
			return list, title, nil
		} else if err != nil {
			return nil, "", err
		}
		switch token := token.(type) {
		case xml.StartElement:
			if depth == 0 && token.Name != (xml.Name{Space: "http://www.w3.org/2000/svg", Local: "svg"}) {
				return nil, "", fmt.Errorf("a picture of %v", token.Name)
			}
			depth++
			if name := token.Name.Local; name == "text" || name == "title" {
				var s string
				if err := d.DecodeElement(&s, &token); err != nil {
					return nil, "", err
				}
				depth--
				if name == "title" {
					title = s
					continue
				}
				one := map[string]string{"": s}
				for _, a := range token.Attr {
					one[a.Name.Local] = a.Value
				}
				list = append(list, one)
			}
		case xml.EndElement:
			depth--
		}
	}
}

// letters are what a terminal may show, those among them that mean something
// in XML more often.
var letters = rapid.OneOf(rapid.SampledFrom([]rune("<>&\"' ]]>-")), rapid.Rune().Filter(oneCell))

// Whatever a screen shows is in its picture, each letter in its cell.
func TestScreenShowsEveryCell(t *testing.T) {
	styles := rapid.SampledFrom([]string{"", "", "", "\x1b[1m", "\x1b[0m", "\x1b[31;42m", "\x1b[7m", "\x1b[4;38;5;208m", "\x1b[48;2;1;2;3m", "\x1b[m", "\x1b[97;2;3m"})
	rapid.Check(t, func(t *rapid.T) {
		rows := rapid.SliceOfN(rapid.SliceOfN(letters, 0, columns), 0, 5).Draw(t, "rows")
		title := string(rapid.SliceOfN(letters, 1, 30).Draw(t, "title")) + "."
		source := "title: " + title + "\nwindow: w\n"
		for _, row := range rows {
			for _, r := range row {
				source += styles.Draw(t, "style") + string(r)
			}
			source += "\n"
		}
		svg, err := drawScreen(source)
		if err != nil {
			t.Fatal(err)
		}
		list, gotTitle, err := texts(svg)
		if err != nil {
			t.Fatalf("%v\n%s", err, svg)
		}
		if gotTitle != strings.TrimSpace(title) {
			t.Errorf("title %q; want %q", gotTitle, title)
		}
		shown := make([][]rune, len(rows))
		for y, row := range rows {
			shown[y] = slices.Repeat([]rune{' '}, len(row))
		}
		for _, one := range list[1:] { // the first is the window's
			x, y := cellOf(t, one["x"], margin, cellWidth), cellOf(t, one["y"], titleBar+margin*0.75+13.5, cellHeight)
			run := []rune(one[""])
			if got, want := one["textLength"], number(float64(len(run))*cellWidth); got != want {
				t.Errorf("%q is %s long; want %s", one[""], got, want)
			}
			if y >= len(rows) || x+len(run) > len(rows[y]) {
				t.Fatalf("%q stands at row %d, column %d; there is none", one[""], y, x)
			}
			copy(shown[y][x:], run)
		}
		for y := range rows {
			if string(shown[y]) != string(rows[y]) {
				t.Errorf("row %d shows %q; want %q", y, string(shown[y]), string(rows[y]))
			}
		}
	})
}

// cellOf is the cell whose text begins at attribute.
func cellOf(t *rapid.T, attribute string, first, step float64) int {
	f, err := strconv.ParseFloat(attribute, 64)
	if err != nil {
		t.Fatal(err)
	}
	n := (f - first) / step
	if n < -0.01 || n-float64(int(n+0.5)) > 0.01 || n-float64(int(n+0.5)) < -0.01 {
		t.Fatalf("%s is no cell's place", attribute)
	}
	return int(n + 0.5)
}

func TestScreenColors(t *testing.T) {
	for sequence, want := range map[string]string{
		"\x1b[32mx":                  `fill="#3fb950"`,
		"\x1b[92mx":                  `fill="#56d364"`,
		"\x1b[38;5;208mx":            `fill="#ff8700"`,
		"\x1b[38;5;244mx":            `fill="#808080"`,
		"\x1b[38;2;18;52;86mx":       `fill="#123456"`,
		"\x1b[1mx":                   `font-weight="bold"`,
		"\x1b[7mx":                   `height="18" fill="#d7dde4"`, // behind it
		"\x1b[31;0;1;22;3;23;4;24mx": `textLength="8.4">x<`,
		"\x1b[7m\n\x1b[27mx\x1b[m":   `textLength="8.4">x<`,
	} {
		svg, err := drawScreen("title: t\nwindow: w\n" + sequence)
		if err != nil || !strings.Contains(svg, want) {
			t.Errorf("drawScreen(%q) = %s, %v; want %s", sequence, svg, err, want)
		}
	}
}

// What cannot be drawn is refused, with its place.
func TestRefused(t *testing.T) {
	boxes := "title: t\nrow\nbox a 1+4 one\nbox b 5+4\nrow\nbox c 1+2\nrow\nbox d 1+24\n"
	lanes := "title: t\nlane a\nlane b\n"
	for _, test := range []struct {
		draw         func(string) (string, error)
		source, want string
	}{
		{drawScreen, "text", `want a line "title: ..."`},
		{drawScreen, "title: t\ntext", `want a line "window: ..."`},
		{drawScreen, "title: t\nwindow: w\n\n\x1b[K", "row 2: \"\\x1b[K\": an escape sequence that is no SGR"},
		{drawScreen, "title: t\nwindow: w\n\x1b[5m", `row 1: SGR "5": 5 is not known here`},
		{drawScreen, "title: t\nwindow: w\n\x1b[38;5;256m", "38 wants 5;N or 2;R;G;B"},
		{drawScreen, "title: t\nwindow: w\n\x1b[1:2m", `"1:2" is no number`},
		{drawScreen, "title: t\nwindow: w\n漢", "not known to take one cell"},
		{drawScreen, "title: t\nwindow: w\na\tb", "not known to take one cell"},
		{drawScreen, "title: t\nwindow: w\n\xff", "not known to take one cell"},
		{drawScreen, "title: t\nwindow: w\n" + strings.Repeat("x", columns+1), "row 1: 101 cells; a screen has 100 columns"},
		{drawBoxes, "title: t\nbox a 1+4", "line 2: box a 1+4: a row must begin first"},
		{drawBoxes, "title: t\nrow\nbox a 21+5", "a row has columns 1 to 24"},
		{drawBoxes, "title: t\nrow\nbox a 1+0", "a row has columns 1 to 24"},
		{drawBoxes, "title: t\nrow\nbox abcdefghijklmnop 1+2", "no room for the name"},
		{drawBoxes, "title: t\nrow\nbox a 1+2 abcdefghijklmnop", `no room for "abcdefghijklmnop"`},
		{drawBoxes, boxes + "box a 1+4", "there is one of this name"},
		{drawBoxes, boxes + "box e 2+4", "d is in the way"},
		{drawBoxes, boxes + "circle", "want row, box"},
		{drawBoxes, boxes + "a -> e", "no such box"},
		{drawBoxes, boxes + "c -> a", "arrows point down"},
		{drawBoxes, boxes + "b -> c", "b -> c: no straight way down"},
		{drawSequence, "title: t\nlane a", "1 lanes; want two or more"},
		{drawSequence, lanes + "a -> c x", `line 4: a -> c x: there is no lane "c"`},
		{drawSequence, lanes + "a -> a x", "say at a"},
		{drawSequence, lanes + "a -> b " + strings.Repeat("x", 60), "no room for the text"},
		{drawSequence, lanes + "at a " + strings.Repeat("x", 60), "no room for the text"},
		{drawSequence, lanes + "a -> b x\nlane c", "lanes come first"},
		{drawSequence, lanes + "a <- b x", "not one of lane"},
	} {
		if svg, err := test.draw(test.source); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("drawing %q = %d bytes, %v; want %q", test.source, len(svg), err, test.want)
		}
	}
}

// Whatever a diagram is called or says, its picture is well-formed and says it.
func TestDiagramsEscape(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		word := "." + string(rapid.SliceOfN(letters.Filter(func(r rune) bool { return r != ' ' }), 1, 12).Draw(t, "word"))
		for _, svg := range []func() (string, error){
			func() (string, error) { return drawBoxes("title: " + word + "\nrow\nbox name 1+24 " + word) },
			func() (string, error) {
				return drawSequence("title: " + word + "\nlane a\nlane b\na -> b " + word + "\nborder " + word + "\nstate a " + word)
			},
		} {
			s, err := svg()
			if err != nil {
				t.Fatal(err)
			}
			list, title, err := texts(s)
			if err != nil {
				t.Fatalf("%v\n%s", err, s)
			}
			said := slices.ContainsFunc(list, func(one map[string]string) bool { return one[""] == word })
			if title != word || !said {
				t.Errorf("%q: title %q, texts %v", word, title, list)
			}
		}
	})
}

// Whatever a source is, it is drawn or refused, and what is drawn is
// well-formed.
func FuzzDraw(f *testing.F) {
	for ending := range languages {
		sources, _ := filepath.Glob("../*" + ending)
		for _, path := range sources {
			if text, err := os.ReadFile(path); err == nil {
				f.Add(string(text), ending)
			}
		}
	}
	f.Fuzz(func(t *testing.T, source, ending string) {
		draw := languages[ending]
		if draw == nil {
			return
		}
		svg, err := draw(source)
		if (err == nil) != (svg != "") {
			t.Fatalf("%d bytes and error %v", len(svg), err)
		}
		if err == nil {
			if _, _, err := texts(svg); err != nil {
				t.Errorf("%v\n%s", err, svg)
			}
		}
	})
}
