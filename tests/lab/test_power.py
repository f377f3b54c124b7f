"""A node's power switch: what a cut of its power does, that it boots again, and who may ask for either."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emp.host.processes import Process
from emp.lab import daemons, partition, places, scan, verbs
from emp.lab.guest_control import socket_in
from emp.lab.isolation import violations
from emp.lab.state import LabFiles
from emp.lab.topology import AGENT_PORT, BMC, POWER_PORT
from emp.model.evm import EvmState
from emp.wire.pki import CertificateAuthority, Role
from emp.wire.tls import mutual_client
from tests.lab.conftest import Evm, Pool, run_lab
from tests.lab.pool import until
from tests.leaks import outliving


@pytest.fixture
def n3(pool: Pool) -> Iterator[str]:
    """A node that is on again after the test."""
    yield "n3"
    with outliving(f"the lab {pool.name}"):
        run_lab("power", "--name", pool.name, "n3", "on")
    until(lambda: pool.json("node", "show", "n3")["ready"], "n3 is back")


def state(pool: Pool, where: str) -> str:
    return next(place.state for place in verbs.status(pool.files) if place.name == where)


def switch(
    pool: Pool,
    method: str,
    node: str,
    body: dict[str, object] | None = None,
    *,
    where: str = "ctl",
    pki: Path | None = None,
) -> tuple[int, object]:
    """Ask the switch over the lab's network, from the place ``where`` and as who lives there; return its answer."""
    tls = mutual_client(pki or pool.files.data(where) / "pki")
    with socket_in(pool.topology, socket.SOCK_STREAM, where) as plain:
        plain.settimeout(60)
        plain.connect((BMC.address, POWER_PORT))
        connection = http.client.HTTPConnection("power-main")
        connection.sock = tls.wrap_socket(plain, server_hostname="power-main")
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request(method, f"/v1/power/{node}", json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


def reaches(pool: Pool, where: str, address: str) -> bool:
    """Whether anything answers at an agent's port, if only that nobody listens."""
    with socket_in(pool.topology, socket.SOCK_STREAM, where) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect((address, AGENT_PORT))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True


def test_off_kills_all_that_a_node_runs_and_on_boots_it_with_its_disk(
    pool: Pool, new_evm: Callable[..., Evm], n3: str
) -> None:
    evm = new_evm("--node", n3, "--restart", "never")
    init = places.init_of(pool.files, n3)
    inside = scan.in_pid_namespace(scan.namespace_inode(f"/proc/{init.pid}/ns/pid") or 0)
    assert len(inside) >= 3  # process 1, the agent, a QEMU
    journal = sorted(path.name for path in (pool.files.data(n3)).iterdir())

    assert switch(pool, "PUT", n3, {"state": "off"}) == (200, {"state": "off"})
    assert not any(found.process.alive for found in inside)
    assert (state(pool, n3), json.loads(run_lab("list", "--json").stdout)["items"][0]["state"]) == ("off", "up")
    assert switch(pool, "GET", n3) == (200, {"state": "off"})
    assert not reaches(pool, "client", "10.77.0.13")
    refused = run_lab("exec", "--name", pool.name, n3, "true", check=False)
    assert (refused.returncode, "power" in refused.stderr) == (4, True)
    assert switch(pool, "PUT", n3, {"state": "off"}) == (200, {"state": "off"})

    with outliving(f"the lab {pool.name}"):
        assert switch(pool, "PUT", n3, {"state": "on"}) == (200, {"state": "on"})
    assert switch(pool, "GET", n3) == (200, {"state": "on"})
    until(lambda: pool.json("node", "show", n3)["ready"], "n3 reports")
    assert sorted(path.name for path in (pool.files.data(n3)).iterdir()) == journal
    assert violations(pool.files) == []
    until(lambda: pool.json("evm", "show", evm.name)["state"] == EvmState.CRASHED, "its EVM is known to be dead")
    assert evm.name not in {name for place in verbs.status(pool.files) for name in place.evms}


def test_a_cut_wire_stays_cut_when_the_node_comes_back(pool: Pool, n3: str) -> None:
    partition.cut(pool.files, "client", n3)
    try:
        run_lab("power", "--name", pool.name, n3, "off")
        partition.cut(pool.files, "client", "n1")
        with outliving(f"the lab {pool.name}"):
            run_lab("power", "--name", pool.name, n3, "on")
        until(lambda: pool.json("node", "show", n3)["ready"], "n3 reports")
        assert not reaches(pool, "client", "10.77.0.13")
        assert reaches(pool, "vol", "10.77.0.13")
    finally:
        partition.heal(pool.files)


def test_a_fence_switches_the_node_off(pool: Pool, n3: str) -> None:
    pool.emp("node", "fence", n3, "--confirm")
    assert state(pool, n3) == "off"
    assert pool.json("node", "show", n3)["fence"]["driver"] == "lab"


def test_the_controller_alone_may_switch(pool: Pool) -> None:
    assert switch(pool, "GET", "n1") == (200, {"state": "on"})
    for where in ("n1", "vol"):
        assert switch(pool, "GET", "n1", where=where)[0] == 403
        assert switch(pool, "PUT", "n1", {"state": "off"}, where=where)[0] == 403
    assert state(pool, "n1") == "running"


def test_a_certificate_of_another_pool_does_not_switch(pool: Pool, tmp_path: Path) -> None:
    stranger = CertificateAuthority.create(tmp_path / "ca", pool.name)
    home = pool.files.data("ctl") / "stranger"
    stranger.issue(Role.CONTROLLER, "main", []).write(home)
    try:
        (home / "ca-cert.pem").write_bytes((pool.files.data("ctl") / "pki" / "ca-cert.pem").read_bytes())
        with pytest.raises(ssl.SSLError, match="alert"):
            switch(pool, "PUT", "n1", {"state": "off"}, pki=home)
    finally:
        for path in home.iterdir():
            path.unlink()
        home.rmdir()
    assert state(pool, "n1") == "running"


@pytest.mark.parametrize(
    ("node", "body", "status"),
    [
        ("n9", {"state": "off"}, 404),
        ("vol", {"state": "off"}, 404),
        ("n1", {"state": "sideways"}, 422),
        ("n1", {"state": "off", "force": True}, 422),
    ],
)
def test_orders_that_make_no_sense_are_refused(pool: Pool, node: str, body: dict[str, object], status: int) -> None:
    assert switch(pool, "PUT", node, body)[0] == status
    assert state(pool, "n1") == state(pool, "vol") == "running"


def test_the_switch_is_a_daemon_like_others(pool: Pool) -> None:
    run_lab("kill", "--name", pool.name, "bmc", "power")
    assert state(pool, "bmc") == "dead"
    with pytest.raises(ConnectionRefusedError):
        switch(pool, "GET", "n1")
    pool.start("bmc", "power")
    assert (state(pool, "bmc"), switch(pool, "GET", "n1")) == ("running", (200, {"state": "on"}))


def test_it_goes_with_the_lab_whatever_is_killed(lab_home: Path) -> None:
    files = LabFiles("switched")
    try:
        run_lab("up", "--name", files.name, "--nodes", "1")
        run_lab("power", "--name", files.name, "n1", "off")
        process = scan_switch(files)
        for init in places.inits(files).values():
            os.kill(init.pid, signal.SIGKILL)
    finally:
        run_lab("down", "--name", files.name)
    assert not process.alive
    assert not files.directory.exists()


def scan_switch(files: LabFiles) -> Process:
    found = daemons.find(files, "bmc", "power")
    assert found is not None
    return found
