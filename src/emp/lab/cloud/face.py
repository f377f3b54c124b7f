"""The simulated cloud over HTTP: ``POST /`` is the EC2 query API, ``/knobs`` shows the knobs and sets them.

Thin: a request is checked against the service's model, meets the faults and the limits, and goes to the state machine;
what that wants of the data plane is carried out beside the requests. Signatures are not verified, the access key is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from emp.lab.cloud.cloud import Change, Cloud, Deed
from emp.lab.cloud.errors import BROKEN, DENIED, THROTTLED, UNAUTHENTICATED, CloudError
from emp.lab.cloud.knobs import Bucket, Fault, Faults, Harm, Knobs
from emp.lab.cloud.network import AddressChange
from emp.lab.cloud.network_plane import NetworkPlane, NoNetworkPlane
from emp.lab.cloud.plane import DataPlane
from emp.lab.cloud.query import Ec2Model, render_error
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_role
from emp.wire.identity import Role
from emp.wire.points import with_points

log = logging.getLogger(__name__)

_CREDENTIAL = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/,\s]+)/\d{8}/[^/]+/ec2/aws4_request,")
LAST_CALLS = 10_000
POINTS = {
    "CreateVolume": "volumes.create", "DeleteVolume": "volumes.delete", "DescribeVolumes": "volumes.describe",
    "AttachVolume": "volumes.attach", "DetachVolume": "volumes.detach", "DescribeInstances": "volumes.instances",
    "ModifyVolume": "volumes.resize", "CreateTags": "volumes.tag", "DeleteTags": "volumes.untag",
}  # fmt: skip
"""action -> the point that a test may let it go wrong at (``emp.faults``): a pool's own volume server has the same"""
TICK_S = 0.5
"""how long a change that is due may wait where the clock is not the machine's"""


