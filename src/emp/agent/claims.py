"""Claims of this node's volumes under a new epoch: behind every commit and every way back, and never in their way.

The guest runs already. A claim is repeated until the volume service has it, or says that a newer owner has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from emp.model.errors import Conflict, EmpError, NotFound
from emp.model.orders import VolumeGrant
from emp.model.volume import Attachment
from emp.volumes.base import VolumeClaims

log = logging.getLogger(__name__)

REPEAT_S = 1.0


class Claims:
    def __init__(self, service: VolumeClaims) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, grants: Iterable[VolumeGrant], *, epoch: int) -> None:
        """Claim every volume of ``grants`` for this node; return at once."""
        for grant in grants:
            if grant.attachment is None:  # it is the source's yet
                continue
            if grant.attachment.epoch > epoch:  # made for it while it ran: newer than its ownership
                continue
            claiming = self._claim(grant.attachment, epoch)
            task = asyncio.create_task(claiming, name=f"claim {grant.volume.id} under {epoch}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _claim(self, attachment: Attachment, epoch: int) -> None:
        while True:
            try:
                await self._service.claim(attachment, epoch=epoch)
            except (Conflict, NotFound) as error:
                log.error("%s: not claimed under %d: %s", attachment.volume, epoch, error)
                return
            except EmpError as error:
                log.warning("%s: not claimed yet under %d: %s", attachment.volume, epoch, error)
            else:
                return
            await asyncio.sleep(REPEAT_S)

    async def close(self) -> None:
        """The agent stops: the next one claims again what it adopts."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._service.aclose()
