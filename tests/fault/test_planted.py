"""No checker is trusted before it has failed: for each, a violation is planted on the real pool, and it is caught.

What is planted is what the checker is there for: a second ``cont``, a port opened early, a damaged record, a page that
changed by itself, a forged owner, a tap and a process left behind, a token in a log.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from emp.faults import HITS
from emp.lab import daemons, places
from emp.lab.checkers import epochs, records
from emp.lab.topology import CTL, VOL
from tests.fault.record import FaultRecord
from tests.fault.stage import Stage, Stages, until, volume_file
from tests.leaks import outliving

CHECKERS = (
    "double run: vCPU threads", "double run: QMP events", "double run: journals", "double run: volume server",
    "network", "disk", "efs", "memory", "end state", "residue", "records",
)  # fmt: skip


@pytest.fixture
def stage(stages: Stages) -> Iterator[Stage]:
    """A stage for a violation; its EVM has seen enough then."""
    stage = stages.whole()
    yield stage
    stage.heal()
    stage.drop_evm()


@pytest.fixture
def caught(fault_record: FaultRecord) -> Iterator[dict[str, bool]]:
    """checker -> whether it fired, written into the record of the run."""
    found: dict[str, bool] = {}
    yield found
    fault_record.planted |= found


OLD_LOCK_S = 20.0
SPEAK = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
    wire.bind(("eth0", 0))
    wire.send(bytes.fromhex("ff" * 6 + sys.argv[1].replace(":", "") + "8035") + bytes(46))
"""


