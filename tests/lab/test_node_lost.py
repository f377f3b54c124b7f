"""A node that dies for good with an EVM on it: refused, fenced, started elsewhere, and what its return is told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from emp.client.client import Client
from emp.lab import partition
from emp.lab.demo import volume_file
from emp.lab.journal_check import check_journal
from emp.model.evm import EvmState
from emp.model.node import Node
from tests.lab.conftest import Pool, run_lab
from tests.lab.pool import Subject, subject, until
from tests.leaks import outliving


@pytest.fixture
def n3(pool: Pool) -> Iterator[str]:
    """A node that is on again after the test."""
    yield "n3"
    switch(pool, "n3", "on")
    until(lambda: pool.json("node", "show", "n3")["ready"], "n3 is back")


def switch(pool: Pool, node: str, state: str) -> None:
    """Pull the node's plug, or put it back."""
    with outliving(f"the lab {pool.name}"):
        run_lab("power", "--name", pool.name, node, state)


def node_of(client: Client, name: str) -> Node:
    return client.nodes.get(name)


def acked(evm: Subject) -> int:
    return int(evm.guest().ask("journal status")[0]["acked_seq"])


def test_a_lost_nodes_evm_runs_elsewhere_behind_a_fence_and_the_node_comes_back(pool: Pool, n3: str) -> None:
    with subject(pool, node=n3, volumes=["io2:16MiB"]) as evm:
        (volume,) = evm.volumes
        first_boot, first_epoch = evm.boot_id, evm.record.epoch
        evm.start_journal(volume, 100)
        written = until(lambda: acked(evm) if acked(evm) >= 50 else None, "records are written")
        switch(pool, n3, "off")
        until(lambda: not node_of(evm.client, n3).ready, "n3 is found down")
        assert evm.wait(EvmState.UNKNOWN).owner == "n3"

        refused = pool.emp("evm", "recover", evm.name, "--json", check=False)
        assert refused.returncode == 7, refused.stderr
        assert f"EVM {evm.name} may run on n3" in json.loads(refused.stderr)["message"]
        assert "emp node fence n3 --confirm" in json.loads(refused.stderr)["hint"]
        assert evm.qemus() == {}

        said = pool.emp("node", "fence", "n3", check=False)
        assert said.returncode == 2
        assert evm.name in said.stderr and "emp node fence n3 --confirm" in said.stderr
        fenced = pool.json("node", "fence", "n3", "--confirm", "--reason", "a test has killed it")
        assert (fenced["fence"]["driver"], fenced["fence"]["by"]) == ("lab", "a test has killed it")

        recovered = pool.json("evm", "recover", evm.name)
        new_home = recovered["owner"]
        assert (new_home != "n3", recovered["state"]) == (True, "running")
        assert recovered["epoch"] > node_of(evm.client, "n3").fence.retire[evm.name] > first_epoch  # type: ignore[union-attr]
        evm.reboots(first_boot)
        report = check_journal(volume_file(pool.files, volume))
        assert (report.ok, report.missing(written)) == (True, 0), report

        switch(pool, n3, "on")
        back = until(lambda: ((n := node_of(evm.client, "n3")).fence is None and n) or None, "the fence is lifted")
        assert back.quarantine is None
        evm.check_only_on(new_home)
        epochs = [attachment.epoch for volume in evm.volumes for attachment in volume.attachments]
        assert epochs == [recovered["epoch"]]
        evm.migrate("n3")
        evm.check_only_on("n3")


def test_a_node_that_is_cut_off_and_runs_is_switched_off_by_its_fence(pool: Pool, n3: str) -> None:
    """What silence looks like from outside: the guest runs on, and must not once it runs elsewhere."""
    with subject(pool, node=n3, volumes=["io2:16MiB"]) as evm:
        boot_id = evm.boot_id
        for other in ("ctl", "n1", "n2"):
            partition.cut(pool.files, n3, other)
        until(lambda: not node_of(evm.client, n3).ready, "n3 is found down")
        assert (evm.boot_id, set(evm.qemus())) == (boot_id, {n3}), "nobody has told the guest"
        assert pool.emp("evm", "recover", evm.name, check=False).returncode == 7
        pool.emp("node", "fence", n3, "--confirm")
        assert evm.qemus() == {}
        recovered = pool.json("evm", "recover", evm.name)
        assert evm.reboots(boot_id)
        partition.heal(pool.files)
        switch(pool, n3, "on")
        until(lambda: node_of(evm.client, n3).fence is None, "the fence is lifted")
        evm.check_only_on(recovered["owner"])
