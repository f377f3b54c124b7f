"""A pool in a VPC: the cloud routes each address to the interface that has it, and an EVM's addresses follow it."""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from emp import faults
from emp.host.run import run_sync
from emp.lab import partition, power
from emp.lab.checkers.frames import FrameWitness, violations
from emp.lab.checkers.owners import Tenure, tenures
from emp.lab.cloud.knobs import Fault, Harm, RemapDelay
from emp.lab.down import down
from emp.lab.guest_control import ECHO_PORT, Guest, socket_in
from emp.lab.power import Power
from emp.lab.probing import Probing
from emp.lab.ready import wait_ready
from emp.lab.region import instance_of
from emp.lab.residue import Residue
from emp.lab.topology import CLIENT, FABRIC, Network, Topology
from emp.lab.up import Options, up
from emp.model.errors import Refused
from emp.model.migration import Migration, Outcome, Stage
from tests.lab.cloud import call, turn
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, agent_away, subject, until
from tests.leaks import outliving

NAME = "vpc-tests"
REMAP_S = 2.0
SLOTS = 50
_TRANSPARENT = ((socket.IPPROTO_IP, 19), (socket.IPPROTO_IPV6, 75))
"""linux/in.h, linux/in6.h: an address that is not the machine's, of IPv4 and of IPv6"""
POD = "10.77.9.20"
PREFIX = "10.77.9.16/28"


@pytest.fixture(scope="module")
def vpc(lab_home: object) -> Iterator[Pool]:
    """Give a pool of two nodes whose addresses a cloud routes; when it is gone nothing of it is left."""
    residue = Residue.watch(Topology(NAME, 2, Network.VPC))
    with outliving(f"the lab {NAME}"):
        made = Pool(up(Options(NAME, 2, network=Network.VPC, faults=True)))
    yield made
    down(made.files)
    assert residue.left() == []


@pytest.fixture
def pool(vpc: Pool) -> Iterator[Pool]:
    turn(vpc)
    yield vpc
    turn(vpc)


def addresses_of(evm: Subject) -> list[str]:
    return [address for _, address in evm.spec.addresses]


def eni(pool: Pool, node: str) -> Any:
    """Return the primary interface of a node, as the cloud describes it."""
    filters = [
        {"Name": "attachment.instance-id", "Values": [instance_of(pool.topology.place(node))]},
        {"Name": "attachment.device-index", "Values": ["0"]},
    ]
    (found,) = call(pool, "describe_network_interfaces", Filters=filters)["NetworkInterfaces"]
    return found


def held(pool: Pool, node: str) -> set[str]:
    found = eni(pool, node)
    ipv6 = {each["Ipv6Address"] for each in found["Ipv6Addresses"]}
    return {each["PrivateIpAddress"] for each in found["PrivateIpAddresses"]} | ipv6


def routed(pool: Pool, address: str) -> str | None:
    """Return where the fabric sends what is for an address; None: nowhere in particular."""
    version, fabric = "-6" if ":" in address else "-4", pool.topology.namespace(FABRIC)
    routes = json.loads(run_sync("ip", version, "-n", fabric, "-json", "route", "show", address))
    return str(routes[0]["dev"]) if routes else None


def is_only_at(evm: Subject, node: str) -> None:
    """The cloud, its fabric and the nodes agree, and every address answers."""
    evm.check_only_on(node)
    for address in addresses_of(evm):
        assert routed(evm.pool, address) == evm.pool.topology.segment(evm.pool.topology.place(node))
    others = [place.name for place in evm.pool.topology.node_places if place.name != node]
    assert set(addresses_of(evm)) < held(evm.pool, node)
    for other in others:
        assert not set(addresses_of(evm)) & held(evm.pool, other)
        namespace = evm.pool.topology.namespace(other)
        routes = [run_sync("ip", version, "-n", namespace, "route").split() for version in ("-4", "-6")]
        assert not [address for address in addresses_of(evm) if address in (*routes[0], *routes[1])]
    for address in addresses_of(evm):
        Guest(evm.pool.topology, address).wait_first_packet()


@contextmanager
def an_evm(pool: Pool, **asked: Any) -> Iterator[Subject]:
    with subject(pool, node="n1", **asked) as evm:
        yield evm


