"""One attachment's qemu-nbd: started, adopted, watched, restarted on its port, ended.

It runs in a session of its own and is known by its pid file and its exact arguments, so that a new daemon finds the
processes of one that was killed, and never mistakes another process for one of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from emp.host.processes import Process, find
from emp.host.run import run
from emp.model.errors import HostError
from emp.wire.identity import Identity, Role, qemu_dn

log = logging.getLogger(__name__)

CLIENTS = 16
"""at once: the node's QEMU, a successor that overlaps with it, the agent's probes, connections that died unnoticed"""
START_S = 5.0
STOP_S = 2.0
_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
_STABLE_S = 10.0


@dataclass(frozen=True)
class ExportSpec:
    """What one export is: a file, shown to one node under one name at one port."""

    name: str
    node: str
    image: Path
    address: str
    port: int
    tls_directory: Path
    pid_file: Path

    def argv(self) -> list[str]:
        """Return the command line.

        A write is acknowledged when it is on the disk (writethrough). The image is not locked: a multi-attach volume
        has several exports, and who may write is decided by epochs.
        """
        tls = {"qom-type": "tls-creds-x509", "id": "tls", "endpoint": "server", "verify-peer": True}
        rules = [
            {"match": qemu_dn(Identity(role, self.node)), "policy": "allow", "format": "exact"}
            for role in (Role.QEMU, Role.AGENT)
        ]
        allowed = {"qom-type": "authz-list", "id": "node", "policy": "deny", "rules": rules}
        # a comma in an option's value is written twice
        image = f"driver=raw,file.driver=file,file.locking=off,file.filename={str(self.image).replace(',', ',,')}"
        return [
            *("qemu-nbd", "--fork", "--persistent", "--shared", str(CLIENTS), "--pid-file", str(self.pid_file)),
            *("--object", json.dumps(tls | {"dir": str(self.tls_directory)}), "--object", json.dumps(allowed)),
            *("--tls-creds", "tls", "--tls-authz", "node", "--bind", self.address, "--port", str(self.port)),
            *("--export-name", self.name, "--cache", "writethrough", "--discard", "unmap", "--image-opts", image),
        ]


class Export:
    """Keeps one qemu-nbd running from ``open`` to ``close``."""

    def __init__(self, spec: ExportSpec) -> None:
        self.spec = spec
        self.restarts = 0
        self._process: Process | None = None
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper: asyncio.Task[None] | None = None
        self._failure: HostError | None = None

    async def open(self) -> None:
        """Serve, and return when clients can connect. Raise ``HostError`` when that fails; it goes on trying."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"export {self.spec.name}")
        while self._process is None or not self._process.alive:
            await asyncio.shield(self._turn)
            if self._failure is not None:
                raise self._failure

    async def close(self) -> None:
        """End the process; return when nothing can be read or written through it any more."""
        await self._stop_keeping()
        if process := _running(self.spec.pid_file):
            await process.stop(grace_s=STOP_S)
        self.spec.pid_file.unlink(missing_ok=True)

    async def _keep(self) -> None:
        delay_s = _FIRST_DELAY_S
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                self._process, self._failure = await self._adopt_or_start(), None
                self._next_turn()
                await self._process.ended()
                log.warning("the export %s has ended by itself; it is started again", self.spec.name)
                self.restarts += 1
            except HostError as error:
                log.error("the export %s does not start: %s", self.spec.name, error)
                self._failure = error
                self._next_turn()
            delay_s = _FIRST_DELAY_S if loop.time() - began_s > _STABLE_S else min(2 * delay_s, _LONGEST_DELAY_S)
            await asyncio.sleep(delay_s)

    def _next_turn(self) -> None:
        turn, self._turn = self._turn, asyncio.get_running_loop().create_future()
        turn.set_result(None)

    async def _adopt_or_start(self) -> Process:
        argv = self.spec.argv()
        if process := _running(self.spec.pid_file):
            if _arguments(process) == argv:
                return process
            await process.stop(grace_s=STOP_S)  # what is asked of it has changed
        await run(*argv, timeout_s=START_S)
        started = _running(self.spec.pid_file)
        if started is None:
            raise HostError(f"the export {self.spec.name} ended as soon as it had started")
        return started

    async def _stop_keeping(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            self._keeper = None


async def end_strays(directory: Path, wanted: set[Path]) -> None:
    """End every export with a pid file in ``directory`` that is not among ``wanted``."""
    for pid_file in _pid_files(directory) - wanted:
        if process := _running(pid_file):
            log.warning("ending the stray export %s", pid_file.stem)
            await process.stop(grace_s=STOP_S)
        pid_file.unlink(missing_ok=True)


def _pid_files(directory: Path) -> set[Path]:
    return set(directory.glob("*.pid"))


def _arguments(process: Process) -> list[str]:
    try:
        line = Path(f"/proc/{process.pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return line.split("\0")[:-1]


def _running(pid_file: Path) -> Process | None:
    """Return the qemu-nbd that wrote ``pid_file``, if it still runs."""
    try:
        process = find(int(pid_file.read_text()))
    except (FileNotFoundError, ValueError):
        return None
    return process if process and str(pid_file) in _arguments(process) else None
