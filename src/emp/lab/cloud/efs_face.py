"""The simulated EFS over HTTP: ``/2015-02-01/...``, to be served beside the EC2 query API by the same app.

Thin, like ``face``: a request is checked against the service's model, meets the faults and the limits, and goes to the
state machine; what that wants of the data plane is carried out beside the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response

from emp.lab.cloud.efs import Change, Deed, Efs
from emp.lab.cloud.efs_plane import EfsPlane, PlanePoint, PlaneTarget
from emp.lab.cloud.efs_wire import PREFIX, EfsModel
from emp.lab.cloud.errors import BROKEN, DENIED, CloudError
from emp.lab.cloud.face import LAST_CALLS, TICK_S, Lost, Silent
from emp.lab.cloud.knobs import Bucket, Fault, Faults, Harm, Knobs

log = logging.getLogger(__name__)

_CREDENTIAL = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/,\s]+)/\d{8}/[^/]+/elasticfilesystem/aws4_request,")


class EfsFace:
    """Serves ``efs`` to whoever has one of ``access_keys``; ``running`` carries out what becomes due by itself.

    ``changed`` is called after each change of the records, before it is answered: it writes them down, or raises
    ``OSError``.
    """

    def __init__(
        self,
        efs: Efs,
        plane: EfsPlane,
        *,
        access_keys: Collection[str],
        changed: Callable[[], None] = lambda: None,
        model: EfsModel | None = None,
    ) -> None:
        self.efs = efs
        self._plane = plane
        self._access_keys = frozenset(access_keys)
        self._changed = changed
        self._model = model or EfsModel(efs.actions)
        self._faults = Faults(efs.knobs.faults)
        self._buckets: dict[str, Bucket] = {}
        self._changes: set[asyncio.Task[None]] = set()
        self._asked = asyncio.Event()
        self.calls: deque[tuple[str, dict[str, Any]]] = deque(maxlen=LAST_CALLS)
        """the last requests that were read: action and parameters"""

    def turn(self, knobs: Knobs) -> None:
        """Put ``knobs`` in force, with full buckets and all their faults."""
        self._faults, self._buckets = Faults(knobs.faults), {}
        self.efs.turn(knobs)
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

    def mount(self, app: FastAPI) -> None:
        """Add the API's routes to ``app``, whose lifespan has to run ``running``."""
        app.add_route(PREFIX + "/{rest:path}", self.api, methods=["GET", "POST", "PUT", "DELETE"])

    async def api(self, request: Request) -> Response:
        """Answer one request."""
        action: str | None = None
        try:
            self._check_caller(request.headers.get("authorization", ""))
            path = request.scope["raw_path"].decode().partition("?")[0]
            action = self._model.action_of(request.method, path)
            return await self._answer(action, path, request.query_params.multi_items(), await request.body())
        except CloudError as error:
            log.info("%s: %s", action, error)
            status, headers, body = self._model.error(action, error)
            return Response(body, status, headers, media_type="application/json")

    async def _answer(self, action: str, path: str, query: list[tuple[str, str]], body: bytes) -> Response:
        fault = self._faults.take(action)
        if fault is not None and fault.harm is Harm.LOST_ORDER:
            return Lost()
        self._refuse(action, fault)
        request = self._model.parse(action, path, query, body)
        self.calls.append((action, request))
        if fault is not None and fault.harm is Harm.SLOW:
            await asyncio.sleep(fault.delay_s)
        await self._pump()
        status, answer = self._model.render(action, self.efs.perform(action, request))
        if not action.startswith("Describe"):
            try:
                self._changed()
            except OSError as error:
                log.error("EFS's records are not on disk: %s", error)
                raise CloudError("InternalServerError", "An internal error has occurred", status=BROKEN) from error
        self._asked.set()
        match fault:
            case Fault(harm=Harm.LOST_REPLY):
                return Lost()
            case Fault(harm=Harm.SILENT):
                return Silent()
        return Response(answer, status, media_type="application/json")

    def _check_caller(self, authorization: str) -> None:
        match = _CREDENTIAL.match(authorization)
        if match is None or match[1] not in self._access_keys:
            message = "The security token included in the request is invalid."
            raise CloudError("UnrecognizedClientException", message, status=DENIED)

    def _refuse(self, action: str, fault: Fault | None) -> None:
        harm = fault.harm if fault else None
        if harm is Harm.DENIED:
            raise CloudError("AccessDeniedException", f"User is not authorized to perform elasticfilesystem:{action}")
        if harm is Harm.THROTTLED or not self._has_token(action):
            raise CloudError("ThrottlingException", "Rate exceeded")
        if harm is Harm.BROKEN:
            raise CloudError("InternalServerError", "An internal error has occurred", status=BROKEN)

    def _has_token(self, action: str) -> bool:
        """EFS publishes no sizes of its buckets; those of EC2 stand for them (``docs/cloud.md``)."""
        limits = self.efs.knobs.limits
        if limits is None:
            return True
        if action not in self._buckets:
            describes = action.startswith("Describe")
            size = limits.describe_bucket if describes else limits.change_bucket
            per_s = limits.describe_per_s if describes else limits.change_per_s
            self._buckets[action] = Bucket(size, per_s, self.efs.clock)
        return self._buckets[action].take()

    # ------------------------------------------------------------------ the data plane

    async def _pump(self) -> None:
        """Begin what is due. A data plane that has nothing to wait for is done when this returns."""
        changes = self.efs.settle()
        begun = {asyncio.create_task(self._carry_out(change)) for change in changes}
        for task in begun:
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)
        if begun:
            await asyncio.wait(begun, timeout=0)

    async def _carry_out(self, change: Change) -> None:
        try:
            match change.deed, change.what:
                case Deed.OPEN, PlaneTarget() as target:
                    await self._plane.on_opened(target)
                case Deed.CLOSE, PlaneTarget() as target:
                    await self._plane.on_closed(target)
                case Deed.MAKE, PlanePoint() as point:
                    await self._plane.on_access_point(point)
                case Deed.REMOVE, _:
                    await self._plane.on_removed(change.id)
        except Exception:  # whatever it was, the cloud stays up, and asks again
            log.exception("the data plane could not %s %s", change.deed, change.id)
            self.efs.failed(change)
        else:
            self.efs.done(change)
        try:
            self._changed()
        except OSError as error:  # a later process asks the data plane again, which has it done already
            log.error("EFS's records are not on disk: %s", error)
        self._asked.set()

    async def _tick(self) -> None:
        while True:
            self._asked.clear()
            await self._pump()
            due_s = self.efs.due_s()
            wait_s = None if due_s is None else min(TICK_S, max(0.0, due_s - self.efs.clock()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._asked.wait()
