"""A controller that dies during a migration: the two agents finish it, and what people had on their screens goes on."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from emp.client.client import Client
from emp.lab.probing import Probing
from emp.model.api import WatchEvent
from emp.model.migration import Migration, Outcome, Stage
from tests.lab.conftest import EMP, Pool
from tests.lab.pool import WAIT_S, Subject, subject, until
from tests.lab.test_migration import check_stream

BROWNOUT_BYTES_PER_S = 20_000_000
"""some four seconds of source brownout: the controller is away for a part of it"""


@contextmanager
def watching(pool: Pool, evm: Subject, since: int) -> Iterator[queue.Queue[WatchEvent]]:
    """Watch the EVM's record in a thread of its own for the length of the block."""
    seen: queue.Queue[WatchEvent] = queue.Queue()
    with contextlib.closing(Client(pool.context)) as client:

        def watch() -> None:
            for event in client.watch(f"/evms/{evm.name}", since=since, patience_s=WAIT_S):
                seen.put(event)
                if event.value and event.value["owner"] == "n2" and event.value["migration"] is None:
                    return

        thread = threading.Thread(target=watch, name="watch")
        thread.start()
        yield seen
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the watch has not seen the end"


def test_a_migration_goes_on_over_a_restart_of_the_controller(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id = evm.boot_id
        earlier = evm.client.migrations.list().items
        since = evm.client.evms.list().revision
        addresses = {"evm": evm.guest().address}
        with Probing(pool.files, addresses, rate_hz=100) as probing, watching(pool, evm, since) as seen:
            moving = evm.begin_slow("n2", bytes_per_s=BROWNOUT_BYTES_PER_S)
            follower = subprocess.Popen(
                [*EMP, "--context", pool.name, "migration", "watch", moving.id],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            pool.kill("ctl", "controller")
            pool.start("ctl", "controller")
            ended = evm.end_of(moving)
            shown, _ = follower.communicate(timeout=WAIT_S)
            streams = probing.stop()
        assert (ended.outcome, ended.committed) == (Outcome.COMPLETED, True)
        check_figures(ended)
        assert (follower.returncode, "completed" in shown) == (0, True), shown
        evm.check_only_on("n2")
        check_stream(streams, "evm", boot_id)
        listed = evm.client.migrations.list().items
        assert [past.id for past in listed] == [moving.id, *(past.id for past in earlier)]
        assert [name for name in (one.spec.name for one in evm.client.evms.list().items) if name == evm.name]
        changes = [event for event in iter_of(seen) if event.value]
        assert [change.revision for change in changes] == sorted({change.revision for change in changes})
        assert [change.value["owner"] for change in (changes[0], changes[-1]) if change.value] == ["n1", "n2"]


def check_figures(ended: Migration) -> None:
    """A controller that was away still reports what the two ends have measured."""
    report = ended.report
    assert report.vcpu_pause_ms and report.stages.blackout_ms and report.stages.source_brownout_s
    assert report.memory_bytes and report.sent_bytes


def iter_of(seen: queue.Queue[WatchEvent]) -> Iterator[WatchEvent]:
    while not seen.empty():
        yield seen.get()


def test_a_migration_that_ended_without_a_controller_is_found_to_have_ended(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id = evm.boot_id
        moving = evm.begin_slow("n2", bytes_per_s=BROWNOUT_BYTES_PER_S)
        pool.kill("ctl", "controller")
        until(lambda: evm.qemus().keys() == {"n2"}, "the source is cleared without the controller")
        assert evm.boot_id == boot_id
        pool.start("ctl", "controller")
        ended = evm.end_of(moving)
        assert (ended.stage, ended.outcome) == (Stage.CLOSED, Outcome.COMPLETED)
        evm.check_only_on("n2")
        evm.migrate("n1")
        evm.check_only_on("n1")
