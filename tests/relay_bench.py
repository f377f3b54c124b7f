"""Two nodes' relays, real volumes behind them, and a client that writes and remembers what was acknowledged."""

# ruff: noqa: ASYNC110 - what is waited for is said by a process, a line at a time

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from emp.host.pid_file import running
from emp.host.processes import Process
from emp.model.errors import NotFound
from emp.model.volume import HostDevice, NbdEndpoint
from emp.volumes.relay.manager import Relays
from emp.volumes.server.export import Export, ExportSpec
from emp.volumes.server.tls import write_tls_directory
from emp.wire.pki import Credentials, Identity, Role
from tests.nbd_pool import SERVER, NbdPool

LOOPBACK = "127.0.0.1"
SIZE_BYTES = 8 << 20
BLOCK_BYTES = 4096


@dataclass
class Volume:
    """A file that is served to one node, as a volume that is attached there."""

    image: Path
    export: Export
    endpoint: NbdEndpoint

    @property
    def process(self) -> Process:
        """Return its server."""
        found = running(self.export.spec.pid_file)
        assert found
        return found

    def at(self, offset: int, length: int) -> bytes:
        with self.image.open("rb") as file:
            file.seek(offset)
            return file.read(length)


class RelayBench:
    """Everything of it is below ``directory``; ``close`` ends all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pool = NbdPool(directory / "credentials")
        self.nodes: dict[str, Relays] = {}
        self._volumes: list[Volume] = []
        self._tls = directory / "server-tls"
        write_tls_directory(Credentials.load(self.pool.credentials(SERVER)), self._tls)
        self._numbers = itertools.count(1)

    async def node(self, name: str) -> Relays:
        """Return a node's relays; after ``forget``, those of a new agent."""
        if name not in self.nodes:
            self.nodes[name] = Relays(
                run_dir=self.directory / name,
                credentials=self.pool.credentials(Identity(Role.AGENT, name)),
                address=LOOPBACK,
                node=name,
            )
            await self.nodes[name].start()
        return self.nodes[name]

    async def forget(self, name: str) -> None:
        """The node's agent stops."""
        await self.nodes.pop(name).close()

    async def volume(self, node: str, *, image: Path | None = None, size_bytes: int = SIZE_BYTES) -> Volume:
        """Attach a new volume to a node, or the same one again."""
        number = next(self._numbers)
        if image is None:
            image = self.directory / f"image-{number}"
            with image.open("xb") as file:
                file.truncate(size_bytes)
        spec = ExportSpec(
            name=f"v.{node}.{number}",
            node=node,
            image=image,
            address=LOOPBACK,
            port=_free_port(),
            tls_directory=self._tls,
            pid_file=self.directory / f"volume-{number}.pid",
        )
        export = Export(spec)
        await export.open()
        made = Volume(
            image, export, NbdEndpoint(host=LOOPBACK, port=spec.port, export=spec.name, tls_hostname=SERVER.cn)
        )
        self._volumes.append(made)
        return made

    async def pair(self, source: HostDevice | NbdEndpoint, *, is_open: bool = True) -> Path:
        """Serve a volume on n1, dial it on n2 for the machine ``m``; return the socket there."""
        n1, n2 = await self.node("n1"), await self.node("n2")
        self.served = await n1.serve("v", source=source, size_bytes=SIZE_BYTES, peer="agent-n2")
        if is_open:
            await n1.open("v")
        return await n2.dial("v", machine="m", upstream=self.served, size_bytes=SIZE_BYTES)

    def relay(self, node: str, name: str = "v") -> Process:
        """Return a relay's process."""
        directory = self.directory / node / "relays" / "one" / name
        found = running(directory / "pid", mark=directory / "config.json")
        if found is None:
            raise NotFound(f"no relay {name} runs on {node}")
        return found

    def log(self, node: str, name: str = "v") -> str:
        return (self.directory / node / "relays" / "one" / name / "log").read_text()

    async def close(self) -> None:
        for relays in self.nodes.values():
            for name in await relays.names():
                await relays.end(name)
            await relays.close()
        for volume in self._volumes:
            await volume.export.close()


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[HostDevice]:
    """A real block device."""
    made = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True)
    path = made.stdout.strip()
    try:
        yield HostDevice(path=path, serial="none", size_bytes=image.stat().st_size)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


