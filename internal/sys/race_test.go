//go:build race

package sys

// The race detector's hooks in system calls make their buffers escape.
const raceDetector = true
