"""What may happen to the frames of an EVM while it moves: aborts, a tunnel that is cut, a flood. Seen from outside.

The fault matrix (``tests/fault/matrix.py``) has the whole wire between the two agents cut in every column (F9, by DROP
and by RST), cut with others (F13, F14), and slow (F20), and says who runs then. Here the orders get through and only
the frames do not, and what is looked at is what the client sees.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from emp import faults
from emp.host.run import run_sync
from emp.lab import daemons
from emp.lab.checkers.frames import FrameWitness
from emp.lab.down import down
from emp.lab.guest_control import ECHO_PORT, socket_in
from emp.lab.places import NAMESPACES
from emp.lab.probing import Probing
from emp.lab.topology import CLIENT, FABRIC, LINK_PORT, UPLINK
from emp.lab.up import Options, up
from emp.model.migration import Outcome
from emp.network.tap_driver import QUEUE_FRAMES, interface_name
from tests.frames import ethernet
from tests.lab.aborts import GRACE_S, STAGES, aborted_in, check_streams, ends, wait_hit
from tests.lab.clocks import check_right, clock, settle, until_told
from tests.lab.conftest import Pool
from tests.lab.flood import Flood, packet_socket
from tests.lab.pool import Subject, mend, subject, until
from tests.leaks import outliving

NAME = "net-faults"
HELD_MS = 800
"""for so long a migration stands at a point while its tunnel is cut: less than it takes to be found dead"""


@pytest.fixture(scope="module")
def pool(lab_home: Path) -> Iterator[Pool]:
    """A lab of two nodes with its fault points on."""
    with outliving(f"the lab {NAME}"):
        made = Pool(up(Options(NAME, 2, faults=True)))
    yield made
    down(made.files)


@pytest.fixture(scope="module")
def evm(pool: Pool) -> Iterator[Subject]:
    with subject(pool, node="n1") as made:
        yield made


@pytest.fixture(autouse=True)
def mended(pool: Pool, evm: Subject) -> Iterator[None]:
    """What a test that failed has left is not the next one's."""
    yield
    for place in pool.topology.node_places:
        faults.disarm(pool.files.faults(place.name))
    mend(pool)
    until(lambda: evm.record.migration is None, "no migration is open")


# ---------------------------------------------------------------- an abort


def neighbours(pool: Pool, evm: Subject) -> dict[str, str | None]:
    """Return which MAC everybody on the segment has for the EVM."""
    found: dict[str, str | None] = {}
    for place in pool.topology.places:
        shown = run_sync(
            "ip", "-n", pool.topology.namespace(place.name), "-j", "neigh", "show", evm.spec.nics[0].address
        )
        found[place.name] = next((entry.get("lladdr") for entry in json.loads(shown or "[]")), None)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_of_an_abort_nobody_hears_and_no_packet_is_lost(pool: Pool, evm: Subject, stage: str) -> None:
    source, _ = ends(evm)
    mac, address = evm.spec.nics[0].mac, evm.spec.nics[0].address
    with (
        Probing(pool.files, {"evm": address}, rate_hz=1000, grace_s=GRACE_S) as probing,
        FrameWitness(pool.topology, [mac]) as witness,
    ):
        before = neighbours(pool, evm)
        assert before[CLIENT.name] == mac
        ended = aborted_in(stage, pool, evm)
        assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
        evm.check_only_on(source)
        check_streams(probing)
        assert neighbours(pool, evm) == before
    assert {seen.node for seen in witness.seen} == {source}, "and so the capture has seen something"
    assert witness.dropped == 0
    assert not ended.report.frames_forwarded


@pytest.mark.parametrize("stage", ["device transfer", "completed"])
def test_after_an_abort_in_the_blackout_the_clock_is_right_and_has_never_stepped_back(
    pool: Pool, evm: Subject, stage: str
) -> None:
    settle(evm)
    before = clock(evm, "clock watch")
    since_s = evm.client.evms.clock(evm.name).at_s
    ended = aborted_in(stage, pool, evm)
    assert ended.outcome is Outcome.ABORTED
    told = until_told(evm, lambda clock: clock.is_right and clock.at_s > since_s, "is right again")
    check_right(evm)
    after = clock(evm)
    assert after["samples"] > before["samples"], "it was watched all the time"
    assert after["stepped_back_us"] == 0
    pause_ms = ended.report.abort_pause_ms
    assert pause_ms is not None
    assert told.is_set, "it was behind"
    assert (after["stepped_ahead_us"] - before["stepped_ahead_us"]) / 1000 > pause_ms / 2


# ---------------------------------------------------------------- the tunnel is cut


def tunnels(pool: Pool, source: str, target: str) -> tuple[int, int]:
    """Return the source's ports of the two connections between the agents: that of the orders, that of the frames.

    They look alike from outside, but the clocks of the two nodes were measured over the first.
    """
    there = pool.topology.place(target).address
    shown = pool.run_in(source, "ss", "-HtniO", "state", "established", "dst", f"{there}:{LINK_PORT}").stdout
    found = {
        int(re.search(r":(\d+)\s", line)[1]): int(re.search(r"bytes_sent:(\d+)", line)[1])  # type: ignore[index]
        for line in shown.splitlines()
    }
    frames, orders = sorted(found, key=lambda port: found[port])
    return orders, frames


