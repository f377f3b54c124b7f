"""A running EVM goes to another node and back: what its clients, its guest and its volume see of it, and the report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from emp.lab.demo import volume_file
from emp.lab.journal_check import check_journal
from emp.lab.probing import Probing, window
from emp.model.errors import Conflict
from emp.model.evm import EvmState
from emp.model.migration import Migration, Outcome, Report, Stage
from tests.lab.conftest import Pool
from tests.lab.pool import MEMORY_BYTES, Subject, subject, until

REWRITTEN_BYTES = 16 << 20
REWRITE_BYTES_PER_S = 4_000_000
JOURNAL_HZ = 100
PROBE_HZ = 200
PAGE_BYTES = 4096
NOT_HERE = {"abort_pause_ms", "addresses"}
"""of an abort, and of a cloud's network"""
NOISE_MS = 20.0
"""by how much two clocks of this machine may read late when it is busy"""


def check_report(migration: Migration, wall_s: float) -> None:
    """Check that the figures are there and can be true together."""
    report = migration.report
    missing = [name for name, value in report if value is None and name not in NOT_HERE]
    assert missing == [], "figures that are missing"
    assert report.abort_pause_ms is None
    brownout_s, blackout_ms, target_s = (
        report.stages.source_brownout_s or 0.0,
        report.stages.blackout_ms or 0.0,
        report.stages.target_brownout_s or 0.0,
    )
    assert brownout_s > 0 and target_s > 0
    assert brownout_s + blackout_ms / 1000 + target_s <= wall_s + NOISE_MS / 1000
    assert 0 < (report.vcpu_pause_ms or 0.0) <= blackout_ms
    assert 0 < (report.commit_ms or 0.0) < blackout_ms
    assert 0 <= (report.qemu_downtime_ms or 0.0) <= blackout_ms + NOISE_MS
    assert (report.qemu_total_ms or 0.0) <= brownout_s * 1000 + blackout_ms + NOISE_MS
    assert (report.clock_error_ms or 0.0) > 0
    assert MEMORY_BYTES <= (report.memory_bytes or 0) < 2 * MEMORY_BYTES
    assert (report.sent_bytes or 0) > REWRITTEN_BYTES
    assert (report.passes or 0) >= 1
    assert (report.bandwidth_bytes_per_s or 0.0) > 0


def check_stream(report: dict[str, Any], target: str, boot_id: str) -> None:
    """Check what the client's streams to one address saw: one guest, one boot, one TCP connection."""
    udp, tcp = report["targets"][target]["udp"]["total"], report["targets"][target]["tcp"]
    for total in (udp, tcp["total"]):
        assert total["boot_ids"].keys() == {boot_id}
        assert total["counters_monotone"]
        assert (total["answered_twice"], total["mismatched"]) == (0, 0)
    assert (tcp["connected"], tcp["resets"], tcp["reconnects"]) == (True, 0, 0)
    assert tcp["total"]["lost"] == 0


def show(capsys: pytest.CaptureFixture[str], migration: Migration, gap_ms: float) -> None:
    report: Report = migration.report
    with capsys.disabled():
        print(
            f"\n  {migration.source} to {migration.target}: brownout {report.stages.source_brownout_s:.2f} s,"
            f" vCPU pause {report.vcpu_pause_ms:.0f} ms, blackout {report.stages.blackout_ms:.0f} ms,"
            f" network gap {gap_ms:.0f} ms, target brownout {report.stages.target_brownout_s:.2f} s",
            end="",
        )


