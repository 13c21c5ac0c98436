package twohosts

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"

	"google.golang.org/protobuf/proto"

	vmmv1 "vmm/proto/vmm/v1"
)

// relay takes one connection at an address and passes it on to another one, but
// that who offers a guest there speaks the next version of the stream.
func relay(at, to string) error {
	ln, err := net.Listen("tcp", at)
	if err != nil {
		return err
	}
	defer ln.Close()
	fmt.Println("listening")
	source, err := ln.Accept()
	if err != nil {
		return err
	}
	defer source.Close()
	destination, err := net.Dial("tcp", to)
	if err != nil {
		return err
	}
	defer destination.Close()
	// Who the connection is from, 32 bytes, then messages with their length
	// before them (migration/frame.go).
	if _, err := io.CopyN(destination, source, 32); err != nil {
		return err
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(source, b); err != nil {
		return err
	}
	b = make([]byte, binary.LittleEndian.Uint32(b))
	var m vmmv1.StreamMessage
	if _, err = io.ReadFull(source, b); err == nil {
		err = proto.Unmarshal(b, &m)
	}
	if err != nil {
		return err
	}
	hello := m.GetHello()
	if hello == nil {
		return fmt.Errorf("the first message is %v", &m)
	}
	hello.Version++
	if b, err = proto.Marshal(&m); err != nil {
		return err
	}
	if _, err := destination.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		return err
	}
	go io.Copy(destination, source)
	_, err = io.Copy(source, destination)
	return err
}
