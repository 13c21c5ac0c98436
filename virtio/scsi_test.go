package virtio

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"vmm/internal/sys"
	"vmm/memory"
	"vmm/scsi"
	"vmm/scsi/scsitest"
	"vmm/virtio/virtiotest"
)

const scsiTestFeatures = bothFeatures | scsiFeatureHotplug | scsiFeatureChange

// scsiRig is a controller whose driver is a mock. Queues are named by their
// index: 0 control, 1 events, 2 and up requests.
type scsiRig struct {
	t      testing.TB
	mem    *virtiotest.Memory
	dev    *SCSI
	rings  []*virtiotest.Ring
	irq    []chan struct{} // by queue: interrupts since the last look
	raised []atomic.Int64  // by queue: all interrupts
	act    Activation
	failed chan error
	id     uint64
}

// newSCSIRig makes a controller with its rings laid out; start starts it.
func newSCSIRig(t testing.TB, requestQueues int) *scsiRig {
	t.Helper()
	r := &scsiRig{
		t:      t,
		mem:    virtiotest.NewMemory(t, 32<<20),
		dev:    NewSCSI(SCSIConfig{Queues: requestQueues}),
		failed: make(chan error, 1),
	}
	r.lay(scsiTestFeatures)
	t.Cleanup(r.dev.Stop)
	return r
}

// lay puts fresh rings into memory, as a driver does after a reset.
func (r *scsiRig) lay(features uint64) {
	sizes := r.dev.QueueSizes()
	r.rings = make([]*virtiotest.Ring, len(sizes))
	r.irq = make([]chan struct{}, len(sizes))
	r.raised = make([]atomic.Int64, len(sizes))
	r.act = Activation{
		Features: features,
		Queues:   make([]*Queue, len(sizes)),
		Fail: func(err error) {
			select {
			case r.failed <- err:
			default:
				r.t.Errorf("the device failed a second time: %v", err)
			}
		},
	}
	for i, size := range sizes {
		bell, err := sys.NewEventFD()
		if err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() { r.dev.Stop(); bell.Close() })
		ring := virtiotest.NewRing(r.mem, size, features)
		ring.Notify = func() { bell.Signal() }
		r.rings[i] = ring
		irq, raised := make(chan struct{}, 1), &r.raised[i]
		r.irq[i] = irq
		r.act.Queues[i], err = NewQueue(QueueConfig{
			RAM: r.mem.RAM, Features: features, MaxSize: size, Doorbell: bell,
			Interrupt: func() {
				raised.Add(1)
				select {
				case irq <- struct{}{}:
				default:
				}
			},
		}, QueueState{Size: size, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used})
		if err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r *scsiRig) start() {
	r.t.Helper()
	if err := r.dev.Start(r.act); err != nil {
		r.t.Fatal(err)
	}
}

// attach makes lun target number, LUN 0.
func (r *scsiRig) attach(number uint8, lun scsi.LUN) {
	r.t.Helper()
	if err := r.dev.Attach(number, lun); err != nil {
		r.t.Fatal(err)
	}
}

// remove takes a target away at once, and waits for its commands.
func (r *scsiRig) remove(number uint8) error {
	_, back, err := r.dev.Remove(number)
	if err == nil {
		<-back
	}
	return err
}

// place puts p into guest memory as buffers of at most piece bytes each.
func (r *scsiRig) place(p []byte, piece int, write bool) (bufs []virtiotest.Buffer) {
	for len(p) > 0 {
		n := min(piece, len(p))
		gpa := r.mem.Alloc(uint64(n), 1)
		copy(r.mem.Bytes(gpa, uint64(n)), p)
		bufs = append(bufs, virtiotest.Buffer{GPA: gpa, Len: uint32(n), Write: write})
		p = p[n:]
	}
	return bufs
}

// fetch is the contents of buffers, one after the other.
func (r *scsiRig) fetch(bufs []virtiotest.Buffer) (p []byte) {
	for _, b := range bufs {
		p = append(p, r.mem.Bytes(b.GPA, uint64(b.Len))...)
	}
	return p
}

// add makes bufs available on a queue and notifies the device.
func (r *scsiRig) add(queue int, bufs ...virtiotest.Buffer) uint16 {
	r.t.Helper()
	add := r.rings[queue].Add
	if len(bufs) > 4 {
		add = r.rings[queue].AddIndirect
	}
	head, ok := add(bufs...)
	if !ok {
		r.t.Fatalf("queue %d has no room for %d buffers", queue, len(bufs))
	}
	r.rings[queue].Kick()
	return head
}

// reap waits for the next request that comes back on a queue, asleep until
// the device interrupts.
func (r *scsiRig) reap(queue int) virtiotest.Used {
	r.t.Helper()
	for {
		if u, ok := r.rings[queue].Reap(); ok {
			return u
		}
		if r.rings[queue].EnableInterrupt() {
			continue
		}
		select {
		case <-r.irq[queue]:
		case err := <-r.failed:
			r.failed <- err
			r.t.Fatalf("queue %d: the device failed: %v", queue, err)
		case <-time.After(time.Minute):
			r.t.Fatalf("queue %d: nothing came back", queue)
		}
	}
}

