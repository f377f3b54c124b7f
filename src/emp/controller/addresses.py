"""Which address and MAC an EVM's cards and pods get. Pure; that two EVMs never get the same one is a transaction's job.

A MAC is made of its address: what an address was last seen with stays true when the address is handed out again, and
uniqueness of the one is uniqueness of the other. Cards get ``52:54:00`` and the address's last three bytes, pods the
locally administered ``02:00`` and all four (IEEE 802-2014 section 8.4: bit 1 of the first byte). An IPv6 address that
is chosen ends with the IPv4 address beside it.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterator, Sequence, Set
from itertools import zip_longest

from emp.controller.config import Ipv6Subnet, Network
from emp.model.base import Model
from emp.model.errors import AlreadyExists, BadInput, Conflict
from emp.model.evm import ROUTED_GATEWAY, EvmSpec, Ipv6, Nic, Pod
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
    ipv6: str | None = None
    """an address, or ``auto``; None: it has none"""


AUTO = "auto"
"""an IPv6 address that the pool chooses"""


def parse_pods(texts: Sequence[str]) -> tuple[PodWish, ...]:
    """Read ``NAME[=ADDRESS[,ADDRESS]]``: one of IPv4, one of IPv6 or ``auto``. Raises ``BadInput`` naming the place."""
    wishes: list[PodWish] = []
    for index, text in enumerate(texts):
        field = f"pods[{index}]"
        name, given, address = text.partition("=")
        check_name(name, field=field)
        if name in (wish.name for wish in wishes):
            raise BadInput(f"two pods are named {name}", field=field, hint="give each pod a name of its own")
        four, six = _by_version(address.split(","), field) if given else (None, None)
        wishes.append(PodWish(name=name, address=four, ipv6=six))
    return tuple(wishes)


def _by_version(texts: Sequence[str], field: str) -> tuple[str | None, str | None]:
    found: dict[int, str] = {}
    for text in texts:
        address = text if text == AUTO else check_ip(text, field=field)
        version = 6 if ":" in address or address == AUTO else 4
        if version in found:
            hint = "write NAME[=ADDRESS[,ADDRESS]]: one of IPv4, one of IPv6 or auto"
            raise BadInput(f"two IPv{version} addresses for one pod", field=field, hint=hint)
        found[version] = address
    return found.get(4), found.get(6)


def parse_ipv6(texts: Sequence[str], *, nics: int) -> tuple[str, ...]:
    """Read the IPv6 addresses of the first cards: each an address or ``auto``. Raises ``BadInput`` naming the place."""
    if len(texts) > nics:
        raise BadInput(
            f"{len(texts)} IPv6 addresses for {nics} network cards",
            field="ipv6",
            hint="one for each card, in their order; pods have theirs in pods",
        )
    for index, text in enumerate(texts):
        if text != AUTO and ":" not in text:
            hint = "one of those that this pool hands out (network.ipv6.evms of its configuration), or auto"
            raise BadInput(f"{text[:60]!r} is not an IPv6 address", field=f"ipv6[{index}]", hint=hint)
    return tuple(text if text == AUTO else check_ip(text, field=f"ipv6[{n}]") for n, text in enumerate(texts))


def hand_out(
    network: Network, taken: Set[str], *, nics: int, pods: Sequence[PodWish], ipv6: Sequence[str] = ()
) -> tuple[tuple[Nic, ...], tuple[Pod, ...]]:
    """Return the cards and pods of a new EVM with addresses that are not ``taken``. ``ipv6``: of the first cards.

    Raises ``BadInput`` for an address outside of the pool's range, ``AlreadyExists`` for one that is taken,
    ``Conflict`` when the range is used up.
    """
    prefix_length = network.block.prefixlen
    asked: set[str] = set()
    for index, pod in enumerate(pods):
        if pod.address is not None:
            _check_asked(network, pod.address, taken | asked, field=f"pods[{index}]")
            asked.add(pod.address)
    named = [(f"ipv6[{n}]", text) for n, text in enumerate(ipv6)] + [(f"pods[{n}]", p.ipv6) for n, p in enumerate(pods)]
    six = _Ipv6(network, taken, [(field, text) for field, text in named if text is not None])
    free = _free(network, taken | asked)
    cards = tuple(
        Nic(mac=nic_mac(address), address=address, prefix_length=prefix_length, ipv6=six.of(wish, address))
        for address, wish in zip_longest(_take(free, nics, network), ipv6)
    )
    placed = []
    for pod in pods:
        address = pod.address or _take(free, 1, network)[0]
        more = six.of(pod.ipv6, address)
        placed.append(Pod(name=pod.name, mac=pod_mac(address), address=address, prefix_length=prefix_length, ipv6=more))
    return cards, tuple(placed)


class _Ipv6:
    """Gives what is asked for, or chooses. ``wishes``: (field, address or ``auto``) of the whole EVM."""

    def __init__(self, network: Network, taken: Set[str], wishes: Sequence[tuple[str, str]]) -> None:
        self._subnet = network.ipv6
        self._is_routed = network.vpc is not None
        self._taken = set(taken)
        for field, text in wishes:
            if self._subnet is None:
                hint = "name the subnet's IPv6 block in network.ipv6 of the controller's configuration"
                raise BadInput("this pool hands out no IPv6 addresses", field=field, hint=hint)
            if text != AUTO:
                self._check(self._subnet, text, field)
                self._taken.add(text)

    def _check(self, subnet: Ipv6Subnet, text: str, field: str) -> None:
        ip = ipaddress.ip_address(text)
        if not isinstance(ip, ipaddress.IPv6Address) or not subnet.hands_out(ip):
            raise BadInput(
                f"{text} is not an IPv6 address that this pool hands out",
                field=field,
                hint=f"one of {subnet.evms}, or auto",
            )
        if text in self._taken:
            raise AlreadyExists(f"{text} is taken", field=field, hint="choose another, or auto")

    def of(self, wish: str | None, beside: str) -> Ipv6 | None:
        """Return what a card or pod gets with the IPv4 address ``beside``."""
        if wish is None or self._subnet is None:
            return None
        address = self._choose(self._subnet, beside) if wish == AUTO else wish
        if self._is_routed:
            return Ipv6(address=address, prefix_length=128, gateway=ROUTED_GATEWAY)
        return Ipv6(address=address, prefix_length=self._subnet.block.prefixlen)

    def _choose(self, subnet: Ipv6Subnet, beside: str) -> str:
        low = int(ipaddress.IPv4Address(beside))
        for high in range(1 << (96 - subnet.handed_out.prefixlen)):
            address = str(subnet.handed_out[(high << 32) + low])
            if address not in self._taken:
                self._taken.add(address)
                return address
        hint = "name one, or widen network.ipv6.evms in the controller's configuration"
        raise Conflict(f"no IPv6 address of {subnet.evms} is left beside {beside}", field="network", hint=hint)


def claims(spec: EvmSpec) -> tuple[Claim, ...]:
    """Return every address that ``spec`` holds."""
    holders = {nic.mac: f"nic {index}" for index, nic in enumerate(spec.nics)}
    holders |= {pod.mac: f"pod {pod.name}" for pod in spec.pods}
    return tuple(Claim(address=address, mac=mac, evm=spec.name, holder=holders[mac]) for mac, address in spec.addresses)


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
