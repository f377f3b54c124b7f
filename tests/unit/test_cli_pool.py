"""A pool's controller for tests of the client and the command line: a real HTTPS server that gives canned answers.

``controller`` serves in a thread, so that a test may call the client, or start ``emp``, as any program would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Request

from emp.client.context import Context, save_context
from emp.model.errors import EmpError
from emp.model.evm import EvmState
from emp.model.migration import Migration, Stage
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_token
from emp.wire.identity import Role
from emp.wire.pki import CertificateAuthority
from emp.wire.secret import Secret
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import public_server
from tests.unit.test_cli_canned import COMPLETED, ID, N1, PLAN, VOL, WEB
from tests.unit.test_cli_routes import routes
from tests.unit.test_cli_run import POOL


class Controller:
    """What the controller says and has been told. A test may change every attribute while it serves."""

    def __init__(self, directory: Path) -> None:
        self.ca = CertificateAuthority.create(directory / "ca", POOL)
        self.ca.issue(Role.CONTROLLER, "main").write(directory / "controller")
        self.credentials = directory / "controller"
        self.token = Secret("sesame")
        self.nodes, self.evms, self.volumes = {"n1": N1}, {"web": WEB}, {"vol-1": VOL}
        self.migrations = {ID: COMPLETED}
        self.told: list[tuple[str, Any]] = []
        """method and path, and the body, of each request"""
        self.refusal: EmpError | None = None
        """of every order"""
        self.plan = PLAN
        self.typed = b""
        self.past: list[Migration] = []
        """the snapshots of the one migration; the n-th has the id n"""
        self.console: list[bytes] = []
        self.resumed: list[str | None] = []
        """``Last-Event-ID`` of each stream of events"""
        self._changed = asyncio.Condition()
        self._go_on = asyncio.Event()
        self._go_on.set()
        self.app = FastAPI(dependencies=[Depends(require_token(self.token)), Depends(self._note)])
        install_error_handlers(self.app)
        routes(self)
        self.port = 0
        self._server: Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="controller")

    # -------------------------------------------------------------- for the test

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the controller's loop and wait for it."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self.do(self._start())

    def stop(self) -> None:
        """End cleanly, as at a restart of the daemon."""
        self.do(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def push(self, *snapshots: Migration) -> None:
        """Let the migration go on."""
        self.do(self._push(self.past, snapshots))

    def print(self, *pieces: bytes) -> None:
        """Let the guest write to its console."""
        self.do(self._push(self.console, pieces))

    def cut(self) -> None:
        """Break every connection."""
        self.do(self._cut())

    @contextlib.contextmanager
    def slow_orders(self) -> Iterator[None]:
        """Take orders and do not answer them until the block ends."""
        self._go_on.clear()
        yield
        self._loop.call_soon_threadsafe(self._go_on.set)

    def stop_evm(self) -> None:
        """Stop the EVM: its console's stream ends, and cannot be opened again."""
        self.evms["web"] = WEB.model_copy(update={"state": EvmState.STOPPED})
        self.print()

    # -------------------------------------------------------------- inside

    async def _note(self, request: Request) -> None:
        body = await request.body()
        is_json = request.headers.get("content-type") == "application/json"
        self.told.append((f"{request.method} {request.url.path}", json.loads(body) if is_json and body else body))
        if request.method != "GET":
            await self._go_on.wait()
            if self.refusal is not None:
                raise self.refusal

    async def _start(self) -> None:
        sock = listen("127.0.0.1", self.port)
        self.port = sock.getsockname()[1]
        self._server = Server(self.app, [Listener(sock, public_server(self.credentials))], pool=POOL, drain_s=0.2)
        await self._server.start()

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None

    async def _push(self, where: list[Any], what: Any) -> None:
        async with self._changed:
            where.extend(what)
            self._changed.notify_all()

    async def _cut(self) -> None:
        assert self._server is not None
        for connection in self._server._connections():
            connection.transport.abort()

    async def snapshots(self, after: int) -> AsyncGenerator[bytes]:
        yield b": connected\n\n"
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self.past) > after)  # noqa: B023
                coming = self.past[after:]
            for migration in coming:
                after += 1
                yield f"id: {after}\nevent: migration\ndata: {migration.model_dump_json()}\n\n".encode()
                if migration.stage is Stage.CLOSED:
                    return

    async def output(self) -> AsyncGenerator[bytes]:
        shown = 0
        while self.evms["web"].state is EvmState.RUNNING:
            for piece in self.console[shown:]:
                shown += 1
                yield piece
            async with self._changed:
                await self._changed.wait_for(
                    lambda: len(self.console) > shown or self.evms["web"].state is not EvmState.RUNNING  # noqa: B023
                )


@contextlib.contextmanager
def serving(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    """Serve a controller, and make the context ``meadow`` of it the only one there is."""
    monkeypatch.setenv("EMP_CONTEXT_DIR", str(directory / "contexts"))
    monkeypatch.delenv("EMP_CONTEXT", raising=False)
    pool = Controller(directory)
    pool.start()
    url = f"https://127.0.0.1:{pool.port}"
    try:
        save_context(Context(POOL, url, "controller-main", pool.ca.ca_pem.decode(), pool.token))
        yield pool
    finally:
        pool.close()
