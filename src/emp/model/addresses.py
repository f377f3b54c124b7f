"""Addresses in a cloud that routes them: which network interface of which node has them, and what moving them took."""

from __future__ import annotations

from pydantic import Field

from emp.model.base import Model
from emp.model.names import Name


class InterfaceFacts(Model):
    """A network interface of a node, as the cloud describes it."""

    id: str
    node: Name
    addresses: tuple[str, ...] = ()
    """all it has, IPv4 and IPv6"""
    slots: int
    """IPv4 addresses and prefixes that it can have"""
    free: int
    """of those, for more"""
    ipv6_slots: int = 0
    ipv6_free: int = 0
    """as ``slots`` and ``free``, of IPv6"""
    prefixes: tuple[str, ...] = ()
    """IPv4 blocks that are delegated to it"""
    source_dest_check: bool = False
    """the cloud drops what it sends under, or gets for, an address that it does not have"""


class AddressFacts(Model):
    """Of the whole pool."""

    interfaces: tuple[InterfaceFacts, ...] = ()
    delegated: dict[str, str] = Field(default_factory=dict)
    """address -> the prefix that it is of: such a one does not move by itself"""
    problem: str | None = None
    """why the cloud could not be asked"""


class Assigned(Model):
    """How addresses came to a node."""

    took_s: float
    """from the first look until the cloud said that all are there"""
    calls: int
    """orders; 0: they were there"""
    ipv6_gap_s: float | None = None
    """for so long IPv6 addresses, the longest one, were no interface's, as they cannot be reassigned in one step: from
    the order to unassign one to the answer to the one that assigned it. None: the EVM has no IPv6 address"""
    ipv6_gap_is_least: bool = False
    """it was longer: it began, or was over, before this controller looked"""


class AddressMove(Model):
    """What moving an EVM's addresses took, in the report of its migration."""

    addresses: int
    reassign_s: float
    """from the first order until the cloud said that all are the target's"""
    calls: int
    tries: int = 1
    ipv6_gap_s: float | None = None
    """see ``Assigned``; packets for them that came meanwhile, or before the last order took effect, are lost"""
    ipv6_gap_is_least: bool = False
    """see ``Assigned``"""
