"""The client of QEMU's guest agent against agents that are right, late, mute, or no agents at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from emp.agent import guest_clock
from emp.hypervisor.base import MachineGone, NoGuestAgent
from emp.hypervisor.qemu import guest_agent
from emp.hypervisor.qemu.guest_agent import set_clock
from emp.model.clock import GuestClock
from emp.model.errors import HypervisorError

MS = 1_000_000


@dataclass
class Peer:
    """A guest with an agent at ``path``, as QEMU shows it: one client after the other."""

    path: Path
    behind_ms: float = 0.0
    sets_late_ms: float = 0.0
    """``guest-set-time`` gets there only then"""
    refuses: dict[str, str] = field(default_factory=dict)
    """command -> the error that is answered; it is carried out all the same"""
    mute: set[str] = field(default_factory=set)
    left_over: bytes = b""
    """of an earlier client, said first"""
    says: Callable[[bytes], bytes] | None = None
    """in the place of everything else"""
    set_to: list[float] = field(default_factory=list)
    """by how much each order moved the clock, in ms"""
    clients: int = 0

    def now_ns(self) -> int:
        return time.time_ns() - int(self.behind_ms * MS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        writer.write(self.left_over)
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                writer.write(self.says(line) if self.says else await self.answer(line))
                await writer.drain()
        writer.close()

    async def answer(self, line: bytes) -> bytes:
        order = json.loads(line.rpartition(b"\xff")[2])
        command, arguments = order["execute"], order.get("arguments", {})
        if command in self.mute:
            return b""
        result: Any = {}
        match command:
            case "guest-sync-delimited":
                assert line.startswith(b"\xff"), "the agent may have half a line of another client"
                return b"\xff" + _line({"return": arguments["id"]})
            case "guest-get-time":
                result = self.now_ns()
            case "guest-set-time":
                await asyncio.sleep(self.sets_late_ms / 1000)
                self.set_to.append((arguments["time"] - self.now_ns()) / MS)
                self.behind_ms = (time.time_ns() - arguments["time"]) / MS
        if command in self.refuses:
            return _line({"error": {"class": "GenericError", "desc": self.refuses[command]}})
        return _line({"return": result})


def _line(answer: object) -> bytes:
    return json.dumps(answer).encode() + b"\n"


@pytest.fixture
async def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Peer]:
    for limit in ("SYNC_S", "ANSWER_S"):
        monkeypatch.setattr(guest_agent, limit, 0.2)
    made = Peer(tmp_path / "qga")
    server = await asyncio.start_unix_server(made.serve, str(made.path))
    try:
        yield made
    finally:
        server.close()
        await server.wait_closed()


async def test_a_clock_that_is_behind_is_set(peer: Peer) -> None:
    peer.behind_ms = 270.0
    clock = await set_clock(peer.path)
    assert clock.is_set
    assert clock.found_ms == pytest.approx(-270, abs=50)
    assert peer.set_to
    assert min(peer.set_to) > 0
    assert abs(peer.behind_ms) < 50
    assert clock.now_ms == pytest.approx(-peer.behind_ms, abs=50)


async def test_a_clock_that_is_right_is_left(peer: Peer) -> None:
    clock = await set_clock(peer.path)
    assert (peer.set_to, clock.is_set) == ([], False)


async def test_a_clock_that_is_ahead_never_goes_back(peer: Peer) -> None:
    peer.behind_ms = -400.0
    clock = await set_clock(peer.path)
    assert (peer.set_to, clock.is_set, clock.is_ahead, clock.is_right) == ([], False, True, False)
    assert clock.trouble is not None
    assert "never set back" in clock.trouble


async def test_a_clock_is_not_set_by_an_agent_slower_than_it_is_behind(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order could come so late that the time in it is over."""
    peer.behind_ms = 30.0

    async def slow(line: bytes) -> bytes:
        if b"get-time" in line:
            await asyncio.sleep(0.05)  # is how slow it is
        return await Peer.answer(peer, line)

    monkeypatch.setattr(peer, "answer", slow)
    clock = await set_clock(peer.path)
    assert (peer.set_to, clock.is_set, clock.is_right) == ([], False, False)
    assert clock.trouble is not None
    assert "ms to answer" in clock.trouble


async def test_an_agent_that_could_not_set_the_hardware_clock_has_set_the_other(peer: Peer) -> None:
    peer.behind_ms, peer.refuses = 270.0, {"guest-set-time": "hwclock failed"}
    clock = await set_clock(peer.path)
    assert clock.is_set
    assert clock.is_right


async def test_an_order_that_is_late_is_given_again(peer: Peer) -> None:
    peer.behind_ms, peer.sets_late_ms = 270.0, 100.0

    class Warm(list[float]):
        def append(self, moved: float) -> None:
            super().append(moved)
            peer.sets_late_ms = 0.0

    peer.set_to = Warm()
    clock = await set_clock(peer.path)
    assert len(peer.set_to) > 1
    assert clock.found_ms == pytest.approx(-270, abs=50)
    assert abs(peer.behind_ms) < 50


