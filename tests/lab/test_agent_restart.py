"""Agents that are killed and started again: their guests do not notice, and of no EVM there are ever two, or none."""

from __future__ import annotations

import contextlib
import json

from emp.host.run import run_sync
from emp.lab.probing import Probing
from emp.model.evm import EvmState
from emp.model.migration import Outcome
from tests.lab.conftest import Pool
from tests.lab.pool import agent_away, subject, until
from tests.lab.test_migration import check_back_on, check_stream

PROBE_HZ = 100


def test_an_agent_that_was_killed_adopts_its_evm(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id, qemus = evm.boot_id, evm.qemus()
        with Probing(pool.files, {"evm": evm.guest().address}, rate_hz=PROBE_HZ) as probing:
            with agent_away(pool, evm.client, "n1"):
                assert evm.qemus() == qemus
            evm.check_only_on("n1")
            seen = probing.stop()
        assert evm.qemus() == qemus
        check_stream(seen, "evm", boot_id)
        assert seen["targets"]["evm"]["udp"]["total"]["lost"] == 0
        evm.shell()
        evm.type("echo $((20 + 22))")
        with contextlib.closing(evm.client.evms.console(evm.name)) as output:  # type: ignore[type-var]
            shown = b""
            while b"42" not in shown:
                shown += next(output)
        evm.migrate("n2")
        evm.check_only_on("n2")
        assert evm.boot_id == boot_id


def test_an_evm_that_ended_while_its_agent_was_away_is_started_again(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        boot_id = evm.boot_id
        with agent_away(pool, evm.client, "n1"):
            pool.kill("n1", f"qemu:{evm.name}")
        assert evm.reboots(boot_id) != boot_id
        evm.check_only_on("n1")


def test_a_source_agent_killed_in_the_brownout_takes_the_evm_back(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        with Probing(pool.files, {"evm": evm.guest().address}, rate_hz=PROBE_HZ) as probing:
            slow = evm.begin_slow("n2")
            with agent_away(pool, evm.client, "n1"):
                assert evm.qemus().keys() == {"n1", "n2"}
            ended = evm.end_of(slow)
            assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
            check_back_on(evm, "n1", boot_id, pid)
            evm.migrate("n2")
            evm.check_only_on("n2")
            seen = probing.stop()
        check_stream(seen, "evm", boot_id)


def test_a_target_agent_killed_in_the_brownout_leaves_the_evm_on_its_source(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        with Probing(pool.files, {"evm": evm.guest().address}, rate_hz=PROBE_HZ) as probing:
            slow = evm.begin_slow("n2")
            with agent_away(pool, evm.client, "n2"):
                until(lambda: evm.claims().get("n1") is EvmState.RUNNING, "the source is back alone, asking nobody")
            ended = evm.end_of(slow)
            assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
            check_back_on(evm, "n1", boot_id, pid)
            evm.migrate("n2")
            evm.check_only_on("n2")
            seen = probing.stop()
        check_stream(seen, "evm", boot_id)


def test_a_target_agent_that_was_away_to_the_end_clears_what_waits_there(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        slow = evm.begin_slow("n2")
        with agent_away(pool, evm.client, "n2"):
            assert evm.end_of(slow).outcome is Outcome.ABORTED  # closed without the target's word
        until(lambda: not evm.traces("n2"), "nothing of the EVM is left on n2")
        until(lambda: evm.client.nodes.get("n2").report.memory_used_bytes == 0, "its memory is free again")
        evm.migrate("n2")
        evm.check_only_on("n2")


def learnt_at(pool: Pool, mac: str) -> str:
    """Return the cable of the lab's switch behind which it believes a MAC to be."""
    table = json.loads(run_sync("ip", "netns", "exec", pool.topology.namespace("fabric"), "bridge", "-json", "fdb"))
    return next((str(entry["ifname"]) for entry in table if entry["mac"] == mac), "nowhere")


def test_a_target_agent_killed_before_it_could_announce_does_so_when_it_is_back(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        evm.migrate("n2")
        mac = evm.spec.nics[0].mac
        with agent_away(pool, evm.client, "n2"):
            until(lambda: not evm.client.nodes.get("n2").ready, "n2 is down, and all announcements long over")
            fabric = pool.topology.namespace("fabric")
            moved = ["bridge", "fdb", "replace", mac, "dev", "n1", "master", "dynamic"]
            run_sync("ip", "netns", "exec", fabric, *moved)  # as if the switch had not heard yet
            assert learnt_at(pool, mac) == "n1"
        until(lambda: learnt_at(pool, mac) == "n2", "the switch hears where the EVM is", timeout_s=5.0)
        assert evm.boot_id


def test_an_agent_killed_just_after_a_migration_clears_what_it_had_left(pool: Pool) -> None:
    with subject(pool, node="n1", boots=False) as evm:
        record = pool.files.data("n1") / "evms" / f"{evm.name}.json"
        kept = record.read_bytes()
        evm.migrate("n2")
        with agent_away(pool, evm.client, "n1"):
            record.write_bytes(kept)  # the journal says DONE already: it was killed between the two
            assert evm.traces("n1")
        evm.check_only_on("n2")
