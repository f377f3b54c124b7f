"""Who gets the processor first."""

from __future__ import annotations

import os


def before_others() -> bool:
    """Run this process, and all that it starts, before everything else on the machine (SCHED_RR, sched(7)).

    For benches on a machine that is shared: what others do there is then not measured. Return whether it was allowed.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True
