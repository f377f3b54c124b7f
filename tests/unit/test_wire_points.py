"""Fault points of an API, on a real server: an order delivered twice, lost, or carried out without an answer."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from fastapi import APIRouter, FastAPI

from emp import faults
from emp.wire.points import route_class
from emp.wire.serve import Listener, Server

Calls = list[str]


@pytest.fixture
async def calls(tmp_path: Path) -> AsyncIterator[Calls]:
    """What the daemon behind ``tmp_path/socket`` was asked to do."""
    done: Calls = []
    app, router = FastAPI(), APIRouter(prefix="/v1", route_class=route_class("daemon"))

    @router.post("/order/{name}")
    async def order(name: str) -> dict[str, int]:
        done.append(name)
        return {"orders": len(done)}

    app.include_router(router)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        async with Server(app, [Listener(listening, None)], pool="p"):
            yield done


async def post(directory: Path, name: str) -> httpx2.Response:
    transport = httpx2.AsyncHTTPTransport(uds=str(directory / "socket"))
    async with httpx2.AsyncClient(transport=transport, base_url="http://daemon") as client:
        return await client.post(f"/v1/order/{name}")


async def test_off_it_is_an_ordinary_route(tmp_path: Path, calls: Calls) -> None:
    assert (await post(tmp_path, "a")).json() == {"orders": 1}


async def test_an_order_is_delivered_twice_or_lost_or_its_reply_is(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tmp_path / "faults"
    monkeypatch.setattr(faults, "board", faults.Board(points))
    faults.arm(points, "daemon.order.received", "dup")
    assert (await post(tmp_path, "twice")).json() == {"orders": 2}
    faults.arm(points, "daemon.order.received", "drop")
    with pytest.raises(httpx2.RemoteProtocolError):
        await post(tmp_path, "lost")
    faults.arm(points, "daemon.order.answered", "drop")
    with pytest.raises(httpx2.RemoteProtocolError):
        await post(tmp_path, "unanswered")
    assert calls == ["twice", "twice", "unanswered"]
    assert [hit.action for hit in faults.hits(points)] == ["dup", "-", "drop", "-", "-", "drop"]