# ------------------------------------------------------------------ moving


def test_every_address_follows_its_evm_though_the_cloud_takes_its_time(pool: Pool) -> None:
    with an_evm(pool, pods=["a", "b"]) as evm:
        boot = evm.boot_id
        is_only_at(evm, "n1")
        turn(pool, remap=RemapDelay(least_s=REMAP_S))
        for node in ("n2", "n1"):
            migration = evm.migrate(node)
            moved = migration.report.addresses
            assert moved is not None
            assert (moved.addresses, moved.calls, moved.tries) == (3, 1, 1)
            assert moved.reassign_s >= REMAP_S
            is_only_at(evm, node)
        assert evm.boot_id == boot
        addresses = addresses_of(evm)
    assert not set(addresses) & (held(pool, "n1") | held(pool, "n2")), "with the EVM they go"
    assert [routed(pool, address) for address in addresses] == [None] * 3


def test_two_evms_reach_each_other_on_one_node_and_across(pool: Pool) -> None:
    with an_evm(pool) as one, an_evm(pool) as other:
        one.shell()
        assert pings(one, other.spec.nics[0].address, "once")
        other.migrate("n2")
        assert pings(one, other.spec.nics[0].address, "again")


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


def test_nobody_speaks_under_the_evms_addresses_without_owning_it(pool: Pool) -> None:
    with an_evm(pool, pods=["a"]) as evm:
        turn(pool, remap=RemapDelay(least_s=REMAP_S))
        began_s = time.monotonic()
        targets = dict(zip(("evm", "pod"), addresses_of(evm), strict=True))
        macs = [mac for mac, _ in evm.spec.addresses]
        with (
            FrameWitness(pool.topology, macs, targets.values()) as witness,
            Probing(pool.files, targets, rate_hz=100) as probing,
        ):
            evm.migrate("n2")
            probing.stop()
        hits = {place.name: faults.hits(pool.files.faults(place.name)) for place in pool.topology.node_places}
        held = tenures("n1", hits, since_s=began_s)
        assert {seen.node for seen in witness.seen} == {"n1", "n2"}
        assert violations(witness.seen, held) == []
        assert violations(witness.seen, [Tenure("n1", began_s)]), "it would be told of"


@pytest.mark.parametrize("when", ["before the commit", "while the cloud moves them"])
def test_a_controller_that_is_killed_goes_on_where_it_was(pool: Pool, when: str) -> None:
    with an_evm(pool, pods=["a"]) as evm:
        turn(pool, remap=RemapDelay(least_s=5.0))
        began_s = time.monotonic()
        with nothing_lost(evm):
            if when == "before the commit":
                moving = evm.begin_slow("n2", bytes_per_s=20_000_000)
            else:
                moving = evm.begin("n2")
                until(lambda: evm.client.migrations.get(moving.id).committed, "it is committed")
            pool.kill("ctl", "controller")
            until(lambda: _has_taken_over(pool, "n2", began_s), "it is the target's")
            pool.start("ctl", "controller")
            ended = evm.end_of(moving)
        assert ended.outcome is Outcome.COMPLETED
        assert ended.report.addresses is not None
        is_only_at(evm, "n2")


@contextmanager
def nothing_lost(evm: Subject, *, rate_hz: int = 200) -> Iterator[None]:
    """Have the client send to every address; fail the test if a request of the block has no answer, or two."""
    targets = {f"address {number}": address for number, address in enumerate(addresses_of(evm))}
    with Probing(evm.pool.files, targets, rate_hz=rate_hz) as probing:
        yield
        report = probing.stop()
    for target in targets:
        totals = [report["targets"][target][kind]["total"] for kind in ("udp", "tcp")]
        assert [(total["lost"], total["duplicated"]) for total in totals] == [(0, 0), (0, 0)], (target, totals)


def _has_taken_over(pool: Pool, node: str, since_s: float) -> bool:
    """By its journal: without its controller nobody else says so, and the source forwards until that is back."""
    reached = faults.hits(pool.files.faults(node))
    return any(hit.point == "journal.activated.after_fsync" and hit.at_s >= since_s for hit in reached)


