"""What the client's calls send and return, against a real server on loopback."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import Request, Response

from emp.client import Client
from emp.client.events import Event, parse
from emp.model.api import EvmCreate, WatchEvent
from emp.model.errors import BadInput, EmpError, NotFound, Unavailable, Unreachable
from tests.unit.test_cli_canned import COMPLETED, COPYING, ID, N1, VOL, WEB
from tests.unit.test_cli_pool import Controller, serving
from tests.unit.test_cli_run import POOL

Behaviour = Callable[[socket.socket], None]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


@pytest.fixture
def client(pool: Controller) -> Iterator[Client]:
    with Client.from_context(POOL) as client:
        yield client


# ------------------------------------------------------------------ nouns


def test_each_noun_returns_its_model(client: Client) -> None:
    assert client.nodes.get("n1") == N1
    assert (client.nodes.list().items, client.nodes.list().revision) == ((N1,), 41)
    assert client.evms.get("web") == WEB and client.evms.list().items == (WEB,)
    assert client.volumes.get("vol-1") == VOL and client.volumes.list().items == (VOL,)
    assert client.migrations.get(ID) == COMPLETED and client.migrations.list(evm="web").items == (COMPLETED,)
    assert client.nodes.cordon("n1").cordoned and not client.nodes.uncordon("n1").cordoned


def test_a_model_or_its_fields_are_sent(client: Client, pool: Controller) -> None:
    client.evms.create(EvmCreate(name="web", memory_bytes=1 << 30))
    client.evms.create({"name": "web", "memory_bytes": "1GiB"})
    sent = [body for request, body in pool.told if request == "POST /v1/evms"]
    assert sent[0]["memory_bytes"] == 1 << 30 and sent[1] == {"name": "web", "memory_bytes": "1GiB"}
    with pytest.raises(BadInput):
        client.evms.create({"name": object()})


def test_a_migration_is_followed_to_its_end(client: Client, pool: Controller) -> None:
    pool.push(COPYING, COMPLETED)
    assert client.migrations.start("web").id == ID
    assert list(client.migrations.events(ID)) == [COPYING, COMPLETED]


def test_requests_go_over_one_connection(client: Client, pool: Controller) -> None:
    peers = set()

    @pool.app.middleware("http")
    async def note(request, call_next):  # type: ignore[no-untyped-def]
        peers.add(request.client)
        return await call_next(request)

    for _ in range(3):
        client.evms.list()
    with pytest.raises(NotFound):
        client.evms.get("nope")
    client.evms.type("web", b"x")
    assert len(peers) == 1


def test_a_connection_that_the_controller_has_closed_is_not_used_again(client: Client, pool: Controller) -> None:
    client.evms.list()
    pool.stop()
    pool.start()
    client.evms.create({"name": "web"})  # over the old one it would be unknown whether it happened


def test_console_input_is_cut_into_what_the_controller_takes(client: Client, pool: Controller) -> None:
    data = bytes(range(256)) * 400
    client.evms.type("web", data)
    assert pool.typed == data
    assert len([request for request, _ in pool.told if request == "POST /v1/evms/web/console"]) == 4


# ------------------------------------------------------------------ watch


def test_watch_yields_changes_and_goes_on_after_a_restart(client: Client, pool: Controller) -> None:
    resumed: list[tuple[str | None, str]] = []
    change = WatchEvent(kind="put", key="/evms/web", revision=7, last=True, value={"a": 1})

    @pool.app.get("/v1/watch")
    def watch(request: Request) -> Response:
        resumed.append((request.headers.get("last-event-id"), request.url.query))
        first = f"id: 7\ndata: {change.model_dump_json()}\n\n"
        gone = f"event: error\ndata: {json.dumps(NotFound('that history is gone').as_dict())}\n\n"
        return Response(first if len(resumed) == 1 else gone, media_type="text/event-stream")

    breaks: list[EmpError | None] = []
    changes = client.watch("/evms/", since=5, on_break=breaks.append)
    assert next(changes) == change
    with pytest.raises(NotFound, match="history is gone"):
        next(changes)
    assert resumed == [(None, "prefix=%2Fevms%2F&from=5"), ("7", "prefix=%2Fevms%2F&from=5")]
    assert isinstance(breaks[0], Unavailable) and breaks[1] is None


def test_watch_gives_up_after_its_patience(client: Client, pool: Controller) -> None:
    pool.stop()
    with pytest.raises(Unreachable):
        next(client.watch("/evms/", patience_s=0))
    pool.start()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_wherever_the_stream_is_cut(size: int) -> None:
    text = ": hello\n\nid: 4\nevent: migration\ndata: one\ndata:two\n\n\ndata: é\r\n\r\nid: 9\n\ndata: cut off\n"
    data = text.encode()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(parse(pieces)) == [Event("4", "migration", "one\ntwo"), Event("", "message", "é")]
