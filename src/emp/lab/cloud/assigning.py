"""Who has which address in the simulated cloud: given to network interfaces, taken from them, on their way between two.

An address that is reassigned stays its old interface's until the data plane has moved it (``network.Network``). Pages
are below https://docs.aws.amazon.com/AWSEC2/latest/APIReference/.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from emp.lab.cloud import addresses
from emp.lab.cloud.eni_records import LIMITS, WIDEST, Interface, NetworkLimits, Remap
from emp.lab.cloud.errors import CloudError, check_simulated
from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.records import Instance, check_id
from emp.lab.cloud.vpc import Subnet, Vpc

Request = Mapping[str, Any]
Answer = dict[str, Any] | None


class Assignments:
    """Of all ``interfaces``; times are ``clock``'s."""

    def __init__(
        self,
        vpc: Vpc,
        instances: Mapping[str, Instance],
        *,
        clock: Callable[[], float],
        knobs: Callable[[], Knobs],
    ) -> None:
        self._vpc = vpc
        self._instances = instances
        self._clock = clock
        self._knobs = knobs
        self.interfaces: dict[str, Interface] = {}
        self.remaps: dict[str, Remap] = {}
        """address -> where it is on its way to"""
        self.moves = 0
        """addresses that have been sent on their way so far"""
        vpc.holders.append(self.given)

    def find(self, name: str) -> Interface:
        """Raise InvalidNetworkInterfaceId.Malformed or InvalidNetworkInterfaceID.NotFound."""
        found = self.interfaces.get(check_id("eni", name))
        if found is None or found.visible_s > self._clock():
            raise CloudError("InvalidNetworkInterfaceID.NotFound", f"The networkInterface ID '{name}' does not exist")
        return found

    def assign_ipv4(self, request: Request) -> Answer:
        """``API_AssignPrivateIpAddresses.html``; all that is asked for, or nothing."""
        eni = self.find(request["NetworkInterfaceId"])
        ways = ("PrivateIpAddresses", "SecondaryPrivateIpAddressCount", "Ipv4Prefixes", "Ipv4PrefixCount")
        addresses.one_way(request, *ways)
        wanted, prefixes = self.chosen(eni, request)
        moved = self._check_moves(eni, wanted, may=request.get("AllowReassignment", False))
        fresh = [address for address in wanted if self.holder(eni.vpc, address) is None]
        self.check_room(eni, len(fresh) + len(prefixes) + sum(not self._is_coming(a, eni) for a in moved))
        eni.addresses += fresh
        eni.prefixes += prefixes
        for address in moved:
            if not self._is_coming(address, eni):  # given twice, it takes no longer
                self._send(address, eni, self._draw_s())
        for address in set(wanted) & set(eni.addresses):
            self.remaps.pop(address, None)  # it was about to leave, and stays
        return {
            "NetworkInterfaceId": eni.id,
            "AssignedPrivateIpAddresses": [{"PrivateIpAddress": address} for address in wanted],
            "AssignedIpv4Prefixes": [{"Ipv4Prefix": prefix} for prefix in prefixes],
        }

    def _draw_s(self) -> float:
        """Return how long the next address is on its way."""
        self.moves += 1
        return self._knobs().remap.draw_s(self.moves - 1)

    def _send(self, address: str, eni: Interface, takes_s: float) -> None:
        self.remaps[address] = Remap(address, eni.id, self._clock() + takes_s)

    def _check_moves(self, eni: Interface, wanted: Iterable[str], *, may: bool) -> list[str]:
        """Return those that have to come from another interface. Only a secondary one of the same subnet does."""
        moved = []
        for address in wanted:
            holder = self.holder(eni.vpc, address)
            if holder is None:
                continue
            if isinstance(holder, str) and self._is_coming(address, eni):
                moved.append(address)  # its old interface has been made to give it up meanwhile
                continue
            if isinstance(holder, str):
                raise CloudError("InvalidParameterValue", f"[{address}] is assigned to {holder}, and does not move")
            if address == holder.addresses[0]:
                raise CloudError("InvalidParameterValue", f"[{address}] is a primary address, and does not move")
            if address not in holder.addresses:
                message = f"[{address}] is of a prefix delegated to {holder.id}, and does not move by itself"
                raise CloudError("InvalidParameterValue", message)
            if not may:
                raise CloudError("InvalidParameterValue", f"[{address}] is assigned, but move is not allowed")
            if holder is not eni:
                moved.append(address)
        return moved

    def unassign_ipv4(self, request: Request) -> Answer:
        """``API_UnassignPrivateIpAddresses.html``: secondary addresses and prefixes that it has."""
        eni = self.find(request["NetworkInterfaceId"])
        if addresses.one_way(request, "PrivateIpAddresses", "Ipv4Prefixes") == "Ipv4Prefixes":
            _remove(eni.prefixes, request["Ipv4Prefixes"], eni)
        else:
            addresses.check_removable(eni, request["PrivateIpAddresses"])
            _remove(eni.addresses, request["PrivateIpAddresses"], eni)
        return None

    def assign_ipv6(self, request: Request) -> Answer:
        """``API_AssignIpv6Addresses.html``: what another interface has stays there, as there is no reassignment.

        No page says when an address that was assigned is reached. Here it is on its way as one of IPv4 that moves,
        and no interface's in any answer meanwhile.
        """
        check_simulated(request, ("Ipv6Prefixes", "Ipv6PrefixCount"))
        eni = self.find(request["NetworkInterfaceId"])
        addresses.one_way(request, "Ipv6Addresses", "Ipv6AddressCount")
        fresh = self.chosen_ipv6(eni, request, request.get("Ipv6Addresses", ()))
        for address in fresh:
            if takes_s := self._draw_s():
                self._send(address, eni, takes_s)
            else:
                eni.ipv6.append(address)
        return {"NetworkInterfaceId": eni.id, "AssignedIpv6Addresses": fresh, "AssignedIpv6Prefixes": []}

    def unassign_ipv6(self, request: Request) -> Answer:
        """``API_UnassignIpv6Addresses.html``"""
        check_simulated(request, ("Ipv6Prefixes",))
        eni = self.find(request["NetworkInterfaceId"])
        addresses.one_way(request, "Ipv6Addresses")
        subnet = self._vpc.subnets[eni.subnet]
        wanted = [addresses.check_ipv6(address, subnet) for address in request["Ipv6Addresses"]]
        _remove(eni.ipv6, wanted, eni)
        return {"NetworkInterfaceId": eni.id, "UnassignedIpv6Addresses": wanted, "UnassignedIpv6Prefixes": []}

    def chosen(
        self, eni: Interface, request: Request, *, with_prefixes_of_structures: bool = False
    ) -> tuple[list[str], list[str]]:
        """Return the addresses and the prefixes that a request names, or as many free ones as it asks for."""
        subnet = self._vpc.subnets[eni.subnet]
        named = [addresses.check_ipv4(address, subnet) for address in request.get("PrivateIpAddresses", ())]
        _check_once(named)
        chosen = list(named)
        for _ in range(_count(request, "SecondaryPrivateIpAddressCount")):
            chosen.append(self.free(subnet, [*chosen, *eni.addresses]))
        listed = request.get("Ipv4Prefixes", ())
        wanted = [each["Ipv4Prefix"] for each in listed] if with_prefixes_of_structures else list(listed)
        _check_once(wanted)
        taken = [*self._vpc.taken(subnet.vpc), *eni.addresses]
        prefixes = [addresses.check_prefix(text, subnet, taken) for text in wanted]
        for _ in range(_count(request, "Ipv4PrefixCount")):
            prefixes.append(addresses.free_prefix(subnet, [*taken, *prefixes]))
        return chosen, prefixes

    def chosen_ipv6(self, eni: Interface, request: Request, named: Sequence[str]) -> list[str]:
        subnet = self._vpc.subnets[eni.subnet]
        chosen = [addresses.check_ipv6(address, subnet) for address in named]
        _check_once(chosen)
        taken = {address for each in self.interfaces.values() for address in each.ipv6} | self.remaps.keys()
        if held := [address for address in chosen if address in taken]:
            raise CloudError("InvalidIPAddress.InUse", f"Address {held[0]} is in use")
        count, ends = _count(request, "Ipv6AddressCount"), subnet.usable_ipv6
        if count and ends is None:
            raise CloudError("InvalidParameterValue", f"The subnet {subnet.id} has no IPv6")
        coming = sum(self._is_coming(address, eni) for address in self.remaps if ":" in address)
        check_slots(eni, self._limits(eni), 0, len(eni.ipv6) + coming + len(chosen) + count)
        candidate = ends[0] if ends else None
        while candidate is not None and len(chosen) < len(named) + count:
            if (text := str(candidate)) not in taken and text not in chosen:
                chosen.append(text)
            candidate += 1
        return chosen

    def free(self, subnet: Subnet, others: Iterable[str]) -> str:
        free = self._vpc.free_address(subnet, [*self._vpc.taken(subnet.vpc), *others])
        if free is None:
            message = f"The subnet {subnet.id} has not enough free addresses"
            raise CloudError("InsufficientFreeAddressesInSubnet", message)
        return free

    def check_room(self, eni: Interface, more: int) -> None:
        coming = sum(self._is_coming(address, eni) for address in self.remaps if ":" not in address)
        check_slots(eni, self._limits(eni), len(eni.addresses) + len(eni.prefixes) + coming + more, 0)

    def _limits(self, eni: Interface) -> NetworkLimits:
        return LIMITS[self._instances[eni.attachment.instance].type] if eni.attachment else WIDEST

    def _is_coming(self, address: str, eni: Interface) -> bool:
        return address in self.remaps and self.remaps[address].target == eni.id

    def holder(self, vpc: str, address: str) -> Interface | str | None:
        """Return who has an IPv4 address: an interface, or the name of another service's."""
        parsed = ipaddress.IPv4Address(address)
        for eni in self.interfaces.values():
            if eni.vpc == vpc and (address in eni.addresses or eni.prefix_of(parsed)):
                return eni
        return "another service" if address in self._vpc.taken(vpc) else None

    def given(self) -> Iterator[tuple[str, str]]:
        for eni in self.interfaces.values():
            yield from ((eni.subnet, address) for address in eni.everything())
        # One that was unassigned while it moved is nobody's, and not free.
        yield from ((self.interfaces[remap.target].subnet, remap.address) for remap in self.remaps.values())


def check_slots(eni: Interface, limits: NetworkLimits, ipv4: int, ipv6: int) -> None:
    if ipv4 > limits.ipv4 or ipv6 > limits.ipv6:
        message = (
            f"Number of private addresses will exceed limit: {eni.id} takes {limits.ipv4}, and {limits.ipv6} of IPv6"
        )
        raise CloudError("PrivateIpAddressLimitExceeded", message)


def _check_once(wanted: Sequence[str]) -> None:
    if len(set(wanted)) < len(wanted):
        raise CloudError("InvalidParameterValue", "An address is named twice")


def _count(request: Request, name: str) -> int:
    count: int = request.get(name, 0)
    if name in request and count < 1:
        raise CloudError("InvalidParameterValue", f"Value ({count}) for parameter {name} is invalid.")
    return count


def _remove(there: list[str], wanted: Sequence[str], eni: Interface) -> None:
    if strange := [each for each in wanted if each not in there]:
        message = f"Some of [{', '.join(strange)}] are not assigned to interface {eni.id}"
        raise CloudError("InvalidParameterValue", message)
    there[:] = [each for each in there if each not in wanted]
