"""The `micro` image as seen from outside: addresses, echo, memory, journal, console, power. Each in a real QEMU."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from emp.lab.images import Image, ensure_image
from emp.lab.journal_check import check_journal
from emp.lab.loads import bulk_pattern
from tests.lab.vm import BRIDGE, PATIENCE_S, Disk, Vm, control, echo, segment, wait_for_echo
from tests.leaks import outliving

EVM, SECOND, SIX, POD = "10.99.1.5", "10.99.2.5", "fd99::5", "10.99.1.6"
EVM_MAC, SECOND_MAC, POD_MAC = "52:54:00:99:00:01", "52:54:00:99:00:02", "02:00:00:99:00:06"
CONFIG = f"""\
hostname web
nic 0 mac {EVM_MAC} addr {EVM}/16 gw 10.99.0.1
nic 1 mac {SECOND_MAC} addr {SECOND}/16 addr {SIX}/64
pod web-0 nic 0 mac {POD_MAC} addr {POD}/16 gw 10.99.0.1
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def image() -> Image:
    return ensure_image()


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Disk, ...]:
    directory = tmp_path_factory.mktemp("disks")
    paths = [directory / name for name in ("large", "small", "broken")]
    for path, size in zip(paths, (8 * MIB, 64 << 10, MIB), strict=True):
        path.write_bytes(bytes(size))
    failing = {"event": "pwritev", "errno": 5, "iotype": "write", "sector": 16, "once": True}
    return (
        Disk("vol0123456789abcdef0", paths[0]),
        Disk("small", paths[1]),
        Disk("broken", paths[2], inject=(failing,)),
    )


@pytest.fixture(scope="module")
def taps() -> Iterator[list[str]]:
    with segment(3) as names:
        yield names


@pytest.fixture(scope="module")
def guest(
    image: Image, disks: tuple[Disk, ...], taps: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Vm]:
    with outliving("the guest"):
        nics = [(taps[0], EVM_MAC), (taps[1], SECOND_MAC)]
        vm = Vm(image, tmp_path_factory.mktemp("guest"), CONFIG, nics, disks)
    try:
        wait_for_echo(EVM, POD)
        yield vm
    finally:
        vm.close()


@pytest.fixture
def single(image: Image, taps: list[str], tmp_path: Path) -> Iterator[Vm]:
    """A guest that the test may end: one NIC, at 10.99.3.5."""
    vm = Vm(
        image,
        tmp_path,
        "hostname one\nnic 0 mac 52:54:00:99:00:03 addr 10.99.3.5/16\n",
        [(taps[2], "52:54:00:99:00:03")],
    )
    yield vm
    vm.close()


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def on_the_wire() -> dict[str, str]:
    """Address -> MAC, as the neighbours have told."""
    shown = subprocess.run(["ip", "-json", "neigh", "show", "dev", BRIDGE], capture_output=True, check=True)
    return {entry["dst"]: entry["lladdr"] for entry in json.loads(shown.stdout) if "lladdr" in entry}


def journal(serial: str) -> dict[str, Any]:
    return next(found for found in control(EVM, "journal status") if found["serial"] == serial)


@pytest.mark.parametrize("address", [EVM, SECOND, SIX, POD])
def test_a_datagram_comes_back_with_a_counter_and_the_boot_id(guest: Vm, address: str) -> None:
    replies = [echo(address, request) for request in (b"first \x00\xff", b"second\n", b"x" * 1400)]
    assert replies[0].startswith(b"first \x00\xff ")
    assert replies[1].startswith(b"second\n ")
    assert replies[2].startswith(b"x" * 1400 + b" ")
    answers = [reply.split()[-2:] for reply in replies]
    assert [boot.decode() for _, boot in answers] == [control(EVM, "status")["boot_id"]] * 3
    counters = [int(counter) for counter, _ in answers]
    assert counters == [counters[0], counters[0] + 1, counters[0] + 2]
    assert all(reply.endswith(b"\n") for reply in replies)


def test_pods_and_nics_are_on_the_wire_with_their_own_macs(guest: Vm, taps: list[str]) -> None:
    for address in (EVM, SECOND, SIX, POD):
        echo(address, b"who")
    seen = on_the_wire()
    assert {address: seen[address] for address in (EVM, SECOND, SIX, POD)} == {
        EVM: EVM_MAC,
        SECOND: SECOND_MAC,
        SIX: SECOND_MAC,
        POD: POD_MAC,
    }


def test_a_reply_leaves_by_the_nic_that_was_asked(guest: Vm, taps: list[str]) -> None:
    before = [packets(tap) for tap in taps[:2]]
    for _ in range(50):
        echo(SECOND, b"by which way?")
    after = [packets(tap) for tap in taps[:2]]
    assert after[1] - before[1] >= 50
    assert after[0] - before[0] < 25


