"""A segment with frames of 9,000 bytes: the guest is told what fits, and none of them is lost over a migration."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.host.run import run_sync
from emp.lab.down import down
from emp.lab.guest_control import ECHO_PORT, socket_in
from emp.lab.topology import BRIDGE, CLIENT, FABRIC, UPLINK
from emp.lab.up import Options, up
from emp.model.migration import Outcome
from tests.lab.conftest import Pool, run_lab
from tests.lab.pool import subject, until
from tests.leaks import outliving

NAME = "jumbo"
MTU_BYTES = 9000
LARGE_BYTES = 8000
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
"""linux/in.h: in one piece or not at all"""
SO_RCVBUFFORCE = 33


@pytest.fixture(scope="module")
def pool(lab_home: Path) -> Iterator[Pool]:
    with outliving(f"the lab {NAME}"):
        made = Pool(up(Options(NAME, 2)))
    fabric = made.topology.namespace(FABRIC)
    for place in made.topology.places:
        inner = made.topology.namespace(place.name)
        links = [(fabric, place.name), (inner, UPLINK)] + ([(inner, BRIDGE)] if place.is_node else [])
        for namespace, link in links:
            run_sync("ip", "-n", namespace, "link", "set", link, "mtu", str(MTU_BYTES))
    run_sync("ip", "-n", fabric, "link", "set", FABRIC, "mtu", str(MTU_BYTES))
    yield made
    down(made.files)


def put_together(pool: Pool) -> int:
    """Return how many fragments the client has been sent (SNMP's ``ipReasmReqds``, RFC 4293)."""
    table = run_lab("exec", "--name", pool.name, CLIENT.name, "--", "cat", "/proc/net/snmp").stdout
    names, values = re.findall(r"^Ip: (.*)$", table, re.MULTILINE)
    return int(values.split()[names.split().index("ReasmReqds")])


def test_large_frames_are_answered_in_one_piece_over_a_migration(pool: Pool) -> None:
    with (
        subject(pool, node="n1", pods=["a"]) as evm,
        socket_in(pool.topology, socket.SOCK_DGRAM) as client,
    ):
        evm.pod(0).wait_first_packet()
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        client.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)  # what was held is answered all at once
        client.setblocking(False)
        asked = [evm.spec.nics[0].address, evm.spec.pods[0].address]
        answered: set[int] = set()

        def hear() -> None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    answered.add(int.from_bytes(client.recv(MTU_BYTES)[:8], "big"))

        moving, sent = evm.begin("n2"), 0
        while evm.client.migrations.get(moving.id).outcome is None:
            for _ in range(10):
                request = sent.to_bytes(8, "big") + bytes(LARGE_BYTES - 8)
                client.sendto(request, (asked[sent % len(asked)], ECHO_PORT))
                sent += 1
                hear()
                time.sleep(0.005)  # 200 a second
        ended = evm.end_of(moving)
        assert ended.outcome is Outcome.COMPLETED
        assert ended.report.frames_held, "some have come in the blackout"

        def all_answered() -> bool:
            hear()
            return len(answered) == sent

        until(all_answered, "every one is answered")
        assert put_together(pool) == 0, "the guest knows what fits"
