"""From QMP's words to the project's: events, what was missed, and ``query-migrate``."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from emp.hypervisor.base import MachineEvent, MachineEventKind, RunState, StreamLimits, StreamStatus
from emp.hypervisor.qemu import stream
from emp.hypervisor.qemu.events import Broadcast, Subscription, Watcher
from emp.model.errors import BadInput

KIND = MachineEventKind


def qmp(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 1700000000, "microseconds": 250000}}


async def everything(subscription: Subscription) -> list[MachineEvent]:
    return [event async for event in subscription]


async def test_events_keep_qemus_time_and_what_they_tell() -> None:
    broadcast = Broadcast()
    watcher, heard = Watcher(broadcast), broadcast.subscribe()
    for event in (
        qmp("MIGRATION", status="active"),
        qmp("MIGRATION_PASS", **{"pass": 3}),
        qmp("STOP"),
        qmp("MIGRATION", status="postcopy-active"),
        qmp("RTC_CHANGE", offset=3),
        qmp("SHUTDOWN", guest=False, reason="host-signal"),
        qmp("SHUTDOWN", guest=True, reason="guest-shutdown"),
        qmp("RESET", guest=True, reason="guest-reset"),
        qmp("GUEST_PANICKED", action="pause"),
        qmp("BLOCK_IO_ERROR", **{"qom-path": "/disk0", "operation": "write", "reason": "No space", "action": "stop"}),
        qmp("RESUME"),
    ):
        watcher.on_qmp_event(event)
    broadcast.close(MachineEvent(KIND.GONE, 2.0))
    events = await everything(heard)
    assert [(event.kind, event.stream, event.passes) for event in events] == [
        (KIND.STREAM, StreamStatus.ACTIVE, None),
        (KIND.PASS, None, 3),
        (KIND.STOPPED, None, None),
        (KIND.STREAM, StreamStatus.OTHER, None),
        (KIND.GUEST_SHUTDOWN, None, None),
        (KIND.GUEST_RESET, None, None),
        (KIND.GUEST_PANICKED, None, None),
        (KIND.IO_ERROR, None, None),
        (KIND.RESUMED, None, None),
        (KIND.GONE, None, None),
    ]
    assert events[0].at_s == 1700000000.25
    assert events[7].detail is not None
    assert "No space" in events[7].detail


@pytest.mark.parametrize(
    ("heard", "read", "expected"),
    [
        ([], (RunState.RUNNING, StreamStatus.NONE), []),
        ([], (RunState.PAUSED, StreamStatus.NONE), [KIND.STOPPED]),
        ([], (RunState.SHUTDOWN, StreamStatus.NONE), [KIND.STOPPED, KIND.GUEST_SHUTDOWN]),
        ([], (RunState.GUEST_PANICKED, StreamStatus.NONE), [KIND.STOPPED, KIND.GUEST_PANICKED]),
        ([], (RunState.IO_ERROR, StreamStatus.NONE), [KIND.STOPPED, KIND.IO_ERROR]),
        ([], (RunState.POSTMIGRATE, StreamStatus.COMPLETED), [StreamStatus.COMPLETED, KIND.STOPPED]),
        ([], (RunState.RUNNING, StreamStatus.FAILED), [StreamStatus.FAILED]),
        ([qmp("STOP")], (RunState.PAUSED, StreamStatus.NONE), []),
        ([qmp("STOP")], (RunState.RUNNING, StreamStatus.NONE), [KIND.RESUMED]),
        ([qmp("STOP"), qmp("RESUME")], (RunState.RUNNING, StreamStatus.NONE), []),
        ([qmp("SHUTDOWN", guest=True), qmp("STOP")], (RunState.SHUTDOWN, StreamStatus.NONE), []),
        ([qmp("GUEST_PANICKED", action="pause"), qmp("STOP")], (RunState.GUEST_PANICKED, StreamStatus.NONE), []),
        ([qmp("MIGRATION", status="active")], (RunState.RUNNING, StreamStatus.ACTIVE), []),
    ],
)
async def test_what_was_missed_is_made_up_for_once(
    heard: list[dict[str, Any]], read: tuple[RunState, StreamStatus], expected: list[object]
) -> None:
    broadcast = Broadcast()
    watcher = Watcher(broadcast)
    watcher.on_state_read(RunState.RUNNING, StreamStatus.NONE)
    for event in heard:
        watcher.on_qmp_event(event)
    listener = broadcast.subscribe()
    watcher.on_state_read(*read)
    watcher.on_state_read(*read)
    broadcast.close()
    assert [event.stream or event.kind for event in await everything(listener)] == expected


async def test_a_first_reading_is_no_news() -> None:
    broadcast = Broadcast()
    listener = broadcast.subscribe()
    Watcher(broadcast).on_state_read(RunState.IO_ERROR, StreamStatus.COMPLETED)
    broadcast.close()
    assert await everything(listener) == []


async def test_a_listener_waits_and_a_dropped_one_costs_nothing() -> None:
    broadcast = Broadcast()
    listener, dropped = broadcast.subscribe(), broadcast.subscribe()
    waiting = asyncio.create_task(anext(listener))
    await asyncio.sleep(0)
    del dropped
    gc.collect()
    assert broadcast.listeners == 1
    event = MachineEvent(KIND.STOPPED, 1.0)
    broadcast.publish(event)
    assert await waiting == event
    broadcast.close()
    broadcast.publish(event)
    assert await everything(listener) == []


def test_query_migrate_in_our_units() -> None:
    info = stream.stream_info(
        {
            "status": "active",
            "total-time": 1200,
            "setup-time": 40,
            "expected-downtime": 300,
            "ram": {
                "total": 1 << 30,
                "remaining": 1 << 20,
                "transferred": 1 << 28,
                "mbps": 800.0,
                "dirty-pages-rate": 1000,
                "page-size": 4096,
                "dirty-sync-count": 4,
            },
        }
    )
    assert info.status is StreamStatus.ACTIVE
    assert (info.total_ms, info.setup_ms, info.downtime_ms) == (1200, 40, None)
    assert (info.memory_bytes, info.remaining_bytes, info.transferred_bytes) == (1 << 30, 1 << 20, 1 << 28)
    assert info.bandwidth_bytes_per_s == 100e6
    assert info.dirty_bytes_per_s == 4_096_000
    assert info.passes == 4


def test_query_migrate_before_any_and_after_a_failed_one() -> None:
    assert stream.stream_info({}).status is StreamStatus.NONE
    failed = stream.stream_info({"status": "failed", "error-desc": "load failed"})
    assert failed.status.ended_badly
    assert failed.error == "load failed"


def test_port_of_a_listening_target() -> None:
    reply = {"socket-address": [{"type": "unix", "path": "/x"}, {"type": "inet", "host": "::", "port": "4711"}]}
    assert stream.listening_port(reply) == 4711
    assert stream.listening_port({}) is None


def test_limits_and_capabilities_in_qmps_words() -> None:
    limits = StreamLimits(max_bandwidth_bytes_per_s=0, downtime_limit_ms=7, multifd_channels=4)
    assert stream.rate_parameters(limits) == {"max-bandwidth": 0, "downtime-limit": 7}
    with pytest.raises(BadInput) as error:
        stream.rate_parameters(StreamLimits(downtime_limit_ms=0))
    assert error.value.field == "downtime_limit_ms"
    asked = stream.capabilities(
        ["events", "return-path", "xbzrle", "validate-uuid", "multifd", "pause-before-switchover"]
    )
    assert {entry["capability"] for entry in asked["capabilities"]} == set(stream.CAPABILITIES) - {
        "late-block-activate"
    }
    assert all(entry["state"] for entry in asked["capabilities"])
