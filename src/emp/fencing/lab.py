"""The power switch of a pool whose nodes have one: an HTTPS service such as a BMC gateway, or the lab's own.

=============================  ====================  ===========================================
``GET /v1/power/{node}``                             -> ``PowerState``; 404: it has no such node
``PUT /v1/power/{node}``       ``PowerState``        -> ``PowerState`` once it is so
=============================  ====================  ===========================================

Both ends show certificates of the pool; the switch has the role ``power`` and obeys only the controller.
"""

from __future__ import annotations

import time
from typing import Literal

from emp.model.base import Model
from emp.model.errors import EmpError, FenceFailed, OutcomeUnknown, Unavailable
from emp.model.names import check_name
from emp.model.node import Fence
from emp.wire.http import WireClient

PREFIX = "/v1/power"
SWITCH_S = 60.0
"""how long a node may take to go off"""


class PowerState(Model):
    state: Literal["on", "off"]


class LabFence:
    """See ``emp.fencing.base.FenceDriver``. ``client`` speaks as the controller to the switch at ``url``."""

    acts = True

    def __init__(self, client: WireClient, url: str) -> None:
        self._client = client
        self._url = url

    def describe(self, node: str) -> str:
        return f"switches {node} off at {self._url}; every EVM there ends at once, as in a power cut"

    async def fence(self, node: str, *, by: str) -> Fence:
        await self._switch(node, PowerState(state="off"))
        return Fence(driver="lab", by=by, at_s=time.time())

    async def lift(self, node: str) -> None:
        await self._switch(node, PowerState(state="on"))

    async def _switch(self, node: str, wanted: PowerState) -> None:
        """Order it and then read it: what the switch says of itself is the proof."""
        path = f"{PREFIX}/{check_name(node, field='node')}"
        hint = f"ask again; or make sure by hand that {node} is {wanted.state}"
        try:
            await self._client.request(
                "PUT", path, wanted, response_model=PowerState, idempotent=True, timeout_s=SWITCH_S
            )
            found = await self._client.request("GET", path, response_model=PowerState)
        except (Unavailable, OutcomeUnknown) as error:
            raise OutcomeUnknown(
                f"{node} may or may not be {wanted.state}: {error.message}", field="node", hint=hint
            ) from error
        except EmpError as error:
            raise FenceFailed(
                f"the switch does not turn {node} {wanted.state}: {error.message}", field="node", hint=hint
            ) from error
        if found != wanted:
            raise FenceFailed(f"{node} is {found.state}, says its switch", field="node", hint=hint)

    async def aclose(self) -> None:
        await self._client.aclose()
