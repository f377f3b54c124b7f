"""The client's loads against servers that lose, lie, end and stall: each is to be in the report."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from emp.lab.loads import Bulk, Connections, Load, OneWay, bulk_pattern, main

PATTERN = bulk_pattern()
PERIOD = len(PATTERN)
Serve = Callable[[socket.socket], None]


@contextmanager
def serving(serve: Serve) -> Iterator[int]:
    """Give the port of a server that does ``serve`` with each connection, in a thread each."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        threads: list[threading.Thread] = []

        def one(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                serve(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):  # the listener is shut: the test is over
                while True:
                    threads.append(threading.Thread(target=one, args=(listener.accept()[0],)))
                    threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for thread in threads:
                thread.join()


def run(load: Load, until: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not until():
        assert time.monotonic() < deadline_s, load.report()
        load.step()


def for_s(seconds: float) -> Callable[[], bool]:
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() > end_s


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# -- one way


def test_a_stream_one_way_is_numbered_and_keeps_its_rate() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sink.bind(("127.0.0.1", 0))
        with closing(OneWay("127.0.0.1", 1000, 7, port=sink.getsockname()[1])) as load:
            began_s = time.monotonic()
            run(load, for_s(0.5))
            due = (time.monotonic() - began_s) * 1000
            sent = load.report()["sent"]
            assert sent + load.report()["left_out"] == pytest.approx(due, abs=20)
            sink.setblocking(False)
            numbers = [struct.unpack_from("!QQ", sink.recv(2048)) for _ in range(sent)]
    assert numbers == [(7, number) for number in range(sent)]


def test_what_a_stall_of_the_sender_has_cost_is_told() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        with closing(OneWay("127.0.0.1", 20_000, 1, port=sink.getsockname()[1])) as load:
            load.step()
            load._due_ns -= 1_000_000_000  # as if it had been away for a second
            load.step()
            report = load.report()
    assert report["left_out"] >= 19_900
    assert report["worst_late_ms"] >= 1000


# -- connections


def echo(connection: socket.socket) -> None:
    while data := connection.recv(4096):
        connection.sendall(b"".join(line + b" 1 boot\n" for line in data.splitlines()))


def windows(load: Load) -> dict[str, Any]:
    return {window["name"]: window for window in load.report()["windows"]}


def test_connections_that_all_answer() -> None:
    with serving(echo) as port, closing(Connections("127.0.0.1", 20, port=port)) as load:
        run(load, for_s(0.3))
        load.mark("after")
        start = windows(load)["start"]
    assert (start["resets"], start["unanswered"], start["wrong"]) == (0, 0, 0)
    assert start["asked"] == start["answered"] >= 40


def test_a_connection_that_is_reset_counts_in_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emp.lab.loads.PATIENCE_S", 0.2)
    told = threading.Event()

    def one_answer(connection: socket.socket) -> None:
        connection.sendall(connection.recv(4096).rstrip() + b" 1 boot\n")
        told.wait(10)
        reset(connection)

    with serving(one_answer) as port, closing(Connections("127.0.0.1", 3, port=port)) as load:
        load.mark("migration")
        told.set()
        run(load, lambda: windows(load)["migration"]["resets"] == 3)
    assert windows(load)["start"]["resets"] == 0
    assert load.report()["open"] == 0


def test_a_wrong_answer_and_one_that_never_comes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emp.lab.loads.PATIENCE_S", 0.2)

    def lie_once(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"something else 1 boot\n")
        while connection.recv(4096):
            pass

    with serving(lie_once) as port, closing(Connections("127.0.0.1", 1, port=port)) as load:
        load.mark("after")
        start = windows(load)["start"]
    assert (start["wrong"], start["unanswered"]) == (1, 1)


# -- bulk


def take(connection: socket.socket) -> None:
    while connection.recv(1 << 20):
        pass


def give(connection: socket.socket) -> None:
    while True:
        connection.sendall(PATTERN)


def test_a_bulk_transfer_goes_both_ways() -> None:
    with serving(take) as up, serving(give) as down, closing(Bulk("127.0.0.1", ports=(up, down))) as load:
        run(load, lambda: min(windows(load)["start"][way]["bytes"] for way in ("up", "down")) > 20 * PERIOD)
        figures = windows(load)["start"]
    assert (figures["wrong"], figures["resets"]) == (0, 0)


def test_each_way_stalls_by_itself() -> None:
    stop, go_on = threading.Event(), threading.Event()

    def give_and_pause(connection: socket.socket) -> None:
        while not stop.is_set():
            connection.sendall(PATTERN)
        go_on.wait(10)
        connection.sendall(PATTERN)
        while connection.recv(1):
            pass

    with serving(take) as up, serving(give_and_pause) as down, closing(Bulk("127.0.0.1", ports=(up, down))) as load:
        run(load, for_s(0.2))
        load.mark("migration")
        stop.set()
        run(load, for_s(0.6))
        go_on.set()
        run(load, for_s(0.1))
        figures = windows(load)["migration"]
    assert figures["down"]["stall_ms"] > 400
    assert figures["up"]["stall_ms"] < figures["down"]["stall_ms"]


def test_a_wrong_byte_and_a_reset_are_told() -> None:
    def give_one_wrong(connection: socket.socket) -> None:
        connection.sendall(PATTERN + b"!" + PATTERN[1:])
        take(connection)

    def take_and_reset(connection: socket.socket) -> None:
        connection.recv(4096)
        reset(connection)

    def done() -> bool:
        figures = windows(load)["start"]
        return bool(figures["down"]["bytes"] == 2 * PERIOD and figures["resets"] == 1)

    with (
        serving(take_and_reset) as up,
        serving(give_one_wrong) as down,
        closing(Bulk("127.0.0.1", ports=(up, down))) as load,
    ):
        run(load, done)
        figures = windows(load)["start"]
    assert figures["wrong"] >= 1


@pytest.mark.parametrize("words", [["one-way", "10.0.0.1", "--rate", "0"], ["bulk", "10.0.0.1", "--number", "0"]])
def test_bad_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2
    assert "--rate: 1 to 100000" in capsys.readouterr().err
