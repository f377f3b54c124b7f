"""The cloud of a lab that has one: its region and zones, which instance a node is, and what its daemons are told of it.

Everything but the credentials follows from the lab's record, so that whoever asks derives the same.
"""

from __future__ import annotations

import configparser
import secrets
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from emp.lab.state import LabFiles, LabState
from emp.lab.topology import CTL, SUBNET, SUBNET_IPV6, UPLINK, VOL, VOLUMES_PORT, Network, Place
from emp.model.errors import BadInput
from emp.wire.files import write_private

MODULE = "emp.lab.cloud"
"""the daemon in the place of the volume server"""
REGION = "lab-1"
HOME_ZONE = "a"
ZONES = "abcdef"
STRANGERS = {f"stranger{n}": f"i-{0x57000 + n:017x}" for n in range(1, 16)}
"""instances in zone a that are no nodes of the pool: with one that is, as many as a Multi-Attach volume takes"""
NFS_PROGRAM = "nfs-ganesha"
"""in the cloud's place"""
CREDENTIALS = "aws-credentials"
"""in the controller's place, as of the AWS tools"""
_PROFILE, _KEY_ID, _SECRET = "default", "aws_access_key_id", "aws_secret_access_key"


class Profile(StrEnum):
    """How long the cloud takes: ``emp.lab.cloud.knobs.PROFILES``."""

    INSTANT = "instant"
    AWS = "aws"


def check_zones(zones: Mapping[str, str], nodes: list[str]) -> dict[str, str]:
    """Return node -> letter of its zone, for the nodes that are not in zone a. Raises ``BadInput``."""
    for node, letter in zones.items():
        if node not in nodes:
            raise BadInput(f"the lab has no node {node[:40]!r}", field="zone_of", hint=f"there are {', '.join(nodes)}")
        if len(letter) != 1 or letter not in ZONES:
            raise BadInput(f"{letter[:40]!r} is no zone", field="zone_of", hint="a letter from a to f, as in n3=b")
    return dict(zones)


def instance_of(place: Place) -> str:
    return f"i-{place.number:017x}"


def zone_of(state: LabState, place: Place) -> str:
    return REGION + state.zones.get(place.name, HOME_ZONE)


def make_credentials(files: LabFiles) -> None:
    """Make up what the controller signs its requests with."""
    made = configparser.ConfigParser()
    made[_PROFILE] = {_KEY_ID: f"AKIA{secrets.token_hex(8).upper()}", _SECRET: secrets.token_hex(20)}
    text = "".join(f"{name} = {value}\n" for name, value in made[_PROFILE].items())
    path = files.data(CTL.name) / CREDENTIALS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, f"[{_PROFILE}]\n{text}".encode())


def access_key(files: LabFiles) -> str:
    """Return the key's id."""
    return _credentials(files)[_KEY_ID]


def secret(files: LabFiles) -> str:
    """Return what nobody but the controller may see."""
    return _credentials(files)[_SECRET]


def _credentials(files: LabFiles) -> Mapping[str, str]:
    found = configparser.ConfigParser()
    found.read(files.data(CTL.name) / CREDENTIALS)
    return found[_PROFILE]


def url() -> str:
    return f"https://{VOL.address}:{VOLUMES_PORT}"


def cloud_part(files: LabFiles, state: LabState, home: Path) -> dict[str, Any]:
    """Return what the cloud's configuration has besides that of a volume server. ``home``: its own directory."""
    from emp.lab.cloud.knobs import PROFILES  # pydantic's models take their time, and most commands need none

    topology = state.topology
    nodes = {
        place.name: {"instance": instance_of(place), "zone": zone_of(state, place), "address": place.address}
        | (_vpc_part(state, place) if topology.network is Network.VPC else {})
        for place in topology.node_places
    }
    nodes |= {name: {"instance": instance, "zone": REGION + HOME_ZONE} for name, instance in STRANGERS.items()}
    knobs = {"latency": PROFILES[str(state.cloud)].model_dump(), "remap": {"least_s": state.remap_s}}
    efs = {"efs": {"program": str(home / NFS_PROGRAM), "interface": UPLINK}} if state.efs else {}
    network = _network_part(state)
    return {"access_key": access_key(files), "nodes": nodes, "network": network, "knobs": knobs} | efs


def _vpc_part(state: LabState, place: Place) -> dict[str, Any]:
    """What a node is to a cloud that routes: it has three interfaces, as one has slots for 49 addresses of EVMs."""
    more = [f"10.77.{block}.{place.number}" for block in (254, 255)]
    here = {"segment": state.topology.segment(place), "ipv6": place.ipv6}
    return here | {"more_addresses": more, "source_dest_check": False}


def _network_part(state: LabState) -> dict[str, Any]:
    """The lab's one segment. What the cloud chooses itself, of mount targets say, is above the addresses of EVMs."""
    zones = {REGION + HOME_ZONE, *(zone_of(state, place) for place in state.topology.node_places)}
    blocks = {REGION + letter: f"10.77.{251 + n // 2}.{n % 2 * 128}/25" for n, letter in enumerate(ZONES)}
    return {"cidr": SUBNET, "ipv6": SUBNET_IPV6, "picks": {zone: blocks[zone] for zone in zones}}


def network_part(state: LabState, home: Path) -> dict[str, Any]:
    """Return what the controller's ``network`` has besides the addresses: the cloud that routes, if one does."""
    if state.network != Network.VPC:
        return {}
    volumes = controller_part(state, home)
    keys = ("region", "instances", "endpoint_url", "ca_file", "credentials_file")
    return {"vpc": {key: volumes[key] for key in keys}}


def controller_part(state: LabState, home: Path) -> dict[str, Any]:
    """Return the controller's ``volumes``. ``home``: its own directory, as it sees it."""
    return {
        "driver": "ebs",
        "region": REGION,
        "zone": REGION + HOME_ZONE,
        "instances": {place.name: instance_of(place) for place in state.topology.node_places},
        "endpoint_url": url(),
        "ca_file": str(home / "pki/ca-cert.pem"),
        "credentials_file": str(home / CREDENTIALS),
    }


def efs_part(state: LabState, home: Path) -> dict[str, Any] | None:
    """Return the controller's ``efs``; None: there is none."""
    if not state.efs:
        return None
    volumes = controller_part(state, home)
    return {key: volumes[key] for key in ("region", "instances", "endpoint_url", "ca_file", "credentials_file")}


def agent_part() -> dict[str, Any]:
    """Return an agent's ``devices``."""
    return {"driver": "service", "url": url(), "server_name": "volumes-main"}