// failure waits for the device to fail.
func (r *scsiRig) failure() error {
	r.t.Helper()
	select {
	case err := <-r.failed:
		return err
	case <-time.After(time.Minute):
		r.t.Fatal("the device did not fail")
		return nil
	}
}

// scsiCommand is a command as the driver sees it.
type scsiCommand struct {
	lun   [8]byte
	id    uint64
	attr  byte
	cdb   []byte
	out   []byte
	in    int
	piece int // longest buffer in bytes; 0: one for each part
	cdbN  int // cdb_size, 0: 32
	sense int // sense_size, 0: 96

	response []virtiotest.Buffer
	data     []virtiotest.Buffer
	head     uint16
}

// unit0 is how Linux addresses LUN 0 of a target.
func unit0(target uint8) [8]byte { return [8]byte{1, target, 0x40} }

func (c *scsiCommand) header() []byte {
	if c.cdbN == 0 {
		c.cdbN = 32
	}
	h := make([]byte, 19+c.cdbN)
	copy(h, c.lun[:])
	binary.LittleEndian.PutUint64(h[8:], c.id)
	h[16] = c.attr
	copy(h[19:], c.cdb)
	return h
}

// submit sends c on a queue.
func (r *scsiRig) submit(queue int, c *scsiCommand) *scsiCommand {
	r.t.Helper()
	if c.sense == 0 {
		c.sense = 96
	}
	piece := c.piece
	if piece == 0 {
		piece = 1 << 30
	}
	if c.id == 0 {
		r.id++
		c.id = r.id
	}
	// What the device does not write keeps a pattern.
	fill := func(n int) []byte { return bytes.Repeat([]byte{0xa5}, n) }
	var bufs []virtiotest.Buffer
	if c.piece == 0 {
		bufs = append(r.place(c.header(), piece, false), r.place(c.out, piece, false)...)
		c.response = r.place(fill(12+c.sense), piece, true)
		c.data = r.place(fill(c.in), piece, true)
	} else {
		// One run of bytes each way: a buffer may hold the end of one part
		// and the start of the next.
		bufs = r.place(append(c.header(), c.out...), piece, false)
		c.response = r.place(fill(12+c.sense+c.in), piece, true)
	}
	bufs = append(bufs, c.response...)
	bufs = append(bufs, c.data...)
	c.head = r.add(queue, bufs...)
	return c
}

// scsiAnswer is what came back for a command.
type scsiAnswer struct {
	code     byte
	status   scsi.Status
	sense    []byte
	residual uint32
	data     []byte
	written  uint32
}

func (a scsiAnswer) String() string {
	if a.code != scsiOK {
		return fmt.Sprintf("response %d", a.code)
	}
	if s, ok := scsi.ParseSense(a.sense); ok {
		return s.String()
	}
	return a.status.String()
}

// answer reads what the device wrote for c.
func (r *scsiRig) answer(c *scsiCommand, u virtiotest.Used) scsiAnswer {
	r.t.Helper()
	p := append(r.fetch(c.response), r.fetch(c.data)...)
	le := binary.LittleEndian
	n := le.Uint32(p)
	if int(n) > c.sense {
		r.t.Fatalf("sense_len is %d, there is room for %d", n, c.sense)
	}
	return scsiAnswer{
		code: p[11], status: scsi.Status(p[10]), sense: p[12 : 12+n],
		residual: le.Uint32(p[4:]), data: p[12+c.sense:], written: u.Written,
	}
}

// do sends c on the first request queue and waits for its answer.
func (r *scsiRig) do(c *scsiCommand) scsiAnswer {
	r.t.Helper()
	r.submit(2, c)
	u := r.reap(2)
	if u.Head != c.head {
		r.t.Fatalf("chain %d came back; want %d", u.Head, c.head)
	}
	return r.answer(c, u)
}

func rw10(op byte, lba, blocks int) []byte {
	return []byte{op, 0, 0, 0, byte(lba >> 8), byte(lba), 0, byte(blocks >> 8), byte(blocks), 0}
}

