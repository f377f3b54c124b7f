"""What a guest does by itself while it migrates: ``docs/during-a-migration.md`` has the table."""

from __future__ import annotations

from emp.model.evm import EvmState
from emp.model.migration import Outcome
from tests.lab.conftest import Pool
from tests.lab.pool import subject

BYTES_PER_S = 8_000_000


def test_a_guest_that_reboots_meanwhile_arrives_as_it_is_then(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        boot_id = evm.boot_id
        evm.shell()
        moving = evm.begin_slow("n2", bytes_per_s=BYTES_PER_S)
        evm.type("reboot -f")
        later = evm.reboots(boot_id)
        ended = evm.end_of(moving)
        assert ended.outcome is Outcome.COMPLETED, ended.cause
        evm.check_only_on("n2")
        assert evm.boot_id == later, "one boot, and the migration is none"


def test_a_guest_that_shuts_down_meanwhile_stays_down(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        evm.shell()
        moving = evm.begin_slow("n2", bytes_per_s=BYTES_PER_S)
        evm.type("poweroff -f")
        ended = evm.end_of(moving)
        assert (ended.outcome, "shut itself down" in (ended.cause or "")) == (Outcome.ABORTED, True), ended.cause
        record = evm.wait(EvmState.STOPPED)
        assert (record.owner, record.migration) == ("n1", None)
        assert [evm.traces("n2"), evm.qemus()] == [[], {}]
        evm.client.evms.start(evm.name)
        evm.wait(EvmState.RUNNING)
