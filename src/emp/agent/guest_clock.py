"""Sets a guest's wall clock right once it runs on this node: the clock stood for as long as the guest did.

Work beside: it decides nothing, nothing waits for it, and what fails is only told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from emp.hypervisor.base import Machine, MachineGone, NoGuestAgent
from emp.model.clock import GuestClock
from emp.model.errors import EmpError

log = logging.getLogger(__name__)

AGAIN_S = 1.0
PATIENCE_S = 180.0
"""for an agent to answer, and for the clock to be right: a guest that boots has none for a while"""


async def set_right(
    machine: Machine,
    may_go_on: Callable[[], bool],
    told: Callable[[GuestClock], None],
    *,
    patience_s: float = PATIENCE_S,
) -> None:
    """Until the guest's clock is right, or it is not to be set now; ``told`` gets what was found, each time.

    ``may_go_on``: whether the guest runs here, and nothing else is being done to it. It is asked before each try.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + patience_s
    first: GuestClock | None = None
    while may_go_on():
        is_late = loop.time() >= deadline_s
        try:
            clock = await machine.set_clock()
        except MachineGone:
            return
        except NoGuestAgent as error:
            clock = GuestClock(trouble=error.message, at_s=time.time())
        except EmpError as error:
            clock, is_late = GuestClock(trouble=error.message, at_s=time.time()), True
        else:
            first = first or clock
            clock = clock.model_copy(update={"found_ms": first.found_ms, "is_set": first.is_set or clock.is_set})
        is_over = clock.is_right or clock.is_ahead or is_late
        told(clock)
        if is_over or clock.now_ms is not None:
            log.info("clock of %s: %s", machine.name, "; ".join(clock.in_words))
        if is_over:
            return
        await asyncio.sleep(AGAIN_S)