// The offsets of scsi_*.go against the kernel's own structures.
func TestSCSILayoutsAreTheKernels(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no C compiler (gcc) to ask")
	}
	src := "#include <stddef.h>\n#include <linux/virtio_scsi.h>\n"
	for expr, want := range map[string]int{
		"offsetof(struct virtio_scsi_cmd_req, lun)":            0,
		"offsetof(struct virtio_scsi_cmd_req, tag)":            scsiHeaderID,
		"offsetof(struct virtio_scsi_cmd_req, task_attr)":      scsiHeaderAttr,
		"offsetof(struct virtio_scsi_cmd_req, cdb)":            scsiHeaderSize,
		"sizeof(struct virtio_scsi_cmd_req)":                   51,
		"offsetof(struct virtio_scsi_cmd_resp, sense_len)":     0,
		"offsetof(struct virtio_scsi_cmd_resp, resid)":         scsiResponseResidual,
		"offsetof(struct virtio_scsi_cmd_resp, status)":        scsiResponseStatus,
		"offsetof(struct virtio_scsi_cmd_resp, response)":      scsiResponseCode,
		"offsetof(struct virtio_scsi_cmd_resp, sense)":         scsiResponseSize,
		"sizeof(struct virtio_scsi_cmd_resp)":                  108,
		"offsetof(struct virtio_scsi_ctrl_tmf_req, subtype)":   4,
		"offsetof(struct virtio_scsi_ctrl_tmf_req, lun)":       8,
		"offsetof(struct virtio_scsi_ctrl_tmf_req, tag)":       16,
		"sizeof(struct virtio_scsi_ctrl_tmf_req)":              tmfRequestSize,
		"sizeof(struct virtio_scsi_ctrl_tmf_resp)":             tmfResponseSize,
		"offsetof(struct virtio_scsi_ctrl_an_req, lun)":        4,
		"sizeof(struct virtio_scsi_ctrl_an_req)":               anRequestSize,
		"offsetof(struct virtio_scsi_ctrl_an_resp, response)":  4,
		"sizeof(struct virtio_scsi_ctrl_an_resp)":              anResponseSize,
		"offsetof(struct virtio_scsi_event, lun)":              4,
		"offsetof(struct virtio_scsi_event, reason)":           12,
		"sizeof(struct virtio_scsi_event)":                     eventSize,
		"offsetof(struct virtio_scsi_config, seg_max)":         4,
		"offsetof(struct virtio_scsi_config, max_sectors)":     8,
		"offsetof(struct virtio_scsi_config, cmd_per_lun)":     12,
		"offsetof(struct virtio_scsi_config, event_info_size)": 16,
		"offsetof(struct virtio_scsi_config, sense_size)":      scsiConfigSenseSize,
		"offsetof(struct virtio_scsi_config, cdb_size)":        scsiConfigCDBSize,
		"offsetof(struct virtio_scsi_config, max_channel)":     28,
		"offsetof(struct virtio_scsi_config, max_target)":      30,
		"offsetof(struct virtio_scsi_config, max_lun)":         32,
		"sizeof(struct virtio_scsi_config)":                    scsiConfigSize,
		"VIRTIO_SCSI_SENSE_DEFAULT_SIZE":                       scsiDefaultSenseSize,
		"VIRTIO_SCSI_CDB_DEFAULT_SIZE":                         scsiDefaultCDBSize,
		"1 << VIRTIO_SCSI_F_HOTPLUG":                           scsiFeatureHotplug,
		"1 << VIRTIO_SCSI_F_CHANGE":                            scsiFeatureChange,
		"VIRTIO_SCSI_S_ABORTED":                                scsiAborted,
		"VIRTIO_SCSI_S_BAD_TARGET":                             scsiBadTarget,
		"VIRTIO_SCSI_S_RESET":                                  scsiReset,
		"VIRTIO_SCSI_S_BUSY":                                   scsiBusy,
		"VIRTIO_SCSI_S_TRANSPORT_FAILURE":                      scsiTransportFailure,
		"VIRTIO_SCSI_S_FAILURE":                                scsiFailure,
		"VIRTIO_SCSI_S_FUNCTION_SUCCEEDED":                     scsiFunctionSucceeded,
		"VIRTIO_SCSI_S_FUNCTION_REJECTED":                      scsiFunctionRejected,
		"VIRTIO_SCSI_S_INCORRECT_LUN":                          scsiIncorrectLUN,
		"VIRTIO_SCSI_T_TMF":                                    scsiTMF,
		"VIRTIO_SCSI_T_AN_QUERY":                               scsiANQuery,
		"VIRTIO_SCSI_T_AN_SUBSCRIBE":                           scsiANSubscribe,
		"VIRTIO_SCSI_T_TMF_ABORT_TASK":                         tmfAbortTask,
		"VIRTIO_SCSI_T_TMF_ABORT_TASK_SET":                     tmfAbortTaskSet,
		"VIRTIO_SCSI_T_TMF_CLEAR_ACA":                          tmfClearACA,
		"VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET":                     tmfClearTaskSet,
		"VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET":                    tmfITNexusReset,
		"VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET":                 tmfLogicalUnitReset,
		"VIRTIO_SCSI_T_TMF_QUERY_TASK":                         tmfQueryTask,
		"VIRTIO_SCSI_T_TMF_QUERY_TASK_SET":                     tmfQueryTaskSet,
		"VIRTIO_SCSI_T_NO_EVENT":                               scsiNoEvent,
		"VIRTIO_SCSI_T_TRANSPORT_RESET":                        scsiTransportReset,
		"VIRTIO_SCSI_T_PARAM_CHANGE":                           scsiParamChange,
		"VIRTIO_SCSI_T_EVENTS_MISSED":                          scsiEventsMissed,
		"VIRTIO_SCSI_EVT_RESET_RESCAN":                         scsiReasonRescan,
		"VIRTIO_SCSI_EVT_RESET_REMOVED":                        scsiReasonRemoved,
		"VIRTIO_SCSI_S_SIMPLE":                                 int(scsi.Simple),
		"VIRTIO_SCSI_S_ORDERED":                                int(scsi.Ordered),
		"VIRTIO_SCSI_S_HEAD":                                   int(scsi.HeadOfQueue),
		"VIRTIO_SCSI_S_ACA":                                    int(scsi.ACA),
	} {
		src += fmt.Sprintf("_Static_assert(%s == %d, \"is not %d\");\n", expr, want, want)
	}
	cmd := exec.Command(gcc, "-x", "c", "-fsyntax-only", "-")
	cmd.Stdin = strings.NewReader(src)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSCSIConfigSpace(t *testing.T) {
	r := newSCSIRig(t, 3)
	r.dev = NewSCSI(SCSIConfig{Queues: 3, Limits: scsi.Limits{MaxTransfer: 1 << 20, MaxSegments: 256}, CommandsPerLUN: 40})
	t.Cleanup(r.dev.Stop)
	read := func(off uint32, n int) []byte {
		p := bytes.Repeat([]byte{0xee}, n)
		r.dev.ReadConfig(off, p)
		return p
	}
	want := []byte{
		3, 0, 0, 0, // num_queues
		254, 0, 0, 0, // seg_max: two descriptors of 256 hold header and response
		0, 8, 0, 0, // max_sectors
		40, 0, 0, 0, // cmd_per_lun
		16, 0, 0, 0, // event_info_size
		96, 0, 0, 0, // sense_size
		32, 0, 0, 0, // cdb_size
		0, 0, // max_channel
		255, 0, // max_target
		0, 0, 0, 0, // max_lun
		0, 0, 0, 0, // beyond
	}
	if got := read(0, 40); !bytes.Equal(got, want) {
		t.Errorf("configuration is\n% x; want\n% x", got, want)
	}
	for _, off := range []uint32{35, 36, 40, 1 << 31, ^uint32(0)} {
		if got := read(off, 3); !bytes.Equal(got, []byte{0, 0, 0}) {
			t.Errorf("configuration at %d is % x; want zeroes", off, got)
		}
	}
	// Only the two sizes can be written, in any pieces.
	r.dev.WriteConfig(0, bytes.Repeat([]byte{7}, 20))
	r.dev.WriteConfig(28, bytes.Repeat([]byte{7}, 20))
	r.dev.WriteConfig(^uint32(0), []byte{7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7})
	r.dev.WriteConfig(20, []byte{18, 0, 0, 0})
	r.dev.WriteConfig(24, []byte{16})
	copy(want[20:], []byte{18, 0, 0, 0, 16})
	if got := read(0, 40); !bytes.Equal(got, want) {
		t.Errorf("configuration is\n% x; want\n% x", got, want)
	}
	r.start()
	r.dev.WriteConfig(20, []byte{1, 1, 1, 1, 1, 1, 1, 1})
	if got := read(0, 40); !bytes.Equal(got, want) {
		t.Errorf("after a write to a device at work it is\n% x; want\n% x", got, want)
	}
	r.dev.Stop()
	want[20], want[24] = 96, 32
	if got := read(0, 40); !bytes.Equal(got, want) {
		t.Errorf("after a reset it is\n% x; want\n% x", got, want)
	}
}

