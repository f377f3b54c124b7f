"""What an agent answers from its journal, what its sweep finds, and what it keeps to itself while in doubt."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from emp.agent.claims import Claims
from emp.agent.gate import Gate
from emp.agent.journal import Journal, Standing
from emp.agent.links import answer_from_journal
from emp.migration.records import Record, RecordKind
from emp.migration.sweep import Sweep, sweep, waits_for_its_owner
from emp.model.errors import StaleEpoch, Unavailable
from emp.model.orders import VolumeGrant
from emp.model.volume import Attachment, NbdEndpoint, Volume, VolumeType

K = RecordKind
ASK, GO = {"type": "ask", "nonce": "p"}, {"type": "go", "epoch": 2, "nonce": "p"}


def record(kind: RecordKind, epoch: int, **more: object) -> Record:
    return Record(kind, "web", epoch, migration="m", peer="n2", nonce="p", **more)  # type: ignore[arg-type]


def plain(kind: RecordKind, epoch: int) -> Record:
    return Record(kind, "web", epoch)


@pytest.mark.parametrize(
    ("records", "message", "answer"),
    [
        ([record(K.HANDOVER, 1)], ASK, None),
        ([record(K.GIVEN, 2)], ASK, {"type": "go", "epoch": 2, "nonce": "p"}),
        ([record(K.GIVEN, 2)], GO, None),
        ([record(K.GIVEN, 2), plain(K.RETIRED, 9)], ASK, None),
        ([record(K.GIVEN, 2), record(K.OWN, 3)], ASK, {"type": "aborted"}),
        ([record(K.OWN, 3), plain(K.STOPPED, 3)], ASK, {"type": "aborted"}),
        ([record(K.DONE, 2)], ASK, None),
        ([record(K.PREPARED, 2)], GO, None),
        ([record(K.ACTIVATED, 2)], GO, {"type": "answer", "word": "activated", "nonce": "p"}),
        ([record(K.ACTIVATED, 2)], ASK, {"type": "answer", "word": "activated", "nonce": "p"}),
        ([record(K.WITHDRAWN, 2)], GO, {"type": "answer", "word": "withdrawn", "nonce": "p"}),
        ([plain(K.OWN, 1)], ASK, None),
    ],
)
async def test_a_late_question_is_answered_from_the_journal(
    tmp_path: Path, records: list[Record], message: dict[str, object], answer: object
) -> None:
    journal = Journal.open(tmp_path / "journal")
    for each in records:
        await journal.append(each)
    assert answer_from_journal(journal, "m", message, peer="n2") == answer
    assert answer_from_journal(journal, "m", message, peer="n3") is None, "another node has no part in it"
    assert answer_from_journal(journal, "other", message, peer="n2") is None
    journal.close()


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (None, Sweep.UNKNOWN),
        (K.OWN, Sweep.OWNED),
        (K.ACTIVATED, Sweep.OWNED),
        (K.HANDOVER, Sweep.LEAVING),
        (K.GIVEN, Sweep.LEAVING),
        (K.PREPARED, Sweep.ARRIVING),
        (K.DONE, Sweep.CLEAR),
        (K.WITHDRAWN, Sweep.CLEAR),
        (K.RETIRED, Sweep.CLEAR),
        (K.STOPPED, Sweep.CLEAR),
    ],
)
def test_the_sweep_kills_only_what_a_record_says_has_lost(last: RecordKind | None, found: Sweep) -> None:
    assert sweep(record(last, 1) if last else None) is found


@pytest.mark.parametrize("kind", RecordKind)
@pytest.mark.parametrize(("loaded", "completed"), [(False, False), (True, False), (False, True)])
def test_only_an_owner_is_started_and_only_where_it_waits_for_nothing_else(
    kind: RecordKind, loaded: bool, completed: bool
) -> None:
    expected = (kind is K.ACTIVATED and loaded) or (kind is K.OWN and completed)
    assert waits_for_its_owner(record(kind, 1), loaded=loaded, completed=completed) == expected


def test_a_journal_is_behind_when_it_is_another_or_ends_earlier() -> None:
    assert Standing("a", 5).later_than(Standing("a", 4))
    assert Standing("a", 5).later_than(Standing("b", 9))
    assert not Standing("a", 5).later_than(Standing("a", 5))


def test_what_a_quarantine_shuts() -> None:
    gate = Gate()
    for starting in (gate.check, gate.check_adopted, gate.check_retire):
        with pytest.raises(Unavailable):
            starting()
    gate.starting = None
    gate.ordered = "the node is fenced"
    gate.check_adopted()  # roles that run go on
    gate.check_retire()  # the way out of a fence
    for shut in (gate.check, gate.check_journal):
        with pytest.raises(Unavailable, match="fenced"):
            shut()
    gate.ordered, gate.distrust = None, "the journal is torn"
    with pytest.raises(Unavailable, match="torn"):
        gate.check_retire()  # RETIRED must be durable


class Service:
    """Answers each claim as told, in order."""

    def __init__(self, *answers: Exception | None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.done = asyncio.Event()
        self._answers = list(answers)

    async def claim(self, attachment: Attachment, *, epoch: int) -> None:
        self.asked.append((attachment.volume, epoch))
        answer = self._answers.pop(0)
        if not self._answers:
            self.done.set()
        if answer:
            raise answer

    async def aclose(self) -> None: ...


GRANT = VolumeGrant(
    volume=Volume(id="vol-1", type=VolumeType.IO2, size_bytes=1 << 20, serial="s"),
    attachment=Attachment(
        volume="vol-1", node="n1", epoch=2, endpoint=NbdEndpoint(host="10.0.0.1", port=1, export="e", tls_hostname="v")
    ),
)


@pytest.mark.parametrize(
    ("answers", "times"),
    [((None,), 1), ((Unavailable("away"), None), 2), ((StaleEpoch("a newer owner"),), 1)],
)
async def test_a_claim_is_repeated_until_it_is_heard_or_refused(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[Exception | None, ...], times: int
) -> None:
    monkeypatch.setattr("emp.agent.claims.REPEAT_S", 0.001)
    service = Service(*answers)
    claims = Claims(service)
    claims.begin([GRANT], epoch=3)
    await asyncio.wait_for(service.done.wait(), 10)
    await claims.close()
    assert service.asked == [("vol-1", 3)] * times
