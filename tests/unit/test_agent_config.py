"""What an agent is told of its network: a field that is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emp.agent.config import AgentConfig
from emp.model.errors import BadInput
from emp.wire.config import read_config

BASE = {
    "pool": "prod",
    "node": "n1",
    "address": "192.0.2.1",
    "controller_url": "https://192.0.2.9:1",
    "credentials": "/c",
    "qemu_credentials": "/q",
    "memory_bytes": "1GiB",
    "vcpus": 2,
}
PEERS = {"n1": "192.0.2.1", "n2": "192.0.2.2"}


def of(directory: Path, **network: Any) -> AgentConfig:
    path = directory / "agent.json"
    path.write_text(json.dumps(BASE | {"network": network}))
    return read_config(AgentConfig, path)


def test_a_segment_a_vlan_and_an_overlay(tmp_path: Path) -> None:
    assert of(tmp_path).network.vxlan is None
    assert of(tmp_path, vlan=5).network.vlan == 5
    vxlan = of(tmp_path, vxlan={"id": 7, "peers": PEERS}).network.vxlan
    assert vxlan is not None
    assert (vxlan.id, vxlan.peers) == (7, PEERS)


@pytest.mark.parametrize(
    ("network", "field", "says"),
    [
        ({"vlan": 0}, "network.vlan", "greater than or equal to 1"),
        ({"vlan": 4095}, "network.vlan", "less than or equal to 4094"),
        ({"vxlan": {"id": 1 << 24, "peers": PEERS}}, "network.vxlan.id", "less than"),
        ({"vxlan": {"id": 7, "peers": {"n2": "nowhere"}}}, "network.vxlan.peers.n2", "not an IP address"),
        ({"vxlan": {"id": 7, "peers": PEERS}, "vlan": 5}, "network", "exclude each other"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, network: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        of(tmp_path, **network)
    assert caught.value.field == field
    assert says in str(caught.value)
