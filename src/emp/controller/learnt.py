"""Leave to use an address that nobody declared: who asks first has it, as long as its node hears of it.

An EVM's guest may take addresses by itself, from the range that the pool hands out and from the IPv6 networks that the
configuration names; a link-local IPv6 address is always its own to choose. Each becomes a claim like a declared one, so
it is not handed out to another, and two guests that take the same one are told apart by the store's transaction. A
declared address is never given to another guest, nor is one outside: nodes, routers and other hosts have those.
"""

from __future__ import annotations

import logging
from ipaddress import IPv4Address, IPv6Network, ip_address

from emp.controller import trust
from emp.controller.addresses import LEARNT, Claim
from emp.controller.book import Book, gone, new
from emp.controller.config import Network
from emp.controller.nodes import Nodes
from emp.model.errors import AlreadyExists, EmpError
from emp.model.network import LearntAddress
from emp.model.node import EvmReport, Node

log = logging.getLogger(__name__)

LINK_LOCAL = IPv6Network("fe80::/64")


class LearntAddresses:
    def __init__(self, book: Book, nodes: Nodes, network: Network) -> None:
        self._book = book
        self._nodes = nodes
        self._network = network
        self._of: dict[str, set[str]] = {}
        """EVM -> where to look in the book, which says whether it still is so"""
        for claim in book.claims.all():
            if claim.holder == LEARNT:
                self._of.setdefault(claim.evm, set()).add(claim.address)

    async def heard(self, node: Node) -> None:
        """Claim what guests of the node ask for and may have; free what none of them uses any more."""
        if trust.doubt(node) is not None:
            return
        for report in node.report.evms:
            evm = self._book.evms.find(report.name)
            if evm is None or evm.owner != node.name:
                continue
            for wish in (*report.learnt, *report.asked):
                await self._claim(report.name, wish)
            if evm.migration is None and report.epoch >= evm.epoch:
                await self._free(report)

    def allowed(self, node: Node) -> dict[str, tuple[str, ...]]:
        """Return, for each EVM that the node reports, what it may use beside what it declares."""
        names = [report.name for report in node.report.evms if self._book.evms.find(report.name)]
        return {name: tuple(sorted(self._claimed(name))) for name in names}

    def _claimed(self, evm: str) -> list[str]:
        claims = ((address, self._book.claims.find(address)) for address in self._of.get(evm, ()))
        return [address for address, claim in claims if claim and (claim.evm, claim.holder) == (evm, LEARNT)]

    async def _claim(self, evm: str, wish: LearntAddress) -> None:
        held = self._book.claims.find(wish.address)
        if held is not None or not self._may_be_taken(wish.address):
            return
        claim = Claim(address=wish.address, mac=wish.mac, evm=evm, holder=LEARNT)
        try:
            await self._book.write(new(self._book.claims, wish.address, claim))
        except AlreadyExists:
            return  # somebody was faster
        except EmpError as error:
            log.error("%s: its use of %s could not be recorded: %s", evm, wish.address, error)
        else:
            self._of.setdefault(evm, set()).add(wish.address)
            log.info("EVM %s uses %s", evm, wish.address)

    def _may_be_taken(self, address: str) -> bool:
        ip = ip_address(address)
        if any(node.report.address == address for node in self._nodes.all()):
            return False
        if isinstance(ip, IPv4Address):
            return self._network.hands_out(ip)
        return any(ip in block for block in (LINK_LOCAL, *self._network.six))

    async def _free(self, report: EvmReport) -> None:
        used = {one.address for one in (*report.learnt, *report.asked)}
        for address in set(self._claimed(report.name)) - used:
            await self._book.write(gone(self._book.claims, address))
            self._of[report.name].discard(address)
            log.info("EVM %s uses %s no more", report.name, address)
