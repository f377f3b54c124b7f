"""A node's relays, seen from its agent: started, adopted, watched, given orders, ended.

Each has a directory of its own, with the order that it was made by, its configuration as it stands, and its sockets. It
runs in a session of its own and is known by its pid file and its exact arguments. The socket for QEMU lies in a
directory of the machine, below one that root alone can enter: a machine reaches it through the descriptor that it got.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emp.host.kept import Kept
from emp.host.pid_file import arguments, running
from emp.host.processes import Process, spawn
from emp.model.errors import Conflict, HostError, NotFound, OutcomeUnknown, error_from_dict
from emp.model.names import check_name
from emp.model.volume import HostDevice, NbdEndpoint
from emp.volumes.base import RelayState, RelayStatus, RoundTrip
from emp.volumes.relay.config import Device, Endpoint, RelayConfig, TlsListen, UnixListen, Upstream, load
from emp.wire.files import make_private_dir
from emp.wire.identity import Identity, Role
from emp.wire.sockets import reachable

log = logging.getLogger(__name__)

START_S = 10.0
END_S = 8.0
"""what the relay itself allows for what is outstanding and for its qemu-nbd, and a little"""
REACH_S = 5.0
ANSWER_S = 15.0
"""for an order, besides what it says itself; a switch opens a device and connects to it"""
_LOOK_S = 0.02
_MACHINE_MODE = 0o711


class Relays:
    """See ``emp.volumes.base.RelayDriver``. ``address``: of this node, for other nodes' relays."""

    def __init__(self, *, run_dir: Path, credentials: Path, address: str, node: str) -> None:
        self._directory = run_dir / "relays"
        self._credentials = credentials
        self._address = address
        self._tls_hostname = Identity(Role.AGENT, node).cn
        self._kept: dict[str, _Relay] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def start(self) -> None:
        make_private_dir(self._directory)
        for name in ("one", "machine"):
            make_private_dir(self._directory / name)
        for directory in sorted((self._directory / "one").iterdir()):
            relay = _Relay(directory)
            if relay.order() is None:  # its maker was killed before it could say what it wanted
                await relay.end()
                continue
            self._kept[directory.name] = relay
            try:
                await relay.open()
            except HostError as error:
                log.error("the relay %s does not start again yet: %s", directory.name, error)

    async def close(self) -> None:
        for relay in self._kept.values():
            await relay.let_go()
        self._kept.clear()

    async def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._kept))

    async def serve(self, name: str, *, source: HostDevice | NbdEndpoint, size_bytes: int, peer: str) -> NbdEndpoint:
        listen = TlsListen(host=self._address, port=0, peer=peer, export=check_name(name))
        status = await self._make(name, listen, _upstream(source), size_bytes, writes_open=False)
        assert status.port is not None
        return NbdEndpoint(host=self._address, port=status.port, export=name, tls_hostname=self._tls_hostname)

    async def dial(self, name: str, *, machine: str, upstream: NbdEndpoint, size_bytes: int) -> Path:
        directory = self._directory / "machine" / check_name(machine, field="machine")
        directory.mkdir(exist_ok=True)
        directory.chmod(_MACHINE_MODE)
        path = directory / check_name(name)
        await self._make(name, UnixListen(str(path)), _upstream(upstream), size_bytes, writes_open=True)
        return path

    async def open(self, name: str) -> RelayStatus:
        return await self._ask(name, "open")

    async def hold(self, name: str, *, within_s: float) -> RelayStatus:
        return await self._ask(name, "hold", within_s=within_s)

    async def switch(self, name: str, source: HostDevice | NbdEndpoint) -> RelayStatus:
        return await self._ask(name, "switch", upstream=asdict(_upstream(source)))

    async def status(self, name: str) -> RelayStatus:
        return await self._ask(name, "status")

    async def end(self, name: str) -> None:
        async with self._turns[check_name(name)]:
            relay = self._kept.get(name) or _Relay(self._directory / "one" / name)
            await relay.end()
            self._kept.pop(name, None)

    async def _make(
        self, name: str, listen: UnixListen | TlsListen, upstream: Upstream, size_bytes: int, *, writes_open: bool
    ) -> RelayStatus:
        """Have a relay run as ordered, and return how it is once it has reached the volume."""
        directory = self._directory / "one" / name
        order = RelayConfig(
            listen=listen,
            size_bytes=size_bytes,
            upstream=upstream,
            tls_dir=str(self._credentials),
            control=str(directory / "control"),
            pid_file=str(directory / "pid"),
            writes_open=writes_open,
        )
        async with self._turns[name]:
            relay = self._kept.get(name)
            if relay is None:
                relay = _Relay(directory)
                relay.write(order)
                self._kept[name] = relay
            elif relay.order() != order:
                raise Conflict(f"the relay {name} is there for something else", field="name", hint="end it first")
            await relay.open()
        return await self._ask(name, "reach", within_s=REACH_S)

    async def _ask(self, name: str, order: str, **what: Any) -> RelayStatus:
        relay = self._kept.get(name)
        if relay is None:
            raise NotFound(f"there is no relay {name}", field="name")
        return _status(await relay.ask(order, **what))