def test_an_agent_that_is_killed_while_it_forwards_ends_it_by_the_controllers_word(pool: Pool) -> None:
    with an_evm(pool) as evm:
        turn(pool, remap=RemapDelay(least_s=8.0))
        moving = evm.begin("n2")
        until(lambda: evm.client.migrations.get(moving.id).stage is Stage.TARGET_BROWNOUT, "it runs at the target")
        with agent_away(pool, evm.client, "n1"):
            pass  # what comes meanwhile waits in the tap
        ended = evm.end_of(moving)
        assert ended.outcome is Outcome.COMPLETED
        is_only_at(evm, "n2")


def test_an_evm_that_goes_back_is_still_reached_at_its_source(pool: Pool) -> None:
    with an_evm(pool, ipv6=["auto"]) as evm:
        moving = evm.begin_slow("n2")
        assert evm.client.migrations.abort(moving.id).outcome is Outcome.ABORTED
        until(lambda: evm.client.migrations.get(moving.id).stage is Stage.CLOSED, "it is over")
        is_only_at(evm, "n1")


def test_a_cold_start_elsewhere_takes_the_addresses_along(pool: Pool) -> None:
    with an_evm(pool, ipv6=["auto"]) as evm:
        evm.client.evms.stop(evm.name, grace_s=0)
        assert set(addresses_of(evm)) < held(pool, "n1"), "nobody else may get them meanwhile"
        evm.client.evms.start(evm.name, node="n2")
        is_only_at(evm, "n2")


def test_a_node_that_was_off_is_routed_to_again(pool: Pool) -> None:
    with an_evm(pool) as evm:
        before = evm.client.nodes.get("n2").report.boot_id
        power.switch(pool.files, "n2", Power.OFF)
        with outliving(f"the lab {NAME}"):
            power.switch(pool.files, "n2", Power.ON)
        until(lambda: evm.client.nodes.get("n2").report.boot_id != before, "the agent of n2 is back")
        wait_ready(pool.files, pool.state, pool.context)
        evm.migrate("n2")
        is_only_at(evm, "n2")


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
            assert arrives(pool, "n2", foreign)
            call(pool, "modify_network_interface_attribute", NetworkInterfaceId=name, SourceDestCheck={"Value": True})
            until(lambda foreign=foreign: not arrives(pool, "n2", foreign), "it is dropped")  # type: ignore[misc]
            assert arrives(pool, "n2", own)
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
        connection.settimeout(2.0)
        try:
            connection.connect((address, ECHO_PORT))
        except TimeoutError:
            return False
        return True


def test_established_connections_pass_the_targets_stateful_rules(pool: Pool) -> None:
    """Though no packet of theirs was ever seen there. Both ends are quiet while the EVM moves: nothing that they say
    makes the target's node guess at a connection."""
    with an_evm(pool) as evm:
        address = evm.guest().address
        tcp, udp = socket_in(pool.topology, socket.SOCK_STREAM), socket_in(pool.topology, socket.SOCK_DGRAM)
        with tcp, udp, stateful(pool, {"n1": "accept", "n2": "drop"}):
            for each in (tcp, udp):
                each.settimeout(5.0)
                each.connect((address, ECHO_PORT))
                assert echoes(each, "before")
            moved = evm.end_of(evm.begin("n2"))
            assert moved.report.connections_carried is not None
            assert moved.report.connections_carried >= 2
            assert not connects(pool, address), "the rules of n2 let nothing new in"
            for each in (tcp, udp):
                assert echoes(each, "after")
            pool.run_in("n2", "python3", "-c", FORGET, address)
            for each in (udp, tcp):
                assert not echoes(each, "forgotten", within_s=1.5), "without what was carried they are dropped"
        is_only_at(evm, "n2")


FORGET = f"""
import sys
sys.path[:] = {[*filter(None, sys.path)]!r}
from emp.host import conntrack
conntrack.remove(conntrack.read(sys.argv[1:]))
"""


# ------------------------------------------------------------------ what the cloud refuses