async def test_an_order_that_was_refused_is_said(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    peer.behind_ms, peer.refuses = 270.0, {"guest-set-time": "not me"}

    async def refused(line: bytes) -> bytes:
        before = peer.behind_ms
        answer = await Peer.answer(peer, line)
        peer.behind_ms = before
        return answer

    monkeypatch.setattr(peer, "answer", refused)
    clock = await set_clock(peer.path)
    assert (clock.is_set, clock.is_right) == (False, False)
    assert clock.trouble is not None
    assert "not me" in clock.trouble


async def test_an_agent_that_may_not_tell_the_time_is_no_absent_one(peer: Peer) -> None:
    peer.refuses = {"guest-get-time": "disabled"}
    with pytest.raises(HypervisorError, match=r"refuses guest-get-time: .*disabled") as caught:
        await set_clock(peer.path)
    assert not isinstance(caught.value, NoGuestAgent)


async def test_what_an_earlier_client_has_left_is_passed_over(peer: Peer) -> None:
    """Its answers, one that broke off, and one to its own sync."""
    peer.behind_ms = 270.0
    peer.left_over = b'{"return": 17}\nurn": 12}\n\xff{"return": 5}\n\xff[1]\n\xff\n'
    assert (await set_clock(peer.path)).is_set


@pytest.mark.parametrize("mute", ["guest-sync-delimited", "guest-get-time", "guest-set-time"])
async def test_a_guest_that_does_not_answer_costs_a_moment(
    peer: Peer, mute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_agent, "SET_S", 0.2)
    peer.behind_ms, peer.mute = 270.0, {mute}
    with pytest.raises(NoGuestAgent, match=f"no agent in the guest answers {mute}"):
        await set_clock(peer.path)
    peer.mute = set()
    assert (await set_clock(peer.path)).is_set  # the next one is in sync
    assert peer.clients == 2


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * 10,
        b"login: \n",
        b"[" * 30_000 + b"\n",
        b"\xff" + b"[" * 30_000 + b"\n",
        b"x" * 100_000,
        b'\xff{"return": 3}\n',
        b'\xff{"return": {}}\n\xff7\n\xffnull\n',
    ],
    ids=range(7),
)
async def test_a_guest_that_says_anything_else_has_no_agent(peer: Peer, said: bytes) -> None:
    peer.says = lambda line: said
    with pytest.raises(NoGuestAgent):
        await set_clock(peer.path)


@pytest.mark.parametrize("time_said", ["null", "true", "-5", "1e400", "9" * 400, "9" * 5000, '"now"', "{}"])
async def test_a_time_that_is_none_is_none(peer: Peer, time_said: str) -> None:
    def says(line: bytes) -> bytes:
        if b"sync" in line:
            number = json.loads(line.rpartition(b"\xff")[2])["arguments"]["id"]
            return b"\xff" + _line({"return": number})
        return f'{{"return": {time_said}}}\n'.encode()

    peer.says = says
    with pytest.raises(NoGuestAgent):
        await set_clock(peer.path)


async def test_the_end_of_the_machine_is_no_agent(peer: Peer) -> None:
    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    ending = peer.path.with_name("ending")
    async with await asyncio.start_unix_server(end, str(ending)):
        with pytest.raises(NoGuestAgent, match="broke off"):
            await set_clock(ending)


async def test_a_machine_of_an_older_release_has_no_channel(tmp_path: Path) -> None:
    with pytest.raises(NoGuestAgent, match="no channel"):
        await set_clock(tmp_path / "qga")


# -- how an agent of a node goes about it


class Machine:
    """Answers with what it is given, in order; the last goes on."""

    name = "web"

    def __init__(self, *answers: GuestClock | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def set_clock(self) -> GuestClock:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


ABSENT = NoGuestAgent("no agent in the guest answers guest-sync-delimited")
RIGHT = GuestClock(found_ms=-0.3, now_ms=-0.3, error_ms=0.5)
VAGUE = GuestClock(found_ms=-31.0, now_ms=-3.0, error_ms=12.0, is_set=True)
AHEAD = GuestClock(found_ms=40.0, now_ms=40.0, error_ms=0.5, trouble="it is ahead")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_clock, "AGAIN_S", 0.01)


async def told_by(machine: Any, *, patience_s: float = 30.0, times: int = 1000) -> list[GuestClock]:
    """Return what was told; ``times``: how often it may go on."""
    told: list[GuestClock] = []
    turns = iter(range(times))
    await guest_clock.set_right(machine, lambda: next(turns, None) is not None, told.append, patience_s=patience_s)
    return told


async def test_an_agent_is_waited_for_until_the_guest_has_booted() -> None:
    machine = Machine(ABSENT, ABSENT, RIGHT)
    *earlier, told = await told_by(machine)
    assert (told, machine.asked) == (RIGHT, 3)
    assert [each.trouble for each in earlier] == [ABSENT.message] * 2


async def test_a_clock_that_is_not_right_yet_is_looked_at_again() -> None:
    told = await told_by(Machine(VAGUE, RIGHT))
    assert told == [VAGUE, RIGHT.model_copy(update={"found_ms": -31.0, "is_set": True})]
    assert told[-1].in_words == ("was 31 ms behind, set; now within 0.8 ms of its node's",)


async def test_a_clock_that_is_ahead_is_left_and_said() -> None:
    machine = Machine(AHEAD)
    assert await told_by(machine) == [AHEAD]
    assert machine.asked == 1


async def test_a_guest_without_an_agent_is_not_asked_for_ever() -> None:
    told = (await told_by(Machine(ABSENT), patience_s=0.05))[-1]
    assert not told.is_right
    assert told.in_words == (
        "not known: no agent in the guest answers guest-sync-delimited",
        "without an agent it is behind by each pause until its NTP corrects it",
    )


async def test_an_agent_that_refuses_is_not_asked_again() -> None:
    machine = Machine(HypervisorError("the guest's agent refuses guest-get-time"))
    (told,) = await told_by(machine)
    assert (machine.asked, told.is_right) == (1, False)


async def test_nothing_is_asked_of_a_guest_that_stands_or_leaves() -> None:
    machine = Machine(ABSENT)
    assert await told_by(machine, times=0) == []
    assert machine.asked == 0
    await told_by(machine, times=2)
    assert machine.asked == 2


async def test_a_machine_that_has_ended_is_let_go_of() -> None:
    assert await told_by(Machine(MachineGone("the machine web has ended"))) == []
