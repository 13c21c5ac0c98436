package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A screen is what "tmux capture-pane -e -p" prints: text, and SGR sequences
// (ECMA-48, 8.3.117) for its colours. A state that SGR has set lasts until it
// is changed, over the ends of lines too.

const (
	columns    = 100
	cellWidth  = 8.4 // 0.6 em, as nearly every monospace font has it
	cellHeight = 18.0
	fontSize   = 14.0
	margin     = 16.0
	titleBar   = 34.0
)

// color is a colour of a terminal: unset, one of 256, or any.
type color int

const (
	unset     color = -1
	trueColor color = 1 << 24 // | red<<16 | green<<8 | blue
)

// palette has the sixteen colours, on background; each can be read there.
var palette = [16]string{
	"#484f58", "#ff7b72", "#3fb950", "#d29922", "#58a6ff", "#bc8cff", "#39c5cf", "#b1bac4",
	"#6e7681", "#ffa198", "#56d364", "#e3b341", "#79c0ff", "#d2a8ff", "#56d4dd", "#ffffff",
}

const (
	background = "#161b22"
	foreground = "#d7dde4"
	frame      = "#3d444d"
)

func (c color) String() string {
	switch {
	case c >= trueColor:
		return fmt.Sprintf("#%06x", int(c-trueColor))
	case c >= 232: // a ramp of greys
		return fmt.Sprintf("#%02[1]x%02[1]x%02[1]x", 8+10*int(c-232))
	case c >= 16: // a cube of 6x6x6, as xterm has it
		level := func(n int) int { return []int{0, 0x5f, 0x87, 0xaf, 0xd7, 0xff}[n%6] }
		n := int(c - 16)
		return fmt.Sprintf("#%02x%02x%02x", level(n/36), level(n/6), level(n))
	}
	return palette[c]
}

// style is how a cell looks.
type style struct {
	fg, bg                                color
	bold, dim, italic, underline, inverse bool
}

var plain = style{fg: unset, bg: unset}

// colors are what is painted: letters and, unless it is empty, what is behind
// them.
func (s style) colors() (text, behind string) {
	text = foreground
	if s.fg != unset {
		text = s.fg.String()
	}
	if s.bg != unset {
		behind = s.bg.String()
	}
	if s.inverse {
		if behind == "" {
			behind = background
		}
		text, behind = behind, text
	}
	return text, behind
}

// sgr is the style after a sequence with parameters such as "1;38;5;208".
func (s style) sgr(parameters string) (style, error) {
	var list []int
	for p := range strings.SplitSeq(parameters, ";") {
		n := 0 // what is left out is 0
		if p != "" {
			var err error
			if n, err = strconv.Atoi(p); err != nil || n < 0 {
				return s, fmt.Errorf("SGR %q: %q is no number", parameters, p)
			}
		}
		list = append(list, n)
	}
	for len(list) > 0 {
		n := list[0]
		list = list[1:]
		switch {
		case n == 0:
			s = plain
		case n == 1:
			s.bold = true
		case n == 2:
			s.dim = true
		case n == 3:
			s.italic = true
		case n == 4:
			s.underline = true
		case n == 7:
			s.inverse = true
		case n == 22:
			s.bold, s.dim = false, false
		case n == 23:
			s.italic = false
		case n == 24:
			s.underline = false
		case n == 27:
			s.inverse = false
		case 30 <= n && n <= 37:
			s.fg = color(n - 30)
		case n == 39:
			s.fg = unset
		case 40 <= n && n <= 47:
			s.bg = color(n - 40)
		case n == 49:
			s.bg = unset
		case 90 <= n && n <= 97:
			s.fg = color(n - 90 + 8)
		case 100 <= n && n <= 107:
			s.bg = color(n - 100 + 8)
		case n == 38 || n == 48:
			var c color
			switch {
			case len(list) >= 2 && list[0] == 5 && list[1] <= 255:
				c, list = color(list[1]), list[2:]
			case len(list) >= 4 && list[0] == 2 && max(list[1], list[2], list[3]) <= 255:
				c, list = trueColor|color(list[1]<<16|list[2]<<8|list[3]), list[4:]
			default:
				return s, fmt.Errorf("SGR %q: %d wants 5;N or 2;R;G;B", parameters, n)
			}
			if n == 38 {
				s.fg = c
			} else {
				s.bg = c
			}
		default:
			return s, fmt.Errorf("SGR %q: %d is not known here", parameters, n)
		}
	}
	return s, nil
}

type cell struct {
	r rune
	style
}

