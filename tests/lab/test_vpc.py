"""A pool in a VPC: the cloud routes each address to the interface that has it, and an EVM's addresses follow it."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from emp import faults
from emp.host.run import run_sync
from emp.lab import partition
from emp.lab.checkers.frames import FrameWitness, violations
from emp.lab.checkers.owners import Tenure, tenures
from emp.lab.cloud.knobs import RemapDelay
from emp.lab.guest_control import ECHO_PORT, socket_in
from emp.lab.probing import Probing
from emp.lab.topology import CLIENT, UPLINK
from emp.model.errors import Refused
from emp.model.migration import Outcome
from tests.lab.aborts import GRACE_S, ends
from tests.lab.cloud import call, turn
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, agent_away, mend, subject, until
from tests.lab.vpc import SLOTS, addresses_of, eni, enis, four_of, is_only_at, private, routed, vpc_of_two

NAME = "vpc-tests"
REMAP_S, SHORT_S = 2.0, 0.5
"""what the cloud takes over an address: as long as is asked of us, and long enough to be told from nothing"""
_TRANSPARENT = ((socket.IPPROTO_IP, 19), (socket.IPPROTO_IPV6, 75))
"""linux/in.h, linux/in6.h: an address that is not the machine's, of IPv4 and of IPv6"""


@pytest.fixture(scope="module")
def vpc(lab_home: object) -> Iterator[Pool]:
    with vpc_of_two(NAME) as made:
        yield made


@pytest.fixture
def pool(vpc: Pool) -> Iterator[Pool]:
    yield vpc
    turn(vpc)


@pytest.fixture(scope="module")
def shared(vpc: Pool) -> Iterator[Subject]:
    with subject(vpc, node="n1", ipv6=["auto"], pods=["a"]) as made:
        yield made


@pytest.fixture
def evm(pool: Pool, shared: Subject) -> Iterator[Subject]:
    """An EVM with a pod, on either node."""
    yield shared
    mend(pool)


# ------------------------------------------------------------------ moving


