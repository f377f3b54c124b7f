"""Which address and MAC an EVM's cards and pods get. Pure; that two EVMs never get the same one is a transaction's job.

A MAC is made of its address: what an address was last seen with stays true when the address is handed out again, and
uniqueness of the one is uniqueness of the other. Cards get ``52:54:00`` and the address's last three bytes, pods the
locally administered ``02:00`` and all four (IEEE 802-2014 section 8.4: bit 1 of the first byte).
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterator, Sequence, Set

from emp.controller.config import Network
from emp.model.base import Model
from emp.model.errors import AlreadyExists, BadInput, Conflict
from emp.model.evm import EvmSpec, Nic, Pod
from emp.model.names import Name, check_ip, check_name

LEARNT = "learnt"


class Claim(Model):
    """The record that an address is taken, under the address as its name."""

    address: str
    mac: str
    evm: Name
    holder: str
    """``nic 0``, ``pod NAME``, or ``learnt``: its guest took it by itself"""


class PodWish(Model):
    name: Name
    address: str | None


def parse_pods(texts: Sequence[str]) -> tuple[PodWish, ...]:
    """Read ``NAME`` and ``NAME=ADDRESS``. Raises ``BadInput`` naming the place."""
    wishes: list[PodWish] = []
    for index, text in enumerate(texts):
        field = f"pods[{index}]"
        name, given, address = text.partition("=")
        check_name(name, field=field)
        if name in (wish.name for wish in wishes):
            raise BadInput(f"two pods are named {name}", field=field, hint="give each pod a name of its own")
        wishes.append(PodWish(name=name, address=check_ip(address, field=field) if given else None))
    return tuple(wishes)


def hand_out(
    network: Network, taken: Set[str], *, nics: int, pods: Sequence[PodWish]
) -> tuple[tuple[Nic, ...], tuple[Pod, ...]]:
    """Return the cards and pods of a new EVM with addresses that are not ``taken``.

    Raises ``BadInput`` for an address outside of the pool's range, ``AlreadyExists`` for one that is taken,
    ``Conflict`` when the range is used up.
    """
    prefix_length = network.block.prefixlen
    asked: set[str] = set()
    for index, pod in enumerate(pods):
        if pod.address is not None:
            _check_asked(network, pod.address, taken | asked, field=f"pods[{index}]")
            asked.add(pod.address)
    free = _free(network, taken | asked)
    cards = tuple(
        Nic(mac=nic_mac(address), address=address, prefix_length=prefix_length)
        for address in _take(free, nics, network)
    )
    placed = []
    for pod in pods:
        address = pod.address or _take(free, 1, network)[0]
        placed.append(Pod(name=pod.name, mac=pod_mac(address), address=address, prefix_length=prefix_length))
    return cards, tuple(placed)


def claims(spec: EvmSpec) -> tuple[Claim, ...]:
    """Return every address that ``spec`` holds."""
    cards = tuple(
        Claim(address=nic.address, mac=nic.mac, evm=spec.name, holder=f"nic {index}")
        for index, nic in enumerate(spec.nics)
    )
    return cards + tuple(
        Claim(address=pod.address, mac=pod.mac, evm=spec.name, holder=f"pod {pod.name}") for pod in spec.pods
    )


def nic_mac(address: str) -> str:
    return _mac(b"\x52\x54\x00" + ipaddress.IPv4Address(address).packed[1:])


def pod_mac(address: str) -> str:
    return _mac(b"\x02\x00" + ipaddress.IPv4Address(address).packed)


def _mac(octets: bytes) -> str:
    return octets.hex(":")


def _check_asked(network: Network, address: str, taken: Set[str], *, field: str) -> None:
    ip = ipaddress.ip_address(address)
    if not isinstance(ip, ipaddress.IPv4Address) or not network.hands_out(ip):
        raise BadInput(
            f"{address} is not an address that this pool hands out",
            field=field,
            hint=f"one from {network.evm_first} to {network.evm_last}, or leave it out",
        )
    if address in taken:
        raise AlreadyExists(f"{address} is taken", field=field, hint="choose another, or leave it out")


def _free(network: Network, taken: Set[str]) -> Iterator[str]:
    """Addresses in order. Those ending in 0 and 255 are left out: software exists that takes them for a network's."""
    for number in range(int(network.first), int(network.last) + 1):
        if number & 0xFF in (0, 0xFF):
            continue
        address = str(ipaddress.IPv4Address(number))
        if address not in taken:
            yield address


def _take(free: Iterator[str], count: int, network: Network) -> tuple[str, ...]:
    found = tuple(itertools.islice(free, count))
    if len(found) < count:
        raise Conflict(
            f"no address is left from {network.evm_first} to {network.evm_last}",
            field="network",
            hint="delete an EVM, or widen the range in the controller's configuration",
        )
    return found
