"""Two EVMs that change places at the same moment."""

from __future__ import annotations

from emp.lab.probing import Probing
from emp.model.migration import Outcome
from tests.lab.conftest import Pool
from tests.lab.pool import subject
from tests.lab.test_migration import check_stream


def test_two_evms_swap_nodes_at_the_same_time(pool: Pool) -> None:
    with subject(pool, node="n1", pods=["shop"]) as one, subject(pool, node="n2", volumes=["io2:16MiB"]) as other:
        boots = {"one": one.boot_id, "other": other.boot_id}
        addresses = {"one": one.guest().address, "other": other.guest().address}
        with Probing(pool.files, addresses, rate_hz=100) as probing:
            under_way = one.begin("n2"), other.begin("n1")
            ended = [evm.end_of(migration) for evm, migration in zip((one, other), under_way, strict=True)]
            seen = probing.stop()
        assert [migration.outcome for migration in ended] == [Outcome.COMPLETED] * 2, ended
        began, over = max(m.created_at for m in ended), min(m.ended_at or 0.0 for m in ended)
        assert began < over, "they did not overlap"
        one.check_only_on("n2")
        other.check_only_on("n1")
        for name, boot_id in boots.items():
            check_stream(seen, name, boot_id)
