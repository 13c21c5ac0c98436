//go:build race

package pr

// The search is one goroutine: there is nothing in it for the race detector,
// which makes it ten times slower.
const raceDetector = true
