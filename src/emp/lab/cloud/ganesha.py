"""EFS's data plane: one nfs-ganesha per mount target, which serves a directory at the mount target's address.

::

    STATE/efs/data/FS/              what is in the file system, which is a file system in memory
    STATE/efs/run/TARGET.conf|pid|log
    STATE/efs/recovery/TARGET/      whom the server promised what: read by its next run

A server outlives the daemon that started it, and is adopted again; one that ends is started again. Whoever had a file
open or a lock reclaims it in the grace period, which ends as soon as all of them have, and after ``GRACE_S`` at the
latest. Two mount targets of one file system are two servers on one directory: their locks are the kernel's own (OFD
locks) and hold against each other, but while one of them is away its clients' locks do not.

In memory, because the server opens files by their handles through the first mount of their device, and in a place of a
lab that is the machine's root, read-only. It goes with the lab, as all else that is in the file system does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emp.host.processes import Process, find, spawn
from emp.host.run import run
from emp.lab.cloud import no_netlink
from emp.lab.cloud.efs_plane import PlanePoint, PlaneTarget
from emp.lab.cloud.vpc import NFS_PORT
from emp.lab.kernel import MNT_DETACH, MS_NODEV, MS_NOSUID, mount, unmount
from emp.lab.nfs_program import NfsProgram
from emp.lab.places import source_directory
from emp.model.errors import CommandFailed, HostError

log = logging.getLogger(__name__)

LEASE_S = 40
"""A client that is not heard of for so long loses its locks: longer than any blackout that the lab makes. A client
shows itself after two thirds of it."""
GRACE_S = 45
"""Longer than the lease, or a client that had nothing to say in it would come too late to reclaim (RFC 8881, 8.4.2.1);
ganesha's own 90 s would be twice as long for whoever waits for a client that is gone for good."""
SIZE_BYTES = 1 << 30
"""of a file system at most; what is not used takes no memory"""
START_S, STOP_S, AGAIN_S = 20.0, 10.0, 0.5
_LOOK_S = 0.05


class GaneshaPlane:
    """See ``emp.lab.cloud.efs_plane.EfsPlane``. Addresses are put on ``interface``. ``close`` ends every server."""

    def __init__(self, program: NfsProgram, state_dir: Path, *, interface: str) -> None:
        self._program = program
        self._home = state_dir / "efs"
        self._interface = interface
        self._servers: dict[str, Server] = {}

    def data(self, file_system: str) -> Path:
        return self._home / "data" / file_system

    def _mounted(self, file_system: str) -> Path:
        """Return the directory of a file system, mounted if it was not."""
        directory = self.data(file_system)
        directory.mkdir(parents=True, exist_ok=True)
        if not directory.is_mount():
            mount("efs", str(directory), "tmpfs", MS_NOSUID | MS_NODEV, f"mode=0755,size={SIZE_BYTES}")
        return directory

    async def on_opened(self, target: PlaneTarget) -> None:
        """Serve, under the same export id whoever serves it, so that file handles last."""
        self._mounted(target.file_system)
        await run("ip", "address", "replace", f"{target.address}/32", "dev", self._interface)
        server = self._servers.get(target.id)
        if server is None:
            server = self._servers[target.id] = Server(self._program, self._home, target)
        await server.open()

    async def on_closed(self, target: PlaneTarget) -> None:
        server = self._servers.pop(target.id, None) or Server(self._program, self._home, target)
        await server.close()
        server.forget()
        with contextlib.suppress(CommandFailed):  # it is gone already
            await run("ip", "address", "delete", f"{target.address}/32", "dev", self._interface)

    async def on_access_point(self, point: PlanePoint) -> None:
        if point.creation is not None:
            make_directory(self._mounted(point.file_system), point.path, point.creation)

    async def on_removed(self, file_system: str) -> None:
        directory = self.data(file_system)
        if directory.is_mount():
            unmount(str(directory), MNT_DETACH)
        if directory.exists():
            directory.rmdir()

    async def close(self) -> None:
        servers, self._servers = self._servers, {}
        await asyncio.gather(*(server.close() for server in servers.values()))


