"""Which places a lab has, how they are wired and what they are called: pure, so that everybody derives the same.

A *place* is a machine of the lab: a bare-metal node, the controller's host, the volume server's host, a client, the
nodes' power switch. All of them hang on one switch, the bridge ``fabric`` in a network namespace of its own. The names
inside are the same in every lab; only the names of the network namespaces carry the lab's name.

In a lab with the network ``vpc`` there is a router instead, in that same namespace, as in a VPC: each node is alone on
a segment of its own, the other places are on ``fabric`` together, and what goes from one segment to another goes by a
route to its address. The router answers every ARP request for an address that is elsewhere (proxy ARP), so that to
everybody the IPv4 subnet looks like one link; but no frame of a node reaches another place, not even a broadcast. IPv6
addresses have no neighbours at all there, and the router as gateway. What is sent to one that nobody has is dropped
without a word, as in a VPC.
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
SUBNET_IPV6 = "fd77::/64"
EVMS_IPV6 = "fd77::1:0:0:0/80"

CONTROLLER_PORT = 7440
AGENT_PORT = 7443
LINK_PORT = 7444
VOLUMES_PORT = 7450
POWER_PORT = 7460
NBD_PORTS = (10900, 12000)

BRIDGE = "br0"
UPLINK = "eth0"
FABRIC = "fabric"
SEGMENT = "seg-"
"""and a node's name: the bridge that the node is alone on"""
ROUTER = "10.77.0.1"
"""https://docs.aws.amazon.com/vpc/latest/userguide/subnet-sizing.html: the first host's address is the VPC router's"""
ROUTER_MAC = "02:77:00:00:ff:01"
ROUTER_LINK_LOCAL = "fe80::77:ff:fe00:ff01"
_PLAIN = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"

MAX_NODES = 200


class Network(StrEnum):
    """How EVMs' addresses reach them."""

    L2 = "l2"
    """one segment, where every address is announced"""
    VPC = "vpc"
    """a cloud's network, which routes by address to the interface that has it"""


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
    def ipv6(self) -> str:
        return f"fd77::{self.number:x}"

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
    network: Network = Network.L2

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

    def fabric_settings(self) -> dict[str, str]:
        """Return the settings of its router, below /proc/sys/net in the fabric's namespace."""
        if self.network is Network.L2:
            return {}
        segments = [FABRIC, *(self.segment(place) for place in self.node_places)]
        # Else it waits up to 0.8 s to answer.
        at_once = {f"ipv4/neigh/{segment}/proxy_delay": "0" for segment in segments}
        no_redirects = {f"ipv4/conf/{which}/send_redirects": "0" for which in ("all", *segments)}
        forwards = {"ipv4/ip_forward": "1", "ipv4/conf/all/proxy_arp": "1", "ipv6/conf/all/forwarding": "1"}
        return forwards | at_once | no_redirects

    def fabric_commands(self) -> Iterator[str]:
        """Yield ``ip -batch`` lines that make cables and switch, or router, run inside the fabric's namespace."""
        yield f"link add {FABRIC} {_PLAIN}"
        if self.network is Network.VPC:
            yield from self._router_commands()
        for place in self.places:
            yield from self.cable_commands(place)
            yield plug_command(place, "up")
        yield f"link set {FABRIC} up"

    def _router_commands(self) -> Iterator[str]:
        """Yield those of the router. A node's segment outlives its cable, and so do the routes to it."""
        yield "link set lo up"
        for segment in (FABRIC, *(self.segment(place) for place in self.node_places)):
            if segment != FABRIC:
                yield f"link add {segment} {_PLAIN}"
            yield f"link set {segment} address {ROUTER_MAC} addrgenmode none up"
            yield f"addr add {ROUTER_LINK_LOCAL}/64 dev {segment} nodad"
        yield f"addr add {ROUTER}/{PREFIX_LENGTH} dev {FABRIC}"
        yield f"route add blackhole {SUBNET_IPV6}"
        for place in self.places:
            if place.is_node:
                yield f"route add {place.address}/32 dev {self.segment(place)}"
            yield f"route add {place.ipv6}/128 dev {self.segment(place)}"

    def segment(self, place: Place) -> str:
        """Return the bridge in the fabric's namespace that a place's cable ends at."""
        return SEGMENT + place.name if place.is_node and self.network is Network.VPC else FABRIC

    def cable_commands(self, place: Place) -> Iterator[str]:
        """Yield those that make one place's cable; its port on the switch is still down."""
        # Both ends are made where they belong, so no name can clash with an interface of the machine itself.
        theirs = f"name {UPLINK} address {place.mac} netns {self.namespace(place.name)}"
        yield f"link add {place.name} type veth peer {theirs}"
        yield f"link set {place.name} master {self.segment(place)}"

    def place_commands(self, place: Place) -> Iterator[str]:
        """Yield ``ip -batch`` lines that give a place its addresses.

        Where EVMs are on the nodes' segment, a node has it on its bridge, where they join, and none of IPv6.
        """
        yield "link set lo up"
        yield f"link set {UPLINK} up"
        bridged = place.is_node and self.network is Network.L2
        if bridged:
            yield f"link add {BRIDGE} address {place.mac} {_PLAIN}"
            yield f"link set {UPLINK} master {BRIDGE}"
            yield f"link set {BRIDGE} up"
        yield f"addr add {place.address}/{PREFIX_LENGTH} dev {BRIDGE if bridged else UPLINK}"
        if self.network is Network.VPC:
            yield f"addr add {place.ipv6}/128 dev {UPLINK} nodad"
            yield f"route add {SUBNET_IPV6} via {ROUTER_LINK_LOCAL} dev {UPLINK}"
        elif not bridged:
            yield f"addr add {place.ipv6}/{SUBNET_IPV6.partition('/')[2]} dev {UPLINK} nodad"


def plug_command(place: Place, state: str) -> str:
    """Return the ``ip -batch`` line that sets a place's port on the switch ``up`` or ``down``."""
    return f"link set {place.name} {state}"