def test_every_address_follows_its_evm_and_loses_no_packet_though_the_cloud_takes_two_seconds(
    pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    with subject(pool, node="n1", pods=["a"]) as evm:
        boot = evm.boot_id
        is_only_at(evm, "n1")
        turn(pool, remap=RemapDelay(least_s=REMAP_S))
        targets = dict(zip(("evm", "pod"), addresses_of(evm), strict=True))
        for node in ("n2", "n1"):
            with Probing(pool.files, targets, rate_hz=1000, grace_s=GRACE_S) as probing:
                report = evm.migrate(node).report
                seen = probing.stop()["targets"]
            for target in targets:
                udp, tcp = (seen[target][kind]["total"] for kind in ("udp", "tcp"))
                with capsys.disabled():
                    figures = f"sent {udp['sent']}, lost {udp['lost']}, gap {udp['gap_ms']:.0f} ms"
                    moved = report.addresses
                    print(
                        f"\n  {target}: {figures}; forwarded {report.frames_forwarded}; {moved and moved.reassign_s} s",
                        end="",
                    )
                assert (udp["lost"], udp["duplicated"], tcp["lost"]) == (0, 0, 0)
                assert seen[target]["tcp"]["resets"] == 0
            assert (report.frames_forwarded or 0) > REMAP_S * 1000, "it was the source that all came by"
            assert report.addresses is not None
            assert (report.addresses.addresses, report.addresses.calls, report.addresses.tries) == (2, 1, 1)
            assert report.addresses.reassign_s >= REMAP_S
            is_only_at(evm, node)
        assert evm.boot_id == boot
        addresses = addresses_of(evm)
    assert not set(addresses) & private(*(one for each in enis(pool).values() for one in each)), "with the EVM they go"
    assert [routed(pool, address) for address in addresses] == [None] * 2


def test_two_evms_reach_each_other_on_one_node_and_across(pool: Pool, evm: Subject) -> None:
    node, another = ends(evm)
    with subject(pool, node=node) as other:
        evm.shell()
        assert pings(evm, other.spec.nics[0].address, "once")
        other.migrate(another)
        assert pings(evm, other.spec.nics[0].address, "again")


def pings(evm: Subject, address: str, word: str) -> bool:
    """Return whether an address answers a guest; ``word`` tells this answer from earlier ones."""
    evm.type(f"ping -c 3 -W 5 {address} >/dev/null && echo {word}-$((40 + 2)) || echo {word}-$((10 + 1))")
    shown = b""
    with closing(evm.client.evms.console(evm.name)) as output:  # type: ignore[type-var]
        for data in output:
            shown += data
            if f"{word}-42".encode() in shown:
                return True
            if f"{word}-11".encode() in shown:
                return False
    pytest.fail(f"the console ended without an answer: {shown[-500:]!r}")


def test_no_frame_of_a_node_reaches_another_place(pool: Pool) -> None:
    """Else the lab's ARP would do what the cloud is to do."""
    tables = json.loads(run_sync("ip", "-n", pool.topology.namespace("n2"), "-json", "neigh"))
    macs = {entry["lladdr"] for entry in tables if "lladdr" in entry and entry["dev"] == "eth0"}
    assert macs == {"02:77:00:00:ff:01"}, "all that a node sees is the router"


def test_nobody_speaks_under_the_evms_addresses_without_owning_it(pool: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    turn(pool, remap=RemapDelay(least_s=SHORT_S))
    began_s = time.monotonic()
    targets = dict(zip(("evm", "pod"), four_of(evm), strict=True))
    macs = [mac for mac, _ in evm.spec.addresses]
    with (
        FrameWitness(pool.topology, macs, targets.values()) as witness,
        Probing(pool.files, targets, rate_hz=100) as probing,
    ):
        evm.migrate(target)
        probing.stop()
    hits = {place.name: faults.hits(pool.files.faults(place.name)) for place in pool.topology.node_places}
    held = tenures(source, hits, since_s=began_s)
    assert {seen.node for seen in witness.seen} == {source, target}
    assert violations(witness.seen, held) == []
    assert violations(witness.seen, [Tenure(source, began_s)]), "it would be told of"


def test_a_cold_start_elsewhere_takes_the_addresses_along(pool: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    evm.client.evms.stop(evm.name, grace_s=0)
    assert set(addresses_of(evm)) < private(*enis(pool)[source]), "nobody else may get them meanwhile"
    evm.client.evms.start(evm.name, node=target)
    is_only_at(evm, target)


def test_more_addresses_than_an_interface_has_slots_go_to_two(pool: Pool) -> None:
    with subject(pool, node="n1", pods=[f"p{number}" for number in range(SLOTS)]) as evm:
        turn(pool, remap=RemapDelay(least_s=SHORT_S))
        moved = evm.migrate("n2").report.addresses
        assert moved is not None
        assert (moved.addresses, moved.calls) == (SLOTS + 1, 2)
        assert set(addresses_of(evm)) < private(*enis(pool)["n2"])
        evm.guest().wait_first_packet()
        for number in (0, SLOTS - 1):
            evm.pod(number).wait_first_packet()


def test_wires_between_hosts_are_cut_and_mended_as_on_a_switch(pool: Pool) -> None:
    probe = ("timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/10.77.0.12/7443")
    assert pool.run_in("n1", *probe, check=False).returncode == 0
    partition.cut(pool.files, "n1", "n2")
    assert pool.run_in("n1", *probe, check=False).returncode != 0
    partition.heal(pool.files)
    assert pool.run_in("n1", *probe, check=False).returncode == 0


def test_with_the_source_check_on_the_fabric_drops_what_the_target_would_send_too_early(pool: Pool) -> None:
    """Why pre-flight refuses it: until the addresses are reassigned the target sends under what the source has."""
    name, n2 = eni(pool, "n2")["NetworkInterfaceId"], pool.topology.place("n2")
    for foreign, own in (("10.77.9.9", n2.address), ("fd77::1:0:0:9", n2.ipv6)):
        try:
            until(lambda foreign=foreign: arrives(pool, "n2", foreign), "it arrives")  # type: ignore[misc]
            call(pool, "modify_network_interface_attribute", NetworkInterfaceId=name, SourceDestCheck={"Value": True})
            until(lambda foreign=foreign: not arrives(pool, "n2", foreign), "it is dropped")  # type: ignore[misc]
            until(lambda own=own: arrives(pool, "n2", own), "its own arrives")  # type: ignore[misc]
        finally:
            call(pool, "modify_network_interface_attribute", NetworkInterfaceId=name, SourceDestCheck={"Value": False})
        until(lambda foreign=foreign: arrives(pool, "n2", foreign), "it passes again")  # type: ignore[misc]


def arrives(pool: Pool, node: str, source: str) -> bool:
    """Return whether the client gets a datagram that a node sends under an address, within half a second."""
    receiver = socket_in(pool.topology, socket.SOCK_DGRAM, to=source)
    sender = socket_in(pool.topology, socket.SOCK_DGRAM, node, to=source)
    with receiver, sender:
        receiver.bind((CLIENT.ipv6 if ":" in source else CLIENT.address, 0))
        receiver.settimeout(0.5)
        is_ipv6 = sender.family == socket.AF_INET6
        sender.setsockopt(*(_TRANSPARENT[is_ipv6]), 1)
        sender.bind((source, 0))
        sender.sendto(b"hello", receiver.getsockname())
        try:
            return bool(receiver.recvfrom(64)[1][0] == source)
        except TimeoutError:
            return False


# ------------------------------------------------------------------ nodes with rules of their own

STATEFUL = """
table inet state {{
    chain forward {{ type filter hook forward priority 0; policy {policy}; ct state established accept; }}
}}
"""


@contextmanager
def stateful(pool: Pool, policies: dict[str, str]) -> Iterator[None]:
    """Give nodes rules that let established connections pass, and others by a policy."""
    try:
        for node, policy in policies.items():
            pool.run_in(node, "nft", STATEFUL.format(policy=policy))
        yield
    finally:
        for node in policies:
            pool.run_in(node, "nft", "add table inet state; delete table inet state")


def echoes(connection: socket.socket, word: str, *, within_s: float = 10.0) -> bool:
    """Return whether the guest answers over an open connection."""
    connection.settimeout(within_s)
    try:
        connection.sendall(f"{word}\n".encode())
        answer = b""
        while word.encode() not in answer and (some := connection.recv(4096)):
            answer += some
    except TimeoutError:
        return False
    return word.encode() in answer


def connects(pool: Pool, address: str) -> bool:
    with socket_in(pool.topology, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect((address, ECHO_PORT))
        except TimeoutError:
            return False
        return True


def test_established_connections_pass_the_targets_stateful_rules(pool: Pool, evm: Subject) -> None:
    """Though no packet of theirs was ever seen there. Both ends are quiet while the EVM moves: nothing that they say
    makes the target's node guess at a connection."""
    source, target = ends(evm)
    address = evm.guest().address
    tcp, udp = socket_in(pool.topology, socket.SOCK_STREAM), socket_in(pool.topology, socket.SOCK_DGRAM)
    with tcp, udp, stateful(pool, {source: "accept", target: "drop"}):
        for each in (tcp, udp):
            each.settimeout(5.0)
            each.connect((address, ECHO_PORT))
            assert echoes(each, "before")
        moved = evm.migrate(target)
        assert moved.report.connections_carried is not None
        assert moved.report.connections_carried >= 2
        assert not connects(pool, address), f"the rules of {target} let nothing new in"
        for each in (tcp, udp):
            assert echoes(each, "after")
        pool.run_in(target, "python3", "-c", FORGET, address)
        for each in (udp, tcp):
            assert not echoes(each, "forgotten", within_s=1.0), "without what was carried they are dropped"
    is_only_at(evm, target)


FORGET = f"""
import sys
sys.path[:] = {[*filter(None, sys.path)]!r}
from emp.host import conntrack
conntrack.remove(conntrack.read(sys.argv[1:]))
"""


# ------------------------------------------------------------------ IPv6


def test_ipv6_addresses_stay_and_what_is_lost_of_them_is_told(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """An IPv6 address is nobody's for a while, as the cloud cannot reassign one: packets are lost, connections live."""
    with subject(pool, node="n1", ipv6=["auto"], pods=["a=auto"]) as evm:
        boot, six = evm.boot_id, [address for address in addresses_of(evm) if ":" in address]
        assert len(six) == 2
        is_only_at(evm, "n1")
        turn(pool, remap=RemapDelay(least_s=REMAP_S))
        with socket_in(pool.topology, socket.SOCK_STREAM, to=six[0]) as kept:
            kept.connect((six[0], ECHO_PORT))
            for node in ("n2", "n1"):
                began_s = time.monotonic()
                targets = dict(zip(("evm", "pod", "evm4", "pod4"), (*six, *four_of(evm)), strict=True))
                macs = [mac for mac, _ in evm.spec.addresses]
                with (
                    FrameWitness(pool.topology, macs, addresses_of(evm)) as witness,
                    Probing(pool.files, targets, rate_hz=500, grace_s=2 * REMAP_S) as probing,  # TCP's timer doubles
                ):
                    migration = evm.migrate(node)
                    report = probing.stop()
                hits = {place.name: faults.hits(pool.files.faults(place.name)) for place in pool.topology.node_places}
                other = "n1" if node == "n2" else "n2"
                assert violations(witness.seen, tenures(other, hits, since_s=began_s)) == []
                assert {seen.kind for seen in witness.seen} >= {0x0800, 0x86DD}
                moved = migration.report.addresses
                assert moved is not None
                assert moved.ipv6_gap_s is not None
                assert not moved.ipv6_gap_is_least
                for name in targets:
                    udp, tcp = (report["targets"][name][kind]["total"] for kind in ("udp", "tcp"))
                    assert report["targets"][name]["tcp"]["resets"] == 0
                    assert (udp["duplicated"], tcp["lost"]) == (0, 0), name
                    if name.endswith("4"):
                        assert udp["lost"] == 0
                        continue
                    figures = f"sent {udp['sent']}, lost {udp['lost']}, gap {udp['gap_ms']:.0f} ms"
                    with capsys.disabled():
                        print(f"\n  {name} over IPv6: {figures}; nobody's for {moved.ipv6_gap_s} s", end="")
                    lost_s = udp["lost"] / 500
                    assert REMAP_S / 2 <= lost_s <= moved.ipv6_gap_s + REMAP_S + 0.5, "what the cloud takes is on top"
                assert echoes(kept, node)
                is_only_at(evm, node)
            with agent_away(pool, evm.client, "n1"):
                assert echoes(kept, "without an agent")
            assert echoes(kept, "with another")
            is_only_at(evm, "n1")
        assert evm.boot_id == boot


def test_a_node_that_has_lost_its_ipv6_is_refused_before_anything_is_begun(pool: Pool, evm: Subject) -> None:
    target = "n1" if evm.record.owner == "n2" else "n2"
    why = f"{UPLINK} has no IPv6 address"
    of_uplink = (f"{pool.topology.place(target).ipv6}/128", "dev", UPLINK)

    def without_ipv6() -> str | None:
        return evm.client.nodes.get(target).report.no_ipv6

    run_sync("ip", "-n", pool.topology.namespace(target), "addr", "del", *of_uplink)
    try:
        until(lambda: why in (without_ipv6() or ""), f"{target} says so")
        plan = evm.client.migrations.start(evm.name, target=target, dry_run=True)
        with pytest.raises(Refused, match=f"cannot move to {target}: ipv6: {target}: {why}"):
            evm.client.migrations.start(evm.name, target=target)
        with pytest.raises(Refused, match=f"node {target} does not fit: it takes no IPv6 addresses, as {why}"):
            evm.client.evms.create({"name": "six", "ipv6": ["auto"], "node": target})
    finally:
        run_sync("ip", "-n", pool.topology.namespace(target), "addr", "add", *of_uplink, "nodad")
    assert [check.name for check in plan.checks if not check.ok] == ["ipv6"]
    until(lambda: without_ipv6() is None, f"{target} has it again")
    assert evm.migrate(target).outcome is Outcome.COMPLETED
