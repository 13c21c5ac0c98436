package pr

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"vmm/scsi"
)

// View is a LUN's reservation and registrations at one instant.
type View struct {
	Generation uint32 // PRgeneration
	// Registrations has every registered nexus. Without FullStatus only the
	// keys are known.
	Registrations []Registration
	FullStatus    bool // the target answers READ FULL STATUS
	Held          Reservation
	Capabilities  Capabilities
	Supported     bool // REPORT CAPABILITIES was answered
}

// NotGood is a PERSISTENT RESERVE IN command that the target answered with
// something other than GOOD.
type NotGood struct {
	Action InAction
	Answer Answer
}

func (e *NotGood) Error() string { return fmt.Sprintf("%v: %v", e.Action, e.Answer) }

// Unsupported says that the target does not know the command: its logical
// unit has no persistent reservations, or lacks this service action.
func (e *NotGood) Unsupported() bool {
	return e.Answer.Status == scsi.CheckCondition &&
		(e.Answer.Sense == scsi.InvalidOpcode || e.Answer.Sense == scsi.InvalidFieldInCDB)
}

// Unsupported says that err is a target's word that it does not know a
// PERSISTENT RESERVE IN command.
func Unsupported(err error) bool {
	var n *NotGood
	return errors.As(err, &n) && n.Unsupported()
}

// View reads what there is to read, and changes nothing. An error for which
// Unsupported holds says that the LUN has no persistent reservations.
func (p *Port) View(ctx context.Context) (View, error) {
	var v View
	caps, err := p.Capabilities(ctx)
	switch {
	case err == nil:
		v.Capabilities, v.Supported = caps, true
	case !Unsupported(err):
		return v, err
	}
	f, err := p.FullStatus(ctx)
	if err == nil {
		v.FullStatus, v.Generation, v.Registrations = true, f.Generation, f.Registrations
		v.Held.Generation = f.Generation
		for _, r := range f.Registrations {
			if r.Holder {
				v.Held.Type, v.Held.Scope = r.Type, r.Scope
				if r.Type.Single() {
					v.Held.Key = r.Key
				}
			}
		}
		return v, nil
	}
	if !Unsupported(err) {
		return v, err
	}
	// Two commands, between which others may act: what they say belongs
	// together if no registration has changed meanwhile.
	for range maxTries {
		if v.Held, err = p.Reservation(ctx); err != nil {
			return v, err
		}
		keys, err := p.Keys(ctx)
		if err != nil {
			return v, err
		}
		v.Generation, v.Registrations = keys.Generation, nil
		for _, k := range keys.Keys {
			v.Registrations = append(v.Registrations, Registration{Key: k})
		}
		if keys.Generation == v.Held.Generation {
			return v, nil
		}
	}
	return v, fmt.Errorf("READ RESERVATION, then READ KEYS: the registrations changed between the two %d times", maxTries)
}

// With is the index of the one registration that is this nexus's: self if it
// is known, else the only one with key k. It is -1 where there is none, or
// where that cannot be told.
func (v *View) With(self Nexus, k Key) int {
	if self.Initiator != "" && v.FullStatus {
		return slices.IndexFunc(v.Registrations, func(r Registration) bool { return r.Nexus.same(self) })
	}
	at := -1
	for i, r := range v.Registrations {
		if k != 0 && r.Key == k {
			if at >= 0 {
				return -1
			}
			at = i
		}
	}
	return at
}

// View is everything there is to read about the target.
func (t *Target) View() View {
	s := t.Status()
	return View{
		Generation: s.Generation, Registrations: s.Registrations, FullStatus: true,
		Held: t.Reservation(), Capabilities: t.Capabilities(), Supported: true,
	}
}

// Registered says whether this nexus is registered, with REGISTER 0 to 0: it
// does nothing, and a registered nexus gets RESERVATION CONFLICT for it (SPC-5
// 5.14.7.2).
func (p *Port) Registered(ctx context.Context, v View) (bool, error) {
	result, err := p.reregister(ctx, v, 0)
	if result == Conflicted {
		return true, nil
	}
	return false, err
}

// reregister makes key k of this nexus key k: GOOD for its own key alone, or
// for 0 if it has none.
func (p *Port) reregister(ctx context.Context, v View, k Key) (Result, error) {
	return p.out(ctx, nil, Cmd{Write: true, Out: Register, Key: k, ServiceKey: k, APTPL: v.Capabilities.PersistActive})
}

// Unregister removes key k of this nexus. Done is false if it is not this
// nexus's key.
func (p *Port) Unregister(ctx context.Context, v View, k Key) (done bool, err error) {
	result, err := p.out(ctx, nil, Cmd{Write: true, Out: Register, Key: k, APTPL: v.Capabilities.PersistActive})
	if result == Conflicted {
		return false, nil
	}
	return err == nil, err
}

// maxGuesses bounds the keys that OwnKey tries.
const maxGuesses = 128

// OwnKey finds the key that this nexus is registered with, 0 if it is not,
// among the registrations of v, without changing anything for anybody: REGISTER
// k to k, GOOD for none but the nexus's own key, leaves the key as it was and
// counts PRgeneration up. It is sent only if the nexus is Registered.
//
// Nobody else may send through this nexus meanwhile.
func (p *Port) OwnKey(ctx context.Context, v View) (Key, error) {
	if len(v.Registrations) == 0 {
		return 0, nil
	}
	if registered, err := p.Registered(ctx, v); err != nil || !registered {
		return 0, err
	}
	var tried []Key
	for _, r := range v.Registrations {
		if slices.Contains(tried, r.Key) {
			continue
		}
		if len(tried) == maxGuesses {
			return 0, fmt.Errorf("this host's nexus is registered, with none of the first %d keys", maxGuesses)
		}
		tried = append(tried, r.Key)
		switch result, err := p.reregister(ctx, v, r.Key); result {
		case Done:
			return r.Key, nil
		case Failed:
			return 0, err
		}
	}
	return 0, errors.New("this host's nexus is registered, with none of the keys that READ KEYS shows")
}
