"""A simulated cloud per test, and boto3 with credentials that only it accepts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from emp.wire.identity import Role
from emp.wire.pki import CertificateAuthority
from tests.cloud.aws import WHY_NOT_AWS
from tests.cloud.simulator import ACCESS_KEY, POOL, HandClock, Simulator, simulated


@pytest.fixture(scope="session")
def access_key() -> Iterator[str]:
    """Give the key that boto3 signs with: a made-up one, or the real one where the suite also runs against AWS."""
    with pytest.MonkeyPatch.context() as patch:
        if WHY_NOT_AWS:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
            patch.setenv("AWS_CONFIG_FILE", os.devnull)
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        credentials = boto3.Session().get_credentials()
        assert credentials is not None
        yield credentials.access_key


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the directory of the cloud's certificate, with that of its authority."""
    directory = tmp_path_factory.mktemp("pki")
    authority = CertificateAuthority.create(directory / "ca", POOL)
    authority.issue(Role.VOLUMES, "cloud", ["127.0.0.1"]).write(directory / "cloud")
    authority.issue(Role.CONTROLLER, "main").write(directory / "controller")
    authority.issue(Role.AGENT, "n1").write(directory / "agent")
    return directory


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def simulator(pki: Path, clock: HandClock, access_key: str) -> Iterator[Simulator]:
    with simulated(pki / "cloud", clock=clock, access_key=access_key) as running:
        yield running


@pytest.fixture
def ec2(simulator: Simulator) -> Iterator[Any]:
    client = simulator.client()
    yield client
    client.close()


@pytest.fixture
def efs(simulator: Simulator) -> Iterator[Any]:
    client = simulator.efs_client()
    yield client
    client.close()
