"""What an agent does with relays when orders come late, at once, or twice; and with those that nobody could hold."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from emp.agent.adoption import Adoption
from emp.agent.gate import Gate
from emp.agent.journal import Journal
from emp.agent.lending import Lending
from emp.agent.relays import Relays, Side
from emp.agent.residents import Residents
from emp.agent.roles import Roles
from emp.migration.records import Record, RecordKind
from emp.model.errors import Conflict, NotFound, StaleEpoch, Unavailable, Unreachable
from emp.model.evm import EvmState
from emp.model.orders import GoOnOrder, HoldOrder, LendOrder, TakeBackOrder, VolumeGrant
from emp.model.volume import Attachment, NbdEndpoint, Volume, VolumeType
from emp.volumes.base import RelayState

VOLUME = Volume(id="vol-1", type=VolumeType.GP3, size_bytes=1 << 30, serial="s")
LENDER, OWN = (NbdEndpoint(host=host, port=1, export="e", tls_hostname="x") for host in ("10.0.0.1", "10.0.0.9"))
BORROWED = VolumeGrant(volume=VOLUME, relay=LENDER)
LOCAL = VolumeGrant(volume=VOLUME, attachment=Attachment(volume=VOLUME.id, node="n2", epoch=5, endpoint=OWN))
K = RecordKind


class Driver:
    """Relays without a process. ``reached``: what answers."""

    def __init__(self) -> None:
        self.relays: dict[str, Any] = {}
        self.reached = {LENDER.host, OWN.host}
        self.making, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        self.opened: list[str] = []

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def names(self) -> tuple[str, ...]:
        return tuple(self.relays)

    async def _make(self, name: str, upstream: NbdEndpoint) -> None:
        self.making.set()
        await self.go.wait()
        figures = {"is_flushed": False, "held_since_s": None, "read_bytes": 0, "write_bytes": 0}
        trips = SimpleNamespace(count=0)
        self.relays[name] = SimpleNamespace(state=RelayState.RUNNING, upstream=upstream, round_trip=trips, **figures)

    async def serve(self, name: str, *, source: NbdEndpoint, **_: Any) -> NbdEndpoint:
        await self._make(name, source)
        return LENDER

    async def dial(self, name: str, *, upstream: NbdEndpoint, **_: Any) -> Path:
        await self._make(name, upstream)
        return Path("/run/web") / name

    async def open(self, name: str) -> Any:
        self.opened.append(name)
        return self.relays[name]

    async def hold(self, name: str, *, within_s: float) -> Any:
        self.relays[name].state = RelayState.HELD
        if self.relays[name].upstream.host not in self.reached:
            raise Unreachable("what is on its way is not answered")
        return self.relays[name]

    async def switch(self, name: str, source: NbdEndpoint) -> Any:
        relay = self.relays[name]
        if relay.state is not RelayState.HELD:
            if relay.upstream == source:
                return relay
            raise Conflict("the relay is not held")
        relay.upstream, relay.state = source, RelayState.RUNNING
        return relay

    async def status(self, name: str) -> Any:
        return self.relays[name]

    async def end(self, name: str) -> None:
        self.relays.pop(name, None)


async def _source(grant: VolumeGrant, **_: Any) -> NbdEndpoint:
    assert isinstance(grant.endpoint, NbdEndpoint)
    return grant.endpoint


@pytest.fixture
async def driver() -> Driver:
    return Driver()


@pytest.fixture
def relays(tmp_path: Path, driver: Driver) -> Relays:
    return Relays(cast(Any, driver), cast(Any, SimpleNamespace(source=_source)), tmp_path / "relays.json")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.open(tmp_path / "journal")


@pytest.fixture
def landed() -> list[str]:
    return []


@pytest.fixture
def gate() -> Gate:
    made = Gate()
    made.starting = None
    return made


@pytest.fixture
def agent(relays: Relays, journal: Journal, gate: Gate, landed: list[str]) -> Lending:
    async def land(evm: str, _: VolumeGrant) -> None:
        landed.append(evm)

    residents = SimpleNamespace(get=lambda evm: None, land=land)
    claims = SimpleNamespace(begin=lambda *_, **__: None)
    return Lending(*cast(Any, (journal, residents, Roles(journal, gate), claims, gate, relays)))


def lending(migration: str, *, given: bool = False) -> LendOrder:
    held = VolumeGrant(volume=VOLUME, attachment=Attachment(volume=VOLUME.id, node="n1", epoch=3, endpoint=OWN))
    return LendOrder(migration=migration, evm="web", target="n2", volumes=(held,), given=given)


# -- an EVM that ends while it borrows


@pytest.mark.parametrize("answers", [True, False])
async def test_what_an_evm_borrows_is_flushed_before_it_ends_if_its_lender_answers(
    relays: Relays, driver: Driver, answers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    await relays.borrow("web", BORROWED)
    if not answers:
        driver.reached.clear()
    await relays.flush("web")
    assert driver.relays[f"vol-1-{Side.BORROWED}"].state is RelayState.HELD
    assert ("is not flushed" in caplog.text) is not answers


# -- a relay that nobody could hold


async def test_a_relay_whose_lender_is_lost_is_held_before_it_goes_on_here(relays: Relays, driver: Driver) -> None:
    """Else QEMU would be asked to wait for I/O that nothing ends."""
    await relays.borrow("web", BORROWED)
    driver.reached.remove(LENDER.host)
    await relays.go_on(LOCAL)
    relay = driver.relays["vol-1-borrowed"]
    assert (relay.upstream, relay.state) == (OWN, RelayState.RUNNING)
    await relays.go_on(LOCAL)  # the order again: it goes there already


async def test_a_guest_that_waits_for_its_volumes_goes_on_relayed_where_they_cannot_be_had(relays: Relays) -> None:
    """Classic order: the guest must not stand for as long as the cloud refuses."""
    await relays.borrow("web", BORROWED)
    waiting = asyncio.create_task(relays.until_settled("web"))
    assert not (await asyncio.wait([waiting], timeout=0.05))[0]
    await relays.hold("vol-1", within_s=1)
    await relays.go_on(BORROWED)
    await asyncio.wait_for(waiting, 5)


# -- late orders


async def test_what_is_taken_back_while_it_is_made_is_not_left(agent: Lending, driver: Driver) -> None:
    driver.go.clear()
    lend = asyncio.create_task(agent.lend(lending("m1")))
    await driver.making.wait()
    await agent.take_back("m1", TakeBackOrder())
    driver.go.set()
    with pytest.raises((Conflict, StaleEpoch)):
        await lend
    assert driver.relays == {}
    with pytest.raises(StaleEpoch):
        await agent.lend(lending("m1"))
    assert driver.relays == {}


@pytest.mark.parametrize(
    "last",
    [
        Record(K.OWN, "web", 3),
        Record(K.ACTIVATED, "web", 9, migration="m2"),
        Record(K.GIVEN, "web", 9, migration="m3"),
        Record(K.DONE, "web", 9, migration="m3"),
        None,
    ],
)
async def test_nothing_is_lent_again_beside_the_guest_or_for_an_older_migration(
    agent: Lending, journal: Journal, driver: Driver, last: Record | None
) -> None:
    if last is not None:
        await journal.append(last)
    with pytest.raises(StaleEpoch):
        await agent.lend(lending("m1", given=True))
    assert driver.relays == {}


@pytest.mark.parametrize("kind", [K.GIVEN, K.DONE])
async def test_what_was_given_away_is_lent_again_and_let_write(
    agent: Lending, journal: Journal, driver: Driver, kind: RecordKind
) -> None:
    await journal.append(Record(kind, "web", 5, migration="m1"))
    await agent.lend(lending("m1", given=True))
    assert driver.opened == ["vol-1-lent"]


async def test_the_relay_of_a_newer_migration_heeds_no_older_order(
    agent: Lending, journal: Journal, relays: Relays, driver: Driver, landed: list[str]
) -> None:
    await journal.append(Record(K.ACTIVATED, "web", 9, migration="m3"))
    await relays.borrow("web", BORROWED)
    with pytest.raises(NotFound, match="not here by m1"):
        await agent.hold("m1", HoldOrder(evm="web", volume=VOLUME.id, within_s=1))
    with pytest.raises(NotFound, match="not here by m1"):
        await agent.go_on("m1", GoOnOrder(evm="web", epoch=5, grant=LOCAL))
    assert (driver.relays["vol-1-borrowed"].state, landed) == (RelayState.RUNNING, [])
    await agent.hold("m3", HoldOrder(evm="web", volume=VOLUME.id, within_s=1))
    await agent.go_on("m3", GoOnOrder(evm="web", epoch=9, grant=LOCAL))
    assert landed == ["web"]


async def test_a_node_that_does_not_believe_its_journal_says_nothing_of_an_evm(
    agent: Lending, relays: Relays, driver: Driver, gate: Gate, landed: list[str]
) -> None:
    """Else its volume would be taken for landed, and its relay be left for good."""
    await relays.borrow("web", BORROWED)
    gate.distrust = "the journal is an older one"
    with pytest.raises(Unavailable, match="an older one"):
        await agent.hold("m1", HoldOrder(evm="web", volume=VOLUME.id, within_s=1))
    with pytest.raises(Unavailable, match="an older one"):
        await agent.go_on("m1", GoOnOrder(evm="web", epoch=5, grant=LOCAL))
    assert (driver.relays["vol-1-borrowed"].state, landed) == (RelayState.RUNNING, [])


async def test_an_evm_that_was_started_anew_heeds_no_order_of_a_migration(
    agent: Lending, journal: Journal, landed: list[str]
) -> None:
    await journal.append(Record(K.OWN, "web", 12))
    with pytest.raises(NotFound):
        await agent.go_on("m1", GoOnOrder(evm="web", epoch=5, grant=LOCAL))
    assert landed == []


async def test_with_the_last_relay_its_file_goes(relays: Relays, tmp_path: Path) -> None:
    """A node at rest has the same files as one that was just switched on."""
    file = tmp_path / "relays.json"
    await relays.lend(lending("m1"))
    await relays.borrow("web", BORROWED)
    await relays.end_of("web", Side.LENT)
    assert file.exists()
    await relays.end_of("web")
    assert not file.exists()


# -- after a restart of the agent


async def test_relays_that_have_died_with_the_agent_leave_no_file(
    relays: Relays, driver: Driver, tmp_path: Path
) -> None:
    await relays.borrow("web", BORROWED)
    driver.relays.clear()
    file = tmp_path / "relays.json"
    again = Relays(cast(Any, driver), cast(Any, None), file)
    await again.start()
    assert not again.borrows(VOLUME.id)
    assert not file.exists()


async def test_a_machine_that_is_not_adopted_yet_keeps_its_relay(relays: Relays, driver: Driver) -> None:
    """It may live, and all its I/O goes through it."""
    await relays.borrow("web", BORROWED)
    assembler = SimpleNamespace(relays=relays)
    residents = Residents(cast(Any, None), cast(Any, None), cast(Any, assembler), memory_bytes=1)
    entry = SimpleNamespace(spec=SimpleNamespace(name="web"), volumes=(BORROWED,))
    residents.note(cast(Any, entry), EvmState.UNKNOWN, "could not be adopted: its monitor hangs")
    with pytest.raises(Unavailable, match="monitor hangs"):
        await residents.land("web", LOCAL)
    assert list(driver.relays) == ["vol-1-borrowed"]


async def test_what_was_lent_lets_the_target_write_though_the_agent_died_before_it_could_say_so() -> None:
    opened: list[str] = []

    async def nothing(*_: object) -> None:
        pass

    assembler = SimpleNamespace(clear=nothing, relays=SimpleNamespace(let_through=opened.append, end_of=nothing))
    residents = SimpleNamespace(assembler=assembler, shelf=SimpleNamespace(get=lambda _: None, drop=lambda _: None))
    last = Record(K.DONE, "web", 5, migration="m1")
    made = Adoption(*cast(Any, (SimpleNamespace(last=lambda _: last), residents, None, None)))
    await made._take_back("web", None)
    assert opened == ["m1"]


async def test_end_of_one_side_leaves_the_other(relays: Relays, driver: Driver) -> None:
    await relays.borrow("web", BORROWED)
    await relays.lend(lending("m1"))
    await relays.end_of("web", Side.BORROWED)
    assert list(driver.relays) == ["vol-1-lent"]
