package main

import "testing"

func TestParseSize(t *testing.T) {
	for _, test := range []struct {
		in   string
		want int64 // 0: refused
	}{
		{"4G", 4 << 30}, {"256M", 256 << 20}, {"6656m", 6656 << 20}, {"536870912", 512 << 20},
		{"", 0}, {"G", 0}, {"-4G", 0}, {"0", 0}, {"255M", 0}, {"4X", 0}, {"4 G", 0}, {"9999999999999G", 0},
	} {
		got, err := parseSize(test.in)
		if got != test.want || (err == nil) != (test.want != 0) {
			t.Errorf("parseSize(%q) = %d, %v; want %d", test.in, got, err, test.want)
		}
	}
}
