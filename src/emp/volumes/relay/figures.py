"""What a relay counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RoundTrip:
    """From a request's first sending upstream to its answer, re-sending and holding included."""

    count: int = 0
    total_s: float = 0.0
    max_s: float = 0.0

    def add(self, took_s: float) -> None:
        self.count += 1
        self.total_s += took_s
        self.max_s = max(self.max_s, took_s)

    def as_dict(self) -> dict[str, float]:
        mean_s = self.total_s / self.count if self.count else 0.0
        return {"count": self.count, "mean_ms": mean_s * 1000, "max_ms": self.max_s * 1000}


@dataclass
class Figures:
    """Since the relay's start; what has been answered without an error."""

    read_ops: int = 0
    read_bytes: int = 0
    write_ops: int = 0
    """of all kinds: writes, discards, zeroes"""
    write_bytes: int = 0
    flushes: int = 0
    errors: int = 0
    """answers of the volume itself that were errors, passed on"""
    reconnects: int = 0
    """upstream connections that were lost and made again"""
    round_trip: RoundTrip = field(default_factory=RoundTrip)