def packets(tap: str) -> int:
    """How many frames the guest has sent by this tap."""
    shown = subprocess.run(["ip", "-json", "-stats", "link", "show", "dev", tap], capture_output=True, check=True)
    return int(json.loads(shown.stdout)[0]["stats64"]["rx"]["packets"])


def test_a_thousand_connections_are_answered_line_by_line(guest: Vm) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((POD, 7777), PATIENCE_S)) for _ in range(1000)]
        for number, connection in enumerate(connections):
            connection.sendall(b"one %d\ntwo %d\n" % (number, number))
        for number, connection in enumerate(connections):
            with connection.makefile("rb") as lines:
                assert lines.readline().startswith(b"one %d " % number)
                assert lines.readline().startswith(b"two %d " % number)
        assert control(POD, "status")["echo"]["connections"] >= 1000
    wait_until(lambda: control(POD, "status")["echo"]["connections"] < 10)


def test_a_client_that_sends_no_more_gets_its_replies(guest: Vm) -> None:
    with socket.create_connection((EVM, 7777), PATIENCE_S) as connection:
        connection.sendall(b"last words\n")
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as lines:
            assert lines.readline().startswith(b"last words ")
            assert lines.readline() == b""


def test_one_way_datagrams_are_counted_and_not_answered(guest: Vm) -> None:
    before = control(EVM, "status")["echo"]["sink"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(500):
            client.sendto(b"counted", (EVM, 7779))
    wait_until(lambda: control(EVM, "status")["echo"]["sink"] == before + 500)


def test_a_numbered_stream_is_counted_with_its_losses_duplicates_and_disorder(guest: Vm) -> None:
    assert control(EVM, "sink start 41") == {
        "stream": 41, "received": 0, "duplicated": 0, "reordered": 0, "next": 0, "silence_ms": 0.0,
        "missing": [],
    }  # fmt: skip
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((EVM, 7779))
        for stream, number in ((41, 0), (41, 1), (41, 4), (41, 3), (41, 3), (41, 7), (40, 8), (41, 2), (41, 1 << 40)):
            client.send(struct.pack("!QQ", stream, number))
        client.send(b"short")
    wait_until(lambda: control(EVM, "sink")["received"] >= 6)
    counted = control(EVM, "sink")
    assert {"received": 6, "duplicated": 1, "reordered": 2, "next": 8}.items() <= counted.items()
    assert counted["missing"] == [5, 6]
    again = control(EVM, "sink start 42")
    assert (again["stream"], again["received"], again["next"]) == (42, 0, 0)
    assert "error" in control(EVM, "sink start nonsense")


def test_a_stream_one_way_arrives_as_it_was_sent(guest: Vm) -> None:
    control(EVM, "sink start 43")
    words = ["one-way", EVM, "--rate", "2000", "--stream", "43"]
    report = loaded(words, lambda: wait_until(lambda: control(EVM, "sink")["received"] >= 1000))
    wait_until(lambda: control(EVM, "sink")["received"] == report["sent"])
    counted = control(EVM, "sink")
    assert (counted["duplicated"], counted["reordered"], counted["next"]) == (0, 0, report["sent"])


def test_bulk_data_is_the_same_on_both_sides_and_a_wrong_byte_is_noticed(guest: Vm) -> None:
    before = control(EVM, "bulk")

    def both_ways() -> None:
        wait_until(lambda: control(EVM, "bulk")["taken_bytes"] > before["taken_bytes"] + MIB)
        wait_until(lambda: control(EVM, "bulk")["given_bytes"] > before["given_bytes"] + MIB)

    window, _ = loaded(["bulk", EVM], both_ways)["windows"]
    assert (window["resets"], window["wrong"]) == (0, 0)
    assert min(window["up"]["bytes"], window["down"]["bytes"]) > MIB // 2
    assert control(EVM, "bulk")["wrong"] == before["wrong"]
    with socket.create_connection((EVM, 7779), PATIENCE_S) as connection:
        connection.sendall(b"!" + bulk_pattern()[1:])
    wait_until(lambda: control(EVM, "bulk")["wrong"] > before["wrong"])


def test_open_connections_answer_at_a_mark_and_not_while_the_guest_stands(guest: Vm) -> None:
    def pause() -> None:
        guest.qmp("stop")
        time.sleep(0.5)  # the length of the pause, not a wait for something
        guest.qmp("cont")

    report = loaded(["connections", EVM, "--number", "200"], pause)
    window, _ = report["windows"]
    assert (report["open"], window["resets"], window["wrong"]) == (200, 0, 0)
    assert window["worst_ms"] >= 450
    assert window["asked"] == window["answered"] >= 400


def loaded(words: list[str], meanwhile: Callable[[], None]) -> dict[str, Any]:
    """Return what the client's load says that it has done."""
    command = [sys.executable, "-m", "emp.lab.loads", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
        try:
            assert load.stdout is not None
            assert load.stdout.readline() == "ready\n"
            meanwhile()
            output, _ = load.communicate("mark end\nstop\n", timeout=PATIENCE_S)
        finally:
            load.kill()
    marked, last = output.splitlines()
    assert marked == "marked end"
    report: dict[str, Any] = json.loads(last)
    return report


def test_evm_and_pod_each_have_a_service_of_their_own(guest: Vm) -> None:
    evm, pod = control(EVM, "status"), control(POD, "status")
    assert (evm["role"], evm["name"], pod["role"], pod["name"]) == ("evm", "web", "pod", "web-0")
    assert evm["boot_id"] == pod["boot_id"]
    assert evm["uptime_s"] > 0
    assert evm["memory"]["bytes"] == pod["memory"]["bytes"] == 0


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("dance", "unknown command"),
        ('"; rm -rf /\\', "unknown command"),
        ("memory 5000 0", "multiple of 4096"),
        ("memory 4096 x", "usage"),
        ("memory 1099511627776 0", "available"),
        ("journal start nothing", "usage"),
        ("journal start small 0", "usage"),
        ("corrupt 1000000000", "no such page"),
    ],
)
def test_a_command_that_makes_no_sense_is_answered(guest: Vm, command: str, complaint: str) -> None:
    assert complaint in control(EVM, command)["error"]


