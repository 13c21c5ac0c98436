//go:build !race

package pr

const raceDetector = false
