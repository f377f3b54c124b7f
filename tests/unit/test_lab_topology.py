"""Places, addresses and names of a lab."""

from __future__ import annotations

import ipaddress

import pytest

from emp.lab.topology import EVM_FIRST, EVM_LAST, MAX_NODES, SUBNET, Network, Topology
from emp.model.errors import BadInput, NotFound

INTERFACE_NAME_BYTES = 15


def test_addresses_are_the_documented_ones() -> None:
    topology = Topology("demo", 3)
    assert {place.name: place.address for place in topology.places} == {
        "ctl": "10.77.0.2",
        "vol": "10.77.0.3",
        "client": "10.77.0.4",
        "bmc": "10.77.0.5",
        "n1": "10.77.0.11",
        "n2": "10.77.0.12",
        "n3": "10.77.0.13",
    }


def test_the_largest_lab_has_distinct_places_outside_the_evms_range() -> None:
    places = Topology("demo", MAX_NODES).places
    addresses = [ipaddress.IPv4Address(place.address) for place in places]
    assert len(set(addresses)) == len({place.mac for place in places}) == len(places)
    assert all(address in ipaddress.IPv4Network(SUBNET) for address in addresses)
    evms = ipaddress.IPv4Address(EVM_FIRST), ipaddress.IPv4Address(EVM_LAST)
    assert not any(evms[0] <= address <= evms[1] for address in addresses)


@pytest.mark.parametrize("network", Network)
def test_interface_names_fit_whatever_the_lab_is_called(network: Network) -> None:
    topology = Topology("x" * 63, MAX_NODES, network)
    inside = (line for place in topology.places for line in topology.place_commands(place))
    lines = [*topology.fabric_commands(), *inside]
    names = [line.split()[2] for line in lines if line.startswith(("link add", "link set"))]
    assert names
    assert max(map(len, names)) <= INTERFACE_NAME_BYTES
    assert max(map(len, topology.namespaces)) < 255


def test_namespaces_of_two_labs_never_meet() -> None:
    one, other = Topology("a", 5), Topology("a-n1", 5)
    assert not set(one.namespaces) & set(other.namespaces)


@pytest.mark.parametrize("name", ["../x", "a,b=c", "x" * 300, "", "A", "a/b", "-a", "a b", "a\n"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        Topology(name, 2)
    assert caught.value.field == "name"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("nodes", [0, -1, MAX_NODES + 1])
def test_bad_numbers_of_nodes_are_refused(nodes: int) -> None:
    with pytest.raises(BadInput, match="nodes"):
        Topology("demo", nodes)


def test_an_unknown_place_gets_told_which_there_are() -> None:
    with pytest.raises(NotFound, match="n1, n2"):
        Topology("demo", 2).place("n3")
