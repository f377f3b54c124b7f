"""The facts about QEMU that the switchover is built on, one test each, on the installed QEMU and on the fake one.

The numbers are those that the code's comments quote. A test that fails on a new QEMU names the fact that no longer
holds; one that fails on the fake names what the simulation gets wrong. Seen elsewhere, because it takes more than two
idle machines: 8 (announcements, ``tests/lab/test_qemu_migration.py``), 13 (``cont`` without the volume server,
``tests/lab``). Not used by the project, and so not tested: 14 (image locks: there are no image files), 16 (post-copy).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.hypervisor.base import Machine, MachineEventKind, RunState, StreamLimits, StreamStatus
from emp.model.errors import BadInput, HypervisorError, OutcomeUnknown
from tests.fakes.bench import FakeBench, fake_bench
from tests.qemu_bench import PATIENCE_S, Bench, bench, is_kind, is_stream, rewriting, start_stream, until

KIND = MachineEventKind
A_WHILE_S = 0.5
AnyBench = Bench | FakeBench


@pytest.fixture(params=["qemu", "fake"])
async def nodes(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[AnyBench]:
    if request.param == "qemu" and os.geteuid() != 0:
        pytest.skip("machines can be started by root only")
    async with bench(tmp_path) if request.param == "qemu" else fake_bench() as made:
        for name in ("left", "right"):
            made.node(name, timeout_s=1.0)
        yield made


async def held(nodes: AnyBench, limits: StreamLimits | None = None) -> tuple[Machine, Machine]:
    """Return both, the source held in pre-switchover."""
    source, target = await nodes.pair()
    events = source.events()
    await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=limits)
    await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
    return source, target


async def completed(nodes: AnyBench) -> tuple[Machine, Machine]:
    source, target = await held(nodes)
    sent, loaded = source.events(), target.events()
    await source.continue_stream()
    await until(sent, is_stream(StreamStatus.COMPLETED))
    await until(loaded, is_stream(StreamStatus.COMPLETED))
    await stands(source, RunState.POSTMIGRATE)
    await stands(target, RunState.PAUSED)
    return source, target


async def stands(machine: Machine, state: RunState) -> None:
    """Return once it is in ``state``."""
    async with asyncio.timeout(PATIENCE_S):
        while await machine.run_state() is not state:  # noqa: ASYNC110 - there is no event for each of them
            await asyncio.sleep(0.005)


async def end(*machines: Machine) -> None:
    for machine in machines:
        await machine.kill()


async def test_fact_1_a_source_resumes_by_itself_until_it_has_completed(nodes: AnyBench) -> None:
    source, target = await held(nodes)
    events = source.events()
    await source.cancel_stream()
    await until(events, is_kind(KIND.RESUMED))
    await end(source, target)


async def test_fact_1_and_never_afterwards_but_by_cont(nodes: AnyBench) -> None:
    source, target = await completed(nodes)
    await source.cancel_stream()
    await end(target)
    assert await source.run_state() is RunState.POSTMIGRATE
    await source.cont()
    assert await source.run_state() is RunState.RUNNING
    await end(source)


async def test_fact_2_completed_means_that_the_target_has_loaded(nodes: AnyBench) -> None:
    source, target = await held(nodes)
    events = source.events()
    with nodes.frozen(target):
        await source.continue_stream()
        await until(events, is_stream(StreamStatus.DEVICE))
        await asyncio.sleep(A_WHILE_S)  # in which it would say so, were the target not waited for
        assert (await source.stream_info()).status is StreamStatus.DEVICE
    await until(events, is_stream(StreamStatus.COMPLETED))
    await end(source, target)


async def test_fact_3_both_statuses_become_final(nodes: AnyBench) -> None:
    source, target = await held(nodes)
    events = source.events()
    await source.continue_stream()
    await until(events, is_stream(StreamStatus.COMPLETED))
    await stands(source, RunState.POSTMIGRATE)
    assert (await source.stream_info()).status is StreamStatus.COMPLETED
    await end(source, target)


async def test_fact_4_between_completed_and_cont_nobody_runs_and_either_could(nodes: AnyBench) -> None:
    source, target = await completed(nodes)
    await asyncio.sleep(A_WHILE_S)  # in which neither may start by itself
    assert await source.run_state() is RunState.POSTMIGRATE
    assert await target.run_state() is RunState.PAUSED
    await target.cont()
    assert await target.run_state() is RunState.RUNNING
    await end(source, target)


async def test_fact_5_nothing_in_qemu_stops_a_stale_copy(nodes: AnyBench) -> None:
    source, target = await completed(nodes)
    await target.cont()
    await end(target)
    await source.cont()
    assert await source.run_state() is RunState.RUNNING
    await end(source)


async def test_fact_6_a_bare_cont_in_inmigrate_arms_a_start_and_stop_disarms_it(nodes: AnyBench) -> None:
    source, target = await held(nodes)
    loaded = target.events()
    with pytest.raises(HypervisorError):
        await target.cont()  # the driver's own refuses
    await nodes.say(target, "cont")
    await nodes.say(target, "stop")
    await nodes.say(target, "cont")
    await source.continue_stream()
    await until(loaded, is_kind(KIND.RESUMED))
    assert await target.run_state() is RunState.RUNNING
    await end(source, target)


async def test_fact_6_disarmed(nodes: AnyBench) -> None:
    source, target = await held(nodes)
    loaded = target.events()
    await nodes.say(target, "cont")
    await nodes.say(target, "stop")
    await source.continue_stream()
    await until(loaded, is_stream(StreamStatus.COMPLETED))
    await stands(target, RunState.PAUSED)
    await end(source, target)


async def test_fact_7_a_target_that_hung_and_wakes_may_be_loaded_beside_a_running_source(nodes: AnyBench) -> None:
    source, target = await held(nodes)
    events, loaded = source.events(), target.events()
    with nodes.frozen(target):
        await source.continue_stream()
        await until(events, is_stream(StreamStatus.DEVICE))
        await asyncio.sleep(A_WHILE_S)  # in which all of it goes into the target's socket
        await source.cancel_stream()
        await until(events, is_kind(KIND.RESUMED))
    # Loaded most times; the kernel may throw away what was in the socket when the source closes its end.
    came = await until(loaded, is_stream(StreamStatus.COMPLETED, StreamStatus.FAILED))
    if came[-1].stream is StreamStatus.COMPLETED:
        await stands(target, RunState.PAUSED)
    assert await target.run_state() is not RunState.RUNNING
    assert await source.run_state() is RunState.RUNNING
    await end(source, target)


async def test_fact_9_a_reply_to_a_client_that_left_is_not_taken_for_ours(nodes: AnyBench) -> None:
    machine = await nodes.booted()
    with nodes.frozen(machine):
        with pytest.raises(OutcomeUnknown):
            await machine.stream_info()
        spec = nodes.specs["one"]
        await machine.close()
    again = await nodes.left.hypervisor.adopt(spec, machine.process)
    assert await again.run_state() is RunState.RUNNING
    await end(again)


async def test_fact_10_pre_switchover_waits_for_ever_with_the_guest_stopped(nodes: AnyBench) -> None:
    source, target = await held(nodes)
    events = source.events()
    await end(target)
    await asyncio.sleep(A_WHILE_S)  # in which nothing may start the guest
    assert await source.run_state() is RunState.FINISH_MIGRATE
    await source.cancel_stream()
    await until(events, is_kind(KIND.RESUMED))
    await end(source)


async def test_fact_11_with_a_hung_target_and_much_left_only_yank_is_answered(nodes: AnyBench) -> None:
    source, target = await nodes.pair()
    async with nodes.console(source) as guest:
        await rewriting(guest)  # rewrites 64 MiB for ever
    events = source.events()
    at_once = StreamLimits(downtime_limit_ms=60_000)
    await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=at_once)
    await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
    assert (await source.stream_info()).remaining_bytes > 32 << 20
    with nodes.frozen(target):
        await source.continue_stream()
        await until(events, is_stream(StreamStatus.DEVICE))
        with pytest.raises(OutcomeUnknown):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await source.run_state()
        await source.cancel_stream()
        await until(events, is_kind(KIND.RESUMED))
    assert await target.run_state() is RunState.INMIGRATE
    await end(source, target)


async def test_fact_12_only_pre_switchover_holds_a_switchover(nodes: AnyBench) -> None:
    slowest = StreamLimits(max_bandwidth_bytes_per_s=64 << 20, downtime_limit_ms=1)
    source, target = await held(nodes, slowest)  # an idle guest goes over, whatever the limit
    await asyncio.sleep(A_WHILE_S)  # in which it goes no further
    assert (await source.stream_info()).status is StreamStatus.PRE_SWITCHOVER
    with pytest.raises(BadInput):
        await source.set_limits(StreamLimits(downtime_limit_ms=0))
    await end(source, target)


async def test_fact_15_a_source_that_came_back_migrates_again_and_an_arrived_one_onward(nodes: AnyBench) -> None:
    source, target = await completed(nodes)
    await source.cont()
    await end(target)
    spec = nodes.specs["one"]
    again = await nodes.right.hypervisor.launch(nodes.plan(spec, incoming=True))
    await over(nodes, source, again, to=nodes.right.identity, of=nodes.left.identity)
    await end(source)
    onward = await nodes.left.hypervisor.launch(nodes.plan(spec, incoming=True))
    await over(nodes, again, onward, to=nodes.left.identity, of=nodes.right.identity)
    async with nodes.console(onward) as guest:
        assert await guest.ask() == "0"
    await end(again, onward)


async def over(nodes: AnyBench, source: Machine, target: Machine, *, to: str, of: str) -> None:
    """Move the guest, and start it there."""
    sent, loaded = source.events(), target.events()
    port = await target.listen_for_stream(host="127.0.0.1", source=of)
    await source.send_stream(host="127.0.0.1", port=port, target=to, limits=StreamLimits())
    await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
    await source.continue_stream()
    await until(sent, is_stream(StreamStatus.COMPLETED))
    await until(loaded, is_stream(StreamStatus.COMPLETED))
    await stands(target, RunState.PAUSED)
    await target.cont()
