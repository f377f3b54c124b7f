"""One attachment's qemu-nbd: started, adopted, watched, restarted on its port, ended.

It runs in a session of its own and is known by its pid file and its exact arguments, so that a new daemon finds the
processes of one that was killed, and never mistakes another process for one of them.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from emp.host.kept import Kept
from emp.host.pid_file import arguments, running
from emp.host.processes import Process
from emp.host.run import run
from emp.model.errors import HostError
from emp.wire.identity import Identity, Role, qemu_dn

log = logging.getLogger(__name__)

CLIENTS = 16
"""at once: the node's QEMU, a successor that overlaps with it, the agent's probes, connections that died unnoticed"""
START_S = 5.0
STOP_S = 2.0


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
        self._kept = Kept(f"the export {spec.name}", self._adopt_or_start)

    @property
    def restarts(self) -> int:
        return self._kept.restarts

    async def open(self) -> None:
        """Serve, and return when clients can connect. Raise ``HostError`` when that fails; it goes on trying."""
        await self._kept.open()

    async def close(self) -> None:
        """End the process; return when nothing can be read or written through it any more."""
        await self._kept.let_go()
        if process := running(self.spec.pid_file):
            await process.stop(grace_s=STOP_S)
        self.spec.pid_file.unlink(missing_ok=True)

    async def _adopt_or_start(self) -> Process:
        argv = self.spec.argv()
        if process := running(self.spec.pid_file):
            if arguments(process) == argv:
                return process
            await process.stop(grace_s=STOP_S)  # what is asked of it has changed
        await run(*argv, timeout_s=START_S)
        started = running(self.spec.pid_file)
        if started is None:
            raise HostError(f"the export {self.spec.name} ended as soon as it had started")
        return started


async def end_strays(directory: Path, wanted: set[Path]) -> None:
    """End every export with a pid file in ``directory`` that is not among ``wanted``."""
    for pid_file in _pid_files(directory) - wanted:
        if process := running(pid_file):
            log.warning("ending the stray export %s", pid_file.stem)
            await process.stop(grace_s=STOP_S)
        pid_file.unlink(missing_ok=True)


def _pid_files(directory: Path) -> set[Path]:
    return set(directory.glob("*.pid"))
