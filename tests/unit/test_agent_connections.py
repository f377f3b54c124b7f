"""What a source tells its target of tracked connections, and when."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any, cast

import pytest

from emp.agent.addresses import Addresses
from emp.agent.connections import Taker, Teller
from emp.host import conntrack
from emp.host.conntrack import Connection
from emp.model.errors import CommandFailed

EVM = "10.77.1.1"


class Usable:
    usable = frozenset({EVM})


class Ground:
    """A kernel that tracks ``known``, and the link's other end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: list[Connection] = []
        self.sent: list[list[str]] = []
        self.removed: list[Connection] = []
        monkeypatch.setattr(conntrack, "read", lambda addresses: list(self.known))
        monkeypatch.setattr(conntrack, "remove", self.removed.extend)
        self.teller = Teller(cast(Addresses, Usable()), self.send)

    async def send(self, message: dict[str, Any]) -> None:
        assert message["type"] == "tracked"
        self.sent.append(message["connections"])

    def told(self) -> list[str]:
        told, self.sent = [one for some in self.sent for one in some], []
        return told


@pytest.fixture
def ground(monkeypatch: pytest.MonkeyPatch) -> Ground:
    return Ground(monkeypatch)


def connection(port: int, *, state: bytes = b"new", timeout_s: int = 100) -> Connection:
    return Connection(2, port.to_bytes(2, "big"), None, state, timeout_s)


def text(*connections: Connection) -> list[str]:
    return [base64.b64encode(one.wire).decode() for one in connections]


async def test_each_look_tells_what_is_new_or_has_changed(ground: Ground) -> None:
    first, second = connection(1), connection(2)
    ground.known = [first]
    await ground.teller.tell()
    assert ground.told() == text(first)
    ground.known = [first, second]
    await ground.teller.tell()
    assert ground.told() == text(second)
    ground.known = [replace(first, state=b"established"), replace(second, timeout_s=99)]
    await ground.teller.tell()
    assert ground.told() == text(ground.known[0])
    assert ground.teller.count == 2


async def test_a_connection_that_has_ended_is_carried_no_longer(ground: Ground) -> None:
    """Or a brownout of many short ones would end with a report of all of them, and their memory."""
    ground.known = [connection(1), connection(2)]
    await ground.teller.tell()
    ground.known = [connection(2)]
    await ground.teller.tell()
    assert ground.teller.count == 1
    await ground.teller.forget()
    assert ground.removed == [connection(2)]


async def test_what_the_target_is_about_to_forget_is_told_again(ground: Ground) -> None:
    ground.known = [connection(1, timeout_s=0)]
    await ground.teller.tell()
    await ground.teller.tell()
    assert ground.told() == 2 * text(connection(1, timeout_s=0))


async def test_a_new_link_is_told_all(ground: Ground) -> None:
    ground.known = [connection(1)]
    await ground.teller.tell()
    ground.teller.again()
    await ground.teller.tell()
    assert ground.told() == 2 * text(connection(1))


async def test_a_thousand_connections_come_in_several_messages(ground: Ground) -> None:
    ground.known = [connection(port) for port in range(1000)]
    await ground.teller.tell()
    assert [len(some) for some in ground.sent] == [200] * 5
    assert ground.told() == text(*ground.known)


async def test_what_cannot_be_read_is_no_reason_not_to_move(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: object) -> list[Connection]:
        raise CommandFailed("netlink says no")

    monkeypatch.setattr(conntrack, "read", refused)
    await ground.teller.tell()
    assert ground.told() == []
    assert "does not move: netlink says no" in caplog.text


async def test_only_what_was_carried_is_forgotten(ground: Ground) -> None:
    ground.known = [connection(1)]
    await ground.teller.tell()
    ground.known = [connection(1), connection(2)]
    await ground.teller.forget()
    assert ground.removed == [connection(1)]


async def test_a_target_takes_no_nonsense_and_undoes_what_it_took(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[Connection] = []

    def add(connections: list[Connection]) -> int:
        added.extend(connections)
        return len(connections)

    monkeypatch.setattr(conntrack, "add", add)
    monkeypatch.setattr(conntrack, "parse", lambda wire, addresses: connection(1) if wire == b"one" else None)
    taker = Taker(cast(Addresses, Usable()))
    await taker.take([base64.b64encode(b"one").decode(), "!", None, 7, base64.b64encode(b"other").decode()])
    assert added == [connection(1)]
    await taker.forget()
    assert ground.removed == [connection(1)]
