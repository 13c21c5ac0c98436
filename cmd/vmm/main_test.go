package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"vmm/boot/boottest"
	"vmm/control"
	"vmm/kvm/kvmtest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"vmm": func() {
			os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
		},
		"fakeguest": fakeGuest,
		"register":  register,
		"journal":   journal,
		"panicky":   panicky,
	})
}

func TestScripts(t *testing.T) {
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": status, "killguest": killGuest, "cmpjson": cmpJSON,
		},
		Condition: func(c string) (bool, error) {
			if c != "kvm" {
				return false, fmt.Errorf("no such condition")
			}
			err := unix.Access("/dev/kvm", unix.R_OK|unix.W_OK)
			if os.Getenv(kvmtest.RequireKVM) == "1" {
				return true, err // without it, this is no place to skip
			}
			return err == nil, nil
		},
		Setup: func(e *testscript.Env) error {
			// A unix socket's path is short, a script's directory may not be.
			run, err := os.MkdirTemp("", "vmm")
			if err != nil {
				return err
			}
			for name, code := range map[string][]byte{"endless": boottest.Endless, "fragile": fragile} {
				if err := boottest.WriteKernel(filepath.Join(e.WorkDir, name), code); err != nil {
					return err
				}
			}
			e.Setenv("VMM_RUN_DIR", run)
			e.Setenv("VMM_STATE_DIR", filepath.Join(e.WorkDir, "state"))
			e.Setenv("TESTDATA", testdata)
			e.Setenv("GORACE", "atexit_sleep_ms=0") // else each command of a script sleeps a second at its end
			e.Defer(func() {
				guests, err := control.RunDir(run).List()
				for _, g := range guests {
					err = errors.Join(err, kill(g.Pid))
				}
				if err = errors.Join(err, os.RemoveAll(run)); err != nil {
					t.Error(err)
				}
			})
			return nil
		},
	})
}

func TestEscapes(t *testing.T) {
	for _, test := range []struct {
		typed []string // one string per read
		guest string
		quit  bool
	}{
		{[]string{"hello\r"}, "hello\r", false},
		{[]string{"a\x1dq"}, "a", true},
		{[]string{"a\x1d", "q"}, "a", true},
		{[]string{"\x1d\x1d"}, "\x1d", false},
		{[]string{"\x1d\x1dq"}, "\x1dq", false},
		{[]string{"\x1dx"}, "\x1dx", false},
		{[]string{"\x1d", "\x1d", "\x1d", "q"}, "\x1d", true},
		{[]string{"q"}, "q", false},
	} {
		var e escapes
		var guest string
		quit := false
		for _, s := range test.typed {
			p, q := e.filter([]byte(s))
			guest += string(p)
			quit = quit || q
		}
		if guest != test.guest || quit != test.quit {
			t.Errorf("typed %q: guest gets %q, quit %v; want %q, %v", test.typed, guest, quit, test.guest, test.quit)
		}
	}
}

// status runs a command and compares its exit status with the first argument;
// "! cmd" alone does not tell 1 from 2.
func status(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: status N COMMAND...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = strconv.Itoa(exit.ExitCode())
	} else if err != nil {
		ts.Fatalf("%s: %v", args[1], err)
	}
	if got != args[0] {
		ts.Fatalf("exit status %s; want %s", got, args[0])
	}
}