def qemu_io(path: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Do I/O on a relay's socket by QEMU's own client."""
    argv = [*_qemu_io(path), *(word for command in commands for word in ("-c", command))]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def _qemu_io(path: Path) -> list[str]:
    return ["qemu-io", "--image-opts", f"driver=nbd,path={path},reconnect-delay=300"]


class Writer:
    """A ``qemu-io`` that writes without a pause, several blocks at once, each with the number of its round.

    ``acknowledged``: block -> the byte that QEMU has said to be written there last.
    """

    BLOCKS = 64
    AT_ONCE = 8

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.acknowledged: dict[int, int] = {}
        self.count = 0
        self.problems: list[str] = []
        self.slowest_s = 0.0
        self._asked: dict[int, tuple[int, float]] = {}
        self._news = asyncio.Event()
        self._stopping = False
        self._prompts = 0
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._write())]

    @classmethod
    async def to(cls, path: Path) -> Writer:
        process = await asyncio.create_subprocess_exec(
            *("stdbuf", "-oL", *_qemu_io(path)),  # it tells of what is done when a line is complete
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        return cls(process)

    async def more(self, count: int = 50) -> None:
        """Wait for so many more acknowledgements."""
        wanted = self.count + count
        async with asyncio.timeout(30):
            while self.count < wanted:
                assert not self.problems, self.problems
                self._news.clear()
                await self._news.wait()

    async def stop(self) -> None:
        """Wait for what was asked, and end; it must have gone without an error."""
        self._stopping = True
        async with asyncio.timeout(30):
            while self._asked:
                assert not self.problems, self.problems
                self._news.clear()
                await self._news.wait()
        assert self._process.stdin
        self._process.stdin.write(b"quit\n")
        await asyncio.wait_for(self._process.wait(), 30)
        await asyncio.gather(*self._tasks)
        assert not self.problems, self.problems
        assert self._process.returncode == 0

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def lost(self, volume: Volume) -> dict[int, tuple[int, int]]:
        """Return block -> what was acknowledged and what is there, where they differ."""
        found = {block: volume.at(block * BLOCK_BYTES, BLOCK_BYTES) for block in self.acknowledged}
        return {
            block: (said, found[block][0])
            for block, said in self.acknowledged.items()
            if found[block] != bytes([said]) * BLOCK_BYTES
        }

    async def _write(self) -> None:
        assert self._process.stdin
        loop = asyncio.get_running_loop()
        for number in itertools.count():
            block, byte = number % self.BLOCKS, 1 + number // self.BLOCKS % 255
            while block in self._asked or len(self._asked) >= self.AT_ONCE:
                await asyncio.sleep(0.001)
            # It takes a line at a time: what comes before its prompt stays in its buffer.
            while not self._prompts:
                await asyncio.sleep(0.0005)
            if self._stopping:
                return
            self._prompts -= 1
            self._asked[block] = (byte, loop.time())
            self._process.stdin.write(f"aio_write -P {byte} {block * BLOCK_BYTES} {BLOCK_BYTES}\n".encode())
            await self._process.stdin.drain()

    async def _listen(self) -> None:
        assert self._process.stdout
        loop = asyncio.get_running_loop()
        said = ""
        while data := await self._process.stdout.read(65536):
            said += data.decode()
            self._prompts += said.count("qemu-io> ")
            said = said.replace("qemu-io> ", "")
            *lines, said = said.split("\n")
            for line in lines:
                if wrote := re.match(r"wrote 4096/4096 bytes at offset (\d+)", line):
                    block = int(wrote[1]) // BLOCK_BYTES
                    byte, asked_s = self._asked.pop(block)
                    self.acknowledged[block] = byte
                    self.slowest_s = max(self.slowest_s, loop.time() - asked_s)
                    self.count += 1
                elif "failed" in line or "rror" in line:
                    self.problems.append(line)
            self._news.set()


@contextlib.asynccontextmanager
async def writing(path: Path) -> AsyncIterator[Writer]:
    """Write for as long as the block lasts; it ends with ``Writer.stop``, or is killed."""
    writer = await Writer.to(path)
    try:
        yield writer
    finally:
        await writer.kill()


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])
