// Package cc asks the C compiler what a C expression is worth. The kernel's
// headers are the only authority on its ABI; everything in package kvm that
// has a number from them is generated with, or tested against, these answers.
package cc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// ErrNoCompiler says that there is no C compiler to ask.
var ErrNoCompiler = errors.New("no C compiler (gcc) in PATH; on Debian: apt-get install gcc linux-libc-dev")

// Eval compiles and runs a C program that includes the headers and prints each
// integer expression. The answers are in the order of the expressions.
func Eval(headers, exprs []string) ([]uint64, error) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		return nil, ErrNoCompiler
	}
	dir, err := os.MkdirTemp("", "kvm-cc-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)

	var src bytes.Buffer
	fmt.Fprintln(&src, "#include <stdio.h>\n#include <stddef.h>")
	for _, h := range headers {
		fmt.Fprintf(&src, "#include <%s>\n", h)
	}
	fmt.Fprintln(&src, "int main(void) {")
	for _, e := range exprs {
		fmt.Fprintf(&src, "printf(\"%%llu\\n\", (unsigned long long)(%s));\n", e)
	}
	fmt.Fprintln(&src, "return 0; }")

	prog := filepath.Join(dir, "ask")
	compile := exec.Command(gcc, "-x", "c", "-o", prog, "-")
	compile.Stdin = &src
	if msg, err := compile.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w\n%s", err, msg)
	}
	out, err := exec.Command(prog).Output()
	if err != nil {
		return nil, fmt.Errorf("run the compiled program: %w", err)
	}
	lines := strings.Fields(string(out))
	if len(lines) != len(exprs) {
		return nil, fmt.Errorf("the compiled program printed %d numbers; want %d", len(lines), len(exprs))
	}
	vals := make([]uint64, len(lines))
	for i, l := range lines {
		if vals[i], err = strconv.ParseUint(l, 10, 64); err != nil {
			return nil, fmt.Errorf("answer to %s: %w", exprs[i], err)
		}
	}
	return vals, nil
}