def test_there_and_back_under_traffic(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    with subject(pool, node="n1", pods=["shop"], volumes=["io2:32MiB"]) as evm:
        (volume,) = evm.volumes
        evm.guest().ask(f"memory {REWRITTEN_BYTES} {REWRITE_BYTES_PER_S}")
        evm.start_journal(volume, JOURNAL_HZ)
        boots = {"evm": evm.boot_id, "pod": str(evm.pod().ask("status")["boot_id"])}
        addresses = {"evm": evm.guest().address, "pod": evm.pod().address}
        qemus = [evm.qemus()]
        moves: list[Migration] = []
        assert evm.traces("n1") and not evm.traces("n2")
        with Probing(pool.files, addresses, rate_hz=PROBE_HZ) as probing:
            for target in ("n2", "n1"):
                probing.mark(target)
                pool.emp("migrate", evm.name, "--to", target)
                moves.append(evm.client.migrations.list(evm=evm.name).items[0])
                qemus.append(evm.qemus())
                evm.check_only_on(target)
            seen = probing.stop()
        for name, boot_id in boots.items():
            check_stream(seen, name, boot_id)
        verified = evm.guest().ask("verify")
        assert (verified["mismatches"], verified["pages"] * PAGE_BYTES) == (0, REWRITTEN_BYTES)
        (journal,) = evm.guest().ask(f"journal stop {volume.serial}")
        found = check_journal(volume_file(pool.files, volume))
        assert found.ok, found.errors
        assert (found.missing(journal["acked_seq"]), journal["errors"]) == (0, 0)
        assert found.boot_ids == (boots["evm"],)
    assert [*map(list, qemus)] == [["n1"], ["n2"], ["n1"]]
    assert len({pid for running in qemus for pid in running.values()}) == 3
    for moved in moves:
        gap_ms = window(seen, "evm", moved.target)["gap_ms"]
        assert moved.ended_at is not None
        check_report(moved, moved.ended_at - moved.created_at)
        assert gap_ms + 1000 / PROBE_HZ >= (moved.report.vcpu_pause_ms or 0.0) - NOISE_MS
        show(capsys, moved, gap_ms)


def check_back_on(evm: Subject, source: str, boot_id: str, pid: int) -> None:
    """Check that an aborted migration has changed nothing for the EVM."""
    evm.check_only_on(source)
    assert (evm.boot_id, evm.qemus()) == (boot_id, {source: pid})


def test_an_aborted_brownout_leaves_the_evm_running_and_free_to_migrate(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        with Probing(pool.files, {"evm": evm.guest().address}, rate_hz=PROBE_HZ) as probing:
            slow = evm.begin_slow("n2")
            assert evm.record.state is EvmState.MIGRATING
            pool.emp("migration", "abort", slow.id)
            ended = evm.end_of(slow)
            assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
            assert ended.cause
            check_back_on(evm, "n1", boot_id, pid)

            overdue = evm.end_of(evm.begin("n2", max_bandwidth_bytes_per_s=4_000_000, deadline_s=0.5))
            assert overdue.outcome is Outcome.ABORTED
            assert "deadline" in (overdue.cause or "")
            check_back_on(evm, "n1", boot_id, pid)

            evm.migrate("n2")
            seen = probing.stop()
        evm.check_only_on("n2")
        check_stream(seen, "evm", boot_id)
        history = evm.client.migrations.list(evm=evm.name).items
        assert [past.outcome for past in history] == [Outcome.COMPLETED, Outcome.ABORTED, Outcome.ABORTED]


def test_a_committed_migration_only_goes_forward(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id = evm.boot_id
        moving = evm.begin_slow("n2", bytes_per_s=40_000_000)
        pool.stop("vol", "volumes")  # so that the source's volumes cannot be detached: it stays committed, and open
        until(lambda: evm.client.migrations.get(moving.id).stage is Stage.TARGET_BROWNOUT, "the commit")
        with pytest.raises(Conflict, match="it only goes forward"):
            evm.client.migrations.abort(moving.id)
        refused = pool.emp("migration", "abort", moving.id, check=False)
        assert (refused.returncode, "it only goes forward" in refused.stderr) == (4, True)
        pool.cont("vol", "volumes")
        assert evm.end_of(moving).outcome is Outcome.COMPLETED
        evm.check_only_on("n2")
        assert evm.boot_id == boot_id


def test_two_vcpus_and_two_nics(pool: Pool) -> None:
    with subject(pool, node="n1", vcpus=2, nics=2, pods=["shop"]) as evm:
        boot_id = evm.boot_id
        addresses = {f"nic{n}": evm.guest(n).address for n in range(2)} | {"pod": evm.pod().address}
        assert len(set(addresses.values())) == 3
        with Probing(pool.files, addresses, rate_hz=PROBE_HZ) as probing:
            evm.migrate("n2")
            seen = probing.stop()
        evm.check_only_on("n2")
        for name in ("nic0", "nic1"):
            check_stream(seen, name, boot_id)
        for target in (evm.guest(0), evm.guest(1), evm.pod()):
            target.wait_first_packet()


def test_without_a_target_placement_picks_a_node_and_says_why(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        pool.emp("node", "cordon", "n2")
        try:
            planned = json.loads(pool.emp("migrate", evm.name, "--dry-run", "--json").stdout)
            assert evm.client.migrations.list(evm=evm.name).items == ()
            moved = evm.migrate()
        finally:
            pool.emp("node", "uncordon", "n2")
        assert (planned["target"], moved.target) == ("n3", "n3")
        assert "not n2: cordoned" in (moved.placement or "")
        evm.check_only_on("n3")
