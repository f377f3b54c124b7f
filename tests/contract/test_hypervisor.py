"""What every hypervisor driver must do for an agent.

A driver takes part through a ``Bench``: two nodes that trust each other, and plans for a guest that answers on its
console. The tests below use nothing else but ``emp.hypervisor.base``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from emp.hypervisor.base import (
    Machine,
    MachineEventKind,
    MachineGone,
    NoGuestAgent,
    ProcessId,
    RunState,
    StreamLimits,
    StreamStatus,
)
from emp.model.errors import BadInput, Conflict, HypervisorError
from tests.fakes.bench import FakeBench, fake_bench
from tests.qemu_bench import LOOPBACK, Bench, bench, is_kind, is_stream, rewriting, start_stream, until

KIND = MachineEventKind
AnyBench = Bench | FakeBench


@pytest.fixture(params=["qemu", "fake"])
async def nodes(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[AnyBench]:
    if request.param == "qemu" and os.geteuid() != 0:
        pytest.skip("machines can be started by root only")
    async with bench(tmp_path) if request.param == "qemu" else fake_bench() as made:
        yield made


async def at_switchover(nodes: AnyBench) -> tuple[Machine, Machine]:
    """Return both with the source held in pre-switchover."""
    source, target = await nodes.pair()
    events = source.events()
    await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
    await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
    return source, target


async def moved(nodes: AnyBench) -> tuple[Machine, Machine]:
    """Return both when the target has loaded everything and neither runs."""
    source, target = await at_switchover(nodes)
    sent, loaded = source.events(), target.events()
    await source.continue_stream()
    await until(sent, is_stream(StreamStatus.COMPLETED))
    await until(loaded, is_stream(StreamStatus.COMPLETED))
    return source, target


async def counts_on(nodes: AnyBench, machine: Machine, count: str) -> None:
    async with nodes.console(machine) as guest:
        assert await guest.ask() == count


class TestLaunch:
    async def test_boots_the_guest(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        assert machine.name == "one"
        assert await machine.run_state() is RunState.RUNNING
        assert (await machine.stream_info()).status is StreamStatus.NONE
        assert await nodes.left.hypervisor.found() == {"one": machine.process}
        await machine.kill()

    async def test_refuses_a_second_machine_of_the_same_name(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        with pytest.raises(Conflict):
            await nodes.left.hypervisor.launch(nodes.plan(await nodes.spec()))
        await counts_on(nodes, machine, "0")
        await machine.kill()

    async def test_says_which_field_of_the_plan_is_wrong(self, nodes: AnyBench) -> None:
        plan = nodes.plan(await nodes.spec())
        with pytest.raises(BadInput) as error:
            await nodes.left.hypervisor.launch(replace(plan, tap_fds=()))
        assert error.value.field == "tap_fds"
        assert await nodes.left.hypervisor.found() == {}

    async def test_names_what_new_machines_should_be(self, nodes: AnyBench) -> None:
        facts = await nodes.left.hypervisor.facts()
        assert facts.default_machine in facts.machines
        assert facts.default_cpu_model in facts.cpu_models


class TestRunning:
    async def test_tells_every_listener_of_stop_and_resume_in_order(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        listeners = machine.events(), machine.events()
        await machine.stop()
        assert await machine.run_state() is RunState.PAUSED
        await machine.cont()
        assert await machine.run_state() is RunState.RUNNING
        for listener in listeners:
            seen = await until(listener, is_kind(KIND.RESUMED))
            assert [event.kind for event in seen] == [KIND.STOPPED, KIND.RESUMED]
            assert seen[0].at_s <= seen[1].at_s
        await machine.kill()

    async def test_events_begin_with_the_call(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        await machine.stop()
        late = machine.events()
        await machine.cont()
        assert [event.kind for event in await until(late, is_kind(KIND.RESUMED))] == [KIND.RESUMED]
        await machine.kill()

    async def test_a_guest_that_shuts_down_stays_to_be_looked_at(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        events = machine.events()
        await machine.power_button()
        await until(events, is_kind(KIND.GUEST_SHUTDOWN))
        await until(events, is_kind(KIND.STOPPED))
        assert await machine.run_state() is RunState.SHUTDOWN
        await machine.kill()

    async def test_a_guest_that_reboots_goes_on_in_the_same_machine(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        events = machine.events()
        async with nodes.console(machine) as guest:
            await guest.say("r")
            await until(events, is_kind(KIND.GUEST_RESET))
            assert await guest.read() == "R"
        assert await machine.run_state() is RunState.RUNNING
        await machine.kill()

    async def test_a_guest_that_panics_is_paused(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        events = machine.events()
        async with nodes.console(machine) as guest:
            await guest.say("p")
        await until(events, is_kind(KIND.GUEST_PANICKED))
        await until(events, is_kind(KIND.STOPPED))
        assert await machine.run_state() is RunState.GUEST_PANICKED
        await machine.kill()

    async def test_a_guest_without_an_agent_is_said_to_have_none_and_goes_on(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        for _ in range(2):  # what the first was to ask is still at the guest's port
            with pytest.raises(NoGuestAgent, match="no agent in the guest answers"):
                await machine.set_clock()
        async with nodes.console(machine) as guest:
            assert await guest.ask() == "0"
        await machine.kill()

    async def test_gives_copies_of_its_taps(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        taps = await machine.tap_fds()
        assert [nodes.is_its_tap(tap) for tap in taps] == [True]
        await machine.kill()


class TestEnd:
    async def test_gone_comes_last_for_every_listener_early_and_late(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        early = machine.events()
        await machine.stop()
        nodes.sigkill(machine)
        assert [event.kind async for event in early] == [KIND.STOPPED, KIND.GONE]
        assert [event.kind async for event in machine.events()] == [KIND.GONE]
        with pytest.raises(MachineGone):
            await machine.run_state()
        with pytest.raises(MachineGone):
            await machine.tap_fds()
        await machine.kill()

    async def test_kill_ends_it_and_may_be_repeated(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        await machine.kill()
        await machine.kill()
        assert await nodes.left.hypervisor.found() == {}
        again = await nodes.booted()
        await machine.kill()  # of the first one: not of the second
        assert await nodes.left.hypervisor.found() == {"one": again.process}
        assert await again.run_state() is RunState.RUNNING
        await again.kill()

    async def test_a_dead_one_is_not_found(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        gone = machine.events()
        nodes.sigkill(machine)
        await until(gone, is_kind(KIND.GONE))
        assert await nodes.left.hypervisor.found() == {}


class TestAdoption:
    async def test_the_guest_does_not_notice(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        spec = nodes.specs["one"]
        await machine.close()
        await counts_on(nodes, machine, "0")
        found = await nodes.left.hypervisor.found()
        assert found == {"one": machine.process}
        adopted = await nodes.left.hypervisor.adopt(spec, found["one"])
        assert await adopted.run_state() is RunState.RUNNING
        await counts_on(nodes, adopted, "1")
        events = adopted.events()
        await adopted.stop()
        await until(events, is_kind(KIND.STOPPED))
        (tap,) = await adopted.tap_fds()
        assert nodes.is_its_tap(tap)
        await adopted.kill()

    async def test_only_the_very_process_and_evm(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        other_evm = await nodes.spec()
        with pytest.raises(HypervisorError):
            await nodes.left.hypervisor.adopt(other_evm, machine.process)
        later = ProcessId(machine.process.pid, machine.process.start_ticks + 1)
        with pytest.raises(HypervisorError):
            await nodes.left.hypervisor.adopt(other_evm, later)
        await nodes.left.hypervisor.kill_stranger("one", later)
        await counts_on(nodes, machine, "0")
        await machine.kill()

    async def test_a_stranger_can_be_killed(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        await machine.close()
        await nodes.left.hypervisor.kill_stranger("one", machine.process)
        await nodes.left.hypervisor.kill_stranger("one", machine.process)
        assert await nodes.left.hypervisor.found() == {}

    async def test_closed_means_no_more_events(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        events = machine.events()
        await machine.close()
        assert [event async for event in events] == []
        await machine.kill()


class TestMigration:
    async def test_moves_the_guest(self, nodes: AnyBench) -> None:
        source, target = await nodes.pair()
        await counts_on(nodes, source, "0")
        sent, loaded = source.events(), target.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        at_source = await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
        assert await source.run_state() not in (RunState.RUNNING, RunState.POSTMIGRATE)
        assert await target.run_state() is RunState.INMIGRATE
        await source.continue_stream()
        at_source += await until(sent, is_stream(StreamStatus.COMPLETED))
        at_target = await until(loaded, is_stream(StreamStatus.COMPLETED))
        assert await source.run_state() is RunState.POSTMIGRATE
        assert await target.run_state() is RunState.PAUSED
        await target.cont()
        await until(loaded, is_kind(KIND.RESUMED))
        await source.kill()
        await counts_on(nodes, target, "1")
        assert [event.stream for event in at_source if event.stream] == [
            StreamStatus.SETUP,
            StreamStatus.ACTIVE,
            StreamStatus.PRE_SWITCHOVER,
            StreamStatus.DEVICE,
            StreamStatus.COMPLETED,
        ]
        assert [event.passes for event in at_source if event.kind is KIND.PASS][:1] == [1]
        kinds = [event.kind for event in at_source]
        stopped = kinds.index(KIND.STOPPED)
        assert kinds.count(KIND.STOPPED) == 1
        assert at_source[stopped + 1 :][0].stream is StreamStatus.PRE_SWITCHOVER
        assert KIND.RESUMED not in kinds
        assert KIND.RESUMED not in [event.kind for event in at_target]
        await target.kill()

    async def test_figures(self, nodes: AnyBench) -> None:
        source, target = await moved(nodes)
        info = await source.stream_info()
        assert info.status is StreamStatus.COMPLETED
        assert info.memory_bytes >= 128 << 20
        assert info.transferred_bytes > 0
        assert info.remaining_bytes == 0
        assert info.passes >= 1
        assert info.downtime_ms is not None
        assert info.total_ms >= info.downtime_ms
        assert info.error is None
        await source.kill()
        await target.kill()

    async def test_and_back_again(self, nodes: AnyBench) -> None:
        spec = await nodes.spec()
        here, there = nodes.left, nodes.right
        machine = await here.hypervisor.launch(nodes.plan(spec))
        async with nodes.console(machine) as guest:
            assert await guest.read() == "R"
        for count in "012":
            waiting = await there.hypervisor.launch(nodes.plan(spec, incoming=True))
            sent, loaded = machine.events(), waiting.events()
            await start_stream(machine, waiting, to=there, source_name=here.identity)
            await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
            await machine.continue_stream()
            await until(sent, is_stream(StreamStatus.COMPLETED))
            await until(loaded, is_stream(StreamStatus.COMPLETED))
            await waiting.cont()
            await machine.kill()
            await counts_on(nodes, waiting, count)
            machine, here, there = waiting, there, here
        await machine.kill()

    async def test_with_as_many_channels_as_agreed(self, nodes: AnyBench) -> None:
        source, target = await nodes.pair()
        sent, loaded = source.events(), target.events()
        port = await target.listen_for_stream(host=LOOPBACK, source=nodes.left.identity, multifd_channels=4)
        limits = StreamLimits(multifd_channels=4)
        await source.send_stream(host=LOOPBACK, port=port, target=nodes.right.identity, limits=limits)
        await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        await source.kill()
        await target.kill()

    async def test_a_waiting_target_cannot_be_started(self, nodes: AnyBench) -> None:
        source, target = await nodes.pair()
        with pytest.raises(HypervisorError):
            await target.cont()
        sent, loaded = source.events(), target.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
        with pytest.raises(HypervisorError):
            await target.cont()
        await source.continue_stream()
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        assert await target.run_state() is RunState.PAUSED
        await source.kill()
        await target.kill()

    async def test_cancel_in_precopy_leaves_the_guest_running(self, nodes: AnyBench) -> None:
        source, target = await nodes.pair()
        async with nodes.console(source) as guest:
            await rewriting(guest)  # dirties memory faster than this limit lets it be sent
            events = source.events()
            slowly = StreamLimits(max_bandwidth_bytes_per_s=16 << 20, downtime_limit_ms=1)
            await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=slowly)
            await until(events, is_stream(StreamStatus.ACTIVE))
            await source.cancel_stream()
            ended = await until(events, is_stream(StreamStatus.CANCELLED, StreamStatus.FAILED))
            assert KIND.STOPPED not in [event.kind for event in ended]
            assert await source.run_state() is RunState.RUNNING
            assert (await source.stream_info()).status.ended_badly
            assert await guest.ask("q") == "4"
        await source.kill()
        await target.kill()

    async def test_cancel_at_the_switchover_resumes_the_source(self, nodes: AnyBench) -> None:
        source, target = await at_switchover(nodes)
        events = source.events()
        await source.cancel_stream()
        await until(events, is_kind(KIND.RESUMED))
        assert await source.run_state() is RunState.RUNNING
        await counts_on(nodes, source, "0")
        await target.kill()
        # and it can be tried again
        target = await nodes.right.hypervisor.launch(nodes.plan(nodes.specs["one"], incoming=True))
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(events, is_stream(StreamStatus.COMPLETED))
        await target.cont()
        await source.kill()
        await counts_on(nodes, target, "1")
        await target.kill()

    async def test_cancel_after_completion_changes_nothing(self, nodes: AnyBench) -> None:
        source, target = await moved(nodes)
        await source.cancel_stream()
        assert await source.run_state() is RunState.POSTMIGRATE
        assert (await source.stream_info()).status is StreamStatus.COMPLETED
        assert await target.run_state() is RunState.PAUSED
        await source.cont()  # the way back, for those who may
        await target.kill()
        await counts_on(nodes, source, "0")
        await source.kill()

    async def test_nothing_to_cancel_is_no_error(self, nodes: AnyBench) -> None:
        machine = await nodes.booted()
        await machine.cancel_stream()
        await counts_on(nodes, machine, "0")
        await machine.kill()

    async def test_limits_can_be_changed_on_the_way(self, nodes: AnyBench) -> None:
        source, target = await nodes.pair()
        async with nodes.console(source) as guest:
            await rewriting(guest)
        events = source.events()
        strict = StreamLimits(max_bandwidth_bytes_per_s=64 << 20, downtime_limit_ms=1)
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=strict)
        await until(events, lambda event: event.passes == 3)
        assert (await source.stream_info()).dirty_bytes_per_s > 0
        await source.set_limits(StreamLimits(downtime_limit_ms=60_000))
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        with pytest.raises(BadInput):
            await source.set_limits(StreamLimits(downtime_limit_ms=0))
        await source.kill()
        await target.kill()

    @pytest.mark.parametrize("died", ["before", "at the switchover"])
    async def test_a_target_that_dies_costs_nothing(self, nodes: AnyBench, died: str) -> None:
        source, target = await nodes.pair()
        events = source.events()
        if died == "before":
            port = await target.listen_for_stream(host=LOOPBACK, source=nodes.left.identity)
            await target.kill()
            await source.send_stream(host=LOOPBACK, port=port, target=nodes.right.identity, limits=StreamLimits())
        else:
            await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
            await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
            await target.kill()
            await source.continue_stream()
        await until(events, is_stream(StreamStatus.FAILED))
        assert (await source.stream_info()).error
        if died != "before":
            await until(events, is_kind(KIND.RESUMED))
        assert await source.run_state() is RunState.RUNNING
        await counts_on(nodes, source, "0")
        await source.kill()

    async def test_a_source_that_dies_leaves_a_target_that_never_runs(self, nodes: AnyBench) -> None:
        source, target = await at_switchover(nodes)
        events = target.events()
        await source.kill()
        await until(events, is_stream(StreamStatus.FAILED))
        assert (await target.stream_info()).error
        with pytest.raises(HypervisorError):
            await target.cont()
        await target.kill()

    async def test_the_target_hears_only_the_named_source(self, nodes: AnyBench) -> None:
        source, target = await nodes.pair()
        stranger_node = nodes.node("stranger")
        stranger = await stranger_node.hypervisor.launch(nodes.plan(nodes.specs["one"]))
        strange, sent, loaded = stranger.events(), source.events(), target.events()
        port = await target.listen_for_stream(host=LOOPBACK, source=nodes.left.identity)
        await stranger.send_stream(host=LOOPBACK, port=port, target=nodes.right.identity, limits=StreamLimits())
        await until(strange, is_stream(StreamStatus.FAILED))
        assert await stranger.run_state() is RunState.RUNNING
        assert await target.run_state() is RunState.INMIGRATE
        # and it is still there for the one that it waits for
        await source.send_stream(host=LOOPBACK, port=port, target=nodes.right.identity, limits=StreamLimits())
        await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        await until(sent, is_stream(StreamStatus.COMPLETED))
        await target.cont()
        await counts_on(nodes, target, "0")
        for machine in (source, target, stranger):
            await machine.kill()

    async def test_the_source_speaks_only_to_the_named_target(self, nodes: AnyBench) -> None:
        source, target = await nodes.pair()
        events = source.events()
        port = await target.listen_for_stream(host=LOOPBACK, source=nodes.left.identity)
        await source.send_stream(host=LOOPBACK, port=port, target="agent-somebody-else", limits=StreamLimits())
        await until(events, is_stream(StreamStatus.FAILED))
        assert await source.run_state() is RunState.RUNNING
        await counts_on(nodes, source, "0")
        await source.kill()
        await target.kill()

    async def test_a_stream_of_another_evm_is_refused(self, nodes: AnyBench) -> None:
        source = await nodes.booted()
        target = await nodes.right.hypervisor.launch(nodes.plan(await nodes.spec(), incoming=True))
        events = source.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        came = await until(events, is_stream(StreamStatus.FAILED, StreamStatus.PRE_SWITCHOVER))
        if came[-1].stream is StreamStatus.PRE_SWITCHOVER:  # it is small: all of it may be on its way by then
            await source.continue_stream()
            await until(events, is_stream(StreamStatus.FAILED))
        assert "uuid" in str((await target.stream_info()).error).lower()
        assert await source.run_state() is RunState.RUNNING
        await source.kill()
        await target.kill()