def test_memory_is_rewritten_at_the_rate_that_was_asked_and_stays_verifiable(guest: Vm) -> None:
    started = control(EVM, f"memory {32 * MIB} {16 * MIB}")
    assert (started["bytes"], started["rate_bytes_per_s"]["target"]) == (32 * MIB, 16 * MIB)
    wait_until(lambda: control(EVM, "status")["memory"]["rate_bytes_per_s"]["achieved"] > 0)
    verified = control(EVM, "verify")
    assert (verified["pages"], verified["mismatches"]) == (8192, 0)
    wait_until(lambda: control(EVM, "status")["memory"]["rounds"] >= 2)
    assert control(EVM, "verify")["mismatches"] == 0
    memory = control(EVM, "status")["memory"]
    assert memory["rate_bytes_per_s"]["achieved"] == pytest.approx(16 * MIB, rel=0.5)
    assert memory["pages_verified"] == 2 * 8192
    assert control(EVM, "memory 0 0")["bytes"] == 0


def test_a_single_flipped_byte_of_memory_is_found(guest: Vm) -> None:
    control(POD, f"memory {4 * MIB} 0")
    assert control(POD, "verify") == {"pages": 1024, "mismatches": 0, "rounds": 1}
    control(POD, "corrupt 17")
    assert control(POD, "verify")["mismatches"] == 1
    assert control(POD, "status")["memory"]["mismatches"] == 1
    control(POD, "memory 0 0")


def test_the_journal_is_on_the_volume_and_goes_on_where_it_was(guest: Vm, disks: tuple[Disk, ...]) -> None:
    volume = disks[0]
    control(EVM, f"journal start {volume.serial} 500")
    wait_until(lambda: journal(volume.serial)["acked_seq"] >= 20)
    acked = journal(volume.serial)["acked_seq"]
    stopped = control(EVM, f"journal stop {volume.serial}")[0]
    assert (stopped["running"], stopped["errors"]) == (False, 0)
    report = check_journal(volume.path)
    assert report.errors == ()
    assert report.missing(acked) == 0
    assert report.last_seq == stopped["acked_seq"] >= acked
    assert report.boot_ids == (control(EVM, "status")["boot_id"],)

    resumed = control(EVM, f"journal start {volume.serial} 500")
    assert resumed["acked_seq"] == report.last_seq
    wait_until(lambda: journal(volume.serial)["acked_seq"] > report.last_seq + 5)
    assert "already runs" in control(EVM, f"journal start {volume.serial} 500")["error"]
    stopped = control(EVM, f"journal stop {volume.serial}")[0]
    assert check_journal(volume.path).last_seq == stopped["acked_seq"]
    assert check_journal(volume.path).ok

    with volume.path.open("r+b") as image:
        image.seek(3 * 4096 + 2000)
        image.write(b"!")
    damaged = check_journal(volume.path)
    assert (damaged.ok, damaged.last_seq) == (False, 2)


