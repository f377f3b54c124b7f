"""The controller's side of the agents' API: one client per agent, whose connections stay open between orders.

Raises what ``emp.wire.http`` raises: ``Unreachable`` (never sent), ``OutcomeUnknown`` (an order sent, not answered),
``Unavailable`` (a question not answered), or the agent's own typed error.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterable

import httpx2
from pydantic import ValidationError

from emp.model.errors import EmpError, Internal
from emp.model.node import EvmReport, Node, NodeReport
from emp.model.orders import (
    WATCH_ALIVE_S,
    AbortOrder,
    AddressMovedOrder,
    AnswerOrder,
    GoOnOrder,
    GoOrder,
    HandoverOrder,
    HoldOrder,
    LendOrder,
    Lent,
    Prepared,
    PrepareOrder,
    Relayed,
    RetireOrder,
    RoleStatus,
    StartOrder,
    StopOrder,
    TakeBackOrder,
    VolumesOrder,
)
from emp.wire.exchange import FAILURES, Exchange, Target
from emp.wire.http import WireClient
from emp.wire.identity import Identity, Role

START_S = 60.0
"""how long a node may take to make a machine"""
WARM_S = 20.0
"""less than the time after which an idle connection is closed (30 s)"""
ABORT_MARGIN_S = 5.0
"""beyond the time that an abort may wait for its decision"""
RELAY_S = 30.0
"""how long a node may take with a relay: a process is started, a device is found"""
MARGIN_S = 15.0
"""beyond the grace that a guest gets to shut down"""


class AgentClient:
    """One node's agent, as the controller sees it."""

    def __init__(self, node: str, url: str, tls: ssl.SSLContext) -> None:
        self.url = url
        server = Identity(Role.AGENT, node)
        self._wire = WireClient(url, tls=tls, server=server)
        self._target = Target(url, tls=tls, server=server, token=None, timeout_s=10.0, connect_s=3.0)
        self._bytes = httpx2.AsyncClient(**self._target.options)

    async def report(self) -> NodeReport:
        return await self._wire.request("GET", "/v1/node", response_model=NodeReport)

    async def start(self, order: StartOrder) -> EvmReport:
        path = f"/v1/evms/{order.spec.name}/start"
        return await self._wire.request("POST", path, order, response_model=EvmReport, timeout_s=START_S)

    async def stop(self, evm: str, order: StopOrder) -> EvmReport:
        timeout_s = order.grace_s + MARGIN_S
        return await self._wire.request(
            "POST", f"/v1/evms/{evm}/stop", order, response_model=EvmReport, timeout_s=timeout_s
        )

    async def retire(self, evm: str, order: RetireOrder) -> EvmReport:
        return await self._wire.request("POST", f"/v1/evms/{evm}/retire", order, response_model=EvmReport)

    async def change_volumes(self, evm: str, order: VolumesOrder) -> EvmReport:
        path = f"/v1/evms/{evm}/volumes"
        return await self._wire.request("POST", path, order, response_model=EvmReport, timeout_s=START_S)

    async def prepare(self, order: PrepareOrder) -> Prepared:
        path = f"/v1/migrations/{order.migration}/prepare"
        return await self._wire.request("POST", path, order, response_model=Prepared, timeout_s=START_S)

    async def hand_over(self, order: HandoverOrder) -> RoleStatus:
        path = f"/v1/migrations/{order.migration}/handover"
        return await self._wire.request("POST", path, order, response_model=RoleStatus)

    async def lend(self, order: LendOrder) -> Lent:
        path = f"/v1/migrations/{order.migration}/lend"
        return await self._wire.request("POST", path, order, response_model=Lent, idempotent=True, timeout_s=RELAY_S)

    async def take_back(self, migration: str, order: TakeBackOrder) -> None:
        path = f"/v1/migrations/{migration}/take-back"
        await self._wire.request("POST", path, order, idempotent=True, timeout_s=RELAY_S)

    async def hold(self, migration: str, order: HoldOrder) -> Relayed:
        path, limit_s = f"/v1/migrations/{migration}/hold", order.within_s + RELAY_S
        return await self._wire.request("POST", path, order, response_model=Relayed, idempotent=True, timeout_s=limit_s)

    async def go_on(self, migration: str, order: GoOnOrder) -> Relayed:
        path = f"/v1/migrations/{migration}/go-on"
        return await self._wire.request("POST", path, order, response_model=Relayed, idempotent=True, timeout_s=RELAY_S)

    async def abort(self, migration: str, order: AbortOrder) -> RoleStatus:
        """Ask for the way back; asking again changes nothing. ``NotFound`` where the agent knows nothing of it."""
        path = f"/v1/migrations/{migration}/abort"
        timeout_s = order.wait_s + ABORT_MARGIN_S
        return await self._wire.request(
            "POST", path, order, response_model=RoleStatus, idempotent=True, timeout_s=timeout_s
        )

    async def go(self, migration: str, order: GoOrder) -> RoleStatus:
        """Carry the source's GO to the target; carrying it again changes nothing."""
        path = f"/v1/migrations/{migration}/go"
        return await self._wire.request("POST", path, order, response_model=RoleStatus, idempotent=True)

    async def answer(self, migration: str, order: AnswerOrder) -> RoleStatus:
        """Carry the target's answer to the source; carrying it again changes nothing."""
        path = f"/v1/migrations/{migration}/answer"
        return await self._wire.request("POST", path, order, response_model=RoleStatus, idempotent=True)

    async def address_moved(self, migration: str, order: AddressMovedOrder) -> RoleStatus:
        """Tell the source that the cloud sends to the target now; telling it again changes nothing."""
        path = f"/v1/migrations/{migration}/address-moved"
        return await self._wire.request("POST", path, order, response_model=RoleStatus, idempotent=True)

    async def watch(self, migration: str) -> AsyncGenerator[RoleStatus]:
        """Yield the snapshots of this node's part, until the stream ends or breaks. Raises ``NotFound``."""
        path = f"/v1/migrations/{migration}/watch"
        async with contextlib.aclosing(self._wire.events(path, quiet_s=3 * WATCH_ALIVE_S)) as events:
            async for event in events:
                yield _status(event.data)

    async def console(self, evm: str, *, backlog: bool) -> AsyncGenerator[bytes]:
        """Yield what the EVM's serial console shows until its machine ends; with ``backlog`` also a little before."""
        exchange = Exchange(self._target, "GET", f"/v1/evms/{evm}/console", idempotent=True, timeout_s=None)
        parameters = exchange.parameters(None, {"backlog": backlog}, trace=exchange.atrace, read_s=None)
        try:
            async with self._bytes.stream(**parameters) as response:
                if not response.is_success:
                    await response.aread()
                    raise exchange.error(response)
                async for data in response.aiter_raw():
                    yield data
        except FAILURES as error:
            raise exchange.failure(error) from error

    async def type(self, evm: str, data: bytes) -> None:
        """Send input to the EVM's serial console."""
        exchange = Exchange(self._target, "POST", f"/v1/evms/{evm}/console", idempotent=False, timeout_s=None)
        parameters = exchange.parameters(None, None, trace=exchange.atrace, read_s=self._target.timeout_s)
        headers = {"Content-Type": "application/octet-stream"}
        try:
            response = await self._bytes.request(**(parameters | {"content": data, "headers": headers}))
        except FAILURES as error:
            raise exchange.failure(error) from error
        if not response.is_success:
            raise exchange.error(response)

    async def aclose(self) -> None:
        await self._wire.aclose()
        await self._bytes.aclose()