@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.THROTTLED])
def test_a_reassignment_whose_answer_is_lost_or_late_is_made_once(pool: Pool, harm: Harm) -> None:
    with an_evm(pool) as evm:
        fault = Fault(harm=harm, action="AssignPrivateIpAddresses")
        turn(pool, remap=RemapDelay(least_s=1.0), faults=(fault,))
        evm.migrate("n2")
        is_only_at(evm, "n2")


def test_a_reassignment_that_is_refused_is_told_and_tried_again(pool: Pool) -> None:
    with an_evm(pool) as evm:
        turn(pool, faults=(Fault(harm=Harm.DENIED, action="AssignPrivateIpAddresses", times=None),))

        def told() -> Migration | None:
            now = evm.client.migrations.get(moving.id)
            return now if now.hint and "UnauthorizedOperation" in now.hint else None

        with nothing_lost(evm):
            moving = evm.begin("n2")
            shown = until(told, "people are told")
            assert "still come to n1, which forwards them" in str(shown.hint)
            assert shown.stage is Stage.TARGET_BROWNOUT
            turn(pool)
            ended = evm.end_of(moving)
        assert (ended.outcome, ended.hint) == (Outcome.COMPLETED, None)
        assert ended.report.addresses is not None
        assert ended.report.addresses.tries > 1
        is_only_at(evm, "n2")


# ------------------------------------------------------------------ pre-flight


def refusal(evm: Subject, target: str = "n2") -> str:
    """Return what pre-flight says of the addresses; the EVM is refused for nothing else."""
    with pytest.raises(Refused) as caught:
        evm.begin(target)
    bad = [check for check in caught.value.details["checks"] if not check["ok"]]
    assert [check["name"] for check in bad] == ["addresses"]
    return str(bad[0]["message"])


def enis(pool: Pool, node: str) -> list[Any]:
    """Return every interface of a node, as the cloud describes them."""
    filters = [{"Name": "attachment.instance-id", "Values": [instance_of(pool.topology.place(node))]}]
    return list(call(pool, "describe_network_interfaces", Filters=filters)["NetworkInterfaces"])


