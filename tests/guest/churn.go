package guest

import (
	"context"
	"fmt"
)

// Churned is how often the guest's churn has written the disk and the memory.
type Churned struct{ Disk, Memory int }

// Churn starts churn in the guest with more arguments, and waits until it
// works.
func (g *Guest) Churn(ctx context.Context, args string) error {
	_, err := g.Must(ctx, "rm -f /tmp/count; churn -count /tmp/count "+args+" >/tmp/churn 2>&1 & echo $! >/tmp/churn.pid; while ! test -s /tmp/count -o -s /tmp/churn; do sleep 0.1; done")
	if err == nil {
		_, err = g.Churned(ctx)
	}
	return err
}

// Churned is what churn has done so far; an error if not all of what it read was
// as it must be.
func (g *Guest) Churned(ctx context.Context) (Churned, error) {
	var n Churned
	out, err := g.Must(ctx, "cat /tmp/churn /tmp/count")
	if err != nil {
		return n, err
	}
	if _, err := fmt.Sscan(out, &n.Disk, &n.Memory); err != nil {
		return n, fmt.Errorf("guest: churn: %s", out)
	}
	return n, nil
}

// ChurnsOn waits until churn has written both again since.
func (g *Guest) ChurnsOn(ctx context.Context, since Churned) error {
	_, err := g.Must(ctx, fmt.Sprintf("while read disk memory </tmp/count; ! test -s /tmp/churn && ! test $disk -gt %d -a $memory -gt %d; do sleep 0.1; done", since.Disk, since.Memory))
	if err == nil {
		_, err = g.Churned(ctx)
	}
	return err
}

// StopChurn ends churn, which may have ended by itself; Churned says whether.
func (g *Guest) StopChurn(ctx context.Context) error {
	_, _, err := g.Run(ctx, "kill $(cat /tmp/churn.pid)")
	return err
}