func TestSCSIStartJudgesWhatTheDriverSetUp(t *testing.T) {
	le := binary.LittleEndian
	for _, test := range []struct {
		sense, cdb uint32
		want       string // "" for none
	}{
		{96, 32, ""},
		{0, 6, ""},
		{252, 260, ""},
		{253, 32, "sense_size to 253"},
		{96, 261, "cdb_size to 261"},
		{96, 5, "cdb_size to 5"},
		{1 << 31, 32, "sense_size to 2147483648"},
		{96, ^uint32(0), "cdb_size to 4294967295"},
	} {
		r := newSCSIRig(t, 1)
		r.dev.WriteConfig(20, le.AppendUint32(le.AppendUint32(nil, test.sense), test.cdb))
		err := r.dev.Start(r.act)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("Start with sense_size %d, cdb_size %d = %v; want %q", test.sense, test.cdb, err, test.want)
		}
		r.dev.Stop() // also after a failed Start
		if err := r.dev.Start(r.act); err != nil {
			t.Errorf("Start after a reset = %v", err)
		}
	}
	r := newSCSIRig(t, 2)
	r.act.Queues = r.act.Queues[:3]
	if err := r.dev.Start(r.act); err == nil {
		t.Error("Start with 3 queues of 4 succeeded")
	}
}

