"""Records: every migration has one end, with its cause; and no log, error or command line shows a secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from emp.client.client import Client
from emp.lab import daemons, region
from emp.lab.state import LabFiles
from emp.lab.topology import CTL
from emp.model.migration import Outcome, Stage

_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+\S+\s+(\S{32})")
"""of the second line: the first begins alike in all keys of a kind"""


def check_ends(client: Client, evm: str) -> list[str]:
    """Return what is wrong with the records of an EVM's migrations."""
    wrong = []
    for migration in client.migrations.list(evm=evm).items:
        if migration.stage is not Stage.CLOSED or migration.outcome is None or migration.ended_at is None:
            wrong.append(f"{migration.id} has no end: {migration.stage}, {migration.outcome}")
        elif migration.outcome is not Outcome.COMPLETED and not migration.cause:
            wrong.append(f"{migration.id} ended {migration.outcome} without a cause")
        elif migration.outcome is Outcome.COMPLETED and not migration.committed:
            wrong.append(f"{migration.id} completed without a commit")
    return wrong


def check_secrets(files: LabFiles) -> list[str]:
    """Return where a secret of the pool can be read: in a log, or on a command line."""
    secrets = dict(_secrets(files))
    texts = {log.name: log.read_bytes() for log in files.directory.glob("logs/*.log")}
    for place in files.load().topology.places:
        for running in daemons.daemons(files, place):
            texts[f"the command line of process {running.pid} on {place.name}"] = " ".join(running.argv).encode()
    return [f"{where} shows {what}" for where, text in texts.items() for what, key in secrets.items() if key in text]


def _secrets(files: LabFiles) -> Iterator[tuple[str, bytes]]:
    yield "the token for people", (files.data(CTL.name) / "token").read_bytes().strip()
    if files.load().cloud:
        yield "the secret key of the cloud", region.secret(files).encode()
    for place in files.load().topology.places:
        for path in files.data(place.name).glob("pki*/*.pem"):
            yield from ((f"the key {place.name}/{path.name}", key) for key in _key(path))
    for path in files.ca.glob("*.pem"):
        yield from (("the key of the pool's authority", key) for key in _key(path))


def _key(path: Path) -> list[bytes]:
    return _KEY.findall(path.read_bytes())
