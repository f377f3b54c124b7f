"""Looks at volumes often, and asks EC2 seldom: who asks while a call is under way shares the next one.

A volume that moves is looked at several times a second, because its guest waits, and EC2 counts requests, not volumes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence

from emp.aws.api import Ec2Api
from emp.aws.patience import Time
from emp.model.errors import BadInput, EmpError, NotFound
from emp.volumes.ebs_view import EbsView

CALLS_PER_S = 15.0
"""of the 20 that DescribeVolumes may be asked for good
(https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html)"""
BURST = 10.0
"""calls at once, of its 100: who begins to move a volume does not wait to look at it"""
_VOLUME_ID = re.compile(r"vol-([0-9a-f]{8}|[0-9a-f]{17})")


class Looks:
    """``nodes``: instance id -> node."""

    def __init__(self, api: Ec2Api, times: Time, nodes: Mapping[str, str]) -> None:
        self._api = api
        self._times = times
        self._nodes = nodes
        self._asked: dict[str, list[asyncio.Future[EbsView]]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._allowed, self._counted_s = BURST, times.clock()

    async def see(self, volume: str) -> EbsView:
        """Return ``volume`` as EC2 describes it in a call that begins after this one.

        Raises ``BadInput``, ``NotFound``, or what ``Ec2Api.ask`` does.
        """
        check_volume_id(volume)
        view: asyncio.Future[EbsView] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(volume, []).append(view)
        if self._asking is None:
            self._asking = asyncio.create_task(self._answer_all())
        return await view

    async def aclose(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _answer_all(self) -> None:
        try:
            while self._asked:
                await self._until_allowed()
                asked, self._asked = self._asked, {}
                await self._answer(asked)
        finally:
            self._asking = None

    async def _until_allowed(self) -> None:
        now_s = self._times.clock()
        self._allowed = min(BURST, self._allowed + (now_s - self._counted_s) * CALLS_PER_S) - 1
        self._counted_s = now_s
        if self._allowed < 0:
            await self._times.sleep(-self._allowed / CALLS_PER_S)

    async def _answer(self, asked: Mapping[str, Sequence[asyncio.Future[EbsView]]]) -> None:
        outcomes: Mapping[str, EbsView | BaseException]
        try:
            outcomes = await self._describe(list(asked))
        except BaseException as error:
            outcomes = dict.fromkeys(asked, error)
            raise
        finally:
            for volume, views in asked.items():
                for view in views:
                    _settle(view, outcomes[volume])

    async def _describe(self, volumes: Sequence[str]) -> dict[str, EbsView | EmpError]:
        """One that is not there makes the whole call fail; then each is asked for by itself."""
        try:
            answer = await self._api.ask("describe_volumes", VolumeIds=volumes)
        except NotFound as error:
            if len(volumes) == 1:
                return {volumes[0]: error}
            outcomes = [await self._describe([volume]) for volume in volumes]
            return {volume: outcome for one in outcomes for volume, outcome in one.items()}
        except EmpError as error:
            return dict.fromkeys(volumes, error)
        views = (EbsView(record, self._nodes) for record in answer["Volumes"])
        found: dict[str, EbsView | EmpError] = {view.id: view for view in views}
        missing = {volume: NotFound(f"there is no volume {volume}", field="volume") for volume in volumes}
        return {volume: found.get(volume, missing[volume]) for volume in volumes}


def check_volume_id(volume: str) -> str:
    """Return ``volume`` if it can be the id of one; raise ``BadInput`` otherwise."""
    if not _VOLUME_ID.fullmatch(volume):
        shown = volume if len(volume) <= 40 else volume[:37] + "..."
        hint = "an id is vol- and 17 hexadecimal digits"
        raise BadInput(f"{shown!r} is not the id of a volume", field="volume", hint=hint)
    return volume


def _settle(view: asyncio.Future[EbsView], outcome: EbsView | BaseException) -> None:
    if view.done():
        return  # whoever asked was cancelled meanwhile
    match outcome:
        case asyncio.CancelledError():
            view.cancel()
        case BaseException():
            view.set_exception(outcome)
        case _:
            view.set_result(outcome)
