"""Certificates, fake agents, and the controller itself, which can be stopped and started again over the same store."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from emp.controller.config import Config
from emp.controller.daemon import Running, running
from emp.wire.http import WireClient
from emp.wire.identity import Identity
from emp.wire.identity import Role as WireRole
from emp.wire.pki import CertificateAuthority
from emp.wire.secret import Secret
from emp.wire.serve import Listener, Server
from emp.wire.tls import mutual_client, mutual_server, public_client
from tests.fakes.agent import FakeAgent
from tests.fakes.power import FakePower
from tests.fakes.values import GIB, versions
from tests.fakes.volumes import HOST, FakeVolumes

POOL = "testpool"


@functools.cache
def _credentials() -> Path:
    """Return a directory with a controller's and some agents' credentials; made once for all tests of a process."""
    directory = Path(tempfile.mkdtemp(prefix="emp-test-pki-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    authority = CertificateAuthority.create(directory / "ca", POOL)
    authority.issue(WireRole.CONTROLLER, "main", [HOST]).write(directory / "controller")
    for name in ("n1", "n2", "n3"):
        authority.issue(WireRole.AGENT, name, [HOST]).write(directory / name)
    return directory


class Pool:
    """Certificates, fake agents and a controller that can be stopped and started again over the same store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.heartbeat_s = 0.05
        self.node_down_s = 10.0  # ``lose`` does not wait for it
        self.volumes = FakeVolumes()
        self.power = FakePower()
        self.agents: dict[str, FakeAgent] = {}
        self.token = Secret.new()
        self.subnet: dict[str, Any] = {"subnet": "10.77.0.0/16", "evm_first": "10.77.1.0", "evm_last": "10.77.250.255"}
        self.credentials = _credentials()
        self.token.write(directory / "token")
        self._servers = contextlib.AsyncExitStack()
        self._controller = contextlib.AsyncExitStack()
        self.controller: Running | None = None
        self.api: WireClient

    # ---------------------------------------------------------- making

    async def add_agent(self, name: str, *, memory_bytes: int = 4 * GIB, **changes: Any) -> FakeAgent:
        agent = FakeAgent(name, self, memory_bytes=memory_bytes, versions=versions(**changes))
        self.agents[name] = agent
        listener = Listener(agent.sock, mutual_server(self.credentials / name))
        await self._servers.enter_async_context(Server(agent.app(), [listener], pool=POOL))
        if self.controller is not None:
            await agent.beat()
            agent.start_beating()
        return agent

    def config(self) -> Config:
        return Config.model_validate(
            {
                "pool": POOL,
                "address": HOST,
                "port": 0,
                "people": {"host": HOST, "port": 0},
                "credentials": self.credentials / "controller",
                "state_dir": self.directory / "state",
                "token_file": self.directory / "token",
                "network": self.subnet,
                "volumes": {"driver": "nbd", "url": f"https://{HOST}:1", "server_name": "volumes-main"},
                "heartbeat_s": self.heartbeat_s,
                "node_down_s": self.node_down_s,
            }
        )

    async def start(self) -> None:
        self.controller = await self._controller.enter_async_context(
            running(self.config(), driver=self.volumes, fence_driver=self.power)
        )
        self.api = self.person(self.token)
        for agent in self.agents.values():
            await agent.forget_controller()
            await agent.beat()
            agent.start_beating()

    async def stop(self) -> None:
        for agent in self.agents.values():
            await agent.stop_beating()
        await self._controller.aclose()
        if self.controller is not None:
            await self.api.aclose()
        self.controller = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def close(self) -> None:
        await self.stop()
        for agent in self.agents.values():
            await agent.close()
        await self._servers.aclose()

    async def lose(self, name: str) -> None:
        """The node falls silent, and its time is up."""
        assert self.controller is not None
        await self.agents[name].stop_beating()
        self.controller.services.nodes.overdue(name)
        await self.controller.services.nodes.check()

    # ---------------------------------------------------------- clients

    def person(self, token: Secret | None) -> WireClient:
        assert self.controller is not None
        tls = public_client(self.credentials / "controller" / "ca-cert.pem")
        url = f"https://{HOST}:{self.controller.people_port}"
        return WireClient(url, tls=tls, server=Identity(WireRole.CONTROLLER, "main"), token=token)

    def client_of(self, credentials: str) -> WireClient:
        """A client of the agents' listener, with the certificate in that directory."""
        assert self.controller is not None
        url = f"https://{HOST}:{self.controller.agents_port}"
        tls = mutual_client(self.credentials / credentials)
        return WireClient(url, tls=tls, server=Identity(WireRole.CONTROLLER, "main"))

    async def get(self, path: str) -> Any:
        return await self.api.request("GET", path)

    async def post(self, path: str, body: Any = None) -> Any:
        return await self.api.request("POST", path, body)

    async def delete(self, path: str) -> Any:
        return await self.api.request("DELETE", path)

    async def create(self, name: str = "web", **body: Any) -> Any:
        return await self.post("/v1/evms", {"name": name, **body})

    async def until(self, path: str, condition: Callable[[Any], bool], timeout_s: float = 30.0) -> Any:
        """Return what ``path`` shows once ``condition`` holds for it; each look is an answer of the controller."""
        last: Any = None
        try:
            async with asyncio.timeout(timeout_s):
                while not condition(last := await self.get(path)):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{path} never came to it: {last}") from None
        return last


@contextlib.asynccontextmanager
async def a_pool(
    directory: Path,
    *nodes: str,
    node_down_s: float | None = None,
    volumes: FakeVolumes | None = None,
    **agent: Any,
) -> AsyncGenerator[Pool]:
    """A controller with agents of these names that report; gone at the end."""
    pool = Pool(directory)
    pool.node_down_s = node_down_s or pool.node_down_s
    pool.volumes = volumes or pool.volumes
    try:
        for name in nodes:
            await pool.add_agent(name, **agent)
        await pool.start()
        yield pool
    finally:
        await pool.close()
