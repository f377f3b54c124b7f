"""A monitor connection against a server that does what monitors were seen to do, and worse."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from emp.hypervisor.qemu.qmp import QmpSession
from emp.model.errors import HypervisorError, OutcomeUnknown

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": ["oob"]}}
PATIENCE_S = 5.0


class Connection:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._unread = ""

    async def receive(self) -> dict[str, Any]:
        """Return the next command: JSON objects follow each other with nothing between them."""
        while True:
            with contextlib.suppress(ValueError):
                command, end = json.JSONDecoder().raw_decode(self._unread)
                self._unread = self._unread[end:].lstrip()
                return dict(command)
            data = await self.reader.read(4096)
            if not data:
                raise EOFError
            self._unread += data.decode()

    async def send(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps(message).encode() + b"\r\n")
        await self.writer.drain()

    async def negotiate(self) -> None:
        await self.send(GREETING)
        assert (await self.receive())["execute"] == "qmp_capabilities"
        await self.send({"return": {}})


Script = Callable[[Connection], Awaitable[None]]


@contextlib.asynccontextmanager
async def monitor(path: Path, *scripts: Script) -> AsyncIterator[list[Connection]]:
    """Serve the first connection by the first script, and so on; the last one serves all further ones."""
    connections: list[Connection] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        serving.add(task)
        connection = Connection(reader, writer)
        connections.append(connection)
        try:
            with contextlib.suppress(EOFError, ConnectionError, asyncio.CancelledError):
                await scripts[min(len(connections), len(scripts)) - 1](connection)
        finally:
            writer.close()
            serving.discard(task)

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield connections
    finally:
        server.close()
        for task in list(serving):
            task.cancel()
        if serving:
            await asyncio.wait(serving)
        await server.wait_closed()


async def answers(connection: Connection) -> None:
    """A monitor as it should be: every command returns its own name."""
    await connection.negotiate()
    while True:
        command = await connection.receive()
        await connection.send({"return": command.get("execute") or command["exec-oob"], "id": command["id"]})


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> Any:
    """Whatever the other end does, nobody's log is filled with it."""
    caplog.set_level(logging.INFO)
    yield
    assert [record.getMessage() for record in caplog.records if not record.name.startswith("emp")] == []


async def test_asks_and_is_answered(tmp_path: Path) -> None:
    async with monitor(tmp_path / "s", answers):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        assert await session.execute("query-status") == "query-status"
        assert await session.execute("yank", oob=True) == "yank"
        names = [f"command-{n}" for n in range(100)]
        assert await asyncio.gather(*(session.execute(name) for name in names)) == names
        await session.close()
        await session.close()


async def test_a_refusal_carries_the_class(tmp_path: Path) -> None:
    async def refuses(connection: Connection) -> None:
        await connection.negotiate()
        command = await connection.receive()
        await connection.send({"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": command["id"]})

    async with monitor(tmp_path / "s", refuses):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        with pytest.raises(HypervisorError) as error:
            await session.execute("nonsense")
        assert error.value.details == {"qmp_class": "CommandNotFound", "command": "nonsense", "sent": True}
        assert "no such thing" in error.value.message
        await session.close()


async def test_no_answer_in_time_is_unknown_and_a_late_one_is_nobodys(tmp_path: Path) -> None:
    async def late(connection: Connection) -> None:
        await connection.negotiate()
        slow = await connection.receive()
        next_one = await connection.receive()
        await connection.send({"return": "late", "id": slow["id"]})
        await connection.send({"return": "mine", "id": next_one["id"]})
        await connection.receive()

    async with monitor(tmp_path / "s", late):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        with pytest.raises(OutcomeUnknown) as error:
            await session.execute("cont", timeout_s=0.05)
        assert error.value.details == {"command": "cont", "connection_lost": False}
        assert await session.execute("query-status") == "mine"
        await session.close()


async def test_a_connection_that_breaks_leaves_the_answer_unknown_and_is_made_again(tmp_path: Path) -> None:
    async def breaks(connection: Connection) -> None:
        await connection.negotiate()
        await connection.receive()

    async with monitor(tmp_path / "s", breaks, answers) as connections:
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        with pytest.raises(OutcomeUnknown) as error:
            await session.execute("cont")
        assert error.value.details["connection_lost"]
        assert await session.execute("query-status") == "query-status"
        assert len(connections) == 2
        await session.close()


async def test_what_cannot_be_sent_has_not_happened(tmp_path: Path) -> None:
    async def breaks(connection: Connection) -> None:
        await connection.negotiate()
        command = await connection.receive()
        await connection.send({"return": {}, "id": command["id"]})

    async def refuses(connection: Connection) -> None:
        return

    async with monitor(tmp_path / "s", breaks, refuses):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        await session.execute("query-status")
        await session.idle.wait()
        with pytest.raises(HypervisorError) as error:
            await session.execute("cont", timeout_s=0.3)
        assert error.value.details["sent"] is False
        await session.close()
        with pytest.raises(HypervisorError) as error:
            await session.execute("cont")
        assert error.value.details["sent"] is False


@pytest.mark.parametrize("greeting", [None, b"garbage\r\n", b'{"not": "a greeting"}\r\n', b"[]\r\n"])
async def test_opening_gives_up_in_time(tmp_path: Path, greeting: bytes | None) -> None:
    """None: somebody else holds the monitor, and this client waits for a greeting that does not come."""

    async def strange(connection: Connection) -> None:
        if greeting:
            connection.writer.write(greeting)
        await connection.receive()

    async with monitor(tmp_path / "s", strange):
        session = QmpSession(tmp_path / "s", timeout_s=0.2)
        with pytest.raises(HypervisorError) as error:
            await session.open()
        assert str(tmp_path / "s") in error.value.message
    with pytest.raises(HypervisorError):
        await QmpSession(tmp_path / "nowhere", timeout_s=0.2).open()


