// Package sys owns the operating-system objects that several packages share:
// event file descriptors, pipes, shared memory and its mappings, locked threads, and
// files that outlast a crash.
//
// Ownership: every type here has one owner, is created close-on-exec, and has
// a Close that may be called more than once; the second call does nothing.
// Use after Close answers os.ErrClosed.
package sys