class Face:
    """Serves ``cloud`` to whoever has one of ``access_keys``; ``async with`` runs what becomes due by itself.

    ``keep`` puts the cloud's memory on disk, before anything is answered that rests on it; ``OSError`` if it cannot.
    """

    def __init__(
        self,
        cloud: Cloud,
        plane: DataPlane,
        *,
        access_keys: Collection[str],
        model: Ec2Model | None = None,
        keep: Callable[[], None] = lambda: None,
        network_plane: NetworkPlane | None = None,
    ) -> None:
        self.cloud = cloud
        self._plane = plane
        self._network_plane = network_plane or NoNetworkPlane()
        self._access_keys = frozenset(access_keys)
        self._model = model or Ec2Model()
        self._keep = keep
        self._faults = Faults(cloud.knobs.faults)
        self._buckets: dict[str, Bucket] = {}
        self._changes: set[asyncio.Task[None]] = set()
        self._asked = asyncio.Event()
        self.calls: deque[tuple[str, dict[str, str]]] = deque(maxlen=LAST_CALLS)
        """the last requests that came in: action and parameters"""
        self.requests: Counter[str] = Counter()
        """how many there were of each action that is known"""

    def turn(self, knobs: Knobs) -> None:
        """Put ``knobs`` in force, with full buckets and all their faults."""
        self._faults, self._buckets = Faults(knobs.faults), {}
        self.cloud.turn(knobs)
        self._keep()
        self._asked.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            for task in (ticking, *self._changes):
                task.cancel()
            await asyncio.gather(ticking, *self._changes, return_exceptions=True)

    async def api(self, request: Request) -> Response:
        """Answer one request of the query API."""
        parameters = dict(parse_qsl((await request.body()).decode(errors="replace"), keep_blank_values=True))
        action = parameters.get("Action", "")

        async def once(request: Request) -> Response:
            self.calls.append((action, parameters))
            self.requests[action if action in self.cloud.actions else "unknown"] += 1
            try:
                return await self._answer(action, parameters, request.headers.get("authorization", ""))
            except CloudError as error:
                log.info("%s: %s", action, error)
                return Response(render_error(error), error.status, media_type="text/xml")

        return await with_points(POINTS.get(action, "volumes.unknown"), once)(request)

    async def _answer(self, action: str, parameters: Mapping[str, str], authorization: str) -> Response:
        self._check_caller(authorization)
        if not action:
            raise CloudError("MissingAction", "The request must contain the parameter Action")
        if action not in self.cloud.actions:
            raise CloudError("InvalidAction", f"The action {action} is not valid for this web service.")
        if (version := parameters.get("Version")) != self._model.version:
            raise CloudError("NoSuchVersion", f"The requested version ({version}) of service AmazonEC2 does not exist")
        fault = self._faults.take(action)
        if fault is not None and fault.harm is Harm.LOST_ORDER:
            return Lost()
        self._refuse(action, fault)
        request = self._model.parse(action, parameters)
        if fault is not None and fault.harm is Harm.SLOW:
            await asyncio.sleep(fault.delay_s)
        await self._pump()
        answer = self._model.render(action, self.cloud.perform(action, request))
        if not action.startswith("Describe"):
            self._remember(action, request)
        self._asked.set()
        match fault:
            case Fault(harm=Harm.LOST_REPLY):
                return Lost()
            case Fault(harm=Harm.SILENT):
                return Silent()
        return Response(answer, media_type="text/xml")

    def _remember(self, action: str, request: Mapping[str, Any]) -> None:
        try:
            self._keep()
        except OSError as error:
            log.error("the cloud's memory is not on disk: %s", error)
            raise CloudError("InternalError", "An internal error has occurred", status=BROKEN) from error
        if action in ("CreateTags", "DeleteTags"):
            for volume in filter(None, map(self.cloud.shown, request["Resources"])):
                self._plane.on_tagged(volume)

    def _check_caller(self, authorization: str) -> None:
        match = _CREDENTIAL.match(authorization)
        if match is None or match[1] not in self._access_keys:
            message = "AWS was not able to validate the provided access credentials"
            raise CloudError("AuthFailure", message, status=UNAUTHENTICATED)

    def _refuse(self, action: str, fault: Fault | None) -> None:
        harm = fault.harm if fault else None
        if harm is Harm.DENIED:
            message = "You are not authorized to perform this operation."
            raise CloudError("UnauthorizedOperation", message, status=DENIED)
        if harm is Harm.THROTTLED or not self._has_token(action):
            raise CloudError("RequestLimitExceeded", "Request limit exceeded.", status=THROTTLED)
        if harm is Harm.BROKEN:
            raise CloudError("InternalError", "An internal error has occurred", status=BROKEN)

    def _has_token(self, action: str) -> bool:
        limits = self.cloud.knobs.limits
        if limits is None:
            return True
        if action not in self._buckets:
            size, per_s = (
                (limits.describe_bucket, limits.describe_per_s)
                if action.startswith("Describe")
                else (limits.change_bucket, limits.change_per_s)
            )
            self._buckets[action] = Bucket(size, per_s, self.cloud.clock)
        return self._buckets[action].take()

    # ------------------------------------------------------------------ the data plane

    async def _pump(self) -> None:
        """Begin what is due. A data plane that has nothing to wait for is done when this returns."""
        begun = {asyncio.create_task(self._carry_out(change)) for change in self.cloud.settle()}
        begun |= {asyncio.create_task(self._route(change)) for change in self.cloud.network.settle()}
        for task in begun:
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)
        if begun:
            await asyncio.wait(begun, timeout=0)

    async def _carry_out(self, change: Change) -> None:
        try:
            match change.deed:
                case Deed.OPEN:
                    await self._plane.on_attached(change.volume, change.instance, change.epoch)
                case Deed.CLOSE:
                    await self._plane.on_detached(change.volume, change.instance, change.epoch)
                case Deed.DELETE:
                    await self._plane.on_deleted(change.volume)
                case Deed.GROW:
                    await self._plane.on_grown(change.volume, change.exports)
        except Exception:  # whatever it was, the cloud stays up, and asks again
            log.exception("the data plane could not %s %s at %s", change.deed, change.volume.id, change.instance)
            self.cloud.failed(change)
        else:
            self.cloud.done(change)
            try:
                self._keep()
            except OSError as error:  # a later process asks the data plane again, which has it done already
                log.error("the cloud's memory is not on disk: %s", error)
        self._asked.set()

    async def _route(self, change: AddressChange) -> None:
        network = self.cloud.network
        try:
            await self._network_plane.on_address_moved(change.address, change.interface)
        except Exception:  # as above
            log.exception("the data plane could not move %s to %s", change.address, change.interface)
            network.failed(change)
        else:
            network.done(change)
            try:
                self._keep()
            except OSError as error:
                log.error("the cloud's memory is not on disk: %s", error)
        self._asked.set()

    async def _tick(self) -> None:
        while True:
            self._asked.clear()
            await self._pump()
            due_s = self.cloud.due_s()
            wait_s = None if due_s is None else min(TICK_S, max(0.0, due_s - self.cloud.clock()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._asked.wait()


class _Running(Protocol):
    def running(self) -> AbstractAsyncContextManager[None]: ...

    def turn(self, knobs: Knobs) -> None: ...


class Beside(_Running, Protocol):
    """An API of the same cloud, served by the same app under the same knobs (``efs_face.EfsFace``)."""

    def mount(self, app: FastAPI) -> None: ...


def make_app(face: Face, routers: Iterable[APIRouter] = (), others: Sequence[Beside] = ()) -> FastAPI:
    """Return the app with more ``routers``; its lifespan runs ``face`` and the ``others`` beside it.

    The knobs obey the controller's certificate alone.
    """

    together: tuple[_Running, ...] = (face, *others)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in together:
                await stack.enter_async_context(each.running())
            yield

    app = FastAPI(title="EMP simulated cloud", lifespan=lifespan, openapi_url=None)
    install_error_handlers(app)
    app.add_route("/", face.api, methods=["POST"])
    for each in others:
        each.mount(app)
    knobs = APIRouter(prefix="/knobs", dependencies=[Depends(require_role(Role.CONTROLLER))])

    @knobs.get("")
    async def show() -> Knobs:
        return face.cloud.knobs

    @knobs.put("")
    async def turn(wanted: Knobs) -> Knobs:
        for each in together:
            each.turn(wanted)
        return face.cloud.knobs

    for router in (knobs, *routers):
        app.include_router(router)
    return app


class Lost(Response):
    """Begins and never ends: the server closes the connection, and the caller cannot know what came of its order."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Without a length it is sent in chunks, of which the last never comes: nobody takes that for an empty answer.
        headers = [(b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


class Silent(Response):
    """No answer at all, until the caller hangs up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