async def test_the_reply_to_a_dead_client_is_not_taken_for_ours(tmp_path: Path) -> None:
    """QEMU may run what a killed agent had sent, and give the reply to whoever connects next."""
    first_ids: list[str] = []

    async def forgetful(connection: Connection) -> None:
        await connection.negotiate()
        first_ids.append((await connection.receive())["id"])

    async def confused(connection: Connection) -> None:
        await connection.negotiate()
        command = await connection.receive()
        await connection.send({"return": {"status": "stale"}, "id": first_ids[0]})
        await connection.send({"error": {"class": "GenericError", "desc": "stale"}, "id": first_ids[0]})
        await connection.send({"return": "fresh", "id": command["id"]})
        await connection.receive()

    async with monitor(tmp_path / "s", forgetful, confused):
        for _ in range(2):  # each as a new agent would: nothing is left of the first
            session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
            await session.open()
            if not first_ids:
                with pytest.raises(OutcomeUnknown):
                    await session.execute("cont")
            else:
                assert await session.execute("query-status") == "fresh"
            await session.close()


@pytest.mark.parametrize("lines", [0, 1, 2])
async def test_a_peer_that_hangs_up_at_any_point_of_the_greeting_is_tried_again(tmp_path: Path, lines: int) -> None:
    async def hangs_up(connection: Connection) -> None:
        if lines:
            await connection.send(GREETING)
        if lines > 1:
            await connection.receive()
            await connection.send({"return": {}})

    async with monitor(tmp_path / "s", hangs_up, hangs_up, answers):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(OutcomeUnknown):
                    assert await session.execute("query-status") == "query-status"
                    break
        await session.close()


async def test_a_stale_error_in_the_negotiation_costs_one_more_try(tmp_path: Path) -> None:
    async def spoiled(connection: Connection) -> None:
        await connection.send(GREETING)
        await connection.receive()
        await connection.send({"error": {"class": "GenericError", "desc": "stale"}, "id": "old-1"})
        await connection.receive()

    async with monitor(tmp_path / "s", spoiled, answers):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        assert await session.execute("query-status") == "query-status"
        await session.close()


async def test_events_come_in_order_and_before_the_reply_that_they_precede(tmp_path: Path) -> None:
    async def eventful(connection: Connection) -> None:
        await connection.negotiate()
        command = await connection.receive()
        for name in ("STOP", "MIGRATION", "RESUME"):
            await connection.send({"event": name, "timestamp": {"seconds": 1, "microseconds": 2}})
        await connection.send({"return": {}, "id": command["id"]})
        await connection.receive()

    heard: list[str] = []
    async with monitor(tmp_path / "s", eventful):
        session = QmpSession(
            tmp_path / "s", timeout_s=PATIENCE_S, on_event=lambda message: heard.append(message["event"])
        )
        await session.open()
        await session.execute("cont")
        assert heard == ["STOP", "MIGRATION", "RESUME"]
        await session.close()


async def test_an_event_that_cannot_be_understood_does_not_cost_the_connection(tmp_path: Path) -> None:
    async def odd(connection: Connection) -> None:
        await connection.negotiate()
        await connection.send({"event": "MIGRATION", "timestamp": {"seconds": 1, "microseconds": 2}})
        command = await connection.receive()
        await connection.send({"return": "well", "id": command["id"]})
        await connection.receive()

    def fail(message: object) -> None:
        raise KeyError("status")

    async with monitor(tmp_path / "s", odd):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S, on_event=fail)
        await session.open()
        assert await session.execute("query-status") == "well"
        await session.close()


async def test_nobody_may_ask_before_the_state_was_read_and_each_new_connection_reads_it(tmp_path: Path) -> None:
    order: list[str] = []

    async def breaks_after_two(connection: Connection) -> None:
        await connection.negotiate()
        for _ in range(2):
            command = await connection.receive()
            order.append(command["execute"])
            await connection.send({"return": {}, "id": command["id"]})

    async def read_state(session: QmpSession) -> None:
        await session.barrier("query-migrate")

    async with monitor(tmp_path / "s", breaks_after_two):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S, on_connect=read_state)
        await session.open()
        await session.execute("one")
        await session.idle.wait()
        await session.execute("two")
        await session.close()
    assert order == ["query-migrate", "one", "query-migrate", "two"]


async def test_closing_amid_commands_ends_them_all(tmp_path: Path) -> None:
    async def deaf(connection: Connection) -> None:
        await connection.negotiate()
        await asyncio.Event().wait()

    async with monitor(tmp_path / "s", deaf):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        asked = [asyncio.create_task(session.execute("cont")) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await session.close()
            results = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(result) for result in results} == {OutcomeUnknown}


async def test_a_reply_of_200_kib_is_read(tmp_path: Path) -> None:
    async def long_winded(connection: Connection) -> None:
        await connection.negotiate()
        command = await connection.receive()
        await connection.send({"return": "x" * 200_000, "id": command["id"]})
        await connection.receive()

    async with monitor(tmp_path / "s", long_winded):
        session = QmpSession(tmp_path / "s", timeout_s=PATIENCE_S)
        await session.open()
        assert len(await session.execute("query-qmp-schema")) == 200_000
        await session.close()
