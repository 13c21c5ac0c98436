package main

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A picture of boxes:
//
//	title: what it shows
//	row
//	box NAME COLUMN+SPAN what it is
//	core NAME COLUMN+SPAN what it is
//	outside NAME COLUMN+SPAN what it is
//	FROM -> TO
//
// Rows follow each other downwards and have 24 columns, the first of which is
// 1. A core box stands out, and what is outside is not ours. Arrows point to a
// box further down that stands below some part of theirs, or to the neighbour
// in the row. In a name "_" stands for a blank.

const (
	gridColumns = 24
	columnWidth = 36.0
	gridMargin  = 22.0
	boxGap      = 18.0 // between neighbours
	rowGap      = 26.0 // for arrows
	boxPadding  = 12.0
	lineHeight  = 16.0
)

type box struct {
	name, kind          string
	row, from, to       int // columns, counted from 0
	lines               []string
	x, y, width, height float64
}

type arrow struct{ from, to *box }

type boxes struct {
	title  string
	rows   [][]*box
	arrows []arrow
}

var (
	boxLine   = regexp.MustCompile(`^(box|core|outside) (\S+) (\d{1,2})\+(\d{1,2})(?: (.+))?$`)
	arrowLine = regexp.MustCompile(`^(\S+) -> (\S+)$`)
)

func parseBoxes(source string) (*boxes, error) {
	title, rest, err := header(source, "title")
	if err != nil {
		return nil, err
	}
	d := &boxes{title: title}
	named := make(map[string]*box)
	n := 1
	for line := range strings.SplitSeq(rest, "\n") {
		n++
		line = strings.TrimSpace(line)
		fail := func(format string, args ...any) (*boxes, error) {
			return nil, fmt.Errorf("line %d: %s: %s", n, line, fmt.Sprintf(format, args...))
		}
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if line == "row" {
			d.rows = append(d.rows, nil)
			continue
		}
		if m := boxLine.FindStringSubmatch(line); m != nil {
			at, _ := strconv.Atoi(m[3])
			span, _ := strconv.Atoi(m[4])
			b := &box{kind: m[1], name: strings.ReplaceAll(m[2], "_", " "), row: len(d.rows) - 1, from: at - 1, to: at - 1 + span}
			if b.from < 0 || span == 0 || b.to > gridColumns {
				return fail("a row has columns 1 to %d", gridColumns)
			}
			if b.row < 0 {
				return fail("a row must begin first")
			}
			if named[m[2]] != nil {
				return fail("there is one of this name")
			}
			for _, other := range d.rows[b.row] {
				if b.from < other.to {
					return fail("%s is in the way; boxes stand from left to right", other.name)
				}
			}
			b.x, b.width = gridMargin+float64(b.from)*columnWidth, float64(span)*columnWidth
			if b.to < gridColumns {
				b.width -= boxGap
			}
			if 8.2*float64(len([]rune(b.name)))+2*boxPadding > b.width {
				return fail("no room for the name")
			}
			b.lines = wrap(m[5], b.width-2*boxPadding, 12)
			for _, l := range b.lines {
				if wide(l, 12) > b.width-2*boxPadding {
					return fail("no room for %q", l)
				}
			}
			named[m[2]] = b
			d.rows[b.row] = append(d.rows[b.row], b)
			continue
		}
		m := arrowLine.FindStringSubmatch(line)
		if m == nil {
			return fail("want row, box, core, outside, or FROM -> TO")
		}
		from, to := named[m[1]], named[m[2]]
		if from == nil || to == nil {
			return fail("no such box")
		}
		if from == to || to.row < from.row {
			return fail("arrows point down, or to a neighbour")
		}
		d.arrows = append(d.arrows, arrow{from, to})
	}
	return d, nil
}

// drop is where an arrow that points down has the most room: the middle of the
// widest part that both ends share and no box between them covers.
func (d *boxes) drop(a arrow) (x float64, ok bool) {
	type span struct{ from, to float64 }
	free := []span{{max(a.from.x, a.to.x), min(a.from.x+a.from.width, a.to.x+a.to.width)}}
	for _, row := range d.rows[a.from.row+1 : a.to.row] {
		for _, b := range row {
			var left []span
			for _, s := range free {
				left = append(left, span{s.from, min(s.to, b.x-boxGap/2)}, span{max(s.from, b.x+b.width+boxGap/2), s.to})
			}
			free = left
		}
	}
	best := slices.MaxFunc(free, func(a, b span) int { return cmp.Compare(a.to-a.from, b.to-b.from) })
	return (best.from + best.to) / 2, best.to-best.from >= 10
}

func drawBoxes(source string) (string, error) {
	d, err := parseBoxes(source)
	if err != nil {
		return "", err
	}
	y := gridMargin
	for _, row := range d.rows {
		height := 0.0
		for _, b := range row {
			height = max(height, 2*boxPadding+lineHeight*float64(1+len(b.lines))-4)
		}
		for _, b := range row {
			b.y, b.height = y, height
		}
		y += height + rowGap
	}
	var c canvas
	for _, a := range d.arrows {
		if a.from.row == a.to.row {
			dx, x, end := 1.0, a.from.x+a.from.width, a.to.x
			if a.to.from < a.from.from {
				dx, x, end = -1, a.from.x, a.to.x+a.to.width
			}
			if (end-x)*dx > columnWidth+boxGap {
				return "", fmt.Errorf("%s -> %s: they are no neighbours", a.from.name, a.to.name)
			}
			middle := a.from.y + a.from.height/2
			c.add("path", "class", "line", "d", fmt.Sprintf("M%s %sH%s", number(x), number(middle), number(end-dx*5)))
			c.head(end-dx, middle, dx, 0, 7, "")
			continue
		}
		x, ok := d.drop(a)
		if !ok {
			return "", fmt.Errorf("%s -> %s: no straight way down", a.from.name, a.to.name)
		}
		top := a.from.y + a.from.height
		c.add("path", "class", "line", "d", fmt.Sprintf("M%s %sV%s", number(x), number(top), number(a.to.y-6)))
		c.head(x, a.to.y-1.5, 0, 1, 7, "")
	}
	for _, row := range d.rows {
		for _, b := range row {
			c.add("rect", "class", b.kind, "x", b.x, "y", b.y, "width", b.width, "height", b.height, "rx", 6.0)
			middle := b.x + b.width/2
			top := b.y + (b.height-lineHeight*float64(1+len(b.lines)))/2 + 12.5
			c.text(b.name, "class", "name", "x", middle, "y", top, "text-anchor", "middle")
			for i, l := range b.lines {
				c.text(l, "class", "soft", "x", middle, "y", top+lineHeight*float64(i+1), "text-anchor", "middle")
			}
		}
	}
	width, height := gridColumns*columnWidth+2*gridMargin, y-rowGap+gridMargin
	return c.card(width, height).document(width, height, d.title, diagramStyle), nil
}