// Header, response and data arrive wherever they lie, whatever the sizes are.
func TestSCSICommandsKnowNoFraming(t *testing.T) {
	const blocks = 16
	rapid.Check(t, func(rt *rapid.T) {
		cdbSize := rapid.SampledFrom([]int{10, 16, 32, 33, 260}).Draw(rt, "cdb_size")
		senseSize := rapid.SampledFrom([]int{18, 96, 252}).Draw(rt, "sense_size")
		r := newSCSIRig(t, 1)
		defer r.dev.Stop()
		le := binary.LittleEndian
		r.dev.WriteConfig(20, le.AppendUint32(le.AppendUint32(nil, uint32(senseSize)), uint32(cdbSize)))
		disk := scsitest.NewDisk(blocks)
		r.attach(5, disk)
		r.start()
		model := make([]byte, blocks*512)
		for range rapid.IntRange(1, 8).Draw(rt, "commands") {
			lba := rapid.IntRange(0, blocks).Draw(rt, "lba")
			n := rapid.IntRange(0, 3).Draw(rt, "blocks")
			room := rapid.SampledFrom([]int{n * 512, n*512 + 100, max(n*512-100, 0)}).Draw(rt, "room")
			// A chain has at most 256 pieces.
			piece := rapid.SampledFrom([]int{0, 8, 13, 50, 51, 52, 108, 512, 4000}).Draw(rt, "piece")
			c := &scsiCommand{lun: unit0(5), piece: piece, cdbN: cdbSize, sense: senseSize}
			write := rapid.Bool().Draw(rt, "write")
			if write {
				c.cdb = rw10(scsi.OpWrite10, lba, n)
				c.out = rapid.SliceOfN(rapid.Byte(), room, room).Draw(rt, "data")
			} else {
				c.cdb = rw10(scsi.OpRead10, lba, n)
				c.in = room
			}
			if piece > 0 && piece < 50 && (room+len(c.header()))/piece+(12+senseSize+c.in)/piece > 250 {
				c.piece = 64
			}
			a := r.do(c)
			moved := min(room, n*512)
			if lba+n > blocks {
				moved = 0
				if a.String() != scsi.LBAOutOfRange.String() {
					rt.Fatalf("beyond the end = %v; want %v", a, scsi.LBAOutOfRange)
				}
			} else if a.code != scsiOK || a.status != scsi.Good || len(a.sense) != 0 {
				rt.Fatalf("command = %v with %d bytes of sense; want GOOD", a, len(a.sense))
			}
			if int(a.residual) != room-moved {
				rt.Fatalf("residual %d; want %d", a.residual, room-moved)
			}
			wantWritten := 12 + senseSize
			if write {
				copy(model[min(lba*512, len(model)):], c.out[:moved])
			} else {
				wantWritten += moved
				if moved > 0 && !bytes.Equal(a.data[:moved], model[lba*512:][:moved]) {
					rt.Fatal("read other data than was written")
				}
				for i, b := range a.data[moved:] {
					if b != 0xa5 {
						rt.Fatalf("byte %d behind the data is %#x: the device wrote it", i, b)
					}
				}
			}
			if int(a.written) != wantWritten {
				rt.Fatalf("used length %d; want %d", a.written, wantWritten)
			}
		}
		if !bytes.Equal(disk.Bytes(), model) {
			rt.Fatal("the disk and the model differ")
		}
	})
}

func TestSCSIAddresses(t *testing.T) {
	r := newSCSIRig(t, 1)
	r.attach(0, scsitest.NewDisk(1))
	r.attach(255, scsitest.NewDisk(1))
	r.start()
	for _, test := range []struct {
		name string
		lun  [8]byte
		want string // of TEST UNIT READY
	}{
		{"Linux", [8]byte{1, 0, 0x40, 0}, "GOOD"},
		{"peripheral", [8]byte{1, 0, 0, 0}, "GOOD"},
		{"last target", [8]byte{1, 255, 0x40, 0}, "GOOD"},
		{"no such target", [8]byte{1, 1, 0x40, 0}, "response 3"},
		{"no such LUN", [8]byte{1, 0, 0x40, 1}, "5/25/00"},
		{"no such LUN, 14 bits", [8]byte{1, 0, 0x7f, 0xff}, "5/25/00"},
		{"no such LUN, peripheral", [8]byte{1, 0, 0, 1}, "5/25/00"},
		{"LUN of no target", [8]byte{1, 1, 0x40, 1}, "response 3"},
		{"peripheral on another bus", [8]byte{1, 0, 1, 0}, "response 3"},
		{"logical unit addressing", [8]byte{1, 0, 0x80, 0}, "response 3"},
		{"extended addressing", [8]byte{1, 0, 0xc1, 1}, "response 3"},
		{"second level", [8]byte{1, 0, 0x40, 0, 0, 1}, "response 3"},
		{"last byte", [8]byte{1, 0, 0x40, 0, 0, 0, 0, 1}, "response 3"},
		{"first byte 0", [8]byte{0, 0, 0x40, 0}, "response 3"},
		{"first byte 2", [8]byte{2, 0, 0x40, 0}, "response 3"},
		{"REPORT LUNS W-LUN", [8]byte{0xc1, 1}, "GOOD"},
		{"ACCESS CONTROLS W-LUN", [8]byte{0xc1, 2}, "response 3"},
		{"W-LUN with a tail", [8]byte{0xc1, 1, 0, 0, 0, 0, 0, 1}, "response 3"},
	} {
		if got := r.do(&scsiCommand{lun: test.lun, cdb: []byte{0}}); got.String() != test.want {
			t.Errorf("%s: TEST UNIT READY = %v; want %s", test.name, got, test.want)
		}
	}
}

