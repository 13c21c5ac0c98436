package main

import (
	"fmt"
	"regexp"
	"strings"
)

// A picture of a sequence:
//
//	title: what it shows
//	lane NAME what it is      from left to right
//	runs NAME                 from here on the lane is the guest's: it runs there
//	stopped NAME              ... it stands still there
//	gone NAME                 ... no more
//	A -> B [STEP:] TEXT       a message
//	A => B [STEP:] TEXT       data
//	A >> B [STEP:] TEXT       a command to B
//	at NAME TEXT              something that NAME does
//	state NAME TEXT           how it is with NAME from here on
//	border TEXT               a line across, that nothing crosses back
//
// Lanes come first. A step is a number, which the text refers to.

const (
	laneGap  = 300.0
	laneEdge = 138.0
	rowStep  = 38.0
)

type lane struct {
	name  string
	x     float64
	mode  string // what the lane's line says now; empty: nothing
	since float64
}

type sequence struct {
	canvas
	lanes []*lane
	lines canvas // lies below everything else
	y     float64
}

func (s *sequence) lane(name string) *lane {
	for _, l := range s.lanes {
		if l.name == name {
			return l
		}
	}
	return nil
}

// become ends what the lane's line said and begins mode.
func (s *sequence) become(l *lane, mode string) {
	if l.mode != "" && s.y > l.since {
		s.lines.add("rect", "class", l.mode, "x", l.x-3.5, "y", l.since, "width", 7.0, "height", s.y-l.since, "rx", 3.5)
	}
	l.mode, l.since = mode, s.y
}

var (
	laneLine    = regexp.MustCompile(`^lane (\S+)(?: (.+))?$`)
	modeLine    = regexp.MustCompile(`^(runs|stopped|gone) (\S+)$`)
	messageLine = regexp.MustCompile(`^(\S+) (->|=>|>>) (\S+) (?:(\d):)?(.+)$`)
	atLine      = regexp.MustCompile(`^(at|state) (\S+) (.+)$`)
	borderLine  = regexp.MustCompile(`^border (.+)$`)
)

func drawSequence(source string) (string, error) {
	title, rest, err := header(source, "title")
	if err != nil {
		return "", err
	}
	s := sequence{y: 74}
	n := 1
	for line := range strings.SplitSeq(rest, "\n") {
		n++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := s.statement(line); err != nil {
			return "", fmt.Errorf("line %d: %s: %w", n, line, err)
		}
	}
	if len(s.lanes) < 2 {
		return "", fmt.Errorf("%d lanes; want two or more", len(s.lanes))
	}
	s.y += 14
	width, height := s.width(), s.y+48
	var whole canvas
	for _, l := range s.lanes {
		s.become(l, "")
		whole.add("path", "class", "lane", "d", fmt.Sprintf("M%s 66V%s", number(l.x), number(s.y)))
	}
	whole.body.WriteString(s.lines.body.String())
	whole.body.WriteString(s.body.String())
	x := laneEdge - 112
	for _, l := range []struct{ class, means string }{{"runs", "the guest runs"}, {"stopped", "the guest stands still"}, {"dot message", "between the hosts"}, {"dot command", "a command to the disk"}} {
		whole.add("rect", "class", l.class, "x", x, "y", s.y+18, "width", 18.0, "height", 7.0, "rx", 3.5)
		whole.text(l.means, "class", "soft", "x", x+26, "y", s.y+26)
		x += 42 + wide(l.means, 12)
	}
	return whole.card(width, height).document(width, height, title, diagramStyle), nil
}

func (s *sequence) width() float64 { return 2*laneEdge + laneGap*float64(len(s.lanes)-1) }

