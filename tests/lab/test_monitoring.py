"""What is monitored in a source brownout, on real QEMUs: each breach leads back to the source and says its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from emp.lab import daemons, scan
from emp.lab.topology import VOL
from emp.migration.watch import Check
from emp.model.migration import Migration, Outcome, WatchLine
from tests.lab.aborts import ends
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
def nothing(_: Subject, __: str) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Breach:
    """What goes wrong on one of the nodes in a brownout, and the policy under which the check notices."""

    happens: Callable[[Subject, str], Any]
    policy: dict[str, Any]
    says: str
    dirties: bool = False
    writes: bool = False
    on_source: bool = False


BREACHES: dict[Check, Breach] = {
    Check.CONVERGENCE: Breach(
        nothing,
        {"max_blackout_ms": 5, "no_convergence_passes": 2, "max_bandwidth_bytes_per_s": 12_000_000},
        "2 passes in a row dirtied memory about as fast as it was sent",
        dirties=True,
    ),
    Check.STREAM: Breach(
        lambda evm, node: frozen(evm, node, f"qemu:{evm.name}"),
        {"stall_s": SHORT_S, "target_qemu_s": NEVER_S},
        "nothing was sent for",
    ),
    Check.QEMU: Breach(
        lambda evm, node: frozen(evm, node, f"qemu:{evm.name}"),
        {"stall_s": NEVER_S, "target_qemu_s": SHORT_S},
        "QEMU on the target has not answered for",
    ),
    Check.AGENT: Breach(lambda evm, node: frozen(evm, node, "agent"), {}, "connection to the target's agent"),
    Check.VOLUMES: Breach(without_exports, {"target_volume_s": SHORT_S}, "the target has not read vol-", writes=True),
    Check.STORAGE: Breach(without_exports, {}, "a volume failed on the source", writes=True, on_source=True),
    Check.MEMORY: Breach(nothing, {"target_free_memory_bytes": 1 << 50}, "less than 1024 TiB"),
}


def failed(ended: Migration) -> list[WatchLine]:
    return [line for line in ended.report.watch if not line.ok]


@pytest.fixture(scope="module")
def evm(pool: Pool) -> Iterator[Subject]:
    """The EVM of all tests; it is on n1 or n2."""
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as made:
        yield made


@pytest.mark.parametrize("check", BREACHES)
def test_a_breach_leads_back_to_the_source_and_the_next_migration_succeeds(
    pool: Pool, evm: Subject, check: Check
) -> None:
    breach, (volume,), (source, target) = BREACHES[check], evm.volumes, ends(evm)
    boot_id, pid = evm.boot_id, evm.qemus()[source]
    if breach.dirties:
        evm.guest().ask(f"memory {WORKING_SET_BYTES} 200000000")
    if breach.writes:
        evm.start_journal(volume, 50)
    moving = evm.begin(target, **{"max_bandwidth_bytes_per_s": SLOW_BYTES_PER_S, "deadline_s": NEVER_S} | breach.policy)
    until(lambda: evm.client.migrations.get(moving.id).progress.sent_bytes, "memory is sent")
    with breach.happens(evm, source if breach.on_source else target):
        until(lambda: evm.client.migrations.get(moving.id).cause, "it goes back")
    ended = evm.end_of(moving)
    assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
    assert breach.says in (ended.cause or "")
    (line,) = failed(ended)
    assert (line.check, bool(line.worst)) == (check, True)
    assert ended.hint
    evm.check_only_on(source)
    assert (evm.boot_id, evm.qemus()) == (boot_id, {source: pid})
    shown = pool.emp("migration", "show", moving.id).stdout
    assert f"{check}" in shown and "NO" in shown
    if breach.dirties:
        evm.guest().ask(f"memory {WORKING_SET_BYTES} 0")
    evm.migrate(target)
    evm.check_only_on(target)
    assert evm.boot_id == boot_id
    if breach.writes:
        evm.guest().ask(f"journal stop {volume.serial}")


def test_a_migration_that_goes_well_has_every_line_and_all_of_them_ok(pool: Pool, evm: Subject) -> None:
    moving = evm.begin(ends(evm)[1], max_bandwidth_bytes_per_s=30_000_000)
    ended = evm.end_of(moving)
    assert ended.outcome is Outcome.COMPLETED, ended.cause
    assert [line.check for line in ended.report.watch] == list(Check)
    assert failed(ended) == []
    measured = {line.check for line in ended.report.watch if line.worst}
    assert {Check.DEADLINE, Check.STREAM, Check.QEMU, Check.VOLUMES, Check.MEMORY} <= measured
    assert "monitored" in pool.emp("migration", "show", moving.id).stdout
