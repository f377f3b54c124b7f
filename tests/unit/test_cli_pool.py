"""A pool's controller for tests of the client and the command line: a real HTTPS server that gives canned answers.

``controller`` serves in a thread, so that a test may call the client, or start ``emp``, as any program would.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import pytest
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import StreamingResponse

from emp.cli.root import run
from emp.client.context import Context, save_context
from emp.model.api import AbortRequest, Listing
from emp.model.errors import Conflict, EmpError, NotFound
from emp.model.evm import Evm, EvmSpec, EvmState, Nic, Pod
from emp.model.migration import Check, Migration, MigrationRequest, Outcome, Progress, Report, Stage, StageTimes
from emp.model.node import EvmReport, Node, NodeReport, Versions
from emp.model.volume import Attachment, NbdEndpoint, Volume, VolumeType
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_token
from emp.wire.identity import Role
from emp.wire.pki import CertificateAuthority
from emp.wire.secret import Secret
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import public_server

POOL = "meadow"
ID = "m-0123456789"
EMP = [sys.executable, "-m", "emp.cli.main", "--context", POOL]

VERSIONS = Versions(
    emp="0.1.0", protocol=1, qemu="10.0.2", machines=("pc-q35-10.0",), cpu_models=("qemu64",), accelerator="tcg",
    images={"micro": "sha256:abcdef0123456789"},
)  # fmt: skip
N1 = Node(
    report=NodeReport(
        name="n1", address="10.77.0.11", port=7702, link_port=7703, memory_bytes=4 << 30, memory_used_bytes=512 << 20,
        vcpus=8, versions=VERSIONS, boot_id="b1", evms=(EvmReport(name="web", state=EvmState.RUNNING, epoch=7),),
    ),
    last_seen_at=1_700_000_000.0,
)  # fmt: skip
WEB = Evm(
    spec=EvmSpec(
        name="web", uuid=UUID(int=7), memory_bytes=512 << 20, vcpus=2, image="micro", image_digest="sha256:abcdef",
        machine="pc-q35-10.0", cpu_model="qemu64", volumes=("vol-1",),
        nics=(Nic(mac="52:54:00:00:00:01", address="10.77.1.1", prefix_length=16),),
        pods=(Pod(name="shop", mac="52:54:00:00:00:02", address="10.77.1.2", prefix_length=16),),
    ),
    state=EvmState.RUNNING, owner="n1", epoch=7, created_at=1_700_000_000.0,
)  # fmt: skip
VOL = Volume(
    id="vol-1", type=VolumeType.IO2, size_bytes=1 << 30, serial="s1", evm="web",
    attachments=(
        Attachment(
            volume="vol-1", node="n1", epoch=7,
            endpoint=NbdEndpoint(host="10.77.0.2", port=10809, export="vol-1", tls_hostname="volumes-main"),
        ),
    ),
)  # fmt: skip
PLAN = Migration(
    id=ID, evm="web", source="n1", target="n2", epoch_target=8, epoch_source=9,
    placement="the only node that fits (3.5 GiB free)", created_at=1_700_000_000.0,
    checks=(Check(name="memory", ok=True, message="3.5 GiB free on n2, 512 MiB needed"),),
)  # fmt: skip
COPYING = PLAN.model_copy(
    update={
        "stage": Stage.SOURCE_BROWNOUT,
        "progress": Progress(
            memory_bytes=512 << 20, remaining_bytes=128 << 20, sent_bytes=400 << 20, passes=2, eta_s=1.5,
            dirty_bytes_per_s=12 << 20, bandwidth_bytes_per_s=310 << 20,
        ),
    }
)  # fmt: skip
BLACKOUT = COPYING.model_copy(update={"stage": Stage.BLACKOUT})
RUNS_THERE = BLACKOUT.model_copy(update={"stage": Stage.TARGET_BROWNOUT, "committed": True})
COMPLETED = RUNS_THERE.model_copy(
    update={
        "stage": Stage.CLOSED,
        "outcome": Outcome.COMPLETED,
        "ended_at": 1_700_000_004.2,
        "report": Report(
            stages=StageTimes(source_brownout_s=3.1, blackout_ms=18.2, target_brownout_s=0.25),
            vcpu_pause_ms=14.1, clock_error_ms=0.2, qemu_downtime_ms=12.0, memory_bytes=512 << 20,
            sent_bytes=540 << 20, passes=3, dirty_bytes_per_s=12 << 20, bandwidth_bytes_per_s=310 << 20,
        ),
    }
)  # fmt: skip
ABORTED = BLACKOUT.model_copy(
    update={
        "stage": Stage.CLOSED,
        "outcome": Outcome.ABORTED,
        "cause": "the link to n2 broke",
        "ended_at": 1_700_000_004.2,
        "report": Report(abort_pause_ms=8.0, sent_bytes=540 << 20, memory_bytes=512 << 20),
    }
)
WHOLE_WAY = (COPYING, BLACKOUT, RUNS_THERE, COMPLETED)


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

    def stop_evm(self) -> None:
        """Stop the EVM: its console's stream ends, and cannot be opened again."""
        self.evms["web"] = WEB.model_copy(update={"state": EvmState.STOPPED})
        self.print()

    # -------------------------------------------------------------- inside

    async def _note(self, request: Request) -> None:
        body = await request.body()
        is_json = request.headers.get("content-type") == "application/json"
        self.told.append((f"{request.method} {request.url.path}", json.loads(body) if is_json and body else body))
        if request.method != "GET" and self.refusal is not None:
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