def test_a_journal_ends_with_its_volume_and_says_so(guest: Vm, disks: tuple[Disk, ...]) -> None:
    control(EVM, "journal start small 1000")
    wait_until(lambda: not journal("small")["running"])
    ended = journal("small")
    assert (ended["acked_seq"], ended["capacity_records"], ended["errors"]) == (15, 16, 1)
    assert "end of volume" in ended["last_error"]
    assert check_journal(disks[1].path).last_seq == 15


def test_an_io_error_is_counted_and_the_record_written_again(guest: Vm, disks: tuple[Disk, ...]) -> None:
    control(EVM, "journal start broken 500")
    wait_until(lambda: journal("broken")["acked_seq"] >= 10)
    control(EVM, "journal stop broken")
    assert journal("broken")["errors"] == 1
    assert "Input/output error" in journal("broken")["last_error"]
    assert check_journal(disks[2].path).errors == ()


def test_the_prober_sees_a_pause_in_its_window_alone(guest: Vm, tmp_path: Path) -> None:
    report_path, snapshot_path = tmp_path / "report", tmp_path / "snapshot"
    command = [sys.executable, "-m", "emp.lab.prober", f"evm={EVM}", f"pod={POD}", "--rate", "500"]
    command += ["--report", str(report_path), "--snapshot", str(snapshot_path), "--every", "0.05"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as prober:
        assert prober.stdin is not None
        assert prober.stdout is not None
        assert prober.stdout.readline() == "ready\n"

        def received(window: int) -> int:
            try:
                targets = json.loads(snapshot_path.read_text())["targets"]
            except FileNotFoundError:
                return 0
            counts = [targets[name]["udp"]["windows"] for name in ("evm", "pod")]
            return min(windows[window]["received"] if len(windows) > window else 0 for windows in counts)

        wait_until(lambda: received(0) >= 100)
        prober.stdin.write("mark paused\n")
        prober.stdin.flush()
        assert prober.stdout.readline() == "marked paused\n"
        wait_until(lambda: received(1) >= 50)
        guest.qmp("stop")
        time.sleep(0.4)  # the length of the pause, not a wait for something
        guest.qmp("cont")
        wait_until(lambda: received(1) >= 400)
        os.kill(prober.pid, signal.SIGUSR1)
        assert prober.stdout.readline() == "marked mark-1\n"
        wait_until(lambda: received(2) >= 100)
        prober.terminate()
    assert prober.returncode == 0
    report = json.loads(report_path.read_text())
    assert report["final"]
    boot_id = control(EVM, "status")["boot_id"]
    for target in report["targets"].values():
        assert target["tcp"]["connected"]
        assert (target["tcp"]["resets"], target["tcp"]["reconnects"]) == (0, 0)
        for stream in (target["udp"], target["tcp"]):
            total, (before, paused, after) = stream["total"], stream["windows"]
            assert total["boot_ids"].keys() == {boot_id}
            assert total["counters_monotone"]
            assert (total["lost"], total["duplicated"], total["mismatched"]) == (0, 0, 0)
            assert paused["gap_ms"] >= 390
            assert max(before["gap_ms"], after["gap_ms"]) < paused["gap_ms"]


def test_the_console_has_a_shell_and_a_reboot_makes_another_boot(single: Vm) -> None:
    single.read_console("one:/# ")
    wait_for_echo("10.99.3.5")
    first = control("10.99.3.5", "status")["boot_id"]
    single.type("uptime; ps | grep -c emp-guest")
    assert "load average" in single.read_console("one:/# ")
    single.type("reboot")
    single.wait_event("RESET")
    single.read_console("built-in shell")  # a second time: the prompt alone may be the first boot's
    single.read_console("one:/# ")
    wait_for_echo("10.99.3.5")
    assert control("10.99.3.5", "status")["boot_id"] != first
    single.qmp("system_powerdown")  # the power button
    assert single.wait_event("SHUTDOWN")["data"]["reason"] == "guest-shutdown"
    assert single.process.wait(PATIENCE_S) == 0


def test_a_panic_is_reported_and_the_guest_stays(single: Vm) -> None:
    single.read_console("one:/# ")
    single.type("echo c >/proc/sysrq-trigger")
    assert single.wait_event("GUEST_PANICKED")["data"]["action"] == "pause"
    assert single.qmp("query-status")["status"] == "guest-panicked"


def test_poweroff_on_the_console_ends_the_machine_even_without_a_config(image: Image, tmp_path: Path) -> None:
    vm = Vm(image, tmp_path, "")
    try:
        vm.read_console("emp:/# ")
        vm.type("poweroff")
        assert vm.wait_event("SHUTDOWN")["data"]["reason"] == "guest-shutdown"
        assert vm.process.wait(PATIENCE_S) == 0
    finally:
        vm.close()
