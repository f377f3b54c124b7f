"""What a run of the fault tests has seen, for ``build/faults.json``."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fault.matrix import not_applicable


@dataclass
class FaultRecord:
    began_s: float
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    """cell -> expected, seen, passed, why, seconds, violations"""
    planted: dict[str, bool] = field(default_factory=dict)
    """checker -> whether it has caught the violation that was planted for it"""

    def sent(self) -> str:
        """Return what ``take`` takes, in the process that collects what all of them saw."""
        return json.dumps([self.cells, self.planted])

    def take(self, sent: str) -> None:
        cells, planted = json.loads(sent)
        self.cells |= cells
        self.planted |= planted

    def write(self, path: Path) -> None:
        passed = sum(cell["passed"] for cell in self.cells.values())
        path.parent.mkdir(exist_ok=True)
        body = {
            "cells": len(self.cells),
            "passed": passed,
            "failed": len(self.cells) - passed,
            "not_applicable": [{"cell": cell, "why": why} for cell, why in not_applicable().items()],
            "violations": sum(cell["violations"] for cell in self.cells.values()),
            "planted": [{"checker": checker, "caught": caught} for checker, caught in self.planted.items()],
            "minutes": round((time.monotonic() - self.began_s) / 60, 1),
            "failures": {cell: found for cell, found in self.cells.items() if not found["passed"]},
        }
        path.write_text(json.dumps(body, indent=1) + "\n")


SHOWN = "cell"
"""the property of a test's report that says how its cell went"""
RECORD = pytest.StashKey[FaultRecord]()