def _status(data: str) -> RoleStatus:
    try:
        return RoleStatus.model_validate_json(data)
    except ValidationError as error:
        hint = "do both ends run the same version of emp?"
        raise Internal(f"an agent's snapshot of a migration cannot be read: {error}", hint=hint) from error


class Agents:
    """Clients of every node's agent, made when first needed and made anew when a node's address changes."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._clients: dict[str, AgentClient] = {}
        self._outdated: list[AgentClient] = []

    def of(self, node: Node) -> AgentClient:
        host = f"[{node.report.address}]" if ":" in node.report.address else node.report.address
        url = f"https://{host}:{node.report.port}"
        client = self._clients.get(node.name)
        if client is None or client.url != url:
            if client is not None:
                self._outdated.append(client)  # an order may still be on it
            client = self._clients[node.name] = AgentClient(node.name, url, self._tls)
        return client

    async def keep_warm(self, ready: Callable[[], Iterable[Node]]) -> None:
        """For ever: keep a connection to each ready node's agent open, so that no order waits for a TLS handshake."""
        asked_at: dict[AgentClient, float] = {}
        while True:
            clients = [self.of(node) for node in ready()]
            now = time.monotonic()
            asked_at = {client: asked_at.get(client, -WARM_S) for client in clients}
            for client in clients:
                if now - asked_at[client] >= WARM_S:
                    asked_at[client] = now
                    with contextlib.suppress(EmpError):  # heartbeats tell whether it is there
                        await client.report()
            await asyncio.sleep(1.0)  # until a node may have come

    async def aclose(self) -> None:
        for client in (*self._clients.values(), *self._outdated):
            await client.aclose()
