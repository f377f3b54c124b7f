"""Private addresses of Amazon EC2: reassigned between the nodes' network interfaces, by the EC2 API.

IPv4 moves in one order, ``AllowReassignment``, that takes effect some time after it was answered; until then the old
interface has the address in every answer. For IPv6 there is no such flag
(https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_AssignIpv6Addresses.html): it is unassigned, then assigned,
and nobody's in between (``gaps``). What its new interface refuses goes back to the old one.

Each order is a loop that looks, acts if there is something to do, and looks again, as in ``emp.volumes.ebs``. The cloud
goes by the last order that it gets, so one controller at a time may call, and of one EVM's addresses one order is out
at a time, also when who gave it waits no longer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path
from typing import Any

from emp.addresses.gaps import Gaps
from emp.aws.api import READ_S, Ec2Api, code_of, make_client
from emp.aws.patience import Pace, Time
from emp.model.addresses import AddressFacts, Assigned, InterfaceFacts
from emp.model.errors import BadInput, Conflict, EmpError, NotFound, OutcomeUnknown, Refused

log = logging.getLogger(__name__)

CONFIRM_S = 60.0
"""how long to wait for the cloud to have moved an address; AWS states no figure"""
AGAIN_S = 10.0
"""an order whose effect has not come by then is given again: twice is no more than once"""
_LOOKS = Pace(first_s=0.1, share=0.1, longest_s=2.0)
"""the source forwards meanwhile: to look late costs nothing but its being needed that much longer"""
_FILTER_VALUES = 200
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_Filter.html"""
IPV4, IPV6 = "IPv4", "IPv6"
_FULL = "PrivateIpAddressLimitExceeded"

