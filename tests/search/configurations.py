"""The worlds that are searched: small and many rather than one that holds everything.

``fine`` ones look at one migration event by event, with the agent killed between any two actions. The others take what
follows from an event as one step, and are wide instead: two and three migrations in a row, there, back and onward, with
every message and every order of the earlier ones still deliverable.
"""

from __future__ import annotations

from tests.search.explore import Configuration
from tests.search.world import Faults

ASSUMED = "what fsync confirmed survives, or the journal is known to be lost: a design without that has no way out"

HOLD = (
    Configuration("one, fine: an agent killed", Faults(kill=1), fine=True),
    Configuration("one, fine: a QEMU dies, the stream breaks", Faults(die=1, stream=1), fine=True),
    Configuration("one, fine: a QEMU dies, a write fails", Faults(die=1, write=1), fine=True),
    Configuration("one, fine: a write fails, an abort", Faults(write=1, abort=1), fine=True),
    Configuration("one, fine: the stream breaks, an abort", Faults(stream=1, abort=1), fine=True),
    Configuration("one, fine: cont refused, cont unanswered", Faults(refuse=1, reply=1, die=1), fine=True),
    Configuration("one, fine: the link lost, the guest shuts down", Faults(link=1, halt=1, make=1), fine=True),
    Configuration("one: two agents killed", Faults(kill=2)),
    Configuration("one: an agent killed, the stream breaks, an abort", Faults(kill=1, stream=1, abort=1)),
    Configuration("one: an agent killed, two writes fail", Faults(kill=1, write=2)),
    Configuration("one: an agent killed, cont refused twice and unanswered", Faults(kill=1, refuse=2, reply=1)),
    Configuration("one: two QEMUs die, two writes fail", Faults(die=2, write=2)),
    Configuration("one: storage errors, an agent killed", Faults(io=2, kill=1)),
    Configuration("one: the guest shuts down, an agent killed", Faults(halt=1, kill=1)),
    Configuration("one: the controller killed, orders without answer", Faults(controller=1, order=1, silent=1)),
    Configuration("one: the controller and an agent killed", Faults(controller=1, kill=1)),
    Configuration("one: the nodes cut off, an agent killed", Faults(cut=1, kill=1)),
    Configuration("one: the nodes cut off, a QEMU dies", Faults(cut=1, die=1)),
    Configuration("one: the nodes cut off, the controller killed", Faults(cut=1, controller=1, silent=1)),
    Configuration("one: an agent gone for good, and its guard", Faults(gone=1)),
    Configuration("one: a journal lost, in quarantine", Faults(journal=1, kill=1)),
    Configuration("two: a QEMU dies", Faults(die=1), migrations=2),
    Configuration("two: the stream breaks, an abort", Faults(stream=1, abort=1), migrations=2),
    Configuration("two: orders lost, nodes silent", Faults(order=1, silent=1), migrations=2),
    Configuration("two: a journal lost, in quarantine", Faults(journal=1), migrations=2),
    Configuration("three: an agent killed", Faults(kill=1), migrations=3),
    Configuration("three: a QEMU dies", Faults(die=1), migrations=3),
    Configuration("three: a write fails", Faults(write=1), migrations=3),
    Configuration("cold restart during one, fence per node", Faults(cold=1, die=1)),
    Configuration("cold restart during one, fence by epoch", Faults(cold=1, die=1), fence="epoch"),
    Configuration("two: a node back from its first day", Faults(image=1), migrations=2),
    Configuration("cold restart, a node back from its first day", Faults(cold=1, image=1)),
)
LONG = (
    Configuration("cold restart and two migrations, fence per node", Faults(cold=1), migrations=2),
    Configuration("cold restart and two migrations, fence by epoch", Faults(cold=1), migrations=2, fence="epoch"),
)
"""for an evening: ``python -m tests.search.run LONG``"""
LIMITS = (
    Configuration("limit: a host reboots without its last record", Faults(reboot=1), expected=ASSUMED),
    Configuration("limit: GIVEN lost beside a living QEMU", Faults(rollback=1), expected=ASSUMED),
)
