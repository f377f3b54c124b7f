"""Anti-spoofing: what a guest may say on the wire, as nftables rules at the ingress of its tap.

A frame passes only if it comes from a MAC of the EVM, and speaks as no address but the EVM's: in its IPv4 or IPv6
source, its ARP sender, and the target of a neighbour advertisement. What does not pass is counted, before the bridge
sees it, so neither the bridge's table nor a neighbour's learns from it. A guest that has no address yet may say so
(0.0.0.0 in DHCP and ARP probes, RFC 5227; :: in duplicate address detection, RFC 4862). No guest is a router here:
router advertisements and redirects are dropped (RFC 6105), as are VLAN tags, by which it would leave its segment. RARP
is dropped without a word: it is QEMU's own announcement of a guest that it has taken over, and comes before what was
held for that guest (``emp.agent.forwarding``).

A tap that the node routes to is a link of its own: the guest's link-local addresses are its own affair there (they are
never forwarded, RFC 4291, 2.5.6). But each makes a neighbour of the node, whose table is bounded for all guests
together (``gc_thresh3``): it may have a few at a time, and sends to none but the gateway's. What has no way back is
dropped: a frame whose source no route leads to by this tap. For IPv4 the kernel has a filter of its own for that
(``rp_filter``), for IPv6 it is a rule here.

A frame sees the rules of before a change or those of after it, but the kernel looks a set up as it is then. So where a
look may find neither (an anonymous set of old rules, an element that is replaced), finding nothing must mean dropping.

One table per tap, of the family ``netdev``: it needs nothing of the bridge, works for a routed tap as well, costs other
interfaces nothing, and is in force while no agent runs (docs/design/0015).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from ipaddress import ip_address

from emp.host import nft
from emp.model.errors import CommandFailed, HostError
from emp.model.evm import ROUTED_GATEWAY

log = logging.getLogger(__name__)

_PREFIX = "emp-guard-"
_COUNTER = "spoofed"


def table_of(interface: str) -> str:
    return f"{_PREFIX}{interface}"


_NO_WAY_BACK = "fib saddr . iif oif missing drop"
"""nft(8): no route leads to the source by the interface that it came in by"""
_LOCALS_PER_MAC = 4
"""link-local addresses that a guest has at a routed tap: one, and others of before it was started again"""
_LOCAL_S = 300
"""so long after its last word one makes room; longer than the kernel keeps an idle neighbour (``gc_stale_time``, 60)"""


_LOCALS = f"""ip6 saddr != fe80::/10 ip6 saddr != @six goto refuse
        ip6 daddr fe80::/10 ip6 daddr != {ROUTED_GATEWAY} goto refuse
        ip6 saddr fe80::/10 jump says_local"""
"""the set of them refuses what it has no room for"""


def rules(interface: str, macs: Iterable[str], addresses: Iterable[str], *, routed: bool = False) -> str:
    """Return the ``nft`` script that puts these rules in the place of those that were, the counter kept.

    ``macs`` and ``addresses`` in canonical text form: nothing that a guest wrote gets here unparsed. ``routed``: the
    node routes IPv6 to this tap.
    """
    four, six = _by_version(addresses)
    table, known = table_of(interface), set(macs)
    local = f"local {{ type ipv6_addr; size {_LOCALS_PER_MAC * len(known)}; flags dynamic, timeout; }}"
    return f"""
