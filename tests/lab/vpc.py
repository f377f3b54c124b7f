"""What the tests of a pool in a VPC share: the pool, and what the cloud, its fabric and the nodes say of an address."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emp.host.run import run_sync
from emp.lab.down import down
from emp.lab.guest_control import Guest
from emp.lab.region import instance_of
from emp.lab.residue import Residue
from emp.lab.topology import FABRIC, UPLINK, Network, Topology
from emp.lab.up import Options, up
from tests.lab.cloud import call_all, calls_from
from tests.lab.conftest import Pool
from tests.lab.pool import Subject
from tests.leaks import outliving

SLOTS = 50
"""of each interface of a node"""


@contextmanager
def vpc_of_two(name: str) -> Iterator[Pool]:
    """Give a pool of two nodes, with fault points, whose addresses a cloud routes; afterwards nothing of it is left."""
    residue = Residue.watch(Topology(name, 2, Network.VPC))
    with outliving(f"the lab {name}"):
        made = Pool(up(Options(name, 2, network=Network.VPC, faults=True)))
    with calls_from(made):
        yield made
    down(made.files)
    assert residue.left() == []


def addresses_of(evm: Subject) -> list[str]:
    return [address for _, address in evm.spec.addresses]


def four_of(evm: Subject) -> list[str]:
    return [address for address in addresses_of(evm) if ":" not in address]


def enis(pool: Pool) -> dict[str, list[Any]]:
    """Return node -> its interfaces as the cloud describes them, the primary one first."""
    nodes = {instance_of(place): place.name for place in pool.topology.node_places}
    filters = [{"Name": "attachment.instance-id", "Values": list(nodes)}]
    (answer,) = call_all(pool, [("describe_network_interfaces", {"Filters": filters})])
    found: dict[str, list[Any]] = {node: [] for node in nodes.values()}
    for one in sorted(answer["NetworkInterfaces"], key=lambda one: one["Attachment"]["DeviceIndex"]):
        found[nodes[one["Attachment"]["InstanceId"]]].append(one)
    return found


def eni(pool: Pool, node: str) -> Any:
    """Return the primary interface of a node."""
    return enis(pool)[node][0]


def private(*interfaces: Any) -> set[str]:
    """Return the addresses of interfaces, IPv4 and IPv6."""
    six = {each["Ipv6Address"] for one in interfaces for each in one["Ipv6Addresses"]}
    return six | {each["PrivateIpAddress"] for one in interfaces for each in one["PrivateIpAddresses"]}


def routed(pool: Pool, address: str) -> str | None:
    """Return where the fabric sends what is for an address; None: nowhere in particular."""
    version, fabric = "-6" if ":" in address else "-4", pool.topology.namespace(FABRIC)
    routes = json.loads(run_sync("ip", version, "-n", fabric, "-json", "route", "show", address))
    return str(routes[0]["dev"]) if routes else None


def is_only_at(evm: Subject, node: str) -> None:
    """The cloud, its fabric and the nodes agree, and every address answers."""
    pool, addresses = evm.pool, addresses_of(evm)
    evm.check_only_on(node)
    for address in addresses:
        assert routed(pool, address) == pool.topology.segment(pool.topology.place(node))
    for where, interfaces in enis(pool).items():
        if where == node:
            assert set(addresses) < private(*interfaces)
            continue
        assert not set(addresses) & private(*interfaces)
        for version in ("-4", "-6"):
            routes = run_sync("ip", version, "-n", pool.topology.namespace(where), "route")
            assert not set(addresses) & set(routes.split())
    for address in addresses:
        Guest(pool.topology, address).wait_first_packet()


@contextmanager
def arrivals(pool: Pool, addresses: Sequence[str]) -> Iterator[Callable[[], dict[str, int]]]:
    """Count what the fabric brings to each node for some IPv4 addresses; give a function that returns the counts."""
    rules = f"type filter hook ingress device {UPLINK} priority 0; ip daddr {{ {', '.join(addresses)} }} counter"
    table = f"table netdev arrivals {{\n chain uplink {{ {rules}; }}\n}}"
    nodes = [place.name for place in pool.topology.node_places]

    def count(node: str) -> int:
        listed = json.loads(pool.run_in(node, "nft", "--json", "list", "table", "netdev", "arrivals").stdout)
        (rule,) = (each["rule"] for each in listed["nftables"] if "rule" in each)
        return int(next(part["counter"]["packets"] for part in rule["expr"] if "counter" in part))

    try:
        for node in nodes:
            pool.run_in(node, "nft", table)
        yield lambda: {node: count(node) for node in nodes}
    finally:
        for node in nodes:
            pool.run_in(node, "nft", "add table netdev arrivals; delete table netdev arrivals")
