"""The controller as a process: its configuration, its start, its end, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from emp.controller.addresses import Claim, PodWish, hand_out, nic_mac, pod_mac
from emp.controller.config import Config, Network
from emp.model.errors import BadInput, Conflict
from emp.wire.config import read_config
from emp.wire.http import WireClient
from emp.wire.identity import Identity, Role
from emp.wire.pki import CertificateAuthority
from emp.wire.secret import Secret
from emp.wire.tls import public_client

HOST = "127.0.0.1"


def config(directory: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "pool": "testpool",
        "address": HOST,
        "port": 0,
        "people": {"host": HOST, "port": 0},
        "credentials": str(directory / "pki"),
        "state_dir": str(directory / "state"),
        "token_file": str(directory / "token"),
        "network": {"subnet": "10.77.0.0/16", "evm_first": "10.77.1.0", "evm_last": "10.77.250.255"},
        "volumes": {"driver": "nbd", "url": f"https://{HOST}:1", "server_name": "volumes-main"},
    }
    return base | changes


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"pool": "../x"}, "pool", "not a valid name"),
        ({"port": 70000}, "port", "less than or equal to 65535"),
        ({"people": {}}, "people", "write either"),
        ({"people": {"fd": 3, "host": HOST, "port": 1}}, "people", "write either"),
        ({"people": {"host": HOST}}, "people", "write either"),
        ({"address": "nowhere"}, "address", "not an IP address"),
        ({"surprise": 1}, "surprise", "Extra inputs"),
        (
            {"network": {"subnet": "10.77.0.0/33", "evm_first": "10.77.1.0", "evm_last": "10.77.1.9"}},
            "network",
            "netmask",
        ),
        (
            {"network": {"subnet": "10.77.0.0/16", "evm_first": "10.78.1.0", "evm_last": "10.78.1.9"}},
            "network",
            "must be a range inside",
        ),
        ({"network": {"subnet": "0.0.0.0/0", "evm_first": "1.1.1.1", "evm_last": "1.1.1.9"}}, "network", "too wide"),
        ({"node_down_s": 0.5}, "config", "longer than heartbeat_s"),
    ],
)
def test_a_wrong_configuration_names_the_field(
    tmp_path: Path, changes: dict[str, Any], field: str, message: str
) -> None:
    path = tmp_path / "controller.json"
    path.write_text(json.dumps(config(tmp_path, **changes)))
    with pytest.raises(BadInput, match=message) as caught:
        read_config(Config, path)
    assert caught.value.field == field


def test_a_configuration_that_is_not_there_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        read_config(Config, tmp_path / "nosuch.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadInput, match="Invalid JSON"):
        read_config(Config, tmp_path / "bad.json")


# ------------------------------------------------------------------ the process


class Daemon:
    """``python -m emp.controller``, its log collected."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = b""

    @classmethod
    async def start(cls, directory: Path, settings: dict[str, Any], *, fds: tuple[int, ...] = ()) -> Daemon:
        path = directory / "controller.json"
        path.write_text(json.dumps(settings))
        argv = [sys.executable, "-m", "emp.controller", "--config", str(path)]
        return cls(
            await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE, pass_fds=fds, close_fds=True)
        )

    async def until(self, text: bytes) -> None:
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while text not in self.log:
                line = await self.process.stderr.readline()
                assert line, self.log.decode()
                self.log += line

    async def ended(self) -> int:
        async with asyncio.timeout(20):
            assert self.process.stderr is not None
            self.log += await self.process.stderr.read()
            return await self.process.wait()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.ended()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    authority = CertificateAuthority.create(tmp_path / "ca", "testpool")
    authority.issue(Role.CONTROLLER, "main", [HOST]).write(tmp_path / "pki")
    return tmp_path


async def test_it_serves_on_a_socket_that_is_handed_over_and_ends_on_sigterm(directory: Path) -> None:
    with socket.create_server((HOST, 0)) as people:
        port = people.getsockname()[1]
        settings = config(directory, people={"fd": people.fileno()})
        daemon = await Daemon.start(directory, settings, fds=(people.fileno(),))
    try:
        await daemon.until(b"people on port")
        token = Secret.read(directory / "token")  # made on the first start
        assert (directory / "token").stat().st_mode & 0o777 == 0o600
        tls = public_client(directory / "pki" / "ca-cert.pem")
        url = f"https://{HOST}:{port}"
        async with WireClient(url, tls=tls, server=Identity(Role.CONTROLLER, "main"), token=token) as person:
            assert (await person.request("GET", "/healthz"))["pool"] == "testpool"
            assert (await person.request("GET", "/v1/nodes"))["items"] == []
        daemon.process.send_signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert b"Traceback" not in daemon.log
        assert token.reveal().encode() not in daemon.log
    finally:
        await daemon.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))


async def test_a_second_controller_on_the_same_store_is_refused(directory: Path) -> None:
    first = await Daemon.start(directory, config(directory))
    second = None
    try:
        await first.until(b"people on port")
        second = await Daemon.start(directory, config(directory))
        assert await second.ended() == 5
        assert b"emp controller: " in second.log
        assert b"Traceback" not in second.log
    finally:
        await first.kill()
        if second is not None:
            await second.kill()


async def test_a_port_that_is_taken_is_named(directory: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        daemon = await Daemon.start(directory, config(directory, port=port))
        assert await daemon.ended() == Conflict.exit_code
    assert f"port: {HOST}:{port} is already taken".encode() in daemon.log


async def test_missing_credentials_are_named(directory: Path) -> None:
    daemon = await Daemon.start(directory, config(directory, credentials=str(directory / "nosuch")))
    assert await daemon.ended() == 2
    assert str(directory / "nosuch").encode() in daemon.log
    assert b"Traceback" not in daemon.log


# ------------------------------------------------------------------ addresses


SMALL = Network(subnet="10.77.0.0/24", evm_first="10.77.0.250", evm_last="10.77.0.255")


def test_addresses_are_handed_out_in_order_without_a_networks_or_a_broadcast_one() -> None:
    cards, pods = hand_out(SMALL, set(), nics=2, pods=[PodWish(name="a", address=None)])
    assert [c.address for c in cards] == ["10.77.0.250", "10.77.0.251"]
    assert pods[0].address == "10.77.0.252"
    with pytest.raises(Conflict, match="no address is left"):
        hand_out(SMALL, {f"10.77.0.{n}" for n in range(250, 255)}, nics=1, pods=())


def test_an_address_that_was_asked_for_is_not_given_to_another_card() -> None:
    cards, pods = hand_out(SMALL, set(), nics=1, pods=[PodWish(name="a", address="10.77.0.250")])
    assert (cards[0].address, pods[0].address) == ("10.77.0.251", "10.77.0.250")


def test_a_mac_is_made_of_its_address() -> None:
    assert nic_mac("10.77.1.5") == "52:54:00:4d:01:05"
    assert pod_mac("10.77.1.5") == "02:00:0a:4d:01:05"


def test_a_broadcast_address_cannot_be_asked_for() -> None:
    with pytest.raises(BadInput, match=r"10\.77\.0\.255 is not an address"):
        hand_out(SMALL, set(), nics=1, pods=[PodWish(name="a", address="10.77.0.255")])
    assert Claim(address="10.77.0.1", mac="52:54:00:4d:00:01", evm="web", holder="nic 0").evm == "web"
