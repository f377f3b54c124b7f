"""The simulated EFS over HTTP: ``/2015-02-01/...``, to be served beside the EC2 query API by the same app.

Thin, like ``face``: a request is checked against the service's model, meets the faults and the limits, and goes to the
state machine; what that wants of the data plane is carried out beside the requests.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI, Request, Response

from emp.lab.cloud.efs import Change, Deed, Efs
from emp.lab.cloud.efs_plane import EfsPlane, PlanePoint, PlaneTarget
from emp.lab.cloud.efs_wire import PREFIX, EfsModel
from emp.lab.cloud.errors import BROKEN, DENIED, CloudError
from emp.lab.cloud.knobs import Fault, Harm, Knobs
from emp.lab.cloud.serving import LAST_CALLS, Chores, Lost, Toll, answered

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
        self._toll = Toll(efs.knobs, efs.clock)
        self._chores = Chores(lambda: map(self._carry_out, efs.settle()), efs.due_s, efs.clock, changed)
        self.running = self._chores.running
        self.calls: deque[tuple[str, dict[str, Any]]] = deque(maxlen=LAST_CALLS)
        """the last requests that were read: action and parameters"""

    def turn(self, knobs: Knobs) -> None:
        """Put ``knobs`` in force, with full buckets and all their faults."""
        self._toll.turn(knobs)
        self.efs.turn(knobs)
        self._chores.look()

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
        fault = self._toll.fault(action)
        if fault is not None and fault.harm is Harm.LOST_ORDER:
            return Lost()
        self._refuse(action, fault)
        request = self._model.parse(action, path, query, body)
        self.calls.append((action, request))
        if fault is not None and fault.harm is Harm.SLOW:
            await asyncio.sleep(fault.delay_s)
        await self._chores.begin()
        status, answer = self._model.render(action, self.efs.perform(action, request))
        if not action.startswith("Describe"):
            try:
                self._changed()
            except OSError as error:
                log.error("EFS's records are not on disk: %s", error)
                raise CloudError("InternalServerError", "An internal error has occurred", status=BROKEN) from error
        self._chores.look()
        return answered(Response(answer, status, media_type="application/json"), fault)

    def _check_caller(self, authorization: str) -> None:
        match = _CREDENTIAL.match(authorization)
        if match is None or match[1] not in self._access_keys:
            message = "The security token included in the request is invalid."
            raise CloudError("UnrecognizedClientException", message, status=DENIED)

    def _refuse(self, action: str, fault: Fault | None) -> None:
        harm = fault.harm if fault else None
        if harm is Harm.DENIED:
            raise CloudError("AccessDeniedException", f"User is not authorized to perform elasticfilesystem:{action}")
        if self._toll.is_throttled(action, fault):
            raise CloudError("ThrottlingException", "Rate exceeded")
        if harm is Harm.BROKEN:
            raise CloudError("InternalServerError", "An internal error has occurred", status=BROKEN)

    # ------------------------------------------------------------------ the data plane

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
