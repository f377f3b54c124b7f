"""Which places a lab has, how they are wired and what they are called: pure, so that everybody derives the same.

A *place* is a machine of the lab: a bare-metal node, the controller's host, the volume server's host, a client, the
nodes' power switch. All of them hang on one switch, the bridge ``fabric`` in a network namespace of its own. The names
inside are the same in every lab; only the names of the network namespaces carry the lab's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from emp.model.errors import BadInput, NotFound
from emp.model.names import check_name

SUBNET = "10.77.0.0/16"
EVM_FIRST = "10.77.1.0"
EVM_LAST = "10.77.250.255"
PREFIX_LENGTH = 16

CONTROLLER_PORT = 7440
AGENT_PORT = 7443
LINK_PORT = 7444
VOLUMES_PORT = 7450
POWER_PORT = 7460
NBD_PORTS = (10900, 12000)

BRIDGE = "br0"
UPLINK = "eth0"
FABRIC = "fabric"

MAX_NODES = 200


class Role(StrEnum):
    """The daemon that a place is there for."""

    AGENT = "agent"
    CONTROLLER = "controller"
    VOLUMES = "volumes"
    POWER = "power"
    """runs outside of its place, because it makes and ends places; it has the place's network alone"""


@dataclass(frozen=True)
class Place:
    """One machine of the lab."""

    name: str
    number: int
    """last part of its address"""
    role: Role | None

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def mac(self) -> str:
        return f"02:77:00:00:00:{self.number:02x}"

    @property
    def is_node(self) -> bool:
        return self.role is Role.AGENT


CTL = Place("ctl", 2, Role.CONTROLLER)
VOL = Place("vol", 3, Role.VOLUMES)
CLIENT = Place("client", 4, None)
BMC = Place("bmc", 5, Role.POWER)


@dataclass(frozen=True)
class Topology:
    """The places of one lab. Raises ``BadInput`` for a bad name or number of nodes."""

    lab: str
    nodes: int

    def __post_init__(self) -> None:
        check_name(self.lab)
        if not 1 <= self.nodes <= MAX_NODES:
            raise BadInput(f"a lab cannot have {self.nodes} nodes", field="nodes", hint=f"1 to {MAX_NODES}")

    @property
    def node_places(self) -> tuple[Place, ...]:
        return tuple(Place(f"n{i}", 10 + i, Role.AGENT) for i in range(1, self.nodes + 1))

    @property
    def places(self) -> tuple[Place, ...]:
        return (CTL, VOL, CLIENT, BMC, *self.node_places)

    def place(self, name: str) -> Place:
        """Return the place of that name; ``NotFound`` says which there are."""
        for place in self.places:
            if place.name == name:
                return place
        names = ", ".join(place.name for place in self.places)
        raise NotFound(f"the lab {self.lab} has no place {name[:40]!r}", field="where", hint=f"there are {names}")

    def namespace(self, where: str) -> str:
        """Return the name of the network namespace of a place, or of the ``fabric``."""
        return f"emp-{self.lab}-{where}"

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(self.namespace(where) for where in (FABRIC, *(place.name for place in self.places)))

    def fabric_commands(self) -> Iterator[str]:
        """Yield ``ip -batch`` lines that make the cables and the switch, run inside the fabric's namespace."""
        yield f"link add {FABRIC} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
        for place in self.places:
            yield from self.cable_commands(place)
            yield plug_command(place, "up")
        yield f"link set {FABRIC} up"

    def cable_commands(self, place: Place) -> Iterator[str]:
        """Yield those that make one place's cable; its port on the switch is still down."""
        # Both ends are made where they belong, so no name can clash with an interface of the machine itself.
        theirs = f"name {UPLINK} address {place.mac} netns {self.namespace(place.name)}"
        yield f"link add {place.name} type veth peer {theirs}"
        yield f"link set {place.name} master {FABRIC}"


def plug_command(place: Place, state: str) -> str:
    """Return the ``ip -batch`` line that sets a place's port on the switch ``up`` or ``down``."""
    return f"link set {place.name} {state}"


def place_commands(place: Place) -> Iterator[str]:
    """Yield ``ip -batch`` lines that give a place its address. A node has it on its bridge, where the EVMs join."""
    yield "link set lo up"
    yield f"link set {UPLINK} up"
    if place.is_node:
        yield f"link add {BRIDGE} address {place.mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
        yield f"link set {UPLINK} master {BRIDGE}"
        yield f"link set {BRIDGE} up"
    yield f"addr add {place.address}/{PREFIX_LENGTH} dev {BRIDGE if place.is_node else UPLINK}"
