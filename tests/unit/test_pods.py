"""How podman's answer in a guest is read: whole, or told to be something else."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from typing import Any, cast

import pytest

from emp.lab import pods
from emp.model.errors import Unreachable

TOLD = {
    "Name": "web-0-http",
    "Id": "c1",
    "Pod": "p1",
    "RestartCount": 1,
    "State": {"Pid": 300, "StartedAt": "2000-01-01T00:00:00Z", "Status": "running"},
}


@contextmanager
def answered_with(monkeypatch: pytest.MonkeyPatch, *pieces: bytes, endless: bool = False) -> Iterator[None]:
    """Give one connection to the guest's port these pieces; again and again, until it is closed, if ``endless``."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(pods, "PORT", server.getsockname()[1])
        monkeypatch.setattr(pods, "socket_in", lambda topology, kind: socket.socket(socket.AF_INET, kind))

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):
                for piece in repeat(pieces[0]) if endless else pieces:
                    connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def look() -> dict[str, pods.Container]:
    return pods.containers(cast(Any, None), "127.0.0.1")


def test_each_container_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps([TOLD]).encode()
    with answered_with(monkeypatch, text[:20], text[20:]):
        told = look()
    assert told == {"web-0-http": pods.Container("web-0-http", "c1", "p1", 300, "2000-01-01T00:00:00Z", 1)}


def test_an_answer_that_is_cut_off_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps([TOLD]).encode()
    with answered_with(monkeypatch, text[:-1]), pytest.raises(Unreachable, match="does not tell"):
        look()


def test_data_without_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        answered_with(monkeypatch, bytes(65536), endless=True),
        pytest.raises(Unreachable, match="more than 1048576 bytes at port"),
    ):
        look()
