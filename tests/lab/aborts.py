"""Lets a migration abort in each stage before the commit, in a lab with its fault points on."""

from __future__ import annotations

import time

from emp import faults
from emp.lab.probing import Probing
from emp.model.migration import Migration
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, until

GRACE_S = 5.0
"""a reply that a busy machine has not brought before is lost"""
STAGES = ("source brownout", "pre-switchover", "device transfer", "completed")
"""the guest stands in the last three: before QEMU sends its devices, meanwhile, and when the target has them all"""


def ends(evm: Subject) -> tuple[str, str]:
    """Return the source and the target of its next migration in a pool of two."""
    source = evm.record.owner
    return ("n1", "n2") if source == "n1" else ("n2", "n1")


def wait_hit(pool: Pool, node: str, point: str, since_s: float) -> None:
    """Return once a node's agent is at a point, or has been there since ``since_s`` (CLOCK_MONOTONIC)."""
    hits = pool.files.faults(node)
    until(lambda: any(hit.point == point and hit.at_s >= since_s for hit in faults.hits(hits)), f"{node} is at {point}")


def aborted_in(stage: str, pool: Pool, evm: Subject) -> Migration:
    """Return a migration that was aborted in one of ``STAGES``, once it is closed.

    ``device transfer`` leaves the target's QEMU frozen: it has hung, so nobody waits for it.
    """
    source, target = ends(evm)
    points = pool.files.faults(source)
    match stage:
        case "source brownout":
            moving = evm.begin_slow(target)
            evm.client.migrations.abort(moving.id)
        case "pre-switchover":
            faults.arm(points, "source.continue-stream.before", "raise:EIO")
            moving = evm.begin(target)
        case "device transfer":
            since_s = time.monotonic()
            faults.arm(points, "source.continue-stream.before", "delay:200")
            moving = evm.begin(target, blackout_deadline_s=0.5)
            wait_hit(pool, source, "source.continue-stream.before", since_s)
            pool.stop(target, f"qemu:{evm.name}")
        case "completed":
            faults.arm(points, "journal.given.before_fsync", "raise:EIO")
            moving = evm.begin(target)
    return evm.end_of(moving)


def check_streams(probing: Probing) -> None:
    """End the probing: no UDP packet was lost or came twice, and every TCP connection is the same one."""
    for target, seen in probing.stop()["targets"].items():
        udp, tcp = seen["udp"]["total"], seen["tcp"]
        assert (udp["lost"], udp["duplicated"], udp["answered_twice"]) == (0, 0, 0), (target, udp)
        assert (tcp["resets"], tcp["reconnects"], tcp["total"]["lost"]) == (0, 0, 0), (target, tcp)
        assert udp["received"] > 0, target