def test_a_second_cont_and_a_frame_too_early(
    stage: Stage, caught: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target speaks in the EVM's name before the commit; the source's copy is resumed after it was given away."""
    with stage.playing():
        stage.freeze_at("S", "source.write-record-given.before")
        stage.arm("S", "source.write-record-done.before", "delay:1500")
        stage.begin()
        stage.wait_frozen("S", "source.write-record-given.before")
        stage.pool.run_in(stage.target, sys.executable, "-c", SPEAK, stage.subject.spec.nics[0].mac)
        until(lambda: any(seen.node == stage.target for seen in stage.frames.seen), "the frame is on the wire")
        stage.thaw("S")
        stage.wait_point("S", "source.write-record-done.before", "delay:1500")
        stage.subject.tell_qemu(stage.source, "cont")
        stage.wait_point("S", "qmp-resume")
        until(stage.vcpus.violations, "the scheduler's account shows it")
        until(lambda: not stage.settled(), "the pool is whole")
    monkeypatch.setattr(stage, "mount", None)  # to EFS the two copies are one client, and what it has open hangs
    found = stage.violations()
    stage.drop_evm()
    for checker in ("double run: vCPU threads", "double run: QMP events", "network"):
        caught[checker] = bool(found[checker])
        assert found[checker], found


def test_two_owners(stage: Stage, caught: dict[str, bool]) -> None:
    with stage.playing():
        until(lambda: not stage.settled(), "the pool is whole")
        with (stage.files.faults(stage.third) / HITS).open("a") as hits:
            hits.write(f"{time.monotonic():.6f} journal.own.after_fsync -\n")
    checker = "double run: journals"
    caught[checker] = bool(stage.violations()[checker])
    assert caught[checker]


def test_an_old_epoch_at_the_volume_server(stage: Stage, caught: dict[str, bool]) -> None:
    volume = stage.subject.volumes[0]
    log = stage.files.data(VOL.name) / "epochs.log"
    assert epochs.violations(log, volume.id) == []
    with log.open("a") as file:
        for event in ({"event": "claim", "node": "n1", "epoch": 8, "tag": 9},
                      {"event": "attach", "node": "n2", "epoch": 7, "tag": 7}):  # fmt: skip
            file.write(json.dumps(event | {"volume": volume.id}) + "\n")
    caught["double run: volume server"] = bool(epochs.violations(log, volume.id))
    assert caught["double run: volume server"]


def test_a_damaged_record_and_a_changed_page(stage: Stage, caught: dict[str, bool]) -> None:
    guest = stage.subject.guest()
    with stage.playing():
        until(lambda: stage.note_acked() > 20, "records are acknowledged")
        with volume_file(stage.pool, stage.subject.volumes[0].id).open("r+b") as volume:
            volume.seek(3 * 4096 + 100)
            volume.write(b"damage")
        guest.ask("memory 4194304 0")
        guest.ask("corrupt 7")
    found = stage.violations()
    for checker in ("disk", "memory"):
        caught[checker] = bool(found[checker])
        assert found[checker], found


def test_a_mount_that_does_not_go_on(stage: Stage, caught: dict[str, bool]) -> None:
    """A lock that is gone, and one that is another; a writer that has stopped; records that are lost, and damaged."""
    mount, guest = stage.mount, stage.subject.guest()
    if mount is None:
        pytest.skip("without a cloud there is no EFS")
    file = mount.data / mount.file_of(stage.subject)
    seen = []
    # a lock is known by how long it has been held: longer than the one that the checker takes will have been
    until(lambda: guest.ask("lock status")[0]["held_s"] > OLD_LOCK_S, "the guest has its lock for a while")
    with stage.playing():
        until(lambda: not stage.settled(), "the pool is whole")
        assert stage.violations()["efs"] == []
        guest.ask(f"lock drop {mount.lock_of(stage.subject)}")
        seen += stage.violations()["efs"]
        seen += stage.violations()["efs"]  # the checker has taken a lock anew
        guest.ask(f"journal stop {mount.path(file.name)}")
        os.truncate(file, file.stat().st_size - 4096)
        seen += stage.violations()["efs"]
        with file.open("r+b") as written:
            written.seek(3 * 4096 + 100)
            written.write(b"damage")
        seen += stage.violations()["efs"]
    words = (
        "lost its lock",
        "not the one",
        "stopped writing",
        "acknowledged records are missing",
        "record 3: checksum",
    )
    caught["efs"] = all(any(word in wrong for wrong in seen) for word in words)
    assert caught["efs"], seen


@contextmanager
def forged(stage: Stage) -> Iterator[None]:
    """The controller comes back with a record that names another owner, whom nobody can contradict."""
    stage.kill("C")
    (database,) = (path for path in stage.files.data(CTL.name).glob("*.db") if path.is_file())
    with closing(sqlite3.connect(database)) as store, store:
        key, value = store.execute(
            "SELECT key, value FROM kv WHERE key LIKE ? AND value NOT NULL ORDER BY mod_revision DESC LIMIT 1",
            (f"%/evms/{stage.subject.name}",),
        ).fetchone()
        record = json.loads(value) | {"owner": stage.third, "epoch": 10_000}
        store.execute("UPDATE kv SET value = ? WHERE key = ? AND value = ?", (json.dumps(record).encode(), key, value))
    stage.start("C")
    yield


def test_a_forged_owner(stages: Stages, caught: dict[str, bool]) -> None:
    stage = stages.whole()
    with stage.playing(), forged(stage):
        until(lambda: any("owns it" in wrong for wrong in stage.settled()), "the accounts differ")
        caught["end state"] = True
    stages.discard()  # nobody can contradict the record that was forged


def test_what_is_left_behind(stage: Stage, caught: dict[str, bool]) -> None:
    with stage.playing():
        stage.pool.run_in(stage.third, "ip", "tuntap", "add", "emp00000000n0", "mode", "tap")
        with (
            outliving("the planted process"),
            subprocess.Popen([*places.enter_argv(places.init_of(stage.files, "n1")), "sleep", "60"]) as sleeper,
        ):
            left = stage.violations()["residue"]
            for process in daemons.daemons(stage.files, stage.pool.topology.place("n1")):
                if process.argv == ("sleep", "60"):
                    process.process.send(signal.SIGKILL)
            sleeper.wait()
        stage.pool.run_in(stage.third, "ip", "link", "delete", "emp00000000n0")
    caught["residue"] = any("emp00000000n0" in thing for thing in left) and any("sleep" in thing for thing in left)
    assert caught["residue"], left


def test_a_token_in_a_log_and_a_migration_without_an_end(stage: Stage, caught: dict[str, bool]) -> None:
    assert records.check_secrets(stage.files) == []
    migration = stage.begin(max_bandwidth_bytes_per_s=4_000_000)
    open_one = records.check_ends(stage.client, stage.subject.name)
    with stage.files.log("n1", "agent").open("r+") as log:
        end = log.seek(0, 2)
        log.write(daemons.token(stage.files))
        log.flush()
        caught["records"] = bool(open_one and records.check_secrets(stage.files))
        log.truncate(end)
    stage.client.migrations.abort(migration.id)
    stage.subject.end_of(migration)
    assert caught["records"]


def test_every_checker_has_been_seen_to_fire(fault_record: FaultRecord, pytestconfig: pytest.Config) -> None:
    without = {"efs"} if pytestconfig.getoption("--fault-cloud") == "none" else set()
    assert fault_record.planted == dict.fromkeys(set(CHECKERS) - without, True)
