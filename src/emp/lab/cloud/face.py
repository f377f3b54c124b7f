"""The simulated cloud over HTTP: ``POST /`` is the EC2 query API, ``/knobs`` shows the knobs and sets them.

Thin: a request is checked against the service's model, meets the faults and the limits, and goes to the state machine;
what that wants of the data plane is carried out beside the requests. Signatures are not verified, the access key is.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, FastAPI, Request, Response

from emp.lab.cloud.cloud import Change, Cloud, Deed
from emp.lab.cloud.errors import BROKEN, DENIED, THROTTLED, UNAUTHENTICATED, CloudError
from emp.lab.cloud.knobs import Fault, Harm, Knobs
from emp.lab.cloud.network import AddressChange
from emp.lab.cloud.network_plane import NetworkPlane, NoNetworkPlane
from emp.lab.cloud.plane import DataPlane
from emp.lab.cloud.query import Ec2Model, render_error
from emp.lab.cloud.serving import LAST_CALLS, Chores, Lost, Toll, answered
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_role
from emp.wire.identity import Role
from emp.wire.points import with_points

log = logging.getLogger(__name__)

_CREDENTIAL = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/,\s]+)/\d{8}/[^/]+/ec2/aws4_request,")
POINTS = {
    "CreateVolume": "volumes.create", "DeleteVolume": "volumes.delete", "DescribeVolumes": "volumes.describe",
    "AttachVolume": "volumes.attach", "DetachVolume": "volumes.detach", "DescribeInstances": "volumes.instances",
    "ModifyVolume": "volumes.resize", "CreateTags": "volumes.tag", "DeleteTags": "volumes.untag",
}  # fmt: skip
"""action -> the point that a test may let it go wrong at (``emp.faults``): a pool's own volume server has the same"""


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
        self._toll = Toll(cloud.knobs, cloud.clock)
        self._chores = Chores(self._settle, cloud.due_s, cloud.clock, keep)
        self.running = self._chores.running
        self.calls: deque[tuple[str, dict[str, str]]] = deque(maxlen=LAST_CALLS)
        """the last requests that came in: action and parameters"""
        self.requests: Counter[str] = Counter()
        """how many there were of each action that is known"""

    def turn(self, knobs: Knobs) -> None:
        """Put ``knobs`` in force, with full buckets and all their faults."""
        self._toll.turn(knobs)
        self.cloud.turn(knobs)
        self._keep()
        self._chores.look()

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
        fault = self._toll.fault(action)
        if fault is not None and fault.harm is Harm.LOST_ORDER:
            return Lost()
        self._refuse(action, fault)
        request = self._model.parse(action, parameters)
        if fault is not None and fault.harm is Harm.SLOW:
            await asyncio.sleep(fault.delay_s)
        await self._chores.begin()
        answer = self._model.render(action, self.cloud.perform(action, request))
        if not action.startswith("Describe"):
            self._remember(action, request)
        self._chores.look()
        return answered(Response(answer, media_type="text/xml"), fault)

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
        if self._toll.is_throttled(action, fault):
            raise CloudError("RequestLimitExceeded", "Request limit exceeded.", status=THROTTLED)
        if harm is Harm.BROKEN:
            raise CloudError("InternalError", "An internal error has occurred", status=BROKEN)

    # ------------------------------------------------------------------ the data plane

    def _settle(self) -> Iterator[Coroutine[Any, Any, None]]:
        yield from map(self._carry_out, self.cloud.settle())
        yield from map(self._route, self.cloud.network.settle())

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

    async def _route(self, change: AddressChange) -> None:
        network = self.cloud.network
        try:
            await self._network_plane.on_address_moved(change.address, change.interface)
        except Exception:  # as above
            log.exception("the data plane could not move %s to %s", change.address, change.interface)
            network.failed(change)
        else:
            network.done(change)


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
