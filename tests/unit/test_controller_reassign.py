"""The reassignment of one migration's addresses: refused, tried again, told to the source, and made once."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from emp.addresses.base import AddressMover
from emp.controller import reassign
from emp.controller.agents import Agents
from emp.controller.nodes import Nodes
from emp.controller.reach import Reach
from emp.controller.reassign import Reassignment
from emp.model.addresses import AddressFacts, Assigned
from emp.model.errors import EmpError, NotFound, OutcomeUnknown, Refused, Unreachable
from emp.model.migration import Migration
from emp.model.orders import AddressMovedOrder
from tests.fakes.values import a_spec


class World:
    """A cloud, and the source's agent; ``refusing`` and ``deaf`` are the errors that each meets first."""

    def __init__(self) -> None:
        self.refusing: list[EmpError] = []
        self.deaf: list[EmpError] = []
        self.down = False
        self.at = "n1"
        self.insisted: list[str] = []
        self.told: list[tuple[str, AddressMovedOrder]] = []
        self.lost: tuple[str, ...] = ()
        self.said: list[str | None] = []
        self.reassignment: Reassignment

    # the cloud
    async def assign(self, addresses: tuple[str, ...], *, node: str, insist: bool = False) -> Assigned:
        if self.refusing:
            raise self.refusing.pop(0)
        self.at = node
        if insist:
            self.insisted.append(node)
        return Assigned(took_s=2.0, calls=1)

    def nobodys(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        return self.lost

    async def release(self, addresses: tuple[str, ...]) -> None:
        self.at = ""

    async def facts(self, addresses: tuple[str, ...]) -> AddressFacts:
        raise Unreachable("EC2 is out of reach")

    async def aclose(self) -> None:
        """Nothing is open."""

    # nodes and agents
    def find(self, name: str) -> Any:
        return type("Node", (), {"ready": not self.down})()

    def of(self, _: Any) -> Any:
        return self

    async def address_moved(self, migration: str, order: AddressMovedOrder) -> None:
        assert self.at == "n2", "it is told only once it is so"
        if self.deaf:
            raise self.deaf.pop(0)
        self.told.append((migration, order))

    async def say(self) -> None:
        self.said.append(self.reassignment.alarm)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(reassign, "FIRST_PAUSE_S", 0.0)
    made = World()
    made.reassignment = _of(made, Reach(cast("AddressMover", made)))
    return made


def _of(world: World, reach: Reach) -> Reassignment:
    live = Migration(id="m-1", evm="web", source="n1", target="n2", epoch_target=5, epoch_source=6)
    return Reassignment(live, reach, cast("Agents", world), cast("Nodes", world), world.say)


async def test_the_source_is_told_once_the_addresses_are_the_targets(world: World) -> None:
    await asyncio.gather(*(world.reassignment.finish(a_spec()) for _ in range(3)))
    assert len(world.told) == 1, "asked three times it is done once"
    await world.reassignment.finish(a_spec(), tell_again=True)
    assert len(world.told) == 2, "as an agent that was restarted must hear it"
    made = world.reassignment.made
    assert made is not None
    assert (made.addresses, made.calls, made.tries) == (len(a_spec().addresses), 1, 1)
    assert world.said == [None]


@pytest.mark.parametrize("error", [Refused("no slot"), Unreachable("no way"), OutcomeUnknown("not yet"), NotFound("?")])
async def test_what_is_refused_is_told_to_people_and_tried_again(world: World, error: EmpError) -> None:
    world.refusing = [error, error]
    await world.reassignment.finish(a_spec())
    first, second, last = world.said
    assert first is not None
    assert "still come to n1, which forwards them" in first
    assert error.message in str(second)
    assert last is None
    assert world.reassignment.made is not None
    assert world.reassignment.made.tries == 3


async def test_of_an_address_that_is_nobodys_it_is_not_said_that_the_source_forwards(world: World) -> None:
    world.refusing = [Refused("no slot")]
    world.lost = ("fd77::1:0:0:4",)
    await world.reassignment.finish(a_spec())
    first = str(world.said[0])
    assert first.startswith("packets for fd77::1:0:0:4 of web are lost, as no interface has the address; ")
    assert "those for addresses that n1 still has come to it" in first


async def test_a_source_that_does_not_answer_is_told_again(world: World) -> None:
    world.deaf = [OutcomeUnknown("lost"), Unreachable("no way")]
    await world.reassignment.finish(a_spec())
    assert len(world.told) == 1


@pytest.mark.parametrize("how", ["down", "forgotten"])
async def test_a_source_that_forwards_nothing_is_not_waited_for(world: World, how: str) -> None:
    if how == "down":
        world.down = True
    else:
        world.deaf = [NotFound("no such migration")]
    await world.reassignment.finish(a_spec())
    assert (world.told, world.at) == ([], "n2")


async def test_on_the_way_back_it_is_insisted(world: World) -> None:
    await world.reassignment.bring_home(a_spec())
    assert (world.at, world.insisted) == ("n1", ["n1"])


async def test_where_nodes_share_a_segment_there_is_nothing_to_do(world: World) -> None:
    plain = _of(world, Reach(None))
    assert plain.is_over
    await plain.finish(a_spec())
    await plain.bring_home(a_spec())
    assert (world.told, world.said, plain.made) == ([], [], None)
    assert await Reach(None).facts(a_spec()) is None


async def test_a_cloud_that_cannot_be_asked_is_a_fact(world: World) -> None:
    facts = await Reach(cast("AddressMover", world)).facts(a_spec())
    assert facts is not None
    assert facts.problem == "EC2 is out of reach"
