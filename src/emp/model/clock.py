"""How right a guest's wall clock is, as its node found it when the guest last began to run there."""

from __future__ import annotations

from emp.model.base import Model

RIGHT_MS = 10.0
"""A guest's clock is right within this of its node's."""


class GuestClock(Model):
    """Offsets are the guest's clock less its node's: below zero it is behind."""

    found_ms: float | None = None
    """before anything was done about it; None, as the next two: its agent has not answered"""
    now_ms: float | None = None
    """as last measured"""
    error_ms: float | None = None
    """how far ``now_ms`` may be off: half the round trip of that measurement"""
    is_set: bool = False
    """it was behind, and has been set"""
    trouble: str | None = None
    """why it is not right, or not known to be"""
    at_s: float = 0.0
    """when that was, in seconds since the Unix epoch"""

    @property
    def is_right(self) -> bool:
        """Whether it is known to be right."""
        if self.now_ms is None or self.error_ms is None:
            return False
        return abs(self.now_ms) + self.error_ms <= RIGHT_MS

    @property
    def is_ahead(self) -> bool:
        """Whether it is known to be ahead, by however little: it is left then."""
        return self.now_ms is not None and self.error_ms is not None and self.now_ms > self.error_ms

    @property
    def in_words(self) -> tuple[str, ...]:
        """How it is, for people: a line, and one more where it is not right."""
        if self.now_ms is None or self.found_ms is None:
            advice = "without an agent it is behind by each pause until its NTP corrects it"
            return (f"not known: {self.trouble or 'not looked at yet'}", advice)
        within = f"within {abs(self.now_ms) + (self.error_ms or 0.0):.1f} ms of its node's"
        if self.is_set:
            within = f"was {-self.found_ms:.0f} ms behind, set; now {within}"
        return (within, self.trouble) if self.trouble else (within,)
