"""``python -m emp.volumes.relay --config FILE``: one relay, until SIGTERM or the order ``end``."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from emp.model.errors import Conflict
from emp.volumes.relay.config import RelayConfig, TlsListen, load
from emp.volumes.relay.control import Control
from emp.volumes.relay.door import Door
from emp.volumes.relay.relay import Relay
from emp.wire import process
from emp.wire.process import told_to_end
from emp.wire.sockets import listen, listen_unix
from emp.wire.tls import mutual_server

_FOR_ANYBODY = 0o666
"""mode of the socket for QEMU; its directory decides who gets to it"""


def main(arguments: Sequence[str] | None = None) -> int:
    return process.main("python -m emp.volumes.relay", "Relay one volume.", _run, arguments)


async def _run(path: Path) -> None:
    config = load(path)
    with _alone(Path(config.pid_file)):
        await _serve(path, config)


@contextlib.contextmanager
def _alone(pid_file: Path) -> Iterator[None]:
    """Hold the pid file; raise ``Conflict`` when a relay with the same one still runs."""
    descriptor = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another relay works with {pid_file}", field="pid_file", hint="end it first") from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


async def _serve(path: Path, config: RelayConfig) -> None:
    over = told_to_end()
    control_path = Path(config.control)
    with contextlib.ExitStack() as stack:
        port = None
        if isinstance(config.listen, TlsListen):
            mutual_server(Path(config.tls_dir))  # unusable credentials are told of now
            listening = stack.enter_context(listen(config.listen.host, config.listen.port))
            port = listening.getsockname()[1]
            config = replace(config, listen=replace(config.listen, port=port))
            config.save(path)  # after a restart it is the same port
        else:
            public = Path(config.listen.unix)
            listening = stack.enter_context(listen_unix(public, mode=_FOR_ANYBODY))
            stack.callback(public.unlink, missing_ok=True)
        orders = stack.enter_context(listen_unix(control_path))
        stack.callback(control_path.unlink, missing_ok=True)

        relay = Relay(path, config)
        await relay.start()
        door = asyncio.create_task(Door(relay, listening, config).run(), name="door")
        control = Control(relay, end=over.set, port=port)
        server = await asyncio.start_unix_server(control.hear, sock=orders)
        try:
            await asyncio.wait({door, asyncio.create_task(over.wait())}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await relay.close()
            door.cancel()
            await asyncio.wait({door})
            server.close()
        if not over.is_set():
            door.result()


if __name__ == "__main__":
    sys.exit(main())
