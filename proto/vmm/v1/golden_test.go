package vmmv1_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	vmmv1 "vmm/proto/vmm/v1"
)

var update = flag.Bool("update", false, "add golden bytes for messages that have grown")

// lasting are the files whose messages outlive the program that wrote them.
// Those of the stream are in snapshots.
var lasting = []protoreflect.FileDescriptor{vmmv1.File_vmm_v1_config_proto, vmmv1.File_vmm_v1_state_proto, vmmv1.File_vmm_v1_stream_proto}

// golden is where the bytes of version n of a message are. A message's first
// version is 1; it gets another when a field is added.
func golden(message protoreflect.Name, n int) string {
	return filepath.Join("testdata", fmt.Sprintf("%s.%d.binpb", message, n))
}

// fill sets every field of m to a value that tells it from its neighbours, and
// the member of each oneof that pick says.
func fill(m protoreflect.Message, pick int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() && o.Fields().Get(pick%o.Fields().Len()) != f {
			continue
		}
		if !f.IsList() {
			m.Set(f, value(f, 0, m.NewField))
			continue
		}
		list := m.Mutable(f).List()
		for at := range 2 {
			list.Append(value(f, at, func(protoreflect.FieldDescriptor) protoreflect.Value { return list.NewElement() }))
		}
	}
}

func value(f protoreflect.FieldDescriptor, at int, message func(protoreflect.FieldDescriptor) protoreflect.Value) protoreflect.Value {
	n := uint64(f.Number())*16 + uint64(at) + 1
	switch f.Kind() {
	case protoreflect.MessageKind:
		v := message(f)
		fill(v.Message(), at)
		return v
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		values := f.Enum().Values()
		return protoreflect.ValueOfEnum(values.Get(values.Len() - 1).Number())
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(fmt.Sprintf("%s %d", f.Name(), at))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{byte(n), 0, 0xff})
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(n) << 8)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(n << 40)
	case protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(-int64(n) << 40)
	}
	panic(fmt.Sprintf("field %s is of kind %v, which this test cannot fill", f.FullName(), f.Kind()))
}

// unknown finds a message with fields that the schema does not know.
func unknown(m protoreflect.Message) (found string) {
	if len(m.GetUnknown()) > 0 {
		return string(m.Descriptor().FullName())
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Kind() != protoreflect.MessageKind:
		case f.IsList():
			for i := range v.List().Len() {
				if found == "" {
					found = unknown(v.List().Get(i).Message())
				}
			}
		default:
			found = unknown(v.Message())
		}
		return found == ""
	})
	return found
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What any version wrote, this one understands to the last bit and would write
// again; and the newest of it has every field of the schema.
func TestGoldenBytes(t *testing.T) {
	messages := 0
	for _, file := range lasting {
		list := file.Messages()
		for i := range list.Len() {
			d := list.Get(i)
			messages++
			full, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
			if err != nil {
				t.Fatal(err)
			}
			n := 1
			var newest []byte
			for ; ; n++ {
				b, err := os.ReadFile(golden(d.Name(), n))
				if os.IsNotExist(err) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				m := full.New().Interface()
				if err := proto.Unmarshal(b, m); err != nil {
					t.Errorf("%s: %v", golden(d.Name(), n), err)
				}
				if name := unknown(m.ProtoReflect()); name != "" {
					t.Errorf("%s: message %s has fields that the schema does not know: a field was removed or renumbered", golden(d.Name(), n), name)
				}
				if again := marshal(t, m); !bytes.Equal(again, b) {
					t.Errorf("%s: written again it is %x; want %x", golden(d.Name(), n), again, b)
				}
				newest = b
			}
			m := full.New()
			fill(m, 0)
			if want := marshal(t, m.Interface()); newest == nil || !bytes.Equal(newest, want) {
				if !*update {
					t.Errorf("message %s with all its fields is not among the golden bytes: run this test with -update", d.Name())
				} else if err := os.WriteFile(golden(d.Name(), n), want, 0o644); err != nil {
					t.Error(err)
				}
			}
		}
	}
	if files, _ := filepath.Glob(golden("*", 1)); len(files) != messages {
		t.Errorf("golden bytes of %d messages for %d in the schema: one was removed", len(files), messages)
	}
}

// A field that is not in the schema is found wherever it stands, and so is one
// whose type has changed: its bytes do not fit the new one.
func TestUnknownFieldsAreFound(t *testing.T) {
	stray := protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1)
	deep := &vmmv1.MachineState{Vcpus: []*vmmv1.VcpuState{{}, {Regs: &vmmv1.GeneralRegisters{}}}}
	deep.Vcpus[1].Regs.ProtoReflect().SetUnknown(stray)
	// Field 1 is a fixed64 in one and a varint in the other.
	var other vmmv1.ResetControlState
	if err := proto.Unmarshal(marshal(t, &vmmv1.DescriptorTable{Base: 1}), &other); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		m    proto.Message
		want string
	}{
		{&vmmv1.MachineState{Vcpus: []*vmmv1.VcpuState{{}}}, ""},
		{deep, "vmm.v1.GeneralRegisters"},
		{&other, "vmm.v1.ResetControlState"},
	} {
		if got := unknown(test.m.ProtoReflect()); got != test.want {
			t.Errorf("unknown(%v) = %q; want %q", test.m, got, test.want)
		}
	}
}
