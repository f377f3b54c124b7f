"""``emp lab demo``, the first thing that anyone runs: what it writes, what it leaves, and that its checks can fail."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emp.client import context as contexts
from emp.lab import demo, places
from emp.lab.residue import Residue
from emp.lab.state import LabFiles
from emp.lab.topology import Topology
from emp.model.volume import Volume
from tests.lab.conftest import LAB, Evm, Pool, run_lab

NAME = "show"
CHECKS = {"same_addresses", "same_boot", "memory_intact", "tcp_alive", "volume_intact", "nothing_left"}
FIGURES = {
    "evm", "source", "target", "outcome", "stages", "vcpu_pause_ms", "qemu_downtime_ms", "network_gap_ms", "packets",
    "memory_bytes", "sent_bytes", "passes", "overhead_s",
}  # fmt: skip
STAGES = {"source_brownout_s", "blackout_ms", "target_brownout_s"}


@pytest.fixture
def files(lab_home: Path) -> Iterator[LabFiles]:
    made = LabFiles(NAME)
    yield made
    run_lab("down", "--name", NAME)


def test_the_demo_migrates_there_and_back_and_writes_what_it_saw(files: LabFiles, tmp_path: Path) -> None:
    output = tmp_path / "demo.json"
    residue = Residue.watch(Topology(NAME, 2))
    began = time.monotonic()
    text = run_lab("demo", "--name", NAME, "--json", str(output)).stdout
    assert time.monotonic() - began < 60
    assert residue.left() == []
    found = json.loads(output.read_text())
    assert found.keys() == {"ok", "qemu", "accel", "checks", "migrations"}
    assert found["ok"] is True
    assert found["accel"] in ("tcg", "kvm")
    assert found["checks"] == dict.fromkeys(CHECKS, True)
    assert [(one["evm"], one["source"], one["target"]) for one in found["migrations"]] == [
        ("web", "n1", "n2"),
        ("web", "n2", "n1"),
    ]
    for one in found["migrations"]:
        assert one.keys() == FIGURES
        assert one["outcome"] == "completed"
        assert one["stages"].keys() == STAGES
        assert 0 < one["vcpu_pause_ms"] <= one["stages"]["blackout_ms"] < 1000 * one["stages"]["source_brownout_s"]
        assert one["memory_bytes"] >= 512 << 20
        assert one["sent_bytes"] > demo.REWRITTEN_BYTES
        for target in ("evm", "pod"):
            assert one["network_gap_ms"][target] > one["vcpu_pause_ms"] / 2
            sent, lost, duplicated = (one["packets"][target][key] for key in ("sent", "lost", "duplicated"))
            assert sent > 500
            assert 0 <= lost < sent / 2
            assert duplicated == 0
    assert max(map(len, text.splitlines())) <= 80
    assert "64 MiB of memory rewritten at 20 MB/s" in text


# ---- interrupted -----------------------------------------------------------------------------------------------------


def output_has(text: str) -> Callable[[str], bool]:
    return lambda output: text in output


MOMENTS: dict[str, Callable[[str], bool]] = {
    "as the pool starts": output_has("waiting for the agents"),
    "as the EVM boots": lambda output: contexts.file_of(NAME).exists(),
    "in a migration": output_has("source brownout:"),
    "as the lab is cleared": lambda output: output.count("completed in") == 2,
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("as the pool starts", signal.SIGINT),
        ("as the EVM boots", signal.SIGTERM),
        ("in a migration", signal.SIGINT),
        ("as the lab is cleared", signal.SIGINT),
        ("in a migration", signal.SIGKILL),
    ],
)
def test_the_demo_is_ended_and_leaves_nothing(
    files: LabFiles, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    residue = Residue.watch(Topology(NAME, 2))
    log = tmp_path / "log"
    with log.open("w") as output:
        ended = subprocess.Popen(
            [*LAB, "demo", "--name", NAME], stdout=output, stderr=output, process_group=0, stdin=subprocess.DEVNULL
        )
    deadline = time.monotonic() + 60
    while not MOMENTS[moment](log.read_text()) and ended.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)  # what it prints is all that tells
    ended.send_signal(number)
    assert ended.wait(timeout=30) != 0 or moment == "as the lab is cleared", log.read_text()
    if number == signal.SIGKILL:
        run_lab("down", "--name", NAME)
    assert residue.left() == []


def test_a_lab_of_that_name_is_not_touched(files: LabFiles) -> None:
    run_lab("up", "--name", NAME, "--nodes", "1")
    before = places.inits(files)
    done = run_lab("demo", "--name", NAME, check=False)
    assert (done.returncode, f"the lab {NAME} is up" in done.stderr) == (4, True)
    assert places.inits(files) == before


# ---- checks that can fail --------------------------------------------------------------------------------------------


def test_a_corrupted_page_is_seen(pool: Pool, new_evm: Callable[..., Evm]) -> None:
    guest = new_evm(memory="256MiB").guest
    guest.ask(f"memory {demo.REWRITTEN_BYTES} 0")
    assert demo.memory_intact(guest)
    guest.ask("corrupt")
    assert not demo.memory_intact(guest)


def test_a_record_that_is_gone_from_the_volume_is_seen(pool: Pool, new_evm: Callable[..., Evm]) -> None:
    evm = new_evm("--volume", "io2:16MiB")
    volume = Volume.model_validate(pool.json("volume", "show", evm.record["spec"]["volumes"][0]))
    evm.guest.ask(f"journal start {volume.serial} 100")
    deadline = time.monotonic() + 10
    while evm.guest.ask("journal status")[0]["acked_seq"] < 20 and time.monotonic() < deadline:
        time.sleep(0.05)  # the guest writes them one by one
    assert demo.volume_intact(evm.guest, pool.files, volume)
    with demo.volume_file(pool.files, volume).open("r+b") as file:
        file.seek(7 * 4096)
        file.write(bytes(4096))
    assert not demo.volume_intact(evm.guest, pool.files, volume)


def test_residue_is_seen(lab_home: Path) -> None:
    topology = Topology(NAME, 2)
    residue = Residue.watch(topology)
    places.NAMESPACES.joinpath(topology.namespace("n1")).touch()
    left = subprocess.Popen(["sleep", "60"])
    subprocess.run(["ip", "link", "add", "n1", "type", "veth", "peer", "name", "n2"], check=True)
    try:
        found = residue.left()
    finally:
        subprocess.run(["ip", "link", "delete", "n1"], check=True)
        left.kill()
        left.wait()
        places.NAMESPACES.joinpath(topology.namespace("n1")).unlink()
    assert found == ["interface n1", "interface n2", f"network namespace emp-{NAME}-n1", f"process {left.pid}"]
