"""What a test does to a lab's simulated cloud: as an operator of the cloud, and as one who has its credentials."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emp.lab import cloud_control, region
from emp.lab.down import down
from emp.lab.region import Profile
from emp.lab.topology import CTL
from emp.lab.up import Options, up
from tests.lab.conftest import Pool
from tests.leaks import outliving

_CALL = """
import json, sys
from pathlib import Path
from botocore.exceptions import ClientError
from emp.aws.api import make_client

region, url, service, calls = sys.argv[1:]
home = Path("/var/lib/emp")
client = make_client(
    region, endpoint_url=url, ca_file=home / "pki/ca-cert.pem", credentials_file=home / "aws-credentials", read_s=5.0,
    service=service,
)

def answer(call, parameters):
    try:
        return getattr(client, call)(**parameters)
    except ClientError as error:
        return {"Refused": error.response["Error"]["Code"]}

print(json.dumps([answer(*each) for each in json.loads(calls)], default=str))
"""


@contextmanager
def cloud_of_three(name: str) -> Iterator[Pool]:
    """Give a pool of three nodes with a cloud; n3 is in another zone than the others."""
    with outliving(f"the lab {name}"):
        made = Pool(up(Options(name, 3, cloud=Profile.INSTANT, zones={"n3": "b"})))
    yield made
    down(made.files)


def turn(pool: Pool, **knobs: Any) -> None:
    """Set the cloud's knobs; what is not named is as it is by default."""
    cloud_control.turn(pool.files, **knobs)


def call(pool: Pool, action: str, service: str = "ec2", **parameters: Any) -> Any:
    """Return the cloud's answer to ``action``, or ``{"Refused": code}``."""
    (answer,) = call_all(pool, [(action, parameters)], service)
    return answer


def call_all(pool: Pool, calls: Sequence[tuple[str, dict[str, Any]]], service: str = "ec2") -> list[Any]:
    """Return the answers to several calls of actions with their parameters, each as ``call`` does."""
    return list(json.loads(_run(pool, _CALL, region.REGION, region.url(), service, json.dumps(calls))))


def _run(pool: Pool, code: str, *arguments: str) -> str:
    done = pool.run_in(CTL.name, sys.executable, "-c", code, *arguments, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def attached(pool: Pool, volume: str) -> dict[str, str]:
    """Return instance -> state of its attachment, as the cloud describes the volume."""
    (found,) = call(pool, "describe_volumes", VolumeIds=[volume])["Volumes"]
    return {held["InstanceId"]: held["State"] for held in found["Attachments"]}