def _get(held: dict[str, Any], name: str, field: str) -> Any:
    if name not in held:
        raise NotFound(f"no {field} {name!r}", field=field)
    return held[name]


def routes(pool: Controller) -> None:
    """Put the REST API's paths into the app."""
    app = pool.app

    def listing(held: Any) -> Any:
        return Listing[Any](items=tuple(held), revision=41)

    @app.get("/v1/nodes")
    def nodes() -> Any:
        return listing(pool.nodes.values())

    @app.get("/v1/nodes/{name}")
    def node(name: str) -> Any:
        return _get(pool.nodes, name, "node")

    @app.post("/v1/nodes/{name}/{verb}")
    def cordon(name: str, verb: str) -> Any:
        pool.nodes[name] = _get(pool.nodes, name, "node").model_copy(update={"cordoned": verb == "cordon"})
        return pool.nodes[name]

    @app.get("/v1/evms")
    def evms() -> Any:
        return listing(pool.evms.values())

    @app.get("/v1/evms/{name}")
    @app.post("/v1/evms/{name}/start")
    @app.post("/v1/evms/{name}/stop")
    def evm(name: str) -> Any:
        return _get(pool.evms, name, "evm")

    @app.post("/v1/evms", status_code=201)
    def create(request: dict[str, Any]) -> Any:
        return WEB

    @app.delete("/v1/evms/{name}", status_code=204)
    def delete(name: str, grace_s: float = 5) -> None:
        pool.told.append(("grace", grace_s))

    @app.get("/v1/evms/{name}/console")
    def read_console(name: str) -> Any:
        if _get(pool.evms, name, "evm").state is not EvmState.RUNNING:
            raise Conflict(f"EVM {name} is stopped: it has no console", field="evm")
        return StreamingResponse(pool.output(), media_type="application/octet-stream")

    @app.post("/v1/evms/{name}/console", status_code=204)
    async def type_at_console(name: str, request: Request) -> None:
        pool.typed += await request.body()

    @app.post("/v1/evms/{name}/migrations", status_code=201)
    def migrate(name: str, request: MigrationRequest, response: Response) -> Any:
        _get(pool.evms, name, "evm")
        return pool.plan.model_copy(update={"dry_run": request.dry_run, "policy": request.policy})

    @app.get("/v1/migrations")
    def migrations(evm: str | None = None) -> Any:
        if evm is not None:
            _get(pool.evms, evm, "evm")
        return listing(m for m in pool.migrations.values() if evm in (None, m.evm))

    @app.get("/v1/migrations/{name}")
    def migration(name: str) -> Any:
        return _get(pool.migrations, name, "migration")

    @app.get("/v1/migrations/{name}/events")
    def events(name: str, last_event_id: Annotated[str | None, Header()] = None) -> Any:
        pool.resumed.append(last_event_id)
        return StreamingResponse(pool.snapshots(int(last_event_id or 0)), media_type="text/event-stream")

    @app.post("/v1/migrations/{name}/abort")
    def abort(name: str, request: AbortRequest) -> Any:
        return COPYING.model_copy(update={"abort_asked": request.reason})

    @app.get("/v1/volumes")
    def volumes() -> Any:
        return listing(pool.volumes.values())

    @app.get("/v1/volumes/{name}")
    def volume(name: str) -> Any:
        return _get(pool.volumes, name, "volume")

    @app.post("/v1/volumes", status_code=201)
    def create_volume(request: dict[str, Any]) -> Any:
        return VOL

    @app.delete("/v1/volumes/{name}", status_code=204)
    def delete_volume(name: str) -> None: ...


Emp = Callable[[str], tuple[int, str, str]]


def in_process(capsys: pytest.CaptureFixture[str]) -> Emp:
    """Return ``emp("evm list")``, which runs a command line here and gives its exit code, output and errors."""

    def call(line: str) -> tuple[int, str, str]:
        code = run(shlex.split(line))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


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


def start_emp(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start ``emp --context meadow ARGUMENTS`` as a process of its own, its output in pipes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen([*EMP, *arguments], text=True, env=os.environ | {"COLUMNS": "80"}, **pipes)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Return once something is so that another process brings about."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


class Terminal:
    """``emp`` at a terminal of 80 columns, and what it has shown."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 80, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
        environment = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "COLUMNS")}
        self._process = subprocess.Popen(
            [*EMP, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self._theirs = theirs
        self.raw = b""

    @property
    def text(self) -> str:
        """Everything shown, without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw.decode(errors="replace")).replace("\r", "\n")

    def type(self, data: bytes) -> None:
        os.write(self._ours, data)

    def modes(self) -> list[object]:
        """How the terminal treats keys and output."""
        return termios.tcgetattr(self._theirs)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 10
        while words not in self.text:
            assert time.monotonic() < deadline and self._read(deadline), f"never shown: {words}\n{self.text}"

    def end(self) -> int:
        """Return the exit code, once the terminal has shown everything."""
        deadline = time.monotonic() + 10
        while self._process.poll() is None:  # it may wait until what it shows is read
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
            self._read(time.monotonic() + 0.02)
        while self._read(time.monotonic()):
            pass
        return int(self._process.returncode)

    def _read(self, deadline: float) -> bool:
        """Read on; return whether there was something."""
        if not select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        self.raw += os.read(self._ours, 65536)
        return True

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@contextlib.contextmanager
def at_terminal(*arguments: str) -> Iterator[Terminal]:
    """Start ``emp --context meadow ARGUMENTS`` at a terminal of its own."""
    terminal = Terminal(arguments)
    try:
        yield terminal
    finally:
        terminal.close()