func (s *sequence) statement(line string) error {
	named := func(name string) (*lane, error) {
		l := s.lane(name)
		if l == nil {
			return nil, fmt.Errorf("there is no lane %q", name)
		}
		return l, nil
	}
	if m := laneLine.FindStringSubmatch(line); m != nil {
		if s.lane(m[1]) != nil || s.y > 74 {
			return fmt.Errorf("lanes come first, each once")
		}
		l := &lane{name: m[1], x: laneEdge + laneGap*float64(len(s.lanes)), since: s.y}
		s.lanes = append(s.lanes, l)
		const w = 224.0
		if wide(m[2], 12) > w-2*boxPadding || 8.2*float64(len([]rune(m[1]))) > w-2*boxPadding {
			return fmt.Errorf("no room for it")
		}
		s.add("rect", "class", "box", "x", l.x-w/2, "y", 18.0, "width", w, "height", 48.0, "rx", 6.0)
		s.text(m[1], "class", "name", "x", l.x, "y", 38.0, "text-anchor", "middle")
		s.text(m[2], "class", "soft", "x", l.x, "y", 55.0, "text-anchor", "middle")
		return nil
	}
	if m := modeLine.FindStringSubmatch(line); m != nil {
		l, err := named(m[2])
		if err == nil {
			s.become(l, strings.TrimPrefix(m[1], "gone"))
		}
		return err
	}
	if m := borderLine.FindStringSubmatch(line); m != nil {
		s.border(m[1])
		return nil
	}
	if m := atLine.FindStringSubmatch(line); m != nil {
		l, err := named(m[2])
		if err == nil {
			err = s.at(l, m[1], strings.TrimSpace(m[3]))
		}
		return err
	}
	m := messageLine.FindStringSubmatch(line)
	if m == nil {
		return fmt.Errorf("not one of lane, runs, stopped, gone, at, state, border, A -> B TEXT, A => B TEXT, A >> B TEXT")
	}
	from, err := named(m[1])
	if err != nil {
		return err
	}
	to, err := named(m[3])
	if err != nil {
		return err
	}
	return s.message(from, to, map[string]string{"->": "message", "=>": "data", ">>": "command"}[m[2]], m[4], strings.TrimSpace(m[5]))
}

// message draws an arrow; its text stands above it, in the gap beside the
// sender.
func (s *sequence) message(from, to *lane, class, step, text string) error {
	if from == to {
		return fmt.Errorf("a message to oneself; say at %s", from.name)
	}
	room := laneGap - 40
	if step != "" {
		room -= 20
	}
	if wide(text, 13) > room {
		return fmt.Errorf("no room for the text: about %d letters have", int(room/13/0.58))
	}
	s.y += rowStep
	dx := 1.0
	if to.x < from.x {
		dx = -1
	}
	begin, end, thick := from.x+dx*6, to.x-dx*6, 8.0
	if class == "data" {
		thick = 13
	}
	s.add("path", "class", class, "d", fmt.Sprintf("M%s %sH%s", number(begin), number(s.y), number(end-dx*thick*0.8)))
	s.head(end, s.y, dx, 0, thick, class)
	middle := from.x + dx*laneGap/2
	if step != "" {
		s.add("circle", "class", "dot "+class, "cx", from.x+dx*20, "cy", s.y, "r", 8.5)
		s.text(step, "class", "step", "x", from.x+dx*20, "y", s.y+4, "text-anchor", "middle")
		middle += dx * 6
	}
	s.text(text, "x", middle, "y", s.y-8, "text-anchor", "middle")
	return nil
}

// at draws a box on a lane.
func (s *sequence) at(l *lane, kind, text string) error {
	s.y += rowStep
	width := wide(text, 12) + 2*boxPadding
	if left, right := l.x-width/2, l.x+width/2; left < 4 || right > s.width()-4 {
		return fmt.Errorf("no room for the text")
	}
	class := "box"
	if kind == "state" {
		class = "state"
	}
	s.add("rect", "class", class, "x", l.x-width/2, "y", s.y-16, "width", width, "height", 24.0, "rx", 12.0)
	s.text(text, "class", "soft", "x", l.x, "y", s.y+0.5, "text-anchor", "middle")
	return nil
}

func (s *sequence) border(text string) {
	s.y += rowStep
	w := wide(text, 13)*1.1 + 16 // the letters are bold
	s.add("path", "class", "border", "d", fmt.Sprintf("M14 %sH%s", number(s.y), number(s.width()-14)))
	s.add("rect", "class", "plate", "x", (s.width()-w)/2, "y", s.y-11, "width", w, "height", 22.0)
	s.text(text, "class", "bordertext", "x", s.width()/2, "y", s.y+4.5, "text-anchor", "middle")
}
