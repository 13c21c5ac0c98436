// Package agent runs commands at the far end of a byte pipe: a virtio-serial
// port of a lab host, or the second UART of a test guest. [Serve] is the end
// that runs them, [Client] the end that asks, with the feel of os/exec.
//
// # Frames
//
// A UART has no message boundaries, may carry bytes that nobody framed (an
// echo before raw mode, half a frame of a peer that went away), and costs a VM
// exit for each byte. So a frame is
//
//	00  COBS(message, CRC-32C of the message, little endian)  00
//
// Consistent Overhead Byte Stuffing (Cheshire and Baker, 1999) leaves 00 free
// to mean "a frame ends here", at the price of one byte in 254: a reader that
// joins in the middle, or lost bytes, is in step again at the next 00. A frame
// whose checksum is wrong is dropped and counted, never half-believed.
//
// # Messages
//
//	message = kind (1 byte)  id (uvarint)  body
//
//	kind    direction  body
//	ping    asks       up to 16 bytes of the asker's choice; id 0
//	pong    answers    the same bytes; id 0
//	start   asks       a Request as JSON
//	input   asks       bytes for the command's standard input; none: end of file
//	resize  asks       rows, columns (uvarints) of its terminal
//	signal  asks       signal number (uvarint), for the command's whole session
//	stdout  answers    bytes of output (also of a terminal)
//	stderr  answers    bytes of output
//	exit    answers    Linux wait status, bytes of output sent (uvarints), and
//	                   an error text if the command never started; ends the id
//	credit  both       number of bytes (uvarint) that the receiver has consumed
//	poweroff asks      nothing; id 0
//
// Output and input flow within a window of [Window] unconsumed bytes for each
// command and direction, so that one consumer that does not read holds up its
// own command (as a pipe would) and no other.
//
// Every length has a cap that is checked before memory is taken for it. A
// frame lost on the way shows as an output total that does not add up, which
// is an error of the command, not silence.
package agent
