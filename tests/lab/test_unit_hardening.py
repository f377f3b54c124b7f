"""What the agent's systemd unit leaves it of root's privileges is enough: to start EVMs, to migrate, to adopt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.lab import daemons, verbs
from emp.lab.places import source_directory
from tests.lab.conftest import Pool
from tests.lab.pool import subject, until
from tests.leaks import outliving
from tests.unit.test_packaging import UNITS, service

CAP_SYS_ADMIN = 21
"""root's own, which no unit leaves"""


@pytest.fixture
def confined(pool: Pool) -> Iterator[str]:
    """A node whose agent was started with the unit's capabilities; afterwards it has all again."""
    node = "n2"
    wanted = service(UNITS[0])["CapabilityBoundingSet"].split()
    keep = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in wanted)])
    start = ["setpriv", "--no-new-privs", f"--bounding-set={keep}", "--", "setsid", "--fork", "sh", "-c"]
    start += [f"exec {sys.executable} -m emp.agent --config /var/lib/emp/agent.json >/run/log 2>&1"]
    before = boot_id(pool, node)
    pool.kill(node, "agent")
    with outliving(f"the lab {pool.name}"):
        pool.run_in(node, "env", f"PYTHONPATH={source_directory()}", *start)
    until(lambda: daemons.find(pool.files, node, "agent"), "the agent runs")
    until(lambda: boot_id(pool, node) != before, "the agent reports")
    yield node
    verbs.kill(pool.files, node, "agent")
    pool.start(node, "agent")


def boot_id(pool: Pool, node: str) -> str:
    return str(pool.json("node", "show", node)["report"]["boot_id"])


def test_the_units_capabilities_are_enough(pool: Pool, confined: str) -> None:
    agent = daemons.find(pool.files, confined, "agent")
    assert agent is not None
    lines = Path(f"/proc/{agent.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert not int(status["CapBnd"], 16) >> CAP_SYS_ADMIN & 1
    with subject(pool, node=confined, volumes=["io2:16MiB"]) as evm:
        evm.migrate("n1")
        evm.check_only_on("n1")
        evm.migrate(confined)
        evm.check_only_on(confined)
