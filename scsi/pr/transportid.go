package pr

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// TransportID names an initiator port (SPC-5 7.6.4): the bytes as they go
// over the wire, in a string so that it compares and can be a map key.
type TransportID string

// Nexus is an I_T nexus.
type Nexus struct {
	Initiator  TransportID
	TargetPort uint16 // relative target port identifier
}

func (n Nexus) String() string {
	return fmt.Sprintf("%v to target port %d", n.Initiator, n.TargetPort)
}

// Protocol identifiers (SPC-5 7.6.1, table "PROTOCOL IDENTIFIER field values").
const (
	ProtoFC    = 0x0 // Fibre Channel
	ProtoSPI   = 0x1 // parallel SCSI
	ProtoSBP   = 0x3 // IEEE 1394
	ProtoSRP   = 0x4 // RDMA
	ProtoISCSI = 0x5
	ProtoSAS   = 0x6
	ProtoSOP   = 0xa // PCI Express
)

// fixedIDLen is the length of every TransportID but iSCSI's, bytes.
const fixedIDLen = 24

// maxISCSIName is the longest iSCSI name, bytes (RFC 7143, 4.2.7.1).
const maxISCSIName = 223

// ParseTransportID reads the TransportID at the start of b; rest is what
// follows it.
func ParseTransportID(b []byte) (id TransportID, rest []byte, err error) {
	if len(b) < fixedIDLen {
		return "", nil, fmt.Errorf("TransportID of %d bytes; want at least %d", len(b), fixedIDLen)
	}
	n := fixedIDLen
	proto, format := b[0]&0xf, b[0]>>6
	switch proto {
	case ProtoFC, ProtoSPI, ProtoSBP, ProtoSRP, ProtoSAS, ProtoSOP:
		if format != 0 {
			return "", nil, fmt.Errorf("TransportID of protocol %#x with format %d", proto, format)
		}
	case ProtoISCSI:
		// SPC-5 7.6.4.6: ADDITIONAL LENGTH is a multiple of four, at least 20;
		// the name is null-terminated and null-padded.
		n = 4 + int(binary.BigEndian.Uint16(b[2:]))
		if n > len(b) {
			return "", nil, fmt.Errorf("iSCSI TransportID of %d bytes, %d are left", n, len(b))
		}
		if n < fixedIDLen || n%4 != 0 {
			return "", nil, fmt.Errorf("iSCSI TransportID with ADDITIONAL LENGTH %d", n-4)
		}
		if _, _, err := iscsiName(b[:n]); err != nil {
			return "", nil, err
		}
	default:
		return "", nil, fmt.Errorf("TransportID of unknown protocol %#x", proto)
	}
	return TransportID(b[:n]), b[n:], nil
}

// iscsiName is the name in an iSCSI TransportID and, with format 1, the ISID
// as the initiator wrote it.
func iscsiName(b []byte) (name, isid string, err error) {
	text, _, terminated := bytes.Cut(b[4:], []byte{0})
	if !terminated {
		return "", "", errors.New("iSCSI name is not null-terminated")
	}
	switch format := b[0] >> 6; format {
	case 0:
		name = string(text)
	case 1: // name, then ",i,0x", then the ISID in hexadecimal
		var ok bool
		if name, isid, ok = strings.Cut(string(text), ",i,0x"); !ok || isid == "" {
			return "", "", fmt.Errorf("iSCSI name %q lacks its ISID", text)
		}
	default:
		return "", "", fmt.Errorf("iSCSI TransportID with format %d", format)
	}
	if name == "" || len(name) > maxISCSIName {
		return "", "", fmt.Errorf("iSCSI name of %d bytes", len(name))
	}
	return name, isid, nil
}

// Protocol is id's protocol identifier.
func (id TransportID) Protocol() uint8 {
	if id == "" {
		return 0xf
	}
	return id[0] & 0xf
}

// FC is the TransportID of a Fibre Channel N_Port name.
func FC(name uint64) TransportID { return fixedID(ProtoFC, 8, be64(name)) }

// SAS is the TransportID of a SAS address.
func SAS(address uint64) TransportID { return fixedID(ProtoSAS, 4, be64(address)) }

// SRP is the TransportID of an RDMA initiator port identifier.
func SRP(id [16]byte) TransportID { return fixedID(ProtoSRP, 8, id[:]) }

func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func fixedID(proto byte, at int, name []byte) TransportID {
	var b [fixedIDLen]byte
	b[0] = proto
	copy(b[at:], name)
	return TransportID(b[:])
}

// ISCSI is the TransportID of an iSCSI initiator: the device (format 0), or
// with an ISID in hexadecimal digits the port (format 1).
func ISCSI(name, isid string) (TransportID, error) {
	format := byte(0)
	text := name
	if isid != "" {
		format = 1 << 6
		text += ",i,0x" + isid
	}
	n := max((len(text)+1+3)&^3, fixedIDLen-4)
	b := make([]byte, 4+n)
	b[0] = format | ProtoISCSI
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	copy(b[4:], text)
	id, rest, err := ParseTransportID(b)
	if err != nil || len(rest) != 0 {
		return "", fmt.Errorf("iSCSI name %q, ISID %q: %w", name, isid, err)
	}
	if got, _, _ := iscsiName([]byte(id)); got != name {
		return "", fmt.Errorf("iSCSI name %q cannot be encoded", name)
	}
	return id, nil
}

// Same says whether two TransportIDs name one initiator port although their
// bytes may differ: reserved bytes are not compared, nor the case of an
// iSCSI name and of its ISID's digits.
func (id TransportID) Same(other TransportID) bool {
	return id == other || id.canonical() == other.canonical()
}

func (id TransportID) canonical() string { return strings.ToLower(id.String()) }

// String is the port's name with its protocol, such as "sas 0x5000...".
func (id TransportID) String() string {
	if id == "" {
		return "no initiator port"
	}
	b := []byte(id)
	if len(b) >= fixedIDLen {
		switch id.Protocol() {
		case ProtoFC:
			return fmt.Sprintf("fc 0x%x", b[8:16])
		case ProtoSBP:
			return fmt.Sprintf("sbp 0x%x", b[8:16])
		case ProtoSRP:
			return fmt.Sprintf("srp 0x%x", b[8:24])
		case ProtoSAS:
			return fmt.Sprintf("sas 0x%x", b[4:12])
		case ProtoSPI:
			return fmt.Sprintf("spi %d port %d", binary.BigEndian.Uint16(b[2:]), binary.BigEndian.Uint16(b[6:]))
		case ProtoISCSI:
			name, isid, err := iscsiName(b)
			if err == nil && isid != "" {
				return "iscsi " + name + ",i,0x" + isid
			}
			if err == nil {
				return "iscsi " + name
			}
		}
	}
	return fmt.Sprintf("transport id %x", b)
}
