"""Bare-metal instances of Amazon EC2: StopInstances is the fence, and the state ``stopped`` its proof.

The instance is asked to stop in order first, then by force; an instance that is stopped or terminated runs nothing and
holds no address that answers. A forced DetachVolume per volume is not used: it cuts off the volumes alone, and the
guest would go on answering. **Not run here against AWS**: the order of calls is tested against recorded answers
(``botocore.stub``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from emp.model.errors import EmpError, FenceFailed, OutcomeUnknown
from emp.model.node import Fence

IN_ORDER_S = 60.0
"""how long an instance gets to stop by itself"""
BY_FORCE_S = 600.0
"""metal takes minutes to stop"""
POLL_S = 5.0
_OFF = frozenset({"stopped", "terminated"})


class Ec2Fence:
    """See ``emp.fencing.base.FenceDriver``. ``instances``: node -> instance id."""

    acts = True

    def __init__(
        self,
        instances: Mapping[str, str],
        *,
        region: str,
        client: Callable[[], Any] | None = None,
        poll_s: float = POLL_S,
        in_order_s: float = IN_ORDER_S,
        by_force_s: float = BY_FORCE_S,
    ) -> None:
        self._instances = dict(instances)
        self._make = client or (lambda: _client(region))
        self._made: Any = None
        self._poll_s = poll_s
        self._in_order_s = in_order_s
        self._by_force_s = by_force_s

    def describe(self, node: str) -> str:
        return f"stops the instance {self._instance(node)} of {node}, by force if it must; every EVM there ends"

    async def fence(self, node: str, *, by: str) -> Fence:
        instance = self._instance(node)
        if await self._state(instance) not in _OFF:
            await self._ask("stop_instances", InstanceIds=[instance])
            if not await self._is_off_within(instance, self._in_order_s):
                await self._ask("stop_instances", InstanceIds=[instance], Force=True)
                if not await self._is_off_within(instance, self._by_force_s):
                    state = await self._state(instance)
                    hint = "ask again; the instance's state is the proof"
                    raise FenceFailed(f"{instance} of {node} is still {state}", field="node", hint=hint)
        return Fence(driver="ec2", by=by, at_s=time.time())

    async def lift(self, node: str) -> None:
        """Nothing to do: the instance runs, or its agent would not have reported."""

    async def aclose(self) -> None:
        if self._made is not None:
            self._made.close()

    def _instance(self, node: str) -> str:
        if node not in self._instances:
            hint = "add it to fencing.instances in the controller's configuration"
            raise FenceFailed(f"no instance is named for node {node}", field="node", hint=hint)
        return self._instances[node]

    async def _is_off_within(self, instance: str, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while await self._state(instance) not in _OFF:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(self._poll_s)
        return True

    async def _state(self, instance: str) -> str:
        answer = await self._ask("describe_instances", InstanceIds=[instance])
        found = [i for reservation in answer["Reservations"] for i in reservation["Instances"]]
        return str(found[0]["State"]["Name"]) if found else "unknown"

    async def _ask(self, call: str, **parameters: Any) -> Any:
        """Make one call of the EC2 API in a thread of its own: boto3 blocks."""
        from botocore.exceptions import BotoCoreError, ClientError

        if self._made is None:
            self._made = await asyncio.to_thread(self._make)
        try:
            return await asyncio.to_thread(getattr(self._made, call), **parameters)
        except ClientError as error:
            raise _refused(call, error) from error
        except BotoCoreError as error:
            raise OutcomeUnknown(f"EC2 did not answer {call}: {error}", field="node", hint="ask again") from error


def _refused(call: str, error: Any) -> EmpError:
    code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
    if status >= 500:
        return OutcomeUnknown(f"EC2 failed at {call}: {code}", field="node", hint="ask again")
    return FenceFailed(f"EC2 refuses {call}: {error}", field="node", hint="check the instance id and the permissions")


def _client(region: str) -> Any:
    import boto3  # loaded only where it is used: it is large

    return boto3.client("ec2", region_name=region)
