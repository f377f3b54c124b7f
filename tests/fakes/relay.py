"""A relay in the test's own process, between a client and a volume that are in the test's hands."""

# ruff: noqa: ASYNC110 - a relay's status is asked for, as its agent does

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from emp.volumes.relay.config import Device, RelayConfig, UnixListen, Upstream, load
from emp.volumes.relay.door import Door
from emp.volumes.relay.relay import Relay
from emp.wire.sockets import listen_unix
from tests.fakes.nbd import FakeClient, FakeVolume

HERE, THERE = Device("/dev/here"), Device("/dev/there")


class Bench:
    """One relay on a unix socket, its volume, and perhaps the one that it moves to."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "config.json"
        self.socket = directory / "socket"
        self.volume = FakeVolume()
        self.there = FakeVolume()
        self.config = RelayConfig(
            listen=UnixListen(str(self.socket)),
            size_bytes=self.volume.size_bytes,
            upstream=HERE,
            tls_dir="",
            control="",
            pid_file="",
            writes_open=True,
        )
        self.clients: list[FakeClient] = []

    async def start(self, **changes: Any) -> Relay:
        """Start it, or start it again as it was."""
        config = load(self.path) if self.path.exists() else self.config

        def source(upstream: Upstream, **_: Path) -> FakeVolume:
            return self.volume if upstream == HERE else self.there

        self.relay = Relay(self.path, replace(config, **changes), source)
        self._listening = listen_unix(self.socket, mode=0o666)
        await self.relay.start()
        self._door = asyncio.create_task(Door(self.relay, self._listening, self.config).run())
        return self.relay

    async def client(self) -> FakeClient:
        self.clients.append(await FakeClient.to(self.socket))
        return self.clients[-1]

    async def kill(self) -> None:
        """It is gone, with all its connections, without a word to the volume."""
        self._door.cancel()
        await asyncio.wait({self._door})
        self._listening.close()

    async def close(self) -> None:
        for client in self.clients:
            client.close()
        await self.relay.close()
        await self.kill()
        await self.volume.stop()
        await self.there.stop()


async def until(relay: Relay, **wanted: object) -> None:
    """Wait until the status has these values."""
    async with asyncio.timeout(5):
        while not wanted.items() <= relay.status().items():
            await asyncio.sleep(0.01)