add table netdev {table}
flush table netdev {table}
add set netdev {table} macs {{ type ether_addr; }}
add set netdev {table} four {{ type ipv4_addr; }}
add set netdev {table} six {{ type ipv6_addr; }}
add set netdev {table} {local}
flush set netdev {table} macs
flush set netdev {table} four
flush set netdev {table} six
table netdev {table} {{
    counter {_COUNTER} {{ }}
    set macs {{ type ether_addr; elements = {{ {", ".join(sorted(known))} }} }}
    set four {{ type ipv4_addr; elements = {{ {", ".join(["0.0.0.0", *four])} }} }}
    set six {{ type ipv6_addr; elements = {{ {", ".join(["::", *six])} }} }}
    chain refuse {{
        counter name {_COUNTER} drop
    }}
    chain says_arp {{
        arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether @macs arp saddr ip @four accept
        goto refuse
    }}
    chain advertised {{
    }}
    chain says_local {{
        update @local {{ ip6 saddr timeout {_LOCAL_S}s }} return
        goto refuse
    }}
    chain says_six {{
        {_LOCALS if routed else "ip6 saddr != @six goto refuse"}
        icmpv6 type nd-router-advert goto refuse
        icmpv6 type nd-redirect goto refuse
        {_NO_WAY_BACK if routed else ""}
        icmpv6 type nd-neighbor-advert jump advertised
        icmpv6 type nd-neighbor-advert goto refuse
    }}
    chain guest {{
        type filter hook ingress device "{interface}" priority 0; policy accept;
        ether type 0x8035 drop
        ether saddr != @macs goto refuse
        ether type 8021q goto refuse
        ether type 8021ad goto refuse
        meta protocol arp goto says_arp
        meta protocol ip6 goto says_six
        meta protocol ip ip saddr != @four goto refuse
    }}
}}
{_advertised(table, six, routed=routed)}"""


def changes(interface: str, before: Iterable[str], after: Iterable[str], *, routed: bool = False) -> str:
    """Return the script that changes the addresses alone. What stays is not touched: while an element is replaced by
    itself, a frame may find neither."""
    table = table_of(interface)
    lines = []
    for name, old, new in zip(("four", "six"), _by_version(before), _by_version(after), strict=True):
        for verb, elements in (("add", [e for e in new if e not in old]), ("delete", [e for e in old if e not in new])):
            if elements:
                lines.append(f"{verb} element netdev {table} {name} {{ {', '.join(elements)} }}")
    advertised = _advertised(table, _by_version(after)[1], routed=routed)
    return "\n".join([*lines, f"flush chain netdev {table} advertised", advertised])


def _by_version(addresses: Iterable[str]) -> tuple[list[str], list[str]]:
    parsed = sorted({ip_address(address) for address in addresses}, key=lambda ip: (ip.version, int(ip)))
    return [str(ip) for ip in parsed if ip.version == 4], [str(ip) for ip in parsed if ip.version == 6]


def _advertised(table: str, six: Iterable[str], *, routed: bool) -> str:
    """One rule per address, as ``nft`` 1.0 has no set of the target of an advertisement: 128 bits, 8 bytes into ICMPv6
    (RFC 4861, 4.4)."""
    targets = [f"@th,64,128 {int(ip_address(address)):#034x}" for address in six]
    link_local = [f"@th,64,10 {0xFE80 >> 6:#x}"] if routed else []
    return "".join(f"add rule netdev {table} advertised {one} accept\n" for one in (*targets, *link_local))


async def obstacle_to_routing() -> str | None:
    """Return why this kernel cannot bind a guest that is routed to by IPv6 to its addresses; None: it can."""
    table = f"{_PREFIX}probe"
    try:
        await nft.apply(
            f"add table netdev {table}\nadd chain netdev {table} probe\n"
            f"add rule netdev {table} probe meta protocol ip6 {_NO_WAY_BACK}\ndelete table netdev {table}\n"
        )
    except CommandFailed as error:
        log.warning("IPv6 cannot be routed to guests: %s", error)
        return "nothing would bind a guest to its addresses: the kernel needs CONFIG_NFT_FIB_NETDEV (nft_fib_netdev)"
    return None


class Guard:
    """The rules of one tap. They outlive the agent, and are taken away by ``remove``."""

    def __init__(self, interface: str, macs: Iterable[str], *, routed: bool = False) -> None:
        """``routed``: see ``rules``."""
        self._interface = interface
        self._macs = frozenset(macs)
        self._routed = routed
        self._allowed: frozenset[str] | None = None
        """as this process has set it"""

    async def allow(self, addresses: Iterable[str]) -> None:
        """Let the guest speak as these addresses and no others, from now on. Raise ``HostError``: then as before."""
        wanted = frozenset(addresses)
        before, self._allowed = self._allowed, None  # until it is known to be done
        if before is None:
            await nft.apply(rules(self._interface, self._macs, wanted, routed=self._routed))
        else:
            try:
                await nft.apply(changes(self._interface, before, wanted, routed=self._routed))
            except CommandFailed:  # somebody has flushed them
                await nft.apply(rules(self._interface, self._macs, wanted, routed=self._routed))
        self._allowed = wanted

    @property
    def spoofed(self) -> int:
        """Frames that did not pass since the tap was made. Raise ``HostError``."""
        counted = nft.packets(table_of(self._interface), _COUNTER)
        if counted is None:
            raise HostError(
                f"the rules of {self._interface} are gone: its guest may use any address",
                hint="do not flush nftables on a node; restart its agent, which makes them again",
            )
        return counted


async def remove(interface: str) -> None:
    """Take a tap's rules away. Idempotent."""
    table = table_of(interface)
    await nft.apply(f"add table netdev {table}\ndelete table netdev {table}\n")


async def sweep(interfaces: Iterable[str]) -> None:
    """Take the rules of every tap away that is not among ``interfaces``: one that is gone leaves its table behind."""
    kept = {table_of(interface) for interface in interfaces}
    for table in nft.tables():
        if table.startswith(_PREFIX) and table not in kept:
            await remove(table.removeprefix(_PREFIX))
