"""When will pre-copy be done? A forecast from what the last pass showed.

With ``remaining`` bytes left, ``bandwidth`` B and ``dirty rate`` D (bytes/s), a pass lasts remaining / B and leaves
remaining * D / B behind: a geometric series with ratio r = D / B (Clark et al., "Live Migration of Virtual Machines",
NSDI 2005, section 3). It ends when a remainder fits the allowed pause: remaining * r^n <= B * max_blackout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    converges: bool
    eta_s: float | None
    """until the blackout; None where pre-copy does not converge or nothing is known yet"""
    passes: int | None
    """still to come"""


def forecast(
    *, remaining_bytes: float, bandwidth_bytes_per_s: float, dirty_bytes_per_s: float, max_blackout_ms: float
) -> Forecast:
    """Return how long pre-copy will go on at the present rates."""
    if bandwidth_bytes_per_s <= 0:
        return Forecast(converges=True, eta_s=None, passes=None)
    fits_bytes = bandwidth_bytes_per_s * max_blackout_ms / 1000
    if remaining_bytes <= fits_bytes:
        return Forecast(converges=True, eta_s=0.0, passes=0)
    ratio = dirty_bytes_per_s / bandwidth_bytes_per_s
    if ratio >= 1:
        return Forecast(converges=False, eta_s=None, passes=None)
    first_s = remaining_bytes / bandwidth_bytes_per_s
    if ratio * remaining_bytes <= fits_bytes:
        passes = 1
    else:
        passes = math.ceil(math.log(fits_bytes / remaining_bytes) / math.log(ratio))
    eta_s = first_s * (1 - ratio**passes) / (1 - ratio)
    return Forecast(converges=True, eta_s=eta_s, passes=passes)


FIRST_LIMIT_MS = 5
PASSES_PER_STEP = 2


def switchover_limit_ms(passes: int, max_blackout_ms: int) -> int:
    """Return the pause that the hypervisor may forecast before it switches over, after ``passes`` pre-copy passes.

    It opens step by step: an idle or moderately busy guest goes over with a few milliseconds of memory left, and only
    one that does not get there is allowed more, up to what the policy says. Doubles every second pass.
    """
    steps = max(0, passes - 1) // PASSES_PER_STEP
    return min(max_blackout_ms, FIRST_LIMIT_MS << min(steps, 16))