class Server:
    """Keeps one nfs-ganesha running from ``open`` to ``close``."""

    def __init__(self, program: NfsProgram, home: Path, target: PlaneTarget) -> None:
        self._program = program
        self._target = target
        self._data = home / "data" / target.file_system
        self._config = home / "run" / f"{target.id}.conf"
        self._pid, self._log = self._config.with_suffix(".pid"), self._config.with_suffix(".log")
        self._recovery = home / "recovery" / target.id
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self.restarts = 0

    async def open(self) -> None:
        """Serve, and return when clients can connect. Raises ``HostError`` when that takes too long; goes on trying."""
        if self._keeper is None:
            for directory in (self._config.parent, self._recovery):
                directory.mkdir(parents=True, exist_ok=True)
            self._config.write_text(configuration(self._program, self._target, self._data, self._recovery))
            self._keeper = asyncio.create_task(self._keep(), name=f"NFS at {self._target.address}")
        try:
            async with asyncio.timeout(START_S):
                await self._ready.wait()
        except TimeoutError:
            message = f"the NFS server at {self._target.address} does not start"
            raise HostError(message, hint=f"its log: {self._log}") from None

    async def close(self) -> None:
        """End it; return when nothing can be read or written through it any more."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            self._keeper = None
        if process := self._running():
            await process.stop(grace_s=STOP_S)

    def forget(self) -> None:
        """Remove its files, what it promised its clients with them."""
        for path in (self._config, self._pid, self._log):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._recovery, ignore_errors=True)

    async def _keep(self) -> None:
        while True:
            process = self._running() or self._start()
            if await self._answers(process):
                self._ready.set()
            await process.ended()
            self._ready.clear()
            self.restarts += 1
            log.warning("the NFS server at %s has ended by itself; it is started again", self._target.address)
            await asyncio.sleep(AGAIN_S)

    def _start(self) -> Process:
        argv = [
            *(sys.executable, "-S", "-m", no_netlink.MODULE, str(self._program.binary), "-F"),
            *("-f", str(self._config), "-p", str(self._pid), "-L", str(self._log), "-N", "NIV_EVENT"),
        ]
        environment = os.environ | {
            "PYTHONPATH": str(source_directory()),
            "LD_LIBRARY_PATH": self._program.library_path,
        }
        self._pid.unlink(missing_ok=True)  # ganesha writes over what is there, and a shorter number leaves an end
        return spawn(argv, log=self._log, env=environment)

    def _running(self) -> Process | None:
        """Return the server that an earlier daemon started, if it still runs."""
        try:
            process = find(int(self._pid.read_text()))
            words = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0") if process else []
        except (OSError, ValueError):
            return None
        return process if str(self._config) in words else None

    async def _answers(self, process: Process) -> bool:
        """Wait until it takes connections; False if it ends before."""
        while process.alive:
            try:
                _, writer = await asyncio.open_connection(self._target.address, NFS_PORT)
            except OSError:
                await asyncio.sleep(_LOOK_S)
            else:
                writer.close()
                return True
        return False


def configuration(program: NfsProgram, target: PlaneTarget, data: Path, recovery: Path) -> str:
    """Return ganesha's configuration (ganesha-core-config(8), ganesha-export-config(8)).

    NFS 4.1 alone, as the guests mount it; numeric owners, as EFS has them; root is root, as in EFS without a policy.
    The file system's number comes from its id: file handles stay good over restarts and at each mount target.
    """
    digits = target.file_system.removeprefix("fs-")
    major, minor = int(digits[:8], 16), int(digits[8:16] or "0", 16)
    return f"""\
NFS_CORE_PARAM {{
    Protocols = 4; Bind_addr = {target.address}; NFS_Port = {NFS_PORT};
    Enable_UDP = false; Enable_NLM = false; Enable_RQUOTA = false;
    Plugins_Dir = "{program.plugins}";
}}
NFSv4 {{
    Minor_Versions = 1; Delegations = false; Only_Numeric_Owners = true; UseGetpwnam = true;
    Lease_Lifetime = {LEASE_S}; Grace_Period = {GRACE_S};
    RecoveryBackend = fs; RecoveryRoot = "{recovery}";
}}
EXPORT {{
    Export_Id = 1; Path = "{data}"; Pseudo = "/"; Filesystem_Id = {major}.{minor};
    Protocols = 4; Access_Type = RW; Squash = none; SecType = sys;
    FSAL {{ Name = VFS; }}
}}
LOG {{ Default_Log_Level = EVENT; }}
"""


def make_directory(root: Path, path: str, creation: Mapping[str, Any]) -> None:
    """Make the directories of ``path`` below ``root`` that are missing; the last one, if new, as ``creation`` says.

    A guest may have put a symbolic link anywhere: none is followed. Raises ``HostError`` where one, or a file, is.
    """
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        steps = [step for step in path.split("/") if step]
        for number, step in enumerate(steps):
            try:
                os.mkdir(step, 0o755, dir_fd=here)
                made = True
            except FileExistsError:
                made = False
            inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = inner
            if made and number == len(steps) - 1:
                os.fchown(here, creation["OwnerUid"], creation["OwnerGid"])
                os.fchmod(here, int(creation["Permissions"], 8))
    except OSError as error:
        raise HostError(f"cannot make the root directory {path} of an access point: {error}") from error
    finally:
        os.close(here)
