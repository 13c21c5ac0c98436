package scsi

import "fmt"

// SenseKey is a sense key (SPC-5 4.4.8).
type SenseKey uint8

const (
	NoSense        SenseKey = 0x0
	RecoveredError SenseKey = 0x1
	NotReady       SenseKey = 0x2
	MediumError    SenseKey = 0x3
	HardwareError  SenseKey = 0x4
	IllegalRequest SenseKey = 0x5
	UnitAttention  SenseKey = 0x6
	DataProtect    SenseKey = 0x7
	AbortedCommand SenseKey = 0xb
	Miscompare     SenseKey = 0xe
)

// Sense is a sense key with its additional sense code and qualifier.
type Sense struct {
	Key  SenseKey
	ASC  uint8
	ASCQ uint8
}

// The additional sense codes that more than one backend answers with.
var (
	InvalidOpcode        = Sense{IllegalRequest, 0x20, 0x00} // INVALID COMMAND OPERATION CODE
	LBAOutOfRange        = Sense{IllegalRequest, 0x21, 0x00} // LOGICAL BLOCK ADDRESS OUT OF RANGE
	InvalidFieldInCDB    = Sense{IllegalRequest, 0x24, 0x00} // INVALID FIELD IN CDB
	LUNNotSupported      = Sense{IllegalRequest, 0x25, 0x00} // LOGICAL UNIT NOT SUPPORTED
	InvalidFieldInList   = Sense{IllegalRequest, 0x26, 0x00} // INVALID FIELD IN PARAMETER LIST
	ParameterListLength  = Sense{IllegalRequest, 0x1a, 0x00} // PARAMETER LIST LENGTH ERROR
	WriteProtected       = Sense{DataProtect, 0x27, 0x00}    // WRITE PROTECTED
	PowerOnOccurred      = Sense{UnitAttention, 0x29, 0x00}  // POWER ON, RESET, OR BUS DEVICE RESET OCCURRED
	ReportedLUNsChanged  = Sense{UnitAttention, 0x3f, 0x0e}  // REPORTED LUNS DATA HAS CHANGED
	CapacityChanged      = Sense{UnitAttention, 0x2a, 0x09}  // CAPACITY DATA HAS CHANGED
	InternalTargetFailed = Sense{HardwareError, 0x44, 0x00}  // INTERNAL TARGET FAILURE
)

func (s Sense) String() string { return fmt.Sprintf("%x/%02x/%02x", uint8(s.Key), s.ASC, s.ASCQ) }

// FixedSenseLen is the length of the sense data that Check makes, in bytes.
const FixedSenseLen = 18

// put encodes s as current fixed-format sense data (SPC-5 4.4.3).
func (s Sense) put(b *[MaxSense]byte) int {
	clear(b[:FixedSenseLen])
	b[0] = 0x70
	b[2] = byte(s.Key)
	b[7] = FixedSenseLen - 8 // additional sense length
	b[12], b[13] = s.ASC, s.ASCQ
	return FixedSenseLen
}

// ParseSense reads key, code and qualifier from sense data in fixed or
// descriptor format, current or deferred; ok is false for anything else.
func ParseSense(b []byte) (s Sense, ok bool) {
	if len(b) < 1 {
		return s, false
	}
	switch b[0] & 0x7f {
	case 0x70, 0x71:
		if len(b) < 3 {
			return s, false
		}
		s.Key = SenseKey(b[2] & 0xf)
		// Codes beyond the additional sense length or the buffer are absent,
		// which means zero.
		if len(b) >= 14 && b[7] >= 6 {
			s.ASC, s.ASCQ = b[12], b[13]
		}
		return s, true
	case 0x72, 0x73:
		if len(b) < 4 {
			return s, false
		}
		return Sense{SenseKey(b[1] & 0xf), b[2], b[3]}, true
	}
	return s, false
}
