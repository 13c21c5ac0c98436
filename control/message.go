package control

import (
	"vmm/machine"
	vmmv1 "vmm/proto/vmm/v1"
	"vmm/scsi/pr"
)

func lunMessage(l *machine.LUNInfo) *vmmv1.Lun {
	kind := "disk"
	if l.Passthrough {
		kind = "passthrough"
	}
	return &vmmv1.Lun{
		Id: l.ID, Path: l.Path, Target: uint32(l.Target), Kind: kind, Identity: l.Identity, Readonly: l.ReadOnly,
	}
}

// timeFormat is RFC 3339 with milliseconds.
const timeFormat = "2006-01-02T15:04:05.000Z07:00"

func eventMessage(e machine.Event) *vmmv1.Event {
	m := &vmmv1.Event{Time: e.Time.Format(timeFormat), Kind: string(e.Kind), Text: e.Text, Missed: uint32(e.Missed)}
	if e.Kind == machine.EventState {
		m.State = e.State.String()
	}
	return m
}

// keyText is a reservation key; empty for none.
func keyText(k pr.Key) string {
	if k == 0 {
		return ""
	}
	return k.String()
}

// ReservationsMessage is what v shows. own is the index of this host's
// registration, -1 if it has none or, unknown, if nobody can tell.
func ReservationsMessage(v pr.View, own int, unknown bool) *vmmv1.Reservations {
	m := &vmmv1.Reservations{
		Supported:  true,
		Generation: v.Generation,
		Type:       uint32(v.Held.Type),
		HolderKey:  keyText(v.Held.Key),
		Aptpl:      v.Capabilities.PersistActive,
		FullStatus: v.FullStatus,
		OwnUnknown: unknown,
	}
	if v.Held.Type != pr.None {
		m.TypeName = v.Held.Type.String()
	}
	for i, r := range v.Registrations {
		one := &vmmv1.Registrant{Key: r.Key.String(), Own: i == own, Holder: r.Holder, AllTargetPorts: r.AllTargetPorts}
		if v.FullStatus {
			one.Initiator, one.TargetPort = r.Nexus.Initiator.String(), uint32(r.Nexus.TargetPort)
		} else {
			// Without READ FULL STATUS a key shows its holder if it is the only one.
			one.Holder = v.Held.Type.AllRegistrants() || v.Held.Type.Single() && v.Held.Key == r.Key && v.With(pr.Nexus{}, r.Key) == i
		}
		m.Registrants = append(m.Registrants, one)
	}
	return m
}

func guestMessage(t pr.Tracked) *vmmv1.GuestReservation {
	return &vmmv1.GuestReservation{
		Key: keyText(t.Key), Type: uint32(t.Type), Aptpl: t.Persist, Spc2: t.SPC2, Doubt: t.Doubt,
	}
}
