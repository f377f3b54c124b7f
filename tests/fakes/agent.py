"""A node's agent that does bookkeeping in the place of QEMU: a real HTTPS server with the API of ``emp.model.orders``.

A migration between two of them is played out in the order of the protocol, as far and as fast as ``Script`` lets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from emp.model.errors import Conflict, EmpError, NotFound, StaleEpoch
from emp.model.evm import EvmState
from emp.model.migration import Progress, Stage
from emp.model.node import EvmReport, NodeReport, OpenRole, Versions
from emp.model.orders import (
    AbortOrder,
    AnswerOrder,
    GoOnOrder,
    GoOrder,
    HandoverOrder,
    HeartbeatReply,
    HoldOrder,
    LendOrder,
    Lent,
    Prepared,
    PrepareOrder,
    Relayed,
    RetireOrder,
    Role,
    RoleFigures,
    RolePhase,
    RoleStatus,
    StartOrder,
    StopOrder,
    TakeBackOrder,
    VolumesOrder,
)
from emp.model.volume import NbdEndpoint
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_role
from emp.wire.http import WireClient
from emp.wire.identity import Role as WireRole
from tests.fakes.values import MIB, a_report
from tests.fakes.volumes import HOST

if TYPE_CHECKING:
    from tests.fakes.pool import Pool

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_check = require_role(WireRole.CONTROLLER)


class Part:
    """One end of a migration at a fake agent: its status, and whoever watches it."""

    def __init__(self, status: RoleStatus) -> None:
        self.status = status
        self.changed = asyncio.Condition()
        self.abort = asyncio.Event()
        self.order: PrepareOrder | HandoverOrder | None = None

    async def move(self, phase: RolePhase, stage: Stage, **changes: Any) -> None:
        figures = self.status.figures.model_copy(update=changes.pop("figures", {}))
        update = {"phase": phase, "stage": stage, "figures": figures, **changes}
        async with self.changed:
            self.status = self.status.model_copy(update=update)
            self.changed.notify_all()

    async def watch(self) -> AsyncGenerator[bytes]:
        seen: RoleStatus | None = None
        while seen is None or not seen.phase.final:
            async with self.changed:
                await self.changed.wait_for(lambda: self.status is not seen)  # noqa: B023
                seen = self.status
            yield f"data: {seen.model_dump_json()}\n\n".encode()


@dataclass
class Script:
    """How the next migration at this source goes. The events hold it until a test lets it go on."""

    precopy: asyncio.Event = field(default_factory=asyncio.Event)
    blackout: asyncio.Event = field(default_factory=asyncio.Event)
    clearing: asyncio.Event = field(default_factory=asyncio.Event)
    target_fails: bool = False
    cut: bool = False
    """the agents cannot reach each other after the commit"""

    @classmethod
    def free(cls) -> Script:
        script = cls()
        for event in (script.precopy, script.blackout, script.clearing):
            event.set()
        return script


class FakeAgent:
    """A node. ``refuse[verb]`` is raised instead of doing it, ``lose[verb]`` after having done it, each once unless in
    ``refuse_always``."""

    def __init__(self, name: str, pool: Pool, *, memory_bytes: int, versions: Versions) -> None:
        self.name = name
        self.pool = pool
        self.memory_bytes = memory_bytes
        self.versions = versions
        self.vcpus = 4
        self.journal: str | None = None
        self.boot_id = "boot"
        self.is_overlay = False
        self.no_ipv6: str | None = None
        self.journal_id, self.journal_seq = "", 0
        self.open_roles: tuple[OpenRole, ...] = ()
        self.lending: tuple[str, ...] = ()
        self.quarantine: str | None = None
        """what the controller's last answer said"""
        self.evms: dict[str, EvmReport] = {}
        self.epochs: dict[str, int] = {}
        self.disks: dict[str, dict[str, int]] = {}
        """EVM -> volume -> slot, since the last order that changed them"""
        self.orders: list[tuple[str, Any]] = []
        self.lent: set[str] = set()
        """volumes that it serves to the target of a migration"""
        self.parts: dict[str, Part] = {}
        self.refuse: dict[str, EmpError] = {}
        self.refuse_always: set[str] = set()
        self.lose: dict[str, EmpError] = {}
        self.hold = asyncio.Event()
        """while it is clear, every order waits at the door"""
        self.hold.set()
        self.telling = asyncio.Event()
        """while it is clear, nobody hears how a migration stands"""
        self.telling.set()
        self.reached = asyncio.Event()
        """an order has come"""
        self.script = Script.free()
        self.consoles: dict[str, asyncio.Queue[bytes | None]] = {}
        self.typed: list[bytes] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.sock = socket.create_server((HOST, 0))
        self._beating: asyncio.Task[None] | None = None
        self._one_beat = asyncio.Lock()
        self._client: WireClient | None = None

    # ---------------------------------------------------------- reporting

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    def report(self) -> NodeReport:
        return a_report(
            self.name,
            address=HOST,
            port=self.port,
            memory_bytes=self.memory_bytes,
            vcpus=self.vcpus,
            versions=self.versions,
            evms=tuple(self.evms.values()),
            journal=self.journal,
            boot_id=self.boot_id,
            journal_id=self.journal_id,
            journal_seq=self.journal_seq,
            open_roles=self.open_roles,
            is_overlay=self.is_overlay,
            no_ipv6=self.no_ipv6,
            lending=self.lending,
        )

    def reboot(self) -> None:
        """The node was off: its machines are gone, and its agent is a new process."""
        self.boot_id += "+"
        for name in list(self.evms):
            self.set_state(name, EvmState.CRASHED, "its machine is gone")

    async def beat(self) -> HeartbeatReply:
        if self._client is None:
            self._client = self.pool.client_of(self.name)
        path = f"/v1/agents/{self.name}/heartbeat"
        async with self._one_beat:
            reply = await self._client.request("POST", path, self.report(), response_model=HeartbeatReply)
        self.quarantine = reply.quarantine
        return reply

    async def keep_beating(self) -> None:
        with contextlib.suppress(EmpError):  # the controller is away now and then
            await self.beat()
        while True:
            await asyncio.sleep(self.pool.heartbeat_s)
            with contextlib.suppress(EmpError):
                await self.beat()

    def start_beating(self) -> None:
        self._beating = asyncio.create_task(self.keep_beating(), name=f"beats of {self.name}")

    async def stop_beating(self) -> None:
        """Return when none is on its way any more: one that was only cancelled here may still be heard there."""
        if self._beating is not None:
            async with self._one_beat:
                self._beating.cancel()
            await asyncio.wait([self._beating])
            self._beating = None

    async def forget_controller(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def close(self) -> None:
        await self.stop_beating()
        await self.forget_controller()
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)

    def set_state(self, evm: str, state: EvmState, reason: str | None = None) -> None:
        self.evms[evm] = self.evms[evm].model_copy(update={"state": state, "reason": reason})

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.orders]

    # ---------------------------------------------------------- the API

    async def _do(self, verb: str, order: Any, work: Callable[[], Awaitable[T]]) -> T:
        self.orders.append((verb, order))
        self.reached.set()
        await self.hold.wait()
        if verb in self.refuse:
            raise self.refuse[verb] if verb in self.refuse_always else self.refuse.pop(verb)
        answer = await work()
        if error := self.lose.pop(verb, None):
            raise error
        return answer

    def app(self) -> FastAPI:
        """Plain routes: making a FastAPI route with its models takes longer than most tests."""
        app = FastAPI(openapi_url=None)
        install_error_handlers(app)

        def orders(path: str, verb: str, model: type[M], work: Callable[[str, M], Awaitable[BaseModel]]) -> None:
            async def endpoint(request: Request) -> Response:
                _check(request)
                order = model.model_validate_json(await request.body())
                name = request.path_params["name"]
                answer = await self._do(verb, order, lambda: work(name, order))
                return Response(answer.model_dump_json(), media_type="application/json")

            app.add_route(path, endpoint, methods=["POST"])

        orders("/v1/evms/{name}/start", "start", StartOrder, self._start)
        orders("/v1/evms/{name}/stop", "stop", StopOrder, self._stop)
        orders("/v1/evms/{name}/volumes", "volumes", VolumesOrder, self._change_volumes)
        orders("/v1/evms/{name}/retire", "retire", RetireOrder, self._retire)
        orders("/v1/migrations/{name}/prepare", "prepare", PrepareOrder, self._prepare)
        orders("/v1/migrations/{name}/handover", "handover", HandoverOrder, self._hand_over)
        orders("/v1/migrations/{name}/abort", "abort", AbortOrder, self._abort)
        orders("/v1/migrations/{name}/go", "go", GoOrder, self._go)
        orders("/v1/migrations/{name}/answer", "answer", AnswerOrder, self._answer)
        orders("/v1/migrations/{name}/lend", "lend", LendOrder, self._lend)
        orders("/v1/migrations/{name}/take-back", "take back", TakeBackOrder, self._take_back)
        orders("/v1/migrations/{name}/hold", "hold", HoldOrder, self._hold)
        orders("/v1/migrations/{name}/go-on", "go on", GoOnOrder, self._go_on)

        async def node(request: Request) -> Response:
            _check(request)
            return Response(self.report().model_dump_json(), media_type="application/json")

        async def watch(request: Request) -> StreamingResponse:
            _check(request)
            await self.telling.wait()
            part = self._part(request.path_params["name"])
            return StreamingResponse(part.watch(), media_type="text/event-stream")

        async def console(request: Request) -> Response:
            _check(request)
            name = request.path_params["name"]
            if name not in self.consoles:
                raise NotFound(f"EVM {name} is not on this node")
            if request.method == "POST":
                self.typed.append(await request.body())
                return Response(status_code=204)
            return StreamingResponse(self._output(name), media_type="application/octet-stream")

        app.add_route("/v1/node", node, methods=["GET"])
        app.add_route("/v1/migrations/{name}/watch", watch, methods=["GET"])
        app.add_route("/v1/evms/{name}/console", console, methods=["GET", "POST"])
        return app

    # ---------------------------------------------------------- EVMs

    def _check_epoch(self, name: str, epoch: int) -> None:
        if epoch <= self.epochs.get(name, 0):
            raise StaleEpoch(f"{epoch} is not newer than {self.epochs[name]}")
        self.epochs[name] = epoch

    async def _start(self, name: str, order: StartOrder) -> EvmReport:
        if name in self.evms and self.epochs[name] == order.epoch:
            return self.evms[name]
        if name in self.evms and self.evms[name].state is EvmState.RUNNING:
            raise Conflict("it is already here")
        self._check_epoch(name, order.epoch)
        self.arrive(name, order.epoch)
        return self.evms[name]

    def arrive(self, name: str, epoch: int) -> None:
        self.epochs[name] = epoch
        self.evms[name] = EvmReport(name=name, state=EvmState.RUNNING, epoch=epoch)
        self.consoles[name] = asyncio.Queue()
        self.consoles[name].put_nowait(f"{name} on {self.name}\n".encode())

    def leave(self, name: str) -> None:
        self.evms.pop(name, None)
        if console := self.consoles.pop(name, None):
            console.put_nowait(None)

    async def _output(self, name: str) -> AsyncGenerator[bytes]:
        console = self.consoles[name]
        while (data := await console.get()) is not None:
            yield data

    async def _stop(self, name: str, order: StopOrder) -> EvmReport:
        if name not in self.evms:
            raise NotFound(f"{name} is not here")
        self.set_state(name, EvmState.STOPPED, "shut down on request")
        if console := self.consoles.pop(name, None):
            console.put_nowait(None)
        return self.evms[name]

    async def _change_volumes(self, name: str, order: VolumesOrder) -> EvmReport:
        if name not in self.evms:
            raise NotFound(f"EVM {name!r} is not on this node", field="evm")
        if order.epoch != self.evms[name].epoch:
            raise StaleEpoch(f"EVM {name!r} is not owned here under epoch {order.epoch}", field="epoch")
        self.disks[name] = dict(zip(order.spec.volumes, order.spec.slots, strict=True))
        return self.evms[name]

    async def _retire(self, name: str, order: RetireOrder) -> EvmReport:
        self._check_epoch(name, order.epoch)
        self.leave(name)
        return EvmReport(name=name, state=EvmState.STOPPED, epoch=order.epoch)

    # ---------------------------------------------------------- migrations

    def _part(self, migration: str) -> Part:
        if migration not in self.parts:
            raise NotFound(f"nothing is known of {migration}")
        return self.parts[migration]

    async def _prepare(self, migration: str, order: PrepareOrder) -> Prepared:
        status = RoleStatus(
            migration=order.migration,
            evm=order.spec.name,
            role=Role.TARGET,
            phase=RolePhase.PREPARED,
            stage=Stage.SOURCE_BROWNOUT,
            nonce="p1",
        )
        part = self.parts.setdefault(order.migration, Part(status))
        part.order = order
        return Prepared(migration=order.migration, nonce="p1", stream_host=HOST, stream_port=4444)

    async def _hand_over(self, migration: str, order: HandoverOrder) -> RoleStatus:
        if order.migration not in self.parts:
            status = RoleStatus(
                migration=order.migration,
                evm=order.evm,
                role=Role.SOURCE,
                phase=RolePhase.PRECOPY,
                stage=Stage.SOURCE_BROWNOUT,
                figures=RoleFigures(precopy_began_at_s=100.0),
            )
            self.parts[order.migration] = Part(status)
            self._spawn(self._play(order, self.script))
        return self.parts[order.migration].status

    async def _abort(self, migration: str, order: AbortOrder) -> RoleStatus:
        part = self._part(migration)
        part.abort.set()
        if part.status.role is Role.TARGET and not part.status.phase.final:
            await part.move(RolePhase.WITHDRAWN, Stage.CLOSED, cause=order.reason)
        elif order.wait_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(order.wait_s), part.changed:
                    await part.changed.wait_for(lambda: part.status.phase.final or part.status.committed)
        return part.status

    async def _go(self, migration: str, order: GoOrder) -> RoleStatus:
        """The source's word, by courier: it runs here from now on."""
        part = self._part(migration)
        prepared = part.order
        assert isinstance(prepared, PrepareOrder)
        if (order.epoch, order.nonce) != (prepared.epoch, part.status.nonce):
            raise Conflict("this GO is not of this PREPARED")
        if not part.status.committed:
            self.arrive(part.status.evm, order.epoch)
            figures = {"resumed_at_s": 101.010, "port_open_at_s": 101.012}
            await part.move(RolePhase.RUNNING, Stage.TARGET_BROWNOUT, committed=True, figures=figures)
        return part.status

    async def _answer(self, migration: str, order: AnswerOrder) -> RoleStatus:
        """The target's word, by courier."""
        part = self._part(migration)
        if order.word == "activated":
            self.leave(part.status.evm)
            await part.move(RolePhase.DONE, Stage.CLOSED, committed=True, wants_courier=False)
        elif order.word == "withdrawn":
            await part.move(RolePhase.ABORTED, Stage.CLOSED, committed=False, wants_courier=False)
        return part.status

    # ---------------------------------------------------------- relays

    async def _lend(self, migration: str, order: LendOrder) -> Lent:
        served = {
            grant.volume.id: NbdEndpoint(
                host=HOST, port=10900, export=grant.volume.id, tls_hostname=f"agent-{self.name}"
            )
            for grant in order.volumes
        }
        self.lent |= served.keys()
        return Lent(endpoints=served)

    async def _take_back(self, migration: str, order: TakeBackOrder) -> TakeBackOrder:
        self.lent -= set(self.lent if order.volumes is None else order.volumes)
        return order

    async def _hold(self, migration: str, order: HoldOrder) -> Relayed:
        return Relayed(
            volume=order.volume, is_local=False, is_flushed=True, read_bytes=8192, written_bytes=4096, round_trips=3,
            mean_ms=0.6, max_ms=4.0,
        )  # fmt: skip

    async def _go_on(self, migration: str, order: GoOnOrder) -> Relayed:
        return Relayed(volume=order.grant.volume.id, is_local=order.grant.relay is None)

    async def _play(self, order: HandoverOrder, script: Script) -> None:
        """The migration, as source and target do it between themselves."""
        source, target_agent = self.parts[order.migration], self.pool.agents[order.target.node]
        target = target_agent.parts[order.migration]
        progress = Progress(memory_bytes=512 * MIB, remaining_bytes=100 * MIB, sent_bytes=412 * MIB, passes=1)
        await source.move(RolePhase.PRECOPY, Stage.SOURCE_BROWNOUT, progress=progress)
        aborted = asyncio.create_task(source.abort.wait())
        going = asyncio.create_task(script.precopy.wait())
        try:
            await asyncio.wait([aborted, going], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (aborted, going):
                task.cancel()
        if source.abort.is_set() or script.target_fails:
            self.epochs[order.evm] = order.epoch_source
            self.evms[order.evm] = self.evms[order.evm].model_copy(update={"epoch": order.epoch_source})
            cause = "the target failed" if script.target_fails else "asked"
            await source.move(RolePhase.ABORTED, Stage.CLOSED, cause=cause)
            return
        await source.move(RolePhase.SWITCHOVER, Stage.BLACKOUT, figures={"stopped_at_s": 101.0})
        await script.blackout.wait()
        figures = {"given_at_s": 101.008, "qemu_downtime_ms": 9.0, "qemu_total_ms": 1000.0, "passes": 2}
        wants = {"wants_courier": script.cut}
        await source.move(RolePhase.GIVEN, Stage.BLACKOUT, committed=True, figures=figures, **wants)
        if script.cut:
            return
        target_agent.arrive(order.evm, order.epoch_target)
        figures = {"resumed_at_s": 101.010, "port_open_at_s": 101.012}
        await target.move(RolePhase.RUNNING, Stage.TARGET_BROWNOUT, committed=True, figures=figures)
        await script.clearing.wait()
        self.leave(order.evm)
        await source.move(RolePhase.DONE, Stage.CLOSED, committed=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work, name=f"migration at {self.name}")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
