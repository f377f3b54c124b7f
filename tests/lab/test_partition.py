"""A cut wire as the two places and everybody else see it: dropped or refused, one way or both, and mended."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from emp.lab import partition
from emp.lab.guest_control import socket_in
from emp.lab.partition import How
from tests.lab.conftest import Evm, Pool, run_lab
from tests.lab.pool import until

SILENCE_S = 0.5
"""a cut wire stays silent however long one listens; an open one is a matter of microseconds"""
PATIENCE_S = 30.0


@pytest.fixture
def wires(pool: Pool) -> Iterator[Wires]:
    with ExitStack() as opened:
        opened.callback(partition.heal, pool.files)
        yield Wires(pool, opened)


class Wires:
    """Sockets in the places of a pool, all closed with the test."""

    def __init__(self, pool: Pool, opened: ExitStack) -> None:
        self.pool = pool
        self._opened = opened

    def address(self, where: str) -> str:
        return self.pool.topology.place(where).address

    def make(self, where: str, kind: socket.SocketKind) -> socket.socket:
        made = self._opened.enter_context(socket_in(self.pool.topology, kind, where))
        made.settimeout(PATIENCE_S)
        return made

    def listener(self, where: str) -> socket.socket:
        made = self.make(where, socket.SOCK_STREAM)
        made.bind((self.address(where), 0))
        made.listen()
        return made

    def connect(self, where: str, to: socket.socket, *, timeout_s: float = PATIENCE_S) -> socket.socket:
        made = self.make(where, socket.SOCK_STREAM)
        made.settimeout(timeout_s)
        made.connect(to.getsockname())
        made.settimeout(PATIENCE_S)
        return made

    def accept(self, listener: socket.socket) -> socket.socket:
        connection = self._opened.enter_context(listener.accept()[0])
        connection.settimeout(PATIENCE_S)
        return connection

    def datagrams(self, where: str) -> socket.socket:
        made = self.make(where, socket.SOCK_DGRAM)
        made.bind((self.address(where), 0))
        return made


def silent(connection: socket.socket) -> bool:
    """Whether nothing arrives."""
    connection.settimeout(SILENCE_S)
    try:
        connection.recv(100)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_S)
    return False


def test_a_cut_wire_drops_both_ways_and_nobody_elses_is_touched(wires: Wires) -> None:
    listeners = {where: wires.listener(where) for where in ("n1", "client")}
    run_lab("cut", "--name", wires.pool.name, "client", "n1")
    with pytest.raises(TimeoutError):
        wires.connect("client", listeners["n1"], timeout_s=SILENCE_S)
    with pytest.raises(TimeoutError):
        wires.connect("n1", listeners["client"], timeout_s=SILENCE_S)
    wires.connect("n2", listeners["n1"])
    wires.connect("n1", wires.listener("vol"))
    wires.connect("client", wires.listener("n2"))
    run_lab("heal", "--name", wires.pool.name, "client", "n1")
    wires.connect("client", listeners["n1"])
    wires.connect("n1", listeners["client"])


def test_a_rejecting_wire_refuses_and_resets(wires: Wires) -> None:
    listener = wires.listener("n1")
    ours = wires.connect("client", listener)
    theirs = wires.accept(listener)
    run_lab("cut", "--name", wires.pool.name, "client", "n1", "--reject")
    with pytest.raises(ConnectionRefusedError):
        wires.connect("client", listener)
    for end in (ours, theirs):
        end.sendall(b"into the reset")
        with pytest.raises(ConnectionResetError):
            end.recv(100)


def test_an_open_connection_stalls_and_goes_on_when_mended(wires: Wires) -> None:
    listener = wires.listener("n1")
    ours = wires.connect("client", listener)
    theirs = wires.accept(listener)
    partition.cut(wires.pool.files, "client", "n1")
    ours.sendall(b"late")
    assert silent(theirs)
    partition.heal(wires.pool.files)
    assert theirs.recv(100) == b"late"


def test_a_one_way_cut_lets_the_other_way_pass(wires: Wires) -> None:
    client, node = wires.datagrams("client"), wires.datagrams("n1")
    run_lab("cut", "--name", wires.pool.name, "client", "n1", "--one-way")
    wires.pool.run_in("n1", "ip", "neigh", "flush", "dev", "br0")  # ARP is not cut: it finds the client again
    node.sendto(b"heard", client.getsockname())
    assert client.recv(100) == b"heard"
    client.sendto(b"lost", node.getsockname())
    assert silent(node)
    partition.heal(wires.pool.files)
    client.sendto(b"found", node.getsockname())
    assert node.recv(100) == b"found"


def test_cuts_are_shown_changed_and_mended_one_by_one(wires: Wires) -> None:
    pool = wires.pool

    def shown() -> set[tuple[str, str, str]]:
        status = json.loads(run_lab("status", "--name", pool.name, "--json").stdout)
        return {(one["source"], one["target"], one["how"]) for one in status["cuts"]}

    assert shown() == set()
    partition.cut(pool.files, "client", "n1")
    partition.cut(pool.files, "client", "n2", one_way=True, how=How.REJECT)
    both = {("client", "n1", "drop"), ("n1", "client", "drop")}
    assert shown() == both | {("client", "n2", "reject")}
    assert "cut: client -> n2 (reject)" in run_lab("status", "--name", pool.name).stdout
    partition.cut(pool.files, "n2", "client")
    assert shown() == both | {("client", "n2", "drop"), ("n2", "client", "drop")}
    partition.heal(pool.files, "n1", "client")
    assert shown() == {("client", "n2", "drop"), ("n2", "client", "drop")}
    assert run_lab("heal", "--name", pool.name).stdout == "every cut is mended\n"
    assert shown() == set()


def test_frames_of_evms_pass_a_cut_between_their_hosts(wires: Wires, new_evm: Callable[..., Evm]) -> None:
    evm = new_evm("--node", "n2")
    partition.cut(wires.pool.files, "client", "n2")
    with pytest.raises(TimeoutError):
        wires.connect("client", wires.listener("n2"), timeout_s=SILENCE_S)
    assert evm.guest.ask("status")["boot_id"]


def test_a_node_that_the_controller_cannot_hear_is_down_until_it_is_mended(wires: Wires) -> None:
    pool = wires.pool

    def ready() -> bool:
        return bool(pool.json("node", "show", "n3")["ready"])

    assert ready()
    partition.cut(pool.files, "n3", "ctl", one_way=True)
    until(lambda: not ready(), "the controller misses n3")
    partition.heal(pool.files)
    until(ready, "the controller hears n3 again")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["cut", "n1", "n1"], 2, "no wire from n1 to itself"),
        (["cut", "n1", "n9"], 3, "there are ctl, vol, client, bmc, n1"),
        (["heal", "n1"], 2, "name two places"),
    ],
)
def test_cuts_that_make_no_sense_are_explained(pool: Pool, words: list[str], status: int, says: str) -> None:
    done = run_lab(words[0], "--name", pool.name, *words[1:], check=False)
    assert done.returncode == status
    assert says in done.stderr
