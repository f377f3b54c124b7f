"""Bugs that somebody might make. Each is planted in the daemons on purpose: the simulation must find it."""

from __future__ import annotations

from collections.abc import Callable

MUTANTS: dict[str, Callable[[], None]] = {}
