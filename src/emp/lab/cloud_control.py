"""Sets the knobs of a lab's simulated cloud, as its operator would: ``turn(files, remap=RemapDelay(least_s=2))``.

The cloud takes them from the controller's place alone, by the pool's certificates, so the request is made there, by
this module as a program.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from emp.lab import region
from emp.lab.state import LabFiles
from emp.lab.topology import CTL
from emp.lab.verbs import command_in
from emp.model.errors import HostError

_HOME = Path("/var/lib/emp")


def turn(files: LabFiles, **knobs: Any) -> None:
    """Set the knobs (``emp.lab.cloud.knobs.Knobs``); what is not named is as it is by default.

    Raises ``HostError`` if the cloud does not take them.
    """
    argv = command_in(files, CTL.name, [sys.executable, "-m", "emp.lab.cloud_control", region.url()])
    done = subprocess.run(argv, input=as_json(**knobs), capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"the cloud does not take the knobs: {done.stderr.strip()[-500:]}")


def as_json(**knobs: Any) -> str:
    """Return ``knobs`` with all others as they are by default."""
    from emp.lab.cloud.knobs import Knobs  # pydantic's models take their time, and most commands need none

    return Knobs(**knobs).model_dump_json()


async def send(url: str, knobs: Any) -> None:
    """From the controller's place: have the cloud at ``url`` take ``knobs``. Raises ``EmpError`` if it does not."""
    from emp.wire.http import WireClient
    from emp.wire.identity import Identity
    from emp.wire.tls import mutual_client

    async with WireClient(url, tls=mutual_client(_HOME / "pki"), server=Identity.parse("volumes-main")) as client:
        await client.request("PUT", "/knobs", knobs)


if __name__ == "__main__":
    asyncio.run(send(sys.argv[1], json.load(sys.stdin)))