// What the controller answers itself.
func TestSCSIControllersOwnAnswers(t *testing.T) {
	r := newSCSIRig(t, 1)
	held := scsitest.NewHeld(0) // answers Busy
	r.attach(3, held)
	r.attach(7, held)
	r.start()
	absent, wellKnown := [8]byte{1, 3, 0x40, 9}, [8]byte{0xc1, 1}
	unit := func(b ...byte) []byte { return append(b, make([]byte, 8-len(b))...) }
	list := func(luns ...[]byte) []byte {
		return append([]byte{0, 0, 0, byte(8 * len(luns)), 0, 0, 0, 0}, bytes.Join(luns, nil)...)
	}
	reportLUNs := func(report, allocation byte) []byte { return []byte{0xa0, 0, report, 9: allocation, 11: 0} }
	for _, test := range []struct {
		name string
		lun  [8]byte
		cdb  []byte
		room int
		want string
		data []byte // nil: none
	}{
		{"REPORT LUNS of a target", unit0(3), reportLUNs(0, 255), 255, "GOOD", list(unit())},
		{"REPORT LUNS of a LUN that is not there", absent, reportLUNs(0, 255), 255, "GOOD", list(unit())},
		{"REPORT LUNS of a target, well-known", unit0(3), reportLUNs(1, 255), 255, "GOOD", list()},
		{"REPORT LUNS of a target, all", unit0(3), reportLUNs(2, 255), 255, "GOOD", list(unit())},
		{"REPORT LUNS, allocation length 12", unit0(3), reportLUNs(0, 12), 255, "GOOD", list(unit())[:12]},
		{"REPORT LUNS, allocation length 0", unit0(3), reportLUNs(0, 0), 255, "GOOD", nil},
		{"REPORT LUNS, no room", unit0(3), reportLUNs(0, 255), 0, "GOOD", nil},
		{"REPORT LUNS, little room", unit0(3), reportLUNs(0, 255), 9, "GOOD", list(unit())[:9]},
		{"REPORT LUNS, reserved SELECT REPORT", unit0(3), reportLUNs(3, 255), 255, "5/24/00", nil},
		{"REPORT LUNS of no target", unit0(4), reportLUNs(0, 255), 255, "response 3", nil},
		{"W-LUN: REPORT LUNS", wellKnown, reportLUNs(0, 255), 255, "GOOD", list(unit(1, 3, 0x40), unit(1, 7, 0x40))},
		{"W-LUN: REPORT LUNS, well-known", wellKnown, reportLUNs(1, 255), 255, "GOOD", list(unit(0xc1, 1))},
		{"W-LUN: REPORT LUNS, all", wellKnown, reportLUNs(2, 255), 255, "GOOD",
			list(unit(1, 3, 0x40), unit(1, 7, 0x40), unit(0xc1, 1))},
		{"W-LUN: REPORT LUNS, administrative", wellKnown, reportLUNs(0x10, 255), 255, "5/24/00", nil},
		{"W-LUN: INQUIRY", wellKnown, []byte{0x12, 0, 0, 0, 5}, 5, "GOOD", []byte{0x1e, 0, 7, 2, 31}},
		{"W-LUN: REQUEST SENSE", wellKnown, []byte{0x03, 0, 0, 0, 252}, 252, "GOOD",
			[]byte{0x70, 7: 10, 17: 0}},
		{"W-LUN: READ(10)", wellKnown, rw10(0x28, 0, 1), 512, "5/20/00", nil},
		{"absent: INQUIRY", absent, []byte{0x12, 0, 0, 0, 36}, 36, "GOOD",
			[]byte("\x7f\x00\x07\x02\x1f\x00\x00\x00vmm     virtio-scsi     1   ")},
		{"absent: INQUIRY, VPD page 00", absent, []byte{0x12, 1, 0, 0, 255}, 255, "GOOD", []byte{0x7f, 0, 0, 1, 0}},
		{"absent: INQUIRY, VPD page 83", absent, []byte{0x12, 1, 0x83, 0, 255}, 255, "5/24/00", nil},
		{"absent: INQUIRY, page without EVPD", absent, []byte{0x12, 0, 0x83, 0, 255}, 255, "5/24/00", nil},
		{"absent: REQUEST SENSE", absent, []byte{0x03, 0, 0, 0, 252}, 252, "GOOD",
			[]byte{0x70, 0, 5, 7: 10, 12: 0x25, 17: 0}},
		{"absent: REQUEST SENSE, descriptor format", absent, []byte{0x03, 1, 0, 0, 252}, 252, "GOOD",
			[]byte{0x72, 5, 0x25, 7: 0}},
		{"absent: READ(10)", absent, rw10(0x28, 0, 1), 512, "5/25/00", nil},
		{"backend's: INQUIRY", unit0(3), []byte{0x12, 0, 0, 0, 36}, 36, "response 5", nil},
	} {
		a := r.do(&scsiCommand{lun: test.lun, cdb: test.cdb, in: test.room})
		moved := test.room - int(a.residual)
		if a.String() != test.want || !bytes.Equal(a.data[:moved], test.data) {
			t.Errorf("%s = %v, % x; want %s, % x", test.name, a, a.data[:moved], test.want, test.data)
		}
		if want := 108 + len(test.data); int(a.written) != want {
			t.Errorf("%s: used length %d; want %d", test.name, a.written, want)
		}
	}
}