_REFUSALS: dict[str, tuple[type[EmpError], str, str]] = {
    _FULL: (Refused, "interfaces", "attach another network interface to the node"),
    "InvalidNetworkInterfaceID.NotFound": (NotFound, "interfaces", "correct the interface's id in the configuration"),
    "InvalidNetworkInterfaceId.Malformed": (BadInput, "interfaces", "an id is eni- and 17 hexadecimal digits"),
    "InvalidIPAddress.InUse": (Conflict, "addresses", "something else of the subnet has it"),
    "InvalidInstanceID.NotFound": (NotFound, "node", "correct the node's instance id in the configuration"),
    "UnauthorizedOperation": (Refused, "credentials", "give the controller's role this permission"),
}
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html"""


@dataclass
class _Order:
    """One ``assign`` on its way."""

    node: str
    addresses: tuple[str, ...]
    ordered_s: dict[str, float] = field(default_factory=dict)
    full: set[tuple[str, str]] = field(default_factory=set)
    """interfaces that took no more, and of which family"""
    calls: int = 0


Give = Callable[[_Order, str, Sequence[str]], Awaitable[None]]
"""gives addresses to an interface"""


class Ec2AddressMover:
    """See ``emp.addresses.base.AddressMover``. ``instances``: node -> instance id.

    ``interfaces``: node -> the interfaces to use, in the order to fill them; of a node that is left out it is every one
    of its instance's. The rest is as for ``emp.volumes.ebs.EbsVolumeDriver``.
    """

    def __init__(
        self,
        instances: Mapping[str, str],
        *,
        region: str,
        interfaces: Mapping[str, Sequence[str]] | None = None,
        endpoint_url: str | None = None,
        ca_file: Path | None = None,
        credentials_file: Path | None = None,
        client: Callable[[], Any] | None = None,
        times: Time | None = None,
        confirm_s: float = CONFIRM_S,
        read_s: float = READ_S,
    ) -> None:
        self._instances = dict(instances)
        self._nodes = {instance: node for node, instance in instances.items()}
        self._allowed = {node: tuple(ids) for node, ids in (interfaces or {}).items()}
        self._times = times or Time()
        self._confirm_s = confirm_s

        def make() -> Any:
            return make_client(
                region, endpoint_url=endpoint_url, ca_file=ca_file, credentials_file=credentials_file, read_s=read_s
            )

        self._api = Ec2Api(client or make, self._times, refusals=_REFUSALS)
        self._slots: dict[str, tuple[int, int]] = {}
        """instance -> IPv4 and IPv6 addresses that an interface of it takes"""
        self._coming: dict[str, str] = {}
        """address -> the interface that it was last ordered to, until it is there"""
        self._gaps = Gaps(self._times.clock)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._filling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """by node"""
        self._out: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Waits for orders that are out."""
        await asyncio.gather(*self._out, return_exceptions=True)
        await self._api.aclose()

    # ------------------------------------------------------------------ orders

    async def assign(self, addresses: Sequence[str], *, node: str, insist: bool = False) -> Assigned:
        order, began_s = _Order(node, tuple(addresses)), self._times.clock()
        async with self._locks[addresses[0]]:
            pass  # an order is out, given by somebody who waits no longer: what it does must be seen, or overruled
        while insist:
            insist = not await self._insist(order)
        patience = self._times.patience(self._confirm_s, _LOOKS)
        while True:
            there = await self._at([node])
            missing = self._missing(order, there)
            if not missing:
                took_s = round(self._times.clock() - began_s, 3)
                gap_s, is_least = self._gaps.close(_ipv6(addresses))
                return Assigned(took_s=took_s, calls=order.calls, ipv6_gap_s=gap_s, ipv6_gap_is_least=is_least)
            now_s = self._times.clock()
            due = [a for a in missing if now_s - order.ordered_s.get(a, -AGAIN_S) >= AGAIN_S]
            if due:
                await self._undivided(addresses[0], self._order(order, due, there))
            await patience.pause(
                OutcomeUnknown(
                    f"{', '.join(missing[:3])} {'are' if len(missing) > 1 else 'is'} not {node}'s yet",
                    field="addresses",
                    hint="the order may still take effect; give it again",
                )
            )

    async def _insist(self, order: _Order) -> bool:
        """Order what is there already to stay; return whether that is sure."""
        for eni in await self._at([order.node]):
            if held := [address for address in order.addresses if address in eni.addresses and ":" not in address]:
                try:
                    await self._undivided(order.addresses[0], self._give_ipv4(order, eni.id, held))
                except OutcomeUnknown as error:
                    log.warning("%s; giving the order again", error)
                    return False
        return True

    async def _give_ipv4(self, order: _Order, eni: str, addresses: Sequence[str]) -> None:
        order.calls += 1
        await self._api.ask(
            "assign_private_ip_addresses",
            NetworkInterfaceId=eni,
            PrivateIpAddresses=list(addresses),
            AllowReassignment=True,
        )

    async def _give_ipv6(self, order: _Order, eni: str, addresses: Sequence[str]) -> None:
        order.calls += 1
        await self._api.ask("assign_ipv6_addresses", NetworkInterfaceId=eni, Ipv6Addresses=list(addresses))
        self._gaps.given(addresses)

    async def _undivided(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        """Carry out orders to their end, although the caller may be cancelled: a late one would undo the next."""

        async def alone() -> None:
            async with self._locks[key]:
                await work

        task = asyncio.create_task(alone(), name=f"order of {key}")
        self._out.add(task)
        task.add_done_callback(self._out.discard)
        await asyncio.shield(task)

    def _missing(self, order: _Order, there: Sequence[InterfaceFacts]) -> list[str]:
        held = {address for eni in there for address in eni.addresses}
        for address in held & set(order.addresses):
            self._coming.pop(address, None)
            self._gaps.given([address])
        return [address for address in order.addresses if address not in held]

    async def _order(self, order: _Order, due: Sequence[str], there: Sequence[InterfaceFacts]) -> None:
        try:
            if ipv4 := [address for address in due if address not in _ipv6(due)]:
                await self._fill(order, ipv4, there, self._give_ipv4, IPV4)
            if ipv6 := _ipv6(due):
                await self._order_ipv6(order, ipv6)
        except OutcomeUnknown as error:
            log.warning("%s; looking again", error)  # and if need be the order is given again, which does no harm

    async def _order_ipv6(self, order: _Order, due: Sequence[str]) -> None:
        """One of a node at a time: between a look at its slots and the order nobody else must be given them."""
        async with self._filling[order.node]:
            everywhere = await self._at(list(self._instances))
            self._gaps.looked(due, {address: eni.id for eni in everywhere for address in eni.addresses})
            there = [_of_ipv6(eni) for eni in everywhere if eni.node == order.node]
            due = [address for address in due if not any(address in eni.addresses for eni in there)]
            fresh = [address for address in due if self._coming.get(address) not in {eni.id for eni in there}]
            try:
                if fresh:  # what finds no room must not be taken from where it is
                    _share(order.node, fresh, _usable(order, there, IPV6), IPV6)
                await self._take_ipv6(order, fresh, everywhere)
                await self._fill(order, due, there, self._give_ipv6, IPV6)
            except Conflict as error:
                log.info("%s; looking again", error)  # the one that had it is not done yet
            except (BadInput, NotFound, Refused):
                await self._give_back(order, due)
                raise

    async def _take_ipv6(self, order: _Order, addresses: Sequence[str], everywhere: Sequence[InterfaceFacts]) -> None:
        for eni in everywhere:
            if not (held := [address for address in addresses if address in eni.addresses]):
                continue
            order.calls += 1
            self._gaps.taken(held, eni.id)
            for address in held:
                self._coming.pop(address, None)
            try:
                await self._api.ask("unassign_ipv6_addresses", NetworkInterfaceId=eni.id, Ipv6Addresses=held)
            except EmpError as error:
                if not isinstance(error, OutcomeUnknown):
                    self._gaps.kept(held)
                raise

    async def _give_back(self, order: _Order, addresses: Sequence[str]) -> None:
        """What the target does not take is its old interface's again: it is reached there, and forwarded."""
        for eni, some in self._gaps.origins(addresses).items():
            try:
                await self._give_ipv6(order, eni, some)
            except EmpError as error:  # what led here is raised
                log.error("%s cannot be given back to %s, and are no interface's: %s", ", ".join(some), eni, error)
            else:
                self._coming |= dict.fromkeys(some, eni)
                log.warning("%s are given back to %s", ", ".join(some), eni)

    async def _fill(
        self, order: _Order, due: Sequence[str], there: Sequence[InterfaceFacts], give: Give, family: str
    ) -> None:
        left = list(due)
        for eni in there:  # where it has its slot already, if the order was given before
            if again := [address for address in left if self._coming.get(address) == eni.id]:
                try:
                    await give(order, eni.id, again)
                except Conflict as error:
                    log.info("%s: by the earlier order", error)  # which no answer shows yet
                self._ordered(order, again, eni.id)
                left = [address for address in left if address not in again]
        while left:
            eni, some = _share(order.node, left, _usable(order, there, family), family)
            try:
                await give(order, eni.id, some)
            except Refused as error:
                if code_of(error) != _FULL:
                    raise
                order.full.add((eni.id, family))  # others' are on their way to it, that no answer shows yet
                continue
            self._ordered(order, some, eni.id)
            left = [address for address in left if address not in some]
            there = [_less(each, len(some)) if each.id == eni.id else each for each in there]

    def _ordered(self, order: _Order, addresses: Iterable[str], eni: str) -> None:
        now_s = self._times.clock()
        for address in addresses:
            order.ordered_s[address], self._coming[address] = now_s, eni

    async def release(self, addresses: Sequence[str]) -> None:
        patience = self._times.patience(self._confirm_s, _LOOKS)
        while True:
            there = await self._at(list(self._instances))
            held = {eni.id: [a for a in addresses if a in eni.addresses] for eni in there}
            if not any(held.values()):
                for address in addresses:
                    self._coming.pop(address, None)
                self._gaps.close(_ipv6(addresses))
                return
            for eni, some in held.items():
                await self._undivided(addresses[0], self._unassign(eni, some))
            left = ", ".join(address for some in held.values() for address in some[:3])
            await patience.pause(OutcomeUnknown(f"{left} are not given up yet", field="addresses"))

    async def _unassign(self, eni: str, addresses: Sequence[str]) -> None:
        ipv6 = _ipv6(addresses)
        ipv4 = [address for address in addresses if address not in ipv6]
        try:
            if ipv4:
                await self._api.ask("unassign_private_ip_addresses", NetworkInterfaceId=eni, PrivateIpAddresses=ipv4)
            if ipv6:
                await self._api.ask("unassign_ipv6_addresses", NetworkInterfaceId=eni, Ipv6Addresses=ipv6)
        except (BadInput, OutcomeUnknown) as error:  # one of them has left meanwhile, or nobody knows
            log.info("%s; looking again", error)

    # ------------------------------------------------------------------ looking

    def nobodys(self, addresses: Sequence[str]) -> tuple[str, ...]:
        return self._gaps.open(addresses)

    async def facts(self, addresses: Sequence[str]) -> AddressFacts:
        there = await self._at(list(self._instances))
        blocks = [(IPv4Network(prefix), prefix) for eni in there for prefix in eni.prefixes]
        singly = [address for address in addresses if address not in _ipv6(addresses)]
        delegated = {a: prefix for a in singly for block, prefix in blocks if IPv4Address(a) in block}
        return AddressFacts(interfaces=tuple(there), delegated=delegated)

    async def _at(self, nodes: Sequence[str]) -> list[InterfaceFacts]:
        """Return the interfaces of ``nodes`` that addresses may be given to, in the order to fill them."""
        records: list[dict[str, Any]] = []
        instances = [self._instance(node) for node in nodes]
        for at in range(0, len(instances), _FILTER_VALUES):
            filters = [
                {"Name": "attachment.instance-id", "Values": instances[at : at + _FILTER_VALUES]},
                {"Name": "attachment.status", "Values": ["attached"]},
            ]
            token: dict[str, str] = {}
            while True:
                answer = await self._api.ask("describe_network_interfaces", Filters=filters, MaxResults=500, **token)
                records += answer["NetworkInterfaces"]
                if not answer.get("NextToken"):
                    break
                token = {"NextToken": answer["NextToken"]}
        await self._learn_slots({record["Attachment"]["InstanceId"] for record in records} - self._slots.keys())
        return [self._interface(record) for record in sorted(records, key=self._rank) if self._is_allowed(record)]

    def _rank(self, record: Mapping[str, Any]) -> tuple[str, int]:
        node = self._nodes[record["Attachment"]["InstanceId"]]
        ids = self._allowed.get(node, ())
        name = record["NetworkInterfaceId"]
        return node, ids.index(name) if name in ids else int(record["Attachment"]["DeviceIndex"])

    def _is_allowed(self, record: Mapping[str, Any]) -> bool:
        ids = self._allowed.get(self._nodes[record["Attachment"]["InstanceId"]])
        return ids is None or record["NetworkInterfaceId"] in ids

    def _interface(self, record: Mapping[str, Any]) -> InterfaceFacts:
        instance = record["Attachment"]["InstanceId"]
        ipv4 = [each["PrivateIpAddress"] for each in record["PrivateIpAddresses"]]
        ipv6 = [each["Ipv6Address"] for each in record.get("Ipv6Addresses", ())]
        prefixes = [each["Ipv4Prefix"] for each in record.get("Ipv4Prefixes", ())]
        shown = {*ipv4, *ipv6}
        coming = [a for a, eni in self._coming.items() if eni == record["NetworkInterfaceId"] and a not in shown]
        coming_ipv6 = len(_ipv6(coming))
        slots, ipv6_slots = self._slots[instance]
        ipv6_prefixes = record.get("Ipv6Prefixes", ())
        return InterfaceFacts(
            id=record["NetworkInterfaceId"],
            node=self._nodes[instance],
            addresses=(*ipv4, *ipv6),
            slots=slots,
            free=max(0, slots - len(ipv4) - len(prefixes) - (len(coming) - coming_ipv6)),
            ipv6_slots=ipv6_slots,
            ipv6_free=max(0, ipv6_slots - len(ipv6) - len(ipv6_prefixes) - coming_ipv6),
            prefixes=tuple(prefixes),
            source_dest_check=record["SourceDestCheck"],
        )

    async def _learn_slots(self, instances: Iterable[str]) -> None:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_NetworkInfo.html"""
        if not (unknown := sorted(instances)):
            return
        answer = await self._api.ask("describe_instances", InstanceIds=unknown)
        found = [each for reservation in answer["Reservations"] for each in reservation["Instances"]]
        kinds = {each["InstanceId"]: each["InstanceType"] for each in found}
        answer = await self._api.ask("describe_instance_types", InstanceTypes=sorted(set(kinds.values())))
        infos = {each["InstanceType"]: each["NetworkInfo"] for each in answer["InstanceTypes"]}
        names = ("Ipv4AddressesPerInterface", "Ipv6AddressesPerInterface")
        slots = {kind: (int(info[names[0]]), int(info[names[1]])) for kind, info in infos.items()}
        self._slots |= {instance: slots[kind] for instance, kind in kinds.items()}

    def _instance(self, node: str) -> str:
        try:
            return self._instances[node]
        except KeyError:
            hint = "add it to network.vpc.instances of the controller's configuration"
            raise NotFound(f"the instance of node {node} is not known", field="node", hint=hint) from None


def _ipv6(addresses: Iterable[str]) -> list[str]:
    return [address for address in addresses if ip_address(address).version == 6]


def _of_ipv6(eni: InterfaceFacts) -> InterfaceFacts:
    return eni.model_copy(update={"slots": eni.ipv6_slots, "free": eni.ipv6_free})


def _less(eni: InterfaceFacts, slots: int) -> InterfaceFacts:
    return eni.model_copy(update={"free": eni.free - slots})


def _usable(order: _Order, there: Sequence[InterfaceFacts], family: str) -> list[InterfaceFacts]:
    return [_less(eni, eni.free) if (eni.id, family) in order.full else eni for eni in there]


def _share(
    node: str, addresses: Sequence[str], there: Sequence[InterfaceFacts], family: str
) -> tuple[InterfaceFacts, list[str]]:
    """Return an interface to give addresses to in one call, and which: the first with room for all, else the roomiest.

    Raises ``Refused`` where none has room, so that an EVM is never split over what cannot hold it.
    """
    room = sum(eni.free for eni in there)
    if room < len(addresses):
        raise _no_room(node, there, family)
    whole = next((eni for eni in there if eni.free >= len(addresses)), None)
    chosen = whole or max(there, key=lambda eni: eni.free)
    return chosen, list(addresses[: chosen.free])


def _no_room(node: str, there: Sequence[InterfaceFacts], family: str) -> Refused:
    shown = "; ".join(f"{eni.id} has {eni.free} of {eni.slots} {family} slots free" for eni in there)
    return Refused(
        f"no network interface of {node} has room for the {family} addresses: {shown or 'it has none'}",
        field="interfaces",
        hint="attach another network interface to the node, or move other EVMs away",
        code=_FULL,
    )
