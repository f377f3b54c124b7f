"""The move of a volume that one node alone can have: every order that is refused or lost, and where it goes on."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from emp.controller import moves
from emp.controller.agents import Agents
from emp.controller.moves import Moves
from emp.controller.nodes import Nodes
from emp.controller.volumes import Volumes
from emp.model.errors import Conflict, EmpError, Forbidden, NotFound, OutcomeUnknown, Refused, StaleEpoch, Unreachable
from emp.model.migration import Migration, MoveStep, Policy, VolumeOrder
from emp.model.orders import GoOnOrder, HoldOrder, LendOrder, Lent, Relayed, TakeBackOrder, VolumeGrant
from emp.model.volume import Attachment, NbdEndpoint, Volume, VolumeType
from tests.fakes.volumes import FakeVolumes

VOLUME = "vol-1"
OLD, TARGET_EPOCH = 3, 5


class World:
    """A volume, the relays of both ends, and what is refused: ``refusing`` maps a step to the errors that it meets."""

    def __init__(self) -> None:
        self.attachments = [Attachment(volume=VOLUME, node="n1", epoch=OLD)]
        self.lent = True
        self.borrowed = True
        self.held = False
        self.local = False
        self.done: list[str] = []
        self.expected: list[tuple[str, int]] = []
        self.refusing: dict[str, list[EmpError]] = {}
        self.down: set[str] = set()
        self.ended = asyncio.Event()
        """the EVM is, at the target"""
        self.unseen = 0
        """how often the service does not know the volume"""

    def step(self, name: str) -> None:
        if self.refusing.get(name):
            error = self.refusing[name].pop(0)
            self.done.append(f"{name} refused")
            raise error
        self.done.append(name)

    # volumes
    async def look(self, volume: str) -> Volume:
        if self.unseen > 0:
            self.unseen -= 1
            raise NotFound(f"{volume} does not exist")
        return Volume(
            id=volume, type=VolumeType.GP3, size_bytes=1 << 30, serial="s", attachments=tuple(self.attachments)
        )

    async def release(self, _: tuple[str, ...], *, node: str = "all", **__: Any) -> None:
        self.step(f"detach {node}")
        assert not self.lent or node in self.down, "a volume is detached while its relay has it open"
        assert self.held or not self.borrowed, "a volume is detached under the guest's I/O"
        self.attachments = [a for a in self.attachments if node not in (a.node, "all")]

    async def expect(self, _: str, *, node: str, epoch: int) -> None:
        assert not self.held, "the guest's I/O waits for what could have been done before"
        self.expected.append((node, epoch))

    async def attach(self, _: tuple[str, ...], *, node: str, epoch: int) -> tuple[VolumeGrant, ...]:
        self.step(f"attach {node}")
        if others := [a.node for a in self.attachments if a.node != node]:
            raise Conflict(f"attached to {others}")
        self.attachments = [Attachment(volume=VOLUME, node=node, epoch=epoch)]
        return (VolumeGrant(volume=await self.look(VOLUME), attachment=self.attachments[0]),)

    # nodes and agents
    def get(self, name: str) -> str:
        return name

    def find(self, name: str) -> Any:
        return type("Node", (), {"ready": name not in self.down})()

    def of(self, name: str) -> Agent:
        return Agent(self, name)


class Agent:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name

    def _there(self) -> None:
        if self.name in self.world.down:
            raise Unreachable(f"{self.name} is off")

    async def lend(self, order: LendOrder) -> Lent:
        self._there()
        self.world.step("lend")
        assert order.given, "the target owns the EVM"
        self.world.lent = True
        return Lent(endpoints={VOLUME: NbdEndpoint(host="10.0.0.1", port=1, export="e", tls_hostname="agent-n1")})

    async def take_back(self, _: str, __: TakeBackOrder) -> None:
        self._there()
        self.world.step("take back")
        self.world.lent = False

    async def hold(self, _: str, order: HoldOrder) -> Relayed:
        try:
            self.world.step("hold")
        except Unreachable:  # it is held all the same
            self.world.held = True
            raise
        if not self.world.borrowed:
            raise NotFound("not relayed here")
        self.world.held = True
        if "n1" in self.world.down:
            raise Unreachable("what is on its way is not answered")
        return Relayed(
            volume=order.volume, is_local=False, is_flushed=True, written_bytes=4096, round_trips=2, mean_ms=1
        )

    async def go_on(self, _: str, order: GoOnOrder) -> Relayed:
        self.world.step("go on" if order.grant.relay is None else "go on relayed")
        assert order.grant.relay is None or self.world.lent
        self.world.held = False
        if order.grant.relay is None:
            self.world.borrowed, self.world.local = False, True
        return Relayed(volume=VOLUME, is_local=order.grant.relay is None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(moves, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(moves, "LONGEST_PAUSE_S", 0.001)
    return World()


def moving(
    world: World, shown: list[dict[str, str]] | None = None, steps: list[str] | None = None, **policy: Any
) -> Moves:
    live = Migration(
        id="m-1",
        evm="web",
        source="n1",
        target="n2",
        epoch_target=TARGET_EPOCH,
        epoch_source=4,
        policy=Policy(**policy),
    )

    async def say() -> None:
        if shown is not None:
            shown.append(dict(made.alarms))

    def at(_: str, step: MoveStep | None) -> None:
        if steps is not None:
            steps.append(step.value if step else "over")

    async def until_ended() -> None:
        await world.ended.wait()

    made = Moves(live, cast(Volumes, world), cast(Agents, world), cast(Nodes, world), say, at, until_ended)
    return made


async def finished(made: Moves) -> None:
    async with asyncio.timeout(5):
        await made.finish((VOLUME,))


def at_the_target(world: World) -> None:
    assert world.local and not world.lent
    assert [(a.node, a.epoch) for a in world.attachments] == [("n2", TARGET_EPOCH)]


async def test_held_taken_back_detached_attached_and_let_go(world: World) -> None:
    steps: list[str] = []
    made = moving(world, steps=steps)
    await finished(made)
    assert world.done == ["hold", "take back", "detach n1", "attach n2", "go on"]
    assert world.expected == [("n2", TARGET_EPOCH)]
    assert steps == ["relayed", "hold", "detach", "attach", "land", "over"]
    at_the_target(world)
    report = made.made[VOLUME]
    assert (report.tries, report.written_bytes, report.mean_ms) == (1, 4096, 1)
    assert report.held_ms is not None and report.detach_s is not None and report.attach_s is not None


async def test_what_cannot_be_done_ahead_is_left_to_attaching(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeVolumes()
    volumes = Volumes(cast(Any, None), driver, cast(Any, None))
    driver.failing["expect"] = Forbidden("no permission")
    await volumes.expect(VOLUME, node="n2", epoch=TARGET_EPOCH)
    assert "vol-1 is not made ready for n2: no permission" in caplog.text
    del driver.failing["expect"]
    await volumes.expect(VOLUME, node="n2", epoch=TARGET_EPOCH)
    assert driver.expected == [(VOLUME, "n2", TARGET_EPOCH)]


async def test_a_detach_that_is_refused_leaves_it_relayed_and_is_tried_again(world: World) -> None:
    world.refusing["detach n1"] = [Forbidden("no permission")]
    shown: list[dict[str, str]] = []
    seen: list[str] = []
    await finished(moving(world, shown, seen))
    steps = ["hold", "take back", "detach n1 refused", "lend", "go on relayed"]
    assert seen[:4] == ["relayed", "hold", "detach", "relayed"], "its I/O goes on until the next try"
    assert world.done == [*steps, "hold", "take back", "detach n1", "attach n2", "go on"]
    at_the_target(world)
    assert "stays relayed by n1" in shown[0][VOLUME] and "no permission" in shown[0][VOLUME]
    assert shown[-1] == {}, "the alarm is over"


async def test_an_attach_that_is_refused_brings_it_back_to_the_source(world: World) -> None:
    world.refusing["attach n2"] = [Refused("n2 has no room")]
    await finished(moving(world))
    back = ["attach n2 refused", "attach n1", "lend", "go on relayed"]
    assert world.done == [
        "hold",
        "take back",
        "detach n1",
        *back,
        *["hold", "take back", "detach n1"],
        "attach n2",
        "go on",
    ]
    at_the_target(world)


async def test_a_source_that_must_be_empty_gets_nothing_back(world: World) -> None:
    world.refusing["attach n2"] = [Refused("n2 has no room"), Refused("n2 has no room")]
    shown: list[dict[str, str]] = []
    await finished(moving(world, shown, source_must_be_empty=True))
    assert "lend" not in world.done and "attach n1" not in world.done
    assert "waits for n2" in shown[0][VOLUME]
    at_the_target(world)


async def test_an_order_that_may_still_be_carried_out_is_not_undone(world: World) -> None:
    world.refusing["detach n1"] = [OutcomeUnknown("it is still detaching")]
    await finished(moving(world))
    assert "lend" not in world.done
    at_the_target(world)


async def test_a_dead_source_is_not_asked_and_loses_the_volume(world: World) -> None:
    world.down.add("n1")
    await finished(moving(world))
    assert world.done == ["hold", "detach n1", "attach n2", "go on"]
    assert [a.node for a in world.attachments] == ["n2"]


@pytest.mark.parametrize("where", ["n2", None])
async def test_a_controller_that_was_killed_goes_on_from_where_the_volume_is(world: World, where: str | None) -> None:
    world.lent, world.held = False, True
    world.attachments = [Attachment(volume=VOLUME, node=where, epoch=TARGET_EPOCH)] if where else []
    await finished(moving(world))
    assert world.done == ["attach n2", "go on"]
    at_the_target(world)


async def test_a_relay_that_has_ended_already_is_no_hindrance(world: World) -> None:
    world.borrowed = False
    await finished(moving(world))
    at_the_target(world)


async def test_an_evm_that_is_gone_from_the_target_needs_no_volume(world: World) -> None:
    world.refusing["go on"] = [NotFound("no such EVM here")]
    steps: list[str] = []
    made = moving(world, steps=steps)
    await finished(made)
    assert (made.made, steps[-1]) == ({}, "over")


@pytest.mark.parametrize("refused", [0, 1000])
async def test_an_evm_that_has_ended_leaves_its_volume_where_its_service_lets_it_be(world: World, refused: int) -> None:
    """Its relays are gone with it; one try to detach, and the migration is not held up by a refusal."""
    world.refusing["detach n1"] = [Forbidden("no permission")] * 1000
    world.refusing["detach all"] = [Forbidden("no permission")] * refused
    steps: list[str] = []
    made = moving(world, steps=steps)

    async def end() -> None:
        assert "stays relayed by n1" in made.alarms[VOLUME]
        world.borrowed, world.held = False, False
        world.ended.set()

    made.say = end
    await finished(made)
    assert (made.left, made.made, made.alarms, steps[-1]) == ({VOLUME}, {}, {}, "over")
    assert not world.lent
    assert [a.node for a in world.attachments] == (["n1"] if refused else [])


async def test_a_guest_that_stands_uses_nothing_by_way_of_the_source(world: World) -> None:
    steps: list[str] = []
    await finished(moving(world, steps=steps, volume_order=VolumeOrder.CLASSIC))
    assert steps == ["hold", "detach", "attach", "land", "over"]


async def test_a_volume_that_the_service_does_not_know_for_a_while_is_moved_all_the_same(world: World) -> None:
    world.unseen = 3
    await finished(moving(world))
    at_the_target(world)


async def test_a_volume_that_was_deleted_is_told_of_and_holds_nothing_up(world: World) -> None:
    world.unseen = 1000
    shown: list[dict[str, str]] = []
    made = moving(world, shown)
    await finished(made)
    assert made.made == {} and "is gone" in shown[-1][VOLUME]


async def test_a_rescue_in_the_classic_order_brings_home_what_had_left(world: World) -> None:
    world.attachments = []  # the target's is detached by then
    await moving(world, volume_order="classic").bring_home((VOLUME,))
    assert world.done == ["attach n1", "go on"]
    assert [(a.node, a.epoch) for a in world.attachments] == [("n1", 4)]


@pytest.mark.parametrize("policy", ["classic", "resume-first"])
async def test_what_has_never_left_stays_as_it_is(world: World, policy: str) -> None:
    await moving(world, volume_order=policy).bring_home((VOLUME,))
    assert world.done == []


async def test_a_move_that_takes_long_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "ALARM_S", 0.01)
    shown: list[dict[str, str]] = []
    told, release = asyncio.Event(), world.release

    async def later(*volumes: Any, **where: Any) -> None:
        await told.wait()
        await release(*volumes, **where)

    monkeypatch.setattr(world, "release", later)
    made = moving(world, shown)
    say = made.say

    async def tell() -> None:
        await say()
        told.set()

    made.say = tell
    await finished(made)
    assert "on its way to n2" in shown[0][VOLUME]
    at_the_target(world)


async def test_what_is_lent_is_served_as_it_is_attached(world: World) -> None:
    with pytest.raises(AssertionError, match="owns the EVM"):
        await moving(world).lend((VOLUME,))  # the fake lends behind the commit alone
    world.attachments = []
    with pytest.raises(NotFound, match="not attached to n1"):
        await moving(world).lend((VOLUME,))


async def test_a_volume_that_a_newer_owner_has_is_moved_no_more(world: World) -> None:
    world.refusing["attach n2"] = [StaleEpoch("it is fenced: epoch 5 is older than 7")]
    made = moving(world)
    await finished(made)
    assert made.made == {} and "lend" not in world.done


async def test_a_source_that_must_be_empty_and_has_lost_its_relay_is_not_waited_for(world: World) -> None:
    world.refusing["hold"] = [Unreachable("what is on its way is not answered")]
    await finished(moving(world, source_must_be_empty=True))
    assert world.done == ["hold refused", "take back", "detach n1", "attach n2", "go on"]
    at_the_target(world)