// However a command comes back, the driver learns it.
func TestSCSIOutcomes(t *testing.T) {
	r := newSCSIRig(t, 1)
	held := scsitest.NewHeld(1)
	r.attach(0, held)
	r.start()
	long := scsi.Sense{Key: scsi.MediumError, ASC: 0x11}
	for _, test := range []struct {
		name     string
		finish   func(*scsi.Command)
		code     byte
		status   scsi.Status
		senseLen int
		residual uint32
		written  uint32
	}{
		{"good", func(c *scsi.Command) { c.Finish(512) }, 0, scsi.Good, 0, 0, 108 + 512},
		{"short", func(c *scsi.Command) { c.Finish(100) }, 0, scsi.Good, 0, 412, 108 + 100},
		{"check", func(c *scsi.Command) { c.Check(long) }, 0, scsi.CheckCondition, 18, 512, 108},
		{"long sense", func(c *scsi.Command) {
			for i := range c.Sense {
				c.Sense[i] = byte(i)
			}
			c.Status, c.SenseLen = scsi.CheckCondition, 252
			c.Done(c)
		}, 0, scsi.CheckCondition, 96, 0, 108 + 512},
		{"conflict", func(c *scsi.Command) { c.Conflict() }, 0, scsi.ReservationConflict, 0, 512, 108},
		{"task set full", func(c *scsi.Command) { c.Status = scsi.TaskSetFull; c.Residual = 512; c.Done(c) }, 0, scsi.TaskSetFull, 0, 512, 108},
		{"aborted", func(c *scsi.Command) { c.Fail(scsi.Aborted) }, 2, 0, 0, 512, 108},
		{"bad target", func(c *scsi.Command) { c.Fail(scsi.BadTarget) }, 3, 0, 0, 512, 108},
		{"reset", func(c *scsi.Command) { c.Fail(scsi.ResetOccurred) }, 4, 0, 0, 512, 108},
		{"busy", func(c *scsi.Command) { c.Fail(scsi.Busy) }, 5, 0, 0, 512, 108},
		{"transport", func(c *scsi.Command) { c.Fail(scsi.TransportFailure) }, 6, 0, 0, 512, 108},
		{"failure", func(c *scsi.Command) { c.Fail(scsi.Failure) }, 9, 0, 0, 512, 108},
		{"an outcome that does not exist", func(c *scsi.Command) { c.Fail(200) }, 9, 0, 0, 512, 108},
		{"residual beyond the data", func(c *scsi.Command) { c.Residual = 5000; c.Done(c) }, 0, 0, 0, 512, 108},
	} {
		c := r.submit(2, &scsiCommand{lun: unit0(0), cdb: rw10(0x28, 0, 1), in: 512, attr: 1})
		got := <-held.Commands
		if got.Attr != scsi.Ordered || len(got.CDB) != 32 || got.CDB[0] != 0x28 || len(got.DataOut) != 0 || got.DataLen() != 512 {
			t.Errorf("%s: the logical unit got attribute %d, %d bytes of CDB, %d of data", test.name, got.Attr, len(got.CDB), got.DataLen())
		}
		test.finish(got)
		a := r.answer(c, r.reap(2))
		if a.code != test.code || a.status != test.status || len(a.sense) != test.senseLen || a.residual != test.residual || a.written != test.written {
			t.Errorf("%s: response %d, status %v, %d bytes of sense, residual %d, used length %d; want %d, %v, %d, %d, %d", test.name,
				a.code, a.status, len(a.sense), a.residual, a.written, test.code, test.status, test.senseLen, test.residual, test.written)
		}
		for i, b := range r.fetch(c.response)[12+len(a.sense):] {
			if b != 0 {
				t.Errorf("%s: byte %d behind the sense data is %#x; want 0", test.name, i, b)
				break
			}
		}
	}
}

func TestSCSITwoDirectionsFail(t *testing.T) {
	r := newSCSIRig(t, 1)
	r.attach(0, scsitest.NewHeld(0))
	r.start()
	a := r.do(&scsiCommand{lun: unit0(0), cdb: []byte{0x53}, out: make([]byte, 512), in: 100})
	if a.code != scsiFailure || a.residual != 612 || a.written != 108 {
		t.Errorf("a command with data both ways = %v, residual %d, used length %d; want response %d, 612, 108",
			a, a.residual, a.written, scsiFailure)
	}
}

