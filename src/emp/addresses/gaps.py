"""Since when an IPv6 address has been no interface's: where none is reassigned in one step, packets for it are lost.

It is kept by address, over orders that are refused and given again, until whoever has the address moved is told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass
class _Gap:
    eni: str | None = None
    """whose it was; None: nobody knows"""
    since_s: float | None = None
    """None: it is an interface's"""
    so_far_s: float = 0.0
    """in earlier gaps"""
    is_least: bool = False
    """a part of it was not seen"""


class Gaps:
    """Of every address that is on its way. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gaps: dict[str, _Gap] = {}

    def taken(self, addresses: Iterable[str], eni: str) -> None:
        """They are taken from ``eni`` now."""
        for address in addresses:
            gap = self._gaps.setdefault(address, _Gap())
            gap.eni, gap.since_s = eni, self._clock()

    def kept(self, addresses: Iterable[str]) -> None:
        """The interface was to give them up, and did not."""
        for address in addresses:
            self._gaps[address].since_s = None

    def given(self, addresses: Iterable[str]) -> None:
        """They are an interface's, as the cloud has just said."""
        for address in addresses:
            gap = self._gaps.get(address)
            if gap is not None and gap.since_s is not None:
                gap.so_far_s += self._clock() - gap.since_s
                gap.since_s = None

    def looked(self, addresses: Iterable[str], holders: Mapping[str, str]) -> None:
        """A look has shown whose they are. What nobody has, and nobody here took, has been so for longer."""
        for address in addresses:
            gap, holder = self._gaps.get(address), holders.get(address)
            if gap is None:
                if holder is None:
                    self._gaps[address] = _Gap(since_s=self._clock(), is_least=True)
            elif holder is not None and holder == gap.eni and gap.since_s is not None:
                gap.since_s, gap.is_least = None, True  # it never left, or it is back: an answer was lost
            elif holder is not None:
                self.given([address])

    def open(self, addresses: Iterable[str]) -> tuple[str, ...]:
        """Return which of ``addresses`` are no interface's, as far as is known."""
        return tuple(a for a in addresses if a in self._gaps and self._gaps[a].since_s is not None)

    def origins(self, addresses: Iterable[str]) -> dict[str, list[str]]:
        """Return the interfaces that those that are no interface's were taken from."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for address in self.open(addresses):
            if (eni := self._gaps[address].eni) is not None:
                found[eni].append(address)
        return dict(found)

    def close(self, addresses: Sequence[str]) -> tuple[float | None, bool]:
        """Return how long, at longest, one of them was nobody's, and whether that is a lower bound; then forget it.

        None: they are none. One of which nothing is known was there before anybody looked.
        """
        gaps = [self._gaps.pop(address, _Gap(is_least=True)) for address in addresses]
        if not gaps:
            return None, False
        return round(max(gap.so_far_s for gap in gaps), 3), any(gap.is_least for gap in gaps)