class _Relay:
    """One relay's process, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._config = directory / "config.json"
        self._order = directory / "order.json"
        self._pid_file = directory / "pid"
        self._control = directory / "control"
        self._log = directory / "log"
        self._kept = Kept(f"the relay {directory.name}", self._adopt_or_start)

    def order(self) -> RelayConfig | None:
        """Return what it was made by; None if that was never said."""
        try:
            return load(self._order)
        except NotFound:
            return None

    def write(self, order: RelayConfig) -> None:
        """The order last: without it there is no relay."""
        make_private_dir(self._directory)
        order.save(self._config)
        order.save(self._order)

    async def open(self) -> None:
        await self._kept.open()

    async def let_go(self) -> None:
        await self._kept.let_go()

    async def end(self) -> None:
        await self._kept.let_go()
        order = self.order() if self._directory.exists() else None
        if process := running(self._pid_file, mark=self._config):
            await process.stop(grace_s=END_S)
        if left := running(self._directory / "device.pid"):  # it dies with its relay, but that takes a moment
            await left.stop(grace_s=0)
        if order is not None and isinstance(order.listen, UnixListen):
            _remove_public(Path(order.listen.unix))
        if self._directory.exists():
            self._order.unlink(missing_ok=True)
            shutil.rmtree(self._directory)

    async def ask(self, order: str, **what: Any) -> dict[str, Any]:
        """Give an order; once more if the relay has ended meanwhile, for it is started again as it was."""
        line = json.dumps({"order": order} | what).encode() + b"\n"
        limit_s = ANSWER_S + float(what.get("within_s", 0.0))
        for _ in range(2):
            await self._kept.open()
            try:
                async with asyncio.timeout(limit_s):
                    return await self._exchange(line)
            except (OSError, EOFError) as error:
                problem = str(error) or f"no answer in {limit_s:g} s"
        raise OutcomeUnknown(f"the relay {self._directory.name} did not answer to {order}: {problem}", hint="ask again")

    async def _exchange(self, line: bytes) -> dict[str, Any]:
        with reachable(self._control) as name:
            reader, writer = await asyncio.open_unix_connection(name)
        try:
            writer.write(line)
            if not (said := await reader.readline()).endswith(b"\n"):
                raise EOFError("it has ended")
        finally:
            writer.close()
        answer: dict[str, Any] = json.loads(said)
        if "error" in answer:
            raise error_from_dict(answer["error"])
        return dict(answer["status"])

    async def _adopt_or_start(self) -> Process:
        argv = [sys.executable, "-m", "emp.volumes.relay", "--config", str(self._config)]
        process = running(self._pid_file, mark=self._config)
        if process is not None and arguments(process) != argv:  # of an agent that was installed elsewhere
            await process.stop(grace_s=END_S)
            process = None
        if process is None:
            process = spawn(argv, log=self._log)
        try:
            async with asyncio.timeout(START_S):
                await self._until_it_answers(process)
        except TimeoutError:
            await process.stop(grace_s=0)
            raise HostError(f"the relay {self._directory.name} does not answer") from None
        return process

    async def _until_it_answers(self, process: Process) -> None:
        while True:
            try:
                await self._exchange(b'{"order": "status"}\n')
                return
            except (OSError, EOFError):
                if not process.alive:
                    await process.ended()
                    raise HostError(f"the relay {self._directory.name} has ended: {self._last_words()}") from None
            await asyncio.sleep(_LOOK_S)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"


def _remove_public(path: Path) -> None:
    """And the machine's directory, if that was its last."""
    path.unlink(missing_ok=True)
    if path.parent.exists() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _upstream(source: HostDevice | NbdEndpoint) -> Upstream:
    return Device(source.path) if isinstance(source, HostDevice) else Endpoint(**source.model_dump())


def _status(said: dict[str, Any]) -> RelayStatus:
    known = {"state": RelayState(said["state"]), "round_trip": RoundTrip(**said["round_trip"])}
    return RelayStatus(**said | known)
