"""Where the volume is: an NBD export under TLS, or a block device of this node behind a qemu-nbd of the relay's own.

The device is opened by QEMU's code and not here: it knows alignment, discards and flushes of block devices, and it does
its I/O in threads. Its process dies with the relay; one that a killed relay has left is waited for before the next one
starts, so that no write of the old one comes after one of the new.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from emp.host.pid_file import running
from emp.host.processes import Process, spawn
from emp.model.errors import HostError
from emp.volumes.nbd_wire import Export, open_tls, open_unix
from emp.volumes.relay.config import Device, Endpoint, Upstream
from emp.wire.tls import mutual_client

CONNECT_S = 5.0
START_S = 5.0
STOP_S = 2.0
_LOOK_S = 0.01


class Source(Protocol):
    """See ``Upstream`` in ``config``."""

    async def connect(self) -> Export:
        """Open one more connection. Raise ``OSError``, ``EOFError`` or ``EmpError``; ask again after a pause."""
        ...

    async def close(self) -> None:
        """Let go of what is kept between connections; ``connect`` gets it again. Raise ``HostError`` if it stays."""
        ...


class MakeSource(Protocol):
    def __call__(self, upstream: Upstream, *, tls_dir: Path, run_dir: Path) -> Source: ...


def make_source(upstream: Upstream, *, tls_dir: Path, run_dir: Path) -> Source:
    if isinstance(upstream, Device):
        return DeviceSource(upstream.device, run_dir)
    return EndpointSource(upstream, tls_dir)


class EndpointSource:
    def __init__(self, endpoint: Endpoint, tls_dir: Path) -> None:
        self._endpoint = endpoint
        self._tls_dir = tls_dir

    async def connect(self) -> Export:
        to = self._endpoint
        tls = mutual_client(self._tls_dir)  # read anew each time: certificates are renewed in place
        async with asyncio.timeout(CONNECT_S):
            return await open_tls(to.host, to.port, export=to.export, tls=tls, tls_hostname=to.tls_hostname)

    async def close(self) -> None:
        """Nothing is kept."""


class DeviceSource:
    def __init__(self, device: str, run_dir: Path) -> None:
        self._device = device
        self._socket = run_dir / "device"
        self._pid_file = run_dir / "device.pid"
        self._log = run_dir / "device.log"
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def connect(self) -> Export:
        async with self._turn, asyncio.timeout(START_S):
            if self._process is None or not self._process.alive:
                await self._start()
        async with asyncio.timeout(CONNECT_S):
            return await open_unix(self._socket)

    async def close(self) -> None:
        async with self._turn:
            await self._end()

    def _argv(self) -> list[str]:
        """Return the command line.

        The image is not locked: while the volume is only read here, the machine that owns it still has it open. What is
        written is on the device when it is acknowledged (O_DIRECT), and stable after a flush.
        """
        name = self._device.replace(",", ",,")  # a comma in an option's value is written twice
        image = f"driver=raw,file.driver=host_device,file.locking=off,file.filename={name}"
        return [
            *("setpriv", "--pdeathsig", "KILL", "--", "qemu-nbd", "--persistent", "--shared", "0"),
            *("--socket", str(self._socket), "--pid-file", str(self._pid_file)),
            *("--cache", "none", "--discard", "unmap", "--image-opts", image),
        ]

    async def _start(self) -> None:
        await self._end()
        self._socket.unlink(missing_ok=True)
        process = spawn(self._argv(), log=self._log)
        try:
            while not self._pid_file.exists():  # written once it listens
                if not process.alive:
                    await process.ended()
                    raise HostError(
                        f"cannot open {self._device}: {_last_line(self._log)}", hint="see whether it is there"
                    )
                await asyncio.sleep(_LOOK_S)
        except BaseException:
            await process.stop(grace_s=0)
            raise
        self._process = process

    async def _end(self) -> None:
        """End the process, or the one that an earlier relay has left."""
        left = self._process or running(self._pid_file)
        if left is not None:
            try:
                async with asyncio.timeout(2 * STOP_S):
                    await left.stop(grace_s=STOP_S)
            except TimeoutError:
                problem = f"{self._device} is still open: qemu-nbd (pid {left.pid}) does not end"
                raise HostError(problem, hint="I/O is stuck in the kernel; the device cannot be let go") from None
        self._process = None
        self._pid_file.unlink(missing_ok=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "qemu-nbd said nothing"
