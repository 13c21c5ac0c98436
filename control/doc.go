// Package control is the control API of running machines: the service that a
// machine's process offers on a unix socket, its client, and the run directory
// in which machines find each other.
//
//	rundir.go   names, locks and sockets of running machines
//	server.go   the socket's server, safe against slow and hostile clients
//	service.go  what its methods do
//	console.go  those of the guest's console
//	waiting.go  what they do where a guest is still to come
//	client.go   how the commands ask
//	message.go  from machine's values to the schema's messages
//
// The schema is proto/vmm/v1/machine.proto.
package control
