"""What can be set on the simulated cloud from outside while it runs: latency, request limits, faults."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import StrEnum

from pydantic import Field

from emp.model.base import Model


class Latency(Model):
    """How long a state lasts that AWS passes through, in seconds."""

    create_s: float = Field(default=0.0, ge=0)
    """``creating``"""
    delete_s: float = Field(default=0.0, ge=0)
    """``deleting``"""
    attach_s: float = Field(default=0.0, ge=0)
    """``attaching``, before the data plane is asked"""
    detach_s: float = Field(default=0.0, ge=0)
    """``detaching``, before the data plane is asked"""
    modify_s: float = Field(default=0.0, ge=0)
    """``modifying``, before the data plane is asked: then the volume has its new size"""
    optimize_s: float = Field(default=0.0, ge=0)
    """``optimizing`` after that"""


INSTANT = Latency()
AWS = Latency(create_s=1.5, delete_s=1.0, attach_s=2.5, detach_s=4.5, modify_s=3.0, optimize_s=600.0)
"""A new size takes "a few seconds" (https://docs.aws.amazon.com/ebs/latest/userguide/ebs-modify-volume.html).
Detach and attach sum to 7 s: what the project's first page says of moving a gp2 or gp3 volume on AWS."""
PROFILES = {"instant": INSTANT, "aws": AWS}


class RemapDelay(Model):
    """How long an address takes from one interface to another: ``least_s`` and an exponential tail, up to ``most_s``.

    AWS gives no figures (it says that it is asynchronous), and says nothing of IPv6, which takes as long here from the
    order to assign it. The nth move of a cloud under the same seed takes the same.
    """

    least_s: float = Field(default=0.0, ge=0)
    tail_s: float = Field(default=0.0, ge=0)
    """mean of what comes on top"""
    most_s: float = Field(default=60.0, ge=0)
    seed: int = 0

    def draw_s(self, number: int) -> float:
        """Return what the move with this ``number`` takes."""
        tail_s = random.Random(f"{self.seed} {number}").expovariate(1 / self.tail_s) if self.tail_s else 0.0
        return min(self.most_s, self.least_s + tail_s)


class Limits(Model):
    """Token buckets, one per action.

    Bucket and refill are AWS's defaults for actions that have no limit of their own:
    https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html
    """

    describe_bucket: int = Field(default=100, ge=1)
    describe_per_s: float = Field(default=20.0, gt=0)
    change_bucket: int = Field(default=50, ge=1)
    change_per_s: float = Field(default=5.0, gt=0)


class Harm(StrEnum):
    """What a fault does to a request."""

    THROTTLED = "throttled"
    """refused with RequestLimitExceeded, as when the bucket is empty"""
    DENIED = "denied"
    """refused with UnauthorizedOperation, as without the permission"""
    BROKEN = "broken"
    """InternalError (500), and nothing was done"""
    LOST_ORDER = "lost_order"
    """the connection ends without an answer, and nothing was done"""
    LOST_REPLY = "lost_reply"
    """the connection ends without an answer, and all was done"""
    SILENT = "silent"
    """all was done, and no answer comes until the caller hangs up"""
    SLOW = "slow"
    """done and answered, ``delay_s`` late"""


class Fault(Model):
    """Harm that comes to the next requests of one action."""

    harm: Harm
    action: str = "*"
    """such as ``AttachVolume``; ``*``: every one"""
    times: int | None = Field(default=1, ge=1)
    """so many requests; None: all, until the knobs are set anew"""
    delay_s: float = Field(default=1.0, ge=0)


class Shown(Model):
    """Another device than the volume: what its node is told instead. None: the truth."""

    serial: str | None = None
    size_bytes: int | None = Field(default=None, ge=0)


class Knobs(Model):
    """Everything at once: setting them replaces the faults that were left."""

    latency: Latency = INSTANT
    remap: RemapDelay = RemapDelay()
    limits: Limits | None = Limits()
    """None: no throttling"""
    describe_lag_s: float = Field(default=0.0, ge=0)
    """for so long a new volume is unknown to every other action (eventual consistency)"""
    stuck: frozenset[str] = frozenset()
    """volumes whose detaching does not end unless it is forced"""
    busy: frozenset[str] = frozenset()
    """volumes that a node has mounted: detaching stays ``busy`` unless it is forced"""
    device_lag_s: float = Field(default=0.0, ge=0)
    """for so long a volume that has been attached does not show at its node, nor its new size when it has grown"""
    modify_pause_s: float = Field(default=6 * 3600.0, ge=0)
    """for so long after a modification has begun the volume takes no other one"""
    shown: dict[str, Shown] = Field(default_factory=dict)
    """volume -> what its nodes see in its place"""
    faults: tuple[Fault, ...] = ()


class Faults:
    """The faults that are left."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self._left: list[tuple[Fault, int | None]] = [(fault, fault.times) for fault in faults]

    def take(self, action: str) -> Fault | None:
        """Return the first fault that this request of ``action`` meets, and count it."""
        for index, (fault, times) in enumerate(self._left):
            if fault.action not in ("*", action):
                continue
            if times is not None:
                self._left[index] = (fault, times - 1)
            if times == 1:
                del self._left[index]
            return fault
        return None


class Bucket:
    """A token bucket: full at first, a token per request, refilled steadily. ``clock`` gives seconds."""

    def __init__(self, size: int, per_s: float, clock: Callable[[], float]) -> None:
        self._size = size
        self._per_s = per_s
        self._clock = clock
        self._tokens = float(size)
        self._at_s = clock()

    def take(self) -> bool:
        now_s = self._clock()
        self._tokens = min(self._size, self._tokens + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
