package main

import (
	"encoding/xml"
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Every reader has some of these; none is fetched.
const (
	monospace = `ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace`
	sansSerif = `system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', 'Liberation Sans', sans-serif`
)

// canvas is a picture that is being drawn; lengths are in CSS pixels.
type canvas struct{ body strings.Builder }

// add appends an element that has nothing in it: its name and its attributes
// in pairs, texts as they are and numbers.
func (c *canvas) add(name string, attributes ...any) {
	c.open(name, attributes...)
	c.body.WriteString("/>\n")
}

// text appends a line of text.
func (c *canvas) text(s string, attributes ...any) {
	c.open("text", attributes...)
	c.body.WriteString(">" + escape(s) + "</text>\n")
}

func (c *canvas) open(name string, attributes ...any) {
	c.body.WriteString("<" + name)
	for i := 0; i < len(attributes); i += 2 {
		value := ""
		switch v := attributes[i+1].(type) {
		case float64:
			value = number(v)
		case string:
			value = v
		}
		fmt.Fprintf(&c.body, ` %s="%s"`, attributes[i], escape(value))
	}
}

// document is the picture whole. Its title is what screen readers read.
func (c *canvas) document(width, height float64, title, style string) string {
	w, h := number(width), number(height)
	if style != "" {
		style = "<style>" + style + "</style>\n"
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%s" height="%s" viewBox="0 0 %[1]s %[2]s" role="img" aria-labelledby="title">`+
		"\n<title id=\"title\">%s</title>\n%s%s</svg>\n", w, h, escape(title), style, &c.body)
}

// escape is s as it stands in XML, between quotes too. What XML cannot say
// becomes U+FFFD.
func escape(s string) string {
	var b strings.Builder
	if err := xml.EscapeText(&b, []byte(s)); err != nil {
		panic(err) // a strings.Builder takes everything
	}
	return b.String()
}

func number(f float64) string {
	return strconv.FormatFloat(math.Round(f*100)/100, 'f', -1, 64)
}

// diagramStyle is the look of boxes and sequences: a card with a background of
// its own, which can be read on any page, dark where the reader likes it dark.
const diagramStyle = `
text { font: 13px ` + sansSerif + `; fill: #1f2328 }
.card { fill: #ffffff; stroke: #d1d9e0 }
.name { font: 600 13.5px ` + monospace + ` }
.soft { font-size: 12px; fill: #59636e }
.box { fill: #f6f8fa; stroke: #d1d9e0 }
.core { fill: #ddf4ff; stroke: #54aeff }
.outside { fill: none; stroke: #818b98; stroke-dasharray: 4 3 }
.line { fill: none; stroke: #818b98; stroke-width: 1.4 }
.lane { stroke: #d1d9e0; stroke-width: 2 }
.message { fill: none; stroke: #0969da; stroke-width: 1.6 }
.command { fill: none; stroke: #8250df; stroke-width: 1.6 }
.data { fill: none; stroke: #0969da; stroke-width: 5 }
.head { fill: #818b98 }
.head.message, .head.data { fill: #0969da; stroke: none }
.head.command { fill: #8250df; stroke: none }
.runs { fill: #2da44e }
.stopped { fill: #d4a72c }
.step { font: 600 11px ` + sansSerif + `; fill: #ffffff }
.dot { fill: #8250df; stroke: none }
.dot.message { fill: #0969da; stroke: none }
.state { fill: #fbefff; stroke: #c297ff }
.plate { fill: #ffffff }
.border { stroke: #cf222e; stroke-width: 1.4; stroke-dasharray: 7 4 }
.bordertext { font-weight: 600; fill: #cf222e }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.card { fill: #0d1117; stroke: #3d444d }
.soft { fill: #9198a1 }
.box { fill: #151b23; stroke: #3d444d }
.core { fill: #121d2f; stroke: #1f6feb }
.outside, .line { stroke: #656c76 }
.lane { stroke: #3d444d }
.message, .data { stroke: #4493f8 }
.command { stroke: #ab7df8 }
.head { fill: #656c76 }
.head.message, .head.data { fill: #4493f8 }
.head.command { fill: #ab7df8 }
.runs { fill: #3fb950 }
.stopped { fill: #d29922 }
.step { fill: #0d1117 }
.dot { fill: #ab7df8 }
.dot.message { fill: #4493f8 }
.state { fill: #211830; stroke: #8957e5 }
.plate { fill: #0d1117 }
.border { stroke: #f85149 }
.bordertext { fill: #f85149 }
}
`

// card is the background of a diagram, which is drawn first.
func (c *canvas) card(width, height float64) *canvas {
	var whole canvas
	whole.add("rect", "class", "card", "x", 0.5, "y", 0.5, "width", width-1, "height", height-1, "rx", 10.0)
	whole.body.WriteString(c.body.String())
	return &whole
}

// head is the point of an arrow at (x, y) that comes from (-dx, -dy).
func (c *canvas) head(x, y, dx, dy, size float64, class string) {
	side := size * 0.55
	c.add("path", "class", "head "+class, "d", fmt.Sprintf("M%s %sL%s %sL%s %sZ", number(x), number(y),
		number(x-dx*size-dy*side), number(y-dy*size-dx*side), number(x-dx*size+dy*side), number(y-dy*size+dx*side)))
}

// wide is the room that a line of sans-serif text may need: the reader's font
// is not known, and this is a wide one's average.
func wide(s string, size float64) float64 { return float64(utf8.RuneCountInString(s)) * size * 0.58 }

// wrap breaks text into lines that have room in width.
func wrap(text string, width, size float64) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case wide(line+" "+word, size) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	if line != "" {
		lines = append(lines, line)
	}
	return lines
}
