"""The store's contract under any sequence of calls, against a plain dictionary. Runs on every implementation."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from emp.store.base import Compacted, Compare, Delete, EventKind, Get, KeyValue, Op, Put, Store, absent, present
from tests.contract.test_store import IMPLEMENTATIONS, RELATIONS, Implementation, revision_of, take

KEYS = ("/a/1", "/a/2", "/b/1", "/b")
PREFIXES = ("/", "/a/", "/b/", "/b", "/a/1")
a_key = st.sampled_from(KEYS)
a_value = st.sampled_from((b"", b"1", b"2"))
an_op = st.one_of(st.builds(Put, a_key, a_value), st.builds(Delete, a_key), st.builds(Get, a_key))
ops_on_distinct_keys = st.lists(an_op, max_size=4, unique_by=lambda op: op.key)
a_compare = st.one_of(
    st.builds(Compare, a_key, st.just("value"), st.sampled_from(list(RELATIONS)), a_value),
    st.builds(Compare, a_key, st.just("version"), st.sampled_from(list(RELATIONS)), st.integers(0, 4)),
    st.builds(absent, a_key),
    st.builds(present, a_key),
)


def selected(prefix: str, key: str) -> bool:
    return key.startswith(prefix) if prefix.endswith("/") else key == prefix


class StoreAgainstModel(RuleBasedStateMachine):
    implementation: Implementation

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.location = self.implementation.locate(Path(self.directory.name))
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.store = self.run(self._open())
        self.kvs: dict[str, KeyValue] = {}
        self.first = self.revision = self.oldest = self.run(revision_of(self.store))
        self.history: list[tuple[int, EventKind, KeyValue]] = []

    async def _open(self) -> Store:
        return await self.implementation.open(self.location)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.run(self.store.close())
            self.runner.close()
            self.directory.cleanup()

    def _apply(self, ops: Sequence[Op]) -> list[KeyValue | None]:
        found, revision = [], self.revision + 1
        for op in ops:
            old = self.kvs.get(op.key)
            if isinstance(op, Get):
                found.append(old)
            elif isinstance(op, Put):
                new = KeyValue(
                    op.key, op.value, old.create_revision if old else revision, revision, old.version + 1 if old else 1
                )
                self.kvs[op.key] = new
                self.history.append((revision, EventKind.PUT, new))
            elif self.kvs.pop(op.key, None):
                self.history.append((revision, EventKind.DELETE, KeyValue(op.key, b"", 0, revision, 0)))
        if self.history and self.history[-1][0] == revision:
            self.revision = revision
        return found

    def _holds(self, compare: Compare) -> bool:
        kv = self.kvs.get(compare.key)
        if kv is None and compare.target == "value":
            return False
        return RELATIONS[compare.relation](getattr(kv, compare.target) if kv else 0, compare.operand)

    @rule(compares=st.lists(a_compare, max_size=2), then=ops_on_distinct_keys, otherwise=ops_on_distinct_keys)
    def txn(self, compares: list[Compare], then: list[Op], otherwise: list[Op]) -> None:
        result = self.run(self.store.txn(compares, then, otherwise))
        assert result.succeeded == all(map(self._holds, compares))
        assert list(result.found) == self._apply(then if result.succeeded else otherwise)
        assert result.revision == self.revision

    @rule(prefix=st.sampled_from(PREFIXES), limit=st.none() | st.integers(1, 3), after=st.none() | a_key)
    def range(self, prefix: str, limit: int | None, after: str | None) -> None:
        answer = self.run(self.store.range(prefix, limit=limit, after=after))
        expected = [kv for key, kv in sorted(self.kvs.items()) if selected(prefix, key) and key > (after or "")]
        assert list(answer.kvs) == expected[:limit]
        assert answer.more == (len(expected[:limit]) < len(expected))

    @rule(prefix=st.sampled_from(PREFIXES), back=st.integers(0, 30))
    def watch(self, prefix: str, back: int) -> None:
        begin = max(self.first, self.revision - back)
        if begin < self.oldest:
            with pytest.raises(Compacted):
                self.run(take(self.store.watch(prefix, begin), 1))
            return
        last_key = prefix + "end" if prefix.endswith("/") else prefix
        self.txn([], [Put(last_key, b"end")], [])  # so that the watch has a known last event
        expected = [entry for entry in self.history if entry[0] > begin and selected(prefix, entry[2].key)]
        events = self.run(take(self.store.watch(prefix, begin), len(expected)))
        assert [(event.revision, event.kind, event.kv) for event in events] == expected
        following = [entry[0] for entry in expected[1:]] + [0]
        assert [event.last for event in events] == [a[0] != b for a, b in zip(expected, following, strict=True)]

    @rule(back=st.integers(0, 10))
    def compact(self, back: int) -> None:
        revision = max(self.first, self.revision - back)
        self.run(self.store.compact(revision))
        self.oldest = max(self.oldest, revision)

    @rule()
    def reopen(self) -> None:
        self.run(self.store.close())
        self.store = self.run(self._open())

    @invariant()
    def same(self) -> None:
        if hasattr(self, "store"):
            answer = self.run(self.store.range("/"))
            assert {kv.key: kv for kv in answer.kvs} == self.kvs
            assert answer.revision == self.revision


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_any_sequence_of_calls_agrees_with_a_dictionary(name: str) -> None:
    machine = type("Machine", (StoreAgainstModel,), {"implementation": IMPLEMENTATIONS[name]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
