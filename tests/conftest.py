"""What holds for every test: namespaces of its own for the session, nothing left behind by anyone, the same examples.

Hypothesis keeps no database of examples: a run depends on the checkout alone, and leaves no files in it.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

pytest_plugins = ["pytester", "tests.isolation", "tests.leaks", "tests.segment"]

settings.register_profile("emp", database=None, print_blob=True)
settings.load_profile("emp")


LONGEST = (
    "lab/test_cloud_single.py", "fault/test_matrix.py", "fault/test_planted.py", "lab/test_cloud.py", "lab/test_efs.py",
    "lab/test_vpc.py", "lab/test_monitoring.py", "lab/test_lifecycle.py", "lab/test_pods.py",
    "simulation/test_simulation.py",
)  # fmt: skip
"""Files that take more than a minute: they begin first, so that in the end no worker waits for another one's file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = "/".join(item.path.parts[-2:])
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        choices=("quick", "all"),
        default="quick",
        help="cells of the fault matrix: a selection, or all (which writes build/faults.json)",
    )
    parser.addoption(
        "--fault-cloud",
        choices=("none", "instant", "aws"),
        default="instant",
        help="volumes of the fault matrix's EVMs: of a simulated cloud, which has EFS too, or of the pool's own server",
    )
