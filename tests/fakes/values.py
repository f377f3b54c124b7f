"""Nouns of a pool with sensible defaults; a test names only what it is about."""

from __future__ import annotations

import uuid
from typing import Any

from emp.controller.addresses import nic_mac
from emp.model.evm import Evm, EvmSpec, EvmState, Nic
from emp.model.migration import Migration
from emp.model.node import Node, NodeReport, Versions

MIB, GIB = 1 << 20, 1 << 30


def versions(**changes: Any) -> Versions:
    base = Versions(
        emp="0.1.0",
        protocol=1,
        qemu="10.0.2",
        machines=("pc-i440fx-9.2", "pc-i440fx-10.0"),
        cpu_models=("Nehalem-v1", "Westmere-v1", "qemu64-v1"),
        accelerator="tcg",
        images={"micro": "sha256:aaaa"},
    )
    return base.model_copy(update=changes)


def a_report(name: str = "n1", **changes: Any) -> NodeReport:
    base = NodeReport(
        name=name,
        address="10.77.0.1",
        port=7701,
        link_port=7702,
        memory_bytes=4 * GIB,
        memory_used_bytes=0,
        vcpus=4,
        versions=versions(),
        boot_id="boot",
    )
    return base.model_copy(update=changes)


def a_node(name: str = "n1", *, ready: bool = True, cordoned: bool = False, **report: Any) -> Node:
    return Node(report=a_report(name, **report), ready=ready, cordoned=cordoned)


def a_spec(name: str = "web", **changes: Any) -> EvmSpec:
    base = EvmSpec(
        name=name,
        uuid=uuid.UUID(int=1),
        memory_bytes=512 * MIB,
        vcpus=1,
        image="micro",
        image_digest="sha256:aaaa",
        machine="pc-i440fx-10.0",
        cpu_model="Westmere-v1",
        nics=(Nic(mac=nic_mac("10.77.1.1"), address="10.77.1.1", prefix_length=16),),
    )
    return base.model_copy(update=changes)


def an_evm(name: str = "web", **changes: Any) -> Evm:
    base = Evm(spec=a_spec(name), state=EvmState.RUNNING, owner="n1", epoch=1)
    return base.model_copy(update=changes)


def a_migration(**changes: Any) -> Migration:
    base = Migration(id="m-1", evm="web", source="n1", target="n2", epoch_target=2, epoch_source=3)
    return base.model_copy(update=changes)
