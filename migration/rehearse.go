package migration

import (
	"runtime"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"vmm/internal/sys"
	vmmv1 "vmm/proto/vmm/v1"
)

// Rehearse does, while the guest runs and at a destination before anybody is told
// to come, what would otherwise be done for the first time when a guest waits for
// it: the monitor's code comes from its file, protobuf makes its tables of each
// type of message, there are threads, and the garbage of what came before is
// collected. It is a help, so a failure is none.
func Rehearse() {
	_ = sys.PopulateProgram()
	sys.SpareThreads()
	m := (&vmmv1.StreamMessage{}).ProtoReflect()
	bodies := m.Descriptor().Oneofs().ByName("body").Fields()
	for i := range bodies.Len() {
		fill(m.Mutable(bodies.Get(i)).Message())
		if b, err := proto.Marshal(m.Interface()); err == nil {
			_ = proto.Unmarshal(b, &vmmv1.StreamMessage{})
		}
	}
	runtime.GC()
}

// fill gives m one of everything. The messages' types do not contain themselves.
func fill(m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		switch f := fields.Get(i); {
		case f.IsList():
			list := m.Mutable(f).List()
			e := list.NewElement()
			if f.Message() != nil {
				fill(e.Message())
			}
			list.Append(e)
		case f.Message() != nil:
			fill(m.Mutable(f).Message())
		}
	}
}