// parseScreen makes rows of cells of a capture; rows and cells at the end with
// nothing in them are left out.
func parseScreen(text string) ([][]cell, error) {
	var rows [][]cell
	now := plain
	for line := range strings.SplitSeq(text, "\n") {
		var row []cell
		fail := func(err error) ([][]cell, error) { return nil, fmt.Errorf("row %d: %w", len(rows)+1, err) }
		for line != "" {
			if escaped, found := strings.CutPrefix(line, "\x1b["); found {
				parameters, rest, found := strings.Cut(escaped, "m")
				if !found {
					return fail(fmt.Errorf("%q: an escape sequence that is no SGR", line[:min(len(line), 12)]))
				}
				next, err := now.sgr(parameters)
				if err != nil {
					return fail(err)
				}
				now, line = next, rest
				continue
			}
			r, n := utf8.DecodeRuneInString(line)
			if r == utf8.RuneError || !oneCell(r) {
				return fail(fmt.Errorf("%q: not known to take one cell", r))
			}
			row = append(row, cell{r, now})
			line = line[n:]
		}
		for len(row) > 0 && row[len(row)-1] == (cell{' ', plain}) {
			row = row[:len(row)-1]
		}
		if len(row) > columns {
			return fail(fmt.Errorf("%d cells; a screen has %d columns", len(row), columns))
		}
		rows = append(rows, row)
	}
	for len(rows) > 0 && len(rows[len(rows)-1]) == 0 {
		rows = rows[:len(rows)-1]
	}
	return rows, nil
}

// oneCell tells whether a terminal gives r one cell, as far as a screen of ours
// needs it: letters, punctuation, arrows, mathematics, frames and blocks, and
// nothing that joins the letter before it.
func oneCell(r rune) bool {
	known := r < 0x1100 || 0x2000 <= r && r < 0x2300 || 0x2500 <= r && r < 0x25fd
	return r == ' ' || known && unicode.IsGraphic(r) && !unicode.In(r, unicode.M, unicode.Zs)
}

// drawScreen draws a terminal's window.
func drawScreen(source string) (string, error) {
	title, rest, err := header(source, "title")
	if err != nil {
		return "", err
	}
	window, text, err := header(rest, "window")
	if err != nil {
		return "", err
	}
	rows, err := parseScreen(text)
	if err != nil {
		return "", err
	}
	width, height := columns*cellWidth+2*margin, titleBar+float64(len(rows))*cellHeight+1.5*margin
	var c canvas
	c.add("rect", "x", 0.5, "y", 0.5, "width", width-1, "height", height-1, "rx", 9.0, "fill", background, "stroke", frame)
	c.add("path", "d", fmt.Sprintf("M1 %[1]sH%[2]s", number(titleBar-0.5), number(width-1)), "stroke", "#2a313c")
	for i, fill := range []string{"#ff5f57", "#febc2e", "#28c840"} {
		c.add("circle", "cx", 20+20*float64(i), "cy", titleBar/2, "r", 6.0, "fill", fill)
	}
	c.text(window, "x", width/2, "y", titleBar/2+4.5, "text-anchor", "middle", "font-family", sansSerif, "font-size", 13.0, "fill", "#9198a1")
	c.body.WriteString(`<g font-family="` + escape(monospace) + `" font-size="` + number(fontSize) + `" fill="` + foreground + "\">\n")
	for y, row := range rows {
		top := titleBar + margin*0.75 + float64(y)*cellHeight
		for x := 0; x < len(row); {
			n := run(row[x:])
			drawRun(&c, row[x:x+n], margin+float64(x)*cellWidth, top)
			x += n
		}
	}
	c.body.WriteString("</g>\n")
	return c.document(width, height, title, ""), nil
}

// run is how many cells stand together: of one style, and no two blanks in a
// row, so that columns begin a run of their own.
func run(row []cell) int {
	blank := func(c cell) bool { return c.r == ' ' }
	n := 1
	for n < len(row) && row[n].style == row[0].style && blank(row[n]) == blank(row[n-1]) {
		n++
	}
	if blank(row[0]) {
		return n
	}
	// Words with one blank between them go on.
	for n+1 < len(row) && blank(row[n]) && row[n].style == row[0].style && row[n+1].style == row[0].style && !blank(row[n+1]) {
		n++
		for n < len(row) && row[n].style == row[0].style && !blank(row[n]) {
			n++
		}
	}
	return n
}

// drawRun draws cells of one style. Whatever font the reader has, each run is
// as long as its cells.
func drawRun(c *canvas, cells []cell, x, top float64) {
	s := cells[0].style
	width := float64(len(cells)) * cellWidth
	text, behind := s.colors()
	if behind != "" {
		c.add("rect", "x", x, "y", top, "width", width, "height", cellHeight, "fill", behind)
	}
	if s.underline {
		c.add("rect", "x", x, "y", top+cellHeight-2.5, "width", width, "height", 1.0, "fill", text)
	}
	if !slices.ContainsFunc(cells, func(c cell) bool { return c.r != ' ' }) {
		return
	}
	letters := make([]rune, len(cells))
	for i := range cells {
		letters[i] = cells[i].r
	}
	attributes := []any{"x", x, "y", top + 13.5, "textLength", width}
	for _, a := range []struct {
		on          bool
		name, value string
	}{
		{text != foreground, "fill", text},
		{s.bold, "font-weight", "bold"},
		{s.italic, "font-style", "italic"},
		{s.dim, "opacity", "0.6"},
	} {
		if a.on {
			attributes = append(attributes, a.name, a.value)
		}
	}
	c.text(string(letters), attributes...)
}
