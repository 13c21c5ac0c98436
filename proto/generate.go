// Package proto holds the schema of everything that leaves a vmm process: the
// configuration, device state, the migration stream and the control API. The
// .proto files are in vmm/v1, with what is generated from them beside.
package proto

//go:generate ./generate
