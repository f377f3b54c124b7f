"""Which lines and branches of the protocol a search has reached: its calls are played again under ``coverage``.

A process of its own, so that the modules are imported under it too: ``python -m tests.search.coverage_of CALLS OUT``.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import coverage

MODULES = (
    "admission",
    "blackout",
    "records",
    "recovery",
    "source",
    "source_brownout",
    "states",
    "supervisor",
    "sweep",
    "target",
    "target_brownout",
    "way_back",
)


def main(calls: Path, out: Path) -> None:
    folder = Path(__file__).parents[2] / "src" / "emp" / "migration"
    measured = coverage.Coverage(
        branch=True, data_file=None, config_file=False, include=[str(folder / f"{name}.py") for name in MODULES]
    )
    measured.start()
    _play(calls)
    measured.stop()
    report = out.with_suffix(".report")
    measured.json_report(outfile=str(report))
    out.write_text(json.dumps(_missing(json.loads(report.read_text()))))


def _play(calls: Path) -> None:
    from emp.model.errors import EmpError
    from tests.search.project import Project

    project = Project()
    for name, args, kwargs in pickle.loads(calls.read_bytes()):
        with contextlib.suppress(EmpError):
            made = getattr(project, name)(*args, **kwargs)
            if name == "append":
                made.compacted()
            for role in made if isinstance(made, tuple) else ():
                _look(role)


def _look(role: Any) -> None:
    """What an agent shows of a role's state."""
    for shown in ("shown", "committed", "wants_courier"):
        getattr(role, shown, None)


def _missing(report: dict[str, Any]) -> dict[str, Any]:
    missing: list[str] = []
    for path, found in sorted(report["files"].items()):
        name = Path(path).name
        missing += [f"{name}:{line}" for line in found["missing_lines"]]
        lost = set(found["missing_lines"])
        missing += [f"{name}:{a}->{b}" for a, b in found["missing_branches"] if a not in lost and b not in lost]
    totals = report["totals"]
    return {"missing": missing, "branches": totals["num_branches"], "covered": totals["covered_branches"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