def test_interfaces_without_a_free_slot_are_named_and_another_one_is_used(pool: Pool) -> None:
    with an_evm(pool) as evm:
        filled = {}
        for number, one in enumerate(enis(pool, "n2")):
            free = SLOTS - len(one["PrivateIpAddresses"])
            filled[one["NetworkInterfaceId"]] = [f"10.77.{240 + number}.{last}" for last in range(1, free + 1)]
        another = None
        try:
            for name, addresses in filled.items():
                call(pool, "assign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=addresses)
            said = refusal(evm)
            assert all(f"{name} has 0 of {SLOTS} free" in said for name in filled)
            assert "attach another network interface" in said
            another = _another_interface(pool, "n2")
            evm.migrate("n2")
            (found,) = call(pool, "describe_network_interfaces", NetworkInterfaceIds=[another[0]])["NetworkInterfaces"]
            assert set(addresses_of(evm)) < {each["PrivateIpAddress"] for each in found["PrivateIpAddresses"]}
            evm.guest().wait_first_packet()
            evm.migrate("n1")
            is_only_at(evm, "n1")
        finally:
            for name, addresses in filled.items():
                call(pool, "unassign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=addresses)
            if another is not None:
                call(pool, "detach_network_interface", AttachmentId=another[1])
                call(pool, "delete_network_interface", NetworkInterfaceId=another[0])


def test_more_addresses_than_an_interface_has_slots_go_to_two(pool: Pool) -> None:
    with an_evm(pool, pods=[f"p{number}" for number in range(SLOTS)]) as evm:
        turn(pool, remap=RemapDelay(least_s=REMAP_S))
        migration = evm.migrate("n2")
        moved = migration.report.addresses
        assert moved is not None
        assert (moved.addresses, moved.calls) == (SLOTS + 1, 2)
        there = {each["PrivateIpAddress"] for one in enis(pool, "n2") for each in one["PrivateIpAddresses"]}
        assert set(addresses_of(evm)) < there
        evm.guest().wait_first_packet()
        for number in (0, SLOTS - 1):
            evm.pod(number).wait_first_packet()


def _another_interface(pool: Pool, node: str) -> tuple[str, str]:
    """Return the ids of a new interface of a node, and of its attachment."""
    first = eni(pool, node)
    made = call(pool, "create_network_interface", SubnetId=first["SubnetId"])["NetworkInterface"]["NetworkInterfaceId"]
    call(pool, "modify_network_interface_attribute", NetworkInterfaceId=made, SourceDestCheck={"Value": False})
    held = call(
        pool,
        "attach_network_interface",
        NetworkInterfaceId=made,
        InstanceId=first["Attachment"]["InstanceId"],
        DeviceIndex=3,
    )
    return made, held["AttachmentId"]


def test_an_address_of_a_delegated_prefix_is_refused_by_name(pool: Pool) -> None:
    assert ipaddress.IPv4Address(POD) in ipaddress.IPv4Network(PREFIX)
    with an_evm(pool, pods=[f"a={POD}"]) as evm:
        name = eni(pool, "n1")["NetworkInterfaceId"]
        call(pool, "unassign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=[POD])
        call(pool, "assign_private_ip_addresses", NetworkInterfaceId=name, Ipv4Prefixes=[PREFIX])
        try:
            evm.pod().wait_first_packet()
            said = refusal(evm)
            assert f"{POD} is of the delegated prefix {PREFIX}" in said
        finally:
            call(pool, "unassign_private_ip_addresses", NetworkInterfaceId=name, Ipv4Prefixes=[PREFIX])
            call(pool, "assign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=[POD])
        evm.migrate("n2")


def test_a_source_destination_check_that_is_on_is_refused_with_the_command(pool: Pool) -> None:
    with an_evm(pool) as evm:
        name = eni(pool, "n2")["NetworkInterfaceId"]
        call(pool, "modify_network_interface_attribute", NetworkInterfaceId=name, SourceDestCheck={"Value": True})
        try:
            said = refusal(evm)
            assert f"the source/destination check of {name} on n2 is on" in said
            assert f"--no-source-dest-check --network-interface-id {name}" in said
        finally:
            call(pool, "modify_network_interface_attribute", NetworkInterfaceId=name, SourceDestCheck={"Value": False})


# ------------------------------------------------------------------ not one packet


def test_no_packet_is_lost_though_the_cloud_takes_two_seconds(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    with an_evm(pool, pods=["a"]) as evm:
        turn(pool, remap=RemapDelay(least_s=REMAP_S))
        targets = dict(zip(("evm", "pod"), addresses_of(evm), strict=True))
        for node in ("n2", "n1"):
            with Probing(pool.files, targets, rate_hz=1000) as probing:
                migration = evm.migrate(node)
                report = probing.stop()
            for target in targets:
                udp, tcp = (report["targets"][target][kind]["total"] for kind in ("udp", "tcp"))
                with capsys.disabled():
                    moved = migration.report.addresses
                    figures = f"sent {udp['sent']}, lost {udp['lost']}, gap {udp['gap_ms']:.0f} ms"
                    forwarded = migration.report.frames_forwarded
                    print(f"\n  {target}: {figures}; forwarded {forwarded}; {moved and moved.reassign_s} s", end="")
                assert (udp["lost"], udp["duplicated"], tcp["lost"]) == (0, 0, 0)
                assert report["targets"][target]["tcp"]["resets"] == 0
            assert (migration.report.frames_forwarded or 0) > REMAP_S * 1000, "it was the source that all came by"


def test_ipv6_addresses_stay_and_what_is_lost_of_them_is_told(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """An IPv6 address is nobody's for a while, as the cloud cannot reassign one: packets are lost, connections live."""
    with an_evm(pool, ipv6=["auto"], pods=["a=auto"]) as evm:
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
                    Probing(pool.files, targets, rate_hz=500) as probing,
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
                    assert udp["lost"] / 500 <= moved.ipv6_gap_s + 0.5, "no more than that time is lost"
                assert echoes(kept, node)
                is_only_at(evm, node)
            with agent_away(pool, evm.client, "n1"):
                assert echoes(kept, "without an agent")
            assert echoes(kept, "with another")
            is_only_at(evm, "n1")
        assert evm.boot_id == boot


def four_of(evm: Subject) -> list[str]:
    return [address for address in addresses_of(evm) if ":" not in address]
