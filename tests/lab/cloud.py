"""What a test does to a lab's simulated cloud: as an operator of the cloud, and as one who has its credentials."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emp.lab import cloud_control, region
from emp.lab.down import down
from emp.lab.region import Profile
from emp.lab.topology import CTL
from emp.lab.up import Options, up
from emp.lab.verbs import command_in
from tests.lab.conftest import Pool
from tests.leaks import outliving

_CALLER = """
import asyncio, json, sys
from functools import cache
from pathlib import Path
from botocore.exceptions import ClientError
from emp.aws.api import make_client
from emp.lab.cloud_control import send

region, url = sys.argv[1:]
home = Path("/var/lib/emp")

@cache
def client(service):
    return make_client(
        region, endpoint_url=url, ca_file=home / "pki/ca-cert.pem", credentials_file=home / "aws-credentials",
        read_s=5.0, service=service,
    )

def answer(service, call, parameters):
    try:
        return getattr(client(service), call)(**parameters)
    except ClientError as error:
        return {"Refused": error.response["Error"]["Code"]}

for line in sys.stdin:
    asked = json.loads(line)
    if "knobs" in asked:
        answers = asyncio.run(send(url, asked["knobs"]))
    else:
        answers = [answer(asked["service"], *each) for each in asked["calls"]]
    print(json.dumps(answers, default=str), flush=True)
"""


class _Caller:
    """A process in the controller's place that calls the cloud: boto3 takes half a second to be loaded."""

    def __init__(self, pool: Pool) -> None:
        argv = command_in(pool.files, CTL.name, [sys.executable, "-c", _CALLER, region.REGION, region.url()])
        with outliving(f"the lab {pool.name}"):
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the process that calls the cloud has died; its traceback is above"
        return json.loads(line)

    @property
    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


_callers: dict[str, _Caller] = {}


def _caller(pool: Pool) -> _Caller:
    if pool.name not in _callers or _callers[pool.name].is_dead:
        _callers[pool.name] = _Caller(pool)
    return _callers[pool.name]


@contextmanager
def calls_from(pool: Pool) -> Iterator[Pool]:
    """End, with the block, the process that calls the cloud of a pool."""
    try:
        yield pool
    finally:
        if (caller := _callers.pop(pool.name, None)) is not None:
            caller.close()


@contextmanager
def cloud_of_three(name: str) -> Iterator[Pool]:
    """Give a pool of three nodes with a cloud; n3 is in another zone than the others."""
    with outliving(f"the lab {name}"):
        made = Pool(up(Options(name, 3, cloud=Profile.INSTANT, zones={"n3": "b"})))
    with calls_from(made):
        yield made
    down(made.files)


def turn(pool: Pool, **knobs: Any) -> None:
    """Set the cloud's knobs; what is not named is as it is by default."""
    _caller(pool).ask(knobs=json.loads(cloud_control.as_json(**knobs)))


def call(pool: Pool, action: str, service: str = "ec2", **parameters: Any) -> Any:
    """Return the cloud's answer to ``action``, or ``{"Refused": code}``."""
    (answer,) = call_all(pool, [(action, parameters)], service)
    return answer


def call_all(pool: Pool, calls: Sequence[tuple[str, dict[str, Any]]], service: str = "ec2") -> list[Any]:
    """Return the answers to several calls of actions with their parameters, each as ``call`` does."""
    return list(_caller(pool).ask(service=service, calls=calls))


def attached(pool: Pool, volume: str) -> dict[str, str]:
    """Return instance -> state of its attachment, as the cloud describes the volume."""
    (found,) = call(pool, "describe_volumes", VolumeIds=[volume])["Volumes"]
    return {held["InstanceId"]: held["State"] for held in found["Attachments"]}