// A driver that breaks the rules stops the device, once, and a reset makes it
// work again. What was in flight still comes back.
func TestSCSIMalformedRequestsFailTheDevice(t *testing.T) {
	w, ro := true, false
	header := (&scsiCommand{lun: unit0(0)}).header()
	tmf := make([]byte, 24)
	an := make([]byte, 16)
	an[0] = scsiANQuery
	for _, test := range []struct {
		name  string
		queue int
		out   []byte
		in    int
		want  string
	}{
		{"short header", 2, header[:50], 108, "header is 51 bytes with a CDB of 32, the driver sent 50"},
		{"no header", 2, nil, 108, "sent 0"},
		{"little room", 2, header, 107, "response is 108 bytes with sense data of 96, the driver left room for 107"},
		{"no room", 2, header, 0, "left room for 0"},
		{"control without a type", 0, []byte{0, 0, 0}, 1, "3 bytes has no type"},
		{"unknown control type", 0, []byte{3, 0, 0, 0, 0, 0, 0, 0}, 1, "type 3"},
		{"short TMF", 0, tmf[:23], 1, "type 0 is 24 bytes with a response of 1, the driver sent 23 and left room for 1"},
		{"TMF without room", 0, tmf, 0, "left room for 0"},
		{"short AN", 0, an[:15], 5, "type 1 is 16 bytes with a response of 5, the driver sent 15"},
		{"AN with little room", 0, an, 4, "left room for 4"},
		{"readable event buffer", 1, []byte{1}, 16, "16 writable bytes behind 1 readable"},
		{"short event buffer", 1, nil, 15, "15 writable bytes"},
	} {
		r := newSCSIRig(t, 1)
		held := scsitest.NewHeld(1)
		r.attach(0, held)
		r.start()
		inFlight := r.submit(2, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
		c := <-held.Commands
		bufs := append(r.place(test.out, 1000, ro), r.place(make([]byte, test.in), 1000, w)...)
		r.add(test.queue, bufs...)
		if test.queue == 1 {
			r.dev.Changed(0, scsi.CapacityChanged)
		}
		if err := r.failure(); !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), "virtio-scsi: ") {
			t.Errorf("%s: the device failed with %q; want %q", test.name, err, test.want)
		}
		c.Finish(0)
		if a := r.answer(inFlight, r.reapFailed(2)); a.String() != "GOOD" {
			t.Errorf("%s: a command in flight came back as %v; want GOOD", test.name, a)
		}
		r.dev.Changed(0, scsi.CapacityChanged) // quiet from now on
		r.dev.Stop()
		r.lay(scsiTestFeatures)
		r.start()
		r.submit(2, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
		(<-held.Commands).Finish(0)
		r.reap(2)
		r.dev.Stop()
	}
}

// Workers that find broken rules at the same time report one failure.
func TestSCSIFailsOnce(t *testing.T) {
	r := newSCSIRig(t, 8)
	for queue := 2; queue < len(r.rings); queue++ {
		r.add(queue, r.place([]byte{1}, 1, false)...)
	}
	r.start()
	r.failure()
	r.dev.Stop() // waits for the workers; a second failure is an error of the rig
	if len(r.failed) != 0 {
		t.Errorf("the device failed again: %v", <-r.failed)
	}
}

// reapFailed is reap on a device that has failed.
func (r *scsiRig) reapFailed(queue int) virtiotest.Used {
	r.t.Helper()
	for {
		if u, ok := r.rings[queue].Reap(); ok {
			return u
		}
		if !r.rings[queue].EnableInterrupt() {
			<-r.irq[queue]
		}
	}
}

// A driver that gives one descriptor to the device twice gets two answers and
// cannot have more in flight than there are requests.
func TestSCSIDescriptorInFlightTwice(t *testing.T) {
	r := newSCSIRig(t, 1)
	held := scsitest.NewHeld(scsiRequestSize * 2)
	r.attach(0, held)
	r.start()
	c := r.submit(2, &scsiCommand{lun: unit0(0), cdb: []byte{0}})
	got := []*scsi.Command{<-held.Commands}
	ring := r.rings[2]
	avail := r.mem.Bytes(ring.Avail, uint64(6+2*scsiRequestSize))
	index := func() uint16 { return memory.Load16(avail[2:]) }
	put := func(n int) {
		for range n {
			memory.Store16(avail[4+2*(index()%scsiRequestSize):], c.head)
			memory.Store16(avail[2:], index()+1)
		}
		ring.Notify()
	}
	put(scsiRequestSize) // with the first, one more than can be in flight
	for len(got) < scsiRequestSize {
		got = append(got, <-held.Commands)
	}
	select {
	case <-held.Commands:
		t.Fatalf("more than %d commands are in flight", scsiRequestSize)
	default:
	}
	got[0].Finish(0) // makes room for the last
	last := <-held.Commands
	for _, c := range got[1:] {
		c.Finish(0)
	}
	last.Finish(0)
	quiesce(t, r.dev)
	if n := r.act.Queues[2].State().UsedIndex; n != scsiRequestSize+1 {
		t.Errorf("%d answers; want %d", n, scsiRequestSize+1)
	}
	r.dev.Resume()
}
