"""What is monitored in a source brownout, on real QEMUs: each breach leads back to the source and says its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from emp.lab import daemons, scan
from emp.lab.topology import VOL
from emp.migration.watch import Check
from emp.model.migration import Migration, Outcome, WatchLine
from tests.lab.conftest import Pool
from tests.lab.pool import SLOW_BYTES_PER_S, Subject, mend, subject, until

SHORT_S = 2.0
NEVER_S = 600.0
WORKING_SET_BYTES = 32 << 20


@contextmanager
def frozen(evm: Subject, where: str, role: str) -> Iterator[None]:
    """SIGSTOP for the block; a QEMU may have been killed by then."""
    evm.pool.stop(where, role)
    yield
    mend(evm.pool)


@contextmanager
def without_exports(evm: Subject, node: str) -> Iterator[None]:
    """A node's volumes are not served for the length of the block: nor does the volume server start them again."""
    pool, opened = evm.pool, tuple(f"{volume.id}.{node}." for volume in evm.volumes)
    pool.stop("vol", "volumes")
    serving = [
        one.process
        for one in daemons.daemons(pool.files, pool.topology.place(VOL.name))
        if any(word.startswith(opened) for word in one.argv)
    ]
    assert serving
    scan.kill(serving)
    yield
    pool.cont("vol", "volumes")


@contextmanager
def nothing(_: Subject) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Breach:
    """What goes wrong in a brownout, and the policy under which the check notices."""

    happens: Callable[[Subject], Any]
    policy: dict[str, Any]
    says: str
    dirties: bool = False
    volumes: list[str] = field(default_factory=list)


BREACHES: dict[Check, Breach] = {
    Check.CONVERGENCE: Breach(
        nothing,
        {"max_blackout_ms": 5, "no_convergence_passes": 2, "max_bandwidth_bytes_per_s": 12_000_000},
        "2 passes in a row dirtied memory about as fast as it was sent",
        dirties=True,
    ),
    Check.STREAM: Breach(
        lambda evm: frozen(evm, "n2", f"qemu:{evm.name}"),
        {"stall_s": SHORT_S, "target_qemu_s": NEVER_S},
        "nothing was sent for",
    ),
    Check.QEMU: Breach(
        lambda evm: frozen(evm, "n2", f"qemu:{evm.name}"),
        {"stall_s": NEVER_S, "target_qemu_s": SHORT_S},
        "QEMU on the target has not answered for",
    ),
    Check.AGENT: Breach(lambda evm: frozen(evm, "n2", "agent"), {}, "connection to the target's agent"),
    Check.VOLUMES: Breach(
        lambda evm: without_exports(evm, "n2"),
        {"target_volume_s": SHORT_S},
        "the target has not read vol-",
        volumes=["io2:16MiB"],
    ),
    Check.STORAGE: Breach(
        lambda evm: without_exports(evm, "n1"), {}, "a volume failed on the source", volumes=["io2:16MiB"]
    ),
    Check.MEMORY: Breach(nothing, {"target_free_memory_bytes": 1 << 50}, "less than 1024 TiB"),
}


def failed(ended: Migration) -> list[WatchLine]:
    return [line for line in ended.report.watch if not line.ok]


@pytest.mark.parametrize("check", BREACHES)
def test_a_breach_leads_back_to_the_source_and_the_next_migration_succeeds(pool: Pool, check: Check) -> None:
    breach = BREACHES[check]
    with subject(pool, node="n1", volumes=breach.volumes) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        if breach.dirties:
            evm.guest().ask(f"memory {WORKING_SET_BYTES} 200000000")
        for volume in evm.volumes:
            evm.start_journal(volume, 50)
        moving = evm.begin(
            "n2", **{"max_bandwidth_bytes_per_s": SLOW_BYTES_PER_S, "deadline_s": NEVER_S} | breach.policy
        )
        until(lambda: evm.client.migrations.get(moving.id).progress.sent_bytes, "memory is sent")
        with breach.happens(evm):
            until(lambda: evm.client.migrations.get(moving.id).cause, "it goes back")
        ended = evm.end_of(moving)
        assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
        assert breach.says in (ended.cause or "")
        (line,) = failed(ended)
        assert (line.check, bool(line.worst)) == (check, True)
        assert ended.hint
        evm.check_only_on("n1")
        assert (evm.boot_id, evm.qemus()) == (boot_id, {"n1": pid})
        shown = pool.emp("migration", "show", moving.id).stdout
        assert f"{check}" in shown and "NO" in shown
        if breach.dirties:
            evm.guest().ask(f"memory {WORKING_SET_BYTES} 0")
        evm.migrate("n2")
        evm.check_only_on("n2")
        assert evm.boot_id == boot_id


def test_a_migration_that_goes_well_has_every_line_and_all_of_them_ok(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        moving = evm.begin("n2", max_bandwidth_bytes_per_s=30_000_000)
        ended = evm.end_of(moving)
        assert ended.outcome is Outcome.COMPLETED, ended.cause
        assert [line.check for line in ended.report.watch] == list(Check)
        assert failed(ended) == []
        measured = {line.check for line in ended.report.watch if line.worst}
        assert {Check.DEADLINE, Check.STREAM, Check.QEMU, Check.VOLUMES, Check.MEMORY} <= measured
        assert "monitored" in pool.emp("migration", "show", moving.id).stdout
