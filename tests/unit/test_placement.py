"""Placement picks the node with the most free memory that fits, and says why not each of the others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.controller.compat import common_cpu_model, common_machine
from emp.controller.placement import (
    Candidate,
    cannot_run,
    claimed_by,
    cordoned,
    excluded,
    free_bytes,
    needs,
    not_there,
    place,
    place_on,
    short_of_memory,
)
from emp.model.errors import BadInput, NoPlacement, Refused
from emp.model.evm import EvmState
from emp.model.node import Node
from tests.fakes.values import GIB, MIB, a_migration, a_node, a_spec, an_evm, versions


def candidate(name: str, free: int, **changes: Any) -> Candidate:
    return Candidate(a_node(name, **changes), free)


def test_most_free_memory_wins_and_the_reason_says_so() -> None:
    placed = place([candidate("n1", 2 * GIB), candidate("n2", 3 * GIB)], [short_of_memory(GIB)], what="web")
    assert placed.node.name == "n2"
    assert placed.reason == "most free memory of 2 nodes that fit (3 GiB free)"


def test_equal_nodes_are_taken_by_name() -> None:
    placed = place([candidate("n2", GIB), candidate("n1", GIB)], [], what="web")
    assert placed.node.name == "n1"


def test_the_reason_names_what_ruled_the_others_out() -> None:
    placed = place(
        [candidate("n1", 9 * GIB, ready=False), candidate("n2", GIB), candidate("n3", 9 * GIB, cordoned=True)],
        [not_there, cordoned],
        what="web",
    )
    assert placed.reason == "the only node that fits (1 GiB free); not n1: down; not n3: cordoned"


def test_no_node_fits() -> None:
    full, small = candidate("n1", 100 * MIB), candidate("n2", 8 * GIB, vcpus=1)
    with pytest.raises(NoPlacement) as caught:
        place([full, small], needs(512 * MIB, 2, "micro"), what="web")
    assert caught.value.details["nodes"] == {
        "n1": "100 MiB free, 512 MiB needed",
        "n2": "2 vCPUs needed, CPUs there: 1",
    }
    assert "n1: 100 MiB free" in caught.value.message
    assert caught.value.hint


def test_an_empty_pool_says_that_it_is_empty() -> None:
    with pytest.raises(NoPlacement, match="the pool has no node"):
        place([], [], what="web")


def test_a_node_whose_journal_cannot_be_trusted_gets_nothing_new() -> None:
    with pytest.raises(NoPlacement, match="journal cannot be trusted: torn"):
        place([candidate("n1", GIB, journal="torn")], needs(MIB, 1, "micro"), what="web")


def test_a_node_without_the_image_or_with_another_build_is_left_out() -> None:
    bare = candidate("n1", GIB, versions=versions(images={}))
    with pytest.raises(NoPlacement, match="does not have the image micro"):
        place([bare], needs(MIB, 1, "micro"), what="web")
    other = candidate("n1", GIB, versions=versions(images={"micro": "sha256:other"}))
    with pytest.raises(NoPlacement, match="that build of the image micro"):
        place([other], [cannot_run(a_spec())], what="web")


def test_an_evm_keeps_its_machine_type_and_cpu_model() -> None:
    old = candidate("n1", GIB, versions=versions(machines=("pc-i440fx-9.2",)))
    with pytest.raises(NoPlacement, match=r"does not know pc-i440fx-10\.0"):
        place([old], [cannot_run(a_spec())], what="web")
    weak = candidate("n1", GIB, versions=versions(cpu_models=("qemu64-v1",)))
    with pytest.raises(NoPlacement, match="cannot run Westmere-v1"):
        place([weak], [cannot_run(a_spec())], what="web")


def test_an_asked_for_node_that_does_not_fit_is_refused_with_the_field() -> None:
    with pytest.raises(Refused, match="cordoned") as caught:
        place_on(candidate("n1", GIB, cordoned=True), [cordoned], field="target")
    assert caught.value.field == "target"
    assert caught.value.hint == "uncordon it"


def test_the_excluded_node_is_not_taken_however_free() -> None:
    nodes = [candidate("n1", 9 * GIB), candidate("n2", GIB)]
    assert place(nodes, [excluded("n1", "it runs there")], what="web").node.name == "n2"


# ------------------------------------------------------------------ memory


def test_a_running_evm_counts_on_its_owner_and_a_stopped_one_nowhere() -> None:
    assert claimed_by(an_evm(owner="n1"), None, None) == {"n1"}
    assert claimed_by(an_evm(owner="n1", state=EvmState.PANICKED), None, None) == {"n1"}
    assert claimed_by(an_evm(owner="n1", state=EvmState.UNKNOWN), None, None) == {"n1"}
    for state in (EvmState.STOPPED, EvmState.CRASHED):
        assert claimed_by(an_evm(owner="n1", state=state), None, None) == frozenset()


def test_an_evm_counts_where_it_is_being_started() -> None:
    assert claimed_by(an_evm(owner=None, state=EvmState.CREATING), None, "n2") == {"n2"}


def test_a_migrating_evm_counts_on_both_ends() -> None:
    evm = an_evm(owner="n1", state=EvmState.MIGRATING, migration="m-1")
    assert claimed_by(evm, a_migration(), None) == {"n1", "n2"}


def test_two_evms_may_swap_where_both_fit_on_both_and_not_where_they_do_not() -> None:
    """A node of 1 GiB that owns one EVM of 512 MiB takes the other one in, and then is full."""
    node: Node = a_node("n1", memory_bytes=GIB)
    own, coming = (512 * MIB, frozenset({"n1"})), (512 * MIB, frozenset({"n1", "n2"}))
    assert free_bytes(node, [own]) == 512 * MIB
    assert free_bytes(node, [own, coming]) == 0
    small = a_node("n1", memory_bytes=768 * MIB)
    assert free_bytes(small, [own]) < 512 * MIB


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8)), max_size=30))
def test_what_is_placed_one_after_another_never_overcommits(wanted: list[tuple[str, int]]) -> None:
    nodes = [a_node(name, memory_bytes=8 * MIB) for name in ("n1", "n2")]
    claims: list[tuple[int, frozenset[str]]] = []
    for _, size in wanted:
        candidates = [Candidate(node, free_bytes(node, claims)) for node in nodes]
        try:
            placed = place(candidates, [short_of_memory(size * MIB)], what="x")
        except NoPlacement:
            assert all(c.free_bytes < size * MIB for c in candidates)
        else:
            claims.append((size * MIB, frozenset({placed.node.name})))
    assert all(free_bytes(node, claims) >= 0 for node in nodes)


# ------------------------------------------------------------------ what is common to the nodes


def test_the_newest_machine_type_that_every_node_knows() -> None:
    new = a_node("n1", versions=versions(machines=("pc-i440fx-9.2", "pc-i440fx-10.0", "pc-i440fx-10.1", "microvm")))
    old = a_node("n2", versions=versions(machines=("pc-i440fx-10.0", "pc-i440fx-9.2")))
    assert common_machine([new, old]) == "pc-i440fx-10.0"
    assert common_machine([new]) == "pc-i440fx-10.1"


def test_no_machine_type_in_common() -> None:
    with pytest.raises(Refused, match="no versioned machine type in common"):
        common_machine([a_node("n1"), a_node("n2", versions=versions(machines=("pc-i440fx-99.0",)))])


def test_the_default_cpu_model_is_the_newest_that_runs_everywhere() -> None:
    both = a_node("n1", versions=versions(cpu_models=("Nehalem-v1", "Westmere-v1", "qemu64-v1")))
    weak = a_node("n2", versions=versions(cpu_models=("qemu64-v1", "Nehalem-v1")))
    assert common_cpu_model([both], None) == "Westmere-v1"
    assert common_cpu_model([both, weak], None) == "Nehalem-v1"


def test_a_cpu_model_that_a_node_lacks_is_refused_by_its_name() -> None:
    weak = a_node("n2", versions=versions(cpu_models=("qemu64-v1",)))
    with pytest.raises(BadInput, match="does not run on n2") as caught:
        common_cpu_model([a_node("n1"), weak], "Westmere-v1")
    assert caught.value.field == "cpu_model"