@contextmanager
def cut(pool: Pool, source: str, target: str, rule: str) -> Iterator[None]:
    """Cut what ``rule`` says of the frames that enter the switch, until the end."""
    inside = ["nsenter", f"--net={NAMESPACES / pool.topology.namespace(FABRIC)}", "nft"]
    chain = f"type filter hook ingress devices = {{ {source}, {target} }} priority 0; {rule}"
    run_sync(*inside, "-f", "-", stdin=f"table netdev emp-tunnel {{\n chain wires {{ {chain} }}\n}}\n")
    try:
        yield
    finally:
        run_sync(*inside, "delete", "table", "netdev", "emp-tunnel")


def connection(port: int, verdict: str) -> str:
    return f"tcp sport {port} {verdict}; tcp dport {port} {verdict};"


POINTS = {"blackout": "source.write-record-given.before", "target brownout": "source.kill-machine.before"}
VERDICTS = {"DROP": "drop", "RST": "reject with tcp reset"}


class Visitor:
    """A client whose datagrams come to the source, whatever the network has learnt: they are put on the EVM's tap."""

    def __init__(self, pool: Pool, evm: Subject) -> None:
        self._evm = evm
        self._pool = pool
        self._socket = socket_in(pool.topology, socket.SOCK_DGRAM)
        self._socket.bind((pool.topology.place(CLIENT.name).address, 0))
        self._socket.settimeout(10)

    def send(self, node: str, numbers: range) -> None:
        sender = packet_socket(self._pool.topology, node, interface_name(self._evm.name, 0))
        with sender:
            for number in numbers:
                sender.send(self._datagram(number))

    def _datagram(self, number: int) -> bytes:
        """RFC 791 and 768; a UDP checksum of 0 is none."""
        nic, client = self._evm.spec.nics[0], self._pool.topology.place(CLIENT.name)
        body = b"visitor %d" % number
        header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(body), 0, 0x4000, 64, 17, 0)
        header += ip_address(client.address).packed + ip_address(nic.address).packed
        total = sum(struct.unpack("!10H", header))
        total = (total & 0xFFFF) + (total >> 16)
        header = header[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + header[12:]
        udp = struct.pack("!HHHH", self._socket.getsockname()[1], ECHO_PORT, 8 + len(body), 0)
        return ethernet(client.mac, nic.mac, 0x0800, header + udp + body)

    def answers(self, count: int) -> list[int]:
        """Return the numbers in what came back, once it is so many."""
        found = [int(self._socket.recv(2048).split()[1]) for _ in range(count)]
        self._socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            self._socket.recv(2048)
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def visitor(pool: Pool, evm: Subject) -> Iterator[Visitor]:
    made = Visitor(pool, evm)
    yield made
    made.close()


@pytest.mark.parametrize("how", ["DROP", "RST"])
@pytest.mark.parametrize("moment", ["blackout", "target brownout"])
def test_a_tunnel_that_is_cut_is_made_again_and_nothing_is_lost(
    pool: Pool, evm: Subject, visitor: Visitor, moment: str, how: str
) -> None:
    source, target = ends(evm)
    since_s = time.monotonic()
    faults.arm(pool.files.faults(source), POINTS[moment], f"delay:{HELD_MS}")
    with Probing(pool.files, {"evm": evm.spec.nics[0].address}, rate_hz=200, grace_s=GRACE_S) as probing:
        moving = evm.begin(target)
        wait_hit(pool, source, POINTS[moment], since_s)
        _, frames = tunnels(pool, source, target)
        with cut(pool, source, target, connection(frames, VERDICTS[how])):
            visitor.send(source, range(50))
            ended = evm.end_of(moving)
            assert ended.outcome is Outcome.COMPLETED, ended.cause
            assert visitor.answers(50) == list(range(50))
        check_streams(probing)
    evm.check_only_on(target)
    assert (ended.report.frames_forwarded or 0) >= 50
    assert ended.report.frames_lost == 0


@pytest.mark.parametrize("how", ["DROP", "RST"])
def test_frames_that_never_get_through_are_lost_and_counted_and_hold_nothing_up(
    pool: Pool, evm: Subject, how: str
) -> None:
    source, target = ends(evm)
    since_s = time.monotonic()
    most_s = 1.0
    faults.arm(pool.files.faults(source), POINTS["blackout"], f"delay:{HELD_MS}")
    with Probing(pool.files, {"evm": evm.spec.nics[0].address}, rate_hz=200) as probing:
        moving = evm.begin(target, forward_most_s=most_s)
        wait_hit(pool, source, POINTS["blackout"], since_s)
        orders, _ = tunnels(pool, source, target)
        with cut(pool, source, target, f"tcp dport {LINK_PORT} tcp sport != {orders} {VERDICTS[how]};"):
            ended = evm.end_of(moving)
        seen = probing.stop()["targets"]["evm"]
    assert ended.outcome is Outcome.COMPLETED, ended.cause
    evm.check_only_on(target)
    report = ended.report
    assert report.frames_held and report.frames_lost
    assert report.frames_lost >= report.frames_held - (report.frames_forwarded or 0) > 0
    assert 0 < seen["udp"]["total"]["lost"] <= report.frames_lost
    assert (seen["tcp"]["resets"], seen["tcp"]["reconnects"], seen["tcp"]["total"]["lost"]) == (0, 0, 0)
    assert report.stages.target_brownout_s is not None and report.stages.target_brownout_s < most_s + 2
    assert f"{report.frames_lost} lost" in pool.emp("migration", "show", ended.id).stdout


# ---------------------------------------------------------------- a flood

FLOOD_HZ = 400_000
COUNTED = 120_000
MEMORY_BYTES = 64 << 20
"""16 MiB of copies, 4 on their way, 16 of what has gone into the tap, and what Python adds to frames that are small"""


def passed(pool: Pool, node: str, evm: Subject) -> tuple[int, int]:
    """Return how many frames have come to the EVM's tap, and how many of them it had no room for."""
    tap = interface_name(evm.name, 0)
    shown = run_sync("ip", "-n", pool.topology.namespace(node), "-j", "-s", "link", "show", "dev", tap)
    (link,) = json.loads(shown)
    sent = link["stats64"]["tx"]
    return sent["packets"] + sent["dropped"], sent["dropped"]


class Memory:
    """How much an agent's resident memory grows at most from now on (proc(5), ``clear_refs``)."""

    def __init__(self, pool: Pool, node: str) -> None:
        process = daemons.find(pool.files, node, "agent")
        assert process is not None
        self._directory = Path(f"/proc/{process.pid}")
        (self._directory / "clear_refs").write_text("5")
        self._before = self._bytes("VmRSS")

    def grown_bytes(self) -> int:
        return self._bytes("VmHWM") - self._before

    def _bytes(self, name: str) -> int:
        lines = (self._directory / "status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def test_a_flood_in_the_blackout_harms_nothing_but_itself(
    pool: Pool, evm: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice what the queues of both taps hold. How fast it came is printed, not asked for: it is the machine's matter.
    It is the sender's rate, less the share that did not come to the source's tap by the kernel's counters."""
    source, target = ends(evm)
    boot_id = evm.boot_id
    agents = {node: Memory(pool, node) for node in (source, target)}
    client, nic = pool.topology.place(CLIENT.name), evm.spec.nics[0]
    frame = ethernet(client.mac, nic.mac, 0x88B6, bytes(46))
    since_s = time.monotonic()
    faults.arm(pool.files.faults(source), "source.continue-stream.before", "delay:300")
    moving = evm.begin(target, blackout_deadline_s=30, forward_most_s=2)
    wait_hit(pool, source, "source.continue-stream.before", since_s)
    pool.stop(target, f"qemu:{evm.name}")  # the blackout lasts until it goes on
    earlier = passed(pool, source, evm)
    with packet_socket(pool.topology, CLIENT.name, UPLINK) as sender, Flood(sender, frame, FLOOD_HZ) as flood:
        until(lambda: passed(pool, source, evm)[0] >= earlier[0] + COUNTED, "the flood comes to the tap")
        best_hz, sent = flood.best_hz, flood.sent
        came, dropped = (now - before for now, before in zip(passed(pool, source, evm), earlier, strict=True))
        pool.cont(target, f"qemu:{evm.name}")
        ended = evm.end_of(moving)
    rate_hz = best_hz * min(1.0, came / sent)
    grown = {node: memory.grown_bytes() for node, memory in agents.items()}
    report = ended.report
    with capsys.disabled():
        print(
            f"\n  {came} frames in the blackout, {rate_hz:.0f} a second at best, {dropped} dropped;"
            f" held {report.frames_held}, forwarded {report.frames_forwarded}, lost {report.frames_lost};"
            f" memory of the agents {[f'{size / (1 << 20):+.1f} MiB' for size in grown.values()]};"
            f" pause {report.vcpu_pause_ms} ms",
            end="",
        )
    assert ended.outcome is Outcome.COMPLETED, ended.cause
    assert dropped >= COUNTED - 2 * QUEUE_FRAMES, "there was room for no more"
    assert report.frames_lost is not None and report.frames_lost >= dropped
    assert report.frames_forwarded is not None and report.frames_forwarded > 0.9 * QUEUE_FRAMES, (
        "what had room has come"
    )
    assert f"{report.frames_lost} lost" in pool.emp("migration", "show", ended.id).stdout
    assert max(grown.values()) < MEMORY_BYTES
    assert evm.boot_id == boot_id
    evm.check_only_on(target)

    def shows_drops() -> bool:
        traffic = evm.client.evms.network(evm.name).traffic
        return traffic is not None and traffic.dropped_frames >= dropped

    until(shows_drops, "the EVM's counters have them", timeout_s=10)
