"""Addresses that a guest takes by itself, and those that it may not: seen by its neighbours, over migrations."""

from __future__ import annotations

import json
import time

from emp.host.run import run_sync
from emp.lab.guest_control import Guest
from emp.lab.probing import Probing, window
from emp.lab.topology import CLIENT, FABRIC
from emp.model.network import EvmNetwork, Traffic
from tests.lab.conftest import Pool, run_lab
from tests.lab.pool import Subject, subject, until

TAKEN = "10.77.200.9"
GROUP = "239.77.1.1"
PROBE_HZ = 200


def neighbour(pool: Pool, where: str, address: str) -> str | None:
    """Return the MAC that a place of the lab believes an address to have."""
    shown = run_lab("exec", "--name", pool.name, where, "--", "ip", "-j", "neighbour", "show", address).stdout
    return next((entry.get("lladdr") for entry in json.loads(shown or "[]")), None)


def network(evm: Subject) -> EvmNetwork:
    return evm.client.evms.network(evm.name)


def learnt(evm: Subject) -> list[str]:
    return [one.address for one in network(evm).learnt]


def refused(evm: Subject) -> list[str]:
    return [one.address for one in network(evm).refused]


def traffic(evm: Subject) -> Traffic:
    counted = network(evm).traffic
    assert counted is not None
    return counted


def test_a_guest_cannot_speak_as_another_evm_the_node_or_anybody_else(pool: Pool) -> None:
    with subject(pool, node="n1") as thief, subject(pool, node="n2") as owner:
        nodes = {node.name: node.report.address for node in owner.client.nodes.list().items}
        address, mac = owner.spec.nics[0].address, owner.spec.nics[0].mac
        before = {where: neighbour(pool, where, nodes["n1"]) for where in (CLIENT.name, "n2")}
        assert neighbour(pool, CLIENT.name, address) == mac
        for claimed in (address, nodes["n1"], nodes["n2"], pool.topology.place("ctl").address):
            for _ in range(3):
                thief.guest().ask(f"wire claim {claimed}")
        until(lambda: traffic(thief).spoofed_frames >= 24, "each of the frames is counted")
        assert neighbour(pool, CLIENT.name, address) == mac
        for where, known in before.items():
            assert neighbour(pool, where, nodes["n1"]) == known
        owner.guest().ask("status")
        until(lambda: len(refused(thief)) == 4, "all are refused")
        assert learnt(thief) == []
        text = pool.emp("evm", "show", thief.name).stdout
        assert f"{address}  {thief.spec.nics[0].mac}  not this EVM's to use" in text
        assert "in another's name" in text
        assert traffic(owner).spoofed_frames == 0


def test_an_address_that_the_guest_took_is_its_own_and_moves_with_it(pool: Pool) -> None:
    with subject(pool, node="n1", pods=["shop"]) as evm, subject(pool, node="n3") as other:
        evm.guest().ask(f"wire add {TAKEN}/16")
        until(lambda: learnt(evm) == [TAKEN], "it has leave")
        taken = Guest(pool.topology, TAKEN)
        taken.wait_first_packet()
        other.guest().ask(f"wire add {TAKEN}/16")
        until(lambda: refused(other) == [TAKEN], "another EVM has none")
        assert neighbour(pool, CLIENT.name, TAKEN) == evm.spec.nics[0].mac
        other.guest().ask(f"wire del {TAKEN}/16")

        boot_id, before = evm.boot_id, traffic(evm)
        with Probing(pool.files, {"taken": TAKEN}, rate_hz=PROBE_HZ) as probing:
            for target in ("n2", "n1"):
                probing.mark(target)
                evm.migrate(target)
                evm.check_only_on(target)
            seen = probing.stop()
        for target in ("n2", "n1"):
            assert window(seen, "taken", target)["received"] > 0
        assert str(taken.ask("status")["boot_id"]) == boot_id
        assert learnt(evm) == [TAKEN]
        until(lambda: traffic(evm).sent_frames > before.sent_frames, "it reports again")
        after = traffic(evm)
        assert after.received_frames > before.received_frames, "counts go on, on the third set of taps"
        assert after.received_bytes > before.received_bytes

        evm.guest().ask(f"wire del {TAKEN}/16")
        pool.kill("n1", "agent")
        pool.start("n1", "agent")
        until(lambda: learnt(evm) and network(evm).traffic, "a restarted agent knows it still")
        assert traffic(evm).received_frames >= after.received_frames


def test_an_address_taken_during_the_source_brownout_is_there_on_the_target(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        moving = evm.begin_slow("n2")
        evm.guest().ask(f"wire add {TAKEN}/16")
        until(lambda: learnt(evm) == [TAKEN], "it has leave")
        assert evm.end_of(moving).committed
        began_s = time.monotonic()
        Guest(pool.topology, TAKEN).wait_first_packet()
        assert time.monotonic() - began_s < 5
        evm.check_only_on("n2")
        assert learnt(evm) == [TAKEN]


def test_a_switch_that_snoops_learns_where_the_guest_hears_its_groups_now(pool: Pool) -> None:
    """This guest reports them by itself as well, when its card says that it was moved; ``test_network`` has the query
    that makes others do it."""
    fabric = pool.topology.namespace(FABRIC)

    def ports() -> set[str]:
        (table,) = json.loads(run_sync("bridge", "-n", fabric, "-json", "mdb", "show", "dev", FABRIC))
        return {entry["port"] for entry in table["mdb"] if entry["grp"] == GROUP}

    run_sync("ip", "-n", fabric, "link", "set", FABRIC, "type", "bridge", "mcast_snooping", "1")
    try:
        with subject(pool, node="n1") as evm:
            evm.guest().ask(f"wire join {GROUP}")
            until(lambda: ports() == {"n1"}, "the switch has heard the guest join")
            evm.migrate("n2")
            until(lambda: "n2" in ports(), "the switch hears it from its new port", timeout_s=10)
    finally:
        run_sync("ip", "-n", fabric, "link", "set", FABRIC, "type", "bridge", "mcast_snooping", "0")


def test_declared_ipv6_addresses_lose_nothing_over_migrations(pool: Pool) -> None:
    with subject(pool, node="n1", ipv6=["auto"], pods=["a=auto"]) as evm:
        six = [address for _, address in evm.spec.addresses if ":" in address]
        targets = dict(zip(("evm", "pod"), six, strict=True))
        for address in six:
            Guest(pool.topology, address).wait_first_packet()
        for node in ("n2", "n1"):
            with Probing(pool.files, targets, rate_hz=PROBE_HZ) as probing:
                evm.migrate(node)
                report = probing.stop()
            for name in targets:
                udp, tcp = (report["targets"][name][kind]["total"] for kind in ("udp", "tcp"))
                assert (udp["lost"], udp["duplicated"], tcp["lost"]) == (0, 0, 0), name
                assert report["targets"][name]["tcp"]["resets"] == 0
        assert network(evm).refused == (), "its link-local ones it took by itself, and has leave for"
